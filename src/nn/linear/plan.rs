//! Tile sizes and slices of a GEMM: pure functions of the device's capabilities and the sizes.

use crate::gpu::Caps;

/// C `[m, n]` = A B over k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gemm {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// A is stored `[m, k]`, otherwise `[k, m]`.
    pub a_along_k: bool,
    /// B is stored `[n, k]`, otherwise `[k, n]`.
    pub b_along_k: bool,
}

impl Gemm {
    /// Floating-point operations.
    pub fn work(&self) -> u64 {
        2 * self.m as u64 * self.n as u64 * self.k as u64
    }
}

/// Columns of a tile, and the step along k (`shaders/shared/gemm.wgsl`).
const BLOCK_N: usize = 64;
const BLOCK_K: usize = 16;

/// Workgroups that fill a large GPU.
const ENOUGH_WORKGROUPS: usize = 512;
/// Least k of a slice: below that, the partial sums' traffic outweighs the work.
const LEAST_SLICE: usize = 256;

/// Most work of one dispatch, in floating-point operations: a quarter of a second on a GPU of 1 TFLOP/s, so that no
/// driver's watchdog takes it for a hang.
const WORK_PER_DISPATCH: u64 = 1 << 38;

/// How a GEMM is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GemmPlan {
    /// Blocks of four rows that an invocation keeps in registers: a tile has 64 rows for each.
    pub row_blocks: usize,
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
        // Two blocks of rows read a third less of workgroup memory for each product, but leave half the workgroups.
        let mut plan = Self { row_blocks: 2, slices: 1, slice: gemm.k, tiles_per_dispatch: 1 };
        if gemm.m <= 64 || plan.workgroup_bytes() > u64::from(caps.limits.max_compute_workgroup_storage_size) {
            plan.row_blocks = 1;
        }
        plan.tiles_per_dispatch = (WORK_PER_DISPATCH / gemm.work().div_ceil(plan.tiles(gemm))).max(1);
        plan
    }

    /// k cut into slices where there are few tiles.
    pub fn split(caps: &Caps, gemm: &Gemm) -> Self {
        let whole = Self::whole(caps, gemm);
        let wanted = ENOUGH_WORKGROUPS.div_ceil(whole.tiles(gemm) as usize);
        let slices = wanted.clamp(1, gemm.k.div_ceil(LEAST_SLICE));
        let slice = gemm.k.div_ceil(slices).next_multiple_of(BLOCK_K);
        Self { slices: gemm.k.div_ceil(slice), slice, ..whole }
    }

    pub fn block_m(&self) -> usize {
        64 * self.row_blocks
    }

    /// Tiles of C.
    pub fn tiles(&self, gemm: &Gemm) -> u64 {
        gemm.m.div_ceil(self.block_m()) as u64 * gemm.n.div_ceil(BLOCK_N) as u64
    }

    /// Bytes of workgroup memory, as the shader declares it.
    pub fn workgroup_bytes(&self) -> u64 {
        (BLOCK_K / 4 * (self.block_m() + 2 + BLOCK_N + 2) * 16) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_cover_c_and_k_and_fit() {
        let caps = Caps::default();
        for (m, n, k) in [(1, 8, 8), (64, 64, 16), (130, 136, 24), (1024, 1024, 98_304), (8, 24, 130), (256, 688, 2049)]
        {
            let gemm = Gemm { m, n, k, a_along_k: false, b_along_k: false };
            for plan in [GemmPlan::whole(&caps, &gemm), GemmPlan::split(&caps, &gemm)] {
                assert!(plan.slices * plan.slice >= k && (plan.slices - 1) * plan.slice < k, "{gemm:?}: {plan:?}");
                assert!(plan.slices == 1 || plan.slice.is_multiple_of(BLOCK_K), "{gemm:?}: {plan:?}");
                let work = plan.tiles_per_dispatch * gemm.work() / plan.tiles(&gemm);
                assert!(plan.tiles_per_dispatch == 1 || work <= WORK_PER_DISPATCH, "{gemm:?}: {plan:?}");
                assert!(plan.workgroup_bytes() <= 16 << 10, "{gemm:?}: {plan:?}");
            }
        }
    }
}
