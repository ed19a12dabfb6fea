//! Tiles of the kernels with cooperative matrices: one structure for every size of matrix and subgroup. What does not
//! fit a device is `None`, and the plan falls to the kernels without matrices.

use super::FlashShape;
use super::plan::Tile;
use crate::gpu::{Caps, ComponentLayout};
use crate::tensor::Element;

/// Subgroups of a workgroup. On an H100 one workgroup of eight is resident on a multiprocessor, and its registers hold
/// the kept rows and the results.
const SUBGROUPS: usize = 8;
/// Tiles of a loop's body: of the forward and of dq by recomputing two, 4 to 8 % over one; of dk and dv eight, 3 % over two
/// (measured on an H100). The tiles of queries are numbered within blocks of d_scores, which have a multiple of these.
/// Software drivers, which have matrices of 8x8, compile too long already with two.
const fn unroll(size: usize, tiles: usize) -> usize {
    if size == 16 { tiles } else { 1 }
}
/// Largest head_dim: kept rows and results of more do not fit the registers, nor staged rows 48 KiB of workgroup memory.
const MAX_HEAD_DIM: usize = 128;
/// `flash_forward_registers_coop` up to a head_dim.
struct ForwardRegisters {
    head_dim: usize,
    /// A workgroup of four shares a multiprocessor with another, in 24 KiB each.
    subgroups: usize,
    /// It is for workgroups that are more than so many times what the multiprocessors run at a time.
    rounds: f64,
    /// Matrices of keys in a tile, and tiles in a loop's body.
    keys: usize,
    tiles: usize,
    /// Matrices of a row of q that leave the registers to the others. (At head_dim 96 none or two are 2 % slower than one,
    /// at 128 two 3 % than three, which is what fits.)
    stored: usize,
}

/// Where it is faster than `flash_forward_coop` on an H200, and the fastest form of those that were measured. (4,096 tokens
/// and 8 heads, head_dim 64 / 80 / 96: 0.106 / 0.132 / 0.173 ms in place of 0.101 / 0.115 / 0.121; 6,144 and 128: 0.354 in
/// place of 0.315. 8,192 and 64 / 96 / 128: 0.226 / 0.360 / 0.474 in place of 0.289 / 0.448 / 0.507.)
const FORWARD_REGISTERS: [ForwardRegisters; 5] = [
    ForwardRegisters { head_dim: 48, subgroups: 4, rounds: 1.0, keys: 2, tiles: 4, stored: 0 },
    ForwardRegisters { head_dim: 80, subgroups: 4, rounds: 1.0, keys: 2, tiles: 2, stored: 0 },
    ForwardRegisters { head_dim: 96, subgroups: 8, rounds: 1.5, keys: 2, tiles: 2, stored: 1 },
    ForwardRegisters { head_dim: 112, subgroups: 8, rounds: 1.5, keys: 2, tiles: 2, stored: 1 },
    ForwardRegisters { head_dim: 128, subgroups: 8, rounds: 1.5, keys: 1, tiles: 4, stored: 3 },
];
/// `flash_backward_dkdv_registers_coop`: up to a head_dim, with so many subgroups, matrices of queries in a tile and tiles in
/// a loop's body, the fastest of those that were measured on an H200. At head_dim 128 its registers spill.
const DKDV_REGISTERS: [(usize, usize, usize, usize); 3] = [(80, 4, 2, 4), (96, 8, 2, 4), (112, 8, 1, 1)];
/// Queries of a workgroup of `flash_backward_dq_sum`.
pub(super) const SUM_ROWS: usize = 32;

/// Layouts in which what a lane has of d_scores^T are 16 bytes that dq can take: of 8x8 all keys of one query (llvmpipe's),
/// of 16x16 four queries of two keys each (NVIDIA's).
const BY_QUERIES: ComponentLayout = ComponentLayout { rows: 8, columns: 1, run: 1 };
const BY_KEYS: ComponentLayout = ComponentLayout { rows: 2, columns: 4, run: 2 };

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
    /// How a subgroup holds them, if kernels can reach their components.
    layout: Option<ComponentLayout>,
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
            layout: caps.layout(caps.tier, element),
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
            layout: None,
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

/// The forward in registers: its subgroups branch by themselves.
pub(super) const FORWARD_IN_REGISTERS: &str = "attention/flash_forward_registers_coop";

