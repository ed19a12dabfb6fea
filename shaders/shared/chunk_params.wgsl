// The parameters of the backward kernels that may take some heads and some queries of a batch entry at a time. A unit
// is a workgroup's work: a block of one head of one batch entry.

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
    first_batch: u32,
    first_head: u32, // of the units; kv heads for dk and dv
    head_count: u32,
    first_block: u32, // of the queries, in blocks of DS_BLOCK
    end_block: u32,
    parts: u32, // for dq: workgroups that share a block of queries
}
