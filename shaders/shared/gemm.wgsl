// C = A B by tiles of BLOCK_M x BLOCK_N in workgroup memory; an invocation of the 16 x 16 keeps ROWS x 4 HALVES of C in
// registers.
//
// Host constants: A_ALONG_K (A is stored [m, k], otherwise [k, m]), B_ALONG_K (B is stored [n, k], otherwise [k, n]; so if
// HALVES = 2), ROW_BLOCKS (ROWS = 4 ROW_BLOCKS). The length of the stored inner axes is a multiple of 4. Workgroup id z:
// slice of k.
//
// The host imports this or shared/gemm_coop for the kernel, which declares its bindings from 3 on and the epilogue
// `store(row, column, sums, fetched)`: COLUMNS columns of C from `column` on, and those that belong to them
// (shared/halves), with what `fetch(row, column)` read for them, which may be called some time before (shared/fetch_nothing
// where there is nothing to read). Here COLUMNS = 4. The Cs of slices lie one below the other.

#import shared/grid
#import shared/halves

struct Params {
    m: u32,
    n: u32,
    k: u32,
    slice: u32,      // k of one slice, a multiple of BLOCK_K unless there is one slice
    first_tile: u32, // tiles of C are numbered along n first
    tiles: u32,      // of this dispatch
}

// Writable only so that a kernel may bind the same tensor a second time.
@group(0) @binding(0) var<storage, read_write> a: array<a4>;
@group(0) @binding(1) var<storage, read_write> b: array<b4>;
@group(0) @binding(2) var<uniform> params: Params;

const ROWS: u32 = 4u * ROW_BLOCKS;
const BLOCK_M: u32 = 16u * ROWS;
const STRIP: u32 = 64u;
const BLOCK_N: u32 = STRIP * HALVES;
const BLOCK_K: u32 = 16u;
// Tiles hold vectors of four along the stored axis. Along k, [k / 4][row] with two rows more, so that the four vectors
// that neighbours write fall into different banks.
const A_STRIDE: u32 = select(BLOCK_M / 4u, BLOCK_M + 2u, A_ALONG_K);
const B_STRIDE: u32 = select(BLOCK_N / 4u, BLOCK_N + 2u, B_ALONG_K);

var<workgroup> a_tile: array<vec4<f32>, select(BLOCK_K, BLOCK_K / 4u, A_ALONG_K) * A_STRIDE>;
var<workgroup> b_tile: array<vec4<f32>, select(BLOCK_K, BLOCK_K / 4u, B_ALONG_K) * B_STRIDE>;

fn load_a(row: u32, k0: u32, k_end: u32, invocation: u32) {
    for (var i = invocation; i < BLOCK_M * BLOCK_K / 4u; i += 256u) {
        var value = vec4<f32>(0.0);
        if (A_ALONG_K) {
            let r = i / (BLOCK_K / 4u);
            let k = k0 + i % (BLOCK_K / 4u) * 4u;
            if (row + r < params.m && k < k_end) {
                value = unpack_a(a[((row + r) * params.k + k) / 4u]);
            }
            a_tile[i % (BLOCK_K / 4u) * A_STRIDE + r] = value;
        } else {
            let r = i % (BLOCK_M / 4u) * 4u;
            let k = k0 + i / (BLOCK_M / 4u);
            if (row + r < params.m && k < k_end) {
                value = unpack_a(a[(k * params.m + row + r) / 4u]);
            }
            a_tile[i] = value;
        }
    }
}

fn load_b(column: u32, k0: u32, k_end: u32, invocation: u32) {
    for (var i = invocation; i < BLOCK_N * BLOCK_K / 4u; i += 256u) {
        var value = vec4<f32>(0.0);
        if (B_ALONG_K) {
            let c = i / (BLOCK_K / 4u);
            let k = k0 + i % (BLOCK_K / 4u) * 4u;
            let of_c = column_of(column + c);
            if (of_c < params.n && k < k_end) {
                value = unpack_b(b[(of_c * params.k + k) / 4u]);
            }
            // An invocation reads four neighbouring columns: they lie 16 apart, its neighbours' beside them.
            b_tile[i % (BLOCK_K / 4u) * B_STRIDE + c / STRIP * STRIP + c % 4u * 16u + c % STRIP / 4u] = value;
        } else {
            let c = i % (BLOCK_N / 4u) * 4u;
            let k = k0 + i / (BLOCK_N / 4u);
            if (column + c < params.n && k < k_end) {
                value = unpack_b(b[(k * params.n + column + c) / 4u]);
            }
            b_tile[i] = value;
        }
    }
}

