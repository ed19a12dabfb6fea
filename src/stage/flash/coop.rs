//! Tiles of the kernels with cooperative matrices: one structure for every size of matrix and subgroup. What does not
//! fit a device is `None`, and the plan falls to the kernels without matrices.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::FlashShape;
use super::plan::Tile;
use crate::gpu::Caps;
use crate::tensor::Element;

/// Subgroups of a workgroup. On an H100 one workgroup of eight is resident on a multiprocessor, and its registers hold
/// the kept rows and the results.
const SUBGROUPS: usize = 8;
/// Tiles of a loop's body: of the forward and of dq by recomputing two, 4 to 8 % over one; of the forward of rows four, up
/// to 16 % over two; of dk and dv a whole block (the tiles of queries are numbered within blocks), 3 % over two (measured
/// on an H100). Software drivers, which have matrices of 8x8, compile too long already with two.
const fn unroll(size: usize, tiles: usize) -> usize {
    if size == 16 { tiles } else { 1 }
}
/// Largest head_dim: kept rows and results of more do not fit the registers, nor staged rows 48 KiB of workgroup memory.
const MAX_HEAD_DIM: usize = 128;
/// Subgroups of a workgroup of `flash_forward_rows_coop`: of four, two workgroups share a multiprocessor of an H100.
const ROWS_SUBGROUPS: usize = 4;
/// Where it is faster than `flash_forward_coop` on an H100: up to this head_dim (at 96 its memory leaves room for one
/// workgroup on a multiprocessor), from so many workgroups on (at head_dim 64: 256 take 0.130 ms in place of 0.100, 384
/// 0.221 in place of 0.230, 512 0.174 in place of 0.203).
const ROWS_HEAD_DIM: usize = 80;
const ROWS_WORKGROUPS: usize = 384;
/// Queries of a workgroup of `flash_backward_dq_sum`.
pub(super) const SUM_ROWS: usize = 32;
/// Workgroups of `flash_backward_dq_from_ds_coop` that keep a large GPU busy to the end: with fewer, several share a
/// block of queries, each with at least this many blocks of keys. Where even so there are fewer, they are made of
/// more subgroups.
const DQ_WORKGROUPS: usize = 512;
const LEAST_PART: usize = 16;
/// Storage buffers of `flash_backward_dkdv_coop` with d_scores.
const SCRATCH_BINDINGS: u32 = 10;

// What the time of a backward is predicted from, as measured on an H100. The unit is the work of one of its
// multiprocessors on a pair of a block of queries and one of keys for dk and dv: 7.1 us.

/// Workgroups of `flash_backward_dkdv_coop` at a time.
const PROCESSORS: usize = 132;
/// Beginning and end of one.
const START: f64 = 3.0;
/// Reading or writing its dk and dv between chunks.
const CARRY: f64 = 0.25;
/// A pair in `flash_backward_dq_from_ds_coop`, and a workgroup of several that share a block.
const DQ: f64 = 0.3;
const DQ_PART: f64 = 4.0;
/// A pair in `flash_backward_dq_coop`.
const DQ_RECOMPUTED: f64 = 0.9;
/// The dispatches of a chunk, one after the other.
const LAUNCH: f64 = 2.0;

/// What the kernels with matrices share, by device and shape.
struct Matrices {
    /// Rows and columns of a matrix, and its rows of vectors of four.
    size: usize,
    vectors: usize,
    subgroup: usize,
    /// Invocations of a workgroup.
    invocations: usize,
    /// Lanes that share a row of a matrix.
    lanes: usize,
    /// Vectors of four elements in a row of q, and loads of 16 bytes.
    row_vectors: usize,
    row_loads: usize,
    /// Matrices side by side in a row of q.
    depth: usize,
    element_bytes: usize,
}

impl Matrices {
    fn new(caps: &Caps, head_dim: usize, element: Element) -> Option<Self> {
        let size = caps.tier.matrix()?;
        let (subgroup, element_bytes) = (caps.subgroup, element.bytes() as usize);
        let matrices = Self {
            size,
            vectors: size / 4,
            subgroup,
            invocations: SUBGROUPS * subgroup,
            lanes: subgroup / size,
            row_vectors: head_dim / 4,
            row_loads: head_dim * element_bytes / 16,
            depth: head_dim / size,
            element_bytes,
        };
        let fits = caps.has_matrix(caps.tier, element)
            && head_dim.is_multiple_of(size)
            && head_dim <= MAX_HEAD_DIM
            && subgroup.is_multiple_of(size)
            && matrices.lanes.is_power_of_two()
            && matrices.lanes <= 2 * matrices.vectors
            && matrices.row_loads <= matrices.invocations
            && matrices.invocations <= caps.limits.max_compute_invocations_per_workgroup as usize
            && matrices.invocations <= caps.limits.max_compute_workgroup_size_x as usize;
        fits.then_some(matrices)
    }

