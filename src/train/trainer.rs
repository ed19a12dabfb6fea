//! The training loop's inside: draws samples, writes the few numbers that change from step to step, replays the step.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gpu::{Caps, Gpu, GpuExecutor};
use crate::model::{Model, ModelConfig, RecordedModel, Segment};
use crate::nn::adamw::{self, AdamW};
use crate::profile::Profile;
use crate::recording::{Executor, Recording, executor};
use crate::train::{Corpus, Sample, Schedule};

/// What a run is.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerConfig {
    /// The model.
    pub model: ModelConfig,
    /// Steps in all.
    pub steps: usize,
    /// Of these the last ones that run with dense attention, which makes the result an ordinary dense model.
    pub resume_steps: usize,
    /// Seed of the parameters and of the samples.
    pub seed: u64,
    /// Peak of the learning rate.
    pub learning_rate: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Largest norm of the gradient.
    pub clip_norm: f32,
}

/// A run: a recorded model with its executor.
pub struct Trainer {
    config: TrainerConfig,
    model: Model,
    recorded: RecordedModel,
    recording: Arc<Recording>,
    adamw: AdamW,
    schedule: Schedule,
    executor: Option<Box<dyn Executor>>,
    step: usize,
}

impl Trainer {
    /// Records the model for a GPU, or for the CPU. Nothing is allocated before [`start`](Self::start).
    ///
    /// # Errors
    /// Sizes that are not allowed, or that the device cannot hold.
    pub fn new(gpu: Option<&Gpu>, config: TrainerConfig) -> Result<Self> {
        if config.steps == 0 {
            return Err(Error::parameter("steps", 0, "at least 1"));
        }
        if config.resume_steps > config.steps {
            let allowed = format!("at most steps = {}", config.steps);
            return Err(Error::parameter("resume_steps", config.resume_steps, allowed));
        }
        let model = Model::new(config.model.clone())?;
        let mut recording = Recording::new(&gpu.map_or_else(Caps::cpu, |gpu| gpu.caps().clone()));
        let adamw = AdamW::default();
        let recorded = model.record(&mut recording, &adamw)?;
        let schedule =
            Schedule { peak: config.learning_rate, warmup: (config.steps / 10).clamp(1, 100), steps: config.steps };
        let recording = Arc::new(recording);
        Ok(Self { config, model, recorded, recording, adamw, schedule, executor: None, step: 0 })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The recorded model: its tensors and segments.
    pub fn recorded(&self) -> &RecordedModel {
        &self.recorded
    }

    /// Bytes that [`start`](Self::start) will allocate.
    pub fn memory_bytes(&self, gpu: Option<&Gpu>) -> u64 {
        match gpu {
            Some(_) => GpuExecutor::memory_bytes(&self.recording),
            // The CPU keeps every tensor, in f32.
            None => {
                let owners = self.recording.tensors().iter().filter(|info| info.view.is_none());
                owners.map(|info| info.tensor.len() * 4).sum()
            }
        }
    }

    /// Allocates, compiles and initializes.
    ///
    /// # Errors
    /// As [`GpuExecutor::new`].
    pub fn start(&mut self, gpu: Option<&Gpu>) -> Result<()> {
        let mut executor = executor(gpu, self.recording.clone())?;
        self.model.initialize(&mut *executor, &self.recorded.tensors, self.config.seed)?;
        self.executor = Some(executor);
        self.step = 0;
        Ok(())
    }

    fn executor(&mut self) -> Result<&mut dyn Executor> {
        match &mut self.executor {
            Some(executor) => Ok(&mut **executor),
            None => Err(Error::tensor("all", "are not allocated yet: call start")),
        }
    }

    /// The segment of the next step.
    pub fn segment(&self) -> &Segment {
        if self.step < self.config.steps - self.config.resume_steps {
            &self.recorded.train
        } else {
            &self.recorded.resume
        }
    }

    fn load(&mut self, samples: &[Sample]) -> Result<()> {
        let (ids, targets) = (self.recorded.tensors.ids, self.recorded.tensors.targets);
        let executor = self.executor()?;
        executor.write_u32(ids, &samples.iter().flat_map(|sample| sample.ids.iter().copied()).collect::<Vec<_>>())?;
        executor
            .write_u32(targets, &samples.iter().flat_map(|sample| sample.targets.iter().copied()).collect::<Vec<_>>())
    }

    fn prepare(&mut self, corpus: &Corpus) -> Result<Segment> {
        let batch = self.config.model.batch;
        let samples: Vec<_> =
            (0..batch).map(|i| corpus.sample(self.config.seed, (self.step * batch + i) as u64)).collect();
        self.load(&samples)?;
        let (correction1, correction2) = self.adamw.corrections(self.step as u64 + 1);
        let schedule = adamw::Schedule {
            learning_rate: self.schedule.learning_rate(self.step),
            correction1,
            correction2,
            weight_decay: self.config.weight_decay,
            clip_norm: self.config.clip_norm,
            inverse_loss_scale: 1.0 / self.config.model.loss_scale(),
        };
        let tensor = self.recorded.tensors.schedule;
        self.executor()?.write(tensor, &schedule.encode())?;
        Ok(self.segment().clone())
    }

    /// Submits one step and gives where its loss will stand; a GPU goes on working while the caller does. Reading it
    /// ([`loss`](Self::loss)) waits.
    ///
    /// # Errors
    /// As the executor's.
    pub fn step(&mut self, corpus: &Corpus) -> Result<Segment> {
        let segment = self.prepare(corpus)?;
        self.executor()?.run_range(segment.commands.clone())?;
        self.step += 1;
        Ok(segment)
    }

    /// One step, measured stage by stage.
    ///
    /// # Errors
    /// As [`Executor::profile`].
    pub fn profile(&mut self, corpus: &Corpus) -> Result<Profile> {
        let segment = self.prepare(corpus)?;
        let profile = self.executor()?.profile(segment.commands)?;
        self.step += 1;
        Ok(profile)
    }

    /// A segment's mean loss in nats per byte.
    ///
    /// # Errors
    /// As the executor's.
    pub fn loss(&mut self, segment: &Segment) -> Result<f32> {
        Ok(self.executor()?.read(segment.loss)?.first().copied().unwrap_or(f32::NAN))
    }

    /// Mean held-out loss with dense attention over at most `batches` batches.
    ///
    /// # Errors
    /// As the executor's.
    pub fn evaluate(&mut self, corpus: &Corpus, batches: usize) -> Result<f64> {
        let batch = self.config.model.batch;
        let mut samples = corpus.held_out(batches * batch);
        // A batch is always full: a text with few held-out sequences shows some of them twice.
        let few = samples.clone();
        samples.extend(few.into_iter().cycle().take(samples.len().next_multiple_of(batch) - samples.len()));
        let segment = self.recorded.evaluate.clone();
        let mut sum = 0.0;
        for samples in samples.chunks(batch) {
            self.load(samples)?;
            self.executor()?.run_range(segment.commands.clone())?;
            sum += f64::from(self.loss(&segment)?);
        }
        Ok(sum / samples.len().div_ceil(batch) as f64)
    }
}
