// exp2 and log2 that give NaN for NaN, and minus infinity as the logarithm of zero, which WGSL leaves open (SwiftShader
// gives numbers).

fn is_nan(x: vec4<f32>) -> vec4<bool> {
    return (bitcast<vec4<u32>>(x) & vec4<u32>(0x7fffffffu)) > vec4<u32>(0x7f800000u);
}

fn exp2_or_nan(x: vec4<f32>) -> vec4<f32> {
    return select(exp2(x), x, is_nan(x));
}

fn log2_or_nan(x: vec4<f32>) -> vec4<f32> {
    return select(select(log2(x), vec4<f32>(-1.0) / x, x == vec4<f32>(0.0)), x, is_nan(x));
}
