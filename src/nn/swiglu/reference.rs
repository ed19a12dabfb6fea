#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use rayon::prelude::*;

use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::nn::linear;
use crate::real::Real;

use super::SwigluShape;

/// 1 / (1 + exp(-x)), without overflow on either side.
fn sigmoid<T: Real>(x: T) -> T {
    let e = (-x.abs()).exp();
    (if x >= T::zero() { T::one() } else { e }) / (T::one() + e)
}

/// gate = x G^T, up = x U^T, y = gate sigmoid(gate) up.
pub(super) struct Forward {
    pub shape: SwigluShape,
}

impl Reference for Forward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let SwigluShape { width, hidden, .. } = self.shape;
        let (x, weight) = (args.read("a")?, args.read("b")?);
        let (mut gate_up, mut y) = (args.write("gate_up")?, args.write("y")?);
        linear::forward(&mut gate_up, &x, &weight, [width, 2 * hidden]);
        y.par_chunks_exact_mut(hidden).zip(gate_up.par_chunks_exact(2 * hidden)).for_each(|(y, gate_up)| {
            for ((y, &gate), &up) in y.iter_mut().zip(&gate_up[..hidden]).zip(&gate_up[hidden..]) {
                *y = gate * sigmoid(gate) * up;
            }
        });
        Ok(())
    }
}

/// dy = dz W; with s = sigmoid(gate): d_gate = dy up s (1 + gate (1 - s)), d_up = dy gate s, y = gate s up.
pub(super) struct Backward {
    pub shape: SwigluShape,
}

impl Reference for Backward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let SwigluShape { width, hidden, .. } = self.shape;
        let (d_z, weight, gate_up) = (args.read("a")?, args.read("b")?, args.read("gate_up")?);
        let (mut d_gate_up, mut y) = (args.write("d_gate_up")?, args.write("y")?);
        let mut d_y = vec![T::zero(); y.len()];
        linear::backward_input(&mut d_y, &d_z, &weight, [hidden, width]);
        let outputs = d_gate_up.par_chunks_exact_mut(2 * hidden).zip(y.par_chunks_exact_mut(hidden));
        let inputs = gate_up.par_chunks_exact(2 * hidden).zip(d_y.par_chunks_exact(hidden));
        outputs.zip(inputs).for_each(|((d_gate_up, y), (gate_up, d_y))| {
            let (d_gate, d_up) = d_gate_up.split_at_mut(hidden);
            for (i, &dy) in d_y.iter().enumerate() {
                let (gate, up) = (gate_up[i], gate_up[hidden + i]);
                let s = sigmoid(gate);
                d_gate[i] = dy * up * s * (T::one() + gate * (T::one() - s));
                d_up[i] = dy * gate * s;
                y[i] = gate * s * up;
            }
        });
        Ok(())
    }
}
