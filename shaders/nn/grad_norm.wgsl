// Sums of squares of a part of the gradient per workgroup, the first stage of its norm.

#import shared/grid
#import shared/row_reduce

struct Params {
    columns: u32, // elements / 4
    groups: u32,  // workgroups
}

@group(0) @binding(0) var<storage, read> gradient: array<vec4<f32>>; // [elements]
@group(0) @binding(1) var<storage, read_write> squares: array<f32>;  // [groups]
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) invocation: u32) {
    var sum = 0.0;
    for (var at = workgroup.x * WORKGROUP + invocation; at < params.columns; at += params.groups * WORKGROUP) {
        sum += dot(gradient[at], gradient[at]);
    }
    sum = row_sum(sum, invocation, 0u);
    if (invocation == 0u) {
        squares[workgroup.x] = sum;
    }
}
