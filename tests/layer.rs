//! The layers end to end: against the reference, against finite differences, causality, a caller's own scores, device,
//! buffers and encoder.

mod support;

use std::sync::Arc;

use lighthouse_attention::layer::{Forward, Gradients};
use lighthouse_attention::{
    Caps, CpuExecutor, DenseAttention, Element, Executor, Gpu, GpuExecutor, LighthouseAttention, LighthouseConfig,
    Recording, Result, Shape, Tensor,
};
use support::{Probe, check, data, devices};

fn config(levels: usize, pooling: usize, top_k: usize, chunk: usize) -> LighthouseConfig {
    LighthouseConfig { levels, pooling, top_k, chunk }
}

fn shape(batch: usize, tokens: usize, heads: usize, kv_heads: usize, head_dim: usize, element: Element) -> Shape {
    Shape { batch, tokens, heads, kv_heads, head_dim, element }
}

fn cases() -> Vec<(LighthouseConfig, Shape)> {
    vec![
        (config(1, 2, 2, 2), shape(1, 130, 4, 2, 32, Element::F32)),
        (config(1, 2, 2, 2), shape(2, 65, 2, 1, 16, Element::F16)),
        (config(2, 2, 32, 16), shape(1, 256, 1, 1, 8, Element::F32)),
        (config(2, 8, 16, 4), shape(1, 700, 4, 1, 64, Element::F16)),
        (config(3, 4, 32, 8), shape(2, 509, 4, 2, 24, Element::F32)),
        (config(3, 8, 4, 2), shape(1, 701, 2, 2, 16, Element::F32)),
        (config(4, 2, 64, 32), shape(1, 600, 2, 1, 24, Element::F16)),
        (config(5, 2, 16, 8), shape(1, 301, 3, 3, 40, Element::F32)),
        // Fewer candidates than the budget: everything is expanded, and attention is as dense as it can be.
        (config(3, 2, 128, 128), shape(1, 100, 2, 1, 16, Element::F32)),
    ]
}

struct Recorded {
    inputs: [Tensor; 4],
    forward: Forward,
    gradients: Gradients,
}

fn record(recording: &mut Recording, config: LighthouseConfig, shape: Shape) -> Result<Recorded> {
    let layer = LighthouseAttention::new(config, shape)?;
    let q = recording.external("q", shape.element, &shape.q())?;
    let k = recording.external("k", shape.element, &shape.kv())?;
    let v = recording.external("v", shape.element, &shape.kv())?;
    let d_o = recording.external("d_o", shape.element, &shape.q())?;
    let forward = layer.record_forward(recording, [q, k, v])?;
    let gradients = layer.record_backward(recording, &forward, d_o)?;
    for tensor in [forward.o, gradients.dq, gradients.dk, gradients.dv] {
        recording.keep(tensor)?;
    }
    Ok(Recorded { inputs: [q, k, v, d_o], forward, gradients })
}

fn values(seed: u64, recorded: &Recorded) -> [Vec<f32>; 4] {
    // q and k decide the selection and must do so alike everywhere; v and d_o may be anything.
    let make = |i: usize| (0..recorded.inputs[i].len()).map(move |at| (i as u64, at));
    let exact = |(tensor, at)| (data::uniform(seed, tensor, at) * 16.0).round() / 16.0;
    let free = |(tensor, at)| data::uniform(seed, tensor, at);
    [
        make(0).map(exact).collect(),
        make(1).map(exact).collect(),
        make(2).map(free).collect(),
        make(3).map(free).collect(),
    ]
}

#[test]
fn forward_and_backward_match_the_reference() {
    for (i, (config, shape)) in cases().into_iter().enumerate() {
        for (backward, factor) in [(false, 2.0), (true, 3.0)] {
            check(&format!("{config:?} {shape:?}"), factor, &|recording| {
                let recorded = record(recording, config, shape)?;
                let mut probe = Probe::default();
                for (tensor, values) in recorded.inputs.into_iter().zip(values(i as u64, &recorded)) {
                    let round =
                        |x: f32| if shape.element == Element::F16 { half::f16::from_f32(x).to_f32() } else { x };
                    probe.inputs.push((tensor, support::Values::Float(values.into_iter().map(round).collect())));
                }
                let Gradients { dq, dk, dv } = recorded.gradients;
                if backward {
                    probe.outputs(recording, &[dq, dk, dv])?;
                } else {
                    probe.outputs(recording, &[recorded.forward.o])?;
                    if let Some(selection) = recorded.forward.selection {
                        probe.outputs(recording, &[selection.indices, selection.positions])?;
                    }
                }
                Ok(probe)
            });
        }
    }
}

