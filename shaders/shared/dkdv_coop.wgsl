// What flash_backward_dkdv_coop and flash_backward_dkdv_columns_coop have in common: arguments, workgroup memory and
// functions. Their `main` begins with shared/dkdv_coop_keep and ends with shared/dkdv_coop_leave.
//
// One workgroup per (batch, kv head, block of BLOCK_N keys), of two groups of subgroups: group 0 keeps k and group 1
// keeps v in registers, each subgroup 2 * MATRIX rows of it. For each query head of the kv head's group they stream over
// tiles of MATRIX queries from the diagonal on, and multiply twice, in one code with two base addresses:
//
//     product 1    group 0: scores = q k^T             group 1: d_weights = d_o v^T
//     product 2    group 0: dv += weights^T d_o        group 1: dk += d_scores^T q
//
// so every staged row serves two products. Between them go the weights and d_scores, which need both groups' scores.
//
// DS_SCRATCH also writes d_scores for flash_backward_dq_from_ds_coop; then a dispatch may have some heads of each group
// and the queries of some blocks only, and dk and dv go on in f32 from one to the next. These blocks, of DS_BLOCK tokens,
// are one or more of BLOCK_N. Where the kv heads are too few to keep a device busy, PARTS workgroups share a block, each
// with a part of the query heads of the group, and flash_backward_dkdv_sum adds what they give: `kv_heads` of the
// parameters then counts each kv head PARTS times.
//
// What the mask excludes must not reach a gradient even as 0 * NaN: tiles that the mask crosses are staged with zero in
// place of infinity and NaN. The weights of such a query are NaN by its lse, its d_scores by its delta; what dv lacks
// of d_o then is added in the last step.

#import shared/chunk_params
#import shared/dkdv_carried
#import shared/ds_scratch
#import shared/grid
#import shared/lacking
#import shared/non_finite_d_o

@group(0) @binding(0) var<storage, read_write> q: array<vec4<u32>>;   // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(1) var<storage, read_write> k: array<vec4<u32>>;   // the same with KV heads
@group(0) @binding(2) var<storage, read_write> v: array<vec4<u32>>;   // as k
@group(0) @binding(3) var<storage, read_write> d_o: array<vec4<u32>>; // as q
@group(0) @binding(4) var<storage, read_write> lse_delta: array<vec2<f32>>; // [B, H, S]
@group(0) @binding(5) var<storage, read_write> dk: array<elem4>;      // as k
@group(0) @binding(6) var<storage, read_write> dv: array<elem4>;      // as k
@group(0) @binding(7) var<uniform> params: Params;
#for once in 0..DS_SCRATCH
@group(0) @binding(8) var<storage, read_write> ds: array<vec4<u32>>;  // by query head and pair of blocks, see ds_pair
@group(0) @binding(9) var<storage, read_write> carried: array<vec4<f32>>; // see carried_block
#end

const LOG2_E: f32 = 1.4426950408889634;
const WORKGROUP: u32 = SUBGROUPS * SUBGROUP;
const LANES: u32 = SUBGROUP / MATRIX;

// Vectors of four elements. Rows in workgroup memory are two longer than their contents, against bank conflicts.
const SCORE_STRIDE: u32 = BLOCK_N / 4u + 2u;
const SCORE_ROWS: u32 = MATRIX * SCORE_STRIDE;

// A matrix as the lanes see it: those below MATRIX_LANES of a row have MATRIX_CHUNKS vectors each.
const MATRIX_LANES: u32 = min(LANES, MATRIX_VECTORS);

// A subgroup's own part of the staged rows, for half of MATRIX rows of k or v at a time.
const KEPT_STRIDE: u32 = KEPT_MATRICES * MATRIX_VECTORS + 2u;
const KEPT_ROWS: u32 = MATRIX * KEPT_STRIDE;
const KEPT_ROW_LOADS: u32 = KEPT_MATRICES * MATRIX_VECTORS / LOAD_VECTORS;
const KEPT_EVEN: bool = KEPT_LOADS * SUBGROUP == MATRIX * KEPT_ROW_LOADS;

// Staging of a tile's rows: STAGE_ROWS at a time, one load for each invocation.
const LOADS: u32 = VECTORS / LOAD_VECTORS;
const STAGE_ROWS: u32 = WORKGROUP / LOADS;
const STAGE_EVEN: bool = STAGE_ROWS * LOADS == WORKGROUP && MATRIX % STAGE_ROWS == 0u;

// A subgroup's own part of scores, for two matrices.
const EXCHANGE: u32 = 2u * SCORE_ROWS / SUBGROUPS;

var<workgroup> staged: array<elem4, STAGED>;
// Of group 0 the scores and weights, of group 1 the gradients of both. The pad of the first row tells whether d_o held
// infinity or NaN: there are no more bytes.
var<workgroup> scores: array<vec4<f32>, 2u * SCORE_ROWS>;
var<workgroup> weights: array<elem4, 2u * SCORE_ROWS>;
const NON_FINITE: u32 = SCORE_STRIDE - 1u;

// Where load `i` of a half of MATRIX rows of k or v lies; where the second is shorter it repeats its last.
fn kept_load(kv_base: u32, first_token: u32, half: u32, i: u32) -> u32 {
    let token = min(first_token + min(i / KEPT_ROW_LOADS, MATRIX - 1u), params.tokens - 1u);
    let load = min(half * KEPT_ROW_LOADS + i % KEPT_ROW_LOADS, LOADS - 1u);
    return (kv_base + token * params.kv_token_stride) * LOADS + load;
}

// Where a row of q or d_o begins, in loads; past the last token, that of the last.
fn row_load(batch: u32, head: u32, token: u32) -> u32 {
    let base = batch * params.tokens * params.heads + head * params.head_stride;
    return (base + min(token, params.tokens - 1u) * params.token_stride) * LOADS;
}
