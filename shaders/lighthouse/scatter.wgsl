// Scatter (spec section 7), as a gather: a token sums the rows of the entries that reach it, at most one of each level,
// the finest first. One invocation makes four elements.
//
// HEAD_DIM, LEVELS (>= 2), POOLING: host constants.

#import shared/grid
#import shared/pyramid

struct Params {
    batch: u32,
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    entries: u32, // P
    gathered: u32, // S
}

@group(0) @binding(0) var<storage, read> gathered_o: array<elem4>;   // [B, H, S, D]
@group(0) @binding(1) var<storage, read> positions: array<u32>;      // [B, H, P]
@group(0) @binding(2) var<storage, read_write> o: array<elem4>;      // [B, N, H, D]
@group(0) @binding(3) var<uniform> params: Params;

const COLUMNS: u32 = HEAD_DIM / 4u;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let at = linear_workgroup(workgroup, workgroups) * 256u + invocation;
    if (at >= params.batch * params.tokens * params.heads * COLUMNS) {
        return;
    }
    let column = at % COLUMNS;
    let row = at / COLUMNS; // (b * N + j) * H + h
    let head = row / (params.heads * params.tokens) * params.heads + row % params.heads;
    let token = row / params.heads % params.tokens;

    let words = head * params.entries;
    let rows = head * params.gathered;
    var sum = vec4<f32>(0.0);
    let own = token_position(positions[words + token / POOLING], token);
    if (own != ABSENT) {
        sum += unpack_elem(gathered_o[(rows + own) * COLUMNS + column]);
    }
    for (var l = 1u; l < LEVELS; l++) {
        // An entry writes from the last token that it has seen on, for p^l tokens.
        if (token + 1u >= window(l)) {
            let entry = (token + 1u) / window(l) - 1u;
            let start = level_start(l, params.padded_tokens) - params.padded_tokens;
            let place = position(positions[words + start + entry]);
            if (place != ABSENT) {
                sum += unpack_elem(gathered_o[(rows + place) * COLUMNS + column]);
            }
        }
    }
    o[at] = pack_elem(sum);
}
