// Embedding: row t of x is the row of the weight that token id t names. One invocation moves four elements.
//
// COLUMNS (width / 4): host constant.

#import shared/grid

struct Params {
    rows: u32, // T
    vocab: u32,
}

@group(0) @binding(0) var<storage, read> ids: array<u32>;           // [T]
@group(0) @binding(1) var<storage, read> weight: array<elem4>;      // [vocab, width]
@group(0) @binding(2) var<storage, read_write> x: array<elem4>;     // [T, width]
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let at = linear_workgroup(workgroup, workgroups) * 256u + invocation;
    if (at >= params.rows * COLUMNS) {
        return;
    }
    let id = min(ids[at / COLUMNS], params.vocab - 1u);
    x[at] = weight[id * COLUMNS + at % COLUMNS];
}
