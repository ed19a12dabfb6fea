//! The matrix product that linear maps, SwiGLU and the projections are made of: one GEMM with an epilogue each.

mod plan;

use crate::error::Result;
use crate::gpu::{Caps, Kernel, grid, params};
use crate::recording::{Command, Recording};
use plan::Tile;
pub(super) use plan::{Gemm, GemmPlan};

params!(GemmParams { m: u32, n: u32, k: u32, slice: u32, first_tile: u32, tiles: u32 });

/// The kernel of an epilogue: with the GEMM of the plan's tile, and `c` for tensors like its factors.
pub(super) fn kernel(caps: &Caps, shader: &'static str, gemm: &Gemm, plan: &GemmPlan) -> Kernel {
    let wide = match plan.tile {
        Tile::Simt(_) => 1,
        Tile::Coop(tile) => tile.wide(gemm),
    };
    let kernel = Kernel::new(caps, shader).element("c", gemm.output);
    let kernel = if wide == 1 { kernel.wide_one() } else { kernel.wide(gemm.output) };
    let kernel = match plan.tile {
        Tile::Simt(tile) => kernel
            .module("shared/gemm")
            .element("a", gemm.element)
            .element("b", gemm.element)
            .constant("ROW_BLOCKS", tile.row_blocks),
        Tile::Coop(tile) => {
            let [subgroups_m, subgroups_n] = tile.shape.subgroups;
            let [matrices_m, matrices_n] = tile.shape.matrices;
            let [a_stages, b_stages] = tile.stages(gemm).unwrap_or_default();
            kernel
                .module("shared/gemm_coop")
                .element("elem", gemm.element)
                .matrices(tile.matrix, gemm.element)
                .constant("SUBGROUP", tile.subgroup)
                .constant("SUBGROUPS_M", subgroups_m)
                .constant("SUBGROUPS_N", subgroups_n)
                .constant("MATRICES_M", matrices_m)
                .constant("MATRICES_N", matrices_n)
                .constant("BLOCK_K", tile.block_k)
                .constant("BLOCK_MATRICES", tile.block_k / tile.matrix)
                .constant("UNROLL", tile.unroll)
                .constant("HALF_MATRICES", matrices_n / gemm.halves())
                .constant("LANE_PARTS", tile.lane_vectors() / wide)
                .constant("A_STAGES", a_stages)
                .constant("B_STAGES", b_stages)
                .flag("K_EVEN", gemm.k.is_multiple_of(tile.k_step()))
        }
    };
    kernel
        .flag("A_ALONG_K", gemm.a_along_k)
        .flag("B_ALONG_K", gemm.b_along_k)
        .constant("HALVES", gemm.halves())
        .constant("HALF", gemm.half.unwrap_or(1))
}

