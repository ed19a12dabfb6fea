// The number of a workgroup in a grid that the host may have folded into two dimensions (`grid` in src/gpu/kernel.rs).
fn linear_workgroup(id: vec3<u32>, count: vec3<u32>) -> u32 {
    return id.y * count.x + id.x;
}
