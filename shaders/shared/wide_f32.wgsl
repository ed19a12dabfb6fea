// Four f32 in a load of 16 bytes; the functions of shared/wide_f16, with WIDE = 1.

fn unpack_wide(x: vec4<u32>) -> array<vec4<f32>, WIDE> {
    return array<vec4<f32>, WIDE>(bitcast<vec4<f32>>(x));
}

fn pack_wide(x: array<vec4<f32>, WIDE>) -> vec4<u32> {
    return bitcast<vec4<u32>>(x[0]);
}
