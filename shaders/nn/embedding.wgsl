// Embedding: row t of x is the row of the weight that token id t names. One invocation moves 16 bytes.
//
// LOADS (of 16 bytes in a row): host constant.

#import shared/grid

struct Params {
    rows: u32, // T
    vocab: u32,
}

@group(0) @binding(0) var<storage, read> ids: array<u32>;           // [T]
@group(0) @binding(1) var<storage, read> weight: array<wide>;       // [vocab, width]
@group(0) @binding(2) var<storage, read_write> x: array<wide>;      // [T, width]
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let at = linear_workgroup(workgroup, workgroups) * 256u + invocation;
    if (at >= params.rows * LOADS) {
        return;
    }
    let id = min(ids[at / LOADS], params.vocab - 1u);
    x[at] = weight[id * LOADS + at % LOADS];
}
