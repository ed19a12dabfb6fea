// A linear map's outputs, y = x W^T, or the gradient of its inputs, dx = dy W: rows of the model's tokens by GEMM.

#import shared/fetch_nothing

@group(0) @binding(3) var<storage, read_write> c: array<wide>; // [T, outputs] or [T, inputs]

fn store(row: u32, column: u32, sums: array<array<vec4<f32>, WIDE>, HALVES>, fetched: Fetched) {
    c[(row * params.n + column) / COLUMNS] = pack_wide(sums[0]);
}
