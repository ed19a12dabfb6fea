// shared/row_norms where every subgroup has whole row groups, as in shared/group_reduce_subgroup. Walks over long windows
// are a tenth faster for it: no subgroup waits for another.

fn row_norms(own: vec4<f32>, invocation: u32, buffer: u32) -> vec4<f32> {
    var norms = own;
    for (var distance = 1u; distance < LOADS; distance <<= 1u) {
        norms += subgroupShuffleXor(norms, distance);
    }
    return norms;
}
