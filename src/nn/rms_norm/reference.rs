use rayon::prelude::*;

use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::nn::partials;
use crate::real::{Real, dot};

use super::{EPSILON, RmsNormShape};

/// y = x r w, r = 1 / sqrt(mean(x^2) + epsilon).
pub(super) struct Forward {
    pub shape: RmsNormShape,
}

impl Reference for Forward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let width = self.shape.width;
        let (x, weight) = (args.read("x")?, args.read("weight")?);
        let (mut y, mut inverse_rms) = (args.write("y")?, args.write("inverse_rms")?);
        let (x, weight) = (&*x, &*weight);
        let rows = y.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).zip(inverse_rms.par_iter_mut());
        rows.for_each(|((y, x), inverse)| {
            *inverse = (dot(x, x) / T::count(width) + T::from_f32(EPSILON)).sqrt().recip();
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * *inverse * w;
            }
        });
        Ok(())
    }
}

/// dx = r g - x r^3 mean(g x) with g = dy w; dw = sum over rows of dy x r.
pub(super) struct Backward {
    pub shape: RmsNormShape,
}

impl Reference for Backward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let width = self.shape.width;
        let (x, weight) = (args.read("x")?, args.read("weight")?);
        let (inverse_rms, d_y) = (args.read("inverse_rms")?, args.read("d_y")?);
        let (mut d_x, mut d_weight) = (args.write("d_x")?, partials::output(args)?);
        d_weight.fill(T::zero());
        for ((x, d_y), &r) in x.chunks_exact(width).zip(d_y.chunks_exact(width)).zip(inverse_rms.iter()) {
            for ((d_weight, &x), &dy) in d_weight.iter_mut().zip(x).zip(d_y) {
                *d_weight += dy * x * r;
            }
        }
        let (x, d_y, weight) = (&*x, &*d_y, &*weight);
        let rows = d_x.par_chunks_exact_mut(width).zip(x.par_chunks_exact(width)).zip(d_y.par_chunks_exact(width));
        rows.zip(inverse_rms.par_iter()).for_each(|(((d_x, x), d_y), &r)| {
            for ((d_x, &dy), &w) in d_x.iter_mut().zip(d_y).zip(weight) {
                *d_x = dy * w;
            }
            let along = r * r * dot(d_x, x) / T::count(width);
            for (d_x, &x) in d_x.iter_mut().zip(x) {
                *d_x = r * (*d_x - x * along);
            }
        });
        if args.has("d_residual") {
            for (d_x, &d_residual) in d_x.iter_mut().zip(args.read("d_residual")?.iter()) {
                *d_x += d_residual;
            }
        }
        Ok(())
    }
}
