// The two products of a tile of queries and keys that every attention kernel is made of.
//
// A workgroup keeps KEPT_ROWS rows of one side (queries in the forward and for dq, keys for dk and dv) and streams over
// the other side in tiles of STREAMED_ROWS rows. Invocation (group, lane) holds the kept rows 4 group + i and the
// streamed rows lane + LANES j, for i and j in 0..4: the lanes of a group read the same kept rows (a broadcast) and
// neighbouring streamed rows (an odd stride, so no bank conflict). Its 4 x 4 part of a tile is an array over i of
// vectors over j.
//
// Host constants: HEAD_DIM, CHUNK, STAGES, STRIPS and SUMS, the product of the last two. The kernel declares KEPT_ROWS,
// STREAMED_ROWS, params.tokens, `load(tensor, at)` for four elements of a tensor as f32, and `attends(kept, streamed)`
// for the mask by token.

const COLUMNS: u32 = HEAD_DIM / 4u;
const LANES: u32 = STREAMED_ROWS / 4u;
const WORKGROUP: u32 = KEPT_ROWS / 4u * LANES;

// Columns of both sides are staged CHUNK at a time for the product of rows with rows.
const STRIDE: u32 = CHUNK | 1u;
const STREAMED_START: u32 = KEPT_ROWS * STRIDE;

// For the product of the tile with streamed rows, the tile itself comes first; behind it are staged STRIPS strips of
// LANES columns of the rows of STAGED_LANES lanes.
const STAGED_LANES: u32 = 8u;
const STAGED_COLUMNS: u32 = STRIPS * LANES;
const STAGED_START: u32 = KEPT_ROWS * LANES;

const TILE: u32 = max((KEPT_ROWS + STREAMED_ROWS) * STRIDE, STAGED_START + 4u * STAGED_LANES * STAGED_COLUMNS);
var<workgroup> tile: array<vec4<f32>, TILE>;

// Rows of one head of a tensor: token t is row `base + stride * t` of HEAD_DIM elements. The tile begins at token
// `first`.
struct Rows {
    tensor: u32,
    base: u32,
    stride: u32,
    first: u32,
}

// Four elements of a row of the tile; zero past the last token and the last column.
fn load_row(rows: Rows, row: u32, column: u32) -> vec4<f32> {
    let token = rows.first + row;
    if (token < params.tokens && column < COLUMNS) {
        return load(rows.tensor, (rows.base + rows.stride * token) * COLUMNS + column);
    }
    return vec4<f32>(0.0);
}

// The invocation's part of kept * streamed^T.
fn rows_by_rows(kept: Rows, streamed: Rows, invocation: u32) -> array<vec4<f32>, 4> {
    let kept_at = invocation / LANES * 4u * STRIDE;
    let streamed_at = STREAMED_START + invocation % LANES * STRIDE;
    var sums: array<vec4<f32>, 4>;
    for (var start = 0u; start < COLUMNS; start += CHUNK) {
        workgroupBarrier();
        for (var n = invocation; n < KEPT_ROWS * CHUNK; n += WORKGROUP) {
            tile[n / CHUNK * STRIDE + n % CHUNK] = load_row(kept, n / CHUNK, start + n % CHUNK);
        }
        for (var n = invocation; n < STREAMED_ROWS * CHUNK; n += WORKGROUP) {
            tile[STREAMED_START + n / CHUNK * STRIDE + n % CHUNK] = load_row(streamed, n / CHUNK, start + n % CHUNK);
        }
        workgroupBarrier();
        for (var column = 0u; column < CHUNK; column++) {
            #for i in 0..4
            let kept$i = tile[kept_at + $iu * STRIDE + column];
            let streamed$i = tile[streamed_at + $iu * LANES * STRIDE + column];
            #end
            #for c in 0..4
            let column$c = vec4<f32>(streamed0[$c], streamed1[$c], streamed2[$c], streamed3[$c]);
            #end
            #for i in 0..4
            #for c in 0..4
            sums[$i] += kept$i[$c] * column$c;
            #end
            #end
        }
    }
    return sums;
}

// The invocation's columns of results: of kept rows 4 group + i, columns lane + LANES strip.
alias Sums = array<vec4<f32>, 4u * SUMS>;

// Adds weights * streamed to the sums. Where the tile is crossed by the mask, products of masked pairs are left out and
// not only weighted with zero: a masked row may hold infinity or NaN.
fn add_weighted_rows(
    sums: ptr<function, Sums>,
    weights: array<vec4<f32>, 4>,
    first_kept: u32,
    streamed: Rows,
    crossed: bool,
    invocation: u32,
) {
    let group = invocation / LANES;
    let lane = invocation % LANES;
    let kept = first_kept + 4u * group;
    workgroupBarrier();
    #for i in 0..4
    tile[(4u * group + $iu) * LANES + lane] = weights[$i];
    #end
    #for stage in 0..STAGES
    for (var first_lane = 0u; first_lane < LANES; first_lane += STAGED_LANES) {
        if ($stageu + first_lane > 0u) {
            workgroupBarrier();
        }
        for (var n = invocation; n < 4u * STAGED_LANES * STAGED_COLUMNS; n += WORKGROUP) {
            // Staged rows count lanes fastest.
            let row = n / STAGED_COLUMNS;
            let streamed_row = first_lane + row % STAGED_LANES + row / STAGED_LANES * LANES;
            let column = $stageu * STAGED_COLUMNS + n % STAGED_COLUMNS;
            tile[STAGED_START + n] = load_row(streamed, streamed_row, column);
        }
        workgroupBarrier();
        if (crossed) {
            for (var row = 0u; row < 4u * STAGED_LANES; row++) {
                let streamed_lane = first_lane + row % STAGED_LANES;
                let j = row / STAGED_LANES;
                #for strip in 0..STRIPS
                let strip$strip = tile[STAGED_START + row * STAGED_COLUMNS + $stripu * LANES + lane];
                #end
                #for i in 0..4
                if (attends(kept + $iu, streamed.first + streamed_lane + LANES * j)) {
                    let weight = tile[(4u * group + $iu) * LANES + streamed_lane][j];
                    #for strip in 0..STRIPS
                    (*sums)[($stageu * STRIPS + $stripu) * 4u + $iu] += weight * strip$strip;
                    #end
                }
                #end
            }
        } else {
            for (var staged_lane = 0u; staged_lane < STAGED_LANES; staged_lane++) {
                #for i in 0..4
                let weights$i = tile[(4u * group + $iu) * LANES + first_lane + staged_lane];
                #end
                #for strip in 0..STRIPS
                {
                    let at = STAGED_START + staged_lane * STAGED_COLUMNS + $stripu * LANES + lane;
                    #for j in 0..4
                    let row$j = tile[at + $ju * STAGED_LANES * STAGED_COLUMNS];
                    #end
                    #for i in 0..4
                    #for j in 0..4
                    (*sums)[($stageu * STRIPS + $stripu) * 4u + $iu] += weights$i[$j] * row$j;
                    #end
                    #end
                }
                #end
            }
        }
    }
    #end
}
