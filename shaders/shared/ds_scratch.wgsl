// d_scores between flash_backward_dkdv_coop, which makes them, and flash_backward_dq_from_ds_coop: for each query head
// of a dispatch, each block of keys, each tile of MATRIX queries from the block's diagonal on, each subgroup and each
// lane of the maker two vectors of four. That order costs neither of them anything, and 16 bytes go at a time.

// Where a block of a head begins. All blocks of a head take half of its square.
fn ds_block(head: u32, block: u32, blocks: u32) -> u32 {
    let before = head * (blocks * (blocks + 1u) / 2u) + block * blocks - block * (block - 1u) / 2u;
    return before * (BLOCK_N / MATRIX) * DS_TILE;
}

// Loads in a tile.
const DS_TILE: u32 = BLOCK_N * MATRIX / 8u;

fn ds_pack(a: vec4<f32>, b: vec4<f32>) -> vec4<u32> {
    return vec4<u32>(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}
