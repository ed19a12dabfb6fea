// The end of `main` of the kernels of shared/dkdv_coop: dk and dv go to memory.

    #for once in 0..DS_SCRATCH
    // Later queries see the block too, or more heads of the group, or others have parts of it.
    if (
        params.first_member + params.members < group_size || params.end_block * DS_BLOCK < params.tokens || PARTS > 1u
    ) {
        #for r in 0..2
        #for d in 0..DEPTH_MATRICES
        coopStoreT(
            sums$r[$d],
            &carried[carried_at + ($ru * DEPTH_MATRICES + $du) * MATRIX_SIZE],
            MATRIX_VECTORS,
        );
        #end
        #end
        if (invocation == 0u) {
            carried[carried_flag] = scores[NON_FINITE];
        }
        return;
    }
    #end
    let non_finite = scores[NON_FINITE].x != 0.0;
    workgroupBarrier();
    // As in flash_forward_coop, code that runs once is short.
    let scale = select(params.scale, 1.0, group == 0u);
    #for d in 0..DEPTH_MATRICES
    subgroupBarrier();
    #for r in 0..2
    coopStoreT(sums$r[$d], &scores[exchange_at + $ru * MATRIX * MATRIX_VECTORS], MATRIX_VECTORS);
    #end
    subgroupBarrier();
    for (var i = invocation % SUBGROUP; i < 2u * MATRIX * MATRIX_VECTORS; i += SUBGROUP) {
        let token = first_key + kept_row + i / MATRIX_VECTORS;
        if (token < params.tokens) {
            let gradient = pack_elem(scores[exchange_at + i] * scale);
            let at = (kv_base + token * params.kv_token_stride) * VECTORS + $du * MATRIX_VECTORS + i % MATRIX_VECTORS;
            if (group == 0u) {
                dv[at] = gradient;
            } else {
                dk[at] = gradient;
            }
        }
    }
    #end
    // What dv lacks.
    if (non_finite && group == 0u) {
        let end = min(first_key + BLOCK_N, params.tokens);
        for (var d = 0u; d < DEPTH_MATRICES; d++) {
            for (var i = invocation % SUBGROUP; i < 2u * MATRIX * MATRIX_VECTORS; i += SUBGROUP) {
                let token = first_key + kept_row + i / MATRIX_VECTORS;
                let column = d * MATRIX_VECTORS + i % MATRIX_VECTORS;
                if (token < params.tokens) {
                    let at = (kv_base + token * params.kv_token_stride) * VECTORS + column;
                    let lacking = non_finite_d_o(vec2<u32>(batch, kv_head), token, end, column);
                    dv[at] = pack_elem(with_lacking(unpack_elem(dv[at]), lacking));
                }
            }
        }
    }