// Backward of SwiGLU, from the product that gives dy: with s = sigmoid(gate), d_gate = dy up s (1 + gate (1 - s)) and
// d_up = dy gate s. And y once more, which the gradient of the map that takes it needs.

#import shared/sigmoid

@group(0) @binding(3) var<storage, read> gate_up: array<c4>;         // [T, (gate: hidden | up: hidden)]
@group(0) @binding(4) var<storage, read_write> d_gate_up: array<c4>; // [T, (gate: hidden | up: hidden)]
@group(0) @binding(5) var<storage, read_write> y: array<c4>;         // [T, hidden]

fn store(row: u32, column: u32, sums: array<vec4<f32>, HALVES>) {
    let d_y = sums[0];
    let at = (row * 2u * params.n + column) / 4u;
    let gate = unpack_c(gate_up[at]);
    let up = unpack_c(gate_up[at + params.n / 4u]);
    let s = sigmoid(gate);
    d_gate_up[at] = pack_c(d_y * up * s * (1.0 + gate * (1.0 - s)));
    d_gate_up[at + params.n / 4u] = pack_c(d_y * gate * s);
    y[(row * params.n + column) / 4u] = pack_c(gate * s * up);
}
