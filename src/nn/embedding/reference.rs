#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::nn::partials;
use crate::real::{Real, axpy};

use super::EmbeddingShape;

/// x\[t\] = weight\[ids\[t\]\].
pub(super) struct Forward {
    pub shape: EmbeddingShape,
}

impl Reference for Forward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let EmbeddingShape { vocab, width, .. } = self.shape;
        let (ids, weight, mut x) = (args.read_u32("ids")?, args.read("weight")?, args.write("x")?);
        for (x, &id) in x.chunks_exact_mut(width).zip(ids.iter()) {
            let id = (id as usize).min(vocab - 1);
            x.copy_from_slice(&weight[id * width..][..width]);
        }
        Ok(())
    }
}

/// d_weight\[v\] = sum of d_x\[t\] over the tokens t whose id is v.
pub(super) struct Backward {
    pub shape: EmbeddingShape,
}

impl Reference for Backward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let EmbeddingShape { vocab, width, .. } = self.shape;
        let (ids, d_x, mut d_weight) = (args.read_u32("ids")?, args.read("d_x")?, partials::output(args)?);
        d_weight.fill(T::zero());
        for (d_x, &id) in d_x.chunks_exact(width).zip(ids.iter()) {
            let id = (id as usize).min(vocab - 1);
            axpy(&mut d_weight[id * width..][..width], T::one(), d_x);
        }
        Ok(())
    }
}
