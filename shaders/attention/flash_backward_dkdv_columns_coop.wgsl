// flash_backward_dkdv_coop for a smaller head_dim, where registers have room for a tile's columns too: these are the tile's
// rows as product 2 takes them, loaded while they are staged and used one tile later. So the parts of a phase do not
// wait for each other, and whole rows are staged in turns of two. Tile j passes through two phases with a barrier after
// each, in which stands
//
//     phase 1    scores of tile j and matrices of weights of tile j - 1 loaded;  tile j + 1 staged
//     phase 2    product 2 of tile j - 1;  product 1 of tile j + 1;  weights and d_scores of tile j;  columns of tile j
//
// Loads from storage are issued AHEAD tiles ahead of their staging. Of four subgroups, in 24 KiB, two workgroups share a
// multiprocessor of an H100. dk and dv take 20 % less than by flash_backward_dkdv_coop at head_dim 64, 13 % at 80, 6 % at
// 96; all of it stands in BENCHMARKS.md.

#import shared/dkdv_coop

// Staged rows of q, then of d_o, in two turns.
const STRIDE: u32 = VECTORS + 2u;
const TILE: u32 = MATRIX * STRIDE;
const STAGED: u32 = max(4u * TILE, SUBGROUPS * KEPT_ROWS);

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    #import shared/dkdv_coop_keep

    // Product 1 takes group 0 to q and group 1 to d_o, product 2 the other way.
    let rows_at = group * TILE;
    let columns_at = (1u - group) * TILE;
    let stage_at = stage_row * STRIDE + stage_load * LOAD_VECTORS;

    // Before the first tile all that product 2 takes is zero.
    for (var i = invocation; i < 2u * TILE; i += WORKGROUP) {
        staged[2u * TILE + i] = elem4();
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
            #for h in 0..LOAD_VECTORS
            staged[stage_at + $su * STAGE_ROWS * STRIDE + $hu] = vector_of_load(next_q$s, $hu);
            #end
            #for h in 0..LOAD_VECTORS
            staged[TILE + stage_at + $su * STAGE_ROWS * STRIDE + $hu] = vector_of_load(next_d_o$s, $hu);
            #end
        }
        // By their tile modulo AHEAD.
        var ahead_q$s: array<vec4<u32>, AHEAD>;
        var ahead_d_o$s: array<vec4<u32>, AHEAD>;
        #for a in 0..AHEAD
        next_at$s = min(next_at$s + MATRIX * row_loads, last_load);
        ahead_q$s[($au + 1u) % AHEAD] = q[next_at$s];
        ahead_d_o$s[($au + 1u) % AHEAD] = d_o[next_at$s];
        #end
        #end
        let last_row = row_base + last_token;
        var row_at = min(row_base + first_row + lane_row, last_row);
        var row = lse_delta[row_at];
        workgroupBarrier();

        // Product 1 of the first tile.
        #for d in 0..DEPTH_MATRICES
        var columns$d = coopLoadT<MatrixB>(&staged[2u * TILE + columns_at + $du * MATRIX_VECTORS], STRIDE);
        let first_rows$d = coopLoadT<MatrixA>(&staged[rows_at + $du * MATRIX_VECTORS], STRIDE);
        #end
        #for r in 0..2
        var first_scores$r = MatrixC();
        #for d in 0..DEPTH_MATRICES
        first_scores$r = coopMultiplyAdd(first_rows$d, kept$r[$d], first_scores$r);
        #end
        coopStoreT(first_scores$r, &scores[product_at + $ru * MATRIX_VECTORS], SCORE_STRIDE);
        #end
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
                let masked = first_query < first_key + BLOCK_N || first_query + MATRIX > params.tokens;
                let turn = select(tile % 2u, $uu % 2u, UNROLL % 2u == 0u);
                let now = turn * 2u * TILE;
                let next = (1u - turn) * 2u * TILE;

                // Phase 1.
                if (first_query + MATRIX < first_key + BLOCK_N) {
                    #for s in 0..STAGES
                    ahead_q$s[($uu + 1u) % AHEAD] = finite_load(ahead_q$s[($uu + 1u) % AHEAD]);
                    let d_o$s = finite_load(ahead_d_o$s[($uu + 1u) % AHEAD]);
                    if (any(d_o$s != ahead_d_o$s[($uu + 1u) % AHEAD])) {
                        scores[NON_FINITE] = vec4<f32>(1.0);
                    }
                    ahead_d_o$s[($uu + 1u) % AHEAD] = d_o$s;
                    #end
                }
                #for i in 0..MATRIX_CHUNKS
                let score$i = scores[chunk_at + $iu * MATRIX_LANES];
                let d_weight$i = scores[chunk_at + $iu * MATRIX_LANES + SCORE_ROWS];
                #end
                #for r in 0..2
                let weights$r = coopLoad<MatrixA>(&weights[product_at + $ru * MATRIX_VECTORS], SCORE_STRIDE);
                #end
                #for s in 0..STAGES
                if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < MATRIX) {
                    let at = next + stage_at + $su * STAGE_ROWS * STRIDE;
                    // Each tensor's stores by themselves: see flash_forward_rows_coop.
                    #for h in 0..LOAD_VECTORS
                    staged[at + $hu] = vector_of_load(ahead_q$s[($uu + 1u) % AHEAD], $hu);
                    #end
                    #for h in 0..LOAD_VECTORS
                    staged[at + TILE + $hu] = vector_of_load(ahead_d_o$s[($uu + 1u) % AHEAD], $hu);
                    #end
                }
                next_at$s = min(next_at$s + MATRIX * row_loads, last_load);
                ahead_q$s[($uu + 1u) % AHEAD] = q[next_at$s];
                ahead_d_o$s[($uu + 1u) % AHEAD] = d_o[next_at$s];
                #end
                workgroupBarrier();

                // Phase 2.
                #for d in 0..DEPTH_MATRICES
                let rows$d = coopLoadT<MatrixA>(&staged[next + rows_at + $du * MATRIX_VECTORS], STRIDE);
                #end
                #for d in 0..DEPTH_MATRICES
                #for r in 0..2
                sums$r[$d] = coopMultiplyAdd(weights$r, columns$d, sums$r[$d]);
                #end
                #end
                #for r in 0..2
                var scores$r = MatrixC();
                #end
                #for d in 0..DEPTH_MATRICES
                #for r in 0..2
                scores$r = coopMultiplyAdd(rows$d, kept$r[$d], scores$r);
                #end
                #end
                #for i in 0..MATRIX_CHUNKS
                var weight$i = exp2(fma(score$i, vec4<f32>(exponent_scale), vec4<f32>(-LOG2_E * row.x)));
                var d_score$i = weight$i * (d_weight$i - vec4<f32>(row.y));
                weights[chunk_at + $iu * MATRIX_LANES] = pack_elem(weight$i);
                weights[chunk_at + $iu * MATRIX_LANES + SCORE_ROWS] = pack_elem(d_score$i);
                #end
                #for once in 0..DS_SCRATCH
                ds[ds_at + $uu * DS_TILE] = ds_pack(d_score0, d_score1);
                #end
                #for r in 0..2
                coopStoreT(scores$r, &scores[product_at + $ru * MATRIX_VECTORS], SCORE_STRIDE);
                #end
                #for d in 0..DEPTH_MATRICES
                columns$d = coopLoadT<MatrixB>(&staged[now + columns_at + $du * MATRIX_VECTORS], STRIDE);
                #end
                row_at = min(row_at + MATRIX, last_row);
                row = lse_delta[row_at];
                if (masked) {
                    // Again.
                    let query = first_query + lane_row;
                    #for i in 0..MATRIX_CHUNKS
                    let keys$i = vec4<u32>(key + $iu * MATRIX_LANES * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
                    let seen$i = (keys$i <= vec4<u32>(query)) & vec4<bool>(query < params.tokens);
                    weight$i = select(vec4<f32>(0.0), weight$i, seen$i);
                    d_score$i = select(vec4<f32>(0.0), d_score$i, seen$i);
                    weights[chunk_at + $iu * MATRIX_LANES] = pack_elem(weight$i);
                    weights[chunk_at + $iu * MATRIX_LANES + SCORE_ROWS] = pack_elem(d_score$i);
                    #end
                    #for once in 0..DS_SCRATCH
                    ds[ds_at + $uu * DS_TILE] = ds_pack(d_score0, d_score1);
                    #end
                }
                workgroupBarrier();
            }
            #end
        }

        // Product 2 of the last tile.
        #for r in 0..2
        let weights$r = coopLoad<MatrixA>(&weights[product_at + $ru * MATRIX_VECTORS], SCORE_STRIDE);
        #for d in 0..DEPTH_MATRICES
        sums$r[$d] = coopMultiplyAdd(weights$r, columns$d, sums$r[$d]);
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
