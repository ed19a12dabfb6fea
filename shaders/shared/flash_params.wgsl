// The parameters of the attention kernels that have a workgroup for each unit: a block of one head of one batch entry.
//
// A head's row of token t is row `head * head_stride + t * token_stride` of its batch entry, which is [S, H, D] or [H, S, D].
// A dispatch has the units from `first_unit` on; heads are fastest, and the block with most work comes first.

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
}
