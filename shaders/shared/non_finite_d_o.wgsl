// The sum of all that is infinite or NaN in a column of d_o, over queries `first` to before `end` of a kv head's group, for
// the kernels of dk and dv with cooperative matrices: d_o and params are theirs.
fn non_finite_d_o(batch_head: vec2<u32>, first: u32, end: u32, column: u32) -> vec4<f32> {
    var sum = vec4<f32>(0.0);
    let group_size = params.heads / params.kv_heads;
    for (var head = batch_head.y * group_size; head < (batch_head.y + 1u) * group_size; head++) {
        let base = batch_head.x * params.tokens * params.heads + head * params.head_stride;
        for (var query = first; query < end; query++) {
            let load = d_o[(base + query * params.token_stride) * LOADS + column / LOAD_VECTORS];
            sum += unpack_elem(vector_of_load(load ^ finite_load(load), column % LOAD_VECTORS));
        }
    }
    return sum;
}
