// Backward of scatter (spec section 8): an entry's gradient is the sum over the tokens that its row was added to. One
// invocation makes four elements.
//
// HEAD_DIM, LEVELS (>= 2), POOLING: host constants.

#import shared/grid
#import shared/pyramid

struct Params {
    batch: u32,
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    gathered: u32, // S
}

@group(0) @binding(0) var<storage, read> d_o: array<elem4>;                  // [B, N, H, D]
@group(0) @binding(1) var<storage, read> indices: array<u32>;                // [B, H, S]
@group(0) @binding(2) var<storage, read_write> gathered_d_o: array<elem4>;   // [B, H, S, D]
@group(0) @binding(3) var<uniform> params: Params;

const COLUMNS: u32 = HEAD_DIM / 4u;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let at = linear_workgroup(workgroup, workgroups) * 256u + invocation;
    if (at >= params.batch * params.heads * params.gathered * COLUMNS) {
        return;
    }
    let column = at % COLUMNS;
    let row = at / COLUMNS; // (b * H + h) * S + s
    let batch = row / params.gathered / params.heads;
    let head = row / params.gathered % params.heads;

    let flat = indices[row];
    var level = 0u;
    while (level + 1u < LEVELS && flat >= level_start(level + 1u, params.padded_tokens)) {
        level++;
    }
    let entry = flat - level_start(level, params.padded_tokens);
    let first = entry * window(level) + window(level) - 1u;
    let end = min(first + window(level), params.tokens);
    var sum = vec4<f32>(0.0);
    for (var token = first; token < end; token++) {
        sum += unpack_elem(d_o[((batch * params.tokens + token) * params.heads + head) * COLUMNS + column]);
    }
    gathered_d_o[at] = pack_elem(sum);
}