    /// Steps in which a workgroup stages this many rows.
    fn stages(&self, rows: usize) -> usize {
        rows.div_ceil(self.invocations / self.row_loads)
    }

    /// Loads of a subgroup's lane for rows of this many matrices side by side.
    fn kept_loads(&self, matrices: usize) -> usize {
        (self.size * matrices * self.size * self.element_bytes / 16).div_ceil(self.subgroup)
    }

    /// Vectors that a lane has of a matrix.
    fn chunks(&self) -> usize {
        self.vectors / self.lanes.min(self.vectors)
    }

    /// Whether a lane has two vectors of four f16 of a matrix: 16 bytes.
    fn lanes_have_16_bytes(&self) -> bool {
        self.element_bytes == 2 && 2 * self.lanes == self.vectors
    }

    /// Bytes of this many rows of stored elements in workgroup memory, two vectors longer than their contents.
    fn stored(&self, rows: usize, vectors: usize) -> usize {
        rows * (vectors + 2) * 4 * self.element_bytes
    }

    /// The same of f32.
    fn single(rows: usize, vectors: usize) -> usize {
        rows * (vectors + 2) * 16
    }
}

fn fitting(caps: &Caps, tile: Tile) -> Option<Tile> {
    (tile.workgroup_bytes <= caps.limits.max_compute_workgroup_storage_size as usize).then_some(tile)
}

/// The tile of `flash_forward_coop`.
pub(super) fn forward(caps: &Caps, head_dim: usize, element: Element) -> Option<Tile> {
    let matrices = Matrices::new(caps, head_dim, element)?;
    let Matrices { size, vectors, lanes, row_vectors, depth, .. } = matrices;
    let (block_m, block_n) = (SUBGROUPS * size, 2 * size);
    let columns = depth.div_ceil(2);
    let score_vectors = 2 * vectors;
    let chunk_loads = score_vectors * matrices.element_bytes / 4;
    fitting(
        caps,
        Tile {
            shader: "attention/flash_forward_coop",
            block_m,
            block_n,
            matrix: Some(size),
            constants: vec![
                ("SUBGROUP", matrices.subgroup),
                ("DEPTH_MATRICES", depth),
                ("COLUMN_MATRICES", columns),
                ("QUERY_CHUNKS", columns),
                ("QUERY_LOADS", (block_m * chunk_loads).div_ceil(matrices.invocations)),
                ("QUERY_IDLE", usize::from(block_m * chunk_loads < matrices.invocations)),
                ("SCORE_CHUNKS", score_vectors / lanes),
                ("LANE_BITS", lanes.ilog2() as usize),
                ("STAGES", matrices.stages(block_n)),
                ("UNROLL", unroll(size, 2)),
            ],
            invocations: matrices.invocations,
            workgroup_bytes: matrices.stored(block_n, row_vectors)
                + matrices.stored(block_n, 2 * columns * vectors)
                + Matrices::single(block_m, score_vectors)
                + matrices.stored(block_m, score_vectors),
        },
    )
}

/// The forward of rows: its subgroups branch by themselves.
pub(super) const FORWARD_OF_ROWS: &str = "attention/flash_forward_rows_coop";

