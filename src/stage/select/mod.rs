//! Selection and order (spec sections 4 and 5): the coarse-to-fine cascade of every chunk, and each entry's place in the
//! gathered sub-sequence.

mod reference;

use crate::config::{Pyramid, Shape};
use crate::error::{Error, Result};
use crate::gpu::{Kernel, grid, params};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

params!(SelectParams {
    batch: u32,
    heads: u32,
    kv_heads: u32,
    padded_tokens: u32,
    entries: u32,
    chunks: u32,
    gathered: u32,
});

/// What `positions` holds for an entry that is not in the sub-sequence.
pub const ABSENT: u32 = u32::MAX;
/// Set in `positions` for an entry whose children are in the sub-sequence.
pub const EXPANDED: u32 = 1 << 31;

/// What the stage gives.
#[derive(Clone, Copy, Debug)]
pub struct Selection {
    /// Flat entry indices in the order of the sub-sequence, `[B, H, S]` u32: entry (l, i) is i plus the sizes of all
    /// finer levels.
    pub indices: Tensor,
    /// The inverse for levels 1 and up, `[B, H, P]` u32: the place in the sub-sequence, with [`EXPANDED`], or
    /// [`ABSENT`]. A token's place follows from its entry of level 1.
    pub positions: Tensor,
}

/// Records the stage for scores `[B, H, P]` and `[B, KV, P]`, f32; only their order matters, NaN ranks lowest.
///
/// # Errors
/// Tensors of the wrong size; a chunk budget that the device's workgroup memory does not hold.
pub fn record(
    recording: &mut Recording,
    shape: &Shape,
    pyramid: &Pyramid,
    [score_q, score_k]: [Tensor; 2],
) -> Result<Selection> {
    let Shape { batch, heads, kv_heads, .. } = *shape;
    let (levels, chunk) = (pyramid.levels.len(), pyramid.config.chunk);
    recording.require("score_q", score_q, Element::F32, &[batch, heads, pyramid.entries])?;
    recording.require("score_k", score_k, Element::F32, &[batch, kv_heads, pyramid.entries])?;
    // Histogram, scan and the small variables beside the selected entries.
    let bytes = 4 * (levels - 1) * chunk + 2 * 1024 + 64;
    if bytes as u64 > u64::from(recording.caps().limits.max_compute_workgroup_storage_size) {
        return Err(Error::Limit {
            what: format!("selection with chunk = {chunk} over {levels} levels"),
            needed: bytes as u64,
            limit: "max_compute_workgroup_storage_size",
            available: u64::from(recording.caps().limits.max_compute_workgroup_storage_size),
        });
    }
    let out = Selection {
        indices: recording.scratch("indices", Element::U32, &[batch, heads, pyramid.gathered])?,
        positions: recording.scratch("positions", Element::U32, &[batch, heads, pyramid.entries])?,
    };
    let caps = recording.caps().clone();
    let kernel = Kernel::new(&caps, "lighthouse/select")
        .constant("LEVELS", levels)
        .constant("POOLING", pyramid.config.pooling)
        .constant("CHUNK", chunk);
    let chunks = pyramid.config.chunks();
    let command = Command::new("select", reference::SelectReference { shape: *shape, pyramid: pyramid.clone() })
        .reads("score_q", score_q)
        .reads("score_k", score_k)
        .writes("indices", out.indices)
        .writes("positions", out.positions)
        .dispatch_batched(&caps, batch, kernel, |batch| {
            let params = SelectParams {
                batch: batch as u32,
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                padded_tokens: pyramid.padded_tokens as u32,
                entries: pyramid.entries as u32,
                chunks: chunks as u32,
                gathered: pyramid.gathered as u32,
            };
            let units = (batch * heads * chunks) as u64;
            Ok((params, grid(&caps, units)?, units * (levels * pyramid.config.pooling * chunk) as u64))
        })?;
    recording.push(command)?;
    Ok(out)
}