/// The tile of `flash_forward_registers_coop`, for devices and shapes that it is faster for than `flash_forward_coop`.
pub(super) fn forward_in_registers(caps: &Caps, shape: &FlashShape) -> Option<Tile> {
    let FlashShape { batch, tokens, heads, head_dim, element, .. } = *shape;
    let matrices = Matrices::new(caps, head_dim, element)?;
    let Matrices { size, subgroup, row_vectors, row_loads, depth, layout, .. } = matrices;
    let layout = layout?;
    let form = FORWARD_REGISTERS.into_iter().find(|form| head_dim <= form.head_dim)?;
    let subgroups = form.subgroups;
    let (block_m, block_n, invocations) = (2 * size * subgroups, form.keys * size, subgroups * subgroup);
    let of_all = batch * heads * tokens.div_ceil(block_m) * subgroups;
    if of_all as f64 <= form.rounds * (SUBGROUPS * caps.processors.get()) as f64 || row_loads > invocations {
        return None;
    }
    let components = layout.rows * layout.columns;
    if form.stored > 0 && !components.is_multiple_of(4) {
        return None;
    }
    let tiles = matrices.stored(2 * block_n, 2 * row_vectors);
    let queries = 2 * form.stored * subgroups * size * size * element.bytes() as usize;
    fitting(
        caps,
        Tile {
            shader: FORWARD_IN_REGISTERS,
            block_m,
            block_n,
            matrix: Some(size),
            layout: Some(layout),
            constants: vec![
                ("SUBGROUP", subgroup),
                ("DEPTH_MATRICES", depth),
                ("KEY_MATRICES", form.keys),
                ("STORED_MATRICES", form.stored),
                ("LANE_VECTORS", components / 4),
                ("QUERY_LOADS", (size * row_loads).div_ceil(subgroup)),
                ("STAGES", block_n.div_ceil(invocations / row_loads)),
                ("LANE_BITS", (size / layout.columns).ilog2() as usize),
                ("UNROLL", unroll(size, form.tiles)),
            ],
            invocations,
            workgroup_bytes: (tiles + queries).max(matrices.stored(size * subgroups, row_vectors))
                + 16
                + if caps.lone_barriers { 0 } else { 16 },
        },
    )
}

/// The tile of the kernel of dk and dv. With `parts` it also writes d_scores, and so many workgroups share a block.
pub(super) fn dkdv(caps: &Caps, head_dim: usize, element: Element, parts: Option<usize>) -> Option<Tile> {
    let matrices = Matrices::new(caps, head_dim, element)?;
    let in_registers = dkdv_in_registers(&matrices, head_dim, parts).and_then(|tile| fitting(caps, tile));
    in_registers.or_else(|| fitting(caps, dkdv_through_memory(&matrices, parts)))
}

/// The tile of `flash_backward_dkdv_registers_coop`.
fn dkdv_in_registers(matrices: &Matrices, head_dim: usize, parts: Option<usize>) -> Option<Tile> {
    let Matrices { size, subgroup, row_vectors, row_loads, depth, layout, .. } = *matrices;
    let layout = layout.filter(|layout| [(8, BY_QUERIES), (16, BY_KEYS)].contains(&(size, *layout)))?;
    let (_, subgroups, tile, unrolled) = DKDV_REGISTERS.into_iter().find(|(most, ..)| head_dim <= *most)?;
    let (block_m, block_n, invocations) = (tile * size, subgroups * size, subgroups * subgroup);
    if row_loads > invocations {
        return None;
    }
    Some(Tile {
        shader: "attention/flash_backward_dkdv_registers_coop",
        block_m,
        block_n,
        matrix: Some(size),
        layout: Some(layout),
        constants: vec![
            ("SUBGROUP", subgroup),
            ("DEPTH_MATRICES", depth),
            ("TILE_MATRICES", tile),
            ("OWN_LOADS", (size * row_loads).div_ceil(subgroup)),
            ("STAGES", block_m.div_ceil(invocations / row_loads)),
            ("DS_SCRATCH", usize::from(parts.is_some())),
            ("DS_BLOCK", ds_block(size)),
            ("PARTS", parts.unwrap_or(1)),
            ("UNROLL", unroll(size, unrolled)),
        ],
        invocations,
        workgroup_bytes: matrices.stored(2 * block_m, 2 * row_vectors).max(matrices.stored(block_n, row_vectors))
            + 16 * block_m
            + 16,
    })
}

