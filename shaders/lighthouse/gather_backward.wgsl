// Backward of gather and pool (spec section 8): a token's gradient is the sum over levels of its entry's, divided by the
// tokens of the entry; for k and v also over the query heads of the group. One invocation makes four elements.
//
// HEAD_DIM, LEVELS (>= 2), POOLING: host constants. Workgroup id z: 0 = dq, 1 = dk, 2 = dv.

#import shared/grid
#import shared/pyramid

struct Params {
    batch: u32,
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    kv_heads: u32,
    entries: u32, // P
    gathered: u32, // S
}

@group(0) @binding(0) var<storage, read> gathered_dq: array<elem4>;  // [B, H, S, D]
@group(0) @binding(1) var<storage, read> gathered_dk: array<elem4>;  // [B, H, S, D]
@group(0) @binding(2) var<storage, read> gathered_dv: array<elem4>;  // [B, H, S, D]
@group(0) @binding(3) var<storage, read> positions: array<u32>;      // [B, H, P]
@group(0) @binding(4) var<storage, read_write> dq: array<elem4>;     // [B, N, H, D]
@group(0) @binding(5) var<storage, read_write> dk: array<elem4>;     // [B, N, KV, D]
@group(0) @binding(6) var<storage, read_write> dv: array<elem4>;     // [B, N, KV, D]
@group(0) @binding(7) var<uniform> params: Params;

const COLUMNS: u32 = HEAD_DIM / 4u;

fn load(tensor: u32, at: u32) -> vec4<f32> {
    switch (tensor) {
        case 0u: { return unpack_elem(gathered_dq[at]); }
        case 1u: { return unpack_elem(gathered_dk[at]); }
        default: { return unpack_elem(gathered_dv[at]); }
    }
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let tensor = workgroup.z;
    let heads = select(params.kv_heads, params.heads, tensor == 0u);
    let at = linear_workgroup(workgroup, workgroups) * 256u + invocation;
    if (at >= params.batch * params.tokens * heads * COLUMNS) {
        return;
    }
    let column = at % COLUMNS;
    let row = at / COLUMNS; // (b * N + j) * heads + head
    let head = row % heads;
    let token = row / heads % params.tokens;
    let batch = row / (heads * params.tokens);
    let group = params.heads / heads; // query heads that share this head: 1 for dq

    var sum = vec4<f32>(0.0);
    for (var g = 0u; g < group; g++) {
        let query_head = batch * params.heads + head * group + g;
        let words = query_head * params.entries;
        let rows = query_head * params.gathered;
        let own = token_position(positions[words + token / POOLING], token);
        if (own != ABSENT) {
            sum += load(tensor, (rows + own) * COLUMNS + column);
        }
        for (var l = 1u; l < LEVELS; l++) {
            let start = level_start(l, params.padded_tokens) - params.padded_tokens;
            let place = position(positions[words + start + token / window(l)]);
            if (place != ABSENT) {
                sum += load(tensor, (rows + place) * COLUMNS + column) / f32(window(l));
            }
        }
    }
    switch (tensor) {
        case 0u: { dq[at] = pack_elem(sum); }
        case 1u: { dk[at] = pack_elem(sum); }
        default: { dv[at] = pack_elem(sum); }
    }
}
