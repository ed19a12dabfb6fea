//! Tiles of the kernels with cooperative matrices: one structure for every size of matrix and subgroup. What does not
//! fit a device is `None`, and the plan falls to the kernels without matrices.

use super::FlashShape;
use super::plan::Tile;
use crate::gpu::Caps;
use crate::tensor::Element;

/// Subgroups of a workgroup. On an H100 one workgroup of eight is resident on a multiprocessor, and its registers hold
/// the kept rows and the results.
const SUBGROUPS: usize = 8;
/// Tiles of a loop's body: two are 4 to 8 % over one, more than four compile long (measured on an H100). Software
/// drivers, which have matrices of 8x8, compile too long already with two.
const fn unroll(size: usize) -> usize {
    if size == 16 { 2 } else { 1 }
}
/// Largest head_dim: kept rows and results of more do not fit the registers, nor staged rows 48 KiB of workgroup memory.
const MAX_HEAD_DIM: usize = 128;
/// Subgroups of the workgroup of `flash_backward_dq_from_ds_coop`.
const PRODUCT_SUBGROUPS: usize = 4;
/// Workgroups of that kernel that keep a large GPU busy: with fewer, they are made smaller.
const BUSY: usize = 512;

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
                ("SCORE_CHUNKS", score_vectors / lanes),
                ("LANE_BITS", lanes.ilog2() as usize),
                ("STAGES", matrices.stages(block_n)),
                ("UNROLL", unroll(size)),
            ],
            invocations: matrices.invocations,
            workgroup_bytes: matrices.stored(block_n, row_vectors)
                + matrices.stored(block_n, 2 * columns * vectors)
                + Matrices::single(block_m, score_vectors)
                + matrices.stored(block_m, score_vectors)
                + 4 * block_m
                + 16,
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
                ("UNROLL", unroll(size)),
                ("DS_SCRATCH", usize::from(scratch)),
            ],
            invocations: matrices.invocations,
            workgroup_bytes: matrices.stored(4 * size, first * vectors)
                + matrices.stored(6 * size, second * vectors)
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
                ("UNROLL", unroll(size)),
            ],
            invocations: matrices.invocations,
            workgroup_bytes: matrices.stored(4 * size, 2 * columns * vectors)
                + Matrices::single(2 * size, block_m / 4)
                + matrices.stored(2 * size, block_m / 4)
                + 16,
        },
    )
}

/// The tile of `flash_backward_dq_from_ds_coop`, with this many matrices of rows to a subgroup.
fn dq_from_ds(caps: &Caps, head_dim: usize, element: Element, query_matrices: usize) -> Option<Tile> {
    let matrices = Matrices::new(caps, head_dim, element)?;
    let Matrices { size, vectors, subgroup, depth, row_loads, .. } = matrices;
    let (block_m, step) = (2 * query_matrices * size, 2 * size);
    let invocations = PRODUCT_SUBGROUPS * subgroup;
    if row_loads > invocations {
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
                ("QUERY_MATRICES", query_matrices),
                ("COLUMN_MATRICES", columns),
                ("STAGES", step.div_ceil(invocations / row_loads)),
            ],
            invocations,
            workgroup_bytes: matrices.stored(block_m, step / 4)
                + matrices.stored(step, 2 * columns * vectors)
                + PRODUCT_SUBGROUPS * size * (vectors + 1) * 16
                + 16,
        },
    )
}

/// The backward with five products: d_scores go through memory, for some heads at a time.
pub(super) struct BackwardWithScratch {
    /// Writes d_scores.
    pub dkdv: Tile,
    /// Reads them.
    pub dq: Tile,
    /// Kv heads at a time.
    pub kv_heads: usize,
    /// f16 of scratch memory.
    pub scratch_len: usize,
}

/// Plans it where the scratch memory of at least one kv head fits `Caps::scratch_bytes` and a binding. Otherwise the
/// backward computes scores twice, with seven products.
pub(super) fn backward_with_scratch(caps: &Caps, shape: &FlashShape) -> Option<BackwardWithScratch> {
    let FlashShape { batch, tokens, heads, kv_heads, head_dim, element, .. } = *shape;
    let dkdv = dkdv(caps, head_dim, element, true)?;
    // The kernel has a binding more than the others; slices of the batch are not for it.
    let limits = &caps.limits;
    let largest = batch as u64 * tokens as u64 * heads as u64 * head_dim as u64 * element.bytes();
    let fits = Matrices::new(caps, head_dim, element)?.lanes_have_16_bytes()
        && limits.max_storage_buffers_per_shader_stage >= 9
        && largest <= limits.max_storage_buffer_binding_size;
    if !fits {
        return None;
    }
    let blocks = tokens.div_ceil(dkdv.block_n) as u64;
    let group = (heads / kv_heads) as u64;
    let len = group * (blocks * (blocks + 1) / 2) * (dkdv.block_n * dkdv.block_n) as u64;
    let most = caps.scratch_bytes.min(limits.max_storage_buffer_binding_size).min(limits.max_buffer_size);
    let at_once = (most / (len * Element::F16.bytes())).min(kv_heads as u64) as usize;
    if at_once == 0 {
        return None;
    }
    // Chunks of one size, as far as they divide.
    let kv_heads = kv_heads.div_ceil(kv_heads.div_ceil(at_once));
    let workgroups = kv_heads * group as usize * tokens.div_ceil(dkdv.block_n);
    let dq = dq_from_ds(caps, head_dim, element, if workgroups < BUSY { 2 } else { 4 })?;
    Some(BackwardWithScratch { dkdv, dq, kv_heads, scratch_len: kv_heads * len as usize })
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

    fn heads_at_once(caps: &Caps, tokens: usize, kv_heads: usize, element: Element) -> Option<usize> {
        let layout = Layout::HeadsTokens;
        let shape = FlashShape { batch: 1, tokens, heads: 8, kv_heads, head_dim: 128, element, layout };
        backward_with_scratch(caps, &shape).map(|plan| plan.kv_heads)
    }

    #[test]
    fn scratch_is_taken_where_it_fits() {
        let caps = caps();
        assert_eq!(heads_at_once(&caps, 4_096, 8, Element::F16), Some(8));
        assert_eq!(heads_at_once(&caps, 18_432, 8, Element::F16), Some(4));
        assert_eq!(heads_at_once(&caps, 32_768, 8, Element::F16), Some(1));
        // A kv head's d_scores are those of its group.
        assert_eq!(heads_at_once(&caps, 18_432, 2, Element::F16), Some(1));
        assert_eq!(heads_at_once(&caps, 98_304, 8, Element::F16), None);
        assert_eq!(heads_at_once(&Caps { scratch_bytes: 0, ..caps.clone() }, 64, 8, Element::F16), None);
    }

    #[test]
    fn what_matrices_do_not_take_falls_through() {
        let caps = caps();
        assert_eq!(heads_at_once(&caps, 4_096, 8, Element::F32), None);
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
