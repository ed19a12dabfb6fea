// Eight f16 in a load of 16 bytes, for kernels that stage factors of cooperative matrices (`Kernel::matrices`): moved as
// they are, in two vectors of four. shared/load_f32 has the same functions for four f32.

fn vector_of_load(load: vec4<u32>, vector: u32) -> elem4 {
    let pairs = select(load.xy, load.zw, vector == 1u);
    return pack_elem(vec4<f32>(unpack2x16float(pairs.x), unpack2x16float(pairs.y)));
}

// A load with zero in the place of infinity and NaN, whose exponents are all ones.
fn finite_load(load: vec4<u32>) -> vec4<u32> {
    let non_finite = (((load & vec4<u32>(0x7c007c00u)) + 0x04000400u) >> vec4<u32>(15u)) & vec4<u32>(0x00010001u);
    return load & ~(non_finite * 0xffffu);
}

fn is_non_finite(vector: elem4) -> vec4<bool> {
    return (bitcast<vec4<u32>>(unpack_elem(vector)) & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u);
}

fn finite_vector(vector: elem4) -> elem4 {
    return select(vector, elem4(), is_non_finite(vector));
}
