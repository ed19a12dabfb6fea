//! The layers: what a model calls. Each is the paper's list of stages, and its backward the same list from the end.

mod dense;
mod lighthouse;

pub use dense::DenseAttention;
pub use lighthouse::LighthouseAttention;

use crate::stage::flash::FlashForward;
use crate::stage::select::Selection;
use crate::tensor::Tensor;

/// What a forward gives, and what its backward needs of it.
#[derive(Clone, Copy, Debug)]
pub struct Forward {
    /// `[B, N, H, D]`; scratch, so [`keep`](crate::Recording::keep) it to read it or to bring a buffer for it.
    pub o: Tensor,
    /// What was selected; `None` where attention is dense.
    pub selection: Option<Selection>,
    /// What attention ran on: the layer's own inputs, or the gathered q~, k~, v~ `[B, H, S, D]`.
    qkv: [Tensor; 3],
    /// Attention's own result.
    attention: FlashForward,
}

impl Forward {
    /// For a backward whose caller did not keep q, k and v but computed them again: what dense attention runs on. The
    /// backward of Lighthouse Attention needs the gathered sub-sequences only.
    #[must_use]
    pub fn with_inputs(self, qkv: [Tensor; 3]) -> Self {
        Self { qkv: if self.selection.is_some() { self.qkv } else { qkv }, ..self }
    }
}

/// The gradients of a layer's inputs; scratch as [`Forward::o`].
#[derive(Clone, Copy, Debug)]
pub struct Gradients {
    /// `[B, N, H, D]`.
    pub dq: Tensor,
    /// `[B, N, KV, D]`.
    pub dk: Tensor,
    /// `[B, N, KV, D]`.
    pub dv: Tensor,
}
