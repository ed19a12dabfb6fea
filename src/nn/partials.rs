//! Weight gradients as sums of partial sums: each slice of the tokens sums for itself, then one dispatch adds the slices
//! in a fixed order. So there is work for a whole GPU, and two runs give the same bits.

use std::cell::RefMut;

use crate::cpu::Args;
use crate::error::Result;
use crate::gpu::{Kernel, params};
use crate::nn::grid_of_invocations;
use crate::real::Real;
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

params!(SumPartialsParams { slices: u32, columns: u32 });

/// Invocations that a small gradient is to have at least.
const INVOCATIONS: usize = 8192;
/// Most invocations that share four elements: each workgroup still reads 128 bytes of a slice.
const MOST_SPLIT: usize = 32;

/// How many invocations sum the slices of four elements: 1, except where that would be few invocations of many slices.
fn split(slices: usize, columns: usize) -> usize {
    let mut split = 1;
    while split < MOST_SPLIT && 2 * split <= slices && columns * split < INVOCATIONS {
        split *= 2;
    }
    split
}

/// Declares the outputs: the kernel writes its slices to `partial`; one slice is the gradient itself.
pub(super) fn writes(command: Command, recording: &mut Recording, slices: usize, d_weight: Tensor) -> Result<Command> {
    if slices == 1 {
        return Ok(command.writes("partial", d_weight));
    }
    let partial = recording.scratch("partial", Element::F32, &[slices, d_weight.len() as usize])?;
    Ok(command.writes("partial", partial).writes("d_weight", d_weight))
}

/// Adds the dispatch that sums the slices, if there are several.
pub(super) fn sum(command: Command, recording: &Recording, slices: usize, d_weight: Tensor) -> Result<Command> {
    if slices == 1 {
        return Ok(command);
    }
    let columns = d_weight.len() as usize / 4;
    let split = split(slices, columns);
    let kernel = Kernel::new(recording.caps(), "nn/sum_partials").constant("SPLIT", split);
    let params = SumPartialsParams { slices: slices as u32, columns: columns as u32 };
    let grid = grid_of_invocations(recording.caps(), columns * split)?;
    Ok(command.dispatch(kernel, params, grid, slices as u64 * d_weight.len()))
}

/// The gradient as the reference sees it.
pub(super) fn output<'a, T: Real>(args: &'a Args<'_, T>) -> Result<RefMut<'a, [T]>> {
    args.write(if args.has("d_weight") { "d_weight" } else { "partial" })
}