/// The tile of `flash_forward_rows_coop`, for shapes that it is faster for than `flash_forward_coop`.
pub(super) fn forward_of_rows(caps: &Caps, shape: &FlashShape) -> Option<Tile> {
    let FlashShape { batch, tokens, heads, head_dim, element, .. } = *shape;
    let Matrices { size, vectors, subgroup, lanes, row_vectors, row_loads, depth, element_bytes, .. } =
        Matrices::new(caps, head_dim, element)?;
    let (block_m, block_n, invocations) = (2 * size * ROWS_SUBGROUPS, size, ROWS_SUBGROUPS * subgroup);
    let workgroups = batch * heads * tokens.div_ceil(block_m);
    if head_dim > ROWS_HEAD_DIM || workgroups < ROWS_WORKGROUPS || lanes > vectors || row_loads > invocations {
        return None;
    }
    let matrix_rows = |vectors: usize, bytes: usize| size * (vectors + 2) * 4 * bytes;
    let score_vectors = 2 * ROWS_SUBGROUPS * vectors;
    fitting(
        caps,
        Tile {
            shader: FORWARD_OF_ROWS,
            block_m,
            block_n,
            matrix: Some(size),
            constants: vec![
                ("SUBGROUP", subgroup),
                ("DEPTH_MATRICES", depth),
                ("CHUNKS", vectors / lanes),
                ("LANE_BITS", lanes.ilog2() as usize),
                ("STAGES", block_n.div_ceil(invocations / row_loads)),
                ("UNROLL", unroll(size, 4)),
            ],
            invocations,
            workgroup_bytes: 2 * matrix_rows(2 * row_vectors, element_bytes)
                + matrix_rows(score_vectors, 4)
                + matrix_rows(score_vectors, element_bytes)
                + if caps.lone_barriers { 0 } else { 16 },
        },
    )
}

/// The tile of `flash_backward_dkdv_coop`, which also writes d_scores if `scratch`.
pub(super) fn dkdv(caps: &Caps, head_dim: usize, element: Element, scratch: bool) -> Option<Tile> {
    let matrices = Matrices::new(caps, head_dim, element)?;
    let Matrices { size, vectors, depth, .. } = matrices;
    let (block_m, block_n) = (size, SUBGROUPS * size);
    let (first, second) = (depth.div_ceil(2), depth / 2);
    fitting(
        caps,
        Tile {
            shader: "attention/flash_backward_dkdv_coop",
            block_m,
            block_n,
            matrix: Some(size),
            constants: vec![
                ("SUBGROUP", matrices.subgroup),
                ("DEPTH_MATRICES", depth),
                ("FIRST_MATRICES", first),
                ("SECOND_MATRICES", second),
                ("MATRIX_CHUNKS", matrices.chunks()),
                ("STAGES", matrices.stages(block_m)),
                ("KEPT_LOADS", matrices.kept_loads(first)),
                ("UNROLL", unroll(size, block_n / block_m)),
                ("DS_SCRATCH", usize::from(scratch)),
            ],
            invocations: matrices.invocations,
            workgroup_bytes: (matrices.stored(4 * size, first * vectors) + matrices.stored(6 * size, second * vectors))
                .max(matrices.stored(SUBGROUPS * size, first * vectors))
                + Matrices::single(2 * size, block_n / 4)
                + matrices.stored(2 * size, block_n / 4),
        },
    )
}

/// The tile of `flash_backward_dq_coop`.
pub(super) fn dq(caps: &Caps, head_dim: usize, element: Element) -> Option<Tile> {
    let matrices = Matrices::new(caps, head_dim, element)?;
    let Matrices { size, vectors, depth, .. } = matrices;
    let (block_m, block_n) = (SUBGROUPS * size, size);
    let columns = depth.div_ceil(2);
    fitting(
        caps,
        Tile {
            shader: "attention/flash_backward_dq_coop",
            block_m,
            block_n,
            matrix: Some(size),
            constants: vec![
                ("SUBGROUP", matrices.subgroup),
                ("DEPTH_MATRICES", depth),
                ("COLUMN_MATRICES", columns),
                ("MATRIX_CHUNKS", matrices.chunks()),
                ("STAGES", matrices.stages(block_n)),
                ("UNROLL", unroll(size, 2)),
            ],
            invocations: matrices.invocations,
            workgroup_bytes: matrices.stored(4 * size, 2 * columns * vectors)
                + Matrices::single(2 * size, block_m / 4)
                + matrices.stored(2 * size, block_m / 4)
                + 16,
        },
    )
}

