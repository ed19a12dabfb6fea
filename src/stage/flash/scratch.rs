//! The backward with five products: which heads and queries are done at a time, so that their d_scores fit the memory for
//! them, and how long that takes. Its kernels' tiles are in `coop`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::FlashShape;
use super::coop::{Matrices, dkdv, dkdv_sum, dq_from_ds, dq_sum};
use super::plan::Tile;
use crate::gpu::Caps;
use crate::tensor::Element;

/// Workgroups of `flash_backward_dq_from_ds_coop` that keep a large GPU busy to the end: with fewer, several share a
/// block of queries, each with at least this many blocks of keys. Where even so there are fewer, they are made of
/// more subgroups.
const DQ_WORKGROUPS: usize = 512;
const LEAST_PART: usize = 16;
/// Steps in which the largest chunks that fit are looked for.
const LARGE_STEPS: usize = 64;
/// Storage buffers of the kernels that write d_scores.
const SCRATCH_BINDINGS: u32 = 9;

// What the time of a backward is predicted from, as measured on an H100. The unit is the work of one of its
// multiprocessors, each of which has one workgroup at a time, on a pair of a block of queries and one of keys for dk and dv:
// 7.1 us.

/// Beginning and end of one, and what the mask costs its first tiles; the same without a mask, for keys before the chunk.
const START: f64 = 3.0;
const START_BEFORE: f64 = 2.0;
/// Reading or writing its dk and dv between dispatches, and reading them for `flash_backward_dkdv_sum`.
const CARRY: f64 = 0.25;
/// A pair in `flash_backward_dq_from_ds_coop`, and a workgroup of several that share a block.
const DQ: f64 = 0.3;
const DQ_PART: f64 = 4.0;
/// A pair in `flash_backward_dq_coop`.
const DQ_RECOMPUTED: f64 = 0.9;
/// The dispatches of a chunk, one after the other.
const LAUNCH: f64 = 2.0;
/// These times are known to some 2 %, and memory is worth that much: all of it this part of the time.
const MEMORY: f64 = 0.045;

/// Heads that the backward with scratch memory takes at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Heads {
    /// Counted over the batch, each `parts` times.
    pub kv_heads: Range<usize>,
    /// Query heads of the group of each, or of the part of it.
    pub members: Range<usize>,
    /// Parts of a group.
    pub parts: usize,
}

impl Heads {
    /// Kv heads that are counted once, with their groups in so many parts.
    pub fn in_parts(&self, parts: usize) -> Self {
        let Self { kv_heads, members, .. } = self;
        Self {
            kv_heads: kv_heads.start * parts..kv_heads.end * parts,
            members: members.start / parts..members.end / parts,
            parts,
        }
    }
}

/// Queries that it takes at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// In blocks of d_scores.
    pub blocks: Range<usize>,
    /// Workgroups that share a block of queries of dq.
    pub dq_parts: usize,
}

impl Chunk {
    pub fn queries(&self, block: usize, tokens: usize) -> Range<usize> {
        self.blocks.start * block..(self.blocks.end * block).min(tokens)
    }

    /// Pairs of a block of its queries and a block of keys that they see.
    fn pairs(&self) -> usize {
        pairs_before(self.blocks.end) - pairs_before(self.blocks.start)
    }
}

/// Pairs of the first blocks of queries and the keys that they see.
fn pairs_before(blocks: usize) -> usize {
    blocks * (blocks + 1) / 2
}

/// A chunk of so many heads.
fn chunk(blocks: Range<usize>, heads: usize) -> Chunk {
    let mut chunk = Chunk { blocks, dq_parts: 1 };
    let most = chunk.pairs() / (chunk.blocks.len() * LEAST_PART);
    chunk.dq_parts = DQ_WORKGROUPS.div_ceil(heads * chunk.blocks.len()).min(most).max(1);
    chunk
}

/// Cuts blocks of queries into this many chunks, or fewer, of about as many pairs each.
fn equal_chunks(blocks: usize, count: usize, heads: usize) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut start = 0;
    for end in 1..=blocks {
        if pairs_before(end) * count >= pairs_before(blocks) * (chunks.len() + 1) {
            chunks.push(chunk(start..end, heads));
            start = end;
        }
    }
    chunks
}