/// Adds the GEMM's dispatches: one, or several over parts of the tiles where one would take too long.
pub(super) fn dispatch(
    recording: &Recording,
    mut command: Command,
    kernel: Kernel,
    gemm: &Gemm,
    plan: &GemmPlan,
) -> Result<Command> {
    let all = plan.tiles(gemm);
    let work_per_tile = gemm.work().div_ceil(all);
    let mut first_tile = 0;
    while first_tile < all {
        let tiles = plan.tiles_per_dispatch.min(all - first_tile);
        let params = GemmParams {
            m: gemm.m as u32,
            n: gemm.n as u32,
            k: gemm.k as u32,
            slice: plan.slice as u32,
            first_tile: first_tile as u32,
            tiles: tiles as u32,
        };
        let [x, y, _] = grid(recording.caps(), tiles)?;
        command = command.dispatch(kernel.clone(), params, [x, y, plan.slices as u32], tiles * work_per_tile);
        first_tile += tiles;
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::plan::{CoopTile, SHAPES};
    use super::*;
    use crate::cpu::{Args, Reference};
    use crate::gpu::{MatrixKind, Tier, parse, reflect, tested};
    use crate::real::Real;
    use crate::tensor::{Element, Tensor};
    use crate::{Executor, Gpu, GpuExecutor};

    /// C = A B with A and B stored either way and columns in pairs, of a size that no tile divides. (Pairs less
    /// than 16 bytes wide: tests of `qkv`.)
    fn gemms(element: Element) -> [Gemm; 4] {
        [
            Gemm::forward(152, 72, 136, element),
            Gemm { half: Some(72), ..Gemm::forward(152, 72, 144, element) },
            Gemm::backward_input(152, 136, 72, element),
            Gemm::backward_weight(72, 136, 152, element),
        ]
    }

    /// The GPU's results are compared with [`product`] instead.
    struct NoReference;

    impl Reference for NoReference {
        fn run<T: Real>(&self, _: &Args<'_, T>) -> Result<()> {
            Ok(())
        }
    }

    /// A GEMM cut in this way: A, B and C.
    fn record(caps: &Caps, gemm: &Gemm, plan: &GemmPlan) -> Result<(Arc<Recording>, [Tensor; 3])> {
        let &Gemm { m, n, k, a_along_k, element, half, .. } = gemm;
        let mut recording = Recording::new(caps);
        let a = recording.external("a", element, &[m, k])?;
        let b = recording.external("b", element, &[n, k])?;
        let c = recording.external("c", if a_along_k { element } else { Element::F32 }, &[m, n])?;
        let command = Command::new("gemm", NoReference).reads("a", a).reads("b", b);
        let (command, shader) = match half {
            Some(half) => {
                let y = recording.scratch("y", element, &[m, half])?;
                (command.writes("gate_up", c).writes("y", y), "nn/swiglu")
            }
            None if a_along_k => (command.writes("c", c), "nn/linear"),
            None => (command.writes("partial", c), "nn/linear_weight"),
        };
        let kernel = kernel(caps, shader, gemm, plan);
        let command = dispatch(&recording, command, kernel, gemm, plan)?;
        recording.push(command)?;
        Ok((Arc::new(recording), [a, b, c]))
    }

    /// Exact in f16.
    fn value(i: usize) -> f32 {
        (i * 37 % 101) as f32 / 64.0 - 0.75
    }

    /// C by a plain loop.
    fn product(gemm: &Gemm) -> Vec<f32> {
        let &Gemm { m, n, k, a_along_k, b_along_k, .. } = gemm;
        let a = |row, at| value(if a_along_k { row * k + at } else { at * m + row });
        let b = |column, at| value(if b_along_k { column * k + at } else { at * n + column });
        let c = |i: usize| (0..k).map(|at| a(i / n, at) * b(i % n, at)).sum();
        (0..m * n).map(c).collect()
    }

    fn assert_same(gemm: &Gemm, gpu: &Gpu, plan: &GemmPlan, expected: &[f32]) -> Result<()> {
        let (recording, [a, b, c]) = record(gpu.caps(), gemm, plan)?;
        let dispatches = recording.commands().iter().map(|command| command.dispatches.len()).sum::<usize>();
        assert_eq!(dispatches as u64, plan.tiles(gemm).div_ceil(plan.tiles_per_dispatch));
        let mut executor = GpuExecutor::new(gpu, recording, &[])?;
        for tensor in [a, b] {
            executor.write(tensor, &(0..tensor.len() as usize).map(value).collect::<Vec<_>>())?;
        }
        executor.run()?;
        let rounding = if c.element() == Element::F16 { 2.0f32.powi(-11) } else { 0.0 };
        for (i, (c, expected)) in executor.read(c)?.iter().zip(expected).enumerate() {
            let allowed = 1e-4 + rounding * expected.abs();
            assert!((c - expected).abs() < allowed, "{gemm:?}, {plan:?}, element {i}: {c} for {expected}");
        }
        Ok(())
    }

    #[test]
    fn parts_of_the_tiles_make_up_the_whole() -> Result<()> {
        for gpu in tested()? {
            for gemm in gemms(Element::F32) {
                let expected = product(&gemm);
                for tiles_per_dispatch in [1, 2, 100] {
                    let plan = GemmPlan { tiles_per_dispatch, ..GemmPlan::whole(gpu.caps(), &gemm) };
                    assert_same(&gemm, &gpu, &plan, &expected)?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn every_tile_on_matrices_gives_the_product() -> Result<()> {
        for gpu in tested()? {
            for tier in gpu.caps().tiers().into_iter().filter(|tier| tier.matrix().is_some()) {
                let gpu = gpu.clone().with_tier(tier)?;
                for gemm in [Element::F16, Element::F32].into_iter().flat_map(gemms) {
                    let expected = product(&gemm);
                    for tile in SHAPES.into_iter().filter_map(|shape| CoopTile::new(gpu.caps(), &gemm, shape)) {
                        let plan = GemmPlan::with_tile(gpu.caps(), &gemm, Tile::Coop(tile));
                        assert_same(&gemm, &gpu, &plan, &expected)?;
                    }
                }
            }
        }
        Ok(())
    }

    #[test]
    fn tiles_are_what_the_shaders_have() -> Result<()> {
        for (tier, size, subgroup) in [(Tier::Coop8, 8, 8), (Tier::Coop8, 8, 32), (Tier::Coop16, 16, 32)] {
            let limits = wgpu::Limits { max_compute_workgroup_storage_size: 48 << 10, ..wgpu::Limits::default() };
            let matrices = [Element::F16, Element::F32].map(|factors| MatrixKind { size, factors }).to_vec();
            let caps = Caps { limits, shader_f16: true, matrices, subgroup, tier, ..Caps::default() };
            for gemm in [Element::F16, Element::F32].into_iter().flat_map(gemms) {
                for shape in SHAPES {
                    let Some(tile) = CoopTile::new(&caps, &gemm, shape) else {
                        panic!("{shape:?} does not fit {gemm:?} with {matrices:?}", matrices = caps.matrices);
                    };
                    let plan = GemmPlan::with_tile(&caps, &gemm, Tile::Coop(tile));
                    let kernel = kernel(&caps, "nn/linear_weight", &gemm, &plan);
                    let reflection = reflect("nn/linear_weight", &parse("nn/linear_weight", &kernel.compose()?)?)?;
                    assert_eq!(reflection.workgroup_bytes, tile.workgroup_bytes(&gemm) as u64, "{tile:?}, {gemm:?}");
                    assert_eq!(reflection.invocations as usize, tile.invocations(), "{tile:?}, {gemm:?}");
                }
            }
        }
        Ok(())
    }
}
