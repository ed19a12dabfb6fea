// Backward of SwiGLU, from the product that gives dy: with s = sigmoid(gate), d_gate = dy up s (1 + gate (1 - s)) and
// d_up = dy gate s. And y once more, which the gradient of the map that takes it needs.

#import shared/sigmoid

// Writable so that its loads stay where they are issued, as in shared/gemm_coop.
@group(0) @binding(3) var<storage, read_write> gate_up: array<wide>;   // [T, (gate: hidden | up: hidden)]
@group(0) @binding(4) var<storage, read_write> d_gate_up: array<wide>; // [T, (gate: hidden | up: hidden)]
@group(0) @binding(5) var<storage, read_write> y: array<wide>;         // [T, hidden]

struct Fetched {
    gate: wide,
    up: wide,
}

fn fetch(row: u32, column: u32) -> Fetched {
    let at = (row * 2u * params.n + column) / COLUMNS;
    return Fetched(gate_up[at], gate_up[at + params.n / COLUMNS]);
}

fn store(row: u32, column: u32, sums: array<array<vec4<f32>, WIDE>, HALVES>, fetched: Fetched) {
    let gates = unpack_wide(fetched.gate);
    let ups = unpack_wide(fetched.up);
    var d_gate: array<vec4<f32>, WIDE>;
    var d_up: array<vec4<f32>, WIDE>;
    var product: array<vec4<f32>, WIDE>;
    #for w in 0..WIDE
    {
        let d_y = sums[0][$w];
        let gate = gates[$w];
        let up = ups[$w];
        let s = sigmoid(gate);
        d_gate[$w] = d_y * up * s * (1.0 + gate * (1.0 - s));
        d_up[$w] = d_y * gate * s;
        product[$w] = gate * s * up;
    }
    #end
    let at = (row * 2u * params.n + column) / COLUMNS;
    d_gate_up[at] = pack_wide(d_gate);
    d_gate_up[at + params.n / COLUMNS] = pack_wide(d_up);
    y[(row * params.n + column) / COLUMNS] = pack_wide(product);
}