/// Cuts them into chunks of at most so many pairs, as large as may be from the last on; `None` if a block has more.
fn large_chunks(blocks: usize, pairs: usize, heads: usize) -> Option<Vec<Chunk>> {
    if blocks > pairs {
        return None;
    }
    let mut chunks = Vec::new();
    let mut end = blocks;
    for start in (0..blocks).rev() {
        if start == 0 || pairs_before(end) - pairs_before(start - 1) > pairs {
            chunks.push(chunk(start..end, heads));
            end = start;
        }
    }
    chunks.reverse();
    Some(chunks)
}

/// The backward with five products: d_scores go through memory, for some heads and some queries at a time.
#[derive(Clone, Debug)]
pub(super) struct BackwardWithScratch {
    /// Writes d_scores.
    pub dkdv: Tile,
    /// Workgroups of it that share a block of keys: each takes some query heads of the group.
    pub dkdv_parts: usize,
    /// Adds what they give.
    pub dkdv_sum: Tile,
    /// Reads them.
    pub dq: Tile,
    /// Adds what workgroups of it that share a block of queries give.
    pub dq_sum: Tile,
    /// Kv heads at a time, counted over the batch.
    pub kv_heads: usize,
    /// Query heads of the group of each at a time.
    pub members: usize,
    /// Queries of those at a time.
    pub chunks: Vec<Chunk>,
    /// f16 of d_scores.
    pub ds_len: usize,
    /// f32 of dk and dv between one dispatch and the next.
    pub carried_len: usize,
    /// f32 of the parts of dq.
    pub partial_len: usize,
}

impl BackwardWithScratch {
    /// The heads at a time, in order. Those of a group come one after the other, as dk and dv are carried.
    pub fn heads(&self, shape: &FlashShape) -> Vec<Heads> {
        let (kv_heads, group) = (shape.batch * shape.kv_heads, shape.heads / shape.kv_heads);
        let parts = |count: usize, at_once: usize| {
            (0..count).step_by(at_once).map(move |first| first..(first + at_once).min(count))
        };
        let of_group = |kv_heads: Range<usize>| {
            parts(group, self.members).map(move |members| Heads { kv_heads: kv_heads.clone(), members, parts: 1 })
        };
        parts(kv_heads, self.kv_heads).flat_map(of_group).collect()
    }

    /// Whether its memory is within `Caps::scratch_bytes` and what a binding can hold.
    fn fits(&self, caps: &Caps) -> bool {
        let most = caps.limits.max_storage_buffer_binding_size.min(caps.limits.max_buffer_size);
        self.bytes() <= caps.scratch_bytes && 2 * self.ds_len as u64 <= most && 4 * self.carried_len as u64 <= most
    }

    /// Bytes of its memory.
    fn bytes(&self) -> u64 {
        2 * self.ds_len as u64 + 4 * (self.carried_len + self.partial_len) as u64
    }

    /// Predicted time of all its dispatches. It is for large GPUs; on small ones plans differ by less.
    fn time(&self, caps: &Caps, shape: &FlashShape) -> f64 {
        let processors = caps.processors.get() as f64;
        // As if every part of the kv heads had as many as the first.
        let of_chunk = |members: &Range<usize>, chunk: &Chunk| {
            let heads = self.kv_heads * self.members;
            let parts = if chunk.dq_parts > 1 { heads * chunk.blocks.len() * chunk.dq_parts } else { 0 };
            let dq = DQ * (heads * chunk.pairs()) as f64 + DQ_PART * parts as f64;
            self.dkdv_time(caps, shape, members, chunk) + dq / processors + LAUNCH
        };
        let blocks = self.chunks.last().map_or(0, |chunk| chunk.blocks.end);
        let dkdv_sum = if self.dkdv_parts > 1 {
            CARRY * (self.kv_heads * self.dkdv_parts * blocks) as f64 / processors + LAUNCH
        } else {
            0.0
        };
        let of_heads =
            |heads: &Heads| self.chunks.iter().map(|chunk| of_chunk(&heads.members, chunk)).sum::<f64>() + dkdv_sum;
        let heads = self.heads(shape);
        let group = heads.iter().take_while(|heads| heads.kv_heads.start == 0);
        let rounds = (shape.batch * shape.kv_heads).div_ceil(self.kv_heads);
        rounds as f64 * group.map(of_heads).sum::<f64>()
    }

