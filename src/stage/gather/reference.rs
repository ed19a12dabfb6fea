#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use crate::config::{Pyramid, Shape};
use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::real::{Real, axpy};
use crate::stage::pool_score::pyramid_rows;
use crate::stage::scatter::token_or_entry;

/// Row s of head h is the token or the pyramid's entry that `indices` names.
pub(super) struct Gather {
    pub shape: Shape,
    pub pyramid: Pyramid,
}

impl Reference for Gather {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let Self { shape, pyramid } = self;
        let (indices, pooled) = (args.read_u32("indices")?, args.read("pyramid")?);
        let d = shape.head_dim;
        let tensors = [
            ("q", "gathered_q", shape.heads),
            ("k", "gathered_k", shape.kv_heads),
            ("v", "gathered_v", shape.kv_heads),
        ];
        let mut section = 0;
        for (from, to, heads) in tensors {
            let (x, mut out) = (args.read(from)?, args.write(to)?);
            for (row, out) in out.chunks_exact_mut(d).enumerate() {
                let (b, h) = (row / pyramid.gathered / shape.heads, row / pyramid.gathered % shape.heads);
                let h = h * heads / shape.heads;
                let entry = indices[row] as usize;
                if entry >= pyramid.padded_tokens {
                    let base = b * pyramid_rows(shape, pyramid) + section;
                    let row = base + (entry - pyramid.padded_tokens) * heads + h;
                    out.copy_from_slice(&pooled[row * d..][..d]);
                } else if entry < shape.tokens {
                    out.copy_from_slice(&x[((b * shape.tokens + entry) * heads + h) * d..][..d]);
                } else {
                    out.fill(T::zero());
                }
            }
            section += heads * pyramid.entries;
        }
        Ok(())
    }
}

/// dx[j] = sum over levels l of dx~[position of (l, j div p^l)] / p^l, over the query heads of the group.
pub(super) struct GatherBackward {
    pub shape: Shape,
    pub pyramid: Pyramid,
}

impl Reference for GatherBackward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let Self { shape, pyramid } = self;
        let positions = args.read_u32("positions")?;
        let d = shape.head_dim;
        for (from, to, heads) in [
            ("gathered_dq", "dq", shape.heads),
            ("gathered_dk", "dk", shape.kv_heads),
            ("gathered_dv", "dv", shape.kv_heads),
        ] {
            let (gathered, mut out) = (args.read(from)?, args.write(to)?);
            let group = shape.heads / heads;
            for (row, out) in out.chunks_exact_mut(d).enumerate() {
                let (b, j, h) = (row / heads / shape.tokens, row / heads % shape.tokens, row % heads);
                out.fill(T::zero());
                for query_head in (b * shape.heads + h * group)..(b * shape.heads + (h + 1) * group) {
                    let positions = &positions[query_head * pyramid.entries..][..pyramid.entries];
                    for (l, level) in pyramid.levels.iter().enumerate() {
                        if let Some(place) = token_or_entry(pyramid, positions, l, j / level.window) {
                            let row = &gathered[(query_head * pyramid.gathered + place) * d..][..d];
                            axpy(out, T::one() / T::count(level.window), row);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
