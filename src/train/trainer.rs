//! The training loop's inside: draws samples, writes the few numbers that change from step to step, replays the step.

use std::sync::Arc;

use crate::error::Result;
use crate::gpu::{Caps, Gpu, GpuExecutor, Profile};
use crate::model::{Model, ModelConfig, RecordedModel};
use crate::nn::adamw::AdamWSchedule;
use crate::recording::{Executor, Recording};
use crate::train::{Corpus, Schedule};
use crate::cpu::CpuExecutor;

