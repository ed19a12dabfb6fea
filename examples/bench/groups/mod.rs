//! Row groups. A new one is a module with a `run` and a line in [`GROUPS`].

pub mod attention;
pub mod gemm;
pub mod layer;
pub mod operators;
pub mod stages;
pub mod step;

use crate::Result;
use crate::bench::Bench;

/// A word of the command line, and what it measures.
pub struct Group {
    pub name: &'static str,
    pub about: &'static str,
    pub run: fn(&mut Bench) -> Result<()>,
}

/// All groups, in the order in which `all` runs them.
pub const GROUPS: &[Group] = &[
    Group { name: "stages", about: "each stage of a layer as a pass of its own, % of the copy", run: stages::run },
    Group { name: "attention", about: "exact causal attention on [1, H, N, D]", run: attention::run },
    Group { name: "gemm", about: "matrix products as the model's linear maps have them", run: gemm::run },
    Group { name: "layer", about: "Lighthouse Attention and this crate's dense attention over N", run: layer::run },
    Group { name: "operators", about: "what a training step does around attention", run: operators::run },
    Group { name: "step", about: "one training step of a model", run: step::run },
];
