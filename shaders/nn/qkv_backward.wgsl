// Backward of the rotary position embedding, by the opposite angle, on the way of the gradients of q, k and v into the
// rows of one tensor, for the products of the linear map's backward. One invocation turns four points.
//
// HEADS, KV_HEADS, TOKENS, HALF (D/2): host constants.

#import shared/grid

struct Params {
    rows: u32, // T = B N
}

@group(0) @binding(0) var<storage, read> angles: array<vec4<f32>>;   // [N, (cosines: D/2 | sines: D/2)]
@group(0) @binding(1) var<storage, read> d_q: array<elem4>;          // [T, H, D]
@group(0) @binding(2) var<storage, read> d_k: array<elem4>;          // [T, KV, D]
@group(0) @binding(3) var<storage, read> d_v: array<elem4>;          // [T, KV, D]
@group(0) @binding(4) var<storage, read_write> d_qkv: array<elem4>;  // [T, H + 2 KV, D]
@group(0) @binding(5) var<uniform> params: Params;

const VECTORS: u32 = HALF / 4u;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let at = linear_workgroup(workgroup, workgroups) * 256u + invocation;
    const ALL: u32 = HEADS + 2u * KV_HEADS;
    if (at >= params.rows * ALL * VECTORS) {
        return;
    }
    let column = at % VECTORS;
    let head = at / VECTORS % ALL;
    let row = at / (VECTORS * ALL);
    let to = (row * ALL + head) * 2u * VECTORS + column;
    if (head >= HEADS + KV_HEADS) {
        let first = (row * KV_HEADS + head - HEADS - KV_HEADS) * 2u * VECTORS + column;
        d_qkv[to] = d_v[first];
        d_qkv[to + VECTORS] = d_v[first + VECTORS];
        return;
    }
    var x: vec4<f32>;
    var y: vec4<f32>;
    if (head < HEADS) {
        let first = (row * HEADS + head) * 2u * VECTORS + column;
        x = unpack_elem(d_q[first]);
        y = unpack_elem(d_q[first + VECTORS]);
    } else {
        let first = (row * KV_HEADS + head - HEADS) * 2u * VECTORS + column;
        x = unpack_elem(d_k[first]);
        y = unpack_elem(d_k[first + VECTORS]);
    }
    let angle = row % TOKENS * 2u * VECTORS + column;
    let cosine = angles[angle];
    let sine = angles[angle + VECTORS];
    d_qkv[to] = pack_elem(x * cosine + y * sine);
    d_qkv[to + VECTORS] = pack_elem(y * cosine - x * sine);
}
