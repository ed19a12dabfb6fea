// SwiGLU: y = silu(gate) up with silu(x) = x sigmoid(x); gate and up are linear maps of the same rows, by one GEMM.

#import shared/fetch_nothing
#import shared/sigmoid

@group(0) @binding(3) var<storage, read_write> gate_up: array<wide>; // [T, (gate: hidden | up: hidden)]
@group(0) @binding(4) var<storage, read_write> y: array<wide>;       // [T, hidden]

fn store(row: u32, column: u32, sums: array<array<vec4<f32>, WIDE>, HALVES>, fetched: Fetched) {
    let gate = sums[0];
    let up = sums[HALVES - 1u];
    var product: array<vec4<f32>, WIDE>;
    #for w in 0..WIDE
    product[$w] = gate[$w] * sigmoid(gate[$w]) * up[$w];
    #end
    let at = (row * 2u * HALF + column) / COLUMNS;
    gate_up[at] = pack_wide(gate);
    gate_up[at + HALF / COLUMNS] = pack_wide(up);
    y[(row * HALF + column) / COLUMNS] = pack_wide(product);
}
