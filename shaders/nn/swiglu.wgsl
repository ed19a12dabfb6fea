// SwiGLU: y = silu(gate) up with silu(x) = x sigmoid(x); gate and up are linear maps of the same rows, by one GEMM.

#import shared/sigmoid

@group(0) @binding(3) var<storage, read_write> gate_up: array<c4>; // [T, (gate: hidden | up: hidden)]
@group(0) @binding(4) var<storage, read_write> y: array<c4>;       // [T, hidden]

fn store(row: u32, column: u32, sums: array<vec4<f32>, HALVES>) {
    let gate = sums[0];
    let up = sums[HALVES - 1u];
    let at = (row * 2u * HALF + column) / 4u;
    gate_up[at] = pack_c(gate);
    gate_up[at + HALF / 4u] = pack_c(up);
    y[(row * HALF + column) / 4u] = pack_c(gate * sigmoid(gate) * up);
}
