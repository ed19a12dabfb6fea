//! Training on text: data, schedule, and the trainer that replays a model's recorded step.

mod data;
mod schedule;
mod trainer;

pub(crate) use data::splitmix64;
pub use data::{Corpus, Sample, crate_sources};
pub use schedule::Schedule;
pub use trainer::{Trainer, TrainerConfig};
