// Backward of RMSNorm: with r = 1 / sqrt(mean(x^2) + epsilon) and g = dy w,
//
//     dx = r g - x r^3 mean(g x),    dw = sum over rows of dy x r.
//
// A workgroup walks one slice of the rows and keeps its sum of dw in registers; LANES invocations share a row.
// COLUMNS (width / 4), LANES, PER_LANE: host constants; lane l has the columns l, l + LANES, ...
// The kernel declares the bindings `d_x` and, where there is one, `d_residual`, and `store(at, value)`.

#import shared/grid
#import shared/row_reduce

struct Params {
    rows: u32,   // T
    slice: u32,  // rows of one workgroup, a multiple of GROUPS
    slices: u32,
}

@group(0) @binding(0) var<storage, read> x: array<elem4>;                 // [T, width]
@group(0) @binding(1) var<storage, read> weight: array<elem4>;            // [width]
@group(0) @binding(2) var<storage, read> inverse_rms: array<f32>;         // [T]
@group(0) @binding(3) var<storage, read> d_y: array<elem4>;               // [T, width]
@group(0) @binding(4) var<storage, read_write> partial: array<vec4<f32>>; // [slices, width]
@group(0) @binding(5) var<uniform> params: Params;

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
    var d_weight: array<vec4<f32>, PER_LANE>;
    for (var step = 0u; step < params.slice / GROUPS; step++) {
        let row = slice * params.slice + step * GROUPS + invocation / LANES;
        let live = row < params.rows;
        var values: array<vec4<f32>, PER_LANE>; // x
        var gradients: array<vec4<f32>, PER_LANE>; // dy
        var inverse = 0.0;
        if (live) {
            inverse = inverse_rms[row];
        }
        var product = 0.0;
        #for i in 0..PER_LANE
        if (live && lane + $iu * LANES < COLUMNS) {
            values[$i] = unpack_elem(x[row * COLUMNS + lane + $iu * LANES]);
            gradients[$i] = unpack_elem(d_y[row * COLUMNS + lane + $iu * LANES]);
            d_weight[$i] += gradients[$i] * values[$i] * inverse;
            gradients[$i] *= unpack_elem(weight[lane + $iu * LANES]);
            product += dot(gradients[$i], values[$i]);
        }
        #end
        let mean = row_sum(product, invocation, step % 2u) / f32(4u * COLUMNS);
        let along = inverse * inverse * mean;
        #for i in 0..PER_LANE
        if (live && lane + $iu * LANES < COLUMNS) {
            store(row * COLUMNS + lane + $iu * LANES, inverse * (gradients[$i] - values[$i] * along));
        }
        #end
    }
    #for i in 0..PER_LANE
    group_sums[invocation] = d_weight[$i];
    workgroupBarrier();
    if (invocation < LANES && lane + $iu * LANES < COLUMNS) {
        var sum = vec4<f32>(0.0);
        for (var group = 0u; group < GROUPS; group++) {
            sum += group_sums[group * LANES + lane];
        }
        partial[slice * COLUMNS + lane + $iu * LANES] = sum;
    }
    workgroupBarrier();
    #end
}
