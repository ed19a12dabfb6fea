// Backward of scatter (spec section 8): an entry's gradient is the sum over the tokens that its row was added to.
//
// LEVELS (>= 2), POOLING: host constants. Workgroup id x: b * H + h, y: rows of the sub-sequence.

#import shared/pyramid
#import shared/rows
#import shared/token_slice

struct Params {
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    gathered: u32, // S
    first_token: u32, // of the slice, see shared/token_slice
    end_token: u32,
}

@group(0) @binding(0) var<storage, read> d_o: array<vec4<u32>>;                  // [B, N, H, D]
@group(0) @binding(1) var<storage, read> indices: array<u32>;                    // [B, H, S]
@group(0) @binding(2) var<storage, read_write> gathered_d_o: array<vec4<u32>>;   // [B, H, S, D]
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

    for (var row = workgroup.y * ROWS + group; row < params.gathered; row += workgroups.y * ROWS) {
        let flat = indices[workgroup.x * params.gathered + row];
        var first = flat;
        var count = 1u;
        #for l in 1..LEVELS
        if (flat >= level_start($lu, params.padded_tokens)) {
            first = (flat - level_start($lu, params.padded_tokens)) * window($lu) + window($lu) - 1u;
            count = window($lu);
        }
        #end
        // A slice's binding goes on for a window of the coarsest level; entries past the tokens come with the first one.
        if (!in_slice(select(0u, first, first < params.tokens))) {
            continue;
        }
        var sum: array<vec4<f32>, WIDE>;
        // Windows are multiples of 2; two tokens' loads are in flight together.
        for (var i = 0u; i < count; i += 2u) {
            #for t in 0..2
            var value$t = vec4<u32>(0u);
            if ($tu < count - i && first + i + $tu < params.tokens) {
                value$t = d_o[(token_row(batch, first + i + $tu) * params.heads + head) * LOADS + load];
            }
            #end
            #for t in 0..2
            {
                let value = unpack_wide(value$t);
                #for w in 0..WIDE
                sum[$w] += value[$w];
                #end
            }
            #end
        }
        gathered_d_o[(workgroup.x * params.gathered + row) * LOADS + load] = pack_wide(sum);
    }
}
