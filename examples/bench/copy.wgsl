// Copies 16 bytes an invocation: what a kernel that only moves memory can reach.

struct Params { chunks: u32, unused_1: u32, unused_2: u32, unused_3: u32 }

@group(0) @binding(0) var<storage, read> source: array<vec4<u32>>;
@group(0) @binding(1) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read_write> target_chunks: array<vec4<u32>>;

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.y * groups.x * 256u + id.x;
    if i < params.chunks {
        target_chunks[i] = source[i];
    }
}
