// A linear map's outputs, y = x W^T, or the gradient of its inputs, dx = dy W: rows of the model's tokens by GEMM.

#import shared/gemm_coop

@group(0) @binding(3) var<storage, read_write> c: array<c4>; // [T, outputs] or [T, inputs]

fn store(at: u32, sum: vec4<f32>) {
    c[at] = pack_c(sum);
}
