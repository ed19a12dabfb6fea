//! RMSNorm (Zhang and Sennrich, 2019): each row divided by its root mean square, times a learned weight per column.

mod reference;

use crate::error::Result;
use crate::gpu::{Kernel, grid, params};
use crate::nn::{RowLanes, check_count, check_element, check_width, partials};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

params!(RmsNormParams { rows: u32, epsilon: f32 });
params!(RmsNormBackwardParams { rows: u32, slice: u32, slices: u32 });

/// Added to the mean square, as in Llama.
pub const EPSILON: f32 = 1e-5;

/// Most slices that the backward cuts the rows into, each with its own sum of the weight's gradient.
const SLICES: usize = 512;

/// Sizes of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RmsNormShape {
    /// T, tokens of the whole batch.
    pub rows: usize,
    /// Columns, a multiple of 8.
    pub width: usize,
    /// Storage type of the activations and the weight.
    pub element: Element,
}

impl RmsNormShape {
    fn check(&self) -> Result<()> {
        check_count("rows", self.rows)?;
        check_width("width", self.width)?;
        check_element(self.element)
    }
}

/// What the forward gives.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    /// `[T, width]`.
    pub y: Tensor,
    /// 1 / sqrt(mean square + epsilon) of each row, f32 `[T]`: saved for the backward.
    pub inverse_rms: Tensor,
}

/// Records y = x * inverse_rms * weight for `x` `[T, width]` and `weight` `[width]`.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_forward(recording: &mut Recording, shape: &RmsNormShape, x: Tensor, weight: Tensor) -> Result<RmsNorm> {
    shape.check()?;
    let &RmsNormShape { rows, width, element } = shape;
    recording.require("x", x, element, &[rows, width])?;
    recording.require("weight", weight, element, &[width])?;
    let y = recording.scratch("y", element, &[rows, width])?;
    let inverse_rms = recording.scratch("inverse_rms", Element::F32, &[rows])?;
    let lanes = RowLanes::new(width, 4);
    let command = Command::new("rms_norm", reference::Forward { shape: *shape })
        .reads("x", x)
        .reads("weight", weight)
        .writes("y", y)
        .writes("inverse_rms", inverse_rms)
        .dispatch(
            Kernel::new(recording.caps(), "nn/rms_norm")
                .element("elem", element)
                .constant("COLUMNS", width / 4)
                .constant("LANES", lanes.lanes)
                .constant("PER_LANE", lanes.per_lane),
            RmsNormParams { rows: rows as u32, epsilon: EPSILON },
            grid(recording.caps(), rows.div_ceil(lanes.rows()) as u64)?,
            (4 * rows * width) as u64,
        );
    recording.push(command)?;
    Ok(RmsNorm { y, inverse_rms })
}

/// Records the backward of the forward of x, its weight and the saved inverse_rms, from y's gradient `d_y` `[T, width]`:
/// gives dx `[T, width]`, to which `d_residual` is added where x also goes on past the norm, and writes `d_weight` f32
/// `[width]`.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_backward(
    recording: &mut Recording,
    shape: &RmsNormShape,
    [x, weight, inverse_rms]: [Tensor; 3],
    d_y: Tensor,
    d_residual: Option<Tensor>,
    d_weight: Tensor,
) -> Result<Tensor> {
    shape.check()?;
    let &RmsNormShape { rows, width, element } = shape;
    recording.require("x", x, element, &[rows, width])?;
    recording.require("weight", weight, element, &[width])?;
    recording.require("inverse_rms", inverse_rms, Element::F32, &[rows])?;
    recording.require("d_y", d_y, element, &[rows, width])?;
    recording.require("d_weight", d_weight, Element::F32, &[width])?;
    let d_x = recording.scratch("d_x", element, &[rows, width])?;
    let load = 16 / element.bytes() as usize;
    let lanes = RowLanes::new(width, load);
    let slice = (rows.div_ceil(SLICES)).next_multiple_of(lanes.rows());
    let slices = rows.div_ceil(slice);
    let mut command = Command::new("rms_norm_backward", reference::Backward { shape: *shape })
        .reads("x", x)
        .reads("weight", weight)
        .reads("inverse_rms", inverse_rms)
        .reads("d_y", d_y)
        .writes("d_x", d_x);
    let mut shader = "nn/rms_norm_backward";
    if let Some(d_residual) = d_residual {
        recording.require("d_residual", d_residual, element, &[rows, width])?;
        command = command.reads("d_residual", d_residual);
        shader = "nn/rms_norm_backward_residual";
    }
    let command = partials::writes(command, recording, slices, d_weight)?.dispatch(
        Kernel::new(recording.caps(), shader)
            .wide(element)
            .constant("COLUMNS", width / load)
            .constant("LANES", lanes.lanes)
            .constant("PER_LANE", lanes.per_lane),
        RmsNormBackwardParams { rows: rows as u32, slice: slice as u32, slices: slices as u32 },
        grid(recording.caps(), slices as u64)?,
        (8 * rows * width) as u64,
    );
    let command = partials::sum(command, recording, slices, d_weight)?;
    recording.push(command)?;
    Ok(d_x)
}
