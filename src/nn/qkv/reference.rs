#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use rayon::prelude::*;

use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::nn::linear;
use crate::real::Real;

use super::QkvShape;

/// (x, y) = (x cos - y sin, y cos + x sin) for the halves x and y of a head's row; the backward has -sin.
fn turn<T: Real>(head: &mut [T], angles: &[T], backward: bool) {
    let half = head.len() / 2;
    let ((first, second), (cosines, sines)) = (head.split_at_mut(half), angles.split_at(half));
    for (((x, y), &cosine), &sine) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
        let sine = if backward { -sine } else { sine };
        (*x, *y) = (*x * cosine - *y * sine, *y * cosine + *x * sine);
    }
}

/// (q, k, v)\[t\] = W x\[t\], with q and k turned.
pub(super) struct Forward {
    pub shape: QkvShape,
}

impl Reference for Forward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let QkvShape { tokens, width, heads, kv_heads, head_dim, .. } = self.shape;
        let (x, weight, angles) = (args.read("a")?, args.read("b")?, args.read("angles")?);
        let angles = &*angles;
        let mut first = 0;
        for (name, heads, turned) in [("q", heads, true), ("k", kv_heads, true), ("v", kv_heads, false)] {
            let columns = heads * head_dim;
            let mut y = args.write(name)?;
            linear::forward(&mut y, &x, &weight[first * width..][..columns * width], [width, columns]);
            first += columns;
            if turned {
                y.par_chunks_exact_mut(columns).enumerate().for_each(|(row, heads)| {
                    let angles = &angles[row % tokens * head_dim..][..head_dim];
                    heads.chunks_exact_mut(head_dim).for_each(|head| turn(head, angles, false));
                });
            }
        }
        Ok(())
    }
}

/// The rows of dq, dk and dv side by side, with dq and dk turned back.
pub(super) struct Backward {
    pub shape: QkvShape,
}

impl Reference for Backward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let QkvShape { tokens, heads, kv_heads, head_dim, .. } = self.shape;
        let (angles, d_q, d_k, d_v) = (args.read("angles")?, args.read("d_q")?, args.read("d_k")?, args.read("d_v")?);
        let mut d_qkv = args.write("d_qkv")?;
        let (angles, d_q, d_k, d_v) = (&*angles, &*d_q, &*d_k, &*d_v);
        let (columns, kv_columns) = (heads * head_dim, kv_heads * head_dim);
        d_qkv.par_chunks_exact_mut(self.shape.outputs()).enumerate().for_each(|(row, out)| {
            out[..columns].copy_from_slice(&d_q[row * columns..][..columns]);
            out[columns..][..kv_columns].copy_from_slice(&d_k[row * kv_columns..][..kv_columns]);
            out[columns + kv_columns..].copy_from_slice(&d_v[row * kv_columns..][..kv_columns]);
            let angles = &angles[row % tokens * head_dim..][..head_dim];
            out[..columns + kv_columns].chunks_exact_mut(head_dim).for_each(|head| turn(head, angles, true));
        });
        Ok(())
    }
}
