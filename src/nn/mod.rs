//! The operators of a Llama-style model, one module each, forward and backward: host code in `mod.rs`, the formula in
//! `reference.rs`, the shaders of the same name below `shaders/nn`.
//!
//! Activations are rows: `[T, width]` in the model's storage type, T = batch * tokens; widths are multiples of 8. Weights
//! are in the same storage type. Their gradients are f32 and are set, not added to. Both are usually views into one
//! tensor for all parameters, so that [`grad_norm`] and [`adamw`] are one command each.

pub mod adamw;
pub mod cross_entropy;
pub mod embedding;
mod gemm;
pub mod grad_norm;
pub mod linear;
mod partials;
pub mod qkv;
pub mod rms_norm;
pub mod swiglu;

use crate::error::{Error, Result};
use crate::gpu::{Caps, grid};
use crate::tensor::Element;

/// Invocations of the operators' workgroups.
const WORKGROUP: usize = 256;

fn check_count(parameter: &'static str, value: usize) -> Result<()> {
    if value == 0 {
        return Err(Error::parameter(parameter, value, "at least 1"));
    }
    Ok(())
}

fn check_width(parameter: &'static str, value: usize) -> Result<()> {
    if value == 0 || !value.is_multiple_of(8) {
        return Err(Error::parameter(parameter, value, "a multiple of 8, and not 0"));
    }
    Ok(())
}

fn check_element(element: Element) -> Result<()> {
    if element == Element::U32 {
        return Err(Error::parameter("element", element, "f32 or f16"));
    }
    Ok(())
}

/// Workgroups for at least so many invocations.
fn grid_of_invocations(caps: &Caps, count: usize) -> Result<[u32; 3]> {
    grid(caps, count.div_ceil(WORKGROUP) as u64)
}

/// How many invocations share a row, and how many loads each of them takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RowLanes {
    lanes: usize,
    per_lane: usize,
}

impl RowLanes {
    /// For loads of so many elements. Few lanes cost fewer steps of the exchange, many fewer registers: 32 lanes, more where
    /// each had over 32 elements.
    fn new(width: usize, load: usize) -> Self {
        let loads = width / load;
        let mut lanes = loads.next_power_of_two().min(32);
        while lanes < WORKGROUP && loads.div_ceil(lanes) * load > 32 {
            lanes *= 2;
        }
        Self { lanes, per_lane: loads.div_ceil(lanes) }
    }

    /// Rows that a workgroup has at a time.
    fn rows(self) -> usize {
        WORKGROUP / self.lanes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_cover_a_row() {
        for width in (8..=20_000).step_by(8) {
            for load in [4, 8] {
                let plan = RowLanes::new(width, load);
                assert!(plan.lanes * plan.per_lane * load >= width, "{width}: {plan:?}");
                assert!(WORKGROUP.is_multiple_of(plan.lanes), "{width}: {plan:?}");
                assert!(plan.per_lane * load <= 32 || plan.lanes == WORKGROUP, "{width}: {plan:?}");
            }
        }
    }
}
