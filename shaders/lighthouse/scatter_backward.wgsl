// Backward of scatter (spec section 8): an entry's gradient is the sum over the tokens that its row was added to.
//
// The tokens of entry i of a level are those of p entries of the level below, p i + p - 1 and after. A walk is over the
// tokens of one entry of the coarsest level and keeps the sum of every level, so a token is read once and nothing is summed
// twice; walk 0 has the tokens before entry 0, which are those of finer entries. PARTS row groups share a walk, so that
// the last workgroups to run are no long ones; the coarsest sum goes through workgroup memory then.
//
// LEVELS (>= 2), POOLING, PARTS (1, or POOLING from three levels on): host constants. Workgroup id x: b * H + h, y: walks.

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

@group(0) @binding(0) var<storage, read> d_o: array<vec4<u32>>;                  // [B, N, H, D]
@group(0) @binding(1) var<storage, read> positions: array<u32>;                  // [B, H, P]
@group(0) @binding(2) var<storage, read_write> gathered_d_o: array<vec4<u32>>;   // [B, H, S, D]
@group(0) @binding(3) var<uniform> params: Params;

const WALKS: u32 = ROWS / PARTS;
const BLOCKS: u32 = (1u << ((LEVELS - 2u) * firstTrailingBit(POOLING))) / PARTS; // of POOLING tokens in a part

var<workgroup> part_sums: array<array<vec4<f32>, WIDE>, 256>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let load = invocation % LOADS;
    let group = invocation / LOADS;
    let batch = workgroup.x / params.heads;
    let head = workgroup.x % params.heads;
    let words = workgroup.x * params.entries;
    let rows = workgroup.x * params.gathered;

    // Walk w begins with token w p^(L - 1) - 1. A slice has the walks whose first token it has; its binding goes on for a
    // coarsest window. The first one has walk 0 too, the last one those that begin past the tokens.
    let coarsest = window(LEVELS - 1u);
    let first_walk = select(first_token() / coarsest + 1u, 0u, first_token() == 0u);
    let last_walk = select(end_token(), params.padded_tokens, end_token() == params.tokens) / coarsest;
    for (var first = first_walk + workgroup.y * WALKS; first <= last_walk; first += workgroups.y * WALKS) {
        let walk = first + group / PARTS;
        let part = walk * PARTS + group % PARTS;
        let live = group < WALKS * PARTS && walk <= last_walk;
        // By level; sums of level l go on into level l + 1 when their window ends.
        var sum: array<array<vec4<f32>, WIDE>, LEVELS + 1u>;
        // Entry block - 1 of level 1 has the block's first token as its last; the others are of entry `block`.
        var after = ABSENT;
        if (live && part > 0u && part * BLOCKS <= params.padded_tokens / POOLING) {
            after = positions[words + part * BLOCKS - 1u];
        }
        let end = select(0u, (part + 1u) * BLOCKS, live);
        for (var block = part * BLOCKS; block < end; block++) {
            let before = after;
            after = ABSENT;
            if (block < params.padded_tokens / POOLING) {
                after = positions[words + block];
            }
            for (var t = 0u; t < POOLING; t += 4u) {
                #for i in 0..4
                // Token -1 of block 0 wraps, and is past the last one.
                let token$i = block * POOLING + t + $iu - 1u;
                var value$i = vec4<u32>(0u);
                if ($iu < POOLING - t && token$i < params.tokens) {
                    value$i = d_o[(token_row(batch, token$i) * params.heads + head) * LOADS + load];
                }
                #end
                #for i in 0..4
                if ($iu < POOLING - t) {
                    let place = token_position(select(after, before, t + $iu == 0u), token$i);
                    if (place != ABSENT) {
                        gathered_d_o[(rows + place) * LOADS + load] = value$i;
                    }
                    let value = unpack_wide(value$i);
                    #for w in 0..WIDE
                    sum[1][$w] += value[$w];
                    #end
                }
                #end
            }
            let done = (block + 1u) * POOLING;
            #for l in 1..LEVELS
            if ($lu < LEVELS - 1u && done % window($lu) == 0u) {
                // Entry -1 of a level wraps, and is past the last one.
                let entry = done / window($lu) - 2u;
                if (entry < params.padded_tokens / window($lu)) {
                    let word = positions[words + level_start($lu, params.padded_tokens) - params.padded_tokens + entry];
                    if (word != ABSENT) {
                        gathered_d_o[(rows + position(word)) * LOADS + load] = pack_wide(sum[$l]);
                    }
                }
                #for w in 0..WIDE
                sum[$l + 1][$w] += sum[$l][$w];
                sum[$l][$w] = vec4<f32>(0.0);
                #end
            }
            #end
        }
        var whole = sum[LEVELS - 1u];
        if (PARTS > 1u) {
            workgroupBarrier();
            part_sums[invocation] = whole;
            workgroupBarrier();
        }
        if (live && group % PARTS == 0u && walk > 0u) {
            let level = level_start(LEVELS - 1u, params.padded_tokens) - params.padded_tokens;
            let word = positions[words + level + walk - 1u];
            if (word != ABSENT) {
                for (var other = 1u; other < PARTS; other++) {
                    let more = part_sums[invocation + other * LOADS];
                    #for w in 0..WIDE
                    whole[$w] += more[$w];
                    #end
                }
                gathered_d_o[(rows + position(word)) * LOADS + load] = pack_wide(whole);
            }
        }
    }
}
