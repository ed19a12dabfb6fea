//! Tiles and slices of a GEMM: pure functions of the device's capabilities and the sizes. The one place to tune them.

use crate::gpu::Caps;
use crate::tensor::Element;

/// C `[m, n]` = A B over k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nn) struct Gemm {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// A is stored `[m, k]`, otherwise `[k, m]`.
    pub a_along_k: bool,
    /// B is stored `[n, k]`, otherwise `[k, n]`.
    pub b_along_k: bool,
    /// Storage type of A and B.
    pub element: Element,
    /// Type of what the epilogue stores.
    pub output: Element,
    /// If the epilogue needs the columns of C in pairs: how far apart a pair is. They form groups of twice as many.
    pub half: Option<usize>,
}

impl Gemm {
    /// y = x W^T of a linear map.
    pub fn forward(rows: usize, inputs: usize, outputs: usize, element: Element) -> Self {
        Self { m: rows, n: outputs, k: inputs, a_along_k: true, b_along_k: true, element, output: element, half: None }
    }

    /// dx = dy W of a linear map.
    pub fn backward_input(rows: usize, inputs: usize, outputs: usize, element: Element) -> Self {
        Self { m: rows, n: inputs, k: outputs, a_along_k: true, b_along_k: false, element, output: element, half: None }
    }

    /// dW = dy^T x of a linear map.
    pub fn backward_weight(rows: usize, inputs: usize, outputs: usize, element: Element) -> Self {
        Self {
            m: outputs,
            n: inputs,
            k: rows,
            a_along_k: false,
            b_along_k: false,
            element,
            output: Element::F32,
            half: None,
        }
    }

    /// Columns of C that the epilogue gets at a time, counted in vectors.
    pub fn halves(&self) -> usize {
        if self.half.is_some() { 2 } else { 1 }
    }

    /// Floating-point operations.
    pub fn work(&self) -> u64 {
        2 * self.m as u64 * self.n as u64 * self.k as u64
    }
}

/// Least k of a slice: below that, the partial sums' traffic outweighs the work.
const LEAST_SLICE: usize = 256;

/// Workgroups without matrices that fill a large GPU.
const ENOUGH_WORKGROUPS: usize = 512;

/// Workgroups with matrices on a multiprocessor at a time.
const COOP_WORKGROUPS: usize = 2;
/// Most slices with matrices, and the k whose products take as long as a slice's partial sums.
const COOP_SLICES: usize = 64;
const SLICE_OVERHEAD: f64 = 256.0;
/// k of a step, in bytes.
const STEP_BYTES: usize = 64;

/// Most work of one dispatch without matrices, in floating-point operations: a quarter of a second on a GPU of 1
/// TFLOP/s, so that no driver's watchdog takes it for a hang.
const SIMT_WORK_PER_DISPATCH: u64 = 1 << 38;

/// The kernel that computes a tile of C in a workgroup.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::nn) enum Tile {
    /// `shaders/shared/gemm.wgsl`.
    Simt(SimtTile),
    /// `shaders/shared/gemm_coop.wgsl`.
    Coop(CoopTile),
}

/// 64 columns for each half by 64 rows for each block of four rows that an invocation keeps in registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::nn) struct SimtTile {
    pub row_blocks: usize,
    halves: usize,
}

impl SimtTile {
    /// The step along k.
    const BLOCK_K: usize = 16;

    fn new(caps: &Caps, gemm: &Gemm) -> Self {
        // Two blocks, of rows or of columns, read a third less of workgroup memory for each product, but leave half the
        // workgroups.
        let halves = gemm.halves();
        let tile = Self { row_blocks: 2, halves };
        let fits = tile.workgroup_bytes() <= caps.limits.max_compute_workgroup_storage_size as usize;
        if halves == 1 && gemm.m > 64 && fits { tile } else { Self { row_blocks: 1, halves } }
    }

    fn block(self) -> [usize; 2] {
        [64 * self.row_blocks, 64 * self.halves]
    }

    fn workgroup_bytes(self) -> usize {
        let [block_m, block_n] = self.block();
        Self::BLOCK_K / 4 * (block_m + 2 + block_n + 2) * 16
    }
}

/// A tile's subgroups, and each one's matrices, along m and n.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::nn) struct Shape {
    pub subgroups: [usize; 2],
    pub matrices: [usize; 2],
    /// Speed at a large GEMM, against the fastest shape (measured on an H100).
    speed: f64,
}

