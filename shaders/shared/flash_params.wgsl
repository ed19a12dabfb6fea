// The parameters of the attention kernels that have a workgroup for each unit: a block of one head of one batch entry.
//
// A head's row of token t is row `head * head_stride + t * token_stride` of its batch entry, which is [S, H, D] or [H, S, D].
// A dispatch has the units from `first_unit` on; heads are fastest, and the block with most work comes first. HEADS_IN_TURN
// takes `heads_at_once` heads of a batch entry in this way, then the next, so that their keys and values stay in the cache.

struct Params {
    tokens: u32, // S
    heads: u32,
    kv_heads: u32,
    token_stride: u32,
    head_stride: u32,
    kv_token_stride: u32,
    kv_head_stride: u32,
    scale: f32, // forward: log2(e) / sqrt(D); backward: 1 / sqrt(D)
    first_unit: u32,
    units: u32,
    heads_at_once: u32,
}

struct Unit {
    head: u32,
    block: u32, // counted from that with most work
    batch: u32,
}

// What a number is of so many blocks of each of `heads` heads.
fn unit_of(number: u32, blocks: u32, heads: u32) -> Unit {
    if (!HEADS_IN_TURN) {
        return Unit(number % heads, number / heads % blocks, number / (heads * blocks));
    }
    let turn = number / (params.heads_at_once * blocks);
    let turns = heads / params.heads_at_once;
    let head = turn % turns * params.heads_at_once + number % params.heads_at_once;
    return Unit(head, number / params.heads_at_once % blocks, turn / turns);
}
