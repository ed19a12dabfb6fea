// As `linear`, added to a tensor of the same shape: the residual stream.

@group(0) @binding(3) var<storage, read_write> add: array<c4>; // [T, outputs] or [T, inputs]
@group(0) @binding(4) var<storage, read_write> c: array<c4>;   // as `add`

fn store(row: u32, column: u32, sums: array<vec4<f32>, HALVES>) {
    let at = (row * params.n + column) / 4u;
    c[at] = pack_c(unpack_c(add[at]) + sums[0]);
}
