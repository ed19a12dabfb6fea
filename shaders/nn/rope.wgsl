// Rotary position embedding of q and k, in place: elements i and i + D/2 of a head's row are a point in the plane that is
// turned by the angle of its token, position * theta^(-2i/D); backward by the opposite angle. One invocation turns four.
//
// HEAD_DIM, BACKWARD: host constants.

#import shared/grid

struct Params {
    rows: u32,   // T = B N
    tokens: u32, // N
    heads: u32,
    kv_heads: u32,
}

@group(0) @binding(0) var<storage, read> angles: array<vec4<f32>>;   // [N, (cosines: D/2 | sines: D/2)]
@group(0) @binding(1) var<storage, read_write> q: array<elem4>;      // [T, H, D]
@group(0) @binding(2) var<storage, read_write> k: array<elem4>;      // [T, KV, D]
@group(0) @binding(3) var<uniform> params: Params;

const HALF: u32 = HEAD_DIM / 8u;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let at = linear_workgroup(workgroup, workgroups) * 256u + invocation;
    let heads = params.heads + params.kv_heads;
    if (at >= params.rows * heads * HALF) {
        return;
    }
    let column = at % HALF;
    let head = at / HALF % heads;
    let row = at / (HALF * heads);
    let angle = row % params.tokens * 2u * HALF + column;
    let cosine = angles[angle];
    let sine = select(angles[angle + HALF], -angles[angle + HALF], BACKWARD);
    if (head < params.heads) {
        let first = (row * params.heads + head) * 2u * HALF + column;
        let x = unpack_elem(q[first]);
        let y = unpack_elem(q[first + HALF]);
        q[first] = pack_elem(x * cosine - y * sine);
        q[first + HALF] = pack_elem(y * cosine + x * sine);
    } else {
        let first = (row * params.kv_heads + head - params.heads) * 2u * HALF + column;
        let x = unpack_elem(k[first]);
        let y = unpack_elem(k[first + HALF]);
        k[first] = pack_elem(x * cosine - y * sine);
        k[first + HALF] = pack_elem(y * cosine + x * sine);
    }
}
