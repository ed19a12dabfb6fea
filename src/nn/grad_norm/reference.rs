#![allow(clippy::indexing_slicing, reason = "the norm has one element, as the recorder made it")]

use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::real::{Real, dot};

/// sqrt(sum(gradient^2)).
pub(super) struct GradNorm;

impl Reference for GradNorm {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let (gradient, mut norm) = (args.read("gradient")?, args.write("norm")?);
        norm[0] = dot(&gradient, &gradient).sqrt();
        Ok(())
    }
}
