//! Ten losses of a small model against the CPU's references, and what the trainer promises.

mod support;

use std::sync::Arc;

use lighthouse_attention::model::{Model, ModelConfig, RecordedModel};
use lighthouse_attention::nn::adamw::{AdamW, Schedule};
use lighthouse_attention::train::{Corpus, Trainer, TrainerConfig};
use lighthouse_attention::{Caps, CpuExecutor, Element, Executor, GpuExecutor, LighthouseConfig, Recording, Result};
use support::{data, devices};

const STEPS: usize = 10;

fn config(element: Element) -> ModelConfig {
    ModelConfig {
        batch: 2,
        tokens: 77,
        width: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        hidden: 48,
        element,
        attention: LighthouseConfig { levels: 3, pooling: 2, top_k: 8, chunk: 4 },
        dense_layers: vec![0],
    }
}

fn text() -> Vec<u8> {
    // Words of a small vocabulary: something to learn in ten steps.
    let words = ["light ", "house ", "attends ", "tokens ", "of the ", "sea\n"];
    (0..4000u64).flat_map(|i| words[(data::splitmix64(i) % 6) as usize].bytes()).collect()
}

/// The losses of the lighthouse steps, then of two dense ones, then of the evaluation.
fn losses(model: &Model, recorded: &RecordedModel, executor: &mut dyn Executor) -> Result<Vec<f32>> {
    let config = model.config();
    let corpus = Corpus::new(text(), config.tokens)?;
    let tensors = &recorded.tensors;
    model.initialize(executor, tensors, 3)?;
    let mut losses = Vec::new();
    for step in 0..STEPS + 3 {
        let samples: Vec<_> = (0..config.batch).map(|i| corpus.sample(5, (step * config.batch + i) as u64)).collect();
        executor.write_u32(tensors.ids, &samples.iter().flat_map(|s| s.ids.clone()).collect::<Vec<_>>())?;
        executor.write_u32(tensors.targets, &samples.iter().flat_map(|s| s.targets.clone()).collect::<Vec<_>>())?;
        let (correction1, correction2) = AdamW::default().corrections(step as u64 + 1);
        let schedule = Schedule {
            learning_rate: 3e-3,
            correction1,
            correction2,
            weight_decay: 0.1,
            clip_norm: 1.0,
            inverse_loss_scale: 1.0 / config.loss_scale(),
        };
        executor.write(tensors.schedule, &schedule.encode())?;
        let segment = match step {
            step if step < STEPS => &recorded.train,
            step if step < STEPS + 2 => &recorded.resume,
            _ => &recorded.evaluate,
        };
        executor.run_range(segment.commands.clone())?;
        losses.push(executor.read(segment.loss)?[0]);
    }
    Ok(losses)
}

fn record(caps: &Caps, element: Element) -> Result<(Model, RecordedModel, Arc<Recording>)> {
    let model = Model::new(config(element))?;
    let mut recording = Recording::new(caps);
    let recorded = model.record(&mut recording, &AdamW::default())?;
    Ok((model, recorded, Arc::new(recording)))
}

#[test]
fn ten_losses_match_the_reference() -> Result<()> {
    for element in [Element::F32, Element::F16] {
        let (model, recorded, recording) = record(&Caps::cpu(), element)?;
        let exact = losses(&model, &recorded, &mut CpuExecutor::<f64>::new(recording.clone()))?;
        let single = losses(&model, &recorded, &mut CpuExecutor::<f32>::new(recording))?;
        assert!(exact[STEPS - 1] < exact[0] - 0.5, "ten steps should learn something: {exact:?}");
        // The error rule of a backward, with the worst step's error for all steps: rounding grows from step to step, but
        // not evenly. The floor is the mean's own rounding.
        let error =
            |losses: &[f32]| exact.iter().zip(losses).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
        let allowed = 3.0 * error(&single) + f64::from(exact[0]) * 2.0f64.powi(-20);
        for device in devices() {
            let (model, recorded, recording) = record(device.gpu.caps(), element)?;
            let mut executor = GpuExecutor::new(&device.gpu, recording, &[])?;
            let first = losses(&model, &recorded, &mut executor)?;
            println!(
                "{element} on {}, {}: error {:e}, allowed {allowed:e}",
                device.adapter,
                device.tier,
                error(&first)
            );
            assert!(error(&first) <= allowed, "{element} on {}: {first:?} against {exact:?}", device.adapter);
            let second = losses(&model, &recorded, &mut executor)?;
            assert_eq!(first, second, "two runs on {} differ", device.adapter);
        }
    }
    Ok(())
}

#[test]
fn a_trainer_learns_on_the_cpu() -> Result<()> {
    let config = TrainerConfig {
        model: config(Element::F32),
        steps: 80,
        resume_steps: 10,
        seed: 1,
        learning_rate: 5e-3,
        weight_decay: 0.1,
        clip_norm: 1.0,
    };
    let corpus = Corpus::new(text(), config.model.tokens)?;
    let mut trainer = Trainer::new(None, config.clone())?;
    assert!(trainer.step(&corpus).is_err(), "nothing is allocated before start");
    trainer.start(None)?;
    for _ in 0..config.steps {
        trainer.step(&corpus)?;
    }
    let held_out = trainer.evaluate(&corpus, 4)?;
    assert!(held_out < corpus.byte_entropy() - 0.3, "{held_out} against {}", corpus.byte_entropy());
    assert!(trainer.profile(&corpus)?.rows.iter().any(|row| row.stage == "flash_forward"));
    Ok(())
}

#[test]
fn bad_sizes_of_a_model_are_named() {
    let good = TrainerConfig {
        model: config(Element::F32),
        steps: 3,
        resume_steps: 1,
        seed: 1,
        learning_rate: 1e-3,
        weight_decay: 0.0,
        clip_norm: 1.0,
    };
    let model = |change: fn(&mut ModelConfig)| {
        let mut bad = good.clone();
        change(&mut bad.model);
        bad
    };
    for (config, named) in [
        (TrainerConfig { steps: 0, resume_steps: 0, ..good.clone() }, "steps = 0"),
        (TrainerConfig { resume_steps: 4, ..good.clone() }, "resume_steps = 4"),
        (model(|m| m.layers = 0), "layers = 0"),
        (model(|m| m.width = 30), "width = 30"),
        (model(|m| m.heads = 0), "heads = 0"),
        (model(|m| m.hidden = 12), "hidden = 12"),
        (model(|m| m.kv_heads = 3), "kv_heads = 3"),
        (model(|m| m.dense_layers = vec![2]), "dense_layers = 2"),
        (model(|m| m.tokens = 0), "tokens = 0"),
        (model(|m| m.batch = 0), "batch = 0"),
        (model(|m| m.attention.pooling = 3), "pooling = 3"),
    ] {
        let message = Trainer::new(None, config).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(named), "{named}: {message:?}");
    }
}
