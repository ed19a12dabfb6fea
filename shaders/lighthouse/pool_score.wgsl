// Pool and score in one pass (spec sections 2 and 3): every level's means of q, k and v, and for q and k every level's
// largest squared token norm.
//
// A row group of HEAD_DIM / 4 invocations walks the tokens of one coarsest window of one head; each keeps one column of
// four elements and a sum per level, so a token is read once and nothing is summed twice. Row norms are summed through
// workgroup memory, four tokens at a time.
//
// HEAD_DIM, LEVELS (>= 2), POOLING: host constants. Workgroup id z: 0 = q, 1 = k, 2 = v.

#import shared/grid
#import shared/pyramid

struct Params {
    batch: u32,
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    kv_heads: u32,
    entries: u32, // P
}

@group(0) @binding(0) var<storage, read> q: array<elem4>;                  // [B, N, H, D]
@group(0) @binding(1) var<storage, read> k: array<elem4>;                  // [B, N, KV, D]
@group(0) @binding(2) var<storage, read> v: array<elem4>;                  // [B, N, KV, D]
@group(0) @binding(3) var<storage, read_write> pyramid: array<elem4>;      // [B, (q: P, H, D | k: P, KV, D | v: P, KV, D)]
@group(0) @binding(4) var<storage, read_write> score_q: array<f32>;        // [B, H, P]
@group(0) @binding(5) var<storage, read_write> score_k: array<f32>;        // [B, KV, P]
@group(0) @binding(6) var<uniform> params: Params;

const WORKGROUP: u32 = 256u;
const COLUMNS: u32 = HEAD_DIM / 4u;
const GROUPS: u32 = WORKGROUP / COLUMNS;
// Tokens between two exchanges of partial norms; a coarsest window is a multiple of 2, and of 4 unless it is 2.
const STEP: u32 = 4u;

// Two buffers, so that one barrier per step is enough.
var<workgroup> partial_norms: array<vec4<f32>, 2u * WORKGROUP>;

fn load(tensor: u32, at: u32) -> vec4<f32> {
    if (tensor == 0u) {
        return unpack_elem(q[at]);
    }
    if (tensor == 1u) {
        return unpack_elem(k[at]);
    }
    return unpack_elem(v[at]);
}

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
    let coarse = params.padded_tokens / window(LEVELS - 1u);
    let column = invocation % COLUMNS;
    let group = invocation / COLUMNS;
    // Row groups count heads fastest: neighbours read neighbouring memory.
    let unit = linear_workgroup(workgroup, workgroups) * GROUPS + group;
    let live = group < GROUPS && unit < params.batch * coarse * heads;
    let head = unit % heads;
    let entry = unit / heads % coarse;
    let batch = unit / (heads * coarse);

    let first = entry * window(LEVELS - 1u);
    // The pyramid's row of entry 0 of level 1, head 0: q comes first, then k, then v.
    let section = select(params.heads + (tensor - 1u) * params.kv_heads, 0u, tensor == 0u);
    let row = (batch * (params.heads + 2u * params.kv_heads) + section) * params.entries;
    let scores = live && column == 0u && tensor < 2u;
    // By level; sums of level l go on into level l + 1 when their window ends.
    var sum: array<vec4<f32>, LEVELS + 1u>;
    var best: array<u32, LEVELS + 1u>;

    for (var t0 = 0u; t0 < window(LEVELS - 1u); t0 += STEP) {
        var values: array<vec4<f32>, STEP>;
        var norms = vec4<f32>(0.0);
        #for i in 0..4
        {
            let token = first + t0 + $iu;
            if (live && token < params.tokens) {
                values[$i] = load(tensor, ((batch * params.tokens + token) * heads + head) * COLUMNS + column);
            }
            norms[$i] = dot(values[$i], values[$i]);
        }
        #end
        let buffer = (t0 / STEP % 2u) * WORKGROUP;
        partial_norms[buffer + invocation] = norms;
        workgroupBarrier();
        if (scores) {
            norms = vec4<f32>(0.0);
            for (var c = 0u; c < COLUMNS; c++) {
                norms += partial_norms[buffer + invocation + c];
            }
        }
        #for i in 0..4
        if (live && t0 + $iu < window(LEVELS - 1u)) {
            let done = first + t0 + $iu + 1u;
            sum[1] += values[$i];
            best[1] = max(best[1], norm_key(norms[$i]));
            #for l in 1..LEVELS
            if (done % window($lu) == 0u) {
                let at = level_start($lu, params.padded_tokens) - params.padded_tokens + done / window($lu) - 1u;
                pyramid[(row + at * heads + head) * COLUMNS + column] = pack_elem(sum[$l] / f32(window($lu)));
                if (scores && tensor == 0u) {
                    score_q[(batch * heads + head) * params.entries + at] = key_norm(best[$l]);
                } else if (scores) {
                    score_k[(batch * heads + head) * params.entries + at] = key_norm(best[$l]);
                }
                sum[$l + 1] += sum[$l];
                sum[$l] = vec4<f32>(0.0);
                best[$l + 1] = max(best[$l + 1], best[$l]);
                best[$l] = 0u;
            }
            #end
        }
        #end
    }
}
