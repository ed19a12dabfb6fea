// flash_forward_coop with scores and weights in registers, where a device lets kernels reach the components of its
// matrices (shared/components): its arguments, parameters, order of units, and infinity and NaN in what the mask
// excludes.
//
// A subgroup has 2 * MATRIX query rows to itself, with all of o in registers, and q but for STORED_MATRICES of each row,
// which stay in workgroup memory as its lanes hold them. Components of a product become those of a factor in place, so
// otherwise workgroup memory, which limits flash_forward_coop, carries keys and values alone. Key tile j is one phase with a
// barrier at its end:
//
//     keys of tile j + 2, values of tile j + 1 staged;  powers of tile j from its scores, and whether one is too large;
//     scores of tile j + 1;  weights of tile j;  o += weights of tile j * values of tile j
//
// All that follows the rare branch is one stretch of code for the driver to mix: products of the next scores beside
// exponentials of these. Loads from storage are waited for at a loop's end, so the loop begins with what needs them. An
// H200, 18,432 tokens, head_dim 32 / 64 / 80 / 96 / 112 / 128: 0.73 / 1.07 / 1.37 / 1.68 / 1.99 / 2.26 ms; a kernel of
// the same kind whose scores passed through memory, or flash_forward_coop, took 1.05 / 1.41 / 1.80 / 2.20 / 2.46 / 2.41.
//
// The weights are powers of two relative to a maximum of the row that is seldom raised: where a power passes LAZY, o is
// rescaled. The maximum is zero until the row has a finite score.

#import shared/flash_params
#import shared/grid
#import shared/lacking
#import shared/non_finite_values

// Loads of 16 bytes are fastest, and stay where they are issued only from bindings that could be written.
@group(0) @binding(0) var<storage, read_write> q: array<vec4<u32>>; // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(1) var<storage, read_write> k: array<vec4<u32>>; // the same with KV heads
@group(0) @binding(2) var<storage, read_write> v: array<vec4<u32>>; // as k
@group(0) @binding(3) var<storage, read_write> o: array<elem4>;     // as q
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;     // [B, H, S]
@group(0) @binding(5) var<uniform> params: Params;

const LOWEST: f32 = -1e30;
// A maximum that happens to be zero.
const TINY: f32 = 1e-30;
// The largest power of a weight: f16 holds it and the sum of those of a row.
const LAZY: f32 = 5.9;
const LN_2: f32 = 0.6931471805599453;

const SUBGROUPS: u32 = BLOCK_M / (2u * MATRIX);
const WORKGROUP: u32 = SUBGROUPS * SUBGROUP;

// Vectors of four elements. Rows in workgroup memory are two longer than their contents, against bank conflicts.
const VECTORS: u32 = HEAD_DIM / 4u;
const MATRIX_VECTORS: u32 = MATRIX / 4u;
const TILE_STRIDE: u32 = 2u * VECTORS + 2u;
const TILE_VECTORS: u32 = BLOCK_N * TILE_STRIDE;
// A subgroup's own part of it, for rows of a matrix of q or o.
const ROW_STRIDE: u32 = VECTORS + 2u;
const OWN_VECTORS: u32 = MATRIX * ROW_STRIDE;

// Staging of a tile's rows: STAGE_ROWS at a time, one load of keys and one of values for each invocation.
const LOADS: u32 = VECTORS / LOAD_VECTORS;
const STAGE_ROWS: u32 = WORKGROUP / LOADS;
const STAGE_EVEN: bool = STAGE_ROWS * LOADS == WORKGROUP && BLOCK_N % STAGE_ROWS == 0u;
const QUERY_EVEN: bool = QUERY_LOADS * SUBGROUP == MATRIX * LOADS;

// A matrix as the lanes hold it, LANE_VECTORS each. Such ones of q, of each subgroup, lie behind the tiles.
const HELD_VECTORS: u32 = SUBGROUP * LANE_VECTORS;
const QUERIES_AT: u32 = 2u * TILE_VECTORS;
const QUERY_VECTORS: u32 = 2u * STORED_MATRICES * HELD_VECTORS;

