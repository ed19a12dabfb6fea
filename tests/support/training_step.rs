//! The check of a whole training step.

use std::sync::Arc;

use lighthouse_attention::model::{Model, ModelConfig, VOCABULARY};
use lighthouse_attention::nn::adamw::{AdamW, Schedule};
use lighthouse_attention::{Element, Recording, Result};

use super::checks::{BACKWARD, Problem};
use super::{Aspect, Outcome, Target, data, floor, max_error, stated_bound};

/// Loss and gradient of a model's step: every operator that training adds, in a row.
pub fn measure(target: &Target, problem: &Problem) -> Result<Vec<Outcome>> {
    let [exact, single] = [step(&Target::CpuF64, problem)?, step(&Target::CpuF32, problem)?];
    let got = step(target, problem)?;
    let outcome = |(i, output): (usize, &str)| {
        let exact: Vec<f64> = exact[i].iter().map(|&x| f64::from(x)).collect();
        let allowed = match target {
            Target::Gpu(_) => BACKWARD * max_error(&exact, &single[i]) + floor(Element::F32, &exact, 0.0),
            Target::CpuF32 | Target::CpuF64 => stated_bound(problem.shape.element, &exact),
        };
        Outcome { aspect: Aspect::Values, output: output.into(), error: max_error(&exact, &got[i]), allowed }
    };
    Ok(["loss", "gradient"].into_iter().enumerate().map(outcome).collect())
}

fn step(target: &Target, problem: &Problem) -> Result<[Vec<f32>; 2]> {
    let Problem { config, shape, seed } = problem;
    let model = Model::new(ModelConfig {
        batch: shape.batch,
        tokens: shape.tokens,
        width: shape.heads * shape.head_dim,
        layers: 1,
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        hidden: 72,
        element: shape.element,
        attention: *config,
        dense_layers: Vec::new(),
    })?;
    let mut recording = Recording::new(&target.caps());
    let recorded = model.record(&mut recording, &AdamW::default())?;
    let mut executor = target.executor(Arc::new(recording))?;
    let tensors = &recorded.tensors;
    model.initialize(&mut *executor, tensors, *seed)?;
    let text = |salt: u64| -> Vec<u32> {
        let byte = |i| (data::splitmix64(seed + salt + i) % VOCABULARY as u64) as u32;
        (0..(shape.batch * shape.tokens) as u64).map(byte).collect()
    };
    executor.write_u32(tensors.ids, &text(0))?;
    executor.write_u32(tensors.targets, &text(1))?;
    let schedule = Schedule {
        learning_rate: 1e-3,
        correction1: 0.1,
        correction2: 0.05,
        weight_decay: 0.1,
        clip_norm: 1.0,
        inverse_loss_scale: 1.0 / model.config().loss_scale(),
    };
    executor.write(tensors.schedule, &schedule.encode())?;
    executor.run_range(recorded.train.commands.clone())?;
    Ok([executor.read(recorded.train.loss)?, executor.read(tensors.gradient)?])
}
