// C = A B by tiles of BLOCK_M x BLOCK_N on cooperative matrices: shared/gemm's arguments, parameters and slices.
//
// SUBGROUPS_M x SUBGROUPS_N subgroups share a tile; each has MATRICES_M x MATRICES_N matrices of C in registers. Tiles of
// A and B lie in workgroup memory as they are stored, whichever axis is the inner one, and matrices are loaded from
// there by rows or by columns. UNROLL steps of BLOCK_K make a loop's body.
//
// While the tiles of a step are replaced by those of the next, and while its first matrices are loaded, products of the
// step before are computed: its last matrices are in registers by then. Loads from storage are issued one step ahead of
// their move to workgroup memory.
//
// An H100 keeps two workgroups of 128 invocations on a multiprocessor up to 24 KB of workgroup memory, and one above
// that, at half the speed: hence one buffer for each tile, and one matrix of results at a time on its way out.
//
// Rows and columns past the end of C repeat the last one and are not stored; past the end of k both factors are zero.
//
// The length of the stored inner axes is a multiple of 8. The kernel declares the same as for shared/gemm, and has `elem`,
// the factors' type, from the host.

#import shared/grid
#import shared/halves

struct Params {
    m: u32,
    n: u32,
    k: u32,
    slice: u32,      // k of one slice, a multiple of K_STEP unless there is one slice
    first_tile: u32, // tiles of C are numbered along m in groups of GROUP rows of tiles
    tiles: u32,      // of this dispatch
}

// Loads of 16 bytes are fastest, and stay where they are issued only from bindings that could be written.
@group(0) @binding(0) var<storage, read_write> a: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> b: array<vec4<u32>>;
@group(0) @binding(2) var<uniform> params: Params;

// Tiles that run at the same time share rows of A and columns of B in the cache.
const GROUP: u32 = 8u;

const WORKGROUP: u32 = SUBGROUPS_M * SUBGROUPS_N * SUBGROUP;
const BLOCK_M: u32 = SUBGROUPS_M * MATRICES_M * MATRIX;
const BLOCK_N: u32 = SUBGROUPS_N * MATRICES_N * MATRIX;
const STRIP: u32 = MATRIX;
const K_STEP: u32 = UNROLL * BLOCK_K;

// A tile lies in lines: rows of the step, or where k is the inner axis, a row of each subgroup's part side by side, so that
// loads of a line fill the banks.
const LOAD: u32 = 4u * LOAD_VECTORS;
const K_LOADS: u32 = BLOCK_K / LOAD;
const A_LINES: u32 = select(BLOCK_K, MATRICES_M * MATRIX, A_ALONG_K);
const B_LINES: u32 = select(BLOCK_K, MATRICES_N * MATRIX, B_ALONG_K);

// A line's loads, its vectors of four, two more than its contents against bank conflicts, and the lines that are staged
// at a time.
const A_LOADS: u32 = select(BLOCK_M / LOAD, SUBGROUPS_M * K_LOADS, A_ALONG_K);
const B_LOADS: u32 = select(BLOCK_N / LOAD, SUBGROUPS_N * K_LOADS, B_ALONG_K);
const A_STRIDE: u32 = A_LOADS * LOAD_VECTORS + 2u;
const B_STRIDE: u32 = B_LOADS * LOAD_VECTORS + 2u;
const A_STAGE_LINES: u32 = WORKGROUP / A_LOADS;
const B_STAGE_LINES: u32 = WORKGROUP / B_LOADS;

// From one subgroup's part to the next, and from one matrix to the next, in vectors.
const A_NEXT_SUBGROUP: u32 = A_LOADS * LOAD_VECTORS / SUBGROUPS_M;
const B_NEXT_SUBGROUP: u32 = B_LOADS * LOAD_VECTORS / SUBGROUPS_N;
const MATRIX_VECTORS: u32 = MATRIX / 4u;
const A_NEXT_M: u32 = select(MATRIX_VECTORS, MATRIX * A_STRIDE, A_ALONG_K);
const A_NEXT_K: u32 = select(MATRIX * A_STRIDE, MATRIX_VECTORS, A_ALONG_K);
const B_NEXT_N: u32 = select(MATRIX_VECTORS, MATRIX * B_STRIDE, B_ALONG_K);
const B_NEXT_K: u32 = select(MATRIX * B_STRIDE, MATRIX_VECTORS, B_ALONG_K);

