// Exact causal attention, forward (spec section 6), on cooperative matrices: flash_forward's arguments, parameters and
// order of units.
//
// One workgroup per (batch, head, block of BLOCK_M queries) of BLOCK_M / MATRIX subgroups. Two subgroups share
// 2 * MATRIX query rows, as halves: for q k^T each takes them all with MATRIX of a tile's 2 * MATRIX keys, its q in
// registers; for p v each takes them all with half of the columns, its part of o in registers; for the softmax each
// takes MATRIX rows with all keys, LANES lanes to a row. Matrices have no accessible elements, so scores and weights go
// through workgroup memory.
//
// Key tile j passes through two phases with a barrier after each, its neighbours overlapping it:
//
//     phase 1    scores of tile j
//     phase 2    o += weights of tile j - 1 * values of tile j - 1;  weights of tile j;  keys of tile j + 1 staged
//     after it   values of tile j staged: before the rescaling, whose branch costs 4 % where it comes first
//
// Loads from storage are issued one staging ahead. The softmax uses the row's maximum as it stands: only where the sum of
// a lane's weights says that one exceeds 2^6 is it raised and o rescaled, which is rare, and costs a pass of o through
// workgroup memory. (Looking at the sums, which are there anyway, in place of the exponents' maximum is 2 to 3 % faster;
// reading the flag of a rise before the staging, on whose other side it is needed, a further 2 %.) Exponents are to base
// 2. UNROLL key tiles make a loop's body.
//
// What the mask excludes must not reach o even as 0 * NaN: values of tiles that the mask crosses are staged with zero
// in place of infinity and NaN, and where there were any, the last step adds them to the rows that do see them.

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
// Of the SCORE_CHUNKS weights in a sum above LARGE, one is above 64 = 2^6, and its exponent, however it was rounded,
// above LAZY: a sum that is seen to be large always raises the maximum.
const LARGE: f32 = 64.0 * f32(SCORE_CHUNKS);
const LAZY: f32 = 5.9;
const LN_2: f32 = 0.6931471805599453;

const WORKGROUP: u32 = BLOCK_M / MATRIX * SUBGROUP;
const LANES: u32 = SUBGROUP / MATRIX;

// Vectors of four elements. Rows in workgroup memory are two longer than their contents, against bank conflicts.
const VECTORS: u32 = HEAD_DIM / 4u;
const MATRIX_VECTORS: u32 = MATRIX / 4u;
const KEY_STRIDE: u32 = VECTORS + 2u;
const VALUE_STRIDE: u32 = 2u * COLUMN_MATRICES * MATRIX_VECTORS + 2u;
const SCORE_STRIDE: u32 = BLOCK_N / 4u + 2u;
const SCORE_ROWS: u32 = MATRIX * SCORE_STRIDE;

// What lies behind a row of scores is free: the factor of its o (an H100 is 1 % faster than with an array of its own), and
// behind that in the first row whether a row's maximum rose, by parity of the tile, and whether values held infinity or NaN.
const ROW_END: u32 = SCORE_STRIDE - 2u;
const FLAGS: u32 = SCORE_STRIDE - 1u;

// A matrix as the lanes see it: those below MATRIX_LANES of a row have MATRIX_CHUNKS vectors each.
const MATRIX_LANES: u32 = min(LANES, MATRIX_VECTORS);
const MATRIX_CHUNKS: u32 = MATRIX_VECTORS / MATRIX_LANES;

// Staging of a tile's rows: STAGE_ROWS at a time, one load for each invocation.
const LOADS: u32 = VECTORS / LOAD_VECTORS;
const STAGE_ROWS: u32 = WORKGROUP / LOADS;
const STAGE_EVEN: bool = STAGE_ROWS * LOADS == WORKGROUP && BLOCK_N % STAGE_ROWS == 0u;

// q comes in chunks of two matrices side by side: QUERY_LOADS loads for each invocation or, with QUERY_IDLE, one for some.
const CHUNK_LOADS: u32 = 2u * MATRIX_VECTORS / LOAD_VECTORS;

