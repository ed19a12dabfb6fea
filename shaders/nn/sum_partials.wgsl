// A weight gradient from its partial sums, slice by slice in order. One invocation sums four elements.

#import shared/grid

struct Params {
    slices: u32,
    columns: u32, // elements of the gradient / 4
}

@group(0) @binding(0) var<storage, read_write> partial: array<vec4<f32>>;  // [slices, elements]
@group(0) @binding(1) var<storage, read_write> d_weight: array<vec4<f32>>; // [elements]
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let column = linear_workgroup(workgroup, workgroups) * 256u + invocation;
    if (column >= params.columns) {
        return;
    }
    var sum = vec4<f32>(0.0);
    for (var slice = 0u; slice < params.slices; slice++) {
        sum += partial[slice * params.columns + column];
    }
    d_weight[column] = sum;
}
