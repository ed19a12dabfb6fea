// Attention's backward for k and v (spec section 8) on cooperative matrices: the formulas of flash_backward_dkdv.
//
// One workgroup per (batch, kv head, block of BLOCK_N keys), of two groups of subgroups: group 0 keeps k and group 1
// keeps v in registers, each subgroup 2 * MATRIX rows of it. For each query head of the kv head's group they stream over
// tiles of MATRIX queries from the diagonal on, and multiply twice, in one code with two base addresses:
//
//     product 1    group 0: scores = q k^T             group 1: d_weights = d_o v^T
//     product 2    group 0: dv += weights^T d_o        group 1: dk += d_scores^T q
//
// so every staged row serves two products. Between them go the weights and d_scores, which need both groups' scores. Tile j
// passes through two phases with a barrier after each:
//
//     phase 1    product 1 of tile j;  product 2 of tile j - 1, the first half of its columns
//     phase 2    product 2 of tile j - 1, the second half;  weights and d_scores of tile j;  tile j + 1 staged
//
// That is why the first half of the columns is staged in turns of two and the second in turns of three.
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

#import shared/dkdv

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

const FIRST_STRIDE: u32 = FIRST_MATRICES * MATRIX_VECTORS + 2u;
const SECOND_STRIDE: u32 = SECOND_MATRICES * MATRIX_VECTORS + 2u;