// A row of a matrix of C belongs to LANES lanes, of which those below MATRIX_LANES have LANE_PARTS times WIDE vectors each.
// In workgroup memory rows are two vectors longer than their contents, against bank conflicts.
const LANES: u32 = SUBGROUP / MATRIX;
const MATRIX_LANES: u32 = MATRIX_VECTORS / (LANE_PARTS * WIDE);
const SUMS_STRIDE: u32 = MATRIX_VECTORS + 2u;

var<workgroup> a_tile: array<elem4, A_LINES * A_STRIDE>;
var<workgroup> b_tile: array<elem4, B_LINES * B_STRIDE>;
// One matrix of C for each subgroup.
var<workgroup> sums: array<vec4<f32>, SUBGROUPS_M * SUBGROUPS_N * MATRIX * SUMS_STRIDE>;

// Where the load of a factor is in a step that begins at k: one of the loads of row or column `at` of C,
fn along_k_at(at: u32, size: u32, load: u32, k: u32, k_end: u32) -> u32 {
    return min(at, size - 1u) * (params.k / LOAD) + min(k / LOAD + load, k_end / LOAD - 1u);
}

// or of row `row` of the step, among the loads of the tile that begins at `first`.
fn across_k_at(first: u32, size: u32, row: u32, load: u32, k: u32, k_end: u32) -> u32 {
    return min(k + row, k_end - 1u) * (size / LOAD) + min(first / LOAD + load, size / LOAD - 1u);
}

// Load `load` of line `line` of the tile that begins at `first`.
fn a_at(first: u32, line: u32, load: u32, k: u32, k_end: u32) -> u32 {
    if (A_ALONG_K) {
        return along_k_at(first + load / K_LOADS * A_LINES + line, params.m, load % K_LOADS, k, k_end);
    }
    return across_k_at(first, params.m, line, load, k, k_end);
}

fn b_at(first: u32, line: u32, load: u32, k: u32, k_end: u32) -> u32 {
    if (B_ALONG_K) {
        return along_k_at(column_of(first + load / K_LOADS * B_LINES + line), params.n, load % K_LOADS, k, k_end);
    }
    return across_k_at(first, params.n, line, load, k, k_end);
}

fn within_k(along_k: bool, line: u32, load: u32, k: u32, k_end: u32) -> bool {
    return K_EVEN || k + select(line, load % K_LOADS * LOAD, along_k) < k_end;
}

fn load_a(at: u32) -> MatrixA {
    if (A_ALONG_K) {
        return coopLoadT<MatrixA>(&a_tile[at], A_STRIDE);
    }
    return coopLoad<MatrixA>(&a_tile[at], A_STRIDE);
}

fn load_b(at: u32) -> MatrixB {
    if (B_ALONG_K) {
        return coopLoad<MatrixB>(&b_tile[at], B_STRIDE);
    }
    return coopLoadT<MatrixB>(&b_tile[at], B_STRIDE);
}

// The first column of C in part `part` of what a lane has of a row of a subgroup's matrix, or pair of matrices, `matrix`.
fn lane_column(first: u32, subgroup_n: u32, matrix: u32, lane: u32, part: u32) -> u32 {
    let at = (subgroup_n * MATRICES_N + HALVES * matrix) * MATRIX + (lane + part * MATRIX_LANES) * 4u * WIDE;
    return column_of(first + at);
}

