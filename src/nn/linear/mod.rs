//! Linear maps without bias: y = x W^T with W `[outputs, inputs]`, as in PyTorch; forward and both gradients by one GEMM.

mod plan;
mod reference;

use crate::error::Result;
use crate::gpu::{Caps, Kernel, grid, params};
use crate::nn::{check_count, check_element, check_width, partials};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};
use plan::{Gemm, GemmPlan, Tile};

params!(GemmParams { m: u32, n: u32, k: u32, slice: u32, first_tile: u32, tiles: u32 });

/// Sizes of a linear map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// T, tokens of the whole batch.
    pub rows: usize,
    /// Columns of x, a multiple of 8.
    pub inputs: usize,
    /// Columns of y, a multiple of 8.
    pub outputs: usize,
    /// Storage type of activations and weight.
    pub element: Element,
}

impl LinearShape {
    fn check(&self) -> Result<()> {
        check_count("rows", self.rows)?;
        check_width("inputs", self.inputs)?;
        check_width("outputs", self.outputs)?;
        check_element(self.element)
    }
}

/// Records y `[T, outputs]` = x W^T for `x` `[T, inputs]` and `weight` W `[outputs, inputs]`, plus `residual`
/// `[T, outputs]` if there is one.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_forward(
    recording: &mut Recording,
    shape: &LinearShape,
    x: Tensor,
    weight: Tensor,
    residual: Option<Tensor>,
) -> Result<Tensor> {
    shape.check()?;
    let &LinearShape { rows, inputs, outputs, element } = shape;
    recording.require("x", x, element, &[rows, inputs])?;
    recording.require("weight", weight, element, &[outputs, inputs])?;
    let y = recording.scratch("y", element, &[rows, outputs])?;
    let gemm = Gemm { m: rows, n: outputs, k: inputs, a_along_k: true, b_along_k: true, element };
    let command =
        Command::new("linear", reference::Forward { shape: *shape }).reads("a", x).reads("b", weight).writes("c", y);
    record_rows(recording, shape, gemm, command, residual)?;
    Ok(y)
}

/// Records dx `[T, inputs]` = dy W for `d_y` `[T, outputs]`, plus `add` `[T, inputs]` if there is one: the gradient that
/// other users of x gave.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_backward_input(
    recording: &mut Recording,
    shape: &LinearShape,
    d_y: Tensor,
    weight: Tensor,
    add: Option<Tensor>,
) -> Result<Tensor> {
    shape.check()?;
    let &LinearShape { rows, inputs, outputs, element } = shape;
    recording.require("d_y", d_y, element, &[rows, outputs])?;
    recording.require("weight", weight, element, &[outputs, inputs])?;
    let d_x = recording.scratch("d_x", element, &[rows, inputs])?;
    let gemm = Gemm { m: rows, n: inputs, k: outputs, a_along_k: true, b_along_k: false, element };
    let command = Command::new("linear_backward_input", reference::BackwardInput { shape: *shape })
        .reads("a", d_y)
        .reads("b", weight)
        .writes("c", d_x);
    record_rows(recording, shape, gemm, command, add)?;
    Ok(d_x)
}

/// Records `d_weight` f32 `[outputs, inputs]` = dy^T x for `d_y` `[T, outputs]` and `x` `[T, inputs]`.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_backward_weight(
    recording: &mut Recording,
    shape: &LinearShape,
    d_y: Tensor,
    x: Tensor,
    d_weight: Tensor,
) -> Result<()> {
    shape.check()?;
    let &LinearShape { rows, inputs, outputs, element } = shape;
    recording.require("d_y", d_y, element, &[rows, outputs])?;
    recording.require("x", x, element, &[rows, inputs])?;
    recording.require("d_weight", d_weight, Element::F32, &[outputs, inputs])?;
    let gemm = Gemm { m: outputs, n: inputs, k: rows, a_along_k: false, b_along_k: false, element };
    let plan = GemmPlan::split(recording.caps(), &gemm);
    let command = Command::new("linear_backward_weight", reference::BackwardWeight { shape: *shape })
        .reads("a", d_y)
        .reads("b", x);
    let command = partials::writes(command, recording, plan.slices, d_weight)?;
    let kernel = kernel(recording.caps(), ["nn/linear_weight", "nn/linear_weight_coop"], &gemm, &plan);
    let command = dispatch(recording, command, kernel, &gemm, &plan)?;
    let command = partials::sum(command, recording, plan.slices, d_weight)?;
    recording.push(command)
}

