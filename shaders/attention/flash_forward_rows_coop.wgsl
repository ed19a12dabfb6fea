// flash_forward_coop for a small head_dim and many workgroups: its arguments, parameters, order of units and results.
//
// A subgroup has 2 * MATRIX query rows to itself, with q and all of o in registers, so that a tile is MATRIX keys and the
// scores and weights of a row stay within the subgroup. Key tile j is one phase, whose parts do not wait for each other:
//
//     weights of tile j from its scores;  scores of tile j + 1;  o += weights of tile j - 1 * values of tile j - 1
//
// Keys and values have two buffers and a barrier closes a phase, which stages the keys of tile j + 2 and the values of
// tile j. The subgroup's two matrices of rows take turns at memory for one matrix of scores and one of weights. At the
// barrier it holds scores of the first rows and weights of the second; scores of the second and weights of the first wait
// in registers and pass through in the middle of the phase. So the traffic is spread over the phase (6 % over memory for
// both at head_dim 64), and more workgroups share a multiprocessor of an H100, two and up to head_dim 48 three (11 to
// 13 %): while one waits another works. At head_dim 64 this is 1.3 times as fast as flash_forward_coop, whose phases take
// turns at the matrices, the exponentials and workgroup memory. All of a phase that is not rare is one stretch of code,
// for the driver to mix: with the rescaling behind the barrier, a branch more, it is 8 % slower, and 15 % with a branch
// before the staging.
//
// Stores of a load's vectors one behind the other are one store of 16 bytes to NVIDIA's driver. Two of 8 bytes, MIXED with
// those of another load, meet each other's banks; but at head_dim 64 what the driver makes of that is 2 % faster.
//
// The lazy rescaling, and infinity and NaN in what the mask excludes, are as in flash_forward_coop.

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
// As in flash_forward_coop, of the CHUNKS weights in a sum.
const LARGE: f32 = 64.0 * f32(CHUNKS);
const LAZY: f32 = 5.9;
const LN_2: f32 = 0.6931471805599453;

const SUBGROUPS: u32 = BLOCK_M / (2u * MATRIX);
const WORKGROUP: u32 = SUBGROUPS * SUBGROUP;
const LANES: u32 = SUBGROUP / MATRIX;

// Vectors of four elements. The subgroups' matrices lie side by side in MATRIX rows, which are two vectors longer than
// their contents, against bank conflicts; so do a tile's keys and values.
const VECTORS: u32 = HEAD_DIM / 4u;
const MATRIX_VECTORS: u32 = MATRIX / 4u;
const SCORE_STRIDE: u32 = SUBGROUPS * MATRIX_VECTORS + 2u;
const TILE_STRIDE: u32 = 2u * VECTORS + 2u;
const TILE_VECTORS: u32 = BLOCK_N * TILE_STRIDE;

// A row of a matrix of q in loads of 16 bytes.
const MATRIX_LOADS: u32 = MATRIX_VECTORS / LOAD_VECTORS;

// Staging of a tile's rows: STAGE_ROWS at a time, one load of keys and one of values for each invocation.
const LOADS: u32 = VECTORS / LOAD_VECTORS;
const STAGE_ROWS: u32 = WORKGROUP / LOADS;
const STAGE_EVEN: bool = STAGE_ROWS * LOADS == WORKGROUP && BLOCK_N % STAGE_ROWS == 0u;

// What lies behind the first row of scores is free: whether values held infinity or NaN.
const NON_FINITE: u32 = SCORE_STRIDE - 1u;