// Every variable a multiple of 16 bytes, as cooperative loads assume.
var<workgroup> keys: array<elem4, BLOCK_N * KEY_STRIDE>;
var<workgroup> values: array<elem4, BLOCK_N * VALUE_STRIDE>;
var<workgroup> scores: array<vec4<f32>, BLOCK_M * SCORE_STRIDE>;
var<workgroup> weights: array<elem4, BLOCK_M * SCORE_STRIDE>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    #import shared/query_unit
    let last_token = params.tokens - 1u;
    let tiles = (first_query / BLOCK_M + 1u) * (BLOCK_M / BLOCK_N);

    let subgroup = invocation / SUBGROUP;
    let half = subgroup % 2u;
    let lane_row = invocation % SUBGROUP / LANES;
    let lane = invocation % LANES;
    let block_row = subgroup * MATRIX + lane_row;
    let query = first_query + block_row;
    let row_at = block_row * SCORE_STRIDE + lane;
    let row_end = block_row * SCORE_STRIDE + ROW_END;
    let pair_row = subgroup / 2u * 2u * MATRIX;
    let scores_at = pair_row * SCORE_STRIDE + half * MATRIX_VECTORS;
    let weights_at = pair_row * SCORE_STRIDE;
    let keys_at = half * MATRIX * KEY_STRIDE;
    let values_at = half * COLUMN_MATRICES * MATRIX_VECTORS;
    // A subgroup's own memory for reading and writing a matrix.
    let exchange_at = subgroup * SCORE_ROWS;
    let exchange_row = exchange_at + lane_row * SCORE_STRIDE + lane;

    let stage_row = select(BLOCK_N, invocation / LOADS, invocation < STAGE_ROWS * LOADS);
    let stage_load = invocation % LOADS;
    let stage_key = stage_row * KEY_STRIDE + stage_load * LOAD_VECTORS;
    let stage_value = stage_row * VALUE_STRIDE + stage_load * LOAD_VECTORS;

    // q, through the memory of the weights; all loads are on their way before the first is waited for. Rows past the
    // last token repeat it and are not written, loads past the end of a row too.
    #for i in 0..QUERY_LOADS
    let chunk_load$i = min(invocation + $iu * WORKGROUP, BLOCK_M * CHUNK_LOADS - 1u);
    let chunk_at$i = chunk_load$i / CHUNK_LOADS * SCORE_STRIDE + chunk_load$i % CHUNK_LOADS * LOAD_VECTORS;
    let query_at$i = (base + min(first_query + chunk_load$i / CHUNK_LOADS, last_token) * params.token_stride) * LOADS;
    #end
    #for c in 0..QUERY_CHUNKS
    #for i in 0..QUERY_LOADS
    let query_load$c_$i = q[query_at$i + min($cu * CHUNK_LOADS + chunk_load$i % CHUNK_LOADS, LOADS - 1u)];
    #end
    #end
    #for r in 0..2
    var q$r: array<MatrixA, 2u * QUERY_CHUNKS>;
    var o$r: array<MatrixC, COLUMN_MATRICES>;
    #end
    #for c in 0..QUERY_CHUNKS
    #for once in 0..QUERY_IDLE
    if (invocation < BLOCK_M * CHUNK_LOADS) {
    #end
    #for i in 0..QUERY_LOADS
    #for h in 0..LOAD_VECTORS
    weights[chunk_at$i + $hu] = vector_of_load(query_load$c_$i, $hu);
    #end
    #end
    #for once in 0..QUERY_IDLE
    }
    #end
    workgroupBarrier();
    #for r in 0..2
    #for d in 0..2
    q$r[2 * $c + $d] = coopLoadT<MatrixA>(&weights[weights_at + $ru * SCORE_ROWS + $du * MATRIX_VECTORS], SCORE_STRIDE);
    #end
    #end
    workgroupBarrier();
    #end

    // Tile -1 has weights and values zero.
    #for i in 0..SCORE_CHUNKS
    weights[row_at + $iu * LANES] = elem4();
    #end
    for (var i = invocation; i < BLOCK_N * VALUE_STRIDE; i += WORKGROUP) {
        values[i] = elem4();
    }
    scores[row_end].x = 1.0;
    if (invocation == 0u) {
        scores[FLAGS] = vec4<f32>(0.0);
    }
    // Loads advance by a tile and stay at the last token.
    let row_loads = params.kv_token_stride * LOADS;
    let last_load = kv_base * LOADS + last_token * row_loads + stage_load;
    #for s in 0..STAGES
    var key_at$s = min(kv_base * LOADS + (stage_row + $su * STAGE_ROWS) * row_loads + stage_load, last_load);
    var value_at$s = key_at$s;
    var next_key$s = k[key_at$s];
    var next_value$s = v[value_at$s];
    if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
        #for h in 0..LOAD_VECTORS
        keys[stage_key + $su * STAGE_ROWS * KEY_STRIDE + $hu] = vector_of_load(next_key$s, $hu);
        #end
    }
    key_at$s = min(key_at$s + BLOCK_N * row_loads, last_load);
    next_key$s = k[key_at$s];
    #end
    workgroupBarrier();

    // The maximum starts finite, so that no difference of two infinities arises where nothing is infinite.
    var maximum = LOWEST;
    var sum = 0.0;
    // The maximum is always the first of the two: with an increment that the driver does not know an H100 is 0.5 to 1 % faster
    // at 4,096 tokens.
    for (var first_tile = 0u; first_tile < tiles; first_tile = max(first_tile + UNROLL, min(tiles, UNROLL))) {
        #for u in 0..UNROLL
        {
            let tile = first_tile + $uu;
            let first_key = tile * BLOCK_N;
            let crossed = first_key + BLOCK_N - 1u > first_query;

            // Phase 1.
            #for s in 0..2
            #for r in 0..2
            let weights$r_$s = coopLoadT<MatrixA>(
                &weights[weights_at + $ru * SCORE_ROWS + $su * MATRIX_VECTORS],
                SCORE_STRIDE,
            );
            #end
            #end
            // All loads before all products: 1 % faster than in turns.
            #for d in 0..DEPTH_MATRICES
            let keys$d = coopLoad<MatrixB>(&keys[keys_at + $du * MATRIX_VECTORS], KEY_STRIDE);
            #end
            #for r in 0..2
            var scores$r = MatrixC();
            #end
            #for d in 0..DEPTH_MATRICES
            #for r in 0..2
            scores$r = coopMultiplyAdd(q$r[$d], keys$d, scores$r);
            #end
            #end
            #for r in 0..2
            coopStoreT(scores$r, &scores[scores_at + $ru * SCORE_ROWS], SCORE_STRIDE);
            #end
            workgroupBarrier();

            // Phase 2.
            if (invocation == 0u) {
                scores[FLAGS][(tile + 1u) % 2u] = 0.0;
            }
            #for s in 0..2
            #for c in 0..COLUMN_MATRICES
            let values$s_$c = coopLoadT<MatrixB>(
                &values[values_at + $su * MATRIX * VALUE_STRIDE + $cu * MATRIX_VECTORS],
                VALUE_STRIDE,
            );
            #for r in 0..2
            o$r[$c] = coopMultiplyAdd(weights$r_$s, values$s_$c, o$r[$c]);
            #end
            #end
            #end
            #for i in 0..SCORE_CHUNKS
            let chunk$i = scores[row_at + $iu * LANES];
            #end
            var partial_sum = vec4<f32>(0.0);
            #for i in 0..SCORE_CHUNKS
            let weight$i = exp2(fma(chunk$i, vec4<f32>(params.scale), vec4<f32>(-maximum)));
            partial_sum += weight$i;
            weights[row_at + $iu * LANES] = pack_elem(weight$i);
            #end
            #for s in 0..STAGES
            if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
                #for h in 0..LOAD_VECTORS
                keys[stage_key + $su * STAGE_ROWS * KEY_STRIDE + $hu] = vector_of_load(next_key$s, $hu);
                #end
            }
            #end
            #for s in 0..STAGES
            key_at$s = min(key_at$s + BLOCK_N * row_loads, last_load);
            next_key$s = k[key_at$s];
            #end
            let largest_sum = max(max(partial_sum.x, partial_sum.y), max(partial_sum.z, partial_sum.w));
            if (subgroupAny(largest_sum > LARGE) || crossed) {
                if (crossed) {
                    #for s in 0..STAGES
                    {
                        let finite = finite_load(next_value$s);
                        if (any(finite != next_value$s)) {
                            scores[FLAGS][2] = 1.0;
                        }
                        next_value$s = finite;
                    }
                    #end
                }
                // Again, with the mask and the true maximum.
                var row_maximum = LOWEST;
                for (var i = 0u; i < SCORE_CHUNKS; i++) {
                    let chunk = scores[row_at + i * LANES];
                    let seen =
                        vec4<u32>(first_key + (i * LANES + lane) * 4u) + vec4<u32>(0u, 1u, 2u, 3u) <= vec4<u32>(query);
                    let masked = select(vec4<f32>(LOWEST), chunk, seen);
                    row_maximum = max(row_maximum, max(max(masked.x, masked.y), max(masked.z, masked.w)));
                }
                #for b in 0..LANE_BITS
                row_maximum = max(row_maximum, subgroupShuffleXor(row_maximum, 1u << $bu));
                #end
                row_maximum *= params.scale;
                let rises = row_maximum > maximum + LAZY;
                let new_maximum = select(maximum, row_maximum, rises);
                let rescale = exp2(maximum - new_maximum);
                sum *= rescale;
                maximum = new_maximum;
                partial_sum = vec4<f32>(0.0);
                for (var i = 0u; i < SCORE_CHUNKS; i++) {
                    let chunk = scores[row_at + i * LANES];
                    let seen =
                        vec4<u32>(first_key + (i * LANES + lane) * 4u) + vec4<u32>(0u, 1u, 2u, 3u) <= vec4<u32>(query);
                    let weight =
                        select(vec4<f32>(0.0), exp2(fma(chunk, vec4<f32>(params.scale), vec4<f32>(-maximum))), seen);
                    partial_sum += weight;
                    weights[row_at + i * LANES] = pack_elem(weight);
                }
                scores[row_end].x = select(1.0, rescale, tile > 0u);
                if (subgroupAny(rises)) {
                    scores[FLAGS][tile % 2u] = 1.0;
                }
            }
            sum += (partial_sum.x + partial_sum.y) + (partial_sum.z + partial_sum.w);
            workgroupBarrier();
            let rose = scores[FLAGS][tile % 2u] != 0.0;

            #for s in 0..STAGES
            if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
                #for h in 0..LOAD_VECTORS
                values[stage_value + $su * STAGE_ROWS * VALUE_STRIDE + $hu] = vector_of_load(next_value$s, $hu);
                #end
            }
            #end

            // Before the first tile there is nothing to rescale.
            if (rose && tile > 0u) {
                #for r in 0..2
                #for c in 0..COLUMN_MATRICES
                subgroupBarrier();
                coopStoreT(o$r[$c], &scores[exchange_at], SCORE_STRIDE);
                subgroupBarrier();
                if (lane < MATRIX_LANES) {
                    let factor = scores[(pair_row + $ru * MATRIX + lane_row) * SCORE_STRIDE + ROW_END].x;
                    for (var i = 0u; i < MATRIX_CHUNKS; i++) {
                        scores[exchange_row + i * MATRIX_LANES] *= factor;
                    }
                }
                subgroupBarrier();
                o$r[$c] = coopLoadT<MatrixC>(&scores[exchange_at], SCORE_STRIDE);
                #end
                #end
                workgroupBarrier();
                scores[row_end].x = 1.0;
            }
            #for s in 0..STAGES
            value_at$s = min(value_at$s + BLOCK_N * row_loads, last_load);
            next_value$s = v[value_at$s];
            #end
        }
        #end
    }

    // The last tile's values.
    workgroupBarrier();
    #for s in 0..2
    #for r in 0..2
    let weights$r_$s = coopLoadT<MatrixA>(&weights[weights_at + $ru * SCORE_ROWS + $su * MATRIX_VECTORS], SCORE_STRIDE);
    #end
    #for c in 0..COLUMN_MATRICES
    let values$s_$c = coopLoadT<MatrixB>(
        &values[values_at + $su * MATRIX * VALUE_STRIDE + $cu * MATRIX_VECTORS],
        VALUE_STRIDE,
    );
    #for r in 0..2
    o$r[$c] = coopMultiplyAdd(weights$r_$s, values$s_$c, o$r[$c]);
    #end
    #end
    #end

    #for b in 0..LANE_BITS
    sum += subgroupShuffleXor(sum, 1u << $bu);
    #end
    if (lane == 0u && query < params.tokens) {
        lse[(batch * params.heads + head) * params.tokens + query] = (maximum + log2(sum)) * LN_2;
    }
    scores[row_end].x = 1.0 / sum;
    workgroupBarrier();
    // A column of matrices of o at a time, where its part of a tile's scores was. It is short code, and what is rare comes
    // after it: 25 KB for the same took an H100 1.5 us longer a workgroup, presumably to fetch what runs once.
    let subgroup_lane = invocation % SUBGROUP;
    #for c in 0..COLUMN_MATRICES
    subgroupBarrier();
    #for r in 0..2
    coopStoreT(o$r[$c], &scores[scores_at + $ru * SCORE_ROWS], SCORE_STRIDE);
    #end
    subgroupBarrier();
    for (var i = subgroup_lane; i < 2u * MATRIX * MATRIX_VECTORS; i += SUBGROUP) {
        let row = pair_row + i / MATRIX_VECTORS;
        let column = values_at + $cu * MATRIX_VECTORS + i % MATRIX_VECTORS;
        if (first_query + row < params.tokens && column < VECTORS) {
            let sum = scores[row * SCORE_STRIDE + half * MATRIX_VECTORS + i % MATRIX_VECTORS];
            let factor = scores[row * SCORE_STRIDE + ROW_END].x;
            o[(base + (first_query + row) * params.token_stride) * VECTORS + column] = pack_elem(sum * factor);
        }
    }
    #end
    if (scores[FLAGS][2] != 0.0) {
        for (var c = 0u; c < COLUMN_MATRICES; c++) {
            for (var i = subgroup_lane; i < 2u * MATRIX * MATRIX_VECTORS; i += SUBGROUP) {
                let token = first_query + pair_row + i / MATRIX_VECTORS;
                let column = values_at + c * MATRIX_VECTORS + i % MATRIX_VECTORS;
                if (token < params.tokens && column < VECTORS) {
                    let at = (base + token * params.token_stride) * VECTORS + column;
                    let lacking = non_finite_values(kv_base, first_query, token, column);
                    o[at] = pack_elem(with_lacking(unpack_elem(o[at]), lacking));
                }
            }
        }
    }
}
