//! What a layer is asked to compute: [`LighthouseConfig`] and [`Shape`], and the sizes that follow from them.

use crate::error::{Error, Result};
use crate::tensor::Element;

/// Shape of a layer's tensors (spec section 1): q and o are `[batch, tokens, heads, head_dim]`, k and v
/// `[batch, tokens, kv_heads, head_dim]`, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// B, independent sequences.
    pub batch: usize,
    /// N, tokens of each.
    pub tokens: usize,
    /// H, query heads.
    pub heads: usize,
    /// KV, key and value heads; query head h reads kv head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// D, a multiple of 8 from 8 to 256.
    pub head_dim: usize,
    /// Storage type of q, k, v, o and their gradients.
    pub element: Element,
}

/// Largest head_dim that the kernels take.
pub const MAX_HEAD_DIM: usize = 256;

impl Shape {
    /// Checks spec section 9.
    ///
    /// # Errors
    /// [`Error::Parameter`] naming the parameter, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        for (parameter, value) in
            [("batch", self.batch), ("tokens", self.tokens), ("heads", self.heads), ("kv_heads", self.kv_heads)]
        {
            if value == 0 {
                return Err(Error::parameter(parameter, value, "at least 1"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::parameter("kv_heads", self.kv_heads, format!("a divisor of heads = {}", self.heads)));
        }
        if self.head_dim == 0 || self.head_dim > MAX_HEAD_DIM || !self.head_dim.is_multiple_of(8) {
            return Err(Error::parameter(
                "head_dim",
                self.head_dim,
                format!("a multiple of 8 from 8 to {MAX_HEAD_DIM}"),
            ));
        }
        if self.element == Element::U32 {
            return Err(Error::parameter("element", self.element, "f32 or f16"));
        }
        Ok(())
    }

    /// Shape of q and o.
    pub fn q(&self) -> [usize; 4] {
        [self.batch, self.tokens, self.heads, self.head_dim]
    }

    /// Shape of k and v.
    pub fn kv(&self) -> [usize; 4] {
        [self.batch, self.tokens, self.kv_heads, self.head_dim]
    }

    /// Query heads that share a kv head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads.max(1)
    }
}

/// The pyramid and the selection budget, in the paper's words. The defaults are those that the paper recommends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LighthouseConfig {
    /// L: level 0 is the tokens; 1 is plain dense attention.
    pub levels: usize,
    /// p: tokens of level l that one entry of level l + 1 covers; a power of two.
    pub pooling: usize,
    /// k: entries that are expanded per level; a multiple of `chunk`.
    pub top_k: usize,
    /// m: the budget of one chunk of the coarsest level; even.
    pub chunk: usize,
}

impl Default for LighthouseConfig {
    fn default() -> Self {
        Self { levels: 3, pooling: 4, top_k: 1536, chunk: 128 }
    }
}

/// One level of the pyramid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    /// Entries of the level.
    pub entries: usize,
    /// Tokens that an entry covers, p^l.
    pub window: usize,
    /// Sizes of all finer levels together, level 0 included: entry (l, i) has the flat index `start + i`.
    pub start: usize,
}

/// Sizes that follow from a config and a number of tokens. All of them are known before any data is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pyramid {
    /// The config.
    pub config: LighthouseConfig,
    /// Tokens, rounded up to a multiple of the coarsest window.
    pub padded_tokens: usize,
    /// Levels 0 to L - 1.
    pub levels: Vec<Level>,
    /// P, entries of the levels above 0.
    pub entries: usize,
    /// S, length of the gathered sub-sequence.
    pub gathered: usize,
}

impl LighthouseConfig {
    /// Chunks of the coarsest level, C.
    pub fn chunks(&self) -> usize {
        self.top_k / self.chunk.max(1)
    }