    /// The part of `dkdv` in that: each multiprocessor takes the next workgroup when it has done one.
    fn dkdv_time(&self, caps: &Caps, shape: &FlashShape, members: &Range<usize>, chunk: &Chunk) -> f64 {
        let processors = caps.processors.get();
        let Range { start, end } = chunk.blocks;
        let (kv_heads, members_of_part) = (self.kv_heads * self.dkdv_parts, self.members / self.dkdv_parts);
        let cost = |queries: usize, start: f64| (members_of_part * queries) as f64 + start;
        let of_all = shape.tokens <= end * self.dq.block_n && members.end == shape.heads / shape.kv_heads;
        let last = of_all && self.dkdv_parts == 1;
        let (read, written) = (f64::from(members.start > 0), f64::from(!last));
        let carried = read + written;
        // Workgroups for keys before the chunk have equal work.
        let (equal, of_equal) = (kv_heads * start, cost(end - start, START_BEFORE + CARRY * (1.0 + written)));
        let busy = |i: usize| (equal / processors + usize::from(i < equal % processors)) as f64 * of_equal;
        let mut free: BinaryHeap<Reverse<u64>> = (0..processors).map(|i| Reverse(ticks(busy(i)))).collect();
        let mut time = ticks(busy(0));
        for queries in (1..=end - start).rev() {
            for _ in 0..kv_heads {
                if let Some(mut first) = free.peek_mut() {
                    first.0 += ticks(cost(queries, START + CARRY * carried));
                    time = time.max(first.0);
                }
            }
        }
        time as f64 / TICKS
    }
}

/// Times as whole numbers, which have an order.
const TICKS: f64 = 64.0;

fn ticks(time: f64) -> u64 {
    (time * TICKS) as u64
}

