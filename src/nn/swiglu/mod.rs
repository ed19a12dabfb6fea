//! SwiGLU (Shazeer, 2020), the gated half of the feed-forward layer: y = silu(x G^T) * (x U^T). The gate's map G and the
//! other one, U, are one product, which applies the gate to its own columns; so does the product that brings y's gradient.

mod reference;

use crate::error::Result;
use crate::nn::gemm::{self, Gemm, GemmPlan};
use crate::nn::{check_count, check_element, check_width};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

/// Sizes of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwigluShape {
    /// T, tokens of the whole batch.
    pub rows: usize,
    /// Columns of the layer's inputs and outputs, a multiple of 8.
    pub width: usize,
    /// Columns of y, a multiple of 8.
    pub hidden: usize,
    /// Storage type of activations and weights.
    pub element: Element,
}

impl SwigluShape {
    fn check(&self) -> Result<()> {
        check_count("rows", self.rows)?;
        check_width("width", self.width)?;
        check_width("hidden", self.hidden)?;
        check_element(self.element)
    }
}

/// What the forward gives.
#[derive(Clone, Copy, Debug)]
pub struct Swiglu {
    /// gate = x G^T and up = x U^T side by side, `[T, 2 hidden]`: saved for the backward.
    pub gate_up: Tensor,
    /// silu(gate) * up, `[T, hidden]`.
    pub y: Tensor,
}

/// What the backward gives.
#[derive(Clone, Copy, Debug)]
pub struct SwigluBackward {
    /// The gradients of gate and up side by side, `[T, 2 hidden]`: the linear map (G, U) takes it from here.
    pub d_gate_up: Tensor,
    /// y of the forward, `[T, hidden]`: for the gradient of the weight W.
    pub y: Tensor,
}

/// Records y = silu(x G^T) * (x U^T) for `x` `[T, width]` and `weight` `[2 hidden, width]`, the rows of G before those of
/// U.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_forward(recording: &mut Recording, shape: &SwigluShape, x: Tensor, weight: Tensor) -> Result<Swiglu> {
    shape.check()?;
    let &SwigluShape { rows, width, hidden, element } = shape;
    recording.require("x", x, element, &[rows, width])?;
    recording.require("weight", weight, element, &[2 * hidden, width])?;
    let gate_up = recording.scratch("gate_up", element, &[rows, 2 * hidden])?;
    let y = recording.scratch("y", element, &[rows, hidden])?;
    let gemm = Gemm { half: Some(hidden), ..Gemm::forward(rows, width, 2 * hidden, element) };
    let plan = GemmPlan::whole(recording.caps(), &gemm);
    let command = Command::new("swiglu", reference::Forward { shape: *shape })
        .reads("a", x)
        .reads("b", weight)
        .writes("gate_up", gate_up)
        .writes("y", y);
    let kernel = gemm::kernel(recording.caps(), "nn/swiglu", &gemm, &plan);
    let command = gemm::dispatch(recording, command, kernel, &gemm, &plan)?;
    recording.push(command)?;
    Ok(Swiglu { gate_up, y })
}

/// Records the backward of y and of the linear map z = y W^T that takes it, with W `[width, hidden]`, from z's gradient
/// `d_z` `[T, width]`.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_backward(
    recording: &mut Recording,
    shape: &SwigluShape,
    gate_up: Tensor,
    d_z: Tensor,
    weight: Tensor,
) -> Result<SwigluBackward> {
    shape.check()?;
    let &SwigluShape { rows, width, hidden, element } = shape;
    recording.require("gate_up", gate_up, element, &[rows, 2 * hidden])?;
    recording.require("d_z", d_z, element, &[rows, width])?;
    recording.require("weight", weight, element, &[width, hidden])?;
    let d_gate_up = recording.scratch("d_gate_up", element, &[rows, 2 * hidden])?;
    let y = recording.scratch("y", element, &[rows, hidden])?;
    let gemm = Gemm::backward_input(rows, hidden, width, element);
    let plan = GemmPlan::whole(recording.caps(), &gemm);
    let command = Command::new("swiglu_backward", reference::Backward { shape: *shape })
        .reads("a", d_z)
        .reads("b", weight)
        .reads("gate_up", gate_up)
        .writes("d_gate_up", d_gate_up)
        .writes("y", y);
    let kernel = gemm::kernel(recording.caps(), "nn/swiglu_backward", &gemm, &plan);
    let command = gemm::dispatch(recording, command, kernel, &gemm, &plan)?;
    recording.push(command)?;
    Ok(SwigluBackward { d_gate_up, y })
}
