// Attention's backward for q (spec section 8) on cooperative matrices, without memory for d_scores: the formulas of
// flash_backward_dq.
//
// One workgroup per (batch, head, block of BLOCK_M queries) of eight subgroups in two groups: group 0 keeps q and
// group 1 keeps d_o in registers, each subgroup 2 * MATRIX rows of it. They stream over tiles of MATRIX keys up to the
// diagonal and multiply twice, in one code with two base addresses:
//
//     product 1    group 0: scores^T = k q^T           group 1: d_weights^T = v d_o^T
//     product 2    dq += d_scores k, each group half of the columns
//
// Tile j passes through two phases with a barrier after each, so keys are staged in turns of three:
//
//     phase 1    product 1 of tile j
//     phase 2    product 2 of tile j - 1;  d_scores of tile j;  tile j + 1 staged
//
// What the mask excludes must not reach dq even as 0 * NaN: keys of tiles that the mask crosses get zero in place of
// infinity and NaN between the products, and where there were any, the last step adds what dq lacks of them.

#import shared/flash_params
#import shared/grid
#import shared/lacking

@group(0) @binding(0) var<storage, read_write> q: array<elem4>;     // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(1) var<storage, read_write> k: array<vec4<u32>>; // the same with KV heads
@group(0) @binding(2) var<storage, read_write> v: array<vec4<u32>>; // as k
@group(0) @binding(3) var<storage, read_write> d_o: array<elem4>;   // as q
@group(0) @binding(4) var<storage, read_write> lse_delta: array<vec2<f32>>; // [B, H, S]
@group(0) @binding(5) var<storage, read_write> dq: array<elem4>;    // as q
@group(0) @binding(6) var<uniform> params: Params;

const LOG2_E: f32 = 1.4426950408889634;
const WORKGROUP: u32 = 8u * SUBGROUP;
const LANES: u32 = SUBGROUP / MATRIX;

// Vectors of four elements. Rows in workgroup memory are two longer than their contents, against bank conflicts.
const VECTORS: u32 = HEAD_DIM / 4u;
const MATRIX_VECTORS: u32 = MATRIX / 4u;
const ROW_STRIDE: u32 = 2u * COLUMN_MATRICES * MATRIX_VECTORS + 2u;
const SCORE_STRIDE: u32 = BLOCK_M / 4u + 2u;
const SCORE_ROWS: u32 = MATRIX * SCORE_STRIDE;

// A matrix as the lanes see it: those below MATRIX_LANES of a row have MATRIX_CHUNKS vectors each.
const MATRIX_LANES: u32 = min(LANES, MATRIX_VECTORS);

// Three turns of keys, then values.
const ROWS: u32 = MATRIX * ROW_STRIDE;
const VALUES: u32 = 3u * ROWS;

// Staging of a tile's rows: STAGE_ROWS at a time, one load for each invocation.
const LOADS: u32 = VECTORS / LOAD_VECTORS;
const STAGE_ROWS: u32 = WORKGROUP / LOADS;
const STAGE_EVEN: bool = STAGE_ROWS * LOADS == WORKGROUP && MATRIX % STAGE_ROWS == 0u;

// A subgroup's own part of scores or of the kept rows' memory, for reading and writing a matrix.
const EXCHANGE: u32 = 2u * SCORE_ROWS / 8u;
const EXCHANGE_STRIDE: u32 = MATRIX_VECTORS + 2u;

