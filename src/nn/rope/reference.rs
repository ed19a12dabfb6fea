#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use rayon::prelude::*;

use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::real::Real;

use super::RopeShape;

/// (x, y) = (x cos - y sin, y cos + x sin) for the halves x and y of each head's row; the backward has -sin.
pub(super) struct Rotation {
    pub shape: RopeShape,
    pub backward: bool,
}

impl Reference for Rotation {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let RopeShape { tokens, heads, kv_heads, head_dim, .. } = self.shape;
        let angles = args.read("angles")?;
        let angles = &*angles;
        for (name, heads) in [("q", heads), ("k", kv_heads)] {
            args.write(name)?.par_chunks_exact_mut(heads * head_dim).enumerate().for_each(|(row, heads)| {
                let (cosines, sines) = angles[row % tokens * head_dim..][..head_dim].split_at(head_dim / 2);
                for head in heads.chunks_exact_mut(head_dim) {
                    let (first, second) = head.split_at_mut(head_dim / 2);
                    for (((x, y), &cosine), &sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
                        let sine = if self.backward { -sine } else { sine };
                        (*x, *y) = (*x * cosine - *y * sine, *y * cosine + *x * sine);
                    }
                }
            });
        }
        Ok(())
    }
}