/// The layer in f64 on the CPU, for any q, k, v, with the selection of the first inputs.
struct Held {
    executor: CpuExecutor<f64>,
    recorded: Recorded,
    after_select: usize,
    len: usize,
}

impl Held {
    fn new(config: LighthouseConfig, shape: Shape, seed: u64) -> Result<Self> {
        let mut recording = Recording::new(&Caps::cpu());
        let recorded = record(&mut recording, config, shape)?;
        let after_select = recording.position("select").map_or(0, |at| at + 1);
        let len = recording.len();
        let mut executor = CpuExecutor::new(Arc::new(recording));
        for (tensor, values) in recorded.inputs.into_iter().zip(values(seed, &recorded)) {
            executor.write(tensor, &values)?;
        }
        executor.run()?;
        Ok(Self { executor, recorded, after_select, len })
    }

    /// Everything again but the selection.
    fn rerun(&mut self) -> Result<()> {
        if self.after_select > 0 {
            self.executor.run_range(0..self.after_select - 1)?;
        }
        self.executor.run_range(self.after_select..self.len)
    }

    /// sum(o * d_o).
    fn loss(&mut self) -> Result<f64> {
        self.rerun()?;
        let (o, d_o) = (self.executor.get(self.recorded.forward.o)?, self.executor.get(self.recorded.inputs[3])?);
        Ok(o.iter().zip(&d_o).map(|(o, d)| o * d).sum())
    }
}

#[test]
fn gradients_match_finite_differences_with_the_indices_held_fixed() -> Result<()> {
    for (i, (config, shape)) in cases().into_iter().enumerate() {
        let shape = Shape { element: Element::F32, ..shape };
        let mut held = Held::new(config, shape, i as u64)?;
        let Gradients { dq, dk, dv } = held.recorded.gradients;
        for (tensor, gradient) in held.recorded.inputs.into_iter().zip([dq, dk, dv]) {
            let values = held.executor.get(tensor)?;
            let gradient = held.executor.get(gradient)?;
            let largest = gradient.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            for sample in 0..6 {
                let at = (data::splitmix64(sample + 100 * i as u64) % values.len() as u64) as usize;
                let step = 1e-4;
                let mut loss_at = |x: f64| {
                    let mut moved = values.clone();
                    moved[at] = x;
                    held.executor.set(tensor, &moved)?;
                    held.loss()
                };
                let difference = (loss_at(values[at] + step)? - loss_at(values[at] - step)?) / (2.0 * step);
                // The central difference errs by step^2 times a third derivative of the order of the gradient.
                let error = (difference - gradient[at]).abs();
                assert!(
                    error <= 1e-6 * largest.max(1.0),
                    "{config:?} {shape:?}: {difference} against {}",
                    gradient[at]
                );
            }
            held.executor.set(tensor, &values)?;
        }
    }
    Ok(())
}

#[test]
fn no_output_depends_on_a_later_token() -> Result<()> {
    for (i, (config, shape)) in cases().into_iter().enumerate() {
        let shape = Shape { element: Element::F32, ..shape };
        let mut held = Held::new(config, shape, i as u64)?;
        let before = held.executor.get(held.recorded.forward.o)?;
        let row = |heads: usize| heads * shape.head_dim;
        for j in [0, shape.tokens / 3, shape.tokens - 2] {
            // All tokens after j change; with the selection held, o up to j must not.
            for (tensor, heads) in held.recorded.inputs.into_iter().zip([shape.heads, shape.kv_heads, shape.kv_heads]) {
                let mut values = held.executor.get(tensor)?;
                for sequence in values.chunks_exact_mut(shape.tokens * row(heads)) {
                    sequence[(j + 1) * row(heads)..].iter_mut().for_each(|x| *x = 3.0 - *x);
                }
                held.executor.set(tensor, &values)?;
            }
            held.rerun()?;
            let after = held.executor.get(held.recorded.forward.o)?;
            let sequence = shape.tokens * row(shape.heads);
            for (before, after) in before.chunks_exact(sequence).zip(after.chunks_exact(sequence)) {
                let to = (j + 1) * row(shape.heads);
                assert_eq!(before[..to], after[..to], "{config:?} {shape:?}, tokens after {j}");
            }
            for (tensor, values) in held.recorded.inputs.into_iter().zip(values(i as u64, &held.recorded)) {
                held.executor.write(tensor, &values)?;
            }
        }
    }
    Ok(())
}

