// The first step of attention's backward (spec section 8): delta = rowsum(o * d_o), which is the part of d(softmax)
// that all keys of a row share.
//
// LANES invocations share a row and sum through workgroup memory. HEAD_DIM: host constant.

#import shared/grid

struct Params {
    tokens: u32, // S
    heads: u32,
    token_stride: u32,
    head_stride: u32,
    rows: u32, // B * H * S
}

@group(0) @binding(0) var<storage, read> o: array<elem4>;         // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(1) var<storage, read> d_o: array<elem4>;       // as o
@group(0) @binding(2) var<storage, read_write> delta: array<f32>; // [B, H, S]
@group(0) @binding(3) var<uniform> params: Params;

const WORKGROUP: u32 = 256u;
const COLUMNS: u32 = HEAD_DIM / 4u;
const LANES: u32 = 8u;
const ROWS: u32 = WORKGROUP / LANES;

var<workgroup> partial_sums: array<f32, WORKGROUP>;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    // Rows count as they lie in memory.
    let row = linear_workgroup(workgroup, workgroups) * ROWS + invocation / LANES;
    var sum = 0.0;
    if (row < params.rows) {
        for (var column = invocation % LANES; column < COLUMNS; column += LANES) {
            let at = row * COLUMNS + column;
            sum += dot(unpack_elem(o[at]), unpack_elem(d_o[at]));
        }
    }
    partial_sums[invocation] = sum;
    workgroupBarrier();
    if (row < params.rows && invocation % LANES == 0u) {
        sum = 0.0;
        for (var lane = 0u; lane < LANES; lane++) {
            sum += partial_sums[invocation + lane];
        }
        let token = row / params.token_stride % params.tokens;
        let head = row / params.head_stride % params.heads;
        let batch = row / (params.tokens * params.heads);
        delta[(batch * params.heads + head) * params.tokens + token] = sum;
    }
}
