// dk and dv in f32, as their kernels leave them for the next dispatch or for flash_backward_dkdv_sum: of each kv head of a
// dispatch and each block of keys 2 * SUBGROUPS rows of matrices, two by two, and last a vector that is one where a tile that
// the mask crosses held infinity or NaN in d_o, else zero. Two rows are dv and dk of MATRIX keys, or of
// flash_backward_dkdv_coop, IN_GROUPS, dv of 2 * MATRIX keys in the first half and dk in the second.

const SUBGROUPS: u32 = BLOCK_N / MATRIX;
const KEY_BLOCKS: u32 = DS_BLOCK / BLOCK_N;

// Vectors of four elements.
const VECTORS: u32 = HEAD_DIM / 4u;
const MATRIX_VECTORS: u32 = MATRIX / 4u;
const MATRIX_SIZE: u32 = MATRIX * MATRIX_VECTORS;
// Two rows of matrices, and all of a block.
const SUBGROUP_CARRIED: u32 = 2u * DEPTH_MATRICES * MATRIX_SIZE;
const CARRIED: u32 = SUBGROUPS * SUBGROUP_CARRIED + 1u;

// Where a block begins.
fn carried_block(kv_head_index: u32, block: u32) -> u32 {
    return (kv_head_index * ((params.tokens + DS_BLOCK - 1u) / DS_BLOCK * KEY_BLOCKS) + block) * CARRIED;
}
