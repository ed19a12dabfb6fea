// Scatter (spec section 7), as a gather: a token sums the rows of the entries that reach it, at most one of each level,
// coarser ones first.
//
// The POOLING tokens from the last one of a window of level 1 on get the same coarser entries: a row group has these
// tokens together, and looks up and sums those entries once.
//
// LEVELS (>= 2), POOLING: host constants. Workgroup id x: b * H + h, y: such blocks of tokens.

#import shared/pyramid
#import shared/rows
#import shared/token_slice

struct Params {
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    entries: u32, // P
    gathered: u32, // S
    first_token: u32, // of the slice, see shared/token_slice
    end_token: u32,
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

    let first_block = first_token() / POOLING;
    for (var block = first_block + workgroup.y * ROWS + group; block <= end_token() / POOLING; block += workgroups.y * ROWS) {
        // Entry block - 1 of level 1 ends with the block's first token; the others are of entry `block`.
        let end = block * POOLING;
        var before = ABSENT;
        if (block > 0u) {
            before = positions[words + block - 1u];
        }
        var after = ABSENT;
        if (end < params.padded_tokens) {
            after = positions[words + block];
        }
        // All rows' loads before the first use: they are in flight together.
        #for l in 1..LEVELS
        var row$l = vec4<u32>(0u);
        // An entry writes from the last token that it has seen on, for p^l tokens.
        if (end >= window($lu)) {
            let entry = level_start($lu, params.padded_tokens) - params.padded_tokens + end / window($lu) - 1u;
            let place = position(positions[words + entry]);
            if (place != ABSENT) {
                row$l = gathered_o[(rows + place) * LOADS + load];
            }
        }
        #end
        var coarser: array<vec4<f32>, WIDE>;
        #for l in 1..LEVELS
        {
            let row = unpack_wide(row$l);
            #for w in 0..WIDE
            coarser[$w] += row[$w];
            #end
        }
        #end
        for (var t = 0u; t < POOLING; t += 2u) {
            #for i in 0..2
            // Token -1 of block 0 wraps, and is past the last one.
            let token$i = end + t + $iu - 1u;
            var own$i = vec4<u32>(0u);
            let place$i = token_position(select(after, before, t + $iu == 0u), token$i);
            if (place$i != ABSENT) {
                own$i = gathered_o[(rows + place$i) * LOADS + load];
            }
            #end
            #for i in 0..2
            if (token$i < params.tokens && in_slice(token$i)) {
                var sum = unpack_wide(own$i);
                #for w in 0..WIDE
                sum[$w] += coarser[$w];
                #end
                o[(token_row(batch, token$i) * params.heads + head) * LOADS + load] = pack_wide(sum);
            }
            #end
        }
    }
}