/// The shapes of tiles, for every size of matrix: 128x128, 128x64 and 64x64 of C with matrices of 16x16.
pub(in crate::nn) const SHAPES: [Shape; 3] = [
    Shape { subgroups: [2, 2], matrices: [4, 4], speed: 1.0 },
    Shape { subgroups: [2, 2], matrices: [4, 2], speed: 0.57 },
    Shape { subgroups: [2, 2], matrices: [2, 2], speed: 0.46 },
];

/// A tile on cooperative matrices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::nn) struct CoopTile {
    /// Rows and columns of a matrix.
    pub matrix: usize,
    /// Invocations of a subgroup.
    pub subgroup: usize,
    pub shape: Shape,
    /// k of a step, and steps of a loop's body.
    pub block_k: usize,
    pub unroll: usize,
    element: Element,
}

impl CoopTile {
    /// The tile of a shape, if the device has its matrices and it fits.
    pub fn new(caps: &Caps, gemm: &Gemm, shape: Shape) -> Option<Self> {
        let (matrix, subgroup, element) = (caps.tier.matrix()?, caps.subgroup, gemm.element);
        // While the last matrices of a step are multiplied, the first of the next are loaded.
        let block_k = (STEP_BYTES / element.bytes() as usize).max(2 * matrix);
        // Two steps in the loop's body gain up to 3 % on an H100; llvmpipe compiles them long.
        let unroll = if matrix == 16 { 2 } else { 1 };
        let tile = Self { matrix, subgroup, shape, block_k, unroll, element };
        let limits = &caps.limits;
        let fits = caps.has_matrix(caps.tier, element)
            && subgroup.is_multiple_of(matrix)
            && (subgroup / matrix).is_power_of_two()
            && tile.invocations() <= limits.max_compute_invocations_per_workgroup as usize
            && tile.invocations() <= limits.max_compute_workgroup_size_x as usize
            && tile.stages(gemm).is_some()
            && tile.workgroup_bytes(gemm) <= limits.max_compute_workgroup_storage_size as usize;
        fits.then_some(tile)
    }

    /// Rows and columns.
    fn block(self) -> [usize; 2] {
        let Shape { subgroups: [subgroups_m, subgroups_n], matrices: [matrices_m, matrices_n], .. } = self.shape;
        [subgroups_m * matrices_m * self.matrix, subgroups_n * matrices_n * self.matrix]
    }

    /// Vectors that a lane has of a row of a matrix of C.
    pub fn lane_vectors(self) -> usize {
        let vectors = self.matrix / 4;
        vectors / vectors.min(self.subgroup / self.matrix)
    }

    /// Vectors that a lane hands to the epilogue at a time: as many as make 16 bytes, where it has them.
    pub fn wide(self, gemm: &Gemm) -> usize {
        let in_pairs = self.lane_vectors().is_multiple_of(2) && gemm.half.is_none_or(|half| half.is_multiple_of(8));
        if gemm.output == Element::F16 && in_pairs { 2 } else { 1 }
    }

    fn subgroups(self) -> usize {
        self.shape.subgroups.iter().product()
    }

    pub fn invocations(self) -> usize {
        self.subgroups() * self.subgroup
    }

    /// k of a loop's body.
    pub fn k_step(self) -> usize {
        self.block_k * self.unroll
    }

    /// Lines and columns of the tiles of A and B as they lie in workgroup memory: in a line along k are rows of all
    /// subgroups' parts.
    fn stored(self, gemm: &Gemm) -> [(usize, usize); 2] {
        let [[block_m, block_n], [subgroups_m, subgroups_n]] = [self.block(), self.shape.subgroups];
        [(gemm.a_along_k, block_m, subgroups_m), (gemm.b_along_k, block_n, subgroups_n)].map(
            |(along_k, block, subgroups)| {
                if along_k { (block / subgroups, subgroups * self.block_k) } else { (self.block_k, block) }
            },
        )
    }

    /// Loads of 16 bytes that an invocation makes of the tiles of A and B; `None` if they do not come out even.
    pub fn stages(self, gemm: &Gemm) -> Option<[usize; 2]> {
        let mut stages = [0; 2];
        for (stages, (lines, columns)) in stages.iter_mut().zip(self.stored(gemm)) {
            let line_loads = columns * self.element.bytes() as usize / 16;
            if line_loads > self.invocations() || !self.invocations().is_multiple_of(line_loads) {
                return None;
            }
            let stage_lines = self.invocations() / line_loads;
            if !lines.is_multiple_of(stage_lines) {
                return None;
            }
            *stages = lines / stage_lines;
        }
        Some(stages)
    }

