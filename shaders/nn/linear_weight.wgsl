// The gradient of a linear map's weight, dW = dy^T x, by slices of the tokens: there are few tiles and many tokens.

@group(0) @binding(3) var<storage, read_write> partial: array<vec4<f32>>; // [slices, outputs, inputs]

fn store(row: u32, column: u32, sums: array<vec4<f32>, HALVES>) {
    partial[(row * params.n + column) / 4u] = sums[0];
}
