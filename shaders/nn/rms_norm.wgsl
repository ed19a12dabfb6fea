// RMSNorm: y = x r w with r = 1 / sqrt(mean(x^2) + epsilon), row by row. LANES invocations share a row.
//
// COLUMNS (width / 4), LANES, PER_LANE: host constants; lane l has the columns l, l + LANES, ...

#import shared/grid
#import shared/row_reduce

struct Params {
    rows: u32, // T
    epsilon: f32,
}

@group(0) @binding(0) var<storage, read> x: array<elem4>;                // [T, width]
@group(0) @binding(1) var<storage, read> weight: array<elem4>;           // [width]
@group(0) @binding(2) var<storage, read_write> y: array<elem4>;          // [T, width]
@group(0) @binding(3) var<storage, read_write> inverse_rms: array<f32>;  // [T]
@group(0) @binding(4) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let row = linear_workgroup(workgroup, workgroups) * (WORKGROUP / LANES) + invocation / LANES;
    let lane = invocation % LANES;
    let live = row < params.rows;
    var values: array<vec4<f32>, PER_LANE>;
    var squares = 0.0;
    #for i in 0..PER_LANE
    if (live && lane + $iu * LANES < COLUMNS) {
        values[$i] = unpack_elem(x[row * COLUMNS + lane + $iu * LANES]);
        squares += dot(values[$i], values[$i]);
    }
    #end
    let mean = row_sum(squares, invocation, 0u) / f32(4u * COLUMNS);
    let inverse = 1.0 / sqrt(mean + params.epsilon);
    #for i in 0..PER_LANE
    if (live && lane + $iu * LANES < COLUMNS) {
        let scale = inverse * unpack_elem(weight[lane + $iu * LANES]);
        y[row * COLUMNS + lane + $iu * LANES] = pack_elem(values[$i] * scale);
    }
    #end
    if (live && lane == 0u) {
        inverse_rms[row] = inverse;
    }
}
