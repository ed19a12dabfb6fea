// Backward of RMSNorm.

#import shared/rms_norm_backward

fn residual(at: u32) -> vec4<u32> {
    return vec4<u32>(0u);
}