    /// The time of a GEMM, in an unknown unit: workgroups run in waves, which take as long with fewer of them.
    fn time(self, caps: &Caps, gemm: &Gemm, slices: usize) -> f64 {
        let waves = (Tile::Coop(self).count(gemm) as usize * slices).div_ceil(COOP_WORKGROUPS * caps.processors.get());
        let slice = gemm.k.div_ceil(slices) as f64 + if slices > 1 { SLICE_OVERHEAD } else { 0.0 };
        (waves * self.block().iter().product::<usize>()) as f64 * slice / self.shape.speed
    }

    /// Bytes of workgroup memory, as the shader declares it.
    pub fn workgroup_bytes(self, gemm: &Gemm) -> usize {
        let staged = self.stored(gemm).map(|(lines, columns)| lines * (columns + 8) * self.element.bytes() as usize);
        let sums = self.subgroups() * self.matrix * (self.matrix + 8) * 4;
        staged.iter().sum::<usize>() + sums
    }
}

impl Tile {
    /// The tile, and at most `slices` slices of k.
    fn choose(caps: &Caps, gemm: &Gemm, slices: usize) -> (Self, usize) {
        if caps.tier.matrix().is_some() {
            let tiles = SHAPES.into_iter().filter_map(|shape| CoopTile::new(caps, gemm, shape));
            let choices = tiles.flat_map(|tile| (1..=slices.min(COOP_SLICES)).map(move |slices| (tile, slices)));
            if let Some((tile, slices)) =
                choices.min_by(|a, b| a.0.time(caps, gemm, a.1).total_cmp(&b.0.time(caps, gemm, b.1)))
            {
                return (Self::Coop(tile), slices);
            }
            tracing::debug!(tier = %caps.tier, ?gemm, "does not fit cooperative matrices");
        }
        let tile = Self::Simt(SimtTile::new(caps, gemm));
        let wanted = ENOUGH_WORKGROUPS.div_ceil(tile.count(gemm) as usize);
        (tile, wanted.min(slices))
    }

    /// Tiles of C.
    pub fn count(self, gemm: &Gemm) -> u64 {
        let [block_m, block_n] = self.block();
        gemm.m.div_ceil(block_m) as u64 * gemm.n.div_ceil(block_n) as u64
    }

    /// Rows and columns.
    fn block(self) -> [usize; 2] {
        match self {
            Self::Simt(tile) => tile.block(),
            Self::Coop(tile) => tile.block(),
        }
    }

    /// What k of a slice is a multiple of.
    fn k_step(self) -> usize {
        match self {
            Self::Simt(_) => SimtTile::BLOCK_K,
            Self::Coop(tile) => tile.k_step(),
        }
    }
}

/// How a GEMM is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::nn) struct GemmPlan {
    pub tile: Tile,
    /// Slices of k, each with its own sums.
    pub slices: usize,
    /// k of one slice.
    pub slice: usize,
    /// Tiles of C in one dispatch.
    pub tiles_per_dispatch: u64,
}

impl GemmPlan {
    /// All of k in one workgroup.
    pub fn whole(caps: &Caps, gemm: &Gemm) -> Self {
        Self::with_tile(caps, gemm, Tile::choose(caps, gemm, 1).0)
    }

    /// k cut into slices where there are few tiles.
    pub fn split(caps: &Caps, gemm: &Gemm) -> Self {
        let (tile, slices) = Tile::choose(caps, gemm, gemm.k.div_ceil(LEAST_SLICE));
        let slice = gemm.k.div_ceil(slices).next_multiple_of(tile.k_step());
        Self { slices: gemm.k.div_ceil(slice), slice, ..Self::with_tile(caps, gemm, tile) }
    }

    /// All of k in one workgroup, with this tile.
    pub fn with_tile(caps: &Caps, gemm: &Gemm, tile: Tile) -> Self {
        let mut plan = Self { tile, slices: 1, slice: gemm.k, tiles_per_dispatch: 1 };
        let work = match tile {
            Tile::Simt(_) => SIMT_WORK_PER_DISPATCH,
            Tile::Coop(_) => caps.work_per_dispatch,
        };
        plan.tiles_per_dispatch = (work / gemm.work().div_ceil(plan.tiles(gemm))).max(1);
        plan
    }