// Staged rows of q, then of d_o: first halves in two turns, then second halves in three.
const FIRST_LOADS: u32 = FIRST_MATRICES * MATRIX_VECTORS / LOAD_VECTORS;
const FIRST: u32 = MATRIX * FIRST_STRIDE;
const SECOND: u32 = MATRIX * SECOND_STRIDE;
const SECOND_START: u32 = 4u * FIRST;
const STAGED: u32 = max(SECOND_START + 6u * SECOND, SUBGROUPS * KEPT_ROWS);

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    #import shared/dkdv_unit

    let subgroup = invocation / SUBGROUP;
    let group = subgroup / (SUBGROUPS / 2u);
    let lane_row = invocation % SUBGROUP / LANES;
    let lane = invocation % LANES;
    let exchange_at = subgroup * EXCHANGE;
    // This subgroup's columns in the products, and this lane's in between.
    let kept_row = subgroup % (SUBGROUPS / 2u) * 2u * MATRIX;
    let product_at = group * SCORE_ROWS + kept_row / 4u;
    // Lanes that a row of a matrix has no vectors for do the last one's work again.
    let chunk = subgroup * MATRIX_VECTORS + min(lane, MATRIX_LANES - 1u);
    let chunk_at = lane_row * SCORE_STRIDE + chunk;
    let key = first_key + chunk * 4u;
    let stage_row = select(MATRIX, invocation / LOADS, invocation < STAGE_ROWS * LOADS);
    let stage_load = invocation % LOADS;

    // The first tile is on its way while k or v are kept.
    #for s in 0..STAGES
    var next_at$s = row_load(batch, first_head, first_row + stage_row + $su * STAGE_ROWS) + stage_load;
    var next_q$s = q[next_at$s];
    var next_d_o$s = d_o[next_at$s];
    #end

    // k or v, half of MATRIX rows at a time through this subgroup's part of the staged rows. All loads are on their way
    // before the first is waited for. Rows past the last token repeat it and are not written.
    var kept_loads: array<vec4<u32>, 4 * KEPT_LOADS>;
    #for r in 0..2
    var kept$r: array<MatrixB, 2 * KEPT_MATRICES>;
    var sums$r: array<MatrixC, DEPTH_MATRICES>;
    #for p in 0..2
    #for n in 0..KEPT_LOADS
    let kept_at$r_$p_$n =
        kept_load(kv_base, first_key + kept_row + $ru * MATRIX, $pu, invocation % SUBGROUP + $nu * SUBGROUP);
    #end
    #end
    #end
    if (group == 0u) {
        #for r in 0..2
        #for p in 0..2
        #for n in 0..KEPT_LOADS
        kept_loads[(2u * $ru + $pu) * KEPT_LOADS + $nu] = k[kept_at$r_$p_$n];
        #end
        #end
        #end
    } else {
        #for r in 0..2
        #for p in 0..2
        #for n in 0..KEPT_LOADS
        kept_loads[(2u * $ru + $pu) * KEPT_LOADS + $nu] = v[kept_at$r_$p_$n];
        #end
        #end
        #end
    }
    let kept_rows_at = subgroup * KEPT_ROWS;
    #for r in 0..2
    #for p in 0..2
    #for n in 0..KEPT_LOADS
    {
        let i = invocation % SUBGROUP + $nu * SUBGROUP;
        let at = kept_rows_at + i / KEPT_ROW_LOADS * KEPT_STRIDE + i % KEPT_ROW_LOADS * LOAD_VECTORS;
        if (KEPT_EVEN || i < MATRIX * KEPT_ROW_LOADS) {
            #for h in 0..LOAD_VECTORS
            staged[at + $hu] = vector_of_load(kept_loads[(2u * $ru + $pu) * KEPT_LOADS + $nu], $hu);
            #end
        }
    }
    #end
    subgroupBarrier();
    #for d in 0..KEPT_MATRICES
    kept$r[$p * KEPT_MATRICES + $d] = coopLoad<MatrixB>(&staged[kept_rows_at + $du * MATRIX_VECTORS], KEPT_STRIDE);
    #end
    subgroupBarrier();
    #end
    #end
    workgroupBarrier();
    var non_finite_before = vec4<f32>(0.0);
    #for once in 0..DS_SCRATCH
    let carried_first = carried_block(kv_head_index, block);
    let carried_at = carried_first + subgroup * SUBGROUP_CARRIED;
    let carried_flag = carried_first + CARRIED - 1u;
    if (params.first_member > 0u || block / KEY_BLOCKS < params.first_block) {
        #for r in 0..2
        #for d in 0..DEPTH_MATRICES
        sums$r[$d] = coopLoadT<MatrixC>(
            &carried[carried_at + ($ru * DEPTH_MATRICES + $du) * MATRIX_SIZE],
            MATRIX_VECTORS,
        );
        #end
        #end
        non_finite_before = carried[carried_flag];
    }
    #end

    // Product 1 takes group 0 to q and group 1 to d_o, product 2 the other way.
    let first_1 = group * FIRST;
    let second_1 = group * SECOND;
    let first_2 = (1u - group) * FIRST;
    let second_2 = (1u - group) * SECOND;

    let in_first = stage_load < FIRST_LOADS;
    let stage_stride = select(SECOND_STRIDE, FIRST_STRIDE, in_first);
    let stage_at = stage_row * stage_stride + select(stage_load - FIRST_LOADS, stage_load, in_first) * LOAD_VECTORS;
    let stage_d_o = stage_at + select(SECOND, FIRST, in_first);

    // Before the first tile all that product 2 takes is zero.
    for (var i = invocation; i < 2u * FIRST; i += WORKGROUP) {
        staged[2u * FIRST + i] = elem4();
    }
    for (var i = invocation; i < 2u * SECOND; i += WORKGROUP) {
        staged[SECOND_START + 4u * SECOND + i] = elem4();
    }
    if (invocation == 0u) {
        scores[NON_FINITE] = non_finite_before;
    }

    for (var head = first_head; head < end_head; head++) {
        let base = batch * params.tokens * params.heads + head * params.head_stride;
        let row_base = (batch * params.heads + head) * params.tokens;
        workgroupBarrier();
        for (var i = invocation; i < 2u * SCORE_ROWS; i += WORKGROUP) {
            weights[i] = elem4();
        }
        var second_now = SECOND_START;
        var second_next = SECOND_START + 2u * SECOND;
        var second_before = SECOND_START + 4u * SECOND;
        // Loads advance by a tile and stay at the last token.
        let last_load = base * LOADS + last_token * row_loads + stage_load;
        #for s in 0..STAGES
        if (first_row < first_key + BLOCK_N) {
            next_q$s = finite_load(next_q$s);
            let d_o$s = finite_load(next_d_o$s);
            if (any(d_o$s != next_d_o$s)) {
                scores[NON_FINITE] = vec4<f32>(1.0);
            }
            next_d_o$s = d_o$s;
        }
        if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < MATRIX) {
            let at = select(second_now, 0u, in_first) + $su * STAGE_ROWS * stage_stride;
            #for h in 0..LOAD_VECTORS
            staged[at + stage_at + $hu] = vector_of_load(next_q$s, $hu);
            #end
            #for h in 0..LOAD_VECTORS
            staged[at + stage_d_o + $hu] = vector_of_load(next_d_o$s, $hu);
            #end
        }
        next_at$s = min(next_at$s + MATRIX * row_loads, last_load);
        next_q$s = q[next_at$s];
        next_d_o$s = d_o[next_at$s];
        #end
        let last_row = row_base + last_token;
        var row_at = min(row_base + first_row + lane_row, last_row);
        var row = lse_delta[row_at];
        workgroupBarrier();

        // Padded to whole bodies: queries past the last token are masked.
        for (var first_tile = 0u; first_tile < tiles; first_tile += UNROLL) {
            #for once in 0..DS_SCRATCH
            let queries = (first_row + first_tile * MATRIX) / DS_BLOCK;
            let ds_at = ds_pair(kv_head_index * params.members + head - first_head, queries, block / KEY_BLOCKS)
                + first_tile % (DS_BLOCK / MATRIX) * DS_TILE + block % KEY_BLOCKS * WORKGROUP + invocation;
            #end
            #for u in 0..UNROLL
            {
                let tile = first_tile + $uu;
                let first_query = first_row + tile * MATRIX;
                let turn = select(tile % 2u, $uu % 2u, UNROLL % 2u == 0u);
                let first_now = turn * 2u * FIRST;
                let first_before = (1u - turn) * 2u * FIRST;

                // Phase 1. Behind the stores of scores the driver would leave the loads of columns.
                #for r in 0..2
                let weights$r = coopLoad<MatrixA>(&weights[product_at + $ru * MATRIX_VECTORS], SCORE_STRIDE);
                #end
                #for d in 0..FIRST_MATRICES
                let rows$d = coopLoadT<MatrixA>(&staged[first_now + first_1 + $du * MATRIX_VECTORS], FIRST_STRIDE);
                #end
                #for d in 0..SECOND_MATRICES
                let more_rows$d = coopLoadT<MatrixA>(
                    &staged[second_now + second_1 + $du * MATRIX_VECTORS],
                    SECOND_STRIDE,
                );
                #end
                #for d in 0..FIRST_MATRICES
                let columns$d = coopLoadT<MatrixB>(
                    &staged[first_before + first_2 + $du * MATRIX_VECTORS],
                    FIRST_STRIDE,
                );
                #end
                #for r in 0..2
                var scores$r = MatrixC();
                #end
                #for d in 0..FIRST_MATRICES
                #for r in 0..2
                scores$r = coopMultiplyAdd(rows$d, kept$r[$d], scores$r);
                #end
                #end
                #for d in 0..SECOND_MATRICES
                #for r in 0..2
                scores$r = coopMultiplyAdd(more_rows$d, kept$r[FIRST_MATRICES + $du], scores$r);
                #end
                #end
                #for r in 0..2
                coopStoreT(scores$r, &scores[product_at + $ru * MATRIX_VECTORS], SCORE_STRIDE);
                #end
                #for d in 0..FIRST_MATRICES
                #for r in 0..2
                sums$r[$d] = coopMultiplyAdd(weights$r, columns$d, sums$r[$d]);
                #end
                #end
                workgroupBarrier();

                // Phase 2.
                #for d in 0..SECOND_MATRICES
                let more_columns$d = coopLoadT<MatrixB>(
                    &staged[second_before + second_2 + $du * MATRIX_VECTORS],
                    SECOND_STRIDE,
                );
                #for r in 0..2
                sums$r[FIRST_MATRICES + $du] = coopMultiplyAdd(weights$r, more_columns$d, sums$r[FIRST_MATRICES + $du]);
                #end
                #end
                let masked = first_query < first_key + BLOCK_N || first_query + MATRIX > params.tokens;
                #for i in 0..MATRIX_CHUNKS
                let score$i = scores[chunk_at + $iu * MATRIX_LANES];
                let d_weight$i = scores[chunk_at + $iu * MATRIX_LANES + SCORE_ROWS];
                #end
                #for i in 0..MATRIX_CHUNKS
                var weight$i = exp2(fma(score$i, vec4<f32>(exponent_scale), vec4<f32>(-LOG2_E * row.x)));
                var d_score$i = weight$i * (d_weight$i - vec4<f32>(row.y));
                #end
                if (masked) {
                    let query = first_query + lane_row;
                    #for i in 0..MATRIX_CHUNKS
                    let keys$i = vec4<u32>(key + $iu * MATRIX_LANES * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
                    let seen$i = (keys$i <= vec4<u32>(query)) & vec4<bool>(query < params.tokens);
                    weight$i = select(vec4<f32>(0.0), weight$i, seen$i);
                    d_score$i = select(vec4<f32>(0.0), d_score$i, seen$i);
                    #end
                    if (first_query + MATRIX < first_key + BLOCK_N) {
                        #for s in 0..STAGES
                        next_q$s = finite_load(next_q$s);
                        let d_o$s = finite_load(next_d_o$s);
                        if (any(d_o$s != next_d_o$s)) {
                            scores[NON_FINITE] = vec4<f32>(1.0);
                        }
                        next_d_o$s = d_o$s;
                        #end
                    }
                }
                #for i in 0..MATRIX_CHUNKS
                weights[chunk_at + $iu * MATRIX_LANES] = pack_elem(weight$i);
                weights[chunk_at + $iu * MATRIX_LANES + SCORE_ROWS] = pack_elem(d_score$i);
                #end
                #for once in 0..DS_SCRATCH
                ds[ds_at + $uu * DS_TILE] = ds_pack(d_score0, d_score1);
                #end
                #for s in 0..STAGES
                if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < MATRIX) {
                    let at = select(second_next, first_before, in_first) + $su * STAGE_ROWS * stage_stride;
                    // Each tensor's stores by themselves: see flash_forward_registers_coop.
                    #for h in 0..LOAD_VECTORS
                    staged[at + stage_at + $hu] = vector_of_load(next_q$s, $hu);
                    #end
                    #for h in 0..LOAD_VECTORS
                    staged[at + stage_d_o + $hu] = vector_of_load(next_d_o$s, $hu);
                    #end
                }
                #end
                #for s in 0..STAGES
                next_at$s = min(next_at$s + MATRIX * row_loads, last_load);
                next_q$s = q[next_at$s];
                next_d_o$s = d_o[next_at$s];
                #end
                row_at = min(row_at + MATRIX, last_row);
                row = lse_delta[row_at];
                let second_free = second_before;
                second_before = second_now;
                second_now = second_next;
                second_next = second_free;
                workgroupBarrier();
            }
            #end
        }

        // Product 2 of the last tile.
        let turn = select((tiles - 1u) % 2u, 1u, UNROLL % 2u == 0u);
        #for r in 0..2
        let weights$r = coopLoad<MatrixA>(&weights[product_at + $ru * MATRIX_VECTORS], SCORE_STRIDE);
        #end
        #for d in 0..FIRST_MATRICES
        let columns$d = coopLoadT<MatrixB>(&staged[turn * 2u * FIRST + first_2 + $du * MATRIX_VECTORS], FIRST_STRIDE);
        #for r in 0..2
        sums$r[$d] = coopMultiplyAdd(weights$r, columns$d, sums$r[$d]);
        #end
        #end
        #for d in 0..SECOND_MATRICES
        let more_columns$d = coopLoadT<MatrixB>(
            &staged[second_before + second_2 + $du * MATRIX_VECTORS],
            SECOND_STRIDE,
        );
        #for r in 0..2
        sums$r[FIRST_MATRICES + $du] = coopMultiplyAdd(weights$r, more_columns$d, sums$r[FIRST_MATRICES + $du]);
        #end
        #end

        let next_head = min(head + 1u, end_head - 1u);
        #for s in 0..STAGES
        next_at$s = row_load(batch, next_head, first_row + stage_row + $su * STAGE_ROWS) + stage_load;
        next_q$s = q[next_at$s];
        next_d_o$s = d_o[next_at$s];
        #end
    }

    #for once in 0..DS_SCRATCH
    // Later queries see the block too, or more heads of the group, or others have parts of it.
    if (
        params.first_member + params.members < group_size || params.end_block * DS_BLOCK < params.tokens || PARTS > 1u
    ) {
        #for r in 0..2
        #for d in 0..DEPTH_MATRICES
        coopStoreT(
            sums$r[$d],
            &carried[carried_at + ($ru * DEPTH_MATRICES + $du) * MATRIX_SIZE],
            MATRIX_VECTORS,
        );
        #end
        #end
        if (invocation == 0u) {
            carried[carried_flag] = scores[NON_FINITE];
        }
        return;
    }
    #end
    let non_finite = scores[NON_FINITE].x != 0.0;
    workgroupBarrier();
    // As in flash_forward_coop, code that runs once is short.
    let scale = select(params.scale, 1.0, group == 0u);
    #for d in 0..DEPTH_MATRICES
    subgroupBarrier();
    #for r in 0..2
    coopStoreT(sums$r[$d], &scores[exchange_at + $ru * MATRIX * MATRIX_VECTORS], MATRIX_VECTORS);
    #end
    subgroupBarrier();
    for (var i = invocation % SUBGROUP; i < 2u * MATRIX * MATRIX_VECTORS; i += SUBGROUP) {
        let token = first_key + kept_row + i / MATRIX_VECTORS;
        if (token < params.tokens) {
            let gradient = pack_elem(scores[exchange_at + i] * scale);
            let at = (kv_base + token * params.kv_token_stride) * VECTORS + $du * MATRIX_VECTORS + i % MATRIX_VECTORS;
            if (group == 0u) {
                dv[at] = gradient;
            } else {
                dk[at] = gradient;
            }
        }
    }
    #end
    // What dv lacks.
    if (non_finite && group == 0u) {
        let end = min(first_key + BLOCK_N, params.tokens);
        for (var d = 0u; d < DEPTH_MATRICES; d++) {
            for (var i = invocation % SUBGROUP; i < 2u * MATRIX * MATRIX_VECTORS; i += SUBGROUP) {
                let token = first_key + kept_row + i / MATRIX_VECTORS;
                let column = d * MATRIX_VECTORS + i % MATRIX_VECTORS;
                if (token < params.tokens) {
                    let at = (kv_base + token * params.kv_token_stride) * VECTORS + column;
                    let lacking = non_finite_d_o(vec2<u32>(batch, kv_head), token, end, column);
                    dv[at] = pack_elem(with_lacking(unpack_elem(dv[at]), lacking));
                }
            }
        }
    }
}
