// The beginning of `main` of the kernels of shared/dkdv_coop: what this workgroup and this invocation have, loads of the
// first tile, and k or v in registers.

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
    let tiles = (min(params.end_block * DS_BLOCK, params.tokens) - first_row + MATRIX - 1u) / MATRIX;
    let row_loads = params.token_stride * LOADS;
    let exponent_scale = params.scale * LOG2_E;

    let subgroup = invocation / SUBGROUP;
    let group = subgroup / (SUBGROUPS / 2u);
    let lane_row = invocation % SUBGROUP / LANES;
    let lane = invocation % LANES;
    let exchange_at = subgroup * EXCHANGE;
    // This subgroup's columns in the products, and this lane's in between.
    let kept_row = subgroup % (SUBGROUPS / 2u) * 2u * MATRIX;
    let product_at = group * SCORE_ROWS + kept_row / 4u;
    // Lanes that a row of a matrix has no vectors for do the last one's work again.
    let chunk = subgroup * MATRIX_VECTORS + min(lane, MATRIX_LANES - 1u);
    let chunk_at = lane_row * SCORE_STRIDE + chunk;
    let key = first_key + chunk * 4u;
    let stage_row = select(MATRIX, invocation / LOADS, invocation < STAGE_ROWS * LOADS);
    let stage_load = invocation % LOADS;

    // The first tile is on its way while k or v are kept.
    #for s in 0..STAGES
    var next_at$s = row_load(batch, first_head, first_row + stage_row + $su * STAGE_ROWS) + stage_load;
    var next_q$s = q[next_at$s];
    var next_d_o$s = d_o[next_at$s];
    #end

    // k or v, half of MATRIX rows at a time through this subgroup's part of the staged rows. All loads are on their way
    // before the first is waited for. Rows past the last token repeat it and are not written.
    var kept_loads: array<vec4<u32>, 4 * KEPT_LOADS>;
    #for r in 0..2
    var kept$r: array<MatrixB, 2 * KEPT_MATRICES>;
    var sums$r: array<MatrixC, DEPTH_MATRICES>;
    #for p in 0..2
    #for n in 0..KEPT_LOADS
    let kept_at$r_$p_$n =
        kept_load(kv_base, first_key + kept_row + $ru * MATRIX, $pu, invocation % SUBGROUP + $nu * SUBGROUP);
    #end
    #end
    #end
    if (group == 0u) {
        #for r in 0..2
        #for p in 0..2
        #for n in 0..KEPT_LOADS
        kept_loads[(2u * $ru + $pu) * KEPT_LOADS + $nu] = k[kept_at$r_$p_$n];
        #end
        #end
        #end
    } else {
        #for r in 0..2
        #for p in 0..2
        #for n in 0..KEPT_LOADS
        kept_loads[(2u * $ru + $pu) * KEPT_LOADS + $nu] = v[kept_at$r_$p_$n];
        #end
        #end
        #end
    }
    let kept_rows_at = subgroup * KEPT_ROWS;
    #for r in 0..2
    #for p in 0..2
    #for n in 0..KEPT_LOADS
    {
        let i = invocation % SUBGROUP + $nu * SUBGROUP;
        let at = kept_rows_at + i / KEPT_ROW_LOADS * KEPT_STRIDE + i % KEPT_ROW_LOADS * LOAD_VECTORS;
        if (KEPT_EVEN || i < MATRIX * KEPT_ROW_LOADS) {
            #for h in 0..LOAD_VECTORS
            staged[at + $hu] = vector_of_load(kept_loads[(2u * $ru + $pu) * KEPT_LOADS + $nu], $hu);
            #end
        }
    }
    #end
    subgroupBarrier();
    #for d in 0..KEPT_MATRICES
    kept$r[$p * KEPT_MATRICES + $d] = coopLoad<MatrixB>(&staged[kept_rows_at + $du * MATRIX_VECTORS], KEPT_STRIDE);
    #end
    subgroupBarrier();
    #end
    #end
    workgroupBarrier();
    var non_finite_before = vec4<f32>(0.0);
    #for once in 0..DS_SCRATCH
    let carried_first = carried_block(kv_head_index, block);
    let carried_at = carried_first + subgroup * SUBGROUP_CARRIED;
    let carried_flag = carried_first + CARRIED - 1u;
    if (params.first_member > 0u || block / KEY_BLOCKS < params.first_block) {
        #for r in 0..2
        #for d in 0..DEPTH_MATRICES
        sums$r[$d] = coopLoadT<MatrixC>(
            &carried[carried_at + ($ru * DEPTH_MATRICES + $du) * MATRIX_SIZE],
            MATRIX_VECTORS,
        );
        #end
        #end
        non_finite_before = carried[carried_flag];
    }
    #end
