// The norm of the gradient from the sums of squares, by one workgroup.

#import shared/row_reduce

struct Params {
    groups: u32,
}

@group(0) @binding(0) var<storage, read_write> squares: array<f32>; // [groups]
@group(0) @binding(1) var<storage, read_write> norm: array<f32>;    // [1]
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) invocation: u32) {
    var sum = 0.0;
    for (var at = invocation; at < params.groups; at += WORKGROUP) {
        sum += squares[at];
    }
    sum = row_sum(sum, invocation, 0u);
    if (invocation == 0u) {
        norm[0] = sqrt(sum);
    }
}
