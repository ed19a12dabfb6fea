//! Pool and score (spec sections 2 and 3): the pyramid of q, k and v, and the scores of its entries, in one pass.

mod reference;

use crate::config::{Pyramid, Shape};
use crate::error::Result;
use crate::gpu::{Kernel, grid, params, rows_per_workgroup};
use crate::recording::{Command, Recording, TokenSlices};
use crate::tensor::{Element, Tensor};

params!(PoolScoreParams {
    batch: u32,
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    kv_heads: u32,
    entries: u32,
    first_token: u32,
    end_token: u32,
});

/// What the stage gives.
#[derive(Clone, Copy, Debug)]
pub struct PoolScore {
    /// Means of levels 1 and up, per batch entry q `[P, H, D]`, then k `[P, KV, D]`, then v `[P, KV, D]`.
    pub pyramid: Tensor,
    /// Largest squared norm of q in an entry's window, `[B, H, P]` f32.
    pub score_q: Tensor,
    /// Largest squared norm of k in an entry's window, `[B, KV, P]` f32.
    pub score_k: Tensor,
}

/// Rows of the pyramid tensor in one batch entry.
pub(crate) fn pyramid_rows(shape: &Shape, pyramid: &Pyramid) -> usize {
    (shape.heads + 2 * shape.kv_heads) * pyramid.entries
}

/// Records the stage for q `[B, N, H, D]` and k, v `[B, N, KV, D]`; the pyramid has at least two levels.
///
/// # Errors
/// Tensors of the wrong size, or a device that cannot hold them.
pub fn record(
    recording: &mut Recording,
    shape: &Shape,
    pyramid: &Pyramid,
    [q, k, v]: [Tensor; 3],
) -> Result<PoolScore> {
    recording.require("q", q, shape.element, &shape.q())?;
    recording.require("k", k, shape.element, &shape.kv())?;
    recording.require("v", v, shape.element, &shape.kv())?;
    let Shape { batch, heads, kv_heads, head_dim, .. } = *shape;
    let entries = pyramid.entries;
    let out = PoolScore {
        pyramid: recording.scratch("pyramid", shape.element, &[batch, pyramid_rows(shape, pyramid), head_dim])?,
        score_q: recording.scratch("score_q", Element::F32, &[batch, heads, entries])?,
        score_k: recording.scratch("score_k", Element::F32, &[batch, kv_heads, entries])?,
    };
    let caps = recording.caps().clone();
    let kernel = Kernel::new(&caps, "lighthouse/pool_score")
        .wide(shape.element)
        .row_norms(&caps, head_dim, shape.element)
        .constant("HEAD_DIM", head_dim)
        .constant("LEVELS", pyramid.levels.len())
        .constant("POOLING", pyramid.config.pooling);
    let coarsest = pyramid.coarsest_window();
    let slices = TokenSlices { tokens: shape.tokens, multiple: coarsest, overlap: 0 };
    let command = Command::new("pool_score", reference::PoolScoreReference { shape: *shape, pyramid: pyramid.clone() })
        .reads("q", q)
        .reads("k", k)
        .reads("v", v)
        .writes("pyramid", out.pyramid)
        .writes("score_q", out.score_q)
        .writes("score_k", out.score_k)
        .by_tokens(&["q", "k", "v"])
        .dispatch_tokens(&caps, batch, slices, kernel, |batch, tokens| {
            let params = PoolScoreParams {
                batch: batch as u32,
                tokens: shape.tokens as u32,
                padded_tokens: pyramid.padded_tokens as u32,
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                entries: entries as u32,
                first_token: tokens.start as u32,
                end_token: tokens.end as u32,
            };
            let coarse = tokens.len().div_ceil(coarsest);
            let rows = rows_per_workgroup(head_dim, shape.element);
            let [x, y, _] = grid(&caps, (batch * coarse * heads).div_ceil(rows) as u64)?;
            let work = 3 * (batch * (heads + 2 * kv_heads) * tokens.len() * head_dim) as u64;
            Ok((params, [x, y, 3], work))
        })?;
    recording.push(command)?;
    Ok(out)
}
