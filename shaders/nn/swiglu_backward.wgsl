// Backward of SwiGLU: with s = sigmoid(gate), d_gate = dy up s (1 + gate (1 - s)) and d_up = dy gate s.

#import shared/grid
#import shared/sigmoid

struct Params {
    columns: u32, // elements / 4
}

@group(0) @binding(0) var<storage, read> gate: array<elem4>;          // [T, hidden]
@group(0) @binding(1) var<storage, read> up: array<elem4>;            // [T, hidden]
@group(0) @binding(2) var<storage, read> d_y: array<elem4>;           // [T, hidden]
@group(0) @binding(3) var<storage, read_write> d_gate: array<elem4>;  // [T, hidden]
@group(0) @binding(4) var<storage, read_write> d_up: array<elem4>;    // [T, hidden]
@group(0) @binding(5) var<uniform> params: Params;

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
    let dy = unpack_elem(d_y[at]);
    let s = sigmoid(x);
    d_gate[at] = pack_elem(dy * unpack_elem(up[at]) * s * (1.0 + x * (1.0 - s)));
    d_up[at] = pack_elem(dy * x * s);
}
