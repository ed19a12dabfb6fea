// Maxima and sums over the LANES invocations of a group of shared/tile, of four values each, through the memory of the
// tile; every invocation of the group gets the result. shared/group_reduce_subgroup has the same functions without memory
// and barriers. Call from uniform control flow.

fn group_max(value: vec4<f32>, invocation: u32) -> vec4<f32> {
    workgroupBarrier();
    tile[invocation] = value;
    workgroupBarrier();
    var largest = value;
    for (var lane = 0u; lane < LANES; lane++) {
        largest = max(largest, tile[invocation / LANES * LANES + lane]);
    }
    return largest;
}

fn group_sum(value: vec4<f32>, invocation: u32) -> vec4<f32> {
    workgroupBarrier();
    tile[invocation] = value;
    workgroupBarrier();
    var sum = vec4<f32>(0.0);
    for (var lane = 0u; lane < LANES; lane++) {
        sum += tile[invocation / LANES * LANES + lane];
    }
    return sum;
}
