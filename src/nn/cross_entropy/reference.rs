#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use rayon::prelude::*;

use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::real::Real;

use super::CrossEntropyShape;

/// Per row log(sum(exp(logits))) - logits\[target\], its mean, and (softmax(logits) - onehot(target)) scale.
pub(super) struct CrossEntropy {
    pub shape: CrossEntropyShape,
    pub scale: f32,
}

impl Reference for CrossEntropy {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let CrossEntropyShape { rows, vocab, .. } = self.shape;
        let (logits, targets) = (args.read("logits")?, args.read_u32("targets")?);
        let (mut row_loss, mut loss) = (args.write("row_loss")?, args.write("loss")?);
        let row_of = |(loss, (logits, &target)): (&mut T, (&[T], &u32))| {
            let goal = (target as usize).min(vocab - 1);
            let largest = logits.iter().copied().fold(T::neg_infinity(), T::max);
            let sum: T = logits.iter().map(|&x| (x - largest).exp()).sum();
            *loss = sum.ln() + (largest - logits[goal]);
            (goal, largest, sum)
        };
        let inputs = logits.par_chunks_exact(vocab).zip(targets.par_iter());
        if args.has("d_logits") {
            let scale = T::from_f32(self.scale);
            let mut d_logits = args.write("d_logits")?;
            let outputs = row_loss.par_iter_mut().zip(d_logits.par_chunks_exact_mut(vocab));
            outputs.zip(inputs).for_each(|((loss, d_logits), (logits, target))| {
                let (goal, largest, sum) = row_of((loss, (logits, target)));
                for (i, (d, &x)) in d_logits.iter_mut().zip(logits).enumerate() {
                    let onehot = if i == goal { T::one() } else { T::zero() };
                    *d = ((x - largest).exp() / sum - onehot) * scale;
                }
            });
        } else {
            row_loss.par_iter_mut().zip(inputs).for_each(|row| {
                row_of(row);
            });
        }
        loss[0] = row_loss.iter().copied().sum::<T>() / T::count(rows);
        Ok(())
    }
}
