// Backward of RMSNorm where x also goes on past the norm: the gradient of that way is added to dx.

#import shared/rms_norm_backward

@group(0) @binding(6) var<storage, read> d_residual: array<elem4>; // [T, width]
@group(0) @binding(7) var<storage, read_write> d_x: array<elem4>;  // [T, width]

fn store(at: u32, value: vec4<f32>) {
    d_x[at] = pack_elem(unpack_elem(d_residual[at]) + value);
}
