//! Linear maps without bias: y = x W^T with W `[outputs, inputs]`, as in PyTorch; forward and both gradients by one GEMM.

mod reference;

use crate::error::Result;
use crate::nn::gemm::{self, Gemm, GemmPlan};
use crate::nn::{check_count, check_element, check_width, partials};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};
pub(super) use reference::{backward_input, forward};

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
    let gemm = Gemm::forward(rows, inputs, outputs, element);
    let command =
        Command::new("linear", reference::Forward { shape: *shape }).reads("a", x).reads("b", weight).writes("c", y);
    let Some(residual) = residual else {
        record_rows(recording, gemm, command, "nn/linear")?;
        return Ok(y);
    };
    recording.require("residual", residual, element, &[rows, outputs])?;
    record_rows(recording, gemm, command.reads("residual", residual), "nn/linear_residual")?;
    Ok(y)
}

/// Records dx `[T, inputs]` = dy W for `d_y` `[T, outputs]`.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_backward_input(
    recording: &mut Recording,
    shape: &LinearShape,
    d_y: Tensor,
    weight: Tensor,
) -> Result<Tensor> {
    shape.check()?;
    let &LinearShape { rows, inputs, outputs, element } = shape;
    recording.require("d_y", d_y, element, &[rows, outputs])?;
    recording.require("weight", weight, element, &[outputs, inputs])?;
    let d_x = recording.scratch("d_x", element, &[rows, inputs])?;
    let gemm = Gemm::backward_input(rows, inputs, outputs, element);
    let command = Command::new("linear_backward_input", reference::BackwardInput { shape: *shape })
        .reads("a", d_y)
        .reads("b", weight)
        .writes("c", d_x);
    record_rows(recording, gemm, command, "nn/linear")?;
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
    let gemm = Gemm::backward_weight(rows, inputs, outputs, element);
    let plan = GemmPlan::split(recording.caps(), &gemm);
    let command = Command::new("linear_backward_weight", reference::BackwardWeight { shape: *shape })
        .reads("a", d_y)
        .reads("b", x);
    let command = partials::writes(command, recording, plan.slices, d_weight)?;
    let kernel = gemm::kernel(recording.caps(), "nn/linear_weight", &gemm, &plan);
    let command = gemm::dispatch(recording, command, kernel, &gemm, &plan)?;
    let command = partials::sum(command, recording, plan.slices, d_weight)?;
    recording.push(command)
}

/// Records a GEMM whose outputs are rows of activations.
fn record_rows(recording: &mut Recording, gemm: Gemm, command: Command, shader: &'static str) -> Result<()> {
    let plan = GemmPlan::whole(recording.caps(), &gemm);
    let kernel = gemm::kernel(recording.caps(), shader, &gemm, &plan);
    let command = gemm::dispatch(recording, command, kernel, &gemm, &plan)?;
    recording.push(command)
}