/// The tile of `flash_backward_dq_from_ds_coop`, with two subgroups for each of `row_parts` parts of the rows.
pub(super) fn dq_from_ds(caps: &Caps, head_dim: usize, element: Element, row_parts: usize) -> Option<Tile> {
    let matrices = Matrices::new(caps, head_dim, element)?;
    let Matrices { size, vectors, subgroup, depth, row_loads, .. } = matrices;
    let (block_m, step) = (SUBGROUPS * size, 2 * size);
    let invocations = 2 * row_parts * subgroup;
    if row_loads > invocations || invocations > caps.limits.max_compute_invocations_per_workgroup as usize {
        return None;
    }
    let columns = depth.div_ceil(2);
    fitting(
        caps,
        Tile {
            shader: "attention/flash_backward_dq_from_ds_coop",
            block_m,
            // Of the kernel that writes d_scores.
            block_n: SUBGROUPS * size,
            matrix: Some(size),
            constants: vec![
                ("SUBGROUP", subgroup),
                ("ROW_PARTS", row_parts),
                ("QUERY_MATRICES", SUBGROUPS / row_parts),
                ("COLUMN_MATRICES", columns),
                ("STAGES", step.div_ceil(invocations / row_loads)),
                // The more subgroups share the results, the more loads the registers hold. A block of keys is four steps.
                ("AHEAD", row_parts),
                ("EARLY", columns.div_ceil(2)),
            ],
            invocations,
            workgroup_bytes: matrices.stored(block_m, step / 4)
                + matrices.stored(step, 2 * columns * vectors)
                + 2 * row_parts * size * (vectors + 1) * 16
                + 16,
        },
    )
}

/// The tile of `flash_backward_dq_sum`, which adds the parts of `dq`.
fn dq_sum(dq: &Tile) -> Tile {
    Tile {
        shader: "attention/flash_backward_dq_sum",
        matrix: None,
        constants: vec![("ROWS", SUM_ROWS)],
        invocations: 256,
        workgroup_bytes: 0,
        ..dq.clone()
    }
}

/// Queries that the backward with scratch memory takes at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// In blocks of `dkdv.block_n`.
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

/// Cuts blocks of queries into this many chunks, or fewer, of about as many pairs each.
fn chunks(blocks: usize, count: usize, heads: usize) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut start = 0;
    for end in 1..=blocks {
        if pairs_before(end) * count >= pairs_before(blocks) * (chunks.len() + 1) {
            let mut chunk = Chunk { blocks: start..end, dq_parts: 1 };
            let workgroups = heads * (end - start);
            let most = chunk.pairs() / ((end - start) * LEAST_PART);
            chunk.dq_parts = DQ_WORKGROUPS.div_ceil(workgroups).min(most).max(1);
            chunks.push(chunk);
            start = end;
        }
    }
    chunks
}

/// The backward with five products: d_scores go through memory, for some heads and some queries at a time.
#[derive(Clone, Debug)]
pub(super) struct BackwardWithScratch {
    /// Writes d_scores.
    pub dkdv: Tile,
    /// Reads them.
    pub dq: Tile,
    /// Adds what workgroups of it that share a block of queries give.
    pub dq_sum: Tile,
    /// Kv heads at a time.
    pub kv_heads: usize,
    /// Queries of those at a time.
    pub chunks: Vec<Chunk>,
    /// f16 of d_scores.
    pub ds_len: usize,
    /// f32 of dk and dv between one chunk and the next.
    pub carried_len: usize,
    /// f32 of the parts of dq.
    pub partial_len: usize,
}

impl BackwardWithScratch {
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
    fn time(&self, shape: &FlashShape) -> f64 {
        let group = shape.heads / shape.kv_heads;
        let processors = PROCESSORS as f64;
        let of_chunk = |chunk: &Chunk| {
            let pairs = (self.kv_heads * group * chunk.pairs()) as f64;
            let parts =
                if chunk.dq_parts > 1 { self.kv_heads * group * chunk.blocks.len() * chunk.dq_parts } else { 0 };
            self.dkdv_time(shape, chunk) + (DQ * pairs + DQ_PART * parts as f64) / processors + LAUNCH
        };
        shape.kv_heads.div_ceil(self.kv_heads) as f64 * self.chunks.iter().map(of_chunk).sum::<f64>()
    }

