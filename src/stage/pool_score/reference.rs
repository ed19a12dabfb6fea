#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use crate::config::{Pyramid, Shape};
use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::real::{Real, dot};

/// Means and largest token norms of every window, level by level.
pub(super) struct PoolScoreReference {
    pub shape: Shape,
    pub pyramid: Pyramid,
}

impl Reference for PoolScoreReference {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let Self { shape, pyramid } = self;
        let (mut pooled, mut score_q, mut score_k) =
            (args.write("pyramid")?, args.write("score_q")?, args.write("score_k")?);
        let rows = super::pyramid_rows(shape, pyramid);
        for b in 0..shape.batch {
            let mut rest = &mut pooled[b * rows * shape.head_dim..][..rows * shape.head_dim];
            for (name, heads) in [("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)] {
                let x = args.read(name)?;
                let x = &x[b * shape.tokens * heads * shape.head_dim..][..shape.tokens * heads * shape.head_dim];
                let (section, after) = rest.split_at_mut(pyramid.entries * heads * shape.head_dim);
                rest = after;
                pool(shape, pyramid, heads, x, section);
                match name {
                    "q" => score(shape, pyramid, heads, x, &mut score_q[b * heads * pyramid.entries..]),
                    "k" => score(shape, pyramid, heads, x, &mut score_k[b * heads * pyramid.entries..]),
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// Entry (l, i) is the mean of its p^l tokens; tokens past N are zeros. `x` is [N, heads, D], `out` [P, heads, D].
fn pool<T: Real>(shape: &Shape, pyramid: &Pyramid, heads: usize, x: &[T], out: &mut [T]) {
    let row = heads * shape.head_dim;
    let mut sums = vec![T::zero(); pyramid.padded_tokens * row];
    sums[..x.len()].copy_from_slice(x);
    for level in &pyramid.levels[1..] {
        // Sums of a level are sums of p entries of the level below.
        let below = std::mem::replace(&mut sums, vec![T::zero(); level.entries * row]);
        for (i, entry) in below.chunks_exact(row).enumerate() {
            for (sum, &x) in sums[i / pyramid.config.pooling * row..].iter_mut().zip(entry) {
                *sum += x;
            }
        }
        let start = (level.start - pyramid.padded_tokens) * row;
        for (out, &sum) in out[start..].iter_mut().zip(&sums) {
            *out = sum / T::count(level.window);
        }
    }
}

/// The largest squared norm of an entry's tokens; NaN ranks below every number. `out` is [heads, P].
fn score<T: Real>(shape: &Shape, pyramid: &Pyramid, heads: usize, x: &[T], out: &mut [T]) {
    for h in 0..heads {
        for level in &pyramid.levels[1..] {
            for i in 0..level.entries {
                let tokens = i * level.window..(i + 1) * level.window;
                let norm = |t: usize| match x.get((t * heads + h) * shape.head_dim..) {
                    Some(rest) if t < shape.tokens => dot(&rest[..shape.head_dim], &rest[..shape.head_dim]),
                    _ => T::zero(),
                };
                // `Float::max` prefers the number.
                out[h * pyramid.entries + level.start - pyramid.padded_tokens + i] =
                    tokens.map(norm).fold(T::nan(), T::max);
            }
        }
    }
}
