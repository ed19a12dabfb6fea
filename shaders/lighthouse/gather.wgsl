// Gather (spec section 6): the rows of q, k and v that the indices name, tokens from the inputs and coarser entries from
// the pyramid, into contiguous [S, D] blocks per head. One invocation moves four elements.
//
// HEAD_DIM: host constant. Workgroup id z: 0 = q, 1 = k, 2 = v.

#import shared/grid

struct Params {
    batch: u32,
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    kv_heads: u32,
    entries: u32, // P
    gathered: u32, // S
}

@group(0) @binding(0) var<storage, read> q: array<elem4>;                    // [B, N, H, D]
@group(0) @binding(1) var<storage, read> k: array<elem4>;                    // [B, N, KV, D]
@group(0) @binding(2) var<storage, read> v: array<elem4>;                    // [B, N, KV, D]
@group(0) @binding(3) var<storage, read> pyramid: array<elem4>;              // [B, (q: P, H, D | k: P, KV, D | v: P, KV, D)]
@group(0) @binding(4) var<storage, read> indices: array<u32>;                // [B, H, S]
@group(0) @binding(5) var<storage, read_write> gathered_q: array<elem4>;     // [B, H, S, D]
@group(0) @binding(6) var<storage, read_write> gathered_k: array<elem4>;     // [B, H, S, D]
@group(0) @binding(7) var<storage, read_write> gathered_v: array<elem4>;     // [B, H, S, D]
@group(0) @binding(8) var<uniform> params: Params;

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
    let tensor = workgroup.z;
    let heads = select(params.kv_heads, params.heads, tensor == 0u);
    let row = at / COLUMNS; // (b * H + h) * S + s
    let column = at % COLUMNS;
    let batch = row / params.gathered / params.heads;
    let query_head = row / params.gathered % params.heads;
    let head = select(query_head / (params.heads / params.kv_heads), query_head, tensor == 0u);

    let entry = indices[row];
    let is_token = entry < params.padded_tokens;
    let token = (((batch * params.tokens + entry) * heads + head) * COLUMNS) + column;
    let section = select(params.heads + (tensor - 1u) * params.kv_heads, 0u, tensor == 0u);
    let pooled_row = (batch * (params.heads + 2u * params.kv_heads) + section) * params.entries;
    let pooled = (pooled_row + (entry - params.padded_tokens) * heads + head) * COLUMNS + column;

    var value = pack_elem(vec4<f32>(0.0)); // tokens past N
    if (!is_token) {
        value = pyramid[pooled];
    } else if (entry < params.tokens) {
        switch (tensor) {
            case 0u: { value = q[token]; }
            case 1u: { value = k[token]; }
            default: { value = v[token]; }
        }
    }
    switch (tensor) {
        case 0u: { gathered_q[at] = value; }
        case 1u: { gathered_k[at] = value; }
        default: { gathered_v[at] = value; }
    }
}
