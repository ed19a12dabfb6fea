// SwiGLU: y = silu(gate) up with silu(x) = x sigmoid(x). One invocation computes four elements.

#import shared/grid
#import shared/sigmoid

struct Params {
    columns: u32, // elements / 4
}

@group(0) @binding(0) var<storage, read> gate: array<elem4>;     // [T, hidden]
@group(0) @binding(1) var<storage, read> up: array<elem4>;       // [T, hidden]
@group(0) @binding(2) var<storage, read_write> y: array<elem4>;  // [T, hidden]
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let at = linear_workgroup(workgroup, workgroups) * 256u + invocation;
    if (at >= params.columns) {
        return;
    }
    let x = unpack_elem(gate[at]);
    y[at] = pack_elem(x * sigmoid(x) * unpack_elem(up[at]));
}
