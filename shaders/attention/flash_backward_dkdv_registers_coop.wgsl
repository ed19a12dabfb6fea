// flash_backward_dkdv_coop with scores and weights in registers, where a device lets kernels reach the components of
// its matrices (shared/components): its arguments and parameters, DS_SCRATCH, PARTS, and infinity and NaN in what the
// mask excludes.
//
// A subgroup has MATRIX keys to itself, with k, v, dk and dv in registers, and multiplies with the keys as rows: so the
// components of scores^T become those of weights^T in place, and what a lane has of d_scores^T is 16 bytes for
// flash_backward_dq_from_ds_coop. Workgroup memory, which limits flash_backward_dkdv_coop, carries q and d_o alone. A
// tile of BLOCK_M queries is one phase with a barrier at its end:
//
//     scores^T = k q^T, d_weights^T = v d_o^T;  weights^T, d_scores^T;  dv += weights^T d_o, dk += d_scores^T q;
//     the next tile staged
//
// An H200, whole backward, 18,432 tokens, head_dim 32 / 64 / 80 / 96 / 112: 2.32 / 3.41 / 4.39 / 4.76 / 5.37 ms;
// kernels whose scores passed through memory took 3.87 / 3.86 / 4.54 / 5.12 / 5.66. At 128 they are faster.

#import shared/dkdv

const LOWEST: f32 = -1e30;
const WORKGROUP: u32 = SUBGROUPS * SUBGROUP;

// Vectors of four elements. Rows in workgroup memory are two longer than their contents, against bank conflicts: of q
// and d_o side by side, in two turns, or of k, v, dk or dv, by subgroup.
const STRIDE: u32 = 2u * VECTORS + 2u;
const TILE: u32 = BLOCK_M * STRIDE;
const OWN_STRIDE: u32 = VECTORS + 2u;
const OWN_ROWS: u32 = MATRIX * OWN_STRIDE;

// Staging of a tile's rows: STAGE_ROWS at a time, one load of q and one of d_o for each invocation.
const STAGE_ROWS: u32 = WORKGROUP / LOADS;
const STAGE_EVEN: bool = STAGE_ROWS * LOADS == WORKGROUP && BLOCK_M % STAGE_ROWS == 0u;
const OWN_EVEN: bool = OWN_LOADS * SUBGROUP == MATRIX * LOADS;

var<workgroup> staged: array<elem4, max(2u * TILE, SUBGROUPS * OWN_ROWS)>;
// Of a tile's queries log2(e) * lse, in two turns, then delta.
var<workgroup> terms: array<f32, 4u * BLOCK_M>;
// One where a tile that the mask crosses held infinity or NaN in d_o, else zero.
var<workgroup> non_finite: vec4<f32>;

// The row of a tile in which a query is staged: what a lane has of a row of scores^T are neighbouring queries.
fn staged_row(query: u32) -> u32 {
    let of_matrix = query % MATRIX;
    return query - of_matrix + component_column(of_matrix / COMPONENT_COLUMNS, of_matrix % COMPONENT_COLUMNS);
}

// Where load `i` of MATRIX rows of k or v from a token on lies.
fn own_load(kv_base: u32, first_token: u32, i: u32) -> u32 {
    let token = min(first_token + min(i / LOADS, MATRIX - 1u), params.tokens - 1u);
    return (kv_base + token * params.kv_token_stride) * LOADS + i % LOADS;
}

