//! Tiles of the kernels with cooperative matrices: one structure for every size of matrix and subgroup. What does not
//! fit a device is `None`, and the plan falls to the kernels without matrices.

use super::FlashShape;
use super::plan::Tile;
use crate::gpu::Caps;
use crate::tensor::Element;

/// Subgroups of a workgroup. On an H100 one workgroup of eight is resident on a multiprocessor, and its registers hold
/// the kept rows and the results.
const SUBGROUPS: usize = 8;
/// Tiles of a loop's body: of the forward and of dq by recomputing two, 4 to 8 % over one; of the forward of rows four, up
/// to 16 % over two; of dk and dv four where a workgroup has half of `SUBGROUPS`, 2 to 4 % over two, else two, 2 % over four,
/// and above `COLUMNS_HEAD_DIM` eight, 3 % over two (measured on an H100). The tiles of queries are numbered within blocks
/// of d_scores, which have a multiple of these. Software drivers, which have matrices of 8x8, compile too long already
/// with two.
const fn unroll(size: usize, tiles: usize) -> usize {
    if size == 16 { tiles } else { 1 }
}
/// Largest head_dim: kept rows and results of more do not fit the registers, nor staged rows 48 KiB of workgroup memory.
const MAX_HEAD_DIM: usize = 128;
/// Subgroups of a workgroup of `flash_forward_rows_coop`: of four, two or three workgroups share a multiprocessor of an
/// H100.
const ROWS_SUBGROUPS: usize = 4;
/// Where it is faster than `flash_forward_coop` on an H100: up to a head_dim, from so many workgroups on. (Head_dim 64: 256
/// take 0.122 ms in place of 0.100, 320 0.166 in place of 0.166, 384 0.206 in place of 0.230. 80: 448 take 0.362 in place of
/// 0.337, 512 0.416 in place of 0.420. 96: 2.21 in place of 2.17 at 18,432 tokens.)
const ROWS: [(usize, usize); 2] = [(64, 384), (80, 512)];
/// Head_dim at which `flash_forward_rows_coop` is faster with stores of keys and values in turns. (An H200, 18,432 tokens, in
/// turns / apart: 16 0.856 / 0.852 ms, 32 1.128 / 1.058, 48 1.323 / 1.283, 64 1.414 / 1.442, 80 2.019 / 1.804.)
const MIXED_HEAD_DIM: usize = 64;
/// Where `flash_backward_dkdv_columns_coop` is faster than `flash_backward_dkdv_coop` on an H100: up to this head_dim its
/// registers hold what it keeps.
const COLUMNS_HEAD_DIM: usize = 96;
/// Workgroup memory with which two workgroups of half of `SUBGROUPS` share a multiprocessor of an H100.
const SHARED_BYTES: usize = 24 << 10;
/// Queries of a workgroup of `flash_backward_dq_sum`.
pub(super) const SUM_ROWS: usize = 32;

/// Tokens of a block of queries or keys of d_scores, with matrices of a size.
pub(super) const fn ds_block(size: usize) -> usize {
    SUBGROUPS * size
}

/// What the kernels with matrices share, by device and shape.
pub(super) struct Matrices {
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
    pub fn new(caps: &Caps, head_dim: usize, element: Element) -> Option<Self> {
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
    pub fn lanes_have_16_bytes(&self) -> bool {
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
    let matrices = Matrices::new(caps, head_dim, element)?;
    let Matrices { size, vectors, subgroup, lanes, row_vectors, row_loads, depth, .. } = matrices;
    let (block_m, block_n, invocations) = (2 * size * ROWS_SUBGROUPS, size, ROWS_SUBGROUPS * subgroup);
    let (_, least) = ROWS.into_iter().find(|(most, _)| head_dim <= *most)?;
    let workgroups = batch * heads * tokens.div_ceil(block_m);
    if workgroups < least || lanes > vectors || row_loads > invocations {
        return None;
    }
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
                ("MIXED", usize::from(head_dim == MIXED_HEAD_DIM)),
                ("UNROLL", unroll(size, 4)),
            ],
            invocations,
            workgroup_bytes: matrices.stored(2 * size, 2 * row_vectors)
                + Matrices::single(size, ROWS_SUBGROUPS * vectors)
                + matrices.stored(size, ROWS_SUBGROUPS * vectors)
                + if caps.lone_barriers { 0 } else { 16 },
        },
    )
}

