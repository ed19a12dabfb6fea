// Cross-entropy of each row of logits against its target: log(sum(exp(logits))) - logits[target], in nats; its gradient
// is softmax(logits) - onehot(target). LANES invocations share a row.
//
// COLUMNS (vocab / 4), LANES: host constants; lane l has the columns l, l + LANES, ...
// The kernel declares its output of gradients, if it has one, and `store(at, gradient)`.

#import shared/grid
#import shared/row_reduce

struct Params {
    rows: u32, // T
    scale: f32, // of the gradient
}

@group(0) @binding(0) var<storage, read> logits: array<elem4>;        // [T, vocab]
@group(0) @binding(1) var<storage, read> targets: array<u32>;         // [T]
@group(0) @binding(2) var<storage, read_write> row_loss: array<f32>;  // [T]
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let row = linear_workgroup(workgroup, workgroups) * (WORKGROUP / LANES) + invocation / LANES;
    let lane = invocation % LANES;
    let live = row < params.rows;
    // The columns of a lane in a row that does not exist are none.
    let end = select(0u, COLUMNS, live);
    let first = row * COLUMNS;

    var largest = -3.4028234e38;
    for (var column = lane; column < end; column += LANES) {
        let value = unpack_elem(logits[first + column]);
        largest = max(largest, max(max(value.x, value.y), max(value.z, value.w)));
    }
    largest = row_max(largest, invocation, 0u);
    var sum = 0.0;
    for (var column = lane; column < end; column += LANES) {
        sum += dot(exp(unpack_elem(logits[first + column]) - largest), vec4<f32>(1.0));
    }
    sum = row_sum(sum, invocation, 1u);
    if (!live) {
        return;
    }
    let goal = min(targets[row], 4u * COLUMNS - 1u);
    for (var column = lane; column < end; column += LANES) {
        let onehot = vec4<f32>(vec4<u32>(goal) == 4u * column + vec4<u32>(0u, 1u, 2u, 3u));
        let softmax = exp(unpack_elem(logits[first + column]) - largest) / sum;
        store(first + column, (softmax - onehot) * params.scale);
    }
    if (lane == 0u) {
        let value = unpack_elem(logits[first + goal / 4u]);
        row_loss[row] = log(sum) + (largest - value[goal % 4u]);
    }
}
