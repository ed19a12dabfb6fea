//! Linear maps without bias: y = x W^T with W `[outputs, inputs]`, as in PyTorch; forward and both gradients by one GEMM.

mod plan;
mod reference;

use crate::error::Result;
use crate::gpu::{Kernel, grid, params};
use crate::nn::{check_count, check_element, check_width, partials};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};
use plan::{Gemm, GemmPlan};

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
    recording.expect("x", x, element, &[rows, inputs])?;
    recording.expect("weight", weight, element, &[outputs, inputs])?;
    let y = recording.scratch("y", element, &[rows, outputs])?;
    let gemm = Gemm { m: rows, n: outputs, k: inputs, a_along_k: true, b_along_k: true };
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
    recording.expect("d_y", d_y, element, &[rows, outputs])?;
    recording.expect("weight", weight, element, &[outputs, inputs])?;
    let d_x = recording.scratch("d_x", element, &[rows, inputs])?;
    let gemm = Gemm { m: rows, n: inputs, k: outputs, a_along_k: true, b_along_k: false };
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
    recording.expect("d_y", d_y, element, &[rows, outputs])?;
    recording.expect("x", x, element, &[rows, inputs])?;
    recording.expect("d_weight", d_weight, Element::F32, &[outputs, inputs])?;
    let gemm = Gemm { m: outputs, n: inputs, k: rows, a_along_k: false, b_along_k: false };
    let plan = GemmPlan::split(recording.caps(), &gemm);
    let command = Command::new("linear_backward_weight", reference::BackwardWeight { shape: *shape })
        .reads("a", d_y)
        .reads("b", x);
    let command = partials::writes(command, recording, plan.slices, d_weight)?;
    let kernel = kernel(recording, "nn/linear_weight", &gemm, &plan, element);
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
    let mut shader = "nn/linear";
    if let Some(add) = add {
        recording.expect("the tensor to be added", add, shape.element, &[gemm.m, gemm.n])?;
        command = command.reads("add", add);
        shader = "nn/linear_add";
    }
    let plan = GemmPlan::whole(recording.caps(), &gemm);
    let kernel = kernel(recording, shader, &gemm, &plan, shape.element).element("c", shape.element);
    let command = dispatch(recording, command, kernel, &gemm, &plan)?;
    recording.push(command)
}

fn kernel(recording: &Recording, shader: &'static str, gemm: &Gemm, plan: &GemmPlan, element: Element) -> Kernel {
    Kernel::new(recording.caps(), shader)
        .element("a", element)
        .element("b", element)
        .constant("ROW_BLOCKS", plan.row_blocks)
        .flag("A_ALONG_K", gemm.a_along_k)
        .flag("B_ALONG_K", gemm.b_along_k)
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

    use super::*;
    use crate::gpu::{Caps, adapters, parse_backends};
    use crate::{CpuExecutor, Executor, Gpu, GpuExecutor};

    const SHAPE: LinearShape = LinearShape { rows: 150, inputs: 24, outputs: 136, element: Element::F32 };
    const GEMM: Gemm = Gemm { m: 150, n: 136, k: 24, a_along_k: true, b_along_k: true };

    /// A forward with this many tiles in a dispatch: x, W and y.
    fn record(caps: &Caps, tiles_per_dispatch: u64) -> Result<(Arc<Recording>, [Tensor; 3])> {
        let mut recording = Recording::new(caps);
        let x = recording.external("x", Element::F32, &[GEMM.m, GEMM.k])?;
        let weight = recording.external("weight", Element::F32, &[GEMM.n, GEMM.k])?;
        let y = recording.external("y", Element::F32, &[GEMM.m, GEMM.n])?;
        let plan = GemmPlan { tiles_per_dispatch, ..GemmPlan::whole(caps, &GEMM) };
        let kernel = kernel(&recording, "nn/linear", &GEMM, &plan, Element::F32).element("c", Element::F32);
        let command = Command::new("linear", reference::Forward { shape: SHAPE });
        let command = command.reads("a", x).reads("b", weight).writes("c", y);
        let command = dispatch(&recording, command, kernel, &GEMM, &plan)?;
        recording.push(command)?;
        Ok((Arc::new(recording), [x, weight, y]))
    }

    fn run(executor: &mut dyn Executor, [x, weight, y]: [Tensor; 3]) -> Result<Vec<f32>> {
        let values = |n: u64| (0..n).map(|i| (i * 37 % 101) as f32 / 64.0).collect::<Vec<f32>>();
        executor.write(x, &values(x.len()))?;
        executor.write(weight, &values(weight.len()))?;
        executor.run()?;
        executor.read(y)
    }

    #[test]
    fn parts_of_the_tiles_make_up_the_whole() -> Result<()> {
        let (recording, tensors) = record(&Caps::cpu(), 1)?;
        let expected = run(&mut CpuExecutor::<f32>::new(recording), tensors)?;
        let backend = std::env::var("LIGHTHOUSE_BACKEND").unwrap_or_else(|_| "all".into());
        let adapters = if backend == "cpu" { Vec::new() } else { adapters(parse_backends(&backend)?) };
        for adapter in adapters {
            let gpu = Gpu::from_adapter(&adapter)?;
            for tiles in [1, 2, 100] {
                let (recording, tensors) = record(gpu.caps(), tiles)?;
                let dispatches = recording.commands().iter().map(|command| command.dispatches.len()).sum::<usize>();
                assert_eq!(dispatches as u64, GemmPlan::whole(gpu.caps(), &GEMM).tiles(&GEMM).div_ceil(tiles));
                let y = run(&mut GpuExecutor::new(&gpu, recording, &[])?, tensors)?;
                for (y, expected) in y.iter().zip(&expected) {
                    approx::assert_relative_eq!(y, expected, max_relative = 1e-6);
                }
            }
        }
        Ok(())
    }
}
