//! Scatter (spec section 7) and its backward (section 8): the sub-sequence's rows back to the tokens that they speak for.

mod reference;

pub(crate) use reference::token_or_entry;

use std::ops::Range;

use crate::config::{Pyramid, Shape};
use crate::error::Result;
use crate::gpu::{Caps, Kernel, grid_of_rows, params, rows_per_workgroup};
use crate::recording::{Command, Recording, TokenSlices};
use crate::tensor::{Element, Tensor};

params!(ScatterParams {
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    entries: u32,
    gathered: u32,
    first_token: u32,
    end_token: u32,
});

impl ScatterParams {
    fn new(shape: &Shape, pyramid: &Pyramid, slice: &Range<usize>) -> Self {
        Self {
            tokens: shape.tokens as u32,
            padded_tokens: pyramid.padded_tokens as u32,
            heads: shape.heads as u32,
            entries: pyramid.entries as u32,
            gathered: pyramid.gathered as u32,
            first_token: slice.start as u32,
            end_token: slice.end as u32,
        }
    }
}

/// Records the scatter of o~ `[B, H, S, D]` by `positions` `[B, H, P]` into `o` `[B, N, H, D]`.
///
/// # Errors
/// Tensors of the wrong size.
pub fn record_forward(
    recording: &mut Recording,
    shape: &Shape,
    pyramid: &Pyramid,
    gathered_o: Tensor,
    positions: Tensor,
    o: Tensor,
) -> Result<()> {
    let Shape { batch, tokens, heads, head_dim, element, .. } = *shape;
    recording.require("gathered_o", gathered_o, element, &[batch, heads, pyramid.gathered, head_dim])?;
    recording.require("positions", positions, Element::U32, &[batch, heads, pyramid.entries])?;
    recording.require("o", o, element, &shape.q())?;
    let caps = recording.caps().clone();
    let kernel = kernel(&caps, "lighthouse/scatter", shape, pyramid);
    let slices = TokenSlices { tokens, multiple: pyramid.config.pooling, overlap: 0 };
    let command = Command::new("scatter", reference::Scatter { shape: *shape, pyramid: pyramid.clone() })
        .reads("gathered_o", gathered_o)
        .reads("positions", positions)
        .writes("o", o)
        .by_tokens(&["o"])
        .dispatch_tokens(&caps, batch, slices, kernel, |batch, slice| {
            let (blocks, rows) = (slice.len() / pyramid.config.pooling + 1, rows_per_workgroup(head_dim, element));
            let workgroups = grid_of_rows(&caps, blocks, rows, batch * heads, 1);
            let work = (batch * slice.len() * heads * head_dim * pyramid.levels.len()) as u64;
            Ok((ScatterParams::new(shape, pyramid, &slice), workgroups, work))
        })?;
    recording.push(command)
}

/// Records the way back: d_o `[B, N, H, D]` by `positions` `[B, H, P]`; gives d_o~ `[B, H, S, D]`.
///
/// # Errors
/// Tensors of the wrong size, or a device that cannot hold them.
pub fn record_backward(
    recording: &mut Recording,
    shape: &Shape,
    pyramid: &Pyramid,
    d_o: Tensor,
    positions: Tensor,
) -> Result<Tensor> {
    let Shape { batch, tokens, heads, head_dim, element, .. } = *shape;
    recording.require("d_o", d_o, element, &shape.q())?;
    recording.require("positions", positions, Element::U32, &[batch, heads, pyramid.entries])?;
    let out = recording.scratch("gathered_d_o", element, &[batch, heads, pyramid.gathered, head_dim])?;
    let caps = recording.caps().clone();
    let rows = rows_per_workgroup(head_dim, element);
    let parts = parts(pyramid, rows);
    let kernel = kernel(&caps, "lighthouse/scatter_backward", shape, pyramid).constant("PARTS", parts);
    let coarsest = pyramid.coarsest_window();
    let slices = TokenSlices { tokens, multiple: coarsest, overlap: coarsest };
    let command =
        Command::new("scatter_backward", reference::ScatterBackward { shape: *shape, pyramid: pyramid.clone() })
            .reads("d_o", d_o)
            .reads("positions", positions)
            .writes("gathered_d_o", out)
            .by_tokens(&["d_o"])
            .dispatch_tokens(&caps, batch, slices, kernel, |batch, slice| {
                let walks = slice.len().div_ceil(coarsest) + 1;
                let workgroups = grid_of_rows(&caps, walks, rows / parts, batch * heads, 1);
                let work = (2 * batch * slice.len() * heads * head_dim) as u64;
                Ok((ScatterParams::new(shape, pyramid, &slice), workgroups, work))
            })?;
    recording.push(command)?;
    Ok(out)
}

/// Row groups that share a walk of the backward: a walk over p^2 tokens is short enough for one.
fn parts(pyramid: &Pyramid, rows: usize) -> usize {
    let pooling = pyramid.config.pooling;
    if pyramid.levels.len() > 3 && rows >= pooling { pooling } else { 1 }
}

fn kernel(caps: &Caps, shader: &'static str, shape: &Shape, pyramid: &Pyramid) -> Kernel {
    Kernel::new(caps, shader)
        .wide(shape.element)
        .constant("HEAD_DIM", shape.head_dim)
        .constant("LEVELS", pyramid.levels.len())
        .constant("POOLING", pyramid.config.pooling)
}
