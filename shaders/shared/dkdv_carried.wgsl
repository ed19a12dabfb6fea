// dk and dv in f32, as the kernels of shared/dkdv_coop leave them for the next dispatch or for flash_backward_dkdv_sum:
// of each kv head of a dispatch and each block of keys dv and dk, by subgroup and matrix, and last a vector that is one
// where a tile that the mask crosses held infinity or NaN in d_o, else zero.

const SUBGROUPS: u32 = BLOCK_N / MATRIX;
const KEY_BLOCKS: u32 = DS_BLOCK / BLOCK_N;

// Vectors of four elements.
const VECTORS: u32 = HEAD_DIM / 4u;
const MATRIX_VECTORS: u32 = MATRIX / 4u;
const MATRIX_SIZE: u32 = MATRIX * MATRIX_VECTORS;
// What a subgroup has of a block, and all.
const SUBGROUP_CARRIED: u32 = 2u * DEPTH_MATRICES * MATRIX_SIZE;
const CARRIED: u32 = SUBGROUPS * SUBGROUP_CARRIED + 1u;

// Where a block begins.
fn carried_block(kv_head_index: u32, block: u32) -> u32 {
    return (kv_head_index * ((params.tokens + DS_BLOCK - 1u) / DS_BLOCK * KEY_BLOCKS) + block) * CARRIED;
}

// The sum of all that is infinite or NaN in a column of d_o, over queries `first` to before `end` of a kv head's group.
fn non_finite_d_o(batch_head: vec2<u32>, first: u32, end: u32, column: u32) -> vec4<f32> {
    var sum = vec4<f32>(0.0);
    let group_size = params.heads / params.kv_heads;
    for (var head = batch_head.y * group_size; head < (batch_head.y + 1u) * group_size; head++) {
        let base = batch_head.x * params.tokens * params.heads + head * params.head_stride;
        for (var query = first; query < end; query++) {
            let load = d_o[(base + query * params.token_stride) * LOADS + column / LOAD_VECTORS];
            sum += unpack_elem(vector_of_load(load ^ finite_load(load), column % LOAD_VECTORS));
        }
    }
    return sum;
}
