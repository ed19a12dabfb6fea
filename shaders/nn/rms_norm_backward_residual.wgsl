// Backward of RMSNorm where x also goes on past the norm: the gradient of that way is added to dx.

#import shared/rms_norm_backward

@group(0) @binding(7) var<storage, read> d_residual: array<vec4<u32>>; // [T, width]

fn residual(at: u32) -> vec4<u32> {
    return d_residual[at];
}
