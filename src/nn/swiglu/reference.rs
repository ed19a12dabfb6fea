use rayon::prelude::*;

use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::real::Real;

/// 1 / (1 + exp(-x)), without overflow on either side.
fn sigmoid<T: Real>(x: T) -> T {
    let e = (-x.abs()).exp();
    (if x >= T::zero() { T::one() } else { e }) / (T::one() + e)
}

/// y = gate sigmoid(gate) up.
pub(super) struct Forward;

impl Reference for Forward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let (gate, up, mut y) = (args.read("gate")?, args.read("up")?, args.write("y")?);
        y.par_iter_mut().zip(gate.par_iter()).zip(up.par_iter()).with_min_len(1024).for_each(|((y, &gate), &up)| {
            *y = gate * sigmoid(gate) * up;
        });
        Ok(())
    }
}

/// With s = sigmoid(gate): d_gate = dy up s (1 + gate (1 - s)), d_up = dy gate s.
pub(super) struct Backward;

impl Reference for Backward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let (gate, up, d_y) = (args.read("gate")?, args.read("up")?, args.read("d_y")?);
        let (mut d_gate, mut d_up) = (args.write("d_gate")?, args.write("d_up")?);
        let outputs = d_gate.par_iter_mut().zip(d_up.par_iter_mut());
        let inputs = gate.par_iter().zip(up.par_iter()).zip(d_y.par_iter());
        outputs.zip(inputs).with_min_len(1024).for_each(|((d_gate, d_up), ((&gate, &up), &dy))| {
            let s = sigmoid(gate);
            *d_gate = dy * up * s * (T::one() + gate * (T::one() - s));
            *d_up = dy * gate * s;
        });
        Ok(())
    }
}
