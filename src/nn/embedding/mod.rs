//! Embedding: token ids to rows of a table.

mod reference;

use crate::error::Result;
use crate::gpu::{Kernel, grid, params};
use crate::nn::{check_count, check_element, check_width, grid_of_invocations, partials};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

params!(EmbeddingParams { rows: u32, vocab: u32 });
params!(EmbeddingBackwardParams { rows: u32, vocab: u32, slice: u32 });

/// Tokens that one workgroup of the backward sums, at least: the frequent ids' rows are sums of many.
const SLICE: usize = 4096;
/// Most bytes of partial sums.
const PARTIAL_BYTES: usize = 64 << 20;

/// Sizes of an embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EmbeddingShape {
    /// T, tokens of the whole batch.
    pub rows: usize,
    /// Rows of the table. An id past it reads the last row.
    pub vocab: usize,
    /// Columns of the table, a multiple of 8.
    pub width: usize,
    /// Storage type of the table and of the activations.
    pub element: Element,
}

impl EmbeddingShape {
    fn check(&self) -> Result<()> {
        check_count("rows", self.rows)?;
        check_count("vocab", self.vocab)?;
        check_width("width", self.width)?;
        check_element(self.element)
    }
}

/// Records x `[T, width]` = rows of `weight` `[vocab, width]` by `ids` u32 `[T]`.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_forward(
    recording: &mut Recording,
    shape: &EmbeddingShape,
    ids: Tensor,
    weight: Tensor,
) -> Result<Tensor> {
    shape.check()?;
    let &EmbeddingShape { rows, vocab, width, element } = shape;
    recording.require("ids", ids, Element::U32, &[rows])?;
    recording.require("weight", weight, element, &[vocab, width])?;
    let x = recording.scratch("x", element, &[rows, width])?;
    let loads = width * element.bytes() as usize / 16;
    let kernel = Kernel::new(recording.caps(), "nn/embedding").wide(element).constant("LOADS", loads);
    let params = EmbeddingParams { rows: rows as u32, vocab: vocab as u32 };
    let grid = grid_of_invocations(recording.caps(), rows * loads)?;
    let command = Command::new("embedding", reference::Forward { shape: *shape })
        .reads("ids", ids)
        .reads("weight", weight)
        .writes("x", x)
        .dispatch(kernel, params, grid, (rows * width) as u64);
    recording.push(command)?;
    Ok(x)
}

/// Records `d_weight` f32 `[vocab, width]` from `d_x` `[T, width]`.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_backward(
    recording: &mut Recording,
    shape: &EmbeddingShape,
    ids: Tensor,
    d_x: Tensor,
    d_weight: Tensor,
) -> Result<()> {
    shape.check()?;
    let &EmbeddingShape { rows, vocab, width, element } = shape;
    recording.require("ids", ids, Element::U32, &[rows])?;
    recording.require("d_x", d_x, element, &[rows, width])?;
    recording.require("d_weight", d_weight, Element::F32, &[vocab, width])?;
    let most = (PARTIAL_BYTES / (vocab * width * 4)).clamp(1, 64);
    let slice = rows.div_ceil(rows.div_ceil(SLICE).min(most));
    let slices = rows.div_ceil(slice);
    let kernel =
        Kernel::new(recording.caps(), "nn/embedding_backward").element("elem", element).constant("COLUMNS", width / 4);
    let params = EmbeddingBackwardParams { rows: rows as u32, vocab: vocab as u32, slice: slice as u32 };
    let [x, y, _] = grid(recording.caps(), (vocab * (width / 4).div_ceil(64)) as u64)?;
    let command =
        Command::new("embedding_backward", reference::Backward { shape: *shape }).reads("ids", ids).reads("d_x", d_x);
    let command = partials::writes(command, recording, slices, d_weight)?.dispatch(
        kernel,
        params,
        [x, y, slices as u32],
        (rows * (width + vocab)) as u64,
    );
    let command = partials::sum(command, recording, slices, d_weight)?;
    recording.push(command)
}
