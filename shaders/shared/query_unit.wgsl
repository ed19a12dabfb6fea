// The beginning of `main` of the attention kernels that have a workgroup for each unit of shared/flash_params: the unit's
// head and queries, and where its batch entry's rows of q and of k and v begin. A block's number counts from the last.

    let index = linear_workgroup(workgroup, workgroups);
    if (index >= params.units) {
        return;
    }
    let blocks = (params.tokens + BLOCK_M - 1u) / BLOCK_M;
    let unit = unit_of(params.first_unit + index, blocks, params.heads);
    let head = unit.head;
    let first_query = (blocks - 1u - unit.block) * BLOCK_M;
    let batch = unit.batch;
    let kv_head = head / (params.heads / params.kv_heads);
    let base = batch * params.tokens * params.heads + head * params.head_stride;
    let kv_base = batch * params.tokens * params.kv_heads + kv_head * params.kv_head_stride;
