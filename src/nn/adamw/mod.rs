//! AdamW (Loshchilov and Hutter, 2019) over all parameters in one command, with clipping by the global norm.

mod reference;

use crate::error::{Error, Result};
use crate::gpu::{Kernel, params};
use crate::nn::{check_element, grid_of_invocations};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

params!(AdamWParams { columns: u32, beta1: f32, beta2: f32, epsilon: f32, clip_epsilon: f32 });

/// Where parameters may begin in the tensors of all parameters, and the unit in which weight decay is switched on and
/// off: 256 bytes of f16, so that each parameter can be a view in either storage type.
pub const BLOCK: usize = 128;

/// Added to the norm that the gradient is clipped by, as in PyTorch.
const CLIP_EPSILON: f32 = 1e-6;

/// What stays the same in all steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
}

impl Default for AdamW {
    /// As language models are trained: beta2 = 0.95.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, epsilon: 1e-8 }
    }
}

/// What the host sets for each step: the contents of the `schedule` tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Step size.
    pub learning_rate: f32,
    /// 1 - beta1^step.
    pub correction1: f32,
    /// 1 - beta2^step.
    pub correction2: f32,
    /// Decoupled decay, multiplied by the learning rate.
    pub weight_decay: f32,
    /// Gradients with a larger norm are scaled down to it; `f32::MAX` leaves all alone.
    pub clip_norm: f32,
    /// 1 / the loss scale that the gradient was multiplied by.
    pub inverse_loss_scale: f32,
}

impl Schedule {
    /// Elements of the `schedule` tensor.
    pub const LEN: usize = 8;

    /// The tensor's contents.
    pub fn encode(&self) -> [f32; Self::LEN] {
        let Self { learning_rate, correction1, correction2, weight_decay, clip_norm, inverse_loss_scale } = *self;
        [learning_rate, correction1, correction2, weight_decay, clip_norm, inverse_loss_scale, 0.0, 0.0]
    }
}

impl AdamW {
    /// The bias corrections (1 - beta1^step, 1 - beta2^step) of a step, which are counted from 1.
    pub fn corrections(&self, step: u64) -> (f32, f32) {
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(step as f64)) as f32;
        (correction(self.beta1), correction(self.beta2))
    }
}

/// The tensors of the optimizer. P, the length of all parameters together, is a multiple of [`BLOCK`].
#[derive(Clone, Copy, Debug)]
pub struct AdamWTensors {
    /// The weights in f32 `[P]`.
    pub master: Tensor,
    /// f32 `[P]`.
    pub gradient: Tensor,
    /// First moment, f32 `[P]`.
    pub m: Tensor,
    /// Second moment, f32 `[P]`.
    pub v: Tensor,
    /// The copy that the model computes with, in its storage type, `[P]`; none if that is `master` itself.
    pub weights: Option<Tensor>,
    /// [`Schedule::encode`], f32 `[8]`.
    pub schedule: Tensor,
    /// The gradient's norm from [`grad_norm`](crate::nn::grad_norm), f32 `[1]`.
    pub norm: Tensor,
    /// For each [`BLOCK`] of parameters 1 if weight decay applies to it and 0 if not, u32 `[P / BLOCK]`.
    pub decay: Tensor,
}

/// Records one step: updates master weights and moments, and writes the working copy.
///
/// A step whose gradient has no finite norm changes nothing (the copy is written from the unchanged master weights).
///
/// # Errors
/// Tensors of the wrong type or length.
pub fn record(recording: &mut Recording, adamw: &AdamW, tensors: &AdamWTensors) -> Result<()> {
    let &AdamWTensors { master, gradient, m, v, weights, schedule, norm, decay } = tensors;
    let elements = master.len() as usize;
    if !elements.is_multiple_of(BLOCK) {
        return Err(Error::parameter("master", elements, format!("a multiple of {BLOCK} elements")));
    }
    for (name, tensor) in [("master", master), ("gradient", gradient), ("m", m), ("v", v)] {
        recording.require(name, tensor, Element::F32, &[elements])?;
    }
    recording.require("schedule", schedule, Element::F32, &[Schedule::LEN])?;
    recording.require("norm", norm, Element::F32, &[1])?;
    recording.require("decay", decay, Element::U32, &[elements / BLOCK])?;
    let mut command = Command::new("adamw", reference::Step { adamw: *adamw })
        .reads("schedule", schedule)
        .reads("norm", norm)
        .reads("decay", decay)
        .reads("gradient", gradient)
        .updates("master", master)
        .updates("m", m)
        .updates("v", v);
    let mut kernel = Kernel::new(recording.caps(), "nn/adamw").constant("BLOCK", BLOCK);
    if let Some(weights) = weights {
        check_element(weights.element())?;
        recording.require("weights", weights, weights.element(), &[elements])?;
        command = command.writes("weights", weights);
        kernel =
            Kernel::new(recording.caps(), "nn/adamw_cast").element("elem", weights.element()).constant("BLOCK", BLOCK);
    }
    let params = AdamWParams {
        columns: (elements / 4) as u32,
        beta1: adamw.beta1,
        beta2: adamw.beta2,
        epsilon: adamw.epsilon,
        clip_epsilon: CLIP_EPSILON,
    };
    let grid = grid_of_invocations(recording.caps(), elements / 4)?;
    recording.push(command.dispatch(kernel, params, grid, 20 * elements as u64))
}
