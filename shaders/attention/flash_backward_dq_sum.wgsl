// The last step of flash_backward_dq_from_ds_coop where several workgroups share a block of queries: dq is the sum of
// their parts / sqrt(D).
//
// One workgroup per (head, ROWS queries), one vector of four elements for each invocation at a time.

#import shared/chunk_params
#import shared/grid

@group(0) @binding(0) var<storage, read_write> partial: array<vec4<f32>>; // see partial_row
@group(0) @binding(1) var<storage, read_write> dq: array<elem4>;         // [B, S, H, D] or [B, H, S, D]
@group(0) @binding(2) var<uniform> params: Params;

const WORKGROUP: u32 = 256u;
const VECTORS: u32 = HEAD_DIM / 4u;

#import shared/dq_parts

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
    let head_index = unit % head_count();
    let first_row = unit / head_count() * ROWS;
    let batch_head = batch_and_head(head_index);
    let base = batch_head.x * params.tokens * params.heads + batch_head.y * params.head_stride;
    for (var i = invocation; i < ROWS * VECTORS; i += WORKGROUP) {
        let row = first_row + i / VECTORS;
        let query = params.first_block * DS_BLOCK + row;
        if (query < min(params.end_block * DS_BLOCK, params.tokens)) {
            var sum = vec4<f32>(0.0);
            for (var part = 0u; part < params.parts; part++) {
                let block = query / BLOCK_M;
                if (part_start(block, part) < part_start(block, part + 1u)) {
                    sum += partial[partial_row(part, head_index, row) + i % VECTORS];
                }
            }
            dq[(base + query * params.token_stride) * VECTORS + i % VECTORS] = pack_elem(sum * params.scale);
        }
    }
}
