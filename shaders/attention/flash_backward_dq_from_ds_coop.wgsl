// Attention's backward for q (spec section 8), dq = ds k / sqrt(D), from the d_scores that the kernels of dk and
// dv left in memory.
//
// A matrix product: one workgroup per (batch, head, block of BLOCK_M queries, part of the keys), with two subgroups for
// each of ROW_PARTS parts of the rows: QUERY_MATRICES matrices of rows by half of the columns each. 2 * MATRIX keys a
// step. As in shared/gemm_coop, products are computed while a step in workgroup memory gives way to the next: of its
// second half all but EARLY columns of matrices.
//
// What is next comes from storage into SETS sets of registers. NVIDIA's driver waits for all such loads at once, so their
// latency hides in the time from the last that was issued to the next wait: with three sets the loads of two steps are
// issued together at every other step and waited for two steps later, with two sets those of a step at every step. And
// what is on its way across the end of a loop's body is moved between registers there, and so waited for: the loop, of
// BODY steps, begins where a step is staged. (An H200, whole backward: 4,096 tokens and head_dim 128 0.385 to 0.372 ms,
// 18,432 and head_dim 64 / 80 / 96 4.06 / 4.71 / 5.22 to 3.95 / 4.60 / 5.16; by the beginning alone, 128, 5.97 to 5.88.)
//
// Steps that the mask crosses stage keys with zero in place of infinity and NaN: where a query sees such a key its
// d_scores are NaN already or, if its weight is zero, lack only what the last step adds.

#import shared/chunk_params
#import shared/grid
#import shared/lacking

@group(0) @binding(0) var<storage, read_write> k: array<vec4<u32>>;  // [B, S, KV, D] or [B, KV, S, D]
@group(0) @binding(1) var<storage, read_write> ds: array<vec4<u32>>; // by query head and pair of blocks, see ds_pair
@group(0) @binding(2) var<storage, read_write> dq: array<elem4>;     // as k with H heads
@group(0) @binding(3) var<storage, read_write> partial: array<vec4<f32>>; // see partial_row
@group(0) @binding(4) var<uniform> params: Params;

const WORKGROUP: u32 = 2u * ROW_PARTS * SUBGROUP;
const LANES: u32 = SUBGROUP / MATRIX;
const STEP: u32 = 2u * MATRIX;

// Vectors of four elements. Rows in workgroup memory are two longer than their contents, against bank conflicts.
const VECTORS: u32 = HEAD_DIM / 4u;
const MATRIX_VECTORS: u32 = MATRIX / 4u;
// What a lane has of d_scores are two vectors of keys of a query or, BY_KEYS, of queries of two keys. The rows of d_scores
// in workgroup memory are queries or keys accordingly.
const DS_ROWS: u32 = select(BLOCK_M, STEP, BY_KEYS == 1u);
const DS_STRIDE: u32 = select(STEP, BLOCK_M, BY_KEYS == 1u) / 4u + 2u;
// From a matrix of queries to the next, of keys, and from a lane's first vector to its second.
const QUERIES_STEP: u32 = select(MATRIX * DS_STRIDE, MATRIX_VECTORS, BY_KEYS == 1u);
const KEYS_STEP: u32 = select(MATRIX_VECTORS, MATRIX * DS_STRIDE, BY_KEYS == 1u);
const VECTOR_STEP: u32 = select(LANES, MATRIX / 2u * DS_STRIDE, BY_KEYS == 1u);
const KEY_STRIDE: u32 = 2u * COLUMN_MATRICES * MATRIX_VECTORS + 2u;
const EXCHANGE_STRIDE: u32 = MATRIX_VECTORS + 1u;

// Staging of a step's keys: STAGE_ROWS at a time, one load for each invocation.
const LOADS: u32 = VECTORS / LOAD_VECTORS;
const STAGE_ROWS: u32 = WORKGROUP / LOADS;
const STAGE_EVEN: bool = STAGE_ROWS * LOADS == WORKGROUP && STEP % STAGE_ROWS == 0u;

var<workgroup> d_scores: array<elem4, DS_ROWS * DS_STRIDE>;
var<workgroup> keys: array<elem4, STEP * KEY_STRIDE>;
var<workgroup> exchange: array<vec4<f32>, 2u * ROW_PARTS * MATRIX * EXCHANGE_STRIDE>;
// Whether keys held infinity or NaN.
var<workgroup> non_finite: vec4<u32>;

