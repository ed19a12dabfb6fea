// d_scores between flash_backward_dkdv_coop, which makes them, and flash_backward_dq_from_ds_coop: for each query head
// of a dispatch, each block of keys, each tile of MATRIX queries that sees it, each subgroup and each lane of the maker
// two vectors of four. That order costs neither of them anything, and 16 bytes go at a time. The queries are those of
// blocks `first_block` to before `end_block`.

// Where a block of a head begins. Blocks of keys before the first query have all queries, of the others each one block
// of queries less than the one before it.
fn ds_block(head: u32, block: u32) -> u32 {
    let length = params.end_block - params.first_block;
    let later = max(block, params.first_block) - params.first_block;
    let of_head = params.first_block * length + length * (length + 1u) / 2u;
    let before = head * of_head + block * length - later * (later - 1u) / 2u;
    return before * (BLOCK_N / MATRIX) * DS_TILE;
}

// Loads in a tile.
const DS_TILE: u32 = BLOCK_N * MATRIX / 8u;

fn ds_pack(a: vec4<f32>, b: vec4<f32>) -> vec4<u32> {
    return vec4<u32>(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}
