// As `linear`, added to a tensor of the same shape: the residual stream, or another gradient of the same inputs.

#import shared/gemm_coop

@group(0) @binding(3) var<storage, read_write> add: array<c4>; // [T, outputs] or [T, inputs]
@group(0) @binding(4) var<storage, read_write> c: array<c4>;   // as `add`

fn store(at: u32, sum: vec4<f32>) {
    c[at] = pack_c(unpack_c(add[at]) + sum);
}
