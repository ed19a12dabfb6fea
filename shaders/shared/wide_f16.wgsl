// Eight f16 in a load of 16 bytes, for kernels that are bound by memory (`Kernel::wide`): WIDE = 2 vectors of four. It
// asks nothing of the device; drivers turn the unpacking into conversions. shared/wide_f32 has the same for four f32.

alias wide = vec4<u32>;

fn unpack_wide(x: wide) -> array<vec4<f32>, WIDE> {
    return array<vec4<f32>, WIDE>(
        vec4<f32>(unpack2x16float(x.x), unpack2x16float(x.y)),
        vec4<f32>(unpack2x16float(x.z), unpack2x16float(x.w)),
    );
}

fn pack_wide(x: array<vec4<f32>, WIDE>) -> wide {
    return vec4<u32>(
        pack2x16float(x[0].xy), pack2x16float(x[0].zw),
        pack2x16float(x[1].xy), pack2x16float(x[1].zw),
    );
}