// Stages it among the subgroup's own rows.
fn stage_own(own_at: u32, i: u32, load: vec4<u32>) {
    if (OWN_EVEN || i < MATRIX * LOADS) {
        let at = own_at + i / LOADS * OWN_STRIDE + i % LOADS * LOAD_VECTORS;
        #for h in 0..LOAD_VECTORS
        staged[at + $hu] = vector_of_load(load, $hu);
        #end
    }
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    #import shared/dkdv_unit

    let subgroup = invocation / SUBGROUP;
    let lane = invocation % SUBGROUP;
    let own_key = first_key + subgroup * MATRIX;
    // The key of the lane's first components, and the first query of those that it has of a matrix.
    let lane_key = own_key + component_row(lane);
    let lane_query = lane % ROW_LANES * COMPONENT_COLUMNS;
    let stage_row = select(BLOCK_M, invocation / LOADS, invocation < STAGE_ROWS * LOADS);
    let stage_load = invocation % LOADS;

    // The first tile is on its way while k and v are kept.
    #for s in 0..STAGES
    let stage_at$s = staged_row(stage_row + $su * STAGE_ROWS) * STRIDE + stage_load * LOAD_VECTORS;
    var next_at$s = row_load(batch, first_head, first_row + stage_row + $su * STAGE_ROWS) + stage_load;
    var next_q$s = q[next_at$s];
    var next_d_o$s = d_o[next_at$s];
    #end
    let own_row = min(invocation, BLOCK_M - 1u);
    var terms_at = (batch * params.heads + first_head) * params.tokens + min(first_row + own_row, last_token);
    var next_terms = lse_delta[terms_at];

    // k and v, through this subgroup's part of the staged rows. Rows past the last token repeat it and are not written.
    let own_at = subgroup * OWN_ROWS;
    var keys: array<MatrixA, DEPTH_MATRICES>;
    var values: array<MatrixA, DEPTH_MATRICES>;
    var sums_k: array<MatrixC, DEPTH_MATRICES>;
    var sums_v: array<MatrixC, DEPTH_MATRICES>;
    #for n in 0..OWN_LOADS
    let load_at$n = own_load(kv_base, own_key, lane + $nu * SUBGROUP);
    let k_load$n = k[load_at$n];
    let v_load$n = v[load_at$n];
    #end
    #for n in 0..OWN_LOADS
    stage_own(own_at, lane + $nu * SUBGROUP, k_load$n);
    #end
    subgroupBarrier();
    #for d in 0..DEPTH_MATRICES
    keys[$d] = coopLoadT<MatrixA>(&staged[own_at + $du * MATRIX_VECTORS], OWN_STRIDE);
    #end
    subgroupBarrier();
    #for n in 0..OWN_LOADS
    stage_own(own_at, lane + $nu * SUBGROUP, v_load$n);
    #end
    subgroupBarrier();
    #for d in 0..DEPTH_MATRICES
    values[$d] = coopLoadT<MatrixA>(&staged[own_at + $du * MATRIX_VECTORS], OWN_STRIDE);
    #end
    subgroupBarrier();
    var non_finite_before = vec4<f32>(0.0);
    #for once in 0..DS_SCRATCH
    let carried_first = carried_block(kv_head_index, block);
    let carried_at = carried_first + subgroup * SUBGROUP_CARRIED;
    let carried_flag = carried_first + CARRIED - 1u;
    if (params.first_member > 0u || block / KEY_BLOCKS < params.first_block) {
        #for d in 0..DEPTH_MATRICES
        sums_v[$d] = coopLoadT<MatrixC>(&carried[carried_at + $du * MATRIX_SIZE], MATRIX_VECTORS);
        sums_k[$d] =
            coopLoadT<MatrixC>(&carried[carried_at + (DEPTH_MATRICES + $du) * MATRIX_SIZE], MATRIX_VECTORS);
        #end
        non_finite_before = carried[carried_flag];
    }
    #end
    if (invocation == 0u) {
        non_finite = non_finite_before;
    }

    for (var head = first_head; head < end_head; head++) {
        let base = batch * params.tokens * params.heads + head * params.head_stride;
        workgroupBarrier();
        // Loads advance by a tile and stay at the last token.
        let last_load = base * LOADS + last_token * row_loads + stage_load;
        let last_terms = (batch * params.heads + head) * params.tokens + last_token;
        #for s in 0..STAGES
        if (first_row < first_key + BLOCK_N) {
            next_q$s = finite_load(next_q$s);
            let d_o$s = finite_load(next_d_o$s);
            if (any(d_o$s != next_d_o$s)) {
                non_finite = vec4<f32>(1.0);
            }
            next_d_o$s = d_o$s;
        }
        if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_M) {
            #for h in 0..LOAD_VECTORS
            staged[stage_at$s + $hu] = vector_of_load(next_q$s, $hu);
            #end
            #for h in 0..LOAD_VECTORS
            staged[VECTORS + stage_at$s + $hu] = vector_of_load(next_d_o$s, $hu);
            #end
        }
        next_at$s = min(next_at$s + BLOCK_M * row_loads, last_load);
        next_q$s = q[next_at$s];
        next_d_o$s = d_o[next_at$s];
        #end
        if (invocation < BLOCK_M) {
            terms[invocation] = next_terms.x * LOG2_E;
            terms[2u * BLOCK_M + invocation] = next_terms.y;
        }
        terms_at = min(terms_at + BLOCK_M, last_terms);
        next_terms = lse_delta[terms_at];
        workgroupBarrier();

        // Padded to whole bodies: queries past the last token are masked.
        for (var first_tile = 0u; first_tile < tiles; first_tile += UNROLL) {
            #for once in 0..DS_SCRATCH
            let queries = (first_row + first_tile * BLOCK_M) / DS_BLOCK;
            let ds_at = ds_pair(kv_head_index * params.members + head - first_head, queries, block / KEY_BLOCKS)
                + first_tile % (DS_BLOCK / BLOCK_M) * TILE_MATRICES * DS_TILE
                + (block % KEY_BLOCKS * SUBGROUPS + subgroup) * SUBGROUP + lane;
            #end
            #for u in 0..UNROLL
            {
                let tile = first_tile + $uu;
                let first_query = first_row + tile * BLOCK_M;
                let turn = select(tile % 2u, $uu % 2u, UNROLL % 2u == 0u);
                let now = turn * TILE;
                let next = (1u - turn) * TILE;

                #for n in 0..TILE_MATRICES
                #for c in 0..COMPONENT_COLUMNS
                let lse$n_$c = terms[turn * BLOCK_M + $nu * MATRIX + lane_query + $cu];
                let delta$n_$c = terms[(2u + turn) * BLOCK_M + $nu * MATRIX + lane_query + $cu];
                #end
                var scores$n = MatrixC();
                var d_weights$n = MatrixC();
                #end
                #for d in 0..DEPTH_MATRICES
                #for n in 0..TILE_MATRICES
                let q_columns$n_$d =
                    coopLoad<MatrixB>(&staged[now + $nu * MATRIX * STRIDE + $du * MATRIX_VECTORS], STRIDE);
                scores$n = coopMultiplyAdd(keys[$d], q_columns$n_$d, scores$n);
                #end
                #end
                #for d in 0..DEPTH_MATRICES
                #for n in 0..TILE_MATRICES
                let d_o_columns$n_$d =
                    coopLoad<MatrixB>(&staged[now + VECTORS + $nu * MATRIX * STRIDE + $du * MATRIX_VECTORS], STRIDE);
                d_weights$n = coopMultiplyAdd(values[$d], d_o_columns$n_$d, d_weights$n);
                #end
                #end
                #for n in 0..TILE_MATRICES
                let of_scores$n = components_of_result(scores$n);
                let of_d_weights$n = components_of_result(d_weights$n);
                #for h in 0..COMPONENT_ROWS
                #for c in 0..COMPONENT_COLUMNS
                var power$n_$h_$c =
                    fma(of_scores$n[$hu * COMPONENT_COLUMNS + $cu], exponent_scale, -lse$n_$c);
                var change$n_$h_$c = of_d_weights$n[$hu * COMPONENT_COLUMNS + $cu] - delta$n_$c;
                #end
                #end
                #end
                if (first_query < first_key + BLOCK_N || first_query + BLOCK_M > params.tokens) {
                    #for n in 0..TILE_MATRICES
                    #for h in 0..COMPONENT_ROWS
                    #for c in 0..COMPONENT_COLUMNS
                    {
                        let query = first_query + $nu * MATRIX + lane_query + $cu;
                        let seen = lane_key + $hu * ROW_STEP <= query && query < params.tokens;
                        power$n_$h_$c = select(LOWEST, power$n_$h_$c, seen);
                        change$n_$h_$c = select(0.0, change$n_$h_$c, seen);
                    }
                    #end
                    #end
                    #end
                }
                #for n in 0..TILE_MATRICES
                #for h in 0..COMPONENT_ROWS
                #for c in 0..COMPONENT_COLUMNS
                let weight$n_$h_$c = exp2(power$n_$h_$c);
                let d_score$n_$h_$c = weight$n_$h_$c * change$n_$h_$c;
                #end
                #end
                let weights$n = factor_of_components(array<factor, COMPONENTS>(
                    #for h in 0..COMPONENT_ROWS
                    #for c in 0..COMPONENT_COLUMNS
                    factor(weight$n_$h_$c),
                    #end
                    #end
                ));
                let d_scores$n = factor_of_components(array<factor, COMPONENTS>(
                    #for h in 0..COMPONENT_ROWS
                    #for c in 0..COMPONENT_COLUMNS
                    factor(d_score$n_$h_$c),
                    #end
                    #end
                ));
                #for once in 0..DS_SCRATCH
                ds[ds_at + ($uu * TILE_MATRICES + $nu) * DS_TILE] = pack_components(array<f32, COMPONENTS>(
                    #for h in 0..COMPONENT_ROWS
                    #for c in 0..COMPONENT_COLUMNS
                    d_score$n_$h_$c,
                    #end
                    #end
                ));
                #end
                #end
                #for n in 0..TILE_MATRICES
                #for d in 0..DEPTH_MATRICES
                let d_o_rows$n_$d =
                    coopLoadT<MatrixB>(&staged[now + VECTORS + $nu * MATRIX * STRIDE + $du * MATRIX_VECTORS], STRIDE);
                sums_v[$d] = coopMultiplyAdd(weights$n, d_o_rows$n_$d, sums_v[$d]);
                #end
                #for d in 0..DEPTH_MATRICES
                let q_rows$n_$d =
                    coopLoadT<MatrixB>(&staged[now + $nu * MATRIX * STRIDE + $du * MATRIX_VECTORS], STRIDE);
                sums_k[$d] = coopMultiplyAdd(d_scores$n, q_rows$n_$d, sums_k[$d]);
                #end
                #end
                // Not changed in place: see flash_forward_registers_coop.
                if (first_row + (tile + 1u) * BLOCK_M < first_key + BLOCK_N) {
                    #for s in 0..STAGES
                    if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_M) {
                        let finite_q = finite_load(next_q$s);
                        let finite_d_o = finite_load(next_d_o$s);
                        if (any(finite_d_o != next_d_o$s)) {
                            non_finite = vec4<f32>(1.0);
                        }
                        #for h in 0..LOAD_VECTORS
                        staged[next + stage_at$s + $hu] = vector_of_load(finite_q, $hu);
                        #end
                        #for h in 0..LOAD_VECTORS
                        staged[next + VECTORS + stage_at$s + $hu] = vector_of_load(finite_d_o, $hu);
                        #end
                    }
                    #end
                } else {
                    #for s in 0..STAGES
                    if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_M) {
                        #for h in 0..LOAD_VECTORS
                        staged[next + stage_at$s + $hu] = vector_of_load(next_q$s, $hu);
                        #end
                        #for h in 0..LOAD_VECTORS
                        staged[next + VECTORS + stage_at$s + $hu] = vector_of_load(next_d_o$s, $hu);
                        #end
                    }
                    #end
                }
                if (invocation < BLOCK_M) {
                    terms[(1u - turn) * BLOCK_M + invocation] = next_terms.x * LOG2_E;
                    terms[(3u - turn) * BLOCK_M + invocation] = next_terms.y;
                }
                #for s in 0..STAGES
                next_at$s = min(next_at$s + BLOCK_M * row_loads, last_load);
                next_q$s = q[next_at$s];
                next_d_o$s = d_o[next_at$s];
                #end
                terms_at = min(terms_at + BLOCK_M, last_terms);
                next_terms = lse_delta[terms_at];
                workgroupBarrier();
            }
            #end
        }

        let next_head = min(head + 1u, end_head - 1u);
        #for s in 0..STAGES
        next_at$s = row_load(batch, next_head, first_row + stage_row + $su * STAGE_ROWS) + stage_load;
        next_q$s = q[next_at$s];
        next_d_o$s = d_o[next_at$s];
        #end
        terms_at = (batch * params.heads + next_head) * params.tokens + min(first_row + own_row, last_token);
        next_terms = lse_delta[terms_at];
    }

    #for once in 0..DS_SCRATCH
    // Later queries see the block too, or more heads of the group, or others have parts of it.
    if (
        params.first_member + params.members < group_size || params.end_block * DS_BLOCK < params.tokens || PARTS > 1u
    ) {
        #for d in 0..DEPTH_MATRICES
        coopStoreT(sums_v[$d], &carried[carried_at + $du * MATRIX_SIZE], MATRIX_VECTORS);
        coopStoreT(sums_k[$d], &carried[carried_at + (DEPTH_MATRICES + $du) * MATRIX_SIZE], MATRIX_VECTORS);
        #end
        if (invocation == 0u) {
            carried[carried_flag] = non_finite;
        }
        return;
    }
    #end
    // dv, then dk.
    #for d in 0..DEPTH_MATRICES
    coopStoreT(factor_of_sums(sums_v[$d], 1.0), &staged[own_at + $du * MATRIX_VECTORS], OWN_STRIDE);
    #end
    subgroupBarrier();
    for (var i = lane; i < MATRIX * VECTORS; i += SUBGROUP) {
        let token = own_key + i / VECTORS;
        if (token < params.tokens) {
            dv[(kv_base + token * params.kv_token_stride) * VECTORS + i % VECTORS] =
                staged[own_at + i / VECTORS * OWN_STRIDE + i % VECTORS];
        }
    }
    subgroupBarrier();
    #for d in 0..DEPTH_MATRICES
    coopStoreT(factor_of_sums(sums_k[$d], params.scale), &staged[own_at + $du * MATRIX_VECTORS], OWN_STRIDE);
    #end
    subgroupBarrier();
    for (var i = lane; i < MATRIX * VECTORS; i += SUBGROUP) {
        let token = own_key + i / VECTORS;
        if (token < params.tokens) {
            dk[(kv_base + token * params.kv_token_stride) * VECTORS + i % VECTORS] =
                staged[own_at + i / VECTORS * OWN_STRIDE + i % VECTORS];
        }
    }
    // What dv lacks.
    if (non_finite.x != 0.0) {
        let end = min(first_key + BLOCK_N, params.tokens);
        for (var i = lane; i < MATRIX * VECTORS; i += SUBGROUP) {
            let token = own_key + i / VECTORS;
            let column = i % VECTORS;
            if (token < params.tokens) {
                let at = (kv_base + token * params.kv_token_stride) * VECTORS + column;
                let lacking = non_finite_d_o(vec2<u32>(batch, kv_head), token, end, column);
                dv[at] = pack_elem(with_lacking(unpack_elem(dv[at]), lacking));
            }
        }
    }
}

// A matrix of dk or dv as it is stored.
fn factor_of_sums(sums: MatrixC, scale: f32) -> MatrixA {
    let components = components_of_result(sums);
    return factor_of_components(array<factor, COMPONENTS>(
        #for h in 0..COMPONENT_ROWS
        #for c in 0..COMPONENT_COLUMNS
        factor(components[$hu * COMPONENT_COLUMNS + $cu] * scale),
        #end
        #end
    ));
}

#for once in 0..DS_SCRATCH
fn pack_components(components: array<f32, COMPONENTS>) -> vec4<u32> {
    return vec4<u32>(
        pack2x16float(vec2<f32>(components[0], components[1])),
        pack2x16float(vec2<f32>(components[2], components[3])),
        pack2x16float(vec2<f32>(components[4], components[5])),
        pack2x16float(vec2<f32>(components[6], components[7])),
    );
}
#end
