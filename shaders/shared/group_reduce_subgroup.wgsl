// shared/group_reduce where every subgroup has whole groups: LANES is a power of two, and no more than a subgroup's
// invocations, which are neighbours by local index, as the kernels with matrices take for granted too. Both partners of an
// exchange add the same two numbers, so all of a group get the same bits.

fn group_max(value: vec4<f32>, invocation: u32) -> vec4<f32> {
    var largest = value;
    for (var distance = 1u; distance < LANES; distance <<= 1u) {
        largest = max(largest, subgroupShuffleXor(largest, distance));
    }
    return largest;
}

fn group_sum(value: vec4<f32>, invocation: u32) -> vec4<f32> {
    var sum = value;
    for (var distance = 1u; distance < LANES; distance <<= 1u) {
        sum += subgroupShuffleXor(sum, distance);
    }
    return sum;
}
