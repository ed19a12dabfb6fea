// The last step of dk and dv where several workgroups share a block of keys: dv is the sum of their parts, dk that sum /
// sqrt(D).
//
// One workgroup per (kv head, block of BLOCK_N keys, a SUBGROUPS-th of what is carried of it), one vector of four elements
// for each invocation at a time.

#import shared/chunk_params
#import shared/dkdv_carried
#import shared/grid
#import shared/lacking
#import shared/non_finite_d_o

@group(0) @binding(0) var<storage, read_write> carried: array<vec4<f32>>; // see carried_block, PARTS to a kv head
@group(0) @binding(1) var<storage, read_write> d_o: array<vec4<u32>>;     // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(2) var<storage, read_write> dk: array<elem4>;          // the same with KV heads
@group(0) @binding(3) var<storage, read_write> dv: array<elem4>;          // as dk
@group(0) @binding(4) var<uniform> params: Params;

const WORKGROUP: u32 = 256u;
const LOADS: u32 = VECTORS / LOAD_VECTORS;

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
    let unit = params.first_unit + index;
    let kv_head_index = unit % params.kv_head_count;
    let subgroup = unit / params.kv_head_count % SUBGROUPS;
    let block = unit / (params.kv_head_count * SUBGROUPS);
    let batch = (params.first_kv_head + kv_head_index) / params.kv_heads;
    let kv_head = (params.first_kv_head + kv_head_index) % params.kv_heads;
    let kv_base = batch * params.tokens * params.kv_heads + kv_head * params.kv_head_stride;
    let group = subgroup / (SUBGROUPS / 2u);
    let pair_token = block * BLOCK_N + subgroup % (SUBGROUPS / 2u) * 2u * MATRIX;
    let own_token = block * BLOCK_N + subgroup * MATRIX;
    var non_finite = false;
    for (var part = 0u; part < PARTS; part++) {
        non_finite |= carried[carried_block(kv_head_index * PARTS + part, block) + CARRIED - 1u].x != 0.0;
    }
    for (var i = invocation; i < SUBGROUP_CARRIED; i += WORKGROUP) {
        let matrix = i / MATRIX_SIZE;
        let half = matrix / DEPTH_MATRICES;
        let token = select(own_token, pair_token + half * MATRIX, IN_GROUPS == 1u) + i % MATRIX_SIZE / MATRIX_VECTORS;
        let column = matrix % DEPTH_MATRICES * MATRIX_VECTORS + i % MATRIX_VECTORS;
        if (token < params.tokens) {
            var sum = vec4<f32>(0.0);
            for (var part = 0u; part < PARTS; part++) {
                sum += carried[carried_block(kv_head_index * PARTS + part, block) + subgroup * SUBGROUP_CARRIED + i];
            }
            let at = (kv_base + token * params.kv_token_stride) * VECTORS + column;
            if (select(half, group, IN_GROUPS == 1u) == 1u) {
                dk[at] = pack_elem(sum * params.scale);
            } else if (non_finite) {
                // What dv lacks.
                let end = min((block + 1u) * BLOCK_N, params.tokens);
                dv[at] = pack_elem(with_lacking(sum, non_finite_d_o(vec2<u32>(batch, kv_head), token, end, column)));
            } else {
                dv[at] = pack_elem(sum);
            }
        }
    }
}