// What is past the end of C fetches what is there.
fn fetch_within(row: u32, column: u32) -> Fetched {
    return fetch(min(row, params.m - 1u), select(0u, column, column < params.n));
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let number = linear_workgroup(workgroup, workgroups);
    if (number >= params.tiles) {
        return;
    }
    let tiles_m = (params.m + BLOCK_M - 1u) / BLOCK_M;
    let tiles_n = (params.n + BLOCK_N - 1u) / BLOCK_N;
    let tile = params.first_tile + number;
    let first_of_group = tile / (GROUP * tiles_n) * GROUP;
    let group = min(GROUP, tiles_m - first_of_group);
    let in_group = tile % (GROUP * tiles_n);
    let first_row = (first_of_group + in_group % group) * BLOCK_M;
    let first_column = in_group / group * BLOCK_N;
    let k_begin = workgroup.z * params.slice;
    let k_end = min(k_begin + params.slice, params.k);

    let subgroup = invocation / SUBGROUP;
    let subgroup_m = subgroup / SUBGROUPS_N;
    let subgroup_n = subgroup % SUBGROUPS_N;
    let a_from = subgroup_m * A_NEXT_SUBGROUP;
    let b_from = subgroup_n * B_NEXT_SUBGROUP;

    let a_line = invocation / A_LOADS;
    let a_load = invocation % A_LOADS;
    let a_to = a_line * A_STRIDE + a_load * LOAD_VECTORS;
    let b_line = invocation / B_LOADS;
    let b_load = invocation % B_LOADS;
    let b_to = b_line * B_STRIDE + b_load * LOAD_VECTORS;

    #for i in 0..MATRICES_M
    var c$i: array<MatrixC, MATRICES_N>;
    #end
    #for s in 0..A_STAGES
    var next_a$s = a[a_at(first_row, a_line + $su * A_STAGE_LINES, a_load, k_begin, k_end)];
    #end
    #for s in 0..B_STAGES
    var next_b$s = b[b_at(first_column, b_line + $su * B_STAGE_LINES, b_load, k_begin, k_end)];
    #end
    #for s in 0..A_STAGES
    if (!within_k(A_ALONG_K, a_line + $su * A_STAGE_LINES, a_load, k_begin, k_end)) {
        next_a$s = vec4<u32>(0u);
    }
    #for h in 0..LOAD_VECTORS
    a_tile[a_to + $su * A_STAGE_LINES * A_STRIDE + $hu] = vector_of_load(next_a$s, $hu);
    #end
    next_a$s = a[a_at(first_row, a_line + $su * A_STAGE_LINES, a_load, k_begin + BLOCK_K, k_end)];
    #end
    #for s in 0..B_STAGES
    if (!within_k(B_ALONG_K, b_line + $su * B_STAGE_LINES, b_load, k_begin, k_end)) {
        next_b$s = vec4<u32>(0u);
    }
    #for h in 0..LOAD_VECTORS
    b_tile[b_to + $su * B_STAGE_LINES * B_STRIDE + $hu] = vector_of_load(next_b$s, $hu);
    #end
    next_b$s = b[b_at(first_column, b_line + $su * B_STAGE_LINES, b_load, k_begin + BLOCK_K, k_end)];
    #end
    workgroupBarrier();

    // The matrices of a step along k.
    var a_matrix: array<array<MatrixA, MATRICES_M>, BLOCK_MATRICES>;
    var b_matrix: array<array<MatrixB, MATRICES_N>, BLOCK_MATRICES>;
    #for i in 0..MATRICES_M
    a_matrix[0][$i] = load_a(a_from + $iu * A_NEXT_M);
    #end
    #for j in 0..MATRICES_N
    b_matrix[0][$j] = load_b(b_from + $ju * B_NEXT_N);
    #end
    for (var k_step = k_begin; k_step < k_end; k_step += K_STEP) {
        #for u in 0..UNROLL
        {
            #for q in 1..BLOCK_MATRICES
            #for i in 0..MATRICES_M
            a_matrix[$q][$i] = load_a(a_from + $iu * A_NEXT_M + $qu * A_NEXT_K);
            #end
            #for j in 0..MATRICES_N
            b_matrix[$q][$j] = load_b(b_from + $ju * B_NEXT_N + $qu * B_NEXT_K);
            #end
            #for j in 0..MATRICES_N
            #for i in 0..MATRICES_M
            c$i[$j] = coopMultiplyAdd(a_matrix[$q - 1][$i], b_matrix[$q - 1][$j], c$i[$j]);
            #end
            #end
            #end
            // Of the last products one column before the barriers and the rest behind them: with a half or three quarters before
            // them an H100 is 3 to 5 % slower.
            #for j in 0..1
            #for i in 0..MATRICES_M
            c$i[$j] = coopMultiplyAdd(a_matrix[BLOCK_MATRICES - 1u][$i], b_matrix[BLOCK_MATRICES - 1u][$j], c$i[$j]);
            #end
            #end
            workgroupBarrier();
            let k = k_step + ($uu + 1u) * BLOCK_K;
            #for s in 0..A_STAGES
            if (!within_k(A_ALONG_K, a_line + $su * A_STAGE_LINES, a_load, k, k_end)) {
                next_a$s = vec4<u32>(0u);
            }
            #for h in 0..LOAD_VECTORS
            a_tile[a_to + $su * A_STAGE_LINES * A_STRIDE + $hu] = vector_of_load(next_a$s, $hu);
            #end
            #end
            #for s in 0..B_STAGES
            if (!within_k(B_ALONG_K, b_line + $su * B_STAGE_LINES, b_load, k, k_end)) {
                next_b$s = vec4<u32>(0u);
            }
            #for h in 0..LOAD_VECTORS
            b_tile[b_to + $su * B_STAGE_LINES * B_STRIDE + $hu] = vector_of_load(next_b$s, $hu);
            #end
            #end
            workgroupBarrier();
            #for i in 0..MATRICES_M
            a_matrix[0][$i] = load_a(a_from + $iu * A_NEXT_M);
            #end
            #for j in 0..MATRICES_N
            b_matrix[0][$j] = load_b(b_from + $ju * B_NEXT_N);
            #end
            #for j in 1..MATRICES_N
            #for i in 0..MATRICES_M
            c$i[$j] = coopMultiplyAdd(a_matrix[BLOCK_MATRICES - 1u][$i], b_matrix[BLOCK_MATRICES - 1u][$j], c$i[$j]);
            #end
            #end
            #for s in 0..A_STAGES
            next_a$s = a[a_at(first_row, a_line + $su * A_STAGE_LINES, a_load, k + BLOCK_K, k_end)];
            #end
            #for s in 0..B_STAGES
            next_b$s = b[b_at(first_column, b_line + $su * B_STAGE_LINES, b_load, k + BLOCK_K, k_end)];
            #end
        }
        #end
    }

    // Matrices have no accessible elements: they go through workgroup memory. What the epilogue reads is fetched one row
    // of matrices ahead.
    let sums_at = subgroup * MATRIX * SUMS_STRIDE;
    let lane_row = invocation % SUBGROUP / LANES;
    let lane = invocation % LANES;
    let row = first_row + subgroup_m * MATRICES_M * MATRIX + lane_row;
    var fetched: array<array<array<Fetched, LANE_PARTS>, HALF_MATRICES>, 2>;
    #for j in 0..HALF_MATRICES
    #for p in 0..LANE_PARTS
    fetched[0][$j][$p] = fetch_within(row, lane_column(first_column, subgroup_n, $ju, lane, $pu));
    #end
    #end
    #for i in 0..MATRICES_M
    if ($iu + 1u < MATRICES_M) {
        #for j in 0..HALF_MATRICES
        #for p in 0..LANE_PARTS
        fetched[($i + 1) % 2][$j][$p] =
            fetch_within(row + ($iu + 1u) * MATRIX, lane_column(first_column, subgroup_n, $ju, lane, $pu));
        #end
        #end
    }
    #for j in 0..HALF_MATRICES
    {
        var vectors: array<array<array<vec4<f32>, WIDE>, HALVES>, LANE_PARTS>;
        #for h in 0..HALVES
        subgroupBarrier();
        coopStoreT(c$i[HALVES * $ju + $hu], &sums[sums_at], SUMS_STRIDE);
        subgroupBarrier();
        if (lane < MATRIX_LANES) {
            #for p in 0..LANE_PARTS
            {
                // Odd rows read their two vectors the other way round, against bank conflicts.
                let at = sums_at + lane_row * SUMS_STRIDE + (lane + $pu * MATRIX_LANES) * WIDE;
                let turned = lane_row % WIDE;
                let x = sums[at + turned];
                let y = sums[at + WIDE - 1u - turned];
                vectors[$p][$h][0] = select(x, y, turned == 1u);
                vectors[$p][$h][WIDE - 1u] = select(y, x, turned == 1u);
            }
            #end
        }
        #end
        if (row + $iu * MATRIX < params.m && lane < MATRIX_LANES) {
            #for p in 0..LANE_PARTS
            {
                let column = lane_column(first_column, subgroup_n, $ju, lane, $pu);
                if (column < params.n) {
                    store(workgroup.z * params.m + row + $iu * MATRIX, column, vectors[$p], fetched[$i % 2][$j][$p]);
                }
            }
            #end
        }
    }
    #end
    #end
}