var<workgroup> staged: array<elem4, 4u * ROWS>;
// Of group 0 the scores, of group 1 the gradients of the weights.
var<workgroup> scores: array<vec4<f32>, 2u * SCORE_ROWS>;
// d_scores take half of it; all of it serves the exchange.
var<workgroup> d_scores: array<elem4, 2u * SCORE_ROWS>;
// Whether keys held infinity or NaN.
var<workgroup> non_finite: vec4<u32>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    #import shared/query_unit
    let last_token = params.tokens - 1u;
    let tiles = (min(first_query + BLOCK_M, params.tokens) + MATRIX - 1u) / MATRIX;

    let subgroup = invocation / SUBGROUP;
    let group = subgroup / 4u;
    let lane_row = invocation % SUBGROUP / LANES;
    let lane = invocation % LANES;
    let exchange_at = subgroup * EXCHANGE;
    let exchange_row = exchange_at + lane_row * EXCHANGE_STRIDE + lane;
    // This subgroup's queries in the products, and this lane's in between.
    let kept_row = subgroup % 4u * 2u * MATRIX;
    let product_at = group * SCORE_ROWS + kept_row / 4u;
    let d_scores_at = kept_row / 4u;
    let columns_at = group * COLUMN_MATRICES * MATRIX_VECTORS;
    // Lanes that a row of a matrix has no vectors for do the last one's work again.
    let chunk = subgroup * MATRIX_VECTORS + min(lane, MATRIX_LANES - 1u);
    let chunk_at = lane_row * SCORE_STRIDE + chunk;
    let query = first_query + chunk * 4u;

    let stage_row = select(MATRIX, invocation / LOADS, invocation < STAGE_ROWS * LOADS);
    let stage_load = invocation % LOADS;
    let stage_at = stage_row * ROW_STRIDE + stage_load * LOAD_VECTORS;

    // q or d_o, through this subgroup's part of the memory of d_scores. Rows past the last token repeat it and are not
    // written.
    #for r in 0..2
    var kept$r: array<MatrixB, DEPTH_MATRICES>;
    var sums$r: array<MatrixC, COLUMN_MATRICES>;
    let kept_token$r = min(first_query + kept_row + $ru * MATRIX + lane_row, last_token);
    let kept_at$r = (base + kept_token$r * params.token_stride) * VECTORS + lane;
    #for d in 0..DEPTH_MATRICES
    if (lane < MATRIX_LANES) {
        for (var i = 0u; i < MATRIX_CHUNKS; i++) {
            let at = kept_at$r + $du * MATRIX_VECTORS + i * MATRIX_LANES;
            if (group == 0u) {
                d_scores[exchange_row + i * MATRIX_LANES] = q[at];
            } else {
                d_scores[exchange_row + i * MATRIX_LANES] = d_o[at];
            }
        }
    }
    subgroupBarrier();
    kept$r[$d] = coopLoad<MatrixB>(&d_scores[exchange_at], EXCHANGE_STRIDE);
    subgroupBarrier();
    #end
    #end
    #for i in 0..MATRIX_CHUNKS
    var row_lse$i: vec4<f32>;
    var row_delta$i: vec4<f32>;
    for (var e = 0u; e < 4u; e++) {
        let at = (batch * params.heads + head) * params.tokens + min(query + $iu * MATRIX_LANES * 4u + e, last_token);
        let row = lse_delta[at];
        row_lse$i[e] = row.x * LOG2_E;
        row_delta$i[e] = row.y;
    }
    #end

    // Before the first tile all is zero.
    workgroupBarrier();
    for (var i = invocation; i < 4u * ROWS; i += WORKGROUP) {
        staged[i] = elem4();
    }
    for (var i = invocation; i < 2u * SCORE_ROWS; i += WORKGROUP) {
        d_scores[i] = elem4();
    }
    if (invocation == 0u) {
        non_finite = vec4<u32>(0u);
    }
    workgroupBarrier();
    var keys_now = 0u;
    var keys_next = ROWS;
    var keys_before = 2u * ROWS;
    // Loads advance by a tile and stay at the last token.
    let row_loads = params.kv_token_stride * LOADS;
    let exponent_scale = params.scale * LOG2_E;
    let last_load = kv_base * LOADS + last_token * row_loads + stage_load;
    #for s in 0..STAGES
    var next_at$s = min(kv_base * LOADS + (stage_row + $su * STAGE_ROWS) * row_loads + stage_load, last_load);
    var next_key$s = k[next_at$s];
    var next_value$s = v[next_at$s];
    if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < MATRIX) {
        #for h in 0..LOAD_VECTORS
        staged[keys_now + stage_at + $su * STAGE_ROWS * ROW_STRIDE + $hu] = vector_of_load(next_key$s, $hu);
        staged[VALUES + stage_at + $su * STAGE_ROWS * ROW_STRIDE + $hu] = vector_of_load(next_value$s, $hu);
        #end
    }
    next_at$s = min(next_at$s + MATRIX * row_loads, last_load);
    next_key$s = k[next_at$s];
    next_value$s = v[next_at$s];
    #end
    workgroupBarrier();

    // Padded to whole bodies: keys past the diagonal are masked.
    for (var first_tile = 0u; first_tile < tiles; first_tile += UNROLL) {
        #for u in 0..UNROLL
        {
            let tile = first_tile + $uu;
            let first_key = tile * MATRIX;

            // Phase 1.
            #for r in 0..2
            let d_scores$r = coopLoad<MatrixA>(&d_scores[d_scores_at + $ru * MATRIX_VECTORS], SCORE_STRIDE);
            var scores$r = MatrixC();
            #end
            let rows_at = select(VALUES, keys_now, group == 0u);
            #for d in 0..DEPTH_MATRICES
            let rows$d = coopLoadT<MatrixA>(&staged[rows_at + $du * MATRIX_VECTORS], ROW_STRIDE);
            #for r in 0..2
            scores$r = coopMultiplyAdd(rows$d, kept$r[$d], scores$r);
            #end
            #end
            #for r in 0..2
            coopStoreT(scores$r, &scores[product_at + $ru * MATRIX_VECTORS], SCORE_STRIDE);
            #end
            workgroupBarrier();

            // Phase 2.
            #for c in 0..COLUMN_MATRICES
            let columns$c = coopLoadT<MatrixB>(&staged[keys_before + columns_at + $cu * MATRIX_VECTORS], ROW_STRIDE);
            #for r in 0..2
            sums$r[$c] = coopMultiplyAdd(d_scores$r, columns$c, sums$r[$c]);
            #end
            #end
            let key = first_key + lane_row;
            #for i in 0..MATRIX_CHUNKS
            let score$i = scores[chunk_at + $iu * MATRIX_LANES];
            let d_weight$i = scores[chunk_at + $iu * MATRIX_LANES + SCORE_ROWS];
            var d_score$i = exp2(fma(score$i, vec4<f32>(exponent_scale), -row_lse$i)) * (d_weight$i - row_delta$i);
            #end
            if (first_key + MATRIX > first_query) {
                #for i in 0..MATRIX_CHUNKS
                let seen$i = vec4<u32>(key) <= vec4<u32>(query + $iu * MATRIX_LANES * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
                d_score$i = select(vec4<f32>(0.0), d_score$i, seen$i);
                #end
                // Product 1 had infinity and NaN, product 2 has zero in their place.
                #for s in 0..STAGES
                if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < MATRIX) {
                    let at = keys_now + stage_at + $su * STAGE_ROWS * ROW_STRIDE;
                    #for h in 0..LOAD_VECTORS
                    let vector$s_$h = staged[at + $hu];
                    staged[at + $hu] = finite_vector(vector$s_$h);
                    if (any(is_non_finite(vector$s_$h))) {
                        non_finite[0] = 1u;
                    }
                    #end
                }
                #end
            }
            #for i in 0..MATRIX_CHUNKS
            d_scores[chunk_at + $iu * MATRIX_LANES] = pack_elem(d_score$i);
            #end
            #for s in 0..STAGES
            if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < MATRIX) {
                #for h in 0..LOAD_VECTORS
                staged[keys_next + stage_at + $su * STAGE_ROWS * ROW_STRIDE + $hu] = vector_of_load(next_key$s, $hu);
                staged[VALUES + stage_at + $su * STAGE_ROWS * ROW_STRIDE + $hu] = vector_of_load(next_value$s, $hu);
                #end
            }
            #end
            #for s in 0..STAGES
            next_at$s = min(next_at$s + MATRIX * row_loads, last_load);
            next_key$s = k[next_at$s];
            next_value$s = v[next_at$s];
            #end
            let keys_free = keys_before;
            keys_before = keys_now;
            keys_now = keys_next;
            keys_next = keys_free;
            workgroupBarrier();
        }
        #end
    }

    // Product 2 of the last tile.
    #for r in 0..2
    let d_scores$r = coopLoad<MatrixA>(&d_scores[d_scores_at + $ru * MATRIX_VECTORS], SCORE_STRIDE);
    #end
    #for c in 0..COLUMN_MATRICES
    let columns$c = coopLoadT<MatrixB>(&staged[keys_before + columns_at + $cu * MATRIX_VECTORS], ROW_STRIDE);
    #for r in 0..2
    sums$r[$c] = coopMultiplyAdd(d_scores$r, columns$c, sums$r[$c]);
    #end
    #end

    // As in flash_forward_coop, code that runs once is short, and what is rare comes after it.
    workgroupBarrier();
    let subgroup_lane = invocation % SUBGROUP;
    #for c in 0..COLUMN_MATRICES
    subgroupBarrier();
    #for r in 0..2
    coopStoreT(sums$r[$c], &scores[exchange_at + $ru * MATRIX * MATRIX_VECTORS], MATRIX_VECTORS);
    #end
    subgroupBarrier();
    for (var i = subgroup_lane; i < 2u * MATRIX * MATRIX_VECTORS; i += SUBGROUP) {
        let token = first_query + kept_row + i / MATRIX_VECTORS;
        let column = columns_at + $cu * MATRIX_VECTORS + i % MATRIX_VECTORS;
        if (token < params.tokens && column < VECTORS) {
            let at = (base + token * params.token_stride) * VECTORS + column;
            dq[at] = pack_elem(scores[exchange_at + i] * params.scale);
        }
    }
    #end
    if (non_finite[0] != 0u) {
        for (var c = 0u; c < COLUMN_MATRICES; c++) {
            for (var i = subgroup_lane; i < 2u * MATRIX * MATRIX_VECTORS; i += SUBGROUP) {
                let token = first_query + kept_row + i / MATRIX_VECTORS;
                let column = columns_at + c * MATRIX_VECTORS + i % MATRIX_VECTORS;
                if (token < params.tokens && column < VECTORS) {
                    let at = (base + token * params.token_stride) * VECTORS + column;
                    let lacking = non_finite_keys(kv_base, first_query, token, column);
                    dq[at] = pack_elem(with_lacking(unpack_elem(dq[at]), lacking));
                }
            }
        }
    }
}

// The sum of all that is infinite or NaN in a column of keys `first` to `last`.
fn non_finite_keys(kv_base: u32, first: u32, last: u32, column: u32) -> vec4<f32> {
    var sum = vec4<f32>(0.0);
    for (var key = first; key <= last; key++) {
        let load = k[(kv_base + key * params.kv_token_stride) * LOADS + column / LOAD_VECTORS];
        sum += unpack_elem(vector_of_load(load ^ finite_load(load), column % LOAD_VECTORS));
    }
    return sum;
}
