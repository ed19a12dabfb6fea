// Kernels with cooperative matrices stage zero in place of infinity and NaN where the mask crosses a tile. What a result
// lacks of these is zero, infinite or NaN; where it is zero the stored result keeps its bits, minus zero too. (Compared by
// `==`: naga's `!=` is false for NaN.)
fn with_lacking(stored: vec4<f32>, lacking: vec4<f32>) -> vec4<f32> {
    return select(stored + lacking, stored, lacking == vec4<f32>(0.0));
}
