// The beginning of `main` of the kernels of dk and dv with cooperative matrices: what this workgroup has.

    let index = linear_workgroup(workgroup, workgroups);
    if (index >= params.units) {
        return;
    }
    // Heads are fastest; the block with most queries comes first.
    let unit = params.first_unit + index;
    let kv_head_index = unit % params.kv_head_count;
    let batch = (params.first_kv_head + kv_head_index) / params.kv_heads;
    let kv_head = (params.first_kv_head + kv_head_index) % params.kv_heads;
    let group_size = params.heads / params.kv_heads;
    let first_head = kv_head * group_size + params.first_member;
    let end_head = first_head + params.members;
    let block = unit / params.kv_head_count;
    let first_key = block * BLOCK_N;
    // The first of the queries that see the block.
    let first_row = max(block / KEY_BLOCKS, params.first_block) * DS_BLOCK;
    let kv_base = batch * params.tokens * (params.kv_heads / PARTS) + kv_head / PARTS * params.kv_head_stride;
    let last_token = params.tokens - 1u;
    let tiles = (min(params.end_block * DS_BLOCK, params.tokens) - first_row + BLOCK_M - 1u) / BLOCK_M;
    let row_loads = params.token_stride * LOADS;
    let exponent_scale = params.scale * LOG2_E;