/// Records a GEMM whose outputs are rows of activations, with what is added to them.
fn record_rows(
    recording: &mut Recording,
    shape: &LinearShape,
    gemm: Gemm,
    mut command: Command,
    add: Option<Tensor>,
) -> Result<()> {
    let mut shaders = ["nn/linear", "nn/linear_coop"];
    if let Some(add) = add {
        recording.require("the tensor to be added", add, shape.element, &[gemm.m, gemm.n])?;
        command = command.reads("add", add);
        shaders = ["nn/linear_add", "nn/linear_add_coop"];
    }
    let plan = GemmPlan::whole(recording.caps(), &gemm);
    let kernel = kernel(recording.caps(), shaders, &gemm, &plan).element("c", shape.element);
    let command = dispatch(recording, command, kernel, &gemm, &plan)?;
    recording.push(command)
}

/// The kernel of a plan, of the two that do without and with cooperative matrices.
fn kernel(caps: &Caps, [simt, coop]: [&'static str; 2], gemm: &Gemm, plan: &GemmPlan) -> Kernel {
    let kernel = match plan.tile {
        Tile::Simt(tile) => Kernel::new(caps, simt)
            .element("a", gemm.element)
            .element("b", gemm.element)
            .constant("ROW_BLOCKS", tile.row_blocks),
        Tile::Coop(tile) => {
            let [subgroups_m, subgroups_n] = tile.shape.subgroups;
            let [matrices_m, matrices_n] = tile.shape.matrices;
            let [a_stages, b_stages] = tile.stages(gemm).unwrap_or_default();
            Kernel::new(caps, coop)
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
                .constant("A_STAGES", a_stages)
                .constant("B_STAGES", b_stages)
                .flag("K_EVEN", gemm.k.is_multiple_of(tile.k_step()))
        }
    };
    kernel.flag("A_ALONG_K", gemm.a_along_k).flag("B_ALONG_K", gemm.b_along_k)
}

/// Adds the GEMM's dispatches: one, or several over parts of the tiles where one would take too long.
fn dispatch(
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
    use crate::gpu::{MatrixKind, Tier, adapters, parse, parse_backends, reflect};
    use crate::{CpuExecutor, Executor, Gpu, GpuExecutor};

    /// C = A B with A and B stored either way, of a size that no tile divides.
    fn gemms(element: Element) -> impl Iterator<Item = Gemm> {
        [(true, true), (true, false), (false, false)].into_iter().map(move |(a_along_k, b_along_k)| Gemm {
            m: 152,
            n: 136,
            k: 72,
            a_along_k,
            b_along_k,
            element,
        })
    }

    /// A GEMM cut in this way: A, B and C.
    fn record(caps: &Caps, gemm: &Gemm, plan: &GemmPlan) -> Result<(Arc<Recording>, [Tensor; 3])> {
        let &Gemm { m, n, k, a_along_k, b_along_k, element } = gemm;
        let mut recording = Recording::new(caps);
        let a = recording.external("a", element, &[m, k])?;
        let b = recording.external("b", element, &[n, k])?;
        let c = recording.external("c", Element::F32, &[m, n])?;
        let rows = LinearShape { rows: m, inputs: k, outputs: n, element };
        let command = match (a_along_k, b_along_k) {
            (true, true) => Command::new("linear", reference::Forward { shape: rows }),
            (true, false) => {
                let shape = LinearShape { rows: m, inputs: n, outputs: k, element };
                Command::new("linear", reference::BackwardInput { shape })
            }
            _ => {
                let shape = LinearShape { rows: k, inputs: n, outputs: m, element };
                Command::new("linear", reference::BackwardWeight { shape })
            }
        };
        let command = command.reads("a", a).reads("b", b);
        let (command, shaders) = if a_along_k {
            (command.writes("c", c), ["nn/linear", "nn/linear_coop"])
        } else {
            (command.writes("partial", c), ["nn/linear_weight", "nn/linear_weight_coop"])
        };
        let kernel = kernel(caps, shaders, gemm, plan);
        let kernel = if a_along_k { kernel.element("c", Element::F32) } else { kernel };
        let command = dispatch(&recording, command, kernel, gemm, plan)?;
        recording.push(command)?;
        Ok((Arc::new(recording), [a, b, c]))
    }

    fn run(executor: &mut dyn Executor, [a, b, c]: [Tensor; 3]) -> Result<Vec<f32>> {
        let values = |n: u64| (0..n).map(|i| (i * 37 % 101) as f32 / 64.0 - 0.75).collect::<Vec<f32>>();
        executor.write(a, &values(a.len()))?;
        executor.write(b, &values(b.len()))?;
        executor.run()?;
        executor.read(c)
    }

    fn assert_same(gemm: &Gemm, gpu: &Gpu, plan: &GemmPlan, expected: &[f32]) -> Result<()> {
        let (recording, tensors) = record(gpu.caps(), gemm, plan)?;
        let dispatches = recording.commands().iter().map(|command| command.dispatches.len()).sum::<usize>();
        assert_eq!(dispatches as u64, plan.tiles(gemm).div_ceil(plan.tiles_per_dispatch));
        let c = run(&mut GpuExecutor::new(gpu, recording, &[])?, tensors)?;
        for (i, (c, expected)) in c.iter().zip(expected).enumerate() {
            assert!((c - expected).abs() < 1e-4, "{gemm:?}, {plan:?}, element {i}: {c} for {expected}");
        }
        Ok(())
    }

    fn gpus() -> Result<Vec<Gpu>> {
        let backend = std::env::var("LIGHTHOUSE_BACKEND").unwrap_or_else(|_| "all".into());
        let adapters = if backend == "cpu" { Vec::new() } else { adapters(parse_backends(&backend)?) };
        adapters.iter().map(Gpu::from_adapter).collect()
    }

    #[test]
    fn parts_of_the_tiles_make_up_the_whole() -> Result<()> {
        for gpu in gpus()? {
            for gemm in gemms(Element::F32) {
                let plan = GemmPlan::whole(&Caps::cpu(), &gemm);
                let (recording, tensors) = record(&Caps::cpu(), &gemm, &plan)?;
                let expected = run(&mut CpuExecutor::<f32>::new(recording), tensors)?;
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
        for gpu in gpus()? {
            for tier in gpu.caps().tiers().into_iter().filter(|tier| tier.matrix().is_some()) {
                let gpu = gpu.clone().with_tier(tier)?;
                for gemm in [Element::F16, Element::F32].into_iter().flat_map(gemms) {
                    let (recording, tensors) = record(&Caps::cpu(), &gemm, &GemmPlan::whole(&Caps::cpu(), &gemm))?;
                    let expected = run(&mut CpuExecutor::<f32>::new(recording), tensors)?;
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
                    let kernel = kernel(&caps, ["nn/linear_weight", "nn/linear_weight_coop"], &gemm, &plan);
                    let reflection =
                        reflect("nn/linear_weight_coop", &parse("nn/linear_weight_coop", &kernel.compose()?)?)?;
                    assert_eq!(reflection.workgroup_bytes, tile.workgroup_bytes(&gemm) as u64, "{tile:?}, {gemm:?}");
                    assert_eq!(reflection.invocations as usize, tile.invocations(), "{tile:?}, {gemm:?}");
                }
            }
        }
        Ok(())
    }
}
