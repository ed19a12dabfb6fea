// Backward of RMSNorm.

#import shared/rms_norm_backward

@group(0) @binding(6) var<storage, read_write> d_x: array<elem4>; // [T, width]

fn store(at: u32, value: vec4<f32>) {
    d_x[at] = pack_elem(value);
}
