#![doc = include_str!("../README.md")]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "nothing here panics on input"
)]

mod config;
mod cpu;
mod error;
pub mod gpu;
//pub mod layer;
//cfg
//pub mod model;
#[cfg(feature = "train")]
pub mod nn;
mod real;
mod recording;
pub mod stage;
mod tensor;
//cfg
//pub mod train;

pub use config::{LighthouseConfig, Shape};
pub use cpu::{Args, CpuExecutor, Reference};
pub use error::{Error, Result};
pub use gpu::{Caps, Gpu, GpuExecutor, Tier};
//pub use layer::{DenseAttention, LighthouseAttention};
pub use real::Real;
pub use recording::{Command, Executor, Recording};
pub use tensor::{Element, Role, Tensor, TensorInfo};
