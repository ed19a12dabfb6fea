//! Gather (spec section 6) and its backward (section 8): rows of q, k, v and of the pyramid into contiguous blocks, and
//! their gradients back to the tokens.

mod reference;

use crate::config::{Pyramid, Shape};
use crate::error::Result;
use crate::gpu::{Kernel, grid_of_rows, params, rows_per_workgroup};
use crate::recording::{Command, Recording, TokenSlices};
use crate::stage::pool_score::pyramid_rows;
use crate::tensor::{Element, Tensor};

params!(GatherParams {
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    kv_heads: u32,
    entries: u32,
    gathered: u32,
    first_token: u32,
    end_token: u32,
});
params!(GatherBackwardParams {
    batch: u32,
    tokens: u32,
    padded_tokens: u32,
    heads: u32,
    kv_heads: u32,
    entries: u32,
    gathered: u32,
    first_token: u32,
    end_token: u32,
});

/// Records the gather of q `[B, N, H, D]`, k, v `[B, N, KV, D]` and the pyramid by `indices` `[B, H, S]`; gives
/// q~, k~ and v~, each `[B, H, S, D]`.
///
/// # Errors
/// Tensors of the wrong size, or a device that cannot hold them.
pub fn record_forward(
    recording: &mut Recording,
    shape: &Shape,
    pyramid: &Pyramid,
    [q, k, v]: [Tensor; 3],
    pooled: Tensor,
    indices: Tensor,
) -> Result<[Tensor; 3]> {
    let Shape { batch, tokens, heads, kv_heads, head_dim, element } = *shape;
    recording.require("q", q, element, &shape.q())?;
    recording.require("k", k, element, &shape.kv())?;
    recording.require("v", v, element, &shape.kv())?;
    recording.require("pyramid", pooled, element, &[batch, pyramid_rows(shape, pyramid), head_dim])?;
    recording.require("indices", indices, Element::U32, &[batch, heads, pyramid.gathered])?;
    let gathered = [batch, heads, pyramid.gathered, head_dim];
    let out = [
        recording.scratch("gathered_q", element, &gathered)?,
        recording.scratch("gathered_k", element, &gathered)?,
        recording.scratch("gathered_v", element, &gathered)?,
    ];
    let caps = recording.caps().clone();
    let kernel = Kernel::new(&caps, "lighthouse/gather").wide(element).constant("HEAD_DIM", head_dim);
    let command = Command::new("gather", reference::Gather { shape: *shape, pyramid: pyramid.clone() })
        .reads("q", q)
        .reads("k", k)
        .reads("v", v)
        .reads("pyramid", pooled)
        .reads("indices", indices)
        .writes("gathered_q", out[0])
        .writes("gathered_k", out[1])
        .writes("gathered_v", out[2])
        .by_tokens(&["q", "k", "v"])
        .dispatch_tokens(&caps, batch, TokenSlices { tokens, multiple: 1, overlap: 0 }, kernel, |batch, slice| {
            let params = GatherParams {
                tokens: tokens as u32,
                padded_tokens: pyramid.padded_tokens as u32,
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                entries: pyramid.entries as u32,
                gathered: pyramid.gathered as u32,
                first_token: slice.start as u32,
                end_token: slice.end as u32,
            };
            let workgroups =
                grid_of_rows(&caps, pyramid.gathered, rows_per_workgroup(head_dim, element), batch * heads, 3);
            Ok((params, workgroups, (3 * batch * heads * pyramid.gathered * head_dim) as u64))
        })?;
    recording.push(command)?;
    Ok(out)
}

/// Records the way back: dq~, dk~, dv~ `[B, H, S, D]` by `positions` `[B, H, P]` into `out`, which are dq
/// `[B, N, H, D]`, dk and dv `[B, N, KV, D]`.
///
/// # Errors
/// Tensors of the wrong size.
pub fn record_backward(
    recording: &mut Recording,
    shape: &Shape,
    pyramid: &Pyramid,
    [dq, dk, dv]: [Tensor; 3],
    positions: Tensor,
    out: [Tensor; 3],
) -> Result<()> {
    let Shape { batch, tokens, heads, kv_heads, head_dim, element } = *shape;
    let gathered = [batch, heads, pyramid.gathered, head_dim];
    recording.require("gathered_dq", dq, element, &gathered)?;
    recording.require("gathered_dk", dk, element, &gathered)?;
    recording.require("gathered_dv", dv, element, &gathered)?;
    recording.require("positions", positions, Element::U32, &[batch, heads, pyramid.entries])?;
    recording.require("dq", out[0], element, &shape.q())?;
    recording.require("dk", out[1], element, &shape.kv())?;
    recording.require("dv", out[2], element, &shape.kv())?;
    let caps = recording.caps().clone();
    let kernel = Kernel::new(&caps, "lighthouse/gather_backward")
        .wide(element)
        .constant("HEAD_DIM", head_dim)
        .constant("LEVELS", pyramid.levels.len())
        .constant("POOLING", pyramid.config.pooling)
        .constant("GROUP", heads / kv_heads);
    let slices = TokenSlices { tokens, multiple: pyramid.config.pooling, overlap: 0 };
    let command =
        Command::new("gather_backward", reference::GatherBackward { shape: *shape, pyramid: pyramid.clone() })
            .reads("gathered_dq", dq)
            .reads("gathered_dk", dk)
            .reads("gathered_dv", dv)
            .reads("positions", positions)
            .writes("dq", out[0])
            .writes("dk", out[1])
            .writes("dv", out[2])
            .by_tokens(&["dq", "dk", "dv"])
            .dispatch_tokens(&caps, batch, slices, kernel, |batch, slice| {
                let params = GatherBackwardParams {
                    batch: batch as u32,
                    tokens: tokens as u32,
                    padded_tokens: pyramid.padded_tokens as u32,
                    heads: heads as u32,
                    kv_heads: kv_heads as u32,
                    entries: pyramid.entries as u32,
                    gathered: pyramid.gathered as u32,
                    first_token: slice.start as u32,
                    end_token: slice.end as u32,
                };
                let rows = rows_per_workgroup(head_dim, element);
                let parents = slice.len().div_ceil(pyramid.config.pooling);
                let workgroups = grid_of_rows(&caps, parents, rows, batch * heads, 3);
                Ok((params, workgroups, (3 * batch * slice.len() * heads * head_dim * pyramid.levels.len()) as u64))
            })?;
    recording.push(command)
}