#import shared/dq_parts
#import shared/ds_scratch

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let index = linear_workgroup(workgroup, workgroups);
    if (index >= params.units) {
        return;
    }
    // Heads are fastest; the block with most keys comes first.
    let unit = params.first_unit + index;
    let first_row = params.first_block * DS_BLOCK;
    let query_blocks = (min(params.end_block * DS_BLOCK, params.tokens) - first_row + BLOCK_M - 1u) / BLOCK_M;
    let head_index = unit % head_count();
    let batch = batch_and_head(head_index).x;
    let head = batch_and_head(head_index).y;
    let part = unit / head_count() % params.parts;
    let rank = unit / (head_count() * params.parts);
    let block = params.first_block * DS_BLOCK / BLOCK_M + query_blocks - 1u - rank;
    let first_query = block * BLOCK_M;
    // The steps of the block's part of the keys; each block of keys makes four, a multiple of BODY.
    let first_step = part_start(block, part) * (BLOCK_M / STEP);
    let end_step = part_start(block, part + 1u) * (BLOCK_M / STEP);
    if (first_step == end_step) {
        return;
    }
    let kv_head = head / (params.heads / params.kv_heads);
    let kv_base = batch * params.tokens * params.kv_heads + kv_head * params.kv_head_stride;
    let last_token = params.tokens - 1u;

    let subgroup = invocation / SUBGROUP;
    let row_part = subgroup / 2u;
    let columns_half = subgroup % 2u;
    let lane_row = invocation % SUBGROUP / LANES;
    let lane = invocation % LANES;
    let d_scores_at = row_part * QUERY_MATRICES * QUERIES_STEP;
    let keys_at = columns_half * COLUMN_MATRICES * MATRIX_VECTORS;
    let exchange_at = subgroup * MATRIX * EXCHANGE_STRIDE;

    // A pass of the workgroup over d_scores takes ROW_PARTS tiles of queries by the two matrices of the step's keys.
    let ds_lane = row_part * DS_TILE + columns_half * SUBGROUP + invocation % SUBGROUP;
    let stage_ds = select(
        (row_part * MATRIX + lane_row) * DS_STRIDE + columns_half * MATRIX_VECTORS + lane,
        (columns_half * MATRIX + invocation % SUBGROUP / MATRIX_VECTORS) * DS_STRIDE
            + row_part * MATRIX_VECTORS + invocation % MATRIX_VECTORS,
        BY_KEYS == 1u,
    );
    let stage_row = select(STEP, invocation / LOADS, invocation < STAGE_ROWS * LOADS);
    let stage_load = invocation % LOADS;
    let stage_key = stage_row * KEY_STRIDE + stage_load * LOAD_VECTORS;

    if (invocation == 0u) {
        non_finite = vec4<u32>(0u);
    }
    workgroupBarrier();
    #for r in 0..QUERY_MATRICES
    var sums$r: array<MatrixC, COLUMN_MATRICES>;
    #end
    // Everything is on its way before the first is waited for: d_scores and keys of the first three steps. Loads of keys
    // advance by a step and stay at the last token.
    let row_loads = params.kv_token_stride * LOADS;
    let last_load = kv_base * LOADS + last_token * row_loads + stage_load;
    let first_ds_at = ds_step(head_index, first_step, first_query) + ds_lane;
    #for r in 0..QUERY_MATRICES
    let first_ds$r = ds[first_ds_at + ROW_PARTS * $ru * DS_TILE];
    #end
    #for s in 0..STAGES
    var key_at$s =
        min(kv_base * LOADS + (first_step * STEP + stage_row + $su * STAGE_ROWS) * row_loads + stage_load, last_load);
    var first_keys$s = k[key_at$s];
    #end
    var next_ds: array<array<vec4<u32>, QUERY_MATRICES>, SETS>;
    var next_keys: array<array<vec4<u32>, STAGES>, SETS>;
    #for u in 0..2
    let ds_at$u = ds_step(head_index, min(first_step + $uu + 1u, end_step - 1u), first_query) + ds_lane;
    #for r in 0..QUERY_MATRICES
    next_ds[$u][$r] = ds[ds_at$u + ROW_PARTS * $ru * DS_TILE];
    #end
    #for s in 0..STAGES
    key_at$s = min(key_at$s + STEP * row_loads, last_load);
    next_keys[$u][$s] = k[key_at$s];
    #end
    #end
    #for r in 0..QUERY_MATRICES
    d_scores[stage_ds + ROW_PARTS * $ru * QUERIES_STEP] = vector_of_load(first_ds$r, 0u);
    d_scores[stage_ds + ROW_PARTS * $ru * QUERIES_STEP + VECTOR_STEP] = vector_of_load(first_ds$r, 1u);
    #end
    #for s in 0..STAGES
    if ((first_step + 1u) * STEP > first_query) {
        let finite = finite_load(first_keys$s);
        if (any(finite != first_keys$s)) {
            non_finite[0] = 1u;
        }
        first_keys$s = finite;
    }
    if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < STEP) {
        #for h in 0..LOAD_VECTORS
        keys[stage_key + $su * STAGE_ROWS * KEY_STRIDE + $hu] = vector_of_load(first_keys$s, $hu);
        #end
    }
    #end
    workgroupBarrier();

    // The matrices of the halves of a step.
    var ds_matrix: array<array<MatrixA, QUERY_MATRICES>, 2>;
    var key_matrix: array<array<MatrixB, COLUMN_MATRICES>, 2>;
    #for r in 0..QUERY_MATRICES
    ds_matrix[0][$r] = load_ds(d_scores_at + $ru * QUERIES_STEP);
    #end
    #for c in 0..COLUMN_MATRICES
    key_matrix[0][$c] = load_keys(keys_at + $cu * MATRIX_VECTORS);
    #end
    // The first step's products, as in the loop.
    #for r in 0..QUERY_MATRICES
    ds_matrix[1][$r] = load_ds(d_scores_at + $ru * QUERIES_STEP + KEYS_STEP);
    #end
    #for c in 0..COLUMN_MATRICES
    key_matrix[1][$c] = load_keys(keys_at + MATRIX * KEY_STRIDE + $cu * MATRIX_VECTORS);
    #end
    #for c in 0..COLUMN_MATRICES
    #for r in 0..QUERY_MATRICES
    sums$r[$c] = coopMultiplyAdd(ds_matrix[0][$r], key_matrix[0][$c], sums$r[$c]);
    #end
    #end
    #for c in 0..EARLY
    #for r in 0..QUERY_MATRICES
    sums$r[$c] = coopMultiplyAdd(ds_matrix[1][$r], key_matrix[1][$c], sums$r[$c]);
    #end
    #end
    workgroupBarrier();

    // With an increment that the driver does not know an H100 is 0.5 to 2 % faster.
    for (var body_step = first_step; ; body_step += BODY * min(params.parts, 1u)) {
        #for u in 0..BODY
        {
            // Of all steps the first is before the loop.
            if ($uu == BODY - 1u && body_step + BODY >= end_step) {
                break;
            }
            let step = body_step + $uu + 1u;
            // By turns 0 and 1, or 0, 1, 0 and 2.
            const this_set = $uu % 2u * (1u + (SETS - 2u) * ($uu / 2u));
            #for r in 0..QUERY_MATRICES
            d_scores[stage_ds + ROW_PARTS * $ru * QUERIES_STEP] = vector_of_load(next_ds[this_set][$r], 0u);
            d_scores[stage_ds + ROW_PARTS * $ru * QUERIES_STEP + VECTOR_STEP] = vector_of_load(next_ds[this_set][$r], 1u);
            #end
            if ((step + 1u) * STEP > first_query) {
                #for s in 0..STAGES
                {
                    let finite = finite_load(next_keys[this_set][$s]);
                    if (any(finite != next_keys[this_set][$s])) {
                        non_finite[0] = 1u;
                    }
                    next_keys[this_set][$s] = finite;
                }
                #end
            }
            #for s in 0..STAGES
            if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < STEP) {
                #for h in 0..LOAD_VECTORS
                keys[stage_key + $su * STAGE_ROWS * KEY_STRIDE + $hu] = vector_of_load(next_keys[this_set][$s], $hu);
                #end
            }
            #end
            if ($uu % (SETS - 1u) == 0u) {
                #for n in 1..SETS
                // The set that is free now, and of three the one that the next step does not take.
                const next_set$n = (2u - $nu) * this_set + ($nu - 1u) * (2u - $uu / 2u);
                let ds_at$n = ds_step(head_index, min(step + ($nu + 1u), end_step - 1u), first_query) + ds_lane;
                #for r in 0..QUERY_MATRICES
                next_ds[next_set$n][$r] = ds[ds_at$n + ROW_PARTS * $ru * DS_TILE];
                #end
                #for s in 0..STAGES
                key_at$s = min(key_at$s + STEP * row_loads, last_load);
                next_keys[next_set$n][$s] = k[key_at$s];
                #end
                #end
            }
            workgroupBarrier();

            #for r in 0..QUERY_MATRICES
            ds_matrix[0][$r] = load_ds(d_scores_at + $ru * QUERIES_STEP);
            #end
            #for c in 0..COLUMN_MATRICES
            key_matrix[0][$c] = load_keys(keys_at + $cu * MATRIX_VECTORS);
            #end
            #for c in EARLY..COLUMN_MATRICES
            #for r in 0..QUERY_MATRICES
            sums$r[$c] = coopMultiplyAdd(ds_matrix[1][$r], key_matrix[1][$c], sums$r[$c]);
            #end
            #end
            #for r in 0..QUERY_MATRICES
            ds_matrix[1][$r] = load_ds(d_scores_at + $ru * QUERIES_STEP + KEYS_STEP);
            #end
            #for c in 0..COLUMN_MATRICES
            key_matrix[1][$c] = load_keys(keys_at + MATRIX * KEY_STRIDE + $cu * MATRIX_VECTORS);
            #end
            #for c in 0..COLUMN_MATRICES
            #for r in 0..QUERY_MATRICES
            sums$r[$c] = coopMultiplyAdd(ds_matrix[0][$r], key_matrix[0][$c], sums$r[$c]);
            #end
            #end
            #for c in 0..EARLY
            #for r in 0..QUERY_MATRICES
            sums$r[$c] = coopMultiplyAdd(ds_matrix[1][$r], key_matrix[1][$c], sums$r[$c]);
            #end
            #end
            workgroupBarrier();
        }
        #end
    }
    #for c in EARLY..COLUMN_MATRICES
    #for r in 0..QUERY_MATRICES
    sums$r[$c] = coopMultiplyAdd(ds_matrix[1][$r], key_matrix[1][$c], sums$r[$c]);
    #end
    #end

    // As in flash_forward_coop, code that runs once is short, and what is rare comes after it.
    let subgroup_lane = invocation % SUBGROUP;
    let base = batch * params.tokens * params.heads + head * params.head_stride;
    let whole = params.parts == 1u;
    #for r in 0..QUERY_MATRICES
    #for c in 0..COLUMN_MATRICES
    subgroupBarrier();
    coopStoreT(sums$r[$c], &exchange[exchange_at], EXCHANGE_STRIDE);
    subgroupBarrier();
    for (var i = subgroup_lane; i < MATRIX * MATRIX_VECTORS; i += SUBGROUP) {
        let query = first_query + (row_part * QUERY_MATRICES + $ru) * MATRIX + i / MATRIX_VECTORS;
        let column = keys_at + $cu * MATRIX_VECTORS + i % MATRIX_VECTORS;
        if (query < params.tokens && column < VECTORS) {
            let sum = exchange[exchange_at + i / MATRIX_VECTORS * EXCHANGE_STRIDE + i % MATRIX_VECTORS];
            if (whole) {
                dq[(base + query * params.token_stride) * VECTORS + column] = pack_elem(sum * params.scale);
            } else {
                partial[partial_row(part, head_index, query - first_row) + column] = sum;
            }
        }
    }
    #end
    #end
    if (non_finite[0] != 0u) {
        for (var matrix = 0u; matrix < QUERY_MATRICES * COLUMN_MATRICES; matrix++) {
            for (var i = subgroup_lane; i < MATRIX * MATRIX_VECTORS; i += SUBGROUP) {
                let row_matrix = row_part * QUERY_MATRICES + matrix / COLUMN_MATRICES;
                let query = first_query + row_matrix * MATRIX + i / MATRIX_VECTORS;
                let column = keys_at + matrix % COLUMN_MATRICES * MATRIX_VECTORS + i % MATRIX_VECTORS;
                if (query < params.tokens && column < VECTORS) {
                    let lacking = non_finite_keys(kv_base, first_query, query, column);
                    if (whole) {
                        let at = (base + query * params.token_stride) * VECTORS + column;
                        dq[at] = pack_elem(with_lacking(unpack_elem(dq[at]), lacking));
                    } else {
                        let at = partial_row(part, head_index, query - first_row) + column;
                        partial[at] = with_lacking(partial[at], lacking);
                    }
                }
            }
        }
    }
}

fn load_ds(at: u32) -> MatrixA {
    #for once in 0..BY_KEYS
    return coopLoad<MatrixA>(&d_scores[at], DS_STRIDE);
    #end
    #for once in BY_KEYS..1
    return coopLoadT<MatrixA>(&d_scores[at], DS_STRIDE);
    #end
}

fn load_keys(at: u32) -> MatrixB {
    return coopLoadT<MatrixB>(&keys[at], KEY_STRIDE);
}

// Where a step's d_scores begin, at the block's first tile of queries.
fn ds_step(head: u32, step: u32, first_query: u32) -> u32 {
    let pair = ds_pair(head, first_query / DS_BLOCK, step * STEP / DS_BLOCK);
    return pair + first_query % DS_BLOCK / MATRIX * DS_TILE + step * STEP % DS_BLOCK / MATRIX * SUBGROUP;
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
