// Standard normal numbers from a counter: as torch.randn gives them to the peers. Never zeros, which run faster.

struct Params { first: u32, words: u32, seed: u32, halves: u32 }

@group(0) @binding(0) var<storage, read_write> words: array<u32>;
@group(0) @binding(1) var<uniform> params: Params;

// The PCG hash.
fn hash(x: u32) -> u32 {
    let state = x * 747796405u + 2891336453u;
    let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
    return (word >> 22u) ^ word;
}

// In (0, 1].
fn uniform_number(x: u32) -> f32 {
    return (f32(hash(x) >> 8u) + 1.0) / 16777216.0;
}

@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let i = id.y * groups.x * 256u + id.x;
    if i >= params.words {
        return;
    }
    // The seed comes after a hash, so that no row of one tensor is a row of another.
    let counter = hash(params.first + i) + params.seed * 0x632be59bu;
    let radius = sqrt(-2.0 * log(uniform_number(counter)));
    let angle = 6.2831853 * uniform_number(counter ^ 0x9e3779b9u);
    let pair = radius * vec2<f32>(cos(angle), sin(angle));
    words[i] = select(bitcast<u32>(pair.x), pack2x16float(pair), params.halves == 1u);
}