#[test]
fn non_finite_inputs_give_non_finite_outputs_and_nothing_worse() -> Result<()> {
    let (config, shape) = (config(3, 2, 16, 8), shape(1, 333, 2, 1, 16, Element::F32));
    for device in devices() {
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for input in 0..3 {
                let mut recording = Recording::new(device.gpu.caps());
                let recorded = record(&mut recording, config, shape)?;
                let recording = Arc::new(recording);
                let mut gpu = GpuExecutor::new(&device.gpu, recording.clone(), &[])?;
                let mut cpu = CpuExecutor::<f64>::new(recording);
                let mut values = values(9, &recorded);
                // The last token of the middle: every output from there on depends on it.
                let at = values[input].len() / 2 - 1;
                values[input][at] = poison;
                for (tensor, values) in recorded.inputs.into_iter().zip(&values) {
                    gpu.write(tensor, values)?;
                    cpu.write(tensor, values)?;
                }
                gpu.run()?;
                cpu.run()?;
                let (o, expected) = (gpu.read(recorded.forward.o)?, cpu.get(recorded.forward.o)?);
                let case = format!("{poison} in input {input} on {}, {}", device.adapter, device.tier);
                assert!(o.iter().any(|x| !x.is_finite()) || expected.iter().all(|x| x.is_finite()), "{case}");
                for (i, (o, expected)) in o.iter().zip(&expected).enumerate() {
                    assert_eq!(o.is_finite(), expected.is_finite(), "{case}: element {i}: {o} against {expected}");
                }
                for gradient in [recorded.gradients.dq, recorded.gradients.dk, recorded.gradients.dv] {
                    gpu.read(gradient)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_callers_scores_decide() {
    let (config, shape) = (config(3, 2, 16, 8), shape(1, 200, 2, 1, 8, Element::F32));
    check("scores of the caller's", 2.0, &|recording| {
        let layer = LighthouseAttention::new(config, shape)?;
        let entries = layer.pyramid().entries;
        let mut probe = Probe::default();
        let mut input = |name, tensor, dims: &[usize]| {
            probe.input(recording, name, Element::F32, dims, data::exact(3, tensor, dims))
        };
        let qkv = [input("q", 0, &shape.q())?, input("k", 1, &shape.kv())?, input("v", 2, &shape.kv())?];
        let scores = [input("score_q", 3, &[1, 2, entries])?, input("score_k", 4, &[1, 1, entries])?];
        let forward = layer.record_forward_scored(recording, qkv, scores)?;
        let selection = forward.selection.expect("two levels");
        probe.outputs(recording, &[forward.o, selection.indices])?;
        // The last level's first chunk: its entries with the highest scores are expanded.
        Ok(probe)
    });
}

#[test]
fn one_level_is_dense_attention() -> Result<()> {
    let shape = shape(1, 90, 4, 2, 16, Element::F32);
    let mut recording = Recording::new(&Caps::cpu());
    let recorded = record(&mut recording, config(1, 2, 2, 2), shape)?;
    let [q, k, v, _] = recorded.inputs;
    let dense = DenseAttention::new(shape)?.record_forward(&mut recording, [q, k, v])?;
    recording.keep(dense.o)?;
    let mut executor = CpuExecutor::<f64>::new(Arc::new(recording));
    for (tensor, values) in recorded.inputs.into_iter().zip(values(5, &recorded)) {
        executor.write(tensor, &values)?;
    }
    executor.run()?;
    assert_eq!(executor.get(dense.o)?, executor.get(recorded.forward.o)?);
    Ok(())
}

/// What a caller did not keep for the backward: o is scattered again, and dense attention takes other q, k and v.
#[test]
fn a_backward_needs_little_of_its_forward() -> Result<()> {
    for levels in [1, 3] {
        let (config, shape) = (config(levels, 2, 16, 8), shape(1, 100, 2, 1, 16, Element::F32));
        let mut recording = Recording::new(&Caps::cpu());
        let recorded = record(&mut recording, config, shape)?;
        let layer = LighthouseAttention::new(config, shape)?;
        let o = layer.record_output(&mut recording, &recorded.forward)?;
        let before = recording.len();
        let q = recording.external("q", shape.element, &shape.q())?;
        let k = recording.external("k", shape.element, &shape.kv())?;
        let v = recording.external("v", shape.element, &shape.kv())?;
        let [.., d_o] = recorded.inputs;
        let again = layer.record_backward(&mut recording, &recorded.forward.with_inputs([q, k, v]), d_o)?;
        let pairs = [
            (recorded.forward.o, o),
            (recorded.gradients.dq, again.dq),
            (recorded.gradients.dk, again.dk),
            (recorded.gradients.dv, again.dv),
        ];
        let mut executor = CpuExecutor::<f32>::new(Arc::new(recording));
        let values = values(12, &recorded);
        for (tensor, values) in recorded.inputs.iter().zip(&values) {
            executor.write(*tensor, values)?;
        }
        executor.run_range(0..before)?;
        // Dense attention's q, k and v are gone by then.
        for (tensor, values) in [q, k, v].into_iter().zip(&values) {
            executor.write(tensor, values)?;
        }
        for tensor in recorded.inputs.into_iter().take(3) {
            executor.clear(tensor)?;
        }
        executor.run_range(before..executor.recording().len())?;
        for (tensor, again) in pairs {
            assert_eq!(executor.read(tensor)?, executor.read(again)?, "{levels} levels");
        }
    }
    Ok(())
}

#[test]
fn a_callers_device_buffers_and_encoder_serve() -> Result<()> {
    let (config, shape) = (config(2, 2, 16, 8), shape(1, 150, 2, 2, 16, Element::F32));
    for device in devices() {
        // A device alone does not tell its adapter's cooperative matrices: the tier is one without.
        let theirs = Gpu::from_device(device.gpu.device().clone(), device.gpu.queue().clone());
        let ours = device.gpu.clone().with_tier(theirs.caps().tier)?;
        let mut recording = Recording::new(theirs.caps());
        let recorded = record(&mut recording, config, shape)?;
        let recording = Arc::new(recording);
        let buffer = |tensor: Tensor| {
            let buffer = theirs.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("theirs"),
                size: tensor.bytes(),
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            (tensor, buffer)
        };
        let brought: Vec<_> = recorded.inputs.into_iter().chain([recorded.forward.o]).map(buffer).collect();
        let mut gpu = GpuExecutor::new(&theirs, recording.clone(), &brought)?;
        let mut whole = GpuExecutor::new(&ours, recording.clone(), &[])?;
        for ((_, buffer), (tensor, values)) in brought.iter().zip(recorded.inputs.into_iter().zip(values(6, &recorded)))
        {
            theirs.queue().write_buffer(buffer, 0, bytemuck::cast_slice(&values));
            whole.write(tensor, &values)?;
        }
        let mut encoder = theirs.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let forward_ends = recording.position("scatter")? + 1;
        gpu.encode(&mut encoder, 0..forward_ends)?;
        gpu.encode(&mut encoder, forward_ends..recording.len())?;
        theirs.queue().submit([encoder.finish()]);
        whole.run()?;
        assert_eq!(gpu.read(recorded.forward.o)?, whole.read(recorded.forward.o)?);
        assert_eq!(gpu.read(recorded.gradients.dk)?, whole.read(recorded.gradients.dk)?);
    }
    Ok(())
}

#[test]
fn the_gpu_takes_over_from_the_cpu_at_any_stage() -> Result<()> {
    let (config, shape) = (config(3, 2, 16, 8), shape(1, 150, 2, 1, 16, Element::F32));
    for device in devices() {
        let mut recording = Recording::new(device.gpu.caps());
        let recorded = record(&mut recording, config, shape)?;
        let recording = Arc::new(recording);
        let mut stages: Vec<&str> = recording.commands().iter().map(|command| command.stage()).collect();
        stages.dedup();
        let mut exact = CpuExecutor::<f64>::new(recording.clone());
        let inputs = values(8, &recorded);
        for (tensor, values) in recorded.inputs.into_iter().zip(&inputs) {
            exact.write(tensor, values)?;
        }
        exact.run()?;
        let expected = exact.get(recorded.gradients.dq)?;
        let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        for stage in stages {
            let mut cpu = CpuExecutor::<f32>::new(recording.clone());
            let mut gpu = GpuExecutor::new(&device.gpu, recording.clone(), &[])?;
            for (tensor, values) in recorded.inputs.into_iter().zip(&inputs) {
                cpu.write(tensor, values)?;
            }
            gpu.run_from(&mut cpu, stage)?;
            // A wrong hand-over is wrong in the first digit; this is far above rounding and far below that.
            let error = support::max_error(&expected, &gpu.read(recorded.gradients.dq)?);
            assert!(error <= 1e-4 * largest, "from {stage} on {}: {error}", device.adapter);
        }
        let mut gpu = GpuExecutor::new(&device.gpu, recording.clone(), &[])?;
        let message = gpu.run_from(&mut CpuExecutor::new(recording), "no_such").err().map(|e| e.to_string());
        assert!(message.is_some_and(|m| m.contains("no_such") && m.contains("select")));
    }
    Ok(())
}

/// Runs a layer planned for bindings of the device's size and then for bindings of `bytes`, and compares.
fn slices_give_the_same_bits(config: LighthouseConfig, shape: Shape, bytes: usize) -> Result<()> {
    for device in devices() {
        let run = |caps: &Caps| -> Result<(usize, Vec<Vec<f32>>)> {
            let mut recording = Recording::new(caps);
            let recorded = record(&mut recording, config, shape)?;
            let dispatches = recording.commands().iter().map(|command| command.dispatches()).sum();
            let mut gpu = GpuExecutor::new(&device.gpu, Arc::new(recording), &[])?;
            for (tensor, values) in recorded.inputs.into_iter().zip(values(4, &recorded)) {
                gpu.write(tensor, &values)?;
            }
            gpu.run()?;
            let Gradients { dq, dk, dv } = recorded.gradients;
            let outputs = [recorded.forward.o, dq, dk, dv].map(|tensor| gpu.read(tensor));
            Ok((dispatches, outputs.into_iter().collect::<Result<_>>()?))
        };
        let (whole, expected) = run(device.gpu.caps())?;
        let mut caps = device.gpu.caps().clone();
        caps.limits.max_storage_buffer_binding_size = bytes as u64;
        let (sliced, outputs) = run(&caps)?;
        assert!(sliced > whole, "{sliced} dispatches in slices, {whole} whole");
        assert!(outputs == expected, "the bits differ on {}, {}", device.adapter, device.tier);
    }
    Ok(())
}

#[test]
fn a_batch_in_slices_gives_the_same_bits() -> Result<()> {
    let shape = shape(3, 256, 2, 1, 64, Element::F32);
    // Bindings that hold two of the three sequences of the largest tensor.
    let bytes = 2 * (shape.tokens * shape.heads * shape.head_dim * 4) * 2;
    slices_give_the_same_bits(config(3, 2, 16, 8), shape, bytes)
}

/// The paper's longest sequence: q has four bytes more than NVIDIA's largest binding. Nothing is run.
#[test]
fn a_million_tokens_of_eight_heads_can_be_recorded() -> Result<()> {
    let mut caps = Caps::default();
    caps.limits.max_storage_buffer_binding_size = (1 << 31) - 4;
    caps.limits.max_buffer_size = 1 << 32;
    let million = shape(1, 1 << 20, 8, 8, 128, Element::F16);
    let mut recording = Recording::new(&caps);
    record(&mut recording, config(5, 4, 2048, 128), million)?;
    let sliced: Vec<&str> = recording
        .commands()
        .iter()
        .filter(|command| command.dispatches() == 2)
        .map(|command| command.stage())
        .collect();
    assert_eq!(sliced, ["pool_score", "gather", "scatter", "scatter_backward", "gather_backward"]);
    // A pyramid that is larger than a binding is not cut.
    let error = record(&mut Recording::new(&caps), config(2, 2, 2048, 128), million).err().expect("too large");
    assert!(error.to_string().contains("one batch entry of `pyramid` in stage pool_score"), "{error}");
    Ok(())
}

#[test]
fn a_sequence_in_slices_gives_the_same_bits() -> Result<()> {
    for (element, batch, tokens, kv_heads) in
        [(Element::F32, 1, 1003, 1), (Element::F16, 1, 1003, 1), (Element::F16, 1, 900, 2), (Element::F32, 2, 1024, 1)]
    {
        let shape = shape(batch, tokens, 2, kv_heads, 64, element);
        // Bindings that hold the pyramid of a sequence, but not all of its tokens.
        let bytes = tokens * (shape.heads + 2 * kv_heads) * 64 * element.bytes() as usize * 8 / 25;
        slices_give_the_same_bits(config(3, 4, 16, 8), shape, bytes)?;
    }
    Ok(())
}
