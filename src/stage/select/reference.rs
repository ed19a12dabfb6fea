#![allow(clippy::indexing_slicing, reason = "indices follow from the shape that the recorder checked")]

use std::cmp::Ordering;

use crate::config::{Pyramid, Shape};
use crate::cpu::{Args, Reference};
use crate::error::Result;
use crate::real::Real;

/// The cascade by sorting, the order by walking the refined trees.
pub(super) struct SelectReference {
    pub shape: Shape,
    pub pyramid: Pyramid,
}

impl Reference for SelectReference {
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()> {
        let Self { shape, pyramid } = self;
        let (score_q, score_k) = (args.read("score_q")?, args.read("score_k")?);
        let (mut indices, mut positions) = (args.write_u32("indices")?, args.write_u32("positions")?);
        positions.fill(super::ABSENT);
        for head in 0..shape.batch * shape.heads {
            let kv_head = head / shape.heads * shape.kv_heads + head % shape.heads / shape.group();
            let scores = Scores {
                pyramid,
                q: &score_q[head * pyramid.entries..][..pyramid.entries],
                k: &score_k[kv_head * pyramid.entries..][..pyramid.entries],
            };
            let mut walk = Walk {
                pyramid,
                selected: vec![Vec::new(); pyramid.levels.len()],
                indices: &mut indices[head * pyramid.gathered..][..pyramid.gathered],
                positions: &mut positions[head * pyramid.entries..][..pyramid.entries],
                emitted: 0,
            };
            for chunk in 0..pyramid.config.chunks() {
                walk.selected = scores.cascade(chunk);
                for entry in pyramid.chunk(chunk) {
                    walk.emit(pyramid.levels.len() - 1, entry);
                }
            }
        }
        Ok(())
    }
}

struct Scores<'a, T> {
    pyramid: &'a Pyramid,
    q: &'a [T],
    k: &'a [T],
}

impl<T: Real> Scores<'_, T> {
    /// The selected entries of each level in one chunk, ascending.
    fn cascade(&self, chunk: usize) -> Vec<Vec<usize>> {
        let pyramid = self.pyramid;
        let (pooling, budget) = (pyramid.config.pooling, pyramid.config.chunk);
        let mut selected = vec![Vec::new(); pyramid.levels.len()];
        let mut candidates: Vec<usize> = pyramid.chunk(chunk).collect();
        for level in (1..pyramid.levels.len()).rev() {
            let start = pyramid.levels[level].start - pyramid.padded_tokens;
            if candidates.len() > budget {
                let mut rest = candidates;
                rest.sort_by(|&a, &b| rank(self.q[start + a], self.q[start + b]).then(a.cmp(&b)));
                let mut taken: Vec<usize> = rest.drain(..budget / 2).collect();
                rest.sort_by(|&a, &b| rank(self.k[start + a], self.k[start + b]).then(a.cmp(&b)));
                taken.extend(rest.drain(..budget / 2));
                taken.sort_unstable();
                candidates = taken;
            }
            selected[level] = candidates;
            candidates = selected[level].iter().flat_map(|&i| i * pooling..(i + 1) * pooling).collect();
        }
        selected
    }
}

/// Higher scores first, NaN last.
fn rank<T: Real>(a: T, b: T) -> Ordering {
    b.partial_cmp(&a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

struct Walk<'a> {
    pyramid: &'a Pyramid,
    selected: Vec<Vec<usize>>,
    indices: &'a mut [u32],
    positions: &'a mut [u32],
    emitted: usize,
}

impl Walk<'_> {
    /// Post-order: an entry's children before it, if it is expanded.
    fn emit(&mut self, level: usize, entry: usize) {
        let expanded = self.selected[level].binary_search(&entry).is_ok();
        if expanded {
            let pooling = self.pyramid.config.pooling;
            for child in entry * pooling..(entry + 1) * pooling {
                self.emit(level - 1, child);
            }
        }
        let flat = self.pyramid.levels[level].start + entry;
        self.indices[self.emitted] = flat as u32;
        if level > 0 {
            let flag = if expanded { super::EXPANDED } else { 0 };
            self.positions[flat - self.pyramid.padded_tokens] = self.emitted as u32 | flag;
        }
        self.emitted += 1;
    }
}