// The row of the tile that an invocation's i-th row is.
fn tile_row(i: u32, y: u32) -> u32 {
    return select((i / 4u * 16u + y) * 4u + i % 4u, i * 16u + y, A_ALONG_K);
}

// Four rows of A, each over k = 4 q .. 4 q + 3.
fn a_fragment(block: u32, q: u32, y: u32) -> mat4x4<f32> {
    if (A_ALONG_K) {
        let at = q * A_STRIDE + block * 64u + y;
        return mat4x4<f32>(a_tile[at], a_tile[at + 16u], a_tile[at + 32u], a_tile[at + 48u]);
    }
    let at = 4u * q * A_STRIDE + block * 16u + y;
    return transpose(mat4x4<f32>(
        a_tile[at], a_tile[at + A_STRIDE], a_tile[at + 2u * A_STRIDE], a_tile[at + 3u * A_STRIDE],
    ));
}

// Rows k = 4 q .. 4 q + 3 of B, each over four columns of a strip.
fn b_fragment(strip: u32, q: u32, x: u32) -> mat4x4<f32> {
    if (B_ALONG_K) {
        let at = q * B_STRIDE + strip * STRIP + x;
        return transpose(mat4x4<f32>(b_tile[at], b_tile[at + 16u], b_tile[at + 32u], b_tile[at + 48u]));
    }
    let at = 4u * q * B_STRIDE + strip * (STRIP / 4u) + x;
    return mat4x4<f32>(b_tile[at], b_tile[at + B_STRIDE], b_tile[at + 2u * B_STRIDE], b_tile[at + 3u * B_STRIDE]);
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let number = linear_workgroup(workgroup, workgroups);
    if (number >= params.tiles) {
        return;
    }
    let tiles_n = (params.n + BLOCK_N - 1u) / BLOCK_N;
    let tile = params.first_tile + number;
    let row = tile / tiles_n * BLOCK_M;
    let column = tile % tiles_n * BLOCK_N;
    let x = invocation % 16u;
    let y = invocation / 16u;
    let k_begin = workgroup.z * params.slice;
    let k_end = min(k_begin + params.slice, params.k);

    var sum: array<array<vec4<f32>, HALVES>, ROWS>;
    for (var k0 = k_begin; k0 < k_end; k0 += BLOCK_K) {
        load_a(row, k0, k_end, invocation);
        load_b(column, k0, k_end, invocation);
        workgroupBarrier();
        // Summed by itself and then added: the rounding errors of a long k grow with its steps, not with k.
        var part: array<array<vec4<f32>, HALVES>, ROWS>;
        for (var q = 0u; q < BLOCK_K / 4u; q++) {
            #for h in 0..HALVES
            let b_rows$h = b_fragment($hu, q, x);
            #end
            #for block in 0..ROW_BLOCKS
            {
                let a_rows = a_fragment($blocku, q, y);
                #for h in 0..HALVES
                #for i in 0..4
                #for k in 0..4
                part[4 * $block + $i][$h] = fma(vec4<f32>(a_rows[$i][$k]), b_rows$h[$k], part[4 * $block + $i][$h]);
                #end
                #end
                #end
            }
            #end
        }
        #for block in 0..ROW_BLOCKS
        #for i in 0..4
        #for h in 0..HALVES
        sum[4 * $block + $i][$h] += part[4 * $block + $i][$h];
        #end
        #end
        #end
        workgroupBarrier();
    }

    let c = column_of(column + x * 4u);
    if (c < params.n) {
        #for block in 0..ROW_BLOCKS
        #for i in 0..4
        {
            let r = row + tile_row(4u * $blocku + $iu, y);
            if (r < params.m) {
                var vectors: array<array<vec4<f32>, WIDE>, HALVES>;
                #for h in 0..HALVES
                vectors[$h][0] = sum[4 * $block + $i][$h];
                #end
                store(workgroup.z * params.m + r, c, vectors, fetch(r, c));
            }
        }
        #end
        #end
    }
}
