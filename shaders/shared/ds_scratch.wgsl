// d_scores between the kernels of dk and dv, which make them, and flash_backward_dq_from_ds_coop: for each query head of a
// dispatch, each pair of a block of queries and a block of keys that it sees, each MATRIX queries, each MATRIX keys and
// each lane of the subgroup that makes these d_scores two vectors of four. 16 bytes go at a time, and what dq's
// workgroups read lies in the order in which they read it (with the pairs by keys first an H100 is 0 to 1 % slower). The
// queries are those of blocks `first_block` to before `end_block`.

// Where the pair of a block of queries and a block of keys of a head begins.
fn ds_pair(head: u32, queries: u32, keys: u32) -> u32 {
    let before = params.first_block * (params.first_block + 1u) / 2u;
    let of_head = params.end_block * (params.end_block + 1u) / 2u - before;
    return (head * of_head + queries * (queries + 1u) / 2u - before + keys) * (DS_BLOCK / MATRIX) * DS_TILE;
}

// Loads in a tile.
const DS_TILE: u32 = DS_BLOCK * MATRIX / 8u;

fn ds_pack(a: vec4<f32>, b: vec4<f32>) -> vec4<u32> {
    return vec4<u32>(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}
