// The parameters of the backward kernels that may take some heads and some queries at a time. Kv heads are counted over
// the whole batch; `members` query heads of each one's group are taken. A unit is a workgroup's work: a block of one kv
// head for dk and dv, of one query head for dq. (Where workgroups share a block of keys, dk and dv have more kv heads, see
// flash_backward_dkdv_coop.)

struct Params {
    tokens: u32, // S
    heads: u32,
    kv_heads: u32,
    token_stride: u32,
    head_stride: u32,
    kv_token_stride: u32,
    kv_head_stride: u32,
    scale: f32, // 1 / sqrt(D)
    first_unit: u32,
    units: u32,
    first_kv_head: u32,
    kv_head_count: u32,
    first_member: u32,
    members: u32,
    first_block: u32, // of the queries, in blocks of DS_BLOCK
    end_block: u32,
    parts: u32, // for dq: workgroups that share a block of queries
}