// Every variable a multiple of 16 bytes, as cooperative loads assume.
var<workgroup> tiles: array<elem4, 2u * TILE_VECTORS>;
var<workgroup> scores: array<vec4<f32>, MATRIX * SCORE_STRIDE>;
var<workgroup> weights: array<elem4, MATRIX * SCORE_STRIDE>;

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
    let blocks = (params.tokens + BLOCK_M - 1u) / BLOCK_M;
    let unit = unit_of(params.first_unit + index, blocks, params.heads);
    let head = unit.head;
    let first_query = (blocks - 1u - unit.block) * BLOCK_M;
    let batch = unit.batch;
    let kv_head = head / (params.heads / params.kv_heads);
    let base = batch * params.tokens * params.heads + head * params.head_stride;
    let kv_base = batch * params.tokens * params.kv_heads + kv_head * params.kv_head_stride;
    let last_token = params.tokens - 1u;
    let end_tile = (first_query / BLOCK_M + 1u) * (BLOCK_M / BLOCK_N);

    let subgroup = invocation / SUBGROUP;
    let subgroup_lane = invocation % SUBGROUP;
    let lane_row = subgroup_lane / LANES;
    let lane = subgroup_lane % LANES;
    let first_row = first_query + subgroup * 2u * MATRIX;
    let matrix_at = subgroup * MATRIX_VECTORS;
    let row_at = lane_row * SCORE_STRIDE + matrix_at + lane;

    let stage_row = select(BLOCK_N, invocation / LOADS, invocation < STAGE_ROWS * LOADS);
    let stage_load = invocation % LOADS;
    let stage_at = stage_row * TILE_STRIDE + stage_load * LOAD_VECTORS;

    // The first loads are on their way before the first is waited for. They advance by a tile and stay at the last token.
    let row_loads = params.kv_token_stride * LOADS;
    let last_load = kv_base * LOADS + last_token * row_loads + stage_load;
    #for s in 0..STAGES
    var value_at$s = min(kv_base * LOADS + (stage_row + $su * STAGE_ROWS) * row_loads + stage_load, last_load);
    var next_key$s = k[value_at$s];
    var next_value$s = v[value_at$s];
    var key_at$s = min(value_at$s + BLOCK_N * row_loads, last_load);
    let second_key$s = k[key_at$s];
    #end

    // q, through the memory of the weights. Rows past the last token repeat it and are not written. (All loads before the
    // first is waited for make no difference to an H100.)
    #for r in 0..2
    let query$r = first_row + $ru * MATRIX + lane_row;
    var q$r: array<MatrixA, DEPTH_MATRICES>;
    var o$r: array<MatrixC, DEPTH_MATRICES>;
    #end
    #for d in 0..DEPTH_MATRICES
    #for r in 0..2
    for (var i = subgroup_lane; i < MATRIX * MATRIX_LOADS; i += SUBGROUP) {
        let row = i / MATRIX_LOADS;
        let token = min(first_row + $ru * MATRIX + row, last_token);
        let load = q[(base + token * params.token_stride) * LOADS + $du * MATRIX_LOADS + i % MATRIX_LOADS];
        let at = row * SCORE_STRIDE + matrix_at + i % MATRIX_LOADS * LOAD_VECTORS;
        #for h in 0..LOAD_VECTORS
        weights[at + $hu] = vector_of_load(load, $hu);
        #end
    }
    subgroupBarrier();
    q$r[$d] = coopLoadT<MatrixA>(&weights[matrix_at], SCORE_STRIDE);
    subgroupBarrier();
    #end
    #end

    // Tile -1 has weights and values zero. Tile 0 has its scores before the loop.
    #for i in 0..CHUNKS
    weights[row_at + $iu * LANES] = elem4();
    #end
    if (invocation == 0u) {
        scores[NON_FINITE] = vec4<f32>(0.0);
    }
    #for s in 0..STAGES
    if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
        #for once in 0..MIXED
        #for h in 0..LOAD_VECTORS
        tiles[stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = vector_of_load(next_key$s, $hu);
        tiles[TILE_VECTORS + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = vector_of_load(second_key$s, $hu);
        tiles[TILE_VECTORS + VECTORS + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = elem4();
        #end
        #end
        #for once in MIXED..1
        #for h in 0..LOAD_VECTORS
        tiles[stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = vector_of_load(next_key$s, $hu);
        #end
        #for h in 0..LOAD_VECTORS
        tiles[TILE_VECTORS + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = vector_of_load(second_key$s, $hu);
        #end
        #for h in 0..LOAD_VECTORS
        tiles[TILE_VECTORS + VECTORS + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = elem4();
        #end
        #end
    }
    key_at$s = min(key_at$s + BLOCK_N * row_loads, last_load);
    next_key$s = k[key_at$s];
    #end
    workgroupBarrier();
    #for r in 0..2
    var first_scores$r = MatrixC();
    #end
    #for d in 0..DEPTH_MATRICES
    let first_keys$d = coopLoad<MatrixB>(&tiles[$du * MATRIX_VECTORS], TILE_STRIDE);
    #for r in 0..2
    first_scores$r = coopMultiplyAdd(q$r[$d], first_keys$d, first_scores$r);
    #end
    #end
    coopStoreT(first_scores0, &scores[matrix_at], SCORE_STRIDE);
    workgroupBarrier();

    // The maximum starts finite, so that no difference of two infinities arises where nothing is infinite.
    #for r in 0..2
    var maximum$r = LOWEST;
    var sum$r = 0.0;
    #end
    // What waits for its turn: the scores of the tile in rows 1, and the weights of the tile before in rows 0.
    var scores1 = first_scores1;
    var weights0 = MatrixA();
    for (var first_tile = 0u; first_tile < end_tile; first_tile += UNROLL) {
        #for u in 0..UNROLL
        {
            let tile = first_tile + $uu;
            let first_key = tile * BLOCK_N;
            // Known without the loop's variable where the body has all buffers.
            let buffer = select(tile, $uu, UNROLL % 2u == 0u) % 2u * TILE_VECTORS;
            let other = TILE_VECTORS - buffer;

            if (first_key + BLOCK_N - 1u > first_query) {
                #for s in 0..STAGES
                {
                    let finite = finite_load(next_value$s);
                    if (any(finite != next_value$s)) {
                        scores[NON_FINITE].x = 1.0;
                    }
                    next_value$s = finite;
                }
                #end
            }

            #for i in 0..CHUNKS
            let chunk0_$i = scores[row_at + $iu * LANES];
            #end
            let weights1 = coopLoadT<MatrixA>(&weights[matrix_at], SCORE_STRIDE);
            #for r in 0..2
            var next_scores$r = MatrixC();
            #end
            #for d in 0..DEPTH_MATRICES
            let keys$d = coopLoad<MatrixB>(&tiles[other + $du * MATRIX_VECTORS], TILE_STRIDE);
            #for r in 0..2
            next_scores$r = coopMultiplyAdd(q$r[$d], keys$d, next_scores$r);
            #end
            #end
            #for d in 0..DEPTH_MATRICES
            let values$d = coopLoadT<MatrixB>(&tiles[other + VECTORS + $du * MATRIX_VECTORS], TILE_STRIDE);
            #for r in 0..2
            o$r[$d] = coopMultiplyAdd(weights$r, values$d, o$r[$d]);
            #end
            #end
            var partial_sum0 = vec4<f32>(0.0);
            #for i in 0..CHUNKS
            let weight0_$i = exp2(fma(chunk0_$i, vec4<f32>(params.scale), vec4<f32>(-maximum0)));
            partial_sum0 += weight0_$i;
            #end

            // The rows change turns.
            subgroupBarrier();
            coopStoreT(scores1, &scores[matrix_at], SCORE_STRIDE);
            #for i in 0..CHUNKS
            weights[row_at + $iu * LANES] = pack_elem(weight0_$i);
            #end
            subgroupBarrier();
            #for i in 0..CHUNKS
            let chunk1_$i = scores[row_at + $iu * LANES];
            #end
            weights0 = coopLoadT<MatrixA>(&weights[matrix_at], SCORE_STRIDE);
            // Behind those loads: before the exchange the staging makes the kernel 11 % slower.
            #for once in 0..MIXED
            #for s in 0..STAGES
            if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
                #for h in 0..LOAD_VECTORS
                tiles[buffer + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = vector_of_load(next_key$s, $hu);
                tiles[buffer + VECTORS + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] =
                    vector_of_load(next_value$s, $hu);
                #end
            }
            #end
            #end
            #for once in MIXED..1
            #for s in 0..STAGES
            if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
                #for h in 0..LOAD_VECTORS
                tiles[buffer + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] = vector_of_load(next_key$s, $hu);
                #end
            }
            #end
            #for s in 0..STAGES
            if (STAGE_EVEN || stage_row + $su * STAGE_ROWS < BLOCK_N) {
                #for h in 0..LOAD_VECTORS
                tiles[buffer + VECTORS + stage_at + $su * STAGE_ROWS * TILE_STRIDE + $hu] =
                    vector_of_load(next_value$s, $hu);
                #end
            }
            #end
            #end
            #for s in 0..STAGES
            key_at$s = min(key_at$s + BLOCK_N * row_loads, last_load);
            next_key$s = k[key_at$s];
            value_at$s = min(value_at$s + BLOCK_N * row_loads, last_load);
            next_value$s = v[value_at$s];
            #end
            var partial_sum1 = vec4<f32>(0.0);
            #for i in 0..CHUNKS
            let weight1_$i = exp2(fma(chunk1_$i, vec4<f32>(params.scale), vec4<f32>(-maximum1)));
            partial_sum1 += weight1_$i;
            #end
            subgroupBarrier();
            #for i in 0..CHUNKS
            weights[row_at + $iu * LANES] = pack_elem(weight1_$i);
            #end
            #for r in 0..2
            let largest$r = max(max(partial_sum$r.x, partial_sum$r.y), max(partial_sum$r.z, partial_sum$r.w));
            #end
            // Not below LARGE, with NaN: that of one row must not hide the other's sum.
            if (takes_branch(first_key + BLOCK_N - 1u > first_row, !(max(largest0, largest1) <= LARGE))) {
                // Again, with the mask and the true maximum.
                #for r in 0..2
                var row_maximum$r = LOWEST;
                #for i in 0..CHUNKS
                let seen$r_$i =
                    vec4<u32>(first_key + ($iu * LANES + lane) * 4u) + vec4<u32>(0u, 1u, 2u, 3u) <= vec4<u32>(query$r);
                let masked$r_$i = select(vec4<f32>(LOWEST), chunk$r_$i, seen$r_$i);
                row_maximum$r = max(
                    row_maximum$r,
                    max(max(masked$r_$i.x, masked$r_$i.y), max(masked$r_$i.z, masked$r_$i.w)),
                );
                #end
                #for b in 0..LANE_BITS
                row_maximum$r = max(row_maximum$r, subgroupShuffleXor(row_maximum$r, 1u << $bu));
                #end
                row_maximum$r *= params.scale;
                let rises$r = row_maximum$r > maximum$r + LAZY;
                let new_maximum$r = select(maximum$r, row_maximum$r, rises$r);
                let rescale$r = exp2(maximum$r - new_maximum$r);
                sum$r *= rescale$r;
                maximum$r = new_maximum$r;
                partial_sum$r = vec4<f32>(0.0);
                #for i in 0..CHUNKS
                let again$r_$i = select(
                    vec4<f32>(0.0),
                    exp2(fma(chunk$r_$i, vec4<f32>(params.scale), vec4<f32>(-maximum$r))),
                    seen$r_$i,
                );
                partial_sum$r += again$r_$i;
                #end
                #end
                #for i in 0..CHUNKS
                weights[row_at + $iu * LANES] = pack_elem(again0_$i);
                #end
                subgroupBarrier();
                weights0 = coopLoadT<MatrixA>(&weights[matrix_at], SCORE_STRIDE);
                subgroupBarrier();
                #for i in 0..CHUNKS
                weights[row_at + $iu * LANES] = pack_elem(again1_$i);
                #end
                // Before the first tile there is nothing to rescale.
                if (takes_branch(false, (rises0 || rises1) && tile > 0u)) {
                    #for r in 0..2
                    #for d in 0..DEPTH_MATRICES
                    subgroupBarrier();
                    coopStoreT(o$r[$d], &scores[matrix_at], SCORE_STRIDE);
                    subgroupBarrier();
                    for (var i = 0u; i < CHUNKS; i++) {
                        scores[row_at + i * LANES] *= rescale$r;
                    }
                    subgroupBarrier();
                    o$r[$d] = coopLoadT<MatrixC>(&scores[matrix_at], SCORE_STRIDE);
                    #end
                    #end
                    subgroupBarrier();
                }
            }
            #for r in 0..2
            sum$r += (partial_sum$r.x + partial_sum$r.y) + (partial_sum$r.z + partial_sum$r.w);
            #end
            coopStoreT(next_scores0, &scores[matrix_at], SCORE_STRIDE);
            scores1 = next_scores1;
            workgroupBarrier();
        }
        #end
    }

    // The last tile's values.
    let last_buffer = (end_tile - 1u) % 2u * TILE_VECTORS;
    let weights1 = coopLoadT<MatrixA>(&weights[matrix_at], SCORE_STRIDE);
    #for d in 0..DEPTH_MATRICES
    let values$d = coopLoadT<MatrixB>(&tiles[last_buffer + VECTORS + $du * MATRIX_VECTORS], TILE_STRIDE);
    #for r in 0..2
    o$r[$d] = coopMultiplyAdd(weights$r, values$d, o$r[$d]);
    #end
    #end

    #for r in 0..2
    #for b in 0..LANE_BITS
    sum$r += subgroupShuffleXor(sum$r, 1u << $bu);
    #end
    if (lane == 0u && query$r < params.tokens) {
        lse[(batch * params.heads + head) * params.tokens + query$r] = (maximum$r + log2(sum$r)) * LN_2;
    }
    let factor$r = 1.0 / sum$r;
    #end
    // A matrix of o at a time, where a tile's scores were.
    #for d in 0..DEPTH_MATRICES
    #for r in 0..2
    subgroupBarrier();
    coopStoreT(o$r[$d], &scores[matrix_at], SCORE_STRIDE);
    subgroupBarrier();
    if (query$r < params.tokens) {
        let at = (base + query$r * params.token_stride) * VECTORS + $du * MATRIX_VECTORS + lane;
        #for i in 0..CHUNKS
        o[at + $iu * LANES] = pack_elem(scores[row_at + $iu * LANES] * factor$r);
        #end
    }
    #end
    #end
    if (scores[NON_FINITE].x != 0.0) {
        // An invocation reads the elements that it wrote.
        for (var token = first_row + lane_row; token < min(first_row + 2u * MATRIX, params.tokens); token += MATRIX) {
            for (var column = lane; column < VECTORS; column += LANES) {
                let at = (base + token * params.token_stride) * VECTORS + column;
                let lacking = non_finite_values(kv_base, first_query, token, column);
                o[at] = pack_elem(with_lacking(unpack_elem(o[at]), lacking));
            }
        }
    }
}
