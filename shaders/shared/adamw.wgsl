// AdamW (Loshchilov and Hutter, 2019) with clipping by the global norm, over all parameters at once. One invocation
// updates four. A step whose gradient has no finite norm changes nothing.
//
// BLOCK: host constant.
// The kernel declares the binding `weights`, if there is one, and `store(at, master)`.

#import shared/grid

struct Params {
    columns: u32, // elements / 4
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    clip_epsilon: f32,
}

// The host's `Schedule`.
struct Schedule {
    learning_rate: f32,
    correction1: f32, // 1 - beta1^step
    correction2: f32, // 1 - beta2^step
    weight_decay: f32,
    clip_norm: f32,
    inverse_loss_scale: f32,
    unused0: f32,
    unused1: f32,
}

@group(0) @binding(0) var<storage, read> schedule: Schedule;                 // [8]
@group(0) @binding(1) var<storage, read> norm: array<f32>;                   // [1]
@group(0) @binding(2) var<storage, read> decay: array<u32>;                  // [elements / BLOCK], 0 or 1
@group(0) @binding(3) var<storage, read> gradient: array<vec4<f32>>;         // [elements]
@group(0) @binding(4) var<storage, read_write> master: array<vec4<f32>>;     // [elements]
@group(0) @binding(5) var<storage, read_write> m: array<vec4<f32>>;          // [elements]
@group(0) @binding(6) var<storage, read_write> v: array<vec4<f32>>;          // [elements]
@group(0) @binding(7) var<uniform> params: Params;

// By the bits: a compiler may take for granted that numbers are finite.
fn is_finite(x: f32) -> bool {
    return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u;
}

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
    var weight = master[at];
    if (is_finite(norm[0])) {
        let length = norm[0] * schedule.inverse_loss_scale + params.clip_epsilon;
        var scale = schedule.inverse_loss_scale;
        if (length > schedule.clip_norm) {
            scale *= schedule.clip_norm / length;
        }
        let g = gradient[at] * scale;
        let first = params.beta1 * m[at] + (1.0 - params.beta1) * g;
        let second = params.beta2 * v[at] + (1.0 - params.beta2) * g * g;
        let step = (first / schedule.correction1) / (sqrt(second / schedule.correction2) + params.epsilon);
        weight -= schedule.learning_rate * (step + schedule.weight_decay * f32(decay[at * 4u / BLOCK]) * weight);
        m[at] = first;
        v[at] = second;
        master[at] = weight;
    }
    store(at, weight);
}
