// As `linear`, added to the residual stream.

@group(0) @binding(3) var<storage, read_write> residual: array<c4>; // [T, outputs]
@group(0) @binding(4) var<storage, read_write> c: array<c4>;        // [T, outputs]

fn store(row: u32, column: u32, sums: array<vec4<f32>, HALVES>) {
    let at = (row * params.n + column) / 4u;
    c[at] = pack_c(unpack_c(residual[at]) + sums[0]);
}