/// Plans it for as many heads and as many queries at a time as is fastest within `Caps::scratch_bytes` and a binding.
/// Where nothing fits, or only what is slower, the backward computes scores twice, with seven products.
pub(super) fn backward_with_scratch(caps: &Caps, shape: &FlashShape) -> Option<BackwardWithScratch> {
    let FlashShape { batch, tokens, heads, head_dim, element, .. } = *shape;
    let matrices = Matrices::new(caps, head_dim, element)?;
    let dkdv_tile = |parts| dkdv(caps, head_dim, element, Some(parts));
    let block_n = dkdv_tile(1)?.block_n;
    // The kernel has bindings more than the others; slices of the batch are not for it.
    let limits = &caps.limits;
    let largest = batch as u64 * tokens as u64 * heads as u64 * head_dim as u64 * element.bytes();
    let fits = matrices.lanes_have_16_bytes()
        && limits.max_storage_buffers_per_shader_stage >= SCRATCH_BINDINGS
        && largest <= limits.max_storage_buffer_binding_size;
    if !fits {
        return None;
    }
    let [dq, dq_of_few] = [dq_from_ds(caps, head_dim, element, 2)?, dq_from_ds(caps, head_dim, element, 4)?];
    let (kv_heads, group) = (batch * shape.kv_heads, heads / shape.kv_heads);
    let block = dq.block_n;
    let blocks = tokens.div_ceil(block);
    let with = |(at_once, members, dkdv_parts): (usize, usize, usize), chunks: Vec<Chunk>| {
        let dkdv = dkdv_tile(dkdv_parts)?;
        let of_heads = at_once * members * block;
        let largest = chunks.iter().map(Chunk::pairs).max().unwrap_or(0);
        let workgroups = |chunk: &Chunk| chunk.dq_parts * chunk.blocks.len();
        let few = chunks.iter().all(|chunk| at_once * members * workgroups(chunk) < DQ_WORKGROUPS);
        let dq = if few { &dq_of_few } else { &dq };
        let partial = chunks.iter().filter(|chunk| chunk.dq_parts > 1).map(workgroups).max().unwrap_or(0);
        let key_blocks = blocks * (block / block_n);
        let carried = if chunks.len() > 1 || members < group || dkdv_parts > 1 {
            at_once * dkdv_parts * key_blocks * (2 * block_n * head_dim + 4)
        } else {
            0
        };
        Some(BackwardWithScratch {
            dkdv_sum: dkdv_sum(&dkdv, &matrices, dkdv_parts),
            dkdv,
            dkdv_parts,
            dq: dq.clone(),
            dq_sum: dq_sum(dq),
            kv_heads: at_once,
            members,
            ds_len: of_heads * block * largest,
            // A binding is not empty.
            carried_len: carried.max(4),
            partial_len: (of_heads * head_dim * partial).max(4),
            chunks,
        })
    };
    // Of each number of heads the fewest equal chunks and the largest ones; kv heads in equal numbers as far as they divide.
    let equal = (1..=kv_heads).filter(|&at_once| kv_heads.div_ceil(kv_heads.div_ceil(at_once)) == at_once);
    let divisors = move || (1..=group).filter(move |n| group.is_multiple_of(*n));
    let candidates = equal.flat_map(|at_once| {
        let some_of_group = divisors().map(move |members| (at_once, members, 1));
        some_of_group.chain(divisors().skip(1).map(move |parts| (at_once, group, parts)))
    });
    let plans = candidates.flat_map(|heads| {
        let count = heads.0 * heads.1;
        let bytes_of_pair = Element::F16.bytes() * (count * block * block) as u64;
        let least = bytes_of_pair * pairs_before(blocks) as u64 / caps.scratch_bytes.max(1);
        let equal = (least.max(1) as usize..=blocks).map(|chunks| equal_chunks(blocks, chunks, count));
        let fewest = equal.filter_map(|chunks| with(heads, chunks)).find(|plan| plan.fits(caps));
        // What is carried and the parts of dq take memory too.
        let most = (caps.scratch_bytes / bytes_of_pair) as usize;
        let large = (1..=LARGE_STEPS).rev().map_while(|step| large_chunks(blocks, most * step / LARGE_STEPS, count));
        let largest = large.filter_map(|chunks| with(heads, chunks)).find(|plan| plan.fits(caps));
        fewest.into_iter().chain(largest)
    });
    let plans: Vec<(f64, BackwardWithScratch)> = plans.map(|plan| (plan.time(caps, shape), plan)).collect();
    let fastest = plans.iter().map(|(time, _)| *time).min_by(f64::total_cmp)?;
    let everything = Chunk { blocks: 0..blocks, dq_parts: 1 };
    let whole = with((kv_heads, group, 1), vec![everything.clone()])?;
    let products = (batch * heads * everything.pairs()) as f64 / caps.processors.get() as f64;
    let recomputed =
        whole.dkdv_time(caps, shape, &(0..group), &everything) + DQ_RECOMPUTED * products.max(blocks as f64) + LAUNCH;
    if fastest > recomputed {
        return None;
    }
    let cost = |(time, plan): &(f64, BackwardWithScratch)| {
        time * (1.0 + MEMORY * plan.bytes() as f64 / caps.scratch_bytes as f64)
    };
    plans.into_iter().min_by(|a, b| cost(a).total_cmp(&cost(b))).map(|(_, plan)| plan)
}

#[cfg(test)]
mod tests {
    use super::super::coop::tests::{caps, shape};
    use super::*;

    /// Kv heads, query heads of their groups, workgroups that share a block of keys and chunks of queries of the backward
    /// with scratch memory.
    fn at_once(caps: &Caps, shape: &FlashShape) -> Option<(usize, usize, usize, usize)> {
        let plan = backward_with_scratch(caps, shape)?;
        Some((plan.kv_heads, plan.members, plan.dkdv_parts, plan.chunks.len()))
    }

