use crate::config::Shape;
use crate::error::Result;
use crate::layer::{Forward, Gradients};
use crate::recording::Recording;
use crate::stage::flash::{self, FlashShape};
use crate::tensor::Tensor;

/// Exact causal attention over all tokens, from the caller's layout, with GQA and MQA: the dense layers and the dense
/// resume stage (spec section 9, L = 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseAttention {
    shape: Shape,
}

impl DenseAttention {
    /// A layer for tensors of this shape.
    ///
    /// # Errors
    /// [`Error::Parameter`](crate::Error::Parameter) for a shape outside spec section 9.
    pub fn new(shape: Shape) -> Result<Self> {
        shape.check()?;
        Ok(Self { shape })
    }

    /// The shape of its tensors.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    fn flash(&self) -> FlashShape {
        FlashShape::dense(&self.shape)
    }

    /// Records o = softmax(q k^T / sqrt(D), causal) v for q `[B, N, H, D]` and k, v `[B, N, KV, D]`.
    ///
    /// # Errors
    /// Tensors of the wrong size, or a device that cannot hold what is needed.
    pub fn record_forward(&self, recording: &mut Recording, [q, k, v]: [Tensor; 3]) -> Result<Forward> {
        let Shape { element, .. } = self.shape;
        recording.require("q", q, element, &self.shape.q())?;
        recording.require("k", k, element, &self.shape.kv())?;
        recording.require("v", v, element, &self.shape.kv())?;
        let attention = flash::record_forward(recording, &self.flash(), [q, k, v], None)?;
        Ok(Forward { o: attention.o, selection: None, qkv: [q, k, v], attention })
    }

    /// Records the backward of a forward of the same recording, for d_o `[B, N, H, D]`.
    ///
    /// # Errors
    /// As [`record_forward`](Self::record_forward).
    pub fn record_backward(&self, recording: &mut Recording, forward: &Forward, d_o: Tensor) -> Result<Gradients> {
        recording.require("d_o", d_o, self.shape.element, &self.shape.q())?;
        let gradients = flash::record_backward(recording, &self.flash(), forward.qkv, &forward.attention, d_o, None)?;
        Ok(Gradients { dq: gradients.dq, dk: gradients.dk, dv: gradients.dv })
    }
}
