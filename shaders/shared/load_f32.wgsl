// Four f32 in a load of 16 bytes; the functions of shared/load_f16.

fn vector_of_load(load: vec4<u32>, vector: u32) -> elem4 {
    return bitcast<vec4<f32>>(load);
}

// A load with zero in the place of infinity and NaN, whose exponents are all ones.
fn finite_load(load: vec4<u32>) -> vec4<u32> {
    let exponent = vec4<u32>(0x7f800000u);
    return select(load, vec4<u32>(0u), (load & exponent) == exponent);
}

fn is_non_finite(vector: elem4) -> vec4<bool> {
    return (bitcast<vec4<u32>>(unpack_elem(vector)) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u);
}

fn finite_vector(vector: elem4) -> elem4 {
    return select(vector, elem4(), is_non_finite(vector));
}