var<workgroup> tiles: array<elem4, max(QUERIES_AT + SUBGROUPS * QUERY_VECTORS, SUBGROUPS * OWN_VECTORS)>;
// The first element: whether values held infinity or NaN.
var<workgroup> non_finite: vec4<u32>;

// Where load `i` of MATRIX rows of q from a token on lies.
fn query_load(base: u32, first_token: u32, i: u32) -> u32 {
    let token = min(first_token + min(i / LOADS, MATRIX - 1u), params.tokens - 1u);
    return (base + token * params.token_stride) * LOADS + i % LOADS;
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    #import shared/query_unit
    let last_token = params.tokens - 1u;
    let end_tile = (first_query / BLOCK_M + 1u) * (BLOCK_M / BLOCK_N);

    let subgroup = invocation / SUBGROUP;
    let lane = invocation % SUBGROUP;
    let first_row = first_query + subgroup * 2u * MATRIX;
    let own_at = subgroup * OWN_VECTORS;
    let stage_row = select(BLOCK_N, invocation / LOADS, invocation < STAGE_ROWS * LOADS);
    let stage_load = invocation % LOADS;
    let stage_at = stage_row * TILE_STRIDE + stage_load * LOAD_VECTORS;

    // All is on its way before the first is waited for: q, then keys and values of the first tiles. Rows past the last
    // token repeat it and are not written.
    #for r in 0..2
    // The query of the lane's first components; the others follow in steps of ROW_STEP.
    let query$r = first_row + $ru * MATRIX + component_row(lane);
    var q$r: array<MatrixA, DEPTH_MATRICES>;
    var o$r: array<MatrixC, DEPTH_MATRICES>;
    #for n in 0..QUERY_LOADS
    let loaded$r_$n = q[query_load(base, first_row + $ru * MATRIX, lane + $nu * SUBGROUP)];
    #end
    #end
    // Loads advance by a tile and stay at the last token.
    let row_loads = params.kv_token_stride * LOADS;
    let last_load = kv_base * LOADS + last_token * row_loads + stage_load;
    #for s in 0..STAGES
    var value_at$s = min(kv_base * LOADS + (stage_row + $su * STAGE_ROWS) * row_loads + stage_load, last_load);
    let first_key$s = k[value_at$s];
    var next_value$s = v[value_at$s];
    var key_at$s = min(value_at$s + BLOCK_N * row_loads, last_load);
    var next_key$s = k[key_at$s];
    #end
    #for r in 0..2
    #for n in 0..QUERY_LOADS
    if (QUERY_EVEN || lane + $nu * SUBGROUP < MATRIX * LOADS) {
        let load = lane + $nu * SUBGROUP;
        let at = own_at + load / LOADS * ROW_STRIDE + load % LOADS * LOAD_VECTORS;
        #for h in 0..LOAD_VECTORS
        tiles[at + $hu] = vector_of_load(loaded$r_$n, $hu);
        #end
    }
    #end
    subgroupBarrier();
    #for d in 0..DEPTH_MATRICES
    q$r[$d] = coopLoadT<MatrixA>(&tiles[own_at + $du * MATRIX_VECTORS], ROW_STRIDE);
    #end
    subgroupBarrier();
    #end
    if (invocation == 0u) {
        non_finite = vec4<u32>(0u);
    }
    workgroupBarrier();
    let queries_at = QUERIES_AT + subgroup * QUERY_VECTORS + lane * LANE_VECTORS;
    #for r in 0..2
    #for d in 0..STORED_MATRICES
    {
        let components = components_of_factor(q$r[$d]);
        #for v in 0..LANE_VECTORS
        tiles[queries_at + ($ru * STORED_MATRICES + $du) * HELD_VECTORS + $vu] = elem4(
            #for c in 0..4
            components[4u * $vu + $cu],
            #end
        );
        #end
    }
    #end
    #end
    if (BLOCK_N - 1u > first_query) {
        #for s in 0..STAGES
        {
            let finite = finite_load(next_value$s);
            if (any(finite != next_value$s)) {
                non_finite[0] = 1u;
            }
            next_value$s = finite;
        }
        #end
    }
    #for s in 0..STAGES
    if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
        #for h in 0..LOAD_VECTORS
        tiles[stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = vector_of_load(first_key$s, $hu);
        #end
        #for h in 0..LOAD_VECTORS
        tiles[VECTORS + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = vector_of_load(next_value$s, $hu);
        #end
        #for h in 0..LOAD_VECTORS
        tiles[TILE_VECTORS + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = vector_of_load(next_key$s, $hu);
        #end
    }
    key_at$s = min(key_at$s + BLOCK_N * row_loads, last_load);
    next_key$s = k[key_at$s];
    value_at$s = min(value_at$s + BLOCK_N * row_loads, last_load);
    next_value$s = v[value_at$s];
    #end
    workgroupBarrier();

    #for n in 0..KEY_MATRICES
    #for r in 0..2
    var scores$r_$n = MatrixC();
    #end
    #for d in 0..DEPTH_MATRICES
    let first_keys$n_$d = coopLoad<MatrixB>(&tiles[$nu * MATRIX * TILE_STRIDE + $du * MATRIX_VECTORS], TILE_STRIDE);
    #for r in 0..2
    scores$r_$n = coopMultiplyAdd(q$r[$d], first_keys$n_$d, scores$r_$n);
    #end
    #end
    #end
    workgroupBarrier();

    #for r in 0..2
    #for h in 0..COMPONENT_ROWS
    var maximum$r_$h = 0.0;
    var sum$r_$h = 0.0;
    #end
    #end
    // A row without a maximum is below it in any case.
    var limit = 2.0 * LOWEST;
    for (var first_tile = 0u; first_tile < end_tile; first_tile += UNROLL) {
        #for u in 0..UNROLL
        {
            let tile = first_tile + $uu;
            let first_key = tile * BLOCK_N;
            // Known without the loop's variable where the body has all buffers.
            let buffer = select(tile, $uu, UNROLL % 2u == 0u) % 2u * TILE_VECTORS;
            let other = TILE_VECTORS - buffer;

            // Two stores of 8 bytes one behind the other are one of 16 to NVIDIA's driver, if none to another place is between.
            #for s in 0..STAGES
            if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
                #for h in 0..LOAD_VECTORS
                tiles[buffer + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = vector_of_load(next_key$s, $hu);
                #end
            }
            #end
            // Where a branch changes a load in place, NVIDIA's driver waits for it in the phase that issued it.
            if (first_key + 2u * BLOCK_N - 1u > first_query) {
                #for s in 0..STAGES
                if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
                    let finite = finite_load(next_value$s);
                    if (any(finite != next_value$s)) {
                        non_finite[0] = 1u;
                    }
                    #for h in 0..LOAD_VECTORS
                    tiles[other + VECTORS + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] =
                        vector_of_load(finite, $hu);
                    #end
                }
                #end
            } else {
                #for s in 0..STAGES
                if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
                    #for h in 0..LOAD_VECTORS
                    tiles[other + VECTORS + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] =
                        vector_of_load(next_value$s, $hu);
                    #end
                }
                #end
            }
            #for s in 0..STAGES
            key_at$s = min(key_at$s + BLOCK_N * row_loads, last_load);
            next_key$s = k[key_at$s];
            value_at$s = min(value_at$s + BLOCK_N * row_loads, last_load);
            next_value$s = v[value_at$s];
            #end
            #for r in 0..2
            #for n in 0..KEY_MATRICES
            let components$r_$n = components_of_result(scores$r_$n);
            #for h in 0..COMPONENT_ROWS
            #for c in 0..COMPONENT_COLUMNS
            var power$r_$n_$h_$c = fma(components$r_$n[$hu * COMPONENT_COLUMNS + $cu], params.scale, -maximum$r_$h);
            #end
            #end
            #end
            #end
            // Not below the limit, with NaN: that of one row must not hide another's.
            var highest = LOWEST;
            #for r in 0..2
            #for n in 0..KEY_MATRICES
            #for h in 0..COMPONENT_ROWS
            #for c in 0..COMPONENT_COLUMNS
            highest = max(highest, power$r_$n_$h_$c);
            #end
            #end
            #end
            #end
            if (takes_branch(first_key + BLOCK_N - 1u > first_row, !(highest <= limit))) {
                #for r in 0..2
                #for h in 0..COMPONENT_ROWS
                var rise$r_$h = LOWEST;
                #for n in 0..KEY_MATRICES
                #for c in 0..COMPONENT_COLUMNS
                power$r_$n_$h_$c = select(
                    LOWEST,
                    power$r_$n_$h_$c,
                    first_key + $nu * MATRIX + component_column(lane, $cu) <= query$r + $hu * ROW_STEP,
                );
                rise$r_$h = max(rise$r_$h, power$r_$n_$h_$c);
                #end
                #end
                #for b in 0..LANE_BITS
                rise$r_$h = max(rise$r_$h, subgroupShuffleXor(rise$r_$h, 1u << $bu));
                #end
                // Before the first finite score there is nothing to rescale.
                let fresh$r_$h = maximum$r_$h == 0.0;
                let rises$r_$h = rise$r_$h > select(LAZY, 0.1 * LOWEST, fresh$r_$h);
                rise$r_$h = select(0.0, rise$r_$h, rises$r_$h);
                let rescale$r_$h = select(exp2(-rise$r_$h), 1.0, fresh$r_$h);
                sum$r_$h *= rescale$r_$h;
                maximum$r_$h += rise$r_$h;
                maximum$r_$h = select(maximum$r_$h, TINY, rises$r_$h && maximum$r_$h == 0.0);
                #for n in 0..KEY_MATRICES
                #for c in 0..COMPONENT_COLUMNS
                power$r_$n_$h_$c -= rise$r_$h;
                #end
                #end
                #end
                #end
                var rescales = false;
                limit = LAZY;
                #for r in 0..2
                #for h in 0..COMPONENT_ROWS
                rescales = rescales || rescale$r_$h != 1.0;
                limit = select(limit, 2.0 * LOWEST, maximum$r_$h == 0.0);
                #end
                #end
                if (takes_branch(false, rescales)) {
                    #for r in 0..2
                    #for d in 0..DEPTH_MATRICES
                    {
                        let components = components_of_result(o$r[$d]);
                        o$r[$d] = result_of_components(array<f32, COMPONENTS>(
                            #for h in 0..COMPONENT_ROWS
                            #for c in 0..COMPONENT_COLUMNS
                            components[$hu * COMPONENT_COLUMNS + $cu] * rescale$r_$h,
                            #end
                            #end
                        ));
                    }
                    #end
                    #end
                }
            }
            #for n in 0..KEY_MATRICES
            #for r in 0..2
            var next_scores$r_$n = MatrixC();
            #end
            #end
            #for d in 0..STORED_MATRICES
            #for r in 0..2
            #for v in 0..LANE_VECTORS
            let stored$r_$d_$v = tiles[queries_at + ($ru * STORED_MATRICES + $du) * HELD_VECTORS + $vu];
            #end
            q$r[$d] = factor_of_components(array<factor, COMPONENTS>(
                #for v in 0..LANE_VECTORS
                stored$r_$d_$v.x, stored$r_$d_$v.y, stored$r_$d_$v.z, stored$r_$d_$v.w,
                #end
            ));
            #end
            #end
            #for d in 0..DEPTH_MATRICES
            #for n in 0..KEY_MATRICES
            let keys$n_$d = coopLoad<MatrixB>(
                &tiles[other + $nu * MATRIX * TILE_STRIDE + $du * MATRIX_VECTORS],
                TILE_STRIDE,
            );
            #for r in 0..2
            next_scores$r_$n = coopMultiplyAdd(q$r[$d], keys$n_$d, next_scores$r_$n);
            #end
            #end
            #end
            #for r in 0..2
            #for n in 0..KEY_MATRICES
            #for h in 0..COMPONENT_ROWS
            #for c in 0..COMPONENT_COLUMNS
            let weight$r_$n_$h_$c = exp2(power$r_$n_$h_$c);
            sum$r_$h += weight$r_$n_$h_$c;
            #end
            #end
            let weights$r_$n = factor_of_components(array<factor, COMPONENTS>(
                #for h in 0..COMPONENT_ROWS
                #for c in 0..COMPONENT_COLUMNS
                factor(weight$r_$n_$h_$c),
                #end
                #end
            ));
            #end
            #end
            #for n in 0..KEY_MATRICES
            #for d in 0..DEPTH_MATRICES
            let values$n_$d = coopLoadT<MatrixB>(
                &tiles[buffer + VECTORS + $nu * MATRIX * TILE_STRIDE + $du * MATRIX_VECTORS],
                TILE_STRIDE,
            );
            #for r in 0..2
            o$r[$d] = coopMultiplyAdd(weights$r_$n, values$n_$d, o$r[$d]);
            #end
            #end
            #end
            #for r in 0..2
            #for n in 0..KEY_MATRICES
            scores$r_$n = next_scores$r_$n;
            #end
            #end
            workgroupBarrier();
        }
        #end
    }

    #for r in 0..2
    #for h in 0..COMPONENT_ROWS
    #for b in 0..LANE_BITS
    sum$r_$h += subgroupShuffleXor(sum$r_$h, 1u << $bu);
    #end
    if (component_column(lane, 0u) == 0u && query$r + $hu * ROW_STEP < params.tokens) {
        lse[(batch * params.heads + head) * params.tokens + query$r + $hu * ROW_STEP] =
            (maximum$r_$h + log2(sum$r_$h)) * LN_2;
    }
    let factor$r_$h = 1.0 / sum$r_$h;
    #end
    #end
    // o, a row of matrices at a time.
    #for r in 0..2
    subgroupBarrier();
    #for d in 0..DEPTH_MATRICES
    {
        let components = components_of_result(o$r[$d]);
        coopStoreT(factor_of_components(array<factor, COMPONENTS>(
            #for h in 0..COMPONENT_ROWS
            #for c in 0..COMPONENT_COLUMNS
            factor(components[$hu * COMPONENT_COLUMNS + $cu] * factor$r_$h),
            #end
            #end
        )), &tiles[own_at + $du * MATRIX_VECTORS], ROW_STRIDE);
    }
    #end
    subgroupBarrier();
    for (var i = lane; i < MATRIX * VECTORS; i += SUBGROUP) {
        let token = first_row + $ru * MATRIX + i / VECTORS;
        if (token < params.tokens) {
            o[(base + token * params.token_stride) * VECTORS + i % VECTORS] =
                tiles[own_at + i / VECTORS * ROW_STRIDE + i % VECTORS];
        }
    }
    #end
    if (non_finite[0] != 0u) {
        // An invocation reads the elements that it wrote.
        #for r in 0..2
        for (var i = lane; i < MATRIX * VECTORS; i += SUBGROUP) {
            let token = first_row + $ru * MATRIX + i / VECTORS;
            if (token < params.tokens) {
                let at = (base + token * params.token_stride) * VECTORS + i % VECTORS;
                let lacking = non_finite_values(kv_base, first_query, token, i % VECTORS);
                o[at] = pack_elem(with_lacking(unpack_elem(o[at]), lacking));
            }
        }
        #end
    }
}
