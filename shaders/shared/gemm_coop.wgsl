// C = A B by tiles of BLOCK_M x BLOCK_N on cooperative matrices: shared/gemm's arguments, parameters and slices.
//
// SUBGROUPS_M x SUBGROUPS_N subgroups share a tile; each has MATRICES_M x MATRICES_N matrices of C in registers. Tiles of
// A and B lie in workgroup memory as they are stored, whichever axis is the inner one, and matrices are loaded from
// there by rows or by columns. The loads of a step along k are issued one step ahead of their move to workgroup memory.
// UNROLL steps of BLOCK_K make a loop's body.
//
// An H100 keeps two workgroups of 128 invocations on a multiprocessor up to 24 KB of workgroup memory, and one above
// that, at half the speed: hence one buffer for each tile, and no padding of the results on their way out.
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

// Elements of a load, and a tile's stored rows: their loads, their distance in vectors of four, two longer than their
// contents against bank conflicts, and how many are staged at a time.
const LOAD: u32 = 4u * LOAD_VECTORS;
const A_LOADS: u32 = select(BLOCK_M, BLOCK_K, A_ALONG_K) / LOAD;
const B_LOADS: u32 = select(BLOCK_N, BLOCK_K, B_ALONG_K) / LOAD;
const A_STRIDE: u32 = A_LOADS * LOAD_VECTORS + 2u;
const B_STRIDE: u32 = B_LOADS * LOAD_VECTORS + 2u;
const A_STAGE_ROWS: u32 = WORKGROUP / A_LOADS;
const B_STAGE_ROWS: u32 = WORKGROUP / B_LOADS;

// From one matrix to the next, in vectors.
const MATRIX_VECTORS: u32 = MATRIX / 4u;
const A_NEXT_M: u32 = select(MATRIX_VECTORS, MATRIX * A_STRIDE, A_ALONG_K);
const A_NEXT_K: u32 = select(MATRIX * A_STRIDE, MATRIX_VECTORS, A_ALONG_K);
const B_NEXT_N: u32 = select(MATRIX_VECTORS, MATRIX * B_STRIDE, B_ALONG_K);
const B_NEXT_K: u32 = select(MATRIX * B_STRIDE, MATRIX_VECTORS, B_ALONG_K);

// A row of a matrix of C belongs to LANES lanes, of which those below MATRIX_LANES have LANE_VECTORS vectors each.
const LANES: u32 = SUBGROUP / MATRIX;
const MATRIX_LANES: u32 = MATRIX_VECTORS / LANE_VECTORS;

var<workgroup> a_tile: array<elem4, select(BLOCK_K, BLOCK_M, A_ALONG_K) * A_STRIDE>;
var<workgroup> b_tile: array<elem4, select(BLOCK_K, BLOCK_N, B_ALONG_K) * B_STRIDE>;
// One matrix of C for each subgroup.
var<workgroup> sums: array<vec4<f32>, SUBGROUPS_M * SUBGROUPS_N * MATRIX * MATRIX_VECTORS>;

// Where the load of a factor is in a step that begins at k: one of the loads of row or column `at` of C,
fn along_k_at(at: u32, size: u32, load: u32, k: u32, k_end: u32) -> u32 {
    return min(at, size - 1u) * (params.k / LOAD) + min(k / LOAD + load, k_end / LOAD - 1u);
}

// or of row `row` of the step, among the loads of the tile that begins at `first`.
fn across_k_at(first: u32, size: u32, row: u32, load: u32, k: u32, k_end: u32) -> u32 {
    return min(k + row, k_end - 1u) * (size / LOAD) + min(first / LOAD + load, size / LOAD - 1u);
}

fn a_at(first: u32, row: u32, load: u32, k: u32, k_end: u32) -> u32 {
    if (A_ALONG_K) {
        return along_k_at(first + row, params.m, load, k, k_end);
    }
    return across_k_at(first, params.m, row, load, k, k_end);
}

fn b_at(first: u32, row: u32, load: u32, k: u32, k_end: u32) -> u32 {
    if (B_ALONG_K) {
        return along_k_at(column_of(first + row), params.n, load, k, k_end);
    }
    return across_k_at(first, params.n, row, load, k, k_end);
}

