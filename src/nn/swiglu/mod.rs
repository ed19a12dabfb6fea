//! SwiGLU (Shazeer, 2020), the gate of the feed-forward layer: silu(gate) * up.

mod reference;

use crate::error::Result;
use crate::gpu::{Kernel, params};
use crate::nn::{check_count, check_element, check_width, grid_of_columns};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

params!(SwigluParams { columns: u32 });

/// Sizes of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwigluShape {
    /// T, tokens of the whole batch.
    pub rows: usize,
    /// Columns, a multiple of 8.
    pub hidden: usize,
    /// Storage type of the activations.
    pub element: Element,
}

impl SwigluShape {
    fn check(&self) -> Result<()> {
        check_count("rows", self.rows)?;
        check_width("hidden", self.hidden)?;
        check_element(self.element)
    }

    fn elements(&self) -> usize {
        self.rows * self.hidden
    }
}

/// Records y = silu(gate) * up; all three `[T, hidden]`.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_forward(recording: &mut Recording, shape: &SwigluShape, gate: Tensor, up: Tensor) -> Result<Tensor> {
    shape.check()?;
    let &SwigluShape { rows, hidden, element } = shape;
    recording.require("gate", gate, element, &[rows, hidden])?;
    recording.require("up", up, element, &[rows, hidden])?;
    let y = recording.scratch("y", element, &[rows, hidden])?;
    let command =
        Command::new("swiglu", reference::Forward).reads("gate", gate).reads("up", up).writes("y", y).dispatch(
            Kernel::new(recording.caps(), "nn/swiglu").element("elem", element),
            SwigluParams { columns: (shape.elements() / 4) as u32 },
            grid_of_columns(recording.caps(), shape.elements() / 4)?,
            8 * shape.elements() as u64,
        );
    recording.push(command)?;
    Ok(y)
}

/// Records the backward of y's gradient `d_y`; gives d_gate and d_up; all `[T, hidden]`.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_backward(
    recording: &mut Recording,
    shape: &SwigluShape,
    gate: Tensor,
    up: Tensor,
    d_y: Tensor,
) -> Result<[Tensor; 2]> {
    shape.check()?;
    let &SwigluShape { rows, hidden, element } = shape;
    for (name, tensor) in [("gate", gate), ("up", up), ("d_y", d_y)] {
        recording.require(name, tensor, element, &[rows, hidden])?;
    }
    let d_gate = recording.scratch("d_gate", element, &[rows, hidden])?;
    let d_up = recording.scratch("d_up", element, &[rows, hidden])?;
    let command = Command::new("swiglu_backward", reference::Backward)
        .reads("gate", gate)
        .reads("up", up)
        .reads("d_y", d_y)
        .writes("d_gate", d_gate)
        .writes("d_up", d_up)
        .dispatch(
            Kernel::new(recording.caps(), "nn/swiglu_backward").element("elem", element),
            SwigluParams { columns: (shape.elements() / 4) as u32 },
            grid_of_columns(recording.caps(), shape.elements() / 4)?,
            16 * shape.elements() as u64,
        );
    recording.push(command)?;
    Ok([d_gate, d_up])
}
