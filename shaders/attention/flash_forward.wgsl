// Exact causal attention, forward (spec section 6): o = softmax(q k^T / sqrt(D), causal) v and its log-sum-exp.
//
// One workgroup per (batch, head, block of BLOCK_M queries) streams over tiles of BLOCK_N keys with an online softmax:
// a running maximum and sum per row, and results rescaled when the maximum grows. Exponents are to base 2, with log2(e)
// in the scale.
//
// BLOCK_M, BLOCK_N: host constants, as those of shared/tile. The host imports shared/group_reduce or its twin.

#import shared/exponent
#import shared/flash_params
#import shared/grid
#import shared/tile

@group(0) @binding(0) var<storage, read> q: array<elem4>;       // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(1) var<storage, read> k: array<elem4>;       // the same with KV heads
@group(0) @binding(2) var<storage, read> v: array<elem4>;       // as k
@group(0) @binding(3) var<storage, read_write> o: array<elem4>; // as q
@group(0) @binding(4) var<storage, read_write> lse: array<f32>; // [B, H, S]
@group(0) @binding(5) var<uniform> params: Params;

const KEPT_ROWS: u32 = BLOCK_M;
const STREAMED_ROWS: u32 = BLOCK_N;
const LOWEST: f32 = -3.4028234e38;
const LN_2: f32 = 0.6931471805599453;

fn load(tensor: u32, at: u32) -> vec4<f32> {
    if (tensor == 0u) {
        return unpack_elem(q[at]);
    }
    if (tensor == 1u) {
        return unpack_elem(k[at]);
    }
    return unpack_elem(v[at]);
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
    let queries = Rows(0u, base, params.token_stride, first_query);

    let group = invocation / LANES;
    let lane = invocation % LANES;
    let query = first_query + 4u * group;
    // By kept row i. The maximum starts finite: a difference of two infinities would be NaN.
    var maximum = vec4<f32>(LOWEST);
    var partial_sum = vec4<f32>(0.0);
    var sums: Sums;
    for (var first_key = 0u; first_key < min(first_query + BLOCK_M, params.tokens); first_key += BLOCK_N) {
        let crossed = first_key + BLOCK_N - 1u > first_query;
        var scores = rows_by_rows(queries, Rows(1u, kv_base, params.kv_token_stride, first_key), invocation);
        let key = first_key + lane + vec4<u32>(0u, LANES, 2u * LANES, 3u * LANES);
        var largest = maximum;
        #for i in 0..4
        scores[$i] = select(vec4<f32>(LOWEST), scores[$i] * params.scale, key <= vec4<u32>(query + $iu));
        largest[$i] = max(largest[$i], max(max(scores[$i].x, scores[$i].y), max(scores[$i].z, scores[$i].w)));
        #end
        largest = group_max(largest, invocation);
        let rescale = exp2(maximum - largest);
        maximum = largest;
        partial_sum *= rescale;
        #for i in 0..4
        {
            let weights = exp2_or_nan(scores[$i] - largest[$i]);
            scores[$i] = select(vec4<f32>(0.0), weights, key <= vec4<u32>(query + $iu));
            partial_sum[$i] += scores[$i].x + scores[$i].y + scores[$i].z + scores[$i].w;
        }
        #for s in 0..SUMS
        sums[$su * 4u + $iu] *= rescale[$i];
        #end
        #end
        let values = Rows(2u, kv_base, params.kv_token_stride, first_key);
        add_weighted_rows(&sums, scores, first_query, values, crossed, invocation);
    }

    let sum = group_sum(partial_sum, invocation);
    let row_lse = (maximum + log2_or_nan(sum)) * LN_2;
    #for i in 0..4
    if (query + $iu < params.tokens) {
        let row = (base + (query + $iu) * params.token_stride) * COLUMNS;
        #for s in 0..SUMS
        if ($su * LANES + lane < COLUMNS) {
            o[row + $su * LANES + lane] = pack_elem(sums[$su * 4u + $iu] / sum[$i]);
        }
        #end
        if (lane == 0u) {
            lse[(batch * params.heads + head) * params.tokens + query + $iu] = row_lse[$i];
        }
    }
    #end
}
