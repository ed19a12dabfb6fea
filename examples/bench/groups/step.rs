//! One training step of a whole model, forward, backward and optimizer, as the trainer replays it: on a discrete GPU the
//! paper's model (1024 wide, 30 layers, the first two and last two dense).

use std::time::Instant;

use lighthouse_attention::model::ModelConfig;
use lighthouse_attention::train::{Corpus, Trainer, TrainerConfig};
use lighthouse_attention::{Element, Gpu, LighthouseConfig};

use crate::Result;
use crate::bench::Bench;
use crate::device::{Clock, Device, Kind, milliseconds};
use crate::report::{Row, significant, thousands};
use crate::stats::Timing;

/// Steps that are measured, after one that is not.
const STEPS: usize = 3;

/// The model of a device's step.
pub fn model(kind: Kind) -> ModelConfig {
    let (tokens, width, layers, heads, attention, element) = match kind {
        Kind::Discrete => (98_304, 1024, 30, 8, LighthouseConfig::default(), Element::F16),
        Kind::Small => (8192, 512, 8, 8, LighthouseConfig { top_k: 512, ..Default::default() }, Element::F16),
        Kind::Software => {
            (512, 64, 4, 2, LighthouseConfig { levels: 3, pooling: 4, top_k: 32, chunk: 16 }, Element::F32)
        }
    };
    let ends = if layers > 8 { vec![0, 1, layers - 2, layers - 1] } else { vec![0, layers - 1] };
    ModelConfig {
        batch: 1,
        tokens,
        width,
        layers,
        heads,
        kv_heads: heads,
        hidden: width * 3 / 2,
        element,
        attention,
        dense_layers: ends,
    }
}

pub fn run(bench: &mut Bench) -> Result<()> {
    let model = model(bench.device.kind());
    let (tokens, element) = (model.tokens, model.element);
    let sizes = [("tokens", tokens), ("heads", model.heads), ("head_dim", model.head_dim())];
    let row = Row::new("step", "", element, &sizes);
    let config = TrainerConfig {
        model,
        steps: STEPS + 1,
        resume_steps: 0,
        seed: 1,
        learning_rate: 1e-3,
        weight_decay: 0.1,
        clip_norm: 1.0,
    };
    let gpu: Option<&Gpu> = match &bench.device {
        Device::Gpu(gpu) => Some(gpu),
        Device::Cpu => None,
    };
    let mut trainer = match Trainer::new(gpu, config) {
        Ok(trainer) => trainer,
        Err(error) => {
            bench.skip(&row, &error.to_string());
            return Ok(());
        }
    };
    let gib = trainer.memory_bytes(gpu) as f64 / (1u64 << 30) as f64;
    println!("step: {} parameters, {} GiB", thousands(trainer.model().table().count()), significant(gib));
    // Any bytes cost the same.
    let corpus = Corpus::new((0..4 * (tokens + 1)).map(|i| (i * i % 251) as u8).collect(), tokens)?;
    if let Err(error) = trainer.start(gpu) {
        bench.skip(&row, &error.to_string());
        return Ok(());
    }
    let mut times = Vec::new();
    for step in 0..=STEPS {
        let begin = Instant::now();
        let segment = trainer.step(&corpus)?;
        let loss = trainer.loss(&segment)?;
        if !loss.is_finite() {
            return Err(format!("the loss of step {step} is {loss}").into());
        }
        if step > 0 {
            times.push(milliseconds(begin.elapsed()));
        }
    }
    let timing = Timing::of(&times).ok_or("no runs")?;
    println!("step: {} tokens/s", thousands((tokens as f64 / (timing.median_ms * 1e-3)) as usize));
    bench.add(row.timed(timing, Clock::Wall));
    Ok(())
}
