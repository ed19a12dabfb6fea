// The sum of all that is infinite or NaN in a column of the values of keys `first` to `last`, for the forward kernels with
// cooperative matrices: v and params are theirs.
fn non_finite_values(kv_base: u32, first: u32, last: u32, column: u32) -> vec4<f32> {
    var sum = vec4<f32>(0.0);
    for (var key = first; key <= last; key++) {
        let load = v[(kv_base + key * params.kv_token_stride) * LOADS + column / LOAD_VECTORS];
        sum += unpack_elem(vector_of_load(load ^ finite_load(load), column % LOAD_VECTORS));
    }
    return sum;
}
