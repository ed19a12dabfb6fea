// The mean of the rows' losses, by one workgroup.

#import shared/row_reduce

struct Params {
    rows: u32, // T
}

@group(0) @binding(0) var<storage, read_write> row_loss: array<f32>; // [T]
@group(0) @binding(1) var<storage, read_write> loss: array<f32>;     // [1]
@group(0) @binding(2) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) invocation: u32) {
    var sum = 0.0;
    for (var row = invocation; row < params.rows; row += WORKGROUP) {
        sum += row_loss[row];
    }
    sum = row_sum(sum, invocation, 0u);
    if (invocation == 0u) {
        loss[0] = sum / f32(params.rows);
    }
}
