// Gather (spec section 6): the rows of q, k and v that the indices name, tokens from the inputs and coarser entries from
// the pyramid, into contiguous [S, D] blocks per head. Rows are moved as they are, whatever their type.
//
// Workgroup id x: b * H + h, y: rows of the sub-sequence, z: 0 = q, 1 = k, 2 = v.

#import shared/rows
#import shared/token_slice

struct Params {
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    kv_heads: u32,
    entries: u32, // P
    gathered: u32, // S
    first_token: u32, // of the slice, see shared/token_slice
    end_token: u32,
}

@group(0) @binding(0) var<storage, read> q: array<vec4<u32>>;                    // [B, N, H, D]
@group(0) @binding(1) var<storage, read> k: array<vec4<u32>>;                    // [B, N, KV, D]
@group(0) @binding(2) var<storage, read> v: array<vec4<u32>>;                    // [B, N, KV, D]
@group(0) @binding(3) var<storage, read> pyramid: array<vec4<u32>>;              // [B, (q: P, H, D | k: P, KV, D | v: P, KV, D)]
@group(0) @binding(4) var<storage, read> indices: array<u32>;                    // [B, H, S]
@group(0) @binding(5) var<storage, read_write> gathered_q: array<vec4<u32>>;     // [B, H, S, D]
@group(0) @binding(6) var<storage, read_write> gathered_k: array<vec4<u32>>;     // [B, H, S, D]
@group(0) @binding(7) var<storage, read_write> gathered_v: array<vec4<u32>>;     // [B, H, S, D]
@group(0) @binding(8) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let load = invocation % LOADS;
    let group = invocation / LOADS;
    if (group >= ROWS) {
        return;
    }
    let tensor = workgroup.z;
    let batch = workgroup.x / params.heads;
    let query_head = workgroup.x % params.heads;
    let heads = select(params.kv_heads, params.heads, tensor == 0u);
    let head = select(query_head / (params.heads / params.kv_heads), query_head, tensor == 0u);
    let section = select(params.heads + (tensor - 1u) * params.kv_heads, 0u, tensor == 0u);
    let pooled_row = (batch * (params.heads + 2u * params.kv_heads) + section) * params.entries;

    for (var row = workgroup.y * ROWS + group; row < params.gathered; row += workgroups.y * ROWS) {
        let entry = indices[workgroup.x * params.gathered + row];
        // What is no token comes with the first slice.
        if (!in_slice(select(0u, entry, entry < params.tokens))) {
            continue;
        }
        var value = vec4<u32>(0u); // tokens past N
        if (entry >= params.padded_tokens) {
            value = pyramid[(pooled_row + (entry - params.padded_tokens) * heads + head) * LOADS + load];
        } else if (entry < params.tokens) {
            let at = (token_row(batch, entry) * heads + head) * LOADS + load;
            switch (tensor) {
                case 0u: { value = q[at]; }
                case 1u: { value = k[at]; }
                default: { value = v[at]; }
            }
        }
        let to = (workgroup.x * params.gathered + row) * LOADS + load;
        switch (tensor) {
            case 0u: { gathered_q[to] = value; }
            case 1u: { gathered_k[to] = value; }
            default: { gathered_v[to] = value; }
        }
    }
}