/// The tile of `flash_backward_dkdv_coop`.
fn dkdv_through_memory(matrices: &Matrices, parts: Option<usize>) -> Tile {
    let Matrices { size, vectors, subgroup, row_loads, depth, .. } = *matrices;
    let (block_m, block_n, invocations) = (size, SUBGROUPS * size, SUBGROUPS * subgroup);
    let (first, second) = (depth.div_ceil(2), depth / 2);
    let staged = matrices.stored(4 * size, first * vectors) + matrices.stored(6 * size, second * vectors);
    Tile {
        shader: "attention/flash_backward_dkdv_coop",
        block_m,
        block_n,
        matrix: Some(size),
        layout: None,
        constants: vec![
            ("SUBGROUP", subgroup),
            ("DEPTH_MATRICES", depth),
            ("MATRIX_CHUNKS", matrices.chunks()),
            ("STAGES", block_m.div_ceil(invocations / row_loads)),
            ("KEPT_MATRICES", first),
            ("KEPT_LOADS", matrices.kept_loads(first)),
            ("FIRST_MATRICES", first),
            ("SECOND_MATRICES", second),
            ("DS_SCRATCH", usize::from(parts.is_some())),
            ("DS_BLOCK", ds_block(size)),
            ("PARTS", parts.unwrap_or(1)),
            ("UNROLL", unroll(size, block_n / block_m)),
        ],
        invocations,
        workgroup_bytes: staged.max(matrices.stored(block_n, first * vectors))
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
            layout: None,
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
    let by_keys = dkdv(caps, head_dim, element, Some(1))?.layout == Some(BY_KEYS);
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
            layout: None,
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
                ("BY_KEYS", usize::from(by_keys)),
            ],
            invocations,
            workgroup_bytes: if by_keys {
                matrices.stored(step, block_m / 4)
            } else {
                matrices.stored(block_m, step / 4)
            } + matrices.stored(step, 2 * columns * vectors)
                + 2 * row_parts * size * (vectors + 1) * 16
                + 16,
        },
    )
}

/// The tile of `flash_backward_dkdv_sum`, which adds the parts of `dkdv`.
pub(super) fn dkdv_sum(dkdv: &Tile, matrices: &Matrices, parts: usize) -> Tile {
    Tile {
        shader: "attention/flash_backward_dkdv_sum",
        // What a workgroup adds.
        block_m: matrices.size,
        layout: None,
        constants: vec![
            ("DEPTH_MATRICES", matrices.depth),
            ("DS_BLOCK", ds_block(matrices.size)),
            ("PARTS", parts),
            ("IN_GROUPS", usize::from(dkdv.layout.is_none())),
        ],
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
        let layouts = matrices.iter().map(|&kind| (kind, BY_KEYS)).collect();
        Caps { limits, shader_f16: true, matrices, layouts, subgroup: 32, tier: Tier::Coop16, ..Caps::default() }
    }

    pub fn shape(tokens: usize, kv_heads: usize, element: Element) -> FlashShape {
        FlashShape { batch: 1, tokens, heads: 8, kv_heads, head_dim: 128, element, layout: Layout::HeadsTokens }
    }

    /// Two workgroups of four subgroups share a multiprocessor, or one of eight has it.
    fn fits_a_multiprocessor(tile: &Tile) -> bool {
        match tile.invocations {
            128 => tile.workgroup_bytes <= 24 << 10,
            256 => tile.workgroup_bytes <= 48 << 10,
            _ => false,
        }
    }

    #[test]
    fn the_forward_in_registers_is_for_many_workgroups() {
        let caps = caps();
        let of = |caps: &Caps, tokens, head_dim, element| {
            forward_in_registers(caps, &FlashShape { head_dim, ..shape(tokens, 8, element) })
        };
        for head_dim in (16..=MAX_HEAD_DIM).step_by(16) {
            let tile = of(&caps, 8_192, head_dim, Element::F16);
            assert!(tile.is_some_and(|tile| fits_a_multiprocessor(&tile)), "{head_dim}");
            assert_eq!(of(&caps, 4_096, head_dim, Element::F16), None);
        }
        // No matrices of f32, and none that tell their components.
        assert_eq!(of(&caps, 18_432, 64, Element::F32), None);
        assert_eq!(of(&Caps { layouts: Vec::new(), ..caps }, 18_432, 64, Element::F16), None);
    }

    #[test]
    fn dkdv_is_in_registers_where_it_can_be() {
        let caps = caps();
        let other = ComponentLayout { rows: 4, columns: 2, run: 2 };
        let elsewhere = Caps { layouts: caps.layouts.iter().map(|&(kind, _)| (kind, other)).collect(), ..caps.clone() };
        for (parts, head_dim) in [None, Some(1), Some(4)]
            .into_iter()
            .flat_map(|parts| (16..=MAX_HEAD_DIM).step_by(16).map(move |d| (parts, d)))
        {
            let of = |caps| dkdv(caps, head_dim, Element::F16, parts).expect("it fits");
            assert!(fits_a_multiprocessor(&of(&caps)), "{head_dim}");
            assert_eq!(of(&caps).layout.is_some(), head_dim <= 112);
            assert_eq!(of(&elsewhere).layout, None);
            // A body of tiles lies in one block of queries.
            let unrolled = of(&caps).constants.iter().find(|(name, _)| *name == "UNROLL").map_or(1, |(_, n)| *n);
            assert!(ds_block(16).is_multiple_of(unrolled * of(&caps).block_m));
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
