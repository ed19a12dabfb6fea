// Scatter (spec section 7), as a gather: a token sums the rows of the entries that reach it, at most one of each level,
// the finest first.
//
// LEVELS (>= 2), POOLING: host constants. Workgroup id x: b * H + h, y: tokens.

#import shared/pyramid
#import shared/rows

struct Params {
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    entries: u32, // P
    gathered: u32, // S
}

@group(0) @binding(0) var<storage, read> gathered_o: array<vec4<u32>>;   // [B, H, S, D]
@group(0) @binding(1) var<storage, read> positions: array<u32>;          // [B, H, P]
@group(0) @binding(2) var<storage, read_write> o: array<vec4<u32>>;      // [B, N, H, D]
@group(0) @binding(3) var<uniform> params: Params;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let load = invocation % LOADS;
    let group = invocation / LOADS;
    if (group >= ROWS) {
        return;
    }
    let batch = workgroup.x / params.heads;
    let head = workgroup.x % params.heads;
    let words = workgroup.x * params.entries;
    let rows = workgroup.x * params.gathered;

    for (var token = workgroup.y * ROWS + group; token < params.tokens; token += workgroups.y * ROWS) {
        // All places first: the rows' loads are then in flight together.
        let place0 = token_position(positions[words + token / POOLING], token);
        #for l in 1..LEVELS
        // An entry writes from the last token that it has seen on, for p^l tokens.
        var place$l = ABSENT;
        if (token + 1u >= window($lu)) {
            let entry = (token + 1u) / window($lu) - 1u;
            place$l = position(positions[words + level_start($lu, params.padded_tokens) - params.padded_tokens + entry]);
        }
        #end
        #for l in 0..LEVELS
        var row$l = vec4<u32>(0u);
        if (place$l != ABSENT) {
            row$l = gathered_o[(rows + place$l) * LOADS + load];
        }
        #end
        var sum = unpack_wide(row0);
        #for l in 1..LEVELS
        {
            let row = unpack_wide(row$l);
            #for w in 0..WIDE
            sum[$w] += row[$w];
            #end
        }
        #end
        o[((batch * params.tokens + token) * params.heads + head) * LOADS + load] = pack_wide(sum);
    }
}