    #[test]
    fn chunks_cover_all_queries() {
        for (blocks, count) in [(1, 1), (7, 2), (7, 7), (7, 20), (768, 5), (768, 40)] {
            let chunks = equal_chunks(blocks, count, 2);
            assert!(chunks.len() <= count, "{blocks} blocks in {} of {count} chunks", chunks.len());
            assert_eq!(
                chunks.iter().flat_map(|chunk| chunk.blocks.clone()).collect::<Vec<_>>(),
                Vec::from_iter(0..blocks)
            );
            let mean = blocks * (blocks + 1) / 2 / count;
            assert!(chunks.iter().all(|chunk| chunk.pairs() <= mean + blocks + 1), "{chunks:?}");
        }
        for (blocks, pairs) in [(1, 1), (7, 7), (7, 13), (7, 28), (768, 30_000), (768, 295_296)] {
            let chunks = large_chunks(blocks, pairs, 2).expect("a block fits");
            assert_eq!(
                chunks.iter().flat_map(|chunk| chunk.blocks.clone()).collect::<Vec<_>>(),
                Vec::from_iter(0..blocks)
            );
            for (i, chunk) in chunks.iter().enumerate() {
                let one_more = chunk.pairs() + chunk.blocks.start;
                assert!(chunk.pairs() <= pairs && (i == 0 || one_more > pairs), "{chunks:?} of {pairs}");
            }
        }
        assert_eq!(large_chunks(7, 6, 2), None);
        let chunks = equal_chunks(768, 5, 1);
        assert!(chunks.windows(2).all(|pair| pair[0].dq_parts < pair[1].dq_parts), "{chunks:?}");
    }

    #[test]
    fn plans_keep_within_the_scratch_memory() {
        for (tokens, kv_heads) in [(300, 8), (4_096, 2), (18_432, 8), (32_768, 4), (98_304, 1), (98_304, 8)] {
            let shape = shape(tokens, kv_heads, Element::F16);
            for bytes in [1 << 28, 1 << 29, 1 << 30, 1 << 31] {
                let Some(plan) = backward_with_scratch(&Caps { scratch_bytes: bytes, ..caps() }, &shape) else {
                    assert!(bytes < 1 << 30, "{tokens} tokens, {bytes} bytes");
                    continue;
                };
                assert!(2 * plan.ds_len + 4 * (plan.carried_len + plan.partial_len) <= bytes as usize, "{plan:?}");
                assert_eq!(plan.chunks.last().map(|chunk| chunk.blocks.end), Some(tokens.div_ceil(128)), "{plan:?}");
            }
        }
    }

    #[test]
    fn scratch_is_taken_where_it_fits() {
        let caps = caps();
        let of = |batch, tokens, heads, kv_heads| {
            at_once(&caps, &FlashShape { batch, heads, ..shape(tokens, kv_heads, Element::F16) })
        };
        assert_eq!(of(1, 4_096, 8, 8), Some((8, 1, 1, 1)));
        assert_eq!(of(1, 18_432, 8, 8), Some((4, 1, 1, 1)));
        assert_eq!(of(1, 32_768, 8, 8), Some((1, 1, 1, 1)));
        assert_eq!(of(1, 49_152, 8, 8), Some((2, 1, 1, 3)));
        assert_eq!(of(1, 98_304, 8, 8), Some((2, 1, 1, 11)));
        // Heads of all batch entries at a time.
        assert_eq!(of(8, 1_024, 16, 16), Some((128, 1, 1, 1)));
        // With whole groups the workgroup of the first keys would have too much.
        assert_eq!(of(1, 18_432, 8, 2), Some((1, 4, 4, 1)));
        assert_eq!(of(1, 8_192, 32, 4), Some((4, 4, 1, 1)));
        // Fewer blocks of keys than multiprocessors.
        assert_eq!(of(1, 4_096, 8, 2), Some((2, 4, 4, 1)));
        assert_eq!(of(1, 4_096, 12, 2), Some((2, 6, 6, 1)));
        assert_eq!(of(1, 18_432, 8, 1), Some((1, 8, 4, 2)));
        assert_eq!(of(4, 4_096, 12, 2), Some((8, 6, 1, 1)));
        // No matrices of f32.
        assert_eq!(at_once(&caps, &shape(4_096, 8, Element::F32)), None);
        assert_eq!(at_once(&Caps { scratch_bytes: 0, ..caps.clone() }, &shape(64, 8, Element::F16)), None);
    }
}
