// Where not even one batch entry fits a binding, tensors of tokens are bound in slices of tokens, and a dispatch has the
// tokens from params.first_token to before params.end_token, which its binding begins with. SLICED: host constant, so that
// whole tensors cost nothing.

fn first_token() -> u32 {
    return select(0u, params.first_token, SLICED);
}

fn end_token() -> u32 {
    return select(params.tokens, params.end_token, SLICED);
}

// A token's row, counted in tokens, in a tensor [B, N, ..] as it is bound.
fn token_row(batch: u32, token: u32) -> u32 {
    return select(batch * params.tokens + token, token - params.first_token, SLICED);
}

// Whether this dispatch has a token. Of whole tensors it has all of them, and those past the end too.
fn in_slice(token: u32) -> bool {
    return !SLICED || (token >= params.first_token && token < params.end_token);
}
