// Index arithmetic of the pyramid. LEVELS, POOLING: host constants; all sizes are in entries or tokens.

// Tokens that an entry of level l covers, p^l.
fn window(level: u32) -> u32 {
    return 1u << (level * firstTrailingBit(POOLING));
}

// Flat index of entry (l, 0): the sizes of all finer levels, level 0 included.
fn level_start(level: u32, padded_tokens: u32) -> u32 {
    var start = 0u;
    for (var l = 0u; l < level; l++) {
        start += padded_tokens / window(l);
    }
    return start;
}
