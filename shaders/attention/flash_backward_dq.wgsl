// Attention's backward for q (spec section 8), from the log-sum-exp of the forward:
//
//     p = exp(q k^T / sqrt(D) - lse),  dp = d_o v^T,  ds = p (dp - delta),  dq = ds k / sqrt(D)
//
// One workgroup per (batch, head, block of BLOCK_M queries) streams over tiles of BLOCK_N keys. BLOCK_M, BLOCK_N: host
// constants, as those of shared/tile.

#import shared/exponent
#import shared/flash_params
#import shared/grid
#import shared/tile

@group(0) @binding(0) var<storage, read> q: array<elem4>;        // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(1) var<storage, read> k: array<elem4>;        // the same with KV heads
@group(0) @binding(2) var<storage, read> v: array<elem4>;        // as k
@group(0) @binding(3) var<storage, read> d_o: array<elem4>;      // as q
@group(0) @binding(4) var<storage, read> lse_delta: array<vec2<f32>>; // [B, H, S]
@group(0) @binding(5) var<storage, read_write> dq: array<elem4>; // as q
@group(0) @binding(6) var<uniform> params: Params;

const KEPT_ROWS: u32 = BLOCK_M;
const STREAMED_ROWS: u32 = BLOCK_N;
const LOG2_E: f32 = 1.4426950408889634;

fn load(tensor: u32, at: u32) -> vec4<f32> {
    if (tensor == 0u) {
        return unpack_elem(q[at]);
    }
    if (tensor == 1u) {
        return unpack_elem(k[at]);
    }
    if (tensor == 2u) {
        return unpack_elem(v[at]);
    }
    return unpack_elem(d_o[at]);
}

fn attends(query: u32, key: u32) -> bool {
    return key <= query;
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    #import shared/query_unit

    let lane = invocation % LANES;
    let query = first_query + invocation / LANES * 4u;
    // By kept row i; rows past the last token repeat it and are not written.
    var row_lse: vec4<f32>;
    var row_delta: vec4<f32>;
    #for i in 0..4
    {
        let at = (batch * params.heads + head) * params.tokens + min(query + $iu, params.tokens - 1u);
        let row = lse_delta[at];
        row_lse[$i] = row.x * LOG2_E;
        row_delta[$i] = row.y;
    }
    #end
    var sums: Sums;
    for (var first_key = 0u; first_key < min(first_query + BLOCK_M, params.tokens); first_key += BLOCK_N) {
        let crossed = first_key + BLOCK_N - 1u > first_query;
        let keys = Rows(1u, kv_base, params.kv_token_stride, first_key);
        let values = Rows(2u, kv_base, params.kv_token_stride, first_key);
        let scores = rows_by_rows(Rows(0u, base, params.token_stride, first_query), keys, invocation);
        let d_weights = rows_by_rows(Rows(3u, base, params.token_stride, first_query), values, invocation);
        let key = first_key + lane + vec4<u32>(0u, LANES, 2u * LANES, 3u * LANES);
        var d_scores: array<vec4<f32>, 4>;
        #for i in 0..4
        {
            let weights = exp2_or_nan(scores[$i] * (params.scale * LOG2_E) - row_lse[$i]);
            let d_score = weights * (d_weights[$i] - row_delta[$i]);
            d_scores[$i] = select(vec4<f32>(0.0), d_score, key <= vec4<u32>(query + $iu));
        }
        #end
        add_weighted_rows(&sums, d_scores, first_query, keys, crossed, invocation);
    }

    #for i in 0..4
    if (query + $iu < params.tokens) {
        let row = (base + (query + $iu) * params.token_stride) * COLUMNS;
        #for s in 0..SUMS
        if ($su * LANES + lane < COLUMNS) {
            dq[row + $su * LANES + lane] = pack_elem(sums[$su * 4u + $iu] * params.scale);
        }
        #end
    }
    #end
}