fn within_k(along_k: bool, row: u32, load: u32, k: u32, k_end: u32) -> bool {
    return K_EVEN || k + select(row, load * LOAD, along_k) < k_end;
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
    let a_from = subgroup_m * MATRICES_M * A_NEXT_M;
    let b_from = subgroup_n * MATRICES_N * B_NEXT_N;

    let a_row = invocation / A_LOADS;
    let a_load = invocation % A_LOADS;
    let a_to = a_row * A_STRIDE + a_load * LOAD_VECTORS;
    let b_row = invocation / B_LOADS;
    let b_load = invocation % B_LOADS;
    let b_to = b_row * B_STRIDE + b_load * LOAD_VECTORS;

    #for i in 0..MATRICES_M
    var c$i: array<MatrixC, MATRICES_N>;
    #end
    #for s in 0..A_STAGES
    var next_a$s = a[a_at(first_row, a_row + $su * A_STAGE_ROWS, a_load, k_begin, k_end)];
    #end
    #for s in 0..B_STAGES
    var next_b$s = b[b_at(first_column, b_row + $su * B_STAGE_ROWS, b_load, k_begin, k_end)];
    #end
    #for s in 0..A_STAGES
    if (!within_k(A_ALONG_K, a_row + $su * A_STAGE_ROWS, a_load, k_begin, k_end)) {
        next_a$s = vec4<u32>(0u);
    }
    #for h in 0..LOAD_VECTORS
    a_tile[a_to + $su * A_STAGE_ROWS * A_STRIDE + $hu] = vector_of_load(next_a$s, $hu);
    #end
    next_a$s = a[a_at(first_row, a_row + $su * A_STAGE_ROWS, a_load, k_begin + BLOCK_K, k_end)];
    #end
    #for s in 0..B_STAGES
    if (!within_k(B_ALONG_K, b_row + $su * B_STAGE_ROWS, b_load, k_begin, k_end)) {
        next_b$s = vec4<u32>(0u);
    }
    #for h in 0..LOAD_VECTORS
    b_tile[b_to + $su * B_STAGE_ROWS * B_STRIDE + $hu] = vector_of_load(next_b$s, $hu);
    #end
    next_b$s = b[b_at(first_column, b_row + $su * B_STAGE_ROWS, b_load, k_begin + BLOCK_K, k_end)];
    #end
    workgroupBarrier();

    for (var k_step = k_begin; k_step < k_end; k_step += K_STEP) {
        #for u in 0..UNROLL
        {
            #for q in 0..BLOCK_MATRICES
            {
                #for i in 0..MATRICES_M
                var a$i: MatrixA;
                if (A_ALONG_K) {
                    a$i = coopLoadT<MatrixA>(&a_tile[a_from + $iu * A_NEXT_M + $qu * A_NEXT_K], A_STRIDE);
                } else {
                    a$i = coopLoad<MatrixA>(&a_tile[a_from + $iu * A_NEXT_M + $qu * A_NEXT_K], A_STRIDE);
                }
                #end
                #for j in 0..MATRICES_N
                var b$j: MatrixB;
                if (B_ALONG_K) {
                    b$j = coopLoad<MatrixB>(&b_tile[b_from + $ju * B_NEXT_N + $qu * B_NEXT_K], B_STRIDE);
                } else {
                    b$j = coopLoadT<MatrixB>(&b_tile[b_from + $ju * B_NEXT_N + $qu * B_NEXT_K], B_STRIDE);
                }
                #for i in 0..MATRICES_M
                c$i[$j] = coopMultiplyAdd(a$i, b$j, c$i[$j]);
                #end
                #end
            }
            #end
            workgroupBarrier();
            let k = k_step + ($uu + 1u) * BLOCK_K;
            #for s in 0..A_STAGES
            if (!within_k(A_ALONG_K, a_row + $su * A_STAGE_ROWS, a_load, k, k_end)) {
                next_a$s = vec4<u32>(0u);
            }
            #for h in 0..LOAD_VECTORS
            a_tile[a_to + $su * A_STAGE_ROWS * A_STRIDE + $hu] = vector_of_load(next_a$s, $hu);
            #end
            #end
            #for s in 0..B_STAGES
            if (!within_k(B_ALONG_K, b_row + $su * B_STAGE_ROWS, b_load, k, k_end)) {
                next_b$s = vec4<u32>(0u);
            }
            #for h in 0..LOAD_VECTORS
            b_tile[b_to + $su * B_STAGE_ROWS * B_STRIDE + $hu] = vector_of_load(next_b$s, $hu);
            #end
            #end
            #for s in 0..A_STAGES
            next_a$s = a[a_at(first_row, a_row + $su * A_STAGE_ROWS, a_load, k + BLOCK_K, k_end)];
            #end
            #for s in 0..B_STAGES
            next_b$s = b[b_at(first_column, b_row + $su * B_STAGE_ROWS, b_load, k + BLOCK_K, k_end)];
            #end
            workgroupBarrier();
        }
        #end
    }

    // Matrices have no accessible elements: they go through workgroup memory.
    let sums_at = subgroup * MATRIX * MATRIX_VECTORS;
    let lane_row = invocation % SUBGROUP / LANES;
    let lane = invocation % LANES;
    let lane_at = sums_at + lane_row * MATRIX_VECTORS + lane;
    #for i in 0..MATRICES_M
    #for j in 0..HALF_MATRICES
    {
        var vectors: array<array<vec4<f32>, HALVES>, LANE_VECTORS>;
        #for h in 0..HALVES
        subgroupBarrier();
        coopStoreT(c$i[HALVES * $ju + $hu], &sums[sums_at], MATRIX_VECTORS);
        subgroupBarrier();
        if (lane < MATRIX_LANES) {
            #for v in 0..LANE_VECTORS
            vectors[$v][$h] = sums[lane_at + $vu * MATRIX_LANES];
            #end
        }
        #end
        let row = first_row + (subgroup_m * MATRICES_M + $iu) * MATRIX + lane_row;
        if (row < params.m && lane < MATRIX_LANES) {
            #for v in 0..LANE_VECTORS
            {
                let matrix = subgroup_n * MATRICES_N + HALVES * $ju;
                let column = column_of(first_column + matrix * MATRIX + (lane + $vu * MATRIX_LANES) * 4u);
                if (column < params.n) {
                    store(workgroup.z * params.m + row, column, vectors[$v]);
                }
            }
            #end
        }
    }
    #end
    #end
}
