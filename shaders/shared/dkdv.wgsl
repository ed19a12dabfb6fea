// What the kernels of dk and dv with cooperative matrices have in common: arguments, and where rows of q and d_o are. Their
// `main` begins with shared/dkdv_unit.

#import shared/chunk_params
#import shared/dkdv_carried
#import shared/ds_scratch
#import shared/grid
#import shared/lacking
#import shared/non_finite_d_o

@group(0) @binding(0) var<storage, read_write> q: array<vec4<u32>>;   // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(1) var<storage, read_write> k: array<vec4<u32>>;   // the same with KV heads
@group(0) @binding(2) var<storage, read_write> v: array<vec4<u32>>;   // as k
@group(0) @binding(3) var<storage, read_write> d_o: array<vec4<u32>>; // as q
@group(0) @binding(4) var<storage, read_write> lse_delta: array<vec2<f32>>; // [B, H, S]
@group(0) @binding(5) var<storage, read_write> dk: array<elem4>;      // as k
@group(0) @binding(6) var<storage, read_write> dv: array<elem4>;      // as k
@group(0) @binding(7) var<uniform> params: Params;
#for once in 0..DS_SCRATCH
@group(0) @binding(8) var<storage, read_write> ds: array<vec4<u32>>;  // by query head and pair of blocks, see ds_pair
@group(0) @binding(9) var<storage, read_write> carried: array<vec4<f32>>; // see carried_block
#end

const LOG2_E: f32 = 1.4426950408889634;

// A row of q, k, v or d_o in loads of 16 bytes.
const LOADS: u32 = VECTORS / LOAD_VECTORS;

// Where a row of q or d_o begins, in loads; past the last token, that of the last.
fn row_load(batch: u32, head: u32, token: u32) -> u32 {
    let base = batch * params.tokens * params.heads + head * params.head_stride;
    return (base + min(token, params.tokens - 1u) * params.token_stride) * LOADS;
}
