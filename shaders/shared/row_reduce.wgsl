// Sums and maxima over a group of LANES (host constant) neighbouring invocations of a workgroup of 256; every invocation
// of the group gets the result. The order is fixed, so that two runs give the same bits.
//
// Call from uniform control flow, with `buffer` 0 and 1 in turns: one barrier per call is then enough.

const WORKGROUP: u32 = 256u;

var<workgroup> lane_values: array<f32, 2u * WORKGROUP>;

fn row_sum(value: f32, invocation: u32, buffer: u32) -> f32 {
    lane_values[buffer * WORKGROUP + invocation] = value;
    workgroupBarrier();
    let first = buffer * WORKGROUP + invocation / LANES * LANES;
    var sum = 0.0;
    for (var i = 0u; i < LANES; i++) {
        sum += lane_values[first + i];
    }
    return sum;
}

fn row_max(value: f32, invocation: u32, buffer: u32) -> f32 {
    lane_values[buffer * WORKGROUP + invocation] = value;
    workgroupBarrier();
    let first = buffer * WORKGROUP + invocation / LANES * LANES;
    var largest = lane_values[first];
    for (var i = 1u; i < LANES; i++) {
        largest = max(largest, lane_values[first + i]);
    }
    return largest;
}
