// dq of a block of queries may be the work of several workgroups, each with some of the keys that the block sees; then
// `partial` has their sums, `[parts, heads of the dispatch, rows, D]`, for flash_backward_dq_sum.

// Query heads of the dispatch.
fn head_count() -> u32 {
    return params.kv_head_count * params.members;
}

// The batch entry and the head of one of them.
fn batch_and_head(head_index: u32) -> vec2<u32> {
    let kv_head = params.first_kv_head + head_index / params.members;
    let first_head = kv_head % params.kv_heads * (params.heads / params.kv_heads);
    return vec2<u32>(kv_head / params.kv_heads, first_head + params.first_member + head_index % params.members);
}

// The first block of BLOCK_M keys of a part, for block `block` of BLOCK_M queries. Parts of early blocks may be empty.
fn part_start(block: u32, part: u32) -> u32 {
    return (block + 1u) * part / params.parts;
}

// Where a row of the queries begins in `partial`, in vectors of four.
fn partial_row(part: u32, head_index: u32, row: u32) -> u32 {
    let rows = (params.end_block - params.first_block) * DS_BLOCK;
    return ((part * head_count() + head_index) * rows + row) * VECTORS;
}
