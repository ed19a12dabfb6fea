// Selection (spec section 4) and the order of the sub-sequence (section 5): the whole cascade of one chunk of one head
// in one workgroup.
//
// The best half-budget by one score is a cut: the smallest key that is taken, found digit by digit from histograms of 8
// bits, and the last candidate that is taken among those with just that key. So "is candidate j taken" is a pure
// function of two numbers, and nothing has to be marked in memory. An entry's place is a sum over levels of "how many
// entries of that level end at or before it", each a binary search in the level's sorted selection; no entry waits for
// another.
//
// LEVELS (>= 2), POOLING, CHUNK (m): host constants.

#import shared/grid
#import shared/pyramid
#import shared/scan

struct Params {
    batch: u32,
    heads: u32,
    kv_heads: u32,
    padded_tokens: u32,
    entries: u32, // P
    chunks: u32, // C
    gathered: u32, // S
}

// Scores are read as bits: no arithmetic that a driver may relax touches them.
@group(0) @binding(0) var<storage, read> score_q: array<u32>;          // [B, H, P]
@group(0) @binding(1) var<storage, read> score_k: array<u32>;          // [B, KV, P]
@group(0) @binding(2) var<storage, read_write> indices: array<u32>;    // [B, H, S] flat entry indices
@group(0) @binding(3) var<storage, read_write> positions: array<u32>;  // [B, H, P]
@group(0) @binding(4) var<uniform> params: Params;

const WORKGROUP: u32 = 256u;

// The candidates of a level that one score takes: those with a higher key, and those with this key up to the tie.
struct Cut {
    key: u32,
    tie: u32,
}

// Where a level's candidates and scores are.
struct Candidates {
    level: u32,
    count: u32,
    first: u32,   // of the coarsest level: the chunk's first entry
    score_q: u32, // index of the level's entry 0
    score_k: u32,
}

var<workgroup> histogram: array<atomic<u32>, WORKGROUP>;
// The digit found, how many are still to be taken among its keys, and how many keys it has.
var<workgroup> found: vec3<u32>;
var<workgroup> last_tie: u32;
// Selected entries of levels 1 to L - 1, ascending; level l begins at (l - 1) * CHUNK.
var<workgroup> selected: array<u32, (LEVELS - 1u) * CHUNK>;

// An integer that orders like the score, with NaN below every number and both zeros equal.
fn score_key(bits: u32) -> u32 {
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0u;
    }
    if ((bits & 0x7fffffffu) == 0u) {
        return 0x80000000u;
    }
    return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

// Entry of candidate j: of the coarsest level the chunk's j-th, else a child of a selected entry.
fn entry_of(candidates: Candidates, j: u32) -> u32 {
    if (candidates.level == LEVELS - 1u) {
        return candidates.first + j;
    }
    return selected[candidates.level * CHUNK + j / POOLING] * POOLING + j % POOLING;
}

fn key_of(candidates: Candidates, by_key: bool, j: u32) -> u32 {
    let entry = entry_of(candidates, j);
    if (by_key) {
        return score_key(score_k[candidates.score_k + entry]);
    }
    return score_key(score_q[candidates.score_q + entry]);
}

fn takes(cut: Cut, key: u32, j: u32) -> bool {
    return key > cut.key || (key == cut.key && j <= cut.tie);
}

// Whether candidate j is still free when keys choose: those that queries took are not.
fn is_free(candidates: Candidates, by_key: bool, by_query: Cut, j: u32) -> bool {
    return !by_key || !takes(by_query, key_of(candidates, false, j), j);
}

// The cut that takes `count` of the free candidates.
fn best(candidates: Candidates, by_key: bool, by_query: Cut, count: u32, invocation: u32) -> Cut {
    var cut = Cut(0u, 0xffffffffu);
    var known = 0u;
    var remaining = count;
    var ties = 0u;
    for (var digit = 0u; digit < 4u; digit++) {
        let shift = 24u - 8u * digit;
        atomicStore(&histogram[invocation], 0u);
        workgroupBarrier();
        for (var j = invocation; j < candidates.count; j += WORKGROUP) {
            let key = key_of(candidates, by_key, j);
            if ((key & known) == cut.key && is_free(candidates, by_key, by_query, j)) {
                atomicAdd(&histogram[(key >> shift) & 255u], 1u);
            }
        }
        workgroupBarrier();
        // Highest digit first: the running sum counts the keys at or above it.
        let value = 255u - invocation;
        let own = atomicLoad(&histogram[value]);
        let above = inclusive_scan(own, invocation);
        if (above >= remaining && above - own < remaining) {
            found = vec3<u32>(value, remaining - (above - own), own);
        }
        let digit_found = workgroupUniformLoad(&found);
        cut.key |= digit_found.x << shift;
        known |= 255u << shift;
        remaining = digit_found.y;
        ties = digit_found.z;
    }
    // Where all keys equal to the cut's are taken, no tie has to be found; that is the usual case.
    if (ties > remaining) {
        var before = 0u;
        for (var block = 0u; block < candidates.count; block += WORKGROUP) {
            let j = block + invocation;
            let is_tie = j < candidates.count
                && key_of(candidates, by_key, min(j, candidates.count - 1u)) == cut.key
                && is_free(candidates, by_key, by_query, min(j, candidates.count - 1u));
            let rank = before + inclusive_scan(u32(is_tie), invocation);
            if (is_tie && rank == remaining) {
                last_tie = j;
            }
            before += workgroupUniformLoad(&scan_memory[WORKGROUP - 1u]);
        }
        cut.tie = workgroupUniformLoad(&last_tie);
    }
    return cut;
}

