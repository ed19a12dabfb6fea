//! Tiles of the kernels with cooperative matrices: one structure for every size of matrix and subgroup. What does not
//! fit a device is `None`, and the plan falls to the kernels without matrices.

use super::plan::Tile;
use crate::gpu::Caps;
use crate::tensor::Element;

/// Subgroups of a workgroup. On an H100 one workgroup of eight is resident on a multiprocessor, and its registers hold
/// the kept rows and the results.
const SUBGROUPS: usize = 8;
/// Key tiles of a loop's body: 4 to 8 % over one; more than four compile long (measured on an H100).
const UNROLL: usize = 2;

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
                ("UNROLL", UNROLL),
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
