// Backward of RMSNorm: with r = 1 / sqrt(mean(x^2) + epsilon) and g = dy w,
//
//     dx = r g - x r^3 mean(g x),    dw = sum over rows of dy x r.
//
// A workgroup walks one slice of the rows and keeps its sum of dw in registers; LANES invocations share a row. All that a
// row needs is loaded before its mean is known, and stays packed until then.
// COLUMNS (loads of 16 bytes in a row), LANES, PER_LANE: host constants; lane l has the columns l, l + LANES, ...
// The kernel declares `residual(at)`: what is added to dx, packed.

#import shared/grid
#import shared/row_reduce

struct Params {
    rows: u32,   // T
    slice: u32,  // rows of one workgroup, a multiple of GROUPS
    slices: u32,
}

@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;             // [T, width]
@group(0) @binding(1) var<storage, read> weight: array<vec4<u32>>;        // [width]
@group(0) @binding(2) var<storage, read> inverse_rms: array<f32>;         // [T]
@group(0) @binding(3) var<storage, read> d_y: array<vec4<u32>>;           // [T, width]
@group(0) @binding(4) var<storage, read_write> partial: array<vec4<f32>>; // [slices, width]
@group(0) @binding(5) var<uniform> params: Params;
@group(0) @binding(6) var<storage, read_write> d_x: array<vec4<u32>>;     // [T, width]

const GROUPS: u32 = WORKGROUP / LANES;

var<workgroup> group_sums: array<vec4<f32>, WORKGROUP>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let slice = linear_workgroup(workgroup, workgroups);
    if (slice >= params.slices) {
        return;
    }
    let lane = invocation % LANES;
    var d_weight: array<array<vec4<f32>, WIDE>, PER_LANE>;
    for (var step = 0u; step < params.slice / GROUPS; step++) {
        let row = slice * params.slice + step * GROUPS + invocation / LANES;
        let live = row < params.rows;
        var inverse = 0.0;
        if (live) {
            inverse = inverse_rms[row];
        }
        #for i in 0..PER_LANE
        var x$i = vec4<u32>(0u);
        var d_y$i = vec4<u32>(0u);
        var residual$i = vec4<u32>(0u);
        if (live && lane + $iu * LANES < COLUMNS) {
            let at = row * COLUMNS + lane + $iu * LANES;
            x$i = x[at];
            d_y$i = d_y[at];
            residual$i = residual(at);
        }
        #end
        var product = 0.0;
        #for i in 0..PER_LANE
        if (lane + $iu * LANES < COLUMNS) {
            let values = unpack_wide(x$i);
            let gradients = unpack_wide(d_y$i);
            let weights = unpack_wide(weight[lane + $iu * LANES]);
            #for w in 0..WIDE
            d_weight[$i][$w] += gradients[$w] * values[$w] * inverse;
            product += dot(gradients[$w] * weights[$w], values[$w]);
            #end
        }
        #end
        let mean = row_sum(product, invocation, step % 2u) / f32(4u * WIDE * COLUMNS);
        let along = inverse * inverse * mean;
        #for i in 0..PER_LANE
        if (live && lane + $iu * LANES < COLUMNS) {
            let values = unpack_wide(x$i);
            let gradients = unpack_wide(d_y$i);
            let weights = unpack_wide(weight[lane + $iu * LANES]);
            var sum = unpack_wide(residual$i);
            #for w in 0..WIDE
            sum[$w] += inverse * (gradients[$w] * weights[$w] - values[$w] * along);
            #end
            d_x[row * COLUMNS + lane + $iu * LANES] = pack_wide(sum);
        }
        #end
    }
    #for i in 0..PER_LANE
    #for w in 0..WIDE
    group_sums[invocation] = d_weight[$i][$w];
    workgroupBarrier();
    if (invocation < LANES && lane + $iu * LANES < COLUMNS) {
        var sum = vec4<f32>(0.0);
        for (var group = 0u; group < GROUPS; group++) {
            sum += group_sums[group * LANES + lane];
        }
        partial[(slice * COLUMNS + lane + $iu * LANES) * WIDE + $wu] = sum;
    }
    workgroupBarrier();
    #end
    #end
}
