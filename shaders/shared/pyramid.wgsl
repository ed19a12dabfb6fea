// Index arithmetic of the pyramid (spec sections 2 and 5). LEVELS (>= 2), POOLING: host constants.

// What `positions` holds for an entry of level 1 or above: its place in the sub-sequence, with EXPANDED set where its
// children are there too; ABSENT where it is not in the sub-sequence. A token needs no such word: the children of an
// expanded entry of level 1 are the POOLING entries before it.
const ABSENT: u32 = 0xffffffffu;
const EXPANDED: u32 = 0x80000000u;

// Tokens that an entry of a level covers, p^l.
fn window(level: u32) -> u32 {
    return 1u << (level * firstTrailingBit(POOLING));
}

// Flat index of a level's entry 0: the sizes of all finer levels, level 0 included.
fn level_start(level: u32, padded_tokens: u32) -> u32 {
    var start = 0u;
    for (var l = 0u; l < level; l++) {
        start += padded_tokens / window(l);
    }
    return start;
}

// The place in the sub-sequence that a word of `positions` names, or ABSENT.
fn position(word: u32) -> u32 {
    return select(word & ~EXPANDED, ABSENT, word == ABSENT);
}

// The place of a token, given the word of its entry of level 1, or ABSENT.
fn token_position(word: u32, token: u32) -> u32 {
    if (word == ABSENT || (word & EXPANDED) == 0u) {
        return ABSENT;
    }
    return (word & ~EXPANDED) - POOLING + token % POOLING;
}
