// Attention's backward for k and v (spec section 8), from the log-sum-exp of the forward:
//
//     p = exp(q k^T / sqrt(D) - lse),  dv = p^T d_o,  dp = d_o v^T,  ds = p (dp - delta),  dk = ds^T q / sqrt(D)
//
// One workgroup per (batch, kv head, block of BLOCK_N keys) streams over the query heads of its group and, for each,
// over tiles of BLOCK_M queries from the diagonal on; so a kv head's gradients are summed in a fixed order. BLOCK_M,
// BLOCK_N: host constants, as those of shared/tile.

#import shared/exponent
#import shared/flash_params
#import shared/grid
#import shared/tile

@group(0) @binding(0) var<storage, read> q: array<elem4>;        // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(1) var<storage, read> k: array<elem4>;        // the same with KV heads
@group(0) @binding(2) var<storage, read> v: array<elem4>;        // as k
@group(0) @binding(3) var<storage, read> d_o: array<elem4>;      // as q
@group(0) @binding(4) var<storage, read> lse_delta: array<vec2<f32>>; // [B, H, S], see flash_backward_delta
@group(0) @binding(5) var<storage, read_write> dk: array<elem4>; // as k
@group(0) @binding(6) var<storage, read_write> dv: array<elem4>; // as k
@group(0) @binding(7) var<uniform> params: Params;

const KEPT_ROWS: u32 = BLOCK_N;
const STREAMED_ROWS: u32 = BLOCK_M;
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

fn attends(key: u32, query: u32) -> bool {
    return key <= query;
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let index = linear_workgroup(workgroup, workgroups);
    if (index >= params.units) {
        return;
    }
    let blocks = (params.tokens + BLOCK_N - 1u) / BLOCK_N;
    let unit = unit_of(params.first_unit + index, blocks, params.kv_heads);
    let kv_head = unit.head;
    let first_key = unit.block * BLOCK_N;
    let batch = unit.batch;
    let kv_base = batch * params.tokens * params.kv_heads + kv_head * params.kv_head_stride;
    let keys = Rows(1u, kv_base, params.kv_token_stride, first_key);
    let values = Rows(2u, kv_base, params.kv_token_stride, first_key);

    let lane = invocation % LANES;
    let key = first_key + invocation / LANES * 4u;
    let group_size = params.heads / params.kv_heads;
    var sums_dk: Sums;
    var sums_dv: Sums;
    for (var head = kv_head * group_size; head < (kv_head + 1u) * group_size; head++) {
        let base = batch * params.tokens * params.heads + head * params.head_stride;
        for (var first_query = first_key / BLOCK_M * BLOCK_M; first_query < params.tokens; first_query += BLOCK_M) {
            let crossed = first_query < first_key + BLOCK_N - 1u;
            let queries = Rows(0u, base, params.token_stride, first_query);
            let d_outputs = Rows(3u, base, params.token_stride, first_query);
            var scores = rows_by_rows(keys, queries, invocation);
            var d_scores = rows_by_rows(values, d_outputs, invocation);
            let query = first_query + lane + vec4<u32>(0u, LANES, 2u * LANES, 3u * LANES);
            // By streamed row j; the forward's log-sum-exp is undefined past the last token.
            var row_lse: vec4<f32>;
            var row_delta: vec4<f32>;
            #for j in 0..4
            {
                let at = (batch * params.heads + head) * params.tokens + min(query[$j], params.tokens - 1u);
                let row = lse_delta[at];
                row_lse[$j] = row.x * LOG2_E;
                row_delta[$j] = row.y;
            }
            #end
            let last = vec4<u32>(params.tokens - 1u);
            #for i in 0..4
            {
                let seen = (vec4<u32>(key + $iu) <= query) & (query <= last);
                let weights = exp2_or_nan(scores[$i] * (params.scale * LOG2_E) - row_lse);
                d_scores[$i] = select(vec4<f32>(0.0), weights * (d_scores[$i] - row_delta), seen);
                scores[$i] = select(vec4<f32>(0.0), weights, seen);
            }
            #end
            add_weighted_rows(&sums_dv, scores, first_key, d_outputs, crossed, invocation);
            add_weighted_rows(&sums_dk, d_scores, first_key, queries, crossed, invocation);
        }
    }

    #for i in 0..4
    if (key + $iu < params.tokens) {
        let row = (kv_base + (key + $iu) * params.kv_token_stride) * COLUMNS;
        #for s in 0..SUMS
        if ($su * LANES + lane < COLUMNS) {
            dk[row + $su * LANES + lane] = pack_elem(sums_dk[$su * 4u + $iu] * params.scale);
            dv[row + $su * LANES + lane] = pack_elem(sums_dv[$su * 4u + $iu]);
        }
        #end
    }
    #end
}
