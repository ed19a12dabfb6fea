#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use crate::config::{Pyramid, Shape};
use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::real::{Real, axpy};
use crate::stage::select::{ABSENT, EXPANDED};

/// The place of entry (l, i) in a head's sub-sequence, if it is there. A token's follows from its parent: the children
/// of an expanded entry of level 1 stand right before it.
pub(crate) fn token_or_entry(pyramid: &Pyramid, positions: &[u32], level: usize, entry: usize) -> Option<usize> {
    if level > 0 {
        let word = positions[pyramid.levels[level].start - pyramid.padded_tokens + entry];
        return (word != ABSENT).then_some((word & !EXPANDED) as usize);
    }
    let pooling = pyramid.config.pooling;
    let parent = positions[entry / pooling];
    let expanded = parent != ABSENT && parent & EXPANDED != 0;
    expanded.then(|| (parent & !EXPANDED) as usize - pooling + entry % pooling)
}

/// o[j] = sum of o~ over the entries (l, i) with i = (j - p^l + 1) div p^l.
pub(super) struct Scatter {
    pub shape: Shape,
    pub pyramid: Pyramid,
}

impl Reference for Scatter {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let Self { shape, pyramid } = self;
        let (gathered, positions, mut o) = (args.read("gathered_o")?, args.read_u32("positions")?, args.write("o")?);
        let d = shape.head_dim;
        for (row, out) in o.chunks_exact_mut(d).enumerate() {
            let (b, j, h) = (row / shape.heads / shape.tokens, row / shape.heads % shape.tokens, row % shape.heads);
            let head = b * shape.heads + h;
            let positions = &positions[head * pyramid.entries..][..pyramid.entries];
            out.fill(T::zero());
            for (l, level) in pyramid.levels.iter().enumerate().filter(|(_, level)| j + 1 >= level.window) {
                if let Some(place) = token_or_entry(pyramid, positions, l, (j + 1 - level.window) / level.window) {
                    axpy(out, T::one(), &gathered[(head * pyramid.gathered + place) * d..][..d]);
                }
            }
        }
        Ok(())
    }
}

/// do~[s] = sum of do over the tokens that entry s writes: [i p^l + p^l - 1, i p^l + 2 p^l - 2], cut at N.
pub(super) struct ScatterBackward {
    pub shape: Shape,
    pub pyramid: Pyramid,
}

impl Reference for ScatterBackward {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let Self { shape, pyramid } = self;
        let (d_o, positions) = (args.read("d_o")?, args.read_u32("positions")?);
        let mut gathered = args.write("gathered_d_o")?;
        let d = shape.head_dim;
        for (head, rows) in gathered.chunks_exact_mut(pyramid.gathered * d).enumerate() {
            let (b, h) = (head / shape.heads, head % shape.heads);
            let positions = &positions[head * pyramid.entries..][..pyramid.entries];
            rows.fill(T::zero());
            for (l, level) in pyramid.levels.iter().enumerate() {
                for entry in 0..level.entries {
                    let Some(place) = token_or_entry(pyramid, positions, l, entry) else { continue };
                    let first = entry * level.window + level.window - 1;
                    for j in first..(first + level.window).min(shape.tokens) {
                        axpy(
                            &mut rows[place * d..][..d],
                            T::one(),
                            &d_o[((b * shape.tokens + j) * shape.heads + h) * d..][..d],
                        );
                    }
                }
            }
        }
        Ok(())
    }
}
