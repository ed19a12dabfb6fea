//! The L2 norm of the whole gradient, for clipping and for the log.

mod reference;

use crate::error::Result;
use crate::gpu::{Kernel, params};
use crate::nn::{WORKGROUP, check_width};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

params!(GradNormParams { columns: u32, groups: u32 });
params!(GradNormTotalParams { groups: u32 });

/// Most workgroups; each sums elements until none is left.
const GROUPS: usize = 1024;
/// Vectors of four elements that an invocation sums, at least.
const LEAST_COLUMNS: usize = 4;

/// Records the norm f32 `[1]` of `gradient` f32, whose length is a multiple of 8. Parts that belong to no parameter
/// must hold zeros.
///
/// # Errors
/// A gradient of another type or length.
pub fn record(recording: &mut Recording, gradient: Tensor) -> Result<Tensor> {
    let elements = gradient.len() as usize;
    check_width("gradient", elements)?;
    recording.require("gradient", gradient, Element::F32, &[elements])?;
    let groups = (elements / 4).div_ceil(WORKGROUP * LEAST_COLUMNS).min(GROUPS);
    let squares = recording.scratch("squares", Element::F32, &[groups])?;
    let norm = recording.scratch("grad_norm", Element::F32, &[1])?;
    let command = Command::new("grad_norm", reference::GradNorm)
        .reads("gradient", gradient)
        .writes("squares", squares)
        .writes("norm", norm)
        .dispatch(
            Kernel::new(recording.caps(), "nn/grad_norm").constant("LANES", WORKGROUP),
            GradNormParams { columns: (elements / 4) as u32, groups: groups as u32 },
            [groups as u32, 1, 1],
            2 * elements as u64,
        )
        .dispatch(
            Kernel::new(recording.caps(), "nn/grad_norm_total").constant("LANES", WORKGROUP),
            GradNormTotalParams { groups: groups as u32 },
            [1, 1, 1],
            groups as u64,
        );
    recording.push(command)?;
    Ok(norm)
}
