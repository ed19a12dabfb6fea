// Backward of gather and pool (spec section 8): a token's gradient is the sum over levels of its entry's, divided by the
// tokens of the entry; for k and v also over the query heads of the group.
//
// The tokens of an entry of level 1 have the same coarser entries: a row group has these tokens together, and looks up
// and sums those entries once.
//
// LEVELS (>= 2), POOLING, GROUP (query heads to a kv head): host constants. Workgroup id x: b * H + h (of kv heads for
// dk and dv), y: entries of level 1, z: 0 = dq, 1 = dk, 2 = dv.

#import shared/pyramid
#import shared/rows
#import shared/token_slice

struct Params {
    batch: u32,
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    kv_heads: u32,
    entries: u32, // P
    gathered: u32, // S
    first_token: u32, // of the slice, see shared/token_slice
    end_token: u32,
}

@group(0) @binding(0) var<storage, read> gathered_dq: array<vec4<u32>>;  // [B, H, S, D]
@group(0) @binding(1) var<storage, read> gathered_dk: array<vec4<u32>>;  // [B, H, S, D]
@group(0) @binding(2) var<storage, read> gathered_dv: array<vec4<u32>>;  // [B, H, S, D]
@group(0) @binding(3) var<storage, read> positions: array<u32>;          // [B, H, P]
@group(0) @binding(4) var<storage, read_write> dq: array<vec4<u32>>;     // [B, N, H, D]
@group(0) @binding(5) var<storage, read_write> dk: array<vec4<u32>>;     // [B, N, KV, D]
@group(0) @binding(6) var<storage, read_write> dv: array<vec4<u32>>;     // [B, N, KV, D]
@group(0) @binding(7) var<uniform> params: Params;

fn gathered(tensor: u32, at: u32) -> vec4<u32> {
    switch (tensor) {
        case 0u: { return gathered_dq[at]; }
        case 1u: { return gathered_dk[at]; }
        default: { return gathered_dv[at]; }
    }
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let load = invocation % LOADS;
    let lane_group = invocation / LOADS;
    let tensor = workgroup.z;
    let heads = select(params.kv_heads, params.heads, tensor == 0u);
    if (lane_group >= ROWS || workgroup.x >= params.batch * heads) {
        return;
    }
    let batch = workgroup.x / heads;
    let head = workgroup.x % heads;
    let group = select(GROUP, 1u, tensor == 0u);

    let first_parent = first_token() / POOLING + workgroup.y * ROWS + lane_group;
    for (var parent = first_parent; parent * POOLING < end_token(); parent += workgroups.y * ROWS) {
        let first = parent * POOLING;
        var coarser: array<vec4<f32>, WIDE>;
        for (var g = 0u; g < group; g++) {
            let query_head = batch * params.heads + head * group + g;
            // All rows' loads before the first use: they are in flight together.
            #for l in 1..LEVELS
            var row$l = vec4<u32>(0u);
            let entry$l = level_start($lu, params.padded_tokens) - params.padded_tokens + first / window($lu);
            let place$l = position(positions[query_head * params.entries + entry$l]);
            if (place$l != ABSENT) {
                row$l = gathered(tensor, (query_head * params.gathered + place$l) * LOADS + load);
            }
            #end
            #for l in 1..LEVELS
            {
                let row = unpack_wide(row$l);
                #for w in 0..WIDE
                coarser[$w] += row[$w] / f32(window($lu));
                #end
            }
            #end
        }
        for (var t = 0u; t < POOLING; t += 2u) {
            #for i in 0..2
            let token$i = first + t + $iu;
            var sum$i = coarser;
            #end
            for (var g = 0u; g < group; g++) {
                let query_head = batch * params.heads + head * group + g;
                let word = positions[query_head * params.entries + parent];
                #for i in 0..2
                var own$i = vec4<u32>(0u);
                let place$i = token_position(word, token$i);
                if (place$i != ABSENT) {
                    own$i = gathered(tensor, (query_head * params.gathered + place$i) * LOADS + load);
                }
                #end
                #for i in 0..2
                {
                    let row = unpack_wide(own$i);
                    #for w in 0..WIDE
                    sum$i[$w] += row[$w];
                    #end
                }
                #end
            }
            #for i in 0..2
            if (token$i < end_token()) {
                let to = (token_row(batch, token$i) * heads + head) * LOADS + load;
                let value = pack_wide(sum$i);
                switch (tensor) {
                    case 0u: { dq[to] = value; }
                    case 1u: { dk[to] = value; }
                    default: { dv[to] = value; }
                }
            }
            #end
        }
    }
}