// The first place in a level's selection whose entry is not below `entry`.
fn lower_bound(level: u32, count: u32, entry: u32) -> u32 {
    var low = 0u;
    var high = count;
    while (low < high) {
        let middle = (low + high) / 2u;
        if (selected[(level - 1u) * CHUNK + middle] < entry) {
            low = middle + 1u;
        } else {
            high = middle;
        }
    }
    return low;
}

fn is_selected(level: u32, count: u32, entry: u32) -> bool {
    let at = lower_bound(level, count, entry);
    return at < count && selected[(level - 1u) * CHUNK + min(at, count - 1u)] == entry;
}

// Candidates of `level` whose window ends at or before token `end`; `above` is how many of the level above are selected.
fn ended(level: u32, first: u32, above: u32, end: u32) -> u32 {
    if (level == LEVELS - 1u) {
        return end / window(level) - first;
    }
    let parent = end / window(level + 1u);
    let at = lower_bound(level + 1u, above, parent);
    let inside = at < above && selected[level * CHUNK + min(at, above - 1u)] == parent;
    return at * POOLING + select(0u, end / window(level) - parent * POOLING, inside);
}

// The coarsest level's entries before chunk c: floor(c n / C), without overflow.
fn chunk_start(c: u32) -> u32 {
    let n = params.padded_tokens / window(LEVELS - 1u);
    return c * (n / params.chunks) + c * (n % params.chunks) / params.chunks;
}

// Sub-sequence entries that a chunk gives.
fn emitted(chunk: u32) -> u32 {
    var candidates = chunk_start(chunk + 1u) - chunk_start(chunk);
    var count = candidates;
    for (var l = 1u; l < LEVELS; l++) {
        candidates = POOLING * min(candidates, CHUNK);
        count += candidates;
    }
    return count;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let unit = linear_workgroup(workgroup, workgroups);
    if (unit >= params.batch * params.heads * params.chunks) {
        return;
    }
    let chunk = unit % params.chunks;
    let head = unit / params.chunks; // b * H + h
    let kv_head = head / params.heads * params.kv_heads + head % params.heads / (params.heads / params.kv_heads);
    let first = chunk_start(chunk);
    let last = chunk_start(chunk + 1u);

    // Selected entries of each level; entry 0 stands for the level below 1, which has none.
    var counts: array<u32, LEVELS + 1u>;
    var candidates = Candidates(LEVELS - 1u, last - first, first, 0u, 0u);
    for (var level = LEVELS - 1u; level >= 1u; level--) {
        let start = level_start(level, params.padded_tokens) - params.padded_tokens;
        candidates.level = level;
        candidates.score_q = head * params.entries + start;
        candidates.score_k = kv_head * params.entries + start;
        let all = candidates.count <= CHUNK;
        let none = Cut(0u, 0u);
        var by_query = none;
        var by_key = none;
        if (!all) {
            by_query = best(candidates, false, none, CHUNK / 2u, invocation);
            by_key = best(candidates, true, by_query, CHUNK / 2u, invocation);
        }
        var before = 0u;
        for (var block = 0u; block < candidates.count; block += WORKGROUP) {
            let j = block + invocation;
            var taken = false;
            if (j < candidates.count) {
                taken = all || takes(by_query, key_of(candidates, false, j), j) || takes(by_key, key_of(candidates, true, j), j);
            }
            let rank = before + inclusive_scan(u32(taken), invocation);
            if (taken) {
                selected[(level - 1u) * CHUNK + rank - 1u] = entry_of(candidates, j);
            }
            before += workgroupUniformLoad(&scan_memory[WORKGROUP - 1u]);
        }
        workgroupBarrier();
        counts[level] = min(candidates.count, CHUNK);
        candidates.count = POOLING * counts[level];
    }

    var base = 0u;
    for (var c = 0u; c < chunk; c++) {
        base += emitted(c);
    }
    let row = head * params.gathered + base;
    for (var level = LEVELS - 1u; level >= 1u; level--) {
        let start = level_start(level, params.padded_tokens);
        let scale = window(LEVELS - 1u - level);
        for (var entry = first * scale + invocation; entry < last * scale; entry += WORKGROUP) {
            var word = ABSENT;
            if (level == LEVELS - 1u || is_selected(level + 1u, counts[level + 1u], entry / POOLING)) {
                // Entries up to this one in post-order: those that end with it or before; of coarser levels, before.
                let end = (entry + 1u) * window(level);
                var place = 0u;
                for (var l = 0u; l < LEVELS; l++) {
                    place += ended(l, first, counts[l + 1u], select(end, end - 1u, l > level));
                }
                place -= 1u;
                let expanded = is_selected(level, counts[level], entry);
                word = (base + place) | select(0u, EXPANDED, expanded);
                indices[row + place] = start + entry;
                if (level == 1u && expanded) {
                    for (var child = 0u; child < POOLING; child++) {
                        indices[row + place - POOLING + child] = entry * POOLING + child;
                    }
                }
            }
            positions[head * params.entries + start - params.padded_tokens + entry] = word;
        }
    }
}
