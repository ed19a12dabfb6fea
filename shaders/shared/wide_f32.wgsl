// Four f32 in a load of 16 bytes; the functions of shared/wide_f16, with WIDE = 1.

alias wide = vec4<u32>;

fn unpack_wide(x: wide) -> array<vec4<f32>, WIDE> {
    return array<vec4<f32>, WIDE>(bitcast<vec4<f32>>(x));
}

fn pack_wide(x: array<vec4<f32>, WIDE>) -> wide {
    return bitcast<vec4<u32>>(x[0]);
}
