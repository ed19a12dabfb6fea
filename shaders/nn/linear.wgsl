// A linear map's outputs, y = x W^T, or the gradient of its inputs, dx = dy W: rows of the model's tokens by GEMM.

@group(0) @binding(3) var<storage, read_write> c: array<c4>; // [T, outputs] or [T, inputs]

fn store(row: u32, column: u32, sums: array<vec4<f32>, HALVES>) {
    c[(row * params.n + column) / 4u] = pack_c(sums[0]);
}
