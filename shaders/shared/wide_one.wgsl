// One vector of four: the functions of shared/wide_f16 and shared/wide_f32 for lanes that have no more, with WIDE = 1, in
// the storage type of `c`.

alias wide = c4;

fn unpack_wide(x: wide) -> array<vec4<f32>, WIDE> {
    return array<vec4<f32>, WIDE>(unpack_c(x));
}

fn pack_wide(x: array<vec4<f32>, WIDE>) -> wide {
    return pack_c(x[0]);
}