    /// The part of `dkdv` in that: each multiprocessor takes the next workgroup when it has done one.
    fn dkdv_time(&self, shape: &FlashShape, chunk: &Chunk) -> f64 {
        let group = shape.heads / shape.kv_heads;
        let Range { start, end } = chunk.blocks;
        let last = shape.tokens <= end * self.dkdv.block_n;
        let cost = |queries: usize, carried: f64| (group * queries) as f64 + START + CARRY * carried;
        let carried = if last { 0.0 } else { 1.0 };
        // Workgroups for keys before the chunk have equal work.
        let (equal, of_equal) = (self.kv_heads * start, cost(end - start, carried + 1.0));
        let busy = |i: usize| (equal / PROCESSORS + usize::from(i < equal % PROCESSORS)) as f64 * of_equal;
        let mut free: BinaryHeap<Reverse<u64>> = (0..PROCESSORS).map(|i| Reverse(ticks(busy(i)))).collect();
        let mut time = ticks(busy(0));
        for queries in (1..=end - start).rev() {
            for _ in 0..self.kv_heads {
                if let Some(mut first) = free.peek_mut() {
                    first.0 += ticks(cost(queries, carried));
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
    let FlashShape { batch, tokens, heads, kv_heads, head_dim, element, .. } = *shape;
    let dkdv = dkdv(caps, head_dim, element, true)?;
    // The kernel has bindings more than the others; slices of the batch are not for it.
    let limits = &caps.limits;
    let largest = batch as u64 * tokens as u64 * heads as u64 * head_dim as u64 * element.bytes();
    let fits = Matrices::new(caps, head_dim, element)?.lanes_have_16_bytes()
        && limits.max_storage_buffers_per_shader_stage >= SCRATCH_BINDINGS
        && largest <= limits.max_storage_buffer_binding_size;
    if !fits {
        return None;
    }
    let [dq, dq_of_few] = [dq_from_ds(caps, head_dim, element, 2)?, dq_from_ds(caps, head_dim, element, 4)?];
    let group = heads / kv_heads;
    let blocks = tokens.div_ceil(dkdv.block_n);
    let with = |at_once: usize, count: usize| {
        let chunks = chunks(blocks, count, at_once * group);
        let of_heads = at_once * group * dkdv.block_n;
        let largest = chunks.iter().map(Chunk::pairs).max().unwrap_or(0);
        let workgroups = |chunk: &Chunk| chunk.dq_parts * chunk.blocks.len();
        let few = chunks.iter().all(|chunk| at_once * group * workgroups(chunk) < DQ_WORKGROUPS);
        let dq = if few { &dq_of_few } else { &dq };
        let partial = chunks.iter().filter(|chunk| chunk.dq_parts > 1).map(workgroups).max().unwrap_or(0);
        let carried = if chunks.len() > 1 { at_once * blocks * (2 * dkdv.block_n * head_dim + 4) } else { 0 };
        BackwardWithScratch {
            dkdv: dkdv.clone(),
            dq: dq.clone(),
            dq_sum: dq_sum(dq),
            kv_heads: at_once,
            ds_len: of_heads * dkdv.block_n * largest,
            // A binding is not empty.
            carried_len: carried.max(4),
            partial_len: (of_heads * head_dim * partial).max(4),
            chunks,
        }
    };
    // Of each number of heads the fewest chunks; heads in equal numbers as far as they divide.
    let candidates = (1..=kv_heads).filter(|&at_once| kv_heads.div_ceil(kv_heads.div_ceil(at_once)) == at_once);
    let fewest = |at_once: usize| {
        let pairs = (at_once * group * pairs_before(blocks)) as u64;
        let bytes = Element::F16.bytes() * pairs * (dkdv.block_n * dkdv.block_n) as u64;
        let least = bytes / caps.scratch_bytes.max(1);
        (least.max(1)..=blocks as u64).map(|count| with(at_once, count as usize)).find(|plan| plan.fits(caps))
    };
    let plans = candidates.filter_map(fewest);
    let plans: Vec<(f64, BackwardWithScratch)> = plans.map(|plan| (plan.time(shape), plan)).collect();
    let fastest = plans.iter().map(|(time, _)| *time).min_by(f64::total_cmp)?;
    let everything = Chunk { blocks: 0..blocks, dq_parts: 1 };
    let whole = with(kv_heads, 1);
    let products = (heads * everything.pairs()) as f64 / PROCESSORS as f64;
    let recomputed = whole.dkdv_time(shape, &everything) + DQ_RECOMPUTED * products.max(blocks as f64) + LAUNCH;
    if fastest > recomputed {
        return None;
    }
    // Of plans that are as fast the one with least memory.
    let plans = plans.into_iter().filter(|(time, _)| *time <= 1.02 * fastest).map(|(_, plan)| plan);
    plans.min_by_key(BackwardWithScratch::bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{MatrixKind, Tier};
    use crate::stage::flash::Layout;

    /// An H100 as far as plans look at it.
    fn caps() -> Caps {
        let limits = wgpu::Limits {
            max_compute_workgroup_storage_size: 48 << 10,
            max_compute_invocations_per_workgroup: 1024,
            max_storage_buffers_per_shader_stage: 16,
            max_storage_buffer_binding_size: (1 << 31) - 4,
            max_buffer_size: 1 << 32,
            ..wgpu::Limits::default()
        };
        let matrices = vec![MatrixKind { size: 16, factors: Element::F16 }];
        Caps { limits, shader_f16: true, matrices, subgroup: 32, tier: Tier::Coop16, ..Caps::default() }
    }

    fn shape(tokens: usize, kv_heads: usize, element: Element) -> FlashShape {
        FlashShape { batch: 1, tokens, heads: 8, kv_heads, head_dim: 128, element, layout: Layout::HeadsTokens }
    }

    /// Kv heads and chunks of queries of the backward with scratch memory.
    fn at_once(caps: &Caps, tokens: usize, kv_heads: usize, element: Element) -> Option<(usize, usize)> {
        backward_with_scratch(caps, &shape(tokens, kv_heads, element)).map(|plan| (plan.kv_heads, plan.chunks.len()))
    }

    #[test]
    fn chunks_cover_all_queries_in_equal_parts() {
        for (blocks, count) in [(1, 1), (7, 2), (7, 7), (7, 20), (768, 5), (768, 40)] {
            let chunks = chunks(blocks, count, 2);
            assert!(chunks.len() <= count, "{blocks} blocks in {} of {count} chunks", chunks.len());
            assert_eq!(
                chunks.iter().flat_map(|chunk| chunk.blocks.clone()).collect::<Vec<_>>(),
                Vec::from_iter(0..blocks)
            );
            let mean = blocks * (blocks + 1) / 2 / count;
            assert!(chunks.iter().all(|chunk| chunk.pairs() <= mean + blocks + 1), "{chunks:?}");
        }
        let chunks = chunks(768, 5, 1);
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
    fn rows_are_for_many_workgroups_of_a_small_head_dim() {
        let caps = caps();
        let of = |caps: &Caps, tokens, head_dim, element| {
            forward_of_rows(caps, &FlashShape { head_dim, ..shape(tokens, 8, element) })
        };
        for head_dim in (16..=ROWS_HEAD_DIM).step_by(16) {
            // Two of them on a multiprocessor.
            let tile = of(&caps, 6_144, head_dim, Element::F16);
            assert!(tile.is_some_and(|tile| tile.workgroup_bytes <= 24_576), "{head_dim}");
        }
        assert_eq!(of(&caps, 4_096, 64, Element::F16), None);
        assert_eq!(of(&caps, 18_432, 96, Element::F16), None);
        assert_eq!(of(&caps, 18_432, 64, Element::F32), None);
        // More lanes to a row of a matrix than it has vectors.
        let matrices = vec![MatrixKind { size: 8, factors: Element::F16 }];
        assert_eq!(of(&Caps { matrices, tier: Tier::Coop8, ..caps }, 18_432, 64, Element::F16), None);
    }

    #[test]
    fn scratch_is_taken_where_it_fits() {
        let caps = caps();
        assert_eq!(at_once(&caps, 4_096, 8, Element::F16), Some((8, 1)));
        assert_eq!(at_once(&caps, 18_432, 8, Element::F16), Some((4, 1)));
        assert_eq!(at_once(&caps, 32_768, 8, Element::F16), Some((1, 1)));
        // The workgroup of the first keys has the queries of a whole group.
        assert_eq!(at_once(&caps, 18_432, 2, Element::F16), Some((2, 2)));
        assert_eq!(at_once(&caps, 98_304, 8, Element::F16), Some((2, 11)));
        assert_eq!(at_once(&Caps { scratch_bytes: 0, ..caps.clone() }, 64, 8, Element::F16), None);
    }

    #[test]
    fn what_matrices_do_not_take_falls_through() {
        let caps = caps();
        assert_eq!(at_once(&caps, 4_096, 8, Element::F32), None);
        for (head_dim, element) in [(128, Element::F32), (24, Element::F16), (144, Element::F16)] {
            assert_eq!(forward(&caps, head_dim, element), None);
            assert_eq!(dkdv(&caps, head_dim, element, false), None);
            assert_eq!(dq(&caps, head_dim, element), None);
        }
        for head_dim in (16..=MAX_HEAD_DIM).step_by(16) {
            assert!(forward(&caps, head_dim, Element::F16).is_some(), "{head_dim}");
            assert!(dkdv(&caps, head_dim, Element::F16, true).is_some(), "{head_dim}");
            assert!(dq(&caps, head_dim, Element::F16).is_some(), "{head_dim}");
        }
        // A device whose subgroups have no one size has no matrices for the kernels.
        assert_eq!(forward(&Caps { subgroup: 0, ..caps }, 128, Element::F16), None);
    }
}
