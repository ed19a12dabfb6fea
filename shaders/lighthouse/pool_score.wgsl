// Pool and score in one pass (spec sections 2 and 3): every level's means of q, k and v, and for q and k every level's
// largest squared token norm.
//
// LOADS invocations, a row group, walk the tokens of one coarsest window of one head; each keeps its columns' sum of
// every level, so a token is read once and nothing is summed twice. Row norms are summed four tokens at a time, by the
// module that the host gives.
//
// HEAD_DIM, LEVELS (>= 2), POOLING: host constants. Workgroup id z: 0 = q, 1 = k, 2 = v.

#import shared/grid
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
    first_token: u32, // of the slice, see shared/token_slice
    end_token: u32,
}

@group(0) @binding(0) var<storage, read> q: array<vec4<u32>>;                // [B, N, H, D]
@group(0) @binding(1) var<storage, read> k: array<vec4<u32>>;                // [B, N, KV, D]
@group(0) @binding(2) var<storage, read> v: array<vec4<u32>>;                // [B, N, KV, D]
@group(0) @binding(3) var<storage, read_write> pyramid: array<vec4<u32>>;    // [B, (q: P, H, D | k: P, KV, D | v: P, KV, D)]
@group(0) @binding(4) var<storage, read_write> score_q: array<f32>;          // [B, H, P]
@group(0) @binding(5) var<storage, read_write> score_k: array<f32>;          // [B, KV, P]
@group(0) @binding(6) var<uniform> params: Params;

// Tokens between two exchanges of partial norms.
const STEP: u32 = 4u;

// A squared norm as an integer that orders alike, with NaN below every number: how `max` treats NaN is the driver's choice.
fn norm_key(norm: f32) -> u32 {
    let bits = bitcast<u32>(norm);
    return select(bits + 1u, 0u, bits > 0x7f800000u);
}

fn key_norm(key: u32) -> f32 {
    return bitcast<f32>(select(key - 1u, 0x7fc00000u, key == 0u));
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let tensor = workgroup.z;
    let heads = select(params.kv_heads, params.heads, tensor == 0u);
    let coarsest = window(LEVELS - 1u);
    let first_coarse = first_token() / coarsest;
    let coarse = select(params.padded_tokens / coarsest, (end_token() + coarsest - 1u) / coarsest - first_coarse, SLICED);
    let load = invocation % LOADS;
    let group = invocation / LOADS;
    // Row groups count heads fastest: neighbours read neighbouring memory.
    let unit = linear_workgroup(workgroup, workgroups) * ROWS + group;
    let live = group < ROWS && unit < params.batch * coarse * heads;
    let head = unit % heads;
    let entry = first_coarse + unit / heads % coarse;
    let batch = unit / (heads * coarse);

    let first = entry * window(LEVELS - 1u);
    // The pyramid's row of entry 0 of level 1, head 0: q comes first, then k, then v.
    let section = select(params.heads + (tensor - 1u) * params.kv_heads, 0u, tensor == 0u);
    let row = (batch * (params.heads + 2u * params.kv_heads) + section) * params.entries;
    let scores = live && load == 0u && tensor < 2u;
    // By level; sums of level l go on into level l + 1 when their window ends.
    var sum: array<array<vec4<f32>, WIDE>, LEVELS + 1u>;
    var best: array<u32, LEVELS + 1u>;

    for (var t0 = 0u; t0 < window(LEVELS - 1u); t0 += STEP) {
        #for i in 0..4
        var value$i = vec4<u32>(0u);
        if (live && first + t0 + $iu < params.tokens) {
            let at = (token_row(batch, first + t0 + $iu) * heads + head) * LOADS + load;
            switch (tensor) {
                case 0u: { value$i = q[at]; }
                case 1u: { value$i = k[at]; }
                default: { value$i = v[at]; }
            }
        }
        #end
        var norms = vec4<f32>(0.0);
        #for i in 0..4
        let row$i = unpack_wide(value$i);
        #for w in 0..WIDE
        norms[$i] += dot(row$i[$w], row$i[$w]);
        #end
        #end
        if (tensor < 2u) {
            norms = row_norms(norms, invocation, t0 / STEP % 2u);
        }
        #for i in 0..4
        if (live && t0 + $iu < window(LEVELS - 1u)) {
            let done = first + t0 + $iu + 1u;
            #for w in 0..WIDE
            sum[1][$w] += row$i[$w];
            #end
            best[1] = max(best[1], norm_key(norms[$i]));
            #for l in 1..LEVELS
            if (done % window($lu) == 0u) {
                let at = level_start($lu, params.padded_tokens) - params.padded_tokens + done / window($lu) - 1u;
                var mean: array<vec4<f32>, WIDE>;
                #for w in 0..WIDE
                mean[$w] = sum[$l][$w] / f32(window($lu));
                sum[$l + 1][$w] += sum[$l][$w];
                sum[$l][$w] = vec4<f32>(0.0);
                #end
                pyramid[(row + at * heads + head) * LOADS + load] = pack_wide(mean);
                if (scores && tensor == 0u) {
                    score_q[(batch * heads + head) * params.entries + at] = key_norm(best[$l]);
                } else if (scores) {
                    score_k[(batch * heads + head) * params.entries + at] = key_norm(best[$l]);
                }
                best[$l + 1] = max(best[$l + 1], best[$l]);
                best[$l] = 0u;
            }
            #end
        }
        #end
    }
}
