#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use rayon::prelude::*;

use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::nn::partials;
use crate::real::{Real, axpy, dot};

use super::LinearShape;

/// Rows that a thread takes at a time, while a row of the other factor is in its cache.
const ROWS: usize = 16;

/// y\[t\] = W x\[t\], plus the residual if there is one.
pub(super) struct Forward {
    pub shape: LinearShape,
}

impl Reference for Forward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let LinearShape { inputs, outputs, .. } = self.shape;
        let mut y = args.write("c")?;
        forward(&mut y, &args.read("a")?, &args.read("b")?, [inputs, outputs]);
        if args.has("residual") {
            axpy(&mut y, T::one(), &args.read("residual")?);
        }
        Ok(())
    }
}

/// The product of [`Forward`], for every user of a linear map.
pub(in crate::nn) fn forward<T: Real>(y: &mut [T], x: &[T], weight: &[T], [inputs, outputs]: [usize; 2]) {
    y.par_chunks_mut(ROWS * outputs).zip(x.par_chunks(ROWS * inputs)).for_each(|(y, x)| {
        for (o, w) in weight.chunks_exact(inputs).enumerate() {
            for (y, x) in y.chunks_exact_mut(outputs).zip(x.chunks_exact(inputs)) {
                y[o] = dot(x, w);
            }
        }
    });
}

/// dx\[t\] = sum over outputs o of dy\[t, o\] W\[o\].
pub(super) struct BackwardInput {
    pub shape: LinearShape,
}

impl Reference for BackwardInput {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let LinearShape { inputs, outputs, .. } = self.shape;
        let mut d_x = args.write("c")?;
        backward_input(&mut d_x, &args.read("a")?, &args.read("b")?, [inputs, outputs]);
        Ok(())
    }
}

/// The product of [`BackwardInput`], for every user of a linear map.
pub(in crate::nn) fn backward_input<T: Real>(d_x: &mut [T], d_y: &[T], weight: &[T], [inputs, outputs]: [usize; 2]) {
    d_x.par_chunks_mut(ROWS * inputs).zip(d_y.par_chunks(ROWS * outputs)).for_each(|(d_x, d_y)| {
        d_x.fill(T::zero());
        for (o, w) in weight.chunks_exact(inputs).enumerate() {
            for (d_x, d_y) in d_x.chunks_exact_mut(inputs).zip(d_y.chunks_exact(outputs)) {
                axpy(d_x, d_y[o], w);
            }
        }
    });
}

/// dW\[o\] = sum over tokens t of dy\[t, o\] x\[t\].
pub(super) struct BackwardWeight {
    pub shape: LinearShape,
}

impl Reference for BackwardWeight {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let LinearShape { inputs, outputs, .. } = self.shape;
        let (d_y, x, mut d_weight) = (args.read("a")?, args.read("b")?, partials::output(args)?);
        let (d_y, x) = (&*d_y, &*x);
        d_weight.par_chunks_mut(ROWS * inputs).enumerate().for_each(|(block, d_weight)| {
            d_weight.fill(T::zero());
            for (x, d_y) in x.chunks_exact(inputs).zip(d_y.chunks_exact(outputs)) {
                for (d_weight, &d_y) in d_weight.chunks_exact_mut(inputs).zip(&d_y[block * ROWS..]) {
                    axpy(d_weight, d_y, x);
                }
            }
        });
        Ok(())
    }
}