    /// Tiles of C.
    pub fn tiles(&self, gemm: &Gemm) -> u64 {
        self.tile.count(gemm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{MatrixKind, Tier};

    #[test]
    fn plans_cover_c_and_k_and_fit() {
        let coop = |tier: Tier, size, subgroup| {
            let limits = wgpu::Limits { max_compute_workgroup_storage_size: 32 << 10, ..wgpu::Limits::default() };
            let matrices = [Element::F16, Element::F32].map(|factors| MatrixKind { size, factors }).to_vec();
            Caps { limits, shader_f16: true, matrices, subgroup, tier, ..Caps::default() }
        };
        let devices = [Caps::default(), coop(Tier::Coop8, 8, 8), coop(Tier::Coop8, 8, 32), coop(Tier::Coop16, 16, 32)];
        for (caps, element) in devices.iter().flat_map(|caps| [Element::F16, Element::F32].map(|e| (caps, e))) {
            for (m, n, k) in
                [(1, 8, 8), (64, 64, 16), (130, 136, 24), (1024, 1024, 98_304), (8, 24, 130), (256, 688, 2049)]
            {
                let gemm = Gemm::backward_weight(k, n, m, element);
                let in_pairs = Gemm { half: Some(n / 2), ..Gemm::forward(m, k, n, element) };
                let plans = [GemmPlan::whole(caps, &gemm), GemmPlan::split(caps, &gemm)].map(|plan| (gemm, plan));
                for (gemm, plan) in plans.into_iter().chain([(in_pairs, GemmPlan::whole(caps, &in_pairs))]) {
                    if let Tile::Simt(tile) = plan.tile {
                        assert!(tile.workgroup_bytes() <= 16 << 10, "{gemm:?}: {tile:?}");
                    }
                    let case = format!("{}, {gemm:?}: {plan:?}", caps.tier);
                    assert_eq!(caps.tier.matrix().is_some(), matches!(plan.tile, Tile::Coop(_)), "{case}");
                    assert!(plan.slices * plan.slice >= k && (plan.slices - 1) * plan.slice < k, "{case}");
                    assert!(plan.slices == 1 || plan.slice.is_multiple_of(plan.tile.k_step()), "{case}");
                    let work = plan.tiles_per_dispatch * gemm.work() / plan.tiles(&gemm);
                    assert!(plan.tiles_per_dispatch == 1 || work <= caps.work_per_dispatch, "{case}");
                }
            }
        }
    }

    #[test]
    fn two_workgroups_fit_a_multiprocessor() {
        let matrices = vec![MatrixKind { size: 16, factors: Element::F16 }];
        let limits = wgpu::Limits { max_compute_workgroup_storage_size: 48 << 10, ..wgpu::Limits::default() };
        let caps = Caps { limits, shader_f16: true, matrices, subgroup: 32, tier: Tier::Coop16, ..Caps::default() };
        for (a_along_k, b_along_k) in [(true, true), (true, false), (false, false)] {
            let gemm = Gemm { a_along_k, b_along_k, ..Gemm::forward(8192, 8192, 8192, Element::F16) };
            for tile in SHAPES.into_iter().map(|shape| CoopTile::new(&caps, &gemm, shape)) {
                assert!(tile.is_some_and(|tile| tile.workgroup_bytes(&gemm) <= 24 << 10), "{gemm:?}: {tile:?}");
            }
        }
    }

    #[test]
    fn small_outputs_get_small_tiles() {
        let limits = wgpu::Limits { max_compute_workgroup_storage_size: 48 << 10, ..wgpu::Limits::default() };
        let matrices = vec![MatrixKind { size: 16, factors: Element::F16 }];
        let caps = Caps { limits, shader_f16: true, matrices, subgroup: 32, tier: Tier::Coop16, ..Caps::default() };
        let block = |m, n| {
            let gemm = Gemm::forward(m, 512, n, Element::F16);
            Tile::choose(&caps, &gemm, 1).0.block()
        };
        assert_eq!(block(98_304, 1024), [128, 128]);
        assert_eq!(block(98_304, 64), [128, 64]);
        assert_eq!(block(4096, 512), [128, 64]);
        assert_eq!(block(1024, 256), [64, 64]);
    }
}
