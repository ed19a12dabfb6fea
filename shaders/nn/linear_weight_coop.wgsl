// The gradient of a linear map's weight, dW = dy^T x, by slices of the tokens: there are few tiles and many tokens.

#import shared/gemm_coop

@group(0) @binding(3) var<storage, read_write> partial: array<vec4<f32>>; // [slices, outputs, inputs]

fn store(at: u32, sum: vec4<f32>) {
    partial[at] = sum;
}