/// The tile of `flash_backward_dkdv_coop` or `flash_backward_dkdv_columns_coop`. With `parts` it also writes d_scores, and
/// so many workgroups share a block.
pub(super) fn dkdv(caps: &Caps, head_dim: usize, element: Element, parts: Option<usize>) -> Option<Tile> {
    let matrices = Matrices::new(caps, head_dim, element)?;
    if head_dim > COLUMNS_HEAD_DIM {
        return fitting(caps, dkdv_tile(&matrices, SUBGROUPS, false, parts));
    }
    let shared = dkdv_tile(&matrices, SUBGROUPS / 2, true, parts);
    if shared.workgroup_bytes <= SHARED_BYTES && matrices.row_loads <= shared.invocations {
        return fitting(caps, shared);
    }
    fitting(caps, dkdv_tile(&matrices, SUBGROUPS, true, parts))
}

fn dkdv_tile(matrices: &Matrices, subgroups: usize, columns: bool, parts: Option<usize>) -> Tile {
    let Matrices { size, vectors, subgroup, row_vectors, row_loads, depth, .. } = *matrices;
    let (block_m, block_n, invocations) = (size, subgroups * size, subgroups * subgroup);
    let (first, second) = (depth.div_ceil(2), depth / 2);
    let (shader, staged) = if columns {
        ("attention/flash_backward_dkdv_columns_coop", matrices.stored(4 * size, row_vectors))
    } else {
        let halves = matrices.stored(4 * size, first * vectors) + matrices.stored(6 * size, second * vectors);
        ("attention/flash_backward_dkdv_coop", halves)
    };
    let mut constants = vec![
        ("SUBGROUP", subgroup),
        ("DEPTH_MATRICES", depth),
        ("MATRIX_CHUNKS", matrices.chunks()),
        ("STAGES", block_m.div_ceil((invocations / row_loads).max(1))),
        ("KEPT_MATRICES", first),
        ("KEPT_LOADS", matrices.kept_loads(first)),
        ("DS_SCRATCH", usize::from(parts.is_some())),
        ("DS_BLOCK", ds_block(size)),
        ("PARTS", parts.unwrap_or(1)),
    ];
    if columns {
        // Two tiles ahead: 2 to 4 % over one at head_dim 64, where registers are left.
        let (tiles, ahead) = if subgroups < SUBGROUPS { (4, 2) } else { (2, 1) };
        let tiles = unroll(size, tiles);
        constants.extend([("UNROLL", tiles), ("AHEAD", ahead.min(tiles))]);
    } else {
        constants.extend([
            ("FIRST_MATRICES", first),
            ("SECOND_MATRICES", second),
            ("UNROLL", unroll(size, block_n / block_m)),
        ]);
    }
    Tile {
        shader,
        block_m,
        block_n,
        matrix: Some(size),
        constants,
        invocations,
        workgroup_bytes: staged.max(matrices.stored(subgroups * size, first * vectors))
            + Matrices::single(2 * size, block_n / 4)
            + matrices.stored(2 * size, block_n / 4),
    }
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
    // What the registers hold beside the results, which more subgroups share. (With three at head_dim 128 and two row parts
    // they spill: 6.48 ms of whole backward in place of 5.88 at 18,432 tokens.) Three make a longer body too.
    let sets = if columns <= 3 || (size == 16 && row_parts > 2) { 3 } else { 2 };
    fitting(
        caps,
        Tile {
            shader: "attention/flash_backward_dq_from_ds_coop",
            block_m,
            block_n: ds_block(size),
            matrix: Some(size),
            constants: vec![
                ("SUBGROUP", subgroup),
                ("ROW_PARTS", row_parts),
                ("QUERY_MATRICES", SUBGROUPS / row_parts),
                ("COLUMN_MATRICES", columns),
                ("STAGES", step.div_ceil(invocations / row_loads)),
                ("SETS", sets),
                // A block of keys is four steps.
                ("BODY", if sets > 2 { 4 } else { 2 * unroll(size, 2) }),
                ("EARLY", columns.div_ceil(2)),
                ("DS_BLOCK", ds_block(size)),
            ],
            invocations,
            workgroup_bytes: matrices.stored(block_m, step / 4)
                + matrices.stored(step, 2 * columns * vectors)
                + 2 * row_parts * size * (vectors + 1) * 16
                + 16,
        },
    )
}