    /// Checks spec section 9 against a number of tokens and derives all sizes.
    ///
    /// # Errors
    /// [`Error::Parameter`] naming the parameter, its value and what is allowed; [`Error::Limit`] when entry indices
    /// would not fit 31 bits.
    pub fn pyramid(&self, tokens: usize) -> Result<Pyramid> {
        let Self { levels, pooling, top_k, chunk } = *self;
        if tokens == 0 {
            return Err(Error::parameter("tokens", tokens, "at least 1"));
        }
        if levels == 0 || levels > 16 {
            return Err(Error::parameter("levels", levels, "from 1 to 16"));
        }
        if pooling < 2 || !pooling.is_power_of_two() {
            return Err(Error::parameter("pooling", pooling, "a power of two, at least 2"));
        }
        if chunk < 2 || !chunk.is_multiple_of(2) {
            return Err(Error::parameter("chunk", chunk, "even, at least 2"));
        }
        if top_k == 0 || !top_k.is_multiple_of(chunk) {
            return Err(Error::parameter("top_k", top_k, format!("a positive multiple of chunk = {chunk}")));
        }
        let coarsest = u32::try_from(levels - 1).ok().and_then(|exponent| pooling.checked_pow(exponent));
        // Positions carry a flag in bit 31.
        let padded = coarsest.and_then(|window| tokens.checked_next_multiple_of(window)).filter(|&n| n < 1 << 30);
        let (Some(coarsest), Some(padded_tokens)) = (coarsest, padded) else {
            return Err(Error::Limit {
                what: format!("a pyramid of {levels} levels with pooling {pooling} over {tokens} tokens"),
                needed: u64::MAX,
                limit: "entry index",
                available: 1 << 30,
            });
        };
        let entries_of_coarsest = padded_tokens / coarsest;
        let chunks = self.chunks();
        if chunks > 65_535 {
            return Err(Error::parameter("top_k", top_k, format!("at most 65535 chunks of {chunk}")));
        }
        if levels > 1 && chunks > entries_of_coarsest {
            return Err(Error::parameter(
                "top_k",
                top_k,
                format!(
                    "at most chunk * entries of the coarsest level = {chunk} * {entries_of_coarsest} = {}",
                    chunk * entries_of_coarsest
                ),
            ));
        }
        let mut list = Vec::with_capacity(levels);
        let (mut window, mut start) = (1, 0);
        for _ in 0..levels {
            let entries = padded_tokens / window;
            list.push(Level { entries, window, start });
            start += entries;
            window *= pooling;
        }
        let gathered = if levels == 1 {
            padded_tokens
        } else {
            let chunk_of = |c: usize| (c + 1) * entries_of_coarsest / chunks - c * entries_of_coarsest / chunks;
            (0..chunks).map(|c| self.emitted(chunk_of(c))).sum()
        };
        Ok(Pyramid { config: *self, padded_tokens, levels: list, entries: start - padded_tokens, gathered })
    }

    /// Sub-sequence entries that a chunk with `candidates` coarsest entries gives: all of these, and p children for
    /// each entry that is selected at a level, min(m, candidates).
    fn emitted(&self, candidates: usize) -> usize {
        let (mut candidates, mut emitted) = (candidates, candidates);
        for _ in 1..self.levels {
            candidates = self.pooling * candidates.min(self.chunk);
            emitted += candidates;
        }
        emitted
    }
}

impl Pyramid {
    /// Tokens that an entry of the coarsest level covers, p^(L-1).
    pub fn coarsest_window(&self) -> usize {
        self.levels.last().map_or(1, |level| level.window)
    }

    /// The coarsest entries of chunk c: [floor(c n / C), floor((c+1) n / C)).
    pub fn chunk(&self, c: usize) -> std::ops::Range<usize> {
        let n = self.levels.last().map_or(0, |level| level.entries);
        let chunks = self.config.chunks().max(1);
        c * n / chunks..(c + 1) * n / chunks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathered_length_is_the_specs_formula() -> Result<()> {
        // Spec section 12, column S.
        for (levels, tokens, top_k, gathered) in [
            (3, 32_768, 2048, 18_432),
            (3, 98_304, 1536, 18_432),
            (3, 131_072, 2048, 24_576),
            (4, 262_144, 2048, 28_672),
            (4, 524_288, 2048, 32_768),
        ] {
            let config = LighthouseConfig { levels, pooling: 4, top_k, chunk: 128 };
            assert_eq!(config.pyramid(tokens)?.gathered, gathered);
        }
        Ok(())
    }

    #[test]
    fn bad_parameters_are_named() {
        let good = LighthouseConfig { levels: 2, pooling: 2, top_k: 128, chunk: 128 };
        for (config, tokens, named) in [
            (LighthouseConfig { levels: 0, ..good }, 1024, "levels = 0"),
            (LighthouseConfig { pooling: 3, ..good }, 1024, "pooling = 3"),
            (LighthouseConfig { pooling: 1, ..good }, 1024, "pooling = 1"),
            (LighthouseConfig { chunk: 7, ..good }, 1024, "chunk = 7"),
            (LighthouseConfig { top_k: 100, ..good }, 1024, "top_k = 100"),
            (LighthouseConfig { top_k: 0, ..good }, 1024, "top_k = 0"),
            (LighthouseConfig { top_k: 1280, ..good }, 8, "top_k = 1280"),
            (good, 0, "tokens = 0"),
            (LighthouseConfig { levels: 16, pooling: 1 << 10, ..good }, 8, "pyramid of 16 levels"),
        ] {
            let message = config.pyramid(tokens).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(named), "{config:?} gave {message:?}");
        }
    }

    #[test]
    fn bad_shapes_are_named() {
        let good = Shape { batch: 1, tokens: 5, heads: 4, kv_heads: 2, head_dim: 16, element: Element::F32 };
        assert_eq!(good.check(), Ok(()));
        for (shape, named) in [
            (Shape { batch: 0, ..good }, "batch = 0"),
            (Shape { tokens: 0, ..good }, "tokens = 0"),
            (Shape { heads: 0, ..good }, "heads = 0"),
            (Shape { kv_heads: 3, ..good }, "kv_heads = 3"),
            (Shape { head_dim: 12, ..good }, "head_dim = 12"),
            (Shape { head_dim: 264, ..good }, "head_dim = 264"),
            (Shape { element: Element::U32, ..good }, "element = u32"),
        ] {
            let message = shape.check().err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(named), "{shape:?} gave {message:?}");
        }
    }
}
