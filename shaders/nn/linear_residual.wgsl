// As `linear`, added to the residual stream.

// Writable so that its loads stay where they are issued, as in shared/gemm_coop.
@group(0) @binding(3) var<storage, read_write> residual: array<wide>; // [T, outputs]
@group(0) @binding(4) var<storage, read_write> c: array<wide>;        // [T, outputs]

alias Fetched = wide;

fn fetch(row: u32, column: u32) -> Fetched {
    return residual[(row * params.n + column) / COLUMNS];
}

fn store(row: u32, column: u32, sums: array<array<vec4<f32>, WIDE>, HALVES>, fetched: Fetched) {
    let before = unpack_wide(fetched);
    var sum: array<vec4<f32>, WIDE>;
    #for w in 0..WIDE
    sum[$w] = before[$w] + sums[0][$w];
    #end
    c[(row * params.n + column) / COLUMNS] = pack_wide(sum);
}
