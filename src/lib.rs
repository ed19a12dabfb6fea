#![doc = include_str!("../README.md")]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "nothing here panics on input"
)]
#![cfg_attr(
    not(feature = "train"),
    allow(dead_code, reason = "the model's operators use more of the recorder than attention does")
)]

mod config;
mod cpu;
mod error;
pub mod gpu;
pub mod layer;
#[cfg(feature = "train")]
pub mod model;
#[cfg(feature = "train")]
pub mod nn;
mod profile;
mod real;
mod recording;
pub mod stage;
mod tensor;
#[cfg(feature = "train")]
pub mod train;

pub use config::{LighthouseConfig, Shape};
pub use cpu::{Args, CpuExecutor, Reference};
pub use error::{Error, Result};
pub use gpu::{Caps, Gpu, GpuExecutor, Tier};
pub use layer::{DenseAttention, LighthouseAttention};
pub use profile::{Profile, ProfileRow};
pub use real::Real;
pub use recording::{Command, Executor, Recording, executor};
pub use tensor::{Element, Role, Tensor, TensorInfo};
