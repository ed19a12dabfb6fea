//! Cross-entropy of next-token predictions, in nats, with its gradient in the same pass.

mod reference;

use crate::error::Result;
use crate::gpu::{Kernel, grid, params};
use crate::nn::{RowLanes, check_count, check_element, check_width};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

params!(CrossEntropyParams { rows: u32, scale: f32 });
params!(CrossEntropyMeanParams { rows: u32 });

/// Sizes of a prediction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrossEntropyShape {
    /// T, tokens of the whole batch.
    pub rows: usize,
    /// Columns of the logits, a multiple of 8. A target past it counts as the last.
    pub vocab: usize,
    /// Storage type of the logits and their gradient.
    pub element: Element,
}

impl CrossEntropyShape {
    fn check(&self) -> Result<()> {
        check_count("rows", self.rows)?;
        check_width("vocab", self.vocab)?;
        check_element(self.element)
    }
}

/// What the pass with the gradient gives.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    /// The mean over the rows, f32 `[1]`.
    pub loss: Tensor,
    /// `[T, vocab]`: the gradient of the mean, times the loss scale.
    pub d_logits: Tensor,
}

/// Records the mean loss f32 `[1]` of `logits` `[T, vocab]` against `targets` u32 `[T]`: for evaluation.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_forward(
    recording: &mut Recording,
    shape: &CrossEntropyShape,
    logits: Tensor,
    targets: Tensor,
) -> Result<Tensor> {
    record(recording, shape, logits, targets, None)
}

/// Records the mean loss and its gradient by the logits. The gradient is multiplied by `loss_scale`, which keeps small
/// ones above the least f16 number and which the optimizer divides by; 1 for f32.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_forward_backward(
    recording: &mut Recording,
    shape: &CrossEntropyShape,
    logits: Tensor,
    targets: Tensor,
    loss_scale: f32,
) -> Result<CrossEntropy> {
    shape.check()?;
    let d_logits = recording.scratch("d_logits", shape.element, &[shape.rows, shape.vocab])?;
    let loss = record(recording, shape, logits, targets, Some((d_logits, loss_scale)))?;
    Ok(CrossEntropy { loss, d_logits })
}

fn record(
    recording: &mut Recording,
    shape: &CrossEntropyShape,
    logits: Tensor,
    targets: Tensor,
    gradient: Option<(Tensor, f32)>,
) -> Result<Tensor> {
    shape.check()?;
    let &CrossEntropyShape { rows, vocab, element } = shape;
    recording.require("logits", logits, element, &[rows, vocab])?;
    recording.require("targets", targets, Element::U32, &[rows])?;
    let row_loss = recording.scratch("row_loss", Element::F32, &[rows])?;
    let loss = recording.scratch("loss", Element::F32, &[1])?;
    let scale = gradient.map_or(0.0, |(_, loss_scale)| loss_scale / rows as f32);
    let stage = if gradient.is_some() { "cross_entropy_backward" } else { "cross_entropy" };
    let mut command = Command::new(stage, reference::CrossEntropy { shape: *shape, scale })
        .reads("logits", logits)
        .reads("targets", targets)
        .writes("row_loss", row_loss)
        .writes("loss", loss);
    let mut shader = "nn/cross_entropy";
    if let Some((d_logits, _)) = gradient {
        command = command.writes("d_logits", d_logits);
        shader = "nn/cross_entropy_backward";
    }
    let lanes = RowLanes::new(vocab, 4);
    let kernel = Kernel::new(recording.caps(), shader)
        .element("elem", element)
        .constant("COLUMNS", vocab / 4)
        .constant("LANES", lanes.lanes);
    let command = command
        .dispatch(
            kernel,
            CrossEntropyParams { rows: rows as u32, scale },
            grid(recording.caps(), rows.div_ceil(lanes.rows()) as u64)?,
            (8 * rows * vocab) as u64,
        )
        .dispatch(
            Kernel::new(recording.caps(), "nn/cross_entropy_mean").constant("LANES", 256),
            CrossEntropyMeanParams { rows: rows as u32 },
            [1, 1, 1],
            rows as u64,
        );
    recording.push(command)?;
    Ok(loss)
}
