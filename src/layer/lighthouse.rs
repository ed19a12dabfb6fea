use crate::config::{LighthouseConfig, Pyramid, Shape};
use crate::error::Result;
use crate::layer::{DenseAttention, Forward, Gradients};
use crate::recording::Recording;
use crate::stage::flash::{self, FlashShape};
use crate::stage::select::Selection;
use crate::stage::{gather, pool_score, scatter, select};
use crate::tensor::Tensor;

/// Lighthouse Attention (spec; paper section 3): dense attention over a sub-sequence that a pyramid's cascade selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LighthouseAttention {
    shape: Shape,
    pyramid: Pyramid,
}

impl LighthouseAttention {
    /// A layer for tensors of this shape. With one level it is [`DenseAttention`].
    ///
    /// # Errors
    /// [`Error::Parameter`](crate::Error::Parameter) for a shape or a config outside spec section 9.
    pub fn new(config: LighthouseConfig, shape: Shape) -> Result<Self> {
        shape.check()?;
        Ok(Self { shape, pyramid: config.pyramid(shape.tokens)? })
    }

    /// The shape of its tensors.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The sizes of its pyramid and sub-sequence.
    pub fn pyramid(&self) -> &Pyramid {
        &self.pyramid
    }

    fn is_dense(&self) -> bool {
        self.pyramid.levels.len() == 1
    }

    /// The sub-sequence's attention: every query head has a selection of its own, so there is no sharing of kv heads.
    fn flash(&self) -> FlashShape {
        FlashShape::gathered(&self.shape, self.pyramid.gathered)
    }

    /// Records the layer for q `[B, N, H, D]` and k, v `[B, N, KV, D]`, scored by their norms.
    ///
    /// # Errors
    /// Tensors of the wrong size, or a device that cannot hold what is needed.
    pub fn record_forward(&self, recording: &mut Recording, qkv: [Tensor; 3]) -> Result<Forward> {
        self.record(recording, qkv, None)
    }

    /// Records the layer with scores of the caller's in place of the norms: `[B, H, P]` for queries and `[B, KV, P]`
    /// for keys, f32, where P counts the entries of levels 1 and up, the finest level first
    /// ([`pyramid`](Self::pyramid) has the sizes). Only their order matters.
    ///
    /// # Errors
    /// As [`record_forward`](Self::record_forward).
    pub fn record_forward_scored(
        &self,
        recording: &mut Recording,
        qkv: [Tensor; 3],
        scores: [Tensor; 2],
    ) -> Result<Forward> {
        self.record(recording, qkv, Some(scores))
    }

    fn record(&self, recording: &mut Recording, qkv: [Tensor; 3], scores: Option<[Tensor; 2]>) -> Result<Forward> {
        let Self { shape, pyramid } = self;
        if self.is_dense() {
            return DenseAttention::new(*shape)?.record_forward(recording, qkv);
        }
        let pooled = pool_score::record(recording, shape, pyramid, qkv)?;
        let scores = scores.unwrap_or([pooled.score_q, pooled.score_k]);
        let selection = select::record(recording, shape, pyramid, scores)?;
        let gathered = gather::record_forward(recording, shape, pyramid, qkv, pooled.pyramid, selection.indices)?;
        let attention = flash::record_forward(recording, &self.flash(), gathered, None)?;
        let o = self.record_scatter(recording, attention.o, &selection)?;
        Ok(Forward { o, selection: Some(selection), qkv: gathered, attention })
    }

    fn record_scatter(&self, recording: &mut Recording, from: Tensor, selection: &Selection) -> Result<Tensor> {
        let o = recording.scratch("o", self.shape.element, &self.shape.q())?;
        scatter::record_forward(recording, &self.shape, &self.pyramid, from, selection.positions, o)?;
        Ok(o)
    }

    /// Records o of a forward of the same recording once more, from what its backward keeps of it: a scatter, for callers
    /// who would keep o itself until then. Dense attention's own backward needs o, which is given back.
    ///
    /// # Errors
    /// As [`record_forward`](Self::record_forward).
    pub fn record_output(&self, recording: &mut Recording, forward: &Forward) -> Result<Tensor> {
        match &forward.selection {
            Some(selection) => self.record_scatter(recording, forward.attention.o, selection),
            None => Ok(forward.o),
        }
    }

    /// Records the backward of a forward of the same recording, for d_o `[B, N, H, D]`. Selection has no gradient: the
    /// forward's is used again.
    ///
    /// # Errors
    /// As [`record_forward`](Self::record_forward).
    pub fn record_backward(&self, recording: &mut Recording, forward: &Forward, d_o: Tensor) -> Result<Gradients> {
        let Self { shape, pyramid } = self;
        let Some(selection) = forward.selection else {
            return DenseAttention::new(*shape)?.record_backward(recording, forward, d_o);
        };
        let gathered_d_o = scatter::record_backward(recording, shape, pyramid, d_o, selection.positions)?;
        let gathered =
            flash::record_backward(recording, &self.flash(), forward.qkv, &forward.attention, gathered_d_o, None)?;
        let out = Gradients {
            dq: recording.scratch("dq", shape.element, &shape.q())?,
            dk: recording.scratch("dk", shape.element, &shape.kv())?,
            dv: recording.scratch("dv", shape.element, &shape.kv())?,
        };
        let (from, to) = ([gathered.dq, gathered.dk, gathered.dv], [out.dq, out.dk, out.dv]);
        gather::record_backward(recording, shape, pyramid, from, selection.positions, to)?;
        Ok(out)
    }
}
