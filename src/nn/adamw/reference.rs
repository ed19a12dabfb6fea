#![allow(clippy::indexing_slicing, reason = "the schedule has the length that the recorder checked")]

use rayon::prelude::*;

use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::real::Real;

use super::{AdamW, BLOCK, CLIP_EPSILON};

/// Moments m and v of the clipped gradient g; w -= rate (m' / (sqrt(v') + epsilon) + decay w), with m' and v' corrected
/// for their start at 0.
pub(super) struct Step {
    pub adamw: AdamW,
}

impl Reference for Step {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let schedule = args.read("schedule")?;
        let [learning_rate, correction1, correction2, weight_decay, clip_norm, inverse_loss_scale] =
            [0, 1, 2, 3, 4, 5].map(|slot| schedule[slot]);
        let [beta1, beta2, epsilon] = [self.adamw.beta1, self.adamw.beta2, self.adamw.epsilon].map(T::from_f32);
        let norm = args.read("norm")?[0];
        let mut master = args.write("master")?;
        if norm.is_finite() {
            let length = norm * inverse_loss_scale + T::from_f32(CLIP_EPSILON);
            let clip = if length > clip_norm { clip_norm / length } else { T::one() };
            let scale = inverse_loss_scale * clip;
            let (gradient, decay) = (args.read("gradient")?, args.read_u32("decay")?);
            let (mut m, mut v) = (args.write("m")?, args.write("v")?);
            let moments = m.par_chunks_mut(BLOCK).zip(v.par_chunks_mut(BLOCK));
            let inputs = gradient.par_chunks(BLOCK).zip(decay.par_iter());
            master.par_chunks_mut(BLOCK).zip(moments).zip(inputs).with_min_len(16).for_each(
                |((master, (m, v)), (gradient, &decay))| {
                    let decay = weight_decay * T::count(decay as usize);
                    for (((w, m), v), &g) in master.iter_mut().zip(m).zip(v).zip(gradient) {
                        let g = g * scale;
                        *m = beta1 * *m + (T::one() - beta1) * g;
                        *v = beta2 * *v + (T::one() - beta2) * g * g;
                        let step = *m / correction1 / ((*v / correction2).sqrt() + epsilon);
                        *w = *w - learning_rate * (step + decay * *w);
                    }
                },
            );
        }
        if args.has("weights") {
            args.write("weights")?.copy_from_slice(&master);
        }
        Ok(())
    }
}
