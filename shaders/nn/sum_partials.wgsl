// A weight gradient from its partial sums, in a fixed order. SPLIT invocations share four elements: each sums every
// SPLIT-th slice, and the first sums what they have.
//
// SPLIT: host constant, a power of two, no more than 256.

#import shared/grid

struct Params {
    slices: u32,
    columns: u32, // elements of the gradient / 4
}

@group(0) @binding(0) var<storage, read_write> partial: array<vec4<f32>>;  // [slices, elements]
@group(0) @binding(1) var<storage, read_write> d_weight: array<vec4<f32>>; // [elements]
@group(0) @binding(2) var<uniform> params: Params;

const WORKGROUP: u32 = 256u;
const COLUMNS: u32 = WORKGROUP / SPLIT;

var<workgroup> sums: array<vec4<f32>, WORKGROUP>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let column = linear_workgroup(workgroup, workgroups) * COLUMNS + invocation % COLUMNS;
    var sum = vec4<f32>(0.0);
    if (column < params.columns) {
        for (var slice = invocation / COLUMNS; slice < params.slices; slice += SPLIT) {
            sum += partial[slice * params.columns + column];
        }
    }
    sums[invocation] = sum;
    workgroupBarrier();
    if (invocation < COLUMNS && column < params.columns) {
        for (var part = 1u; part < SPLIT; part++) {
            sum += sums[part * COLUMNS + invocation];
        }
        d_weight[column] = sum;
    }
}
