// dq of a block of queries may be the work of several workgroups, each with some of the keys that the block sees; then
// `partial` has their sums, `[parts, head_count, rows, D]`, for flash_backward_dq_sum.

// The first block of BLOCK_M keys of a part, for block `block` of BLOCK_M queries. Parts of early blocks may be empty.
fn part_start(block: u32, part: u32) -> u32 {
    return (block + 1u) * part / params.parts;
}

// Where a row of the queries begins in `partial`, in vectors of four.
fn partial_row(part: u32, head_index: u32, row: u32) -> u32 {
    let rows = (params.end_block - params.first_block) * DS_BLOCK;
    return ((part * params.head_count + head_index) * rows + row) * VECTORS;
}
