// The gradient of a linear map's weight, dW = dy^T x, by slices of the tokens: there are few tiles and many tokens.

#import shared/fetch_nothing

@group(0) @binding(3) var<storage, read_write> partial: array<wide>; // [slices, outputs, inputs]

fn store(row: u32, column: u32, sums: array<array<vec4<f32>, WIDE>, HALVES>, fetched: Fetched) {
    partial[(row * params.n + column) / COLUMNS] = pack_wide(sums[0]);
}
