// Attention's backward for k and v (spec section 8) on cooperative matrices: the formulas of flash_backward_dkdv, in the
// two products of shared/dkdv_coop. Tile j passes through two phases with a barrier after each:
//
//     phase 1    product 1 of tile j;  product 2 of tile j - 1, the first half of its columns
//     phase 2    product 2 of tile j - 1, the second half;  weights and d_scores of tile j;  tile j + 1 staged
//
// That is why the first half of the columns is staged in turns of two and the second in turns of three.

#import shared/dkdv_coop

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
    #import shared/dkdv_coop_keep

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
                    // Each tensor's stores by themselves: see flash_forward_rows_coop.
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

    #import shared/dkdv_coop_leave
}
