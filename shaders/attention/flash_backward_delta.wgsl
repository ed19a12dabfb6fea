// The first step of attention's backward (spec section 8): delta = rowsum(o * d_o), which is the part of d(softmax)
// that all keys of a row share. It goes beside the row's lse, for one load of both: on an H100 dk and dv take 1 to 4 %
// less than with two.
//
// LANES invocations share a row, in loads of 16 bytes. HEAD_DIM, LANES: host constants.

#import shared/grid
#import shared/row_reduce

struct Params {
    tokens: u32, // S
    heads: u32,
    token_stride: u32,
    head_stride: u32,
    rows: u32, // B * H * S
}

@group(0) @binding(0) var<storage, read> o: array<wide>;          // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(1) var<storage, read> d_o: array<wide>;        // as o
@group(0) @binding(2) var<storage, read> lse: array<f32>;         // [B, H, S]
@group(0) @binding(3) var<storage, read_write> lse_delta: array<vec2<f32>>; // [B, H, S]
@group(0) @binding(4) var<uniform> params: Params;

const LOADS: u32 = HEAD_DIM / (4u * WIDE);
const ROWS: u32 = WORKGROUP / LANES;

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    // Rows count as they lie in memory.
    let row = linear_workgroup(workgroup, workgroups) * ROWS + invocation / LANES;
    var products = vec4<f32>(0.0);
    if (row < params.rows) {
        for (var load = invocation % LANES; load < LOADS; load += LANES) {
            let x = unpack_wide(o[row * LOADS + load]);
            let y = unpack_wide(d_o[row * LOADS + load]);
            #for w in 0..WIDE
            products = fma(x[$w], y[$w], products);
            #end
        }
    }
    let sum = row_sum(products.x + products.y + products.z + products.w, invocation, 0u);
    if (row < params.rows && invocation % LANES == 0u) {
        let token = row / params.token_stride % params.tokens;
        let head = row / params.head_stride % params.heads;
        let batch = row / (params.tokens * params.heads);
        let at = (batch * params.heads + head) * params.tokens + token;
        lse_delta[at] = vec2<f32>(lse[at], sum);
    }
}