/// The tile of `flash_backward_dkdv_sum`, which adds the parts of `dkdv`.
pub(super) fn dkdv_sum(dkdv: &Tile, matrices: &Matrices, parts: usize) -> Tile {
    Tile {
        shader: "attention/flash_backward_dkdv_sum",
        constants: vec![("DEPTH_MATRICES", matrices.depth), ("DS_BLOCK", ds_block(matrices.size)), ("PARTS", parts)],
        invocations: 256,
        workgroup_bytes: 0,
        ..dkdv.clone()
    }
}

/// The tile of `flash_backward_dq_sum`, which adds the parts of `dq`.
pub(super) fn dq_sum(dq: &Tile) -> Tile {
    Tile {
        shader: "attention/flash_backward_dq_sum",
        matrix: None,
        constants: vec![("ROWS", SUM_ROWS), ("DS_BLOCK", dq.block_n)],
        invocations: 256,
        workgroup_bytes: 0,
        ..dq.clone()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::gpu::{MatrixKind, Tier};
    use crate::stage::flash::Layout;

    /// An H100 as far as plans look at it.
    pub fn caps() -> Caps {
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

    pub fn shape(tokens: usize, kv_heads: usize, element: Element) -> FlashShape {
        FlashShape { batch: 1, tokens, heads: 8, kv_heads, head_dim: 128, element, layout: Layout::HeadsTokens }
    }

    #[test]
    fn rows_are_for_many_workgroups_of_a_small_head_dim() {
        let caps = caps();
        let of = |caps: &Caps, tokens, head_dim, element| {
            forward_of_rows(caps, &FlashShape { head_dim, ..shape(tokens, 8, element) })
        };
        for head_dim in (16..=80).step_by(16) {
            // Two of them on a multiprocessor, or three where registers leave room for them.
            let tile = of(&caps, 8_192, head_dim, Element::F16);
            let most = if head_dim <= 48 { 16 << 10 } else { SHARED_BYTES };
            assert!(tile.is_some_and(|tile| tile.workgroup_bytes <= most), "{head_dim}");
        }
        assert!(of(&caps, 6_144, 64, Element::F16).is_some());
        assert_eq!(of(&caps, 4_096, 64, Element::F16), None);
        assert_eq!(of(&caps, 6_144, 80, Element::F16), None);
        assert_eq!(of(&caps, 18_432, 96, Element::F16), None);
        assert_eq!(of(&caps, 18_432, 64, Element::F32), None);
        // More lanes to a row of a matrix than it has vectors.
        let matrices = vec![MatrixKind { size: 8, factors: Element::F16 }];
        assert_eq!(of(&Caps { matrices, tier: Tier::Coop8, ..caps }, 18_432, 64, Element::F16), None);
    }

    #[test]
    fn dkdv_shares_a_multiprocessor_where_it_can() {
        let caps = caps();
        for parts in [None, Some(1), Some(4)] {
            let of = |head_dim| dkdv(&caps, head_dim, Element::F16, parts);
            for head_dim in (16..=64).step_by(16) {
                let shared = |tile: Tile| tile.invocations == 128 && tile.workgroup_bytes <= SHARED_BYTES;
                assert!(of(head_dim).is_some_and(shared), "{head_dim}");
            }
            for head_dim in (80..=MAX_HEAD_DIM).step_by(16) {
                assert!(of(head_dim).is_some_and(|tile| tile.invocations == 256), "{head_dim}");
            }
            let [below, above] = [COLUMNS_HEAD_DIM, COLUMNS_HEAD_DIM + 16].map(|d| of(d).map(|tile| tile.shader));
            assert_ne!(below, above);
        }
    }

    #[test]
    fn what_matrices_do_not_take_falls_through() {
        let caps = caps();
        for (head_dim, element) in [(128, Element::F32), (24, Element::F16), (144, Element::F16)] {
            assert_eq!(forward(&caps, head_dim, element), None);
            assert_eq!(dkdv(&caps, head_dim, element, None), None);
            assert_eq!(dq(&caps, head_dim, element), None);
        }
        for head_dim in (16..=MAX_HEAD_DIM).step_by(16) {
            assert!(forward(&caps, head_dim, Element::F16).is_some(), "{head_dim}");
            assert!(dkdv(&caps, head_dim, Element::F16, Some(1)).is_some(), "{head_dim}");
            assert!(dq(&caps, head_dim, Element::F16).is_some(), "{head_dim}");
        }
        // A device whose subgroups have no one size has no matrices for the kernels.
        assert_eq!(forward(&Caps { subgroup: 0, ..caps }, 128, Element::F16), None);
    }
}
