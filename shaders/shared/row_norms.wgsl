// The squared norms of four tokens of a row group of shared/rows, from what its invocations have of them: the group's first
// invocation gets them. shared/row_norms_subgroup has the same function without memory and barriers. Call from uniform
// control flow, with `buffer` 0 and 1 in turns: one barrier per call is then enough.

var<workgroup> partial_norms: array<vec4<f32>, 512>;

fn row_norms(own: vec4<f32>, invocation: u32, buffer: u32) -> vec4<f32> {
    let at = buffer * 256u + invocation;
    partial_norms[at] = own;
    workgroupBarrier();
    var norms = own;
    if (invocation % LOADS == 0u && invocation / LOADS < ROWS) {
        for (var lane = 1u; lane < LOADS; lane++) {
            norms += partial_norms[at + lane];
        }
    }
    return norms;
}
