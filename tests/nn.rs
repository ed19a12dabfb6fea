//! The model's operators: every device against the reference, the references' gradients against finite differences, and
//! the optimizer against a plain loop.

mod support;

use std::sync::Arc;

use lighthouse_attention::nn::adamw::{AdamW, AdamWTensors, BLOCK, Schedule};
use lighthouse_attention::nn::cross_entropy::{self, CrossEntropyShape};
use lighthouse_attention::nn::embedding::{self, EmbeddingShape};
use lighthouse_attention::nn::linear::{self, LinearShape};
use lighthouse_attention::nn::qkv::{self, QkvShape};
use lighthouse_attention::nn::rms_norm::{self, RmsNormShape};
use lighthouse_attention::nn::swiglu::{self, SwigluShape};
use lighthouse_attention::nn::{adamw, grad_norm};
use lighthouse_attention::{Caps, CpuExecutor, Element, Error, Executor, Recording, Result, Tensor};
use support::{Probe, Values, check, data};

const ELEMENTS: [Element; 2] = [Element::F32, Element::F16];

/// Token ids, some of them past the vocabulary.
fn ids(seed: u64, rows: usize, vocab: usize) -> Vec<u32> {
    let id = |i| (data::splitmix64(seed ^ i) % (vocab as u64 + 2)) as u32;
    (0..rows as u64).map(|i| if i % 31 == 30 { u32::MAX } else { id(i) }).collect()
}

/// Makes inputs of a case by their number.
struct Inputs<'a> {
    recording: &'a mut Recording,
    probe: Probe,
    seed: u64,
}

impl<'a> Inputs<'a> {
    fn new(recording: &'a mut Recording, seed: u64) -> Self {
        Self { recording, probe: Probe::default(), seed }
    }

    fn float(&mut self, name: &str, element: Element, shape: &[usize]) -> Result<Tensor> {
        let number = self.probe.inputs.len() as u64;
        self.probe.input(self.recording, name, element, shape, data::tensor(self.seed, number, shape))
    }

    fn values(&mut self, name: &str, element: Element, shape: &[usize], values: Vec<f32>) -> Result<Tensor> {
        self.probe.input(self.recording, name, element, shape, values)
    }

    fn index(&mut self, name: &str, values: Vec<u32>) -> Result<Tensor> {
        self.probe.input_u32(self.recording, name, &[values.len()], values)
    }

    /// A tensor that an operator writes.
    fn output(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.recording.external(name, Element::F32, shape)
    }

    fn compare(mut self, outputs: &[Tensor]) -> Result<Probe> {
        self.probe.outputs(self.recording, outputs)?;
        Ok(self.probe)
    }
}

#[test]
fn embedding_matches_the_reference() {
    for (rows, vocab, width) in [(1, 256, 8), (37, 40, 24), (130, 3, 136), (130, 40, 264), (5000, 2, 8)] {
        for element in ELEMENTS {
            let shape = EmbeddingShape { rows, vocab, width, element };
            check(&format!("{shape:?}"), 2.0, &|recording| {
                let mut inputs = Inputs::new(recording, 1);
                let ids = inputs.index("ids", ids(1, rows, vocab))?;
                let weight = inputs.float("weight", element, &[vocab, width])?;
                let x = embedding::record_forward(inputs.recording, &shape, ids, weight)?;
                inputs.compare(&[x])
            });
            check(&format!("backward {shape:?}"), 3.0, &|recording| {
                let mut inputs = Inputs::new(recording, 2);
                let ids = inputs.index("ids", ids(2, rows, vocab))?;
                let d_x = inputs.float("d_x", element, &[rows, width])?;
                let d_weight = inputs.output("d_weight", &[vocab, width])?;
                embedding::record_backward(inputs.recording, &shape, ids, d_x, d_weight)?;
                inputs.compare(&[d_weight])
            });
        }
    }
}

#[test]
fn rms_norm_matches_the_reference() {
    for (rows, width) in [(1, 8), (37, 24), (130, 136), (3, 1160), (3000, 24)] {
        for element in ELEMENTS {
            let shape = RmsNormShape { rows, width, element };
            check(&format!("{shape:?}"), 2.0, &|recording| {
                let mut inputs = Inputs::new(recording, 3);
                let x = inputs.float("x", element, &[rows, width])?;
                let weight = inputs.float("weight", element, &[width])?;
                let norm = rms_norm::record_forward(inputs.recording, &shape, x, weight)?;
                inputs.compare(&[norm.y, norm.inverse_rms])
            });
            for residual in [false, true] {
                check(&format!("backward {shape:?}, residual {residual}"), 3.0, &|recording| {
                    let mut inputs = Inputs::new(recording, 4);
                    let x = inputs.float("x", element, &[rows, width])?;
                    let weight = inputs.float("weight", element, &[width])?;
                    let d_y = inputs.float("d_y", element, &[rows, width])?;
                    let d_residual =
                        if residual { Some(inputs.float("d_residual", element, &[rows, width])?) } else { None };
                    let inverse = inputs.values("inverse_rms", Element::F32, &[rows], vec![1.7; rows])?;
                    let d_weight = inputs.output("d_weight", &[width])?;
                    let recording = &mut *inputs.recording;
                    let saved = [x, weight, inverse];
                    let d_x = rms_norm::record_backward(recording, &shape, saved, d_y, d_residual, d_weight)?;
                    inputs.compare(&[d_x, d_weight])
                });
            }
        }
    }
}

#[test]
fn linear_matches_the_reference() {
    for (rows, width_in, width_out) in
        [(1, 8, 24), (37, 24, 136), (130, 136, 40), (130, 8, 8), (257, 264, 136), (70, 520, 256)]
    {
        for element in ELEMENTS {
            let shape = LinearShape { rows, inputs: width_in, outputs: width_out, element };
            for with_residual in [false, true] {
                check(&format!("{shape:?}, residual {with_residual}"), 2.0, &|recording| {
                    let mut inputs = Inputs::new(recording, 5);
                    let x = inputs.float("x", element, &[rows, width_in])?;
                    let weight = inputs.float("weight", element, &[width_out, width_in])?;
                    let residual =
                        if with_residual { Some(inputs.float("residual", element, &[rows, width_out])?) } else { None };
                    let y = linear::record_forward(inputs.recording, &shape, x, weight, residual)?;
                    inputs.compare(&[y])
                });
            }
            check(&format!("backward of the input, {shape:?}"), 3.0, &|recording| {
                let mut inputs = Inputs::new(recording, 6);
                let d_y = inputs.float("d_y", element, &[rows, width_out])?;
                let weight = inputs.float("weight", element, &[width_out, width_in])?;
                let d_x = linear::record_backward_input(inputs.recording, &shape, d_y, weight)?;
                inputs.compare(&[d_x])
            });
        }
    }
}

#[test]
fn an_input_can_be_its_own_residual() {
    for element in ELEMENTS {
        let shape = LinearShape { rows: 37, inputs: 24, outputs: 24, element };
        check(&format!("{shape:?}"), 2.0, &|recording| {
            let mut inputs = Inputs::new(recording, 5);
            let x = inputs.float("x", element, &[37, 24])?;
            let weight = inputs.float("weight", element, &[24, 24])?;
            let y = linear::record_forward(inputs.recording, &shape, x, weight, Some(x))?;
            inputs.compare(&[y])
        });
    }
}

#[test]
fn linear_weight_gradient_matches_the_reference() {
    for (rows, width_in, width_out) in
        [(1, 8, 24), (37, 24, 136), (130, 136, 40), (257, 264, 136), (1100, 24, 8), (2049, 136, 24)]
    {
        for element in ELEMENTS {
            let shape = LinearShape { rows, inputs: width_in, outputs: width_out, element };
            check(&format!("{shape:?}"), 3.0, &|recording| {
                let mut inputs = Inputs::new(recording, 7);
                let d_y = inputs.float("d_y", element, &[rows, width_out])?;
                let x = inputs.float("x", element, &[rows, width_in])?;
                let d_weight = inputs.output("d_weight", &[width_out, width_in])?;
                linear::record_backward_weight(inputs.recording, &shape, d_y, x, d_weight)?;
                inputs.compare(&[d_weight])
            });
        }
    }
}

#[test]
fn qkv_matches_the_reference() {
    for (rows, tokens, width, heads, kv_heads, head_dim) in
        [(1, 1, 8, 1, 1, 8), (74, 37, 24, 4, 2, 24), (130, 130, 40, 3, 1, 136), (70, 35, 136, 2, 2, 72)]
    {
        for element in ELEMENTS {
            let shape = QkvShape { rows, tokens, width, heads, kv_heads, head_dim, element };
            check(&format!("{shape:?}"), 2.0, &|recording| {
                let mut inputs = Inputs::new(recording, 8);
                let angles = qkv::angles(tokens, head_dim, qkv::THETA);
                let angles = inputs.values("angles", Element::F32, &[tokens, head_dim], angles)?;
                let x = inputs.float("x", element, &[rows, width])?;
                let weight = inputs.float("weight", element, &[shape.outputs(), width])?;
                let qkv = qkv::record_forward(inputs.recording, &shape, angles, x, weight)?;
                inputs.compare(&qkv)
            });
            check(&format!("backward {shape:?}"), 3.0, &|recording| {
                let mut inputs = Inputs::new(recording, 28);
                let angles = qkv::angles(tokens, head_dim, qkv::THETA);
                let angles = inputs.values("angles", Element::F32, &[tokens, head_dim], angles)?;
                let d_q = inputs.float("d_q", element, &[rows, heads, head_dim])?;
                let d_k = inputs.float("d_k", element, &[rows, kv_heads, head_dim])?;
                let d_v = inputs.float("d_v", element, &[rows, kv_heads, head_dim])?;
                let d_qkv = qkv::record_backward(inputs.recording, &shape, angles, [d_q, d_k, d_v])?;
                inputs.compare(&[d_qkv])
            });
        }
    }
}

/// Values far enough out that a careless sigmoid or softmax overflows.
fn large(seed: u64, tensor: u64, shape: &[usize]) -> Vec<f32> {
    data::tensor(seed, tensor, shape).into_iter().map(|x| 8.0 * x + 200.0 * x.powi(15)).collect()
}

#[test]
fn swiglu_matches_the_reference() {
    for (rows, width, hidden) in [(1, 8, 8), (37, 40, 24), (130, 24, 136), (70, 136, 264)] {
        for element in ELEMENTS {
            let shape = SwigluShape { rows, width, hidden, element };
            check(&format!("{shape:?}"), 2.0, &|recording| {
                let mut inputs = Inputs::new(recording, 9);
                let x = inputs.values("x", element, &[rows, width], large(9, 0, &[rows, width]))?;
                let weight = inputs.float("weight", element, &[2 * hidden, width])?;
                let swiglu = swiglu::record_forward(inputs.recording, &shape, x, weight)?;
                inputs.compare(&[swiglu.gate_up, swiglu.y])
            });
            check(&format!("backward {shape:?}"), 3.0, &|recording| {
                let mut inputs = Inputs::new(recording, 10);
                let gate_up = [rows, 2 * hidden];
                let gate_up = inputs.values("gate_up", element, &gate_up, large(10, 0, &gate_up))?;
                let d_z = inputs.float("d_z", element, &[rows, width])?;
                let weight = inputs.float("weight", element, &[width, hidden])?;
                let out = swiglu::record_backward(inputs.recording, &shape, gate_up, d_z, weight)?;
                inputs.compare(&[out.d_gate_up, out.y])
            });
        }
    }
}

#[test]
fn cross_entropy_matches_the_reference() {
    for (rows, vocab) in [(1, 256), (37, 40), (130, 8), (300, 256), (3, 1544)] {
        for element in ELEMENTS {
            let shape = CrossEntropyShape { rows, vocab, element };
            check(&format!("{shape:?}"), 2.0, &|recording| {
                let mut inputs = Inputs::new(recording, 11);
                let logits = inputs.values("logits", element, &[rows, vocab], large(11, 0, &[rows, vocab]))?;
                let targets = inputs.index("targets", ids(11, rows, vocab))?;
                let loss = cross_entropy::record_forward(inputs.recording, &shape, logits, targets)?;
                inputs.compare(&[loss])
            });
            check(&format!("backward {shape:?}"), 3.0, &|recording| {
                let mut inputs = Inputs::new(recording, 12);
                let logits = inputs.values("logits", element, &[rows, vocab], large(12, 0, &[rows, vocab]))?;
                let targets = inputs.index("targets", ids(12, rows, vocab))?;
                let out = cross_entropy::record_forward_backward(inputs.recording, &shape, logits, targets, 1024.0)?;
                inputs.compare(&[out.loss, out.d_logits])
            });
        }
    }
}

#[test]
fn grad_norm_matches_the_reference() {
    for elements in [8, 136, 5000, 100_008] {
        check(&format!("{elements}"), 2.0, &|recording| {
            let mut inputs = Inputs::new(recording, 13);
            let gradient = inputs.float("gradient", Element::F32, &[elements])?;
            let norm = grad_norm::record(inputs.recording, gradient)?;
            inputs.compare(&[norm])
        });
    }
}

fn schedule(clip_norm: f32) -> Schedule {
    let (correction1, correction2) = AdamW::default().corrections(3);
    Schedule { learning_rate: 3e-3, correction1, correction2, weight_decay: 0.1, clip_norm, inverse_loss_scale: 0.125 }
}

fn record_adamw(inputs: &mut Inputs<'_>, weights: Option<Element>, clip_norm: f32, norm: f32) -> Result<AdamWTensors> {
    let elements = 5 * BLOCK;
    let second_moment = data::tensor(15, 0, &[elements]).into_iter().map(f32::abs).collect();
    let tensors = AdamWTensors {
        master: inputs.float("master", Element::F32, &[elements])?,
        gradient: inputs.float("gradient", Element::F32, &[elements])?,
        m: inputs.float("m", Element::F32, &[elements])?,
        v: inputs.values("v", Element::F32, &[elements], second_moment)?,
        weights: match weights {
            Some(element) => Some(inputs.recording.external("weights", element, &[elements])?),
            None => None,
        },
        schedule: inputs.values("schedule", Element::F32, &[8], schedule(clip_norm).encode().to_vec())?,
        norm: inputs.values("norm", Element::F32, &[1], vec![norm])?,
        decay: inputs.index("decay", vec![1, 0, 1, 1, 0])?,
    };
    adamw::record(inputs.recording, &AdamW::default(), &tensors)?;
    Ok(tensors)
}

#[test]
fn adamw_matches_the_reference() {
    for weights in [None, Some(Element::F32), Some(Element::F16)] {
        for (clip_norm, norm) in [(1.0, 0.5), (1.0, 80.0), (f32::MAX, 80.0), (1.0, f32::INFINITY), (1.0, f32::NAN)] {
            check(&format!("weights {weights:?}, norm {norm} clipped to {clip_norm}"), 2.0, &|recording| {
                let mut inputs = Inputs::new(recording, 14);
                let tensors = record_adamw(&mut inputs, weights, clip_norm, norm)?;
                let mut outputs = vec![tensors.master, tensors.m, tensors.v];
                outputs.extend(tensors.weights);
                inputs.compare(&outputs)
            });
        }
    }
}

/// A whole step of a small model whose parameters are views into one tensor, as the trainer has them.
#[test]
fn parameters_can_be_views() {
    let (rows, vocab, width) = (37, 16, 128);
    for element in ELEMENTS {
        check(&format!("a step in {element}"), 3.0, &|recording| {
            let (table, norm_weight, output) = (0, vocab * width, (vocab + 1) * width);
            let elements = (2 * vocab + 1) * width;
            let mut inputs = Inputs::new(recording, 25);
            let master = inputs.float("master", Element::F32, &[elements])?;
            let m = inputs.float("m", Element::F32, &[elements])?;
            let v = inputs.values("v", Element::F32, &[elements], vec![0.25; elements])?;
            let schedule = inputs.values("schedule", Element::F32, &[8], schedule(1.0).encode().to_vec())?;
            let decay = inputs.index("decay", (0..elements / BLOCK).map(|i| u32::from(i > vocab)).collect())?;
            let ids = inputs.index("ids", ids(25, rows, vocab))?;
            let gradient = inputs.output("gradient", &[elements])?;
            let copy = match element {
                Element::F32 => None,
                _ => Some(inputs.float("weights", element, &[elements])?),
            };
            let recording = &mut *inputs.recording;
            let mut parameter = |name: &str, start: usize, shape: &[usize]| -> Result<[Tensor; 2]> {
                let weight = recording.view(name, copy.unwrap_or(master), start, shape)?;
                Ok([weight, recording.view(format!("d_{name}"), gradient, start, shape)?])
            };
            let [table, d_table] = parameter("table", table, &[vocab, width])?;
            let [norm_weight, d_norm_weight] = parameter("norm", norm_weight, &[width])?;
            let [output, d_output] = parameter("output", output, &[vocab, width])?;

            let embedding = EmbeddingShape { rows, vocab, width, element };
            let norm = RmsNormShape { rows, width, element };
            let linear = LinearShape { rows, inputs: width, outputs: vocab, element };
            let x = embedding::record_forward(recording, &embedding, ids, table)?;
            let y = rms_norm::record_forward(recording, &norm, x, norm_weight)?;
            let logits = linear::record_forward(recording, &linear, y.y, output, None)?;
            let shape = CrossEntropyShape { rows, vocab, element };
            let out = cross_entropy::record_forward_backward(recording, &shape, logits, ids, 8.0)?;
            linear::record_backward_weight(recording, &linear, out.d_logits, y.y, d_output)?;
            let d_y = linear::record_backward_input(recording, &linear, out.d_logits, output)?;
            let saved = [x, norm_weight, y.inverse_rms];
            let d_x = rms_norm::record_backward(recording, &norm, saved, d_y, None, d_norm_weight)?;
            embedding::record_backward(recording, &embedding, ids, d_x, d_table)?;
            let norm = grad_norm::record(recording, gradient)?;
            let tensors = AdamWTensors { master, gradient, m, v, weights: copy, schedule, norm, decay };
            adamw::record(recording, &AdamW::default(), &tensors)?;
            let mut outputs = vec![out.loss, gradient, norm, master, m, v];
            outputs.extend(copy);
            inputs.compare(&outputs)
        });
    }
}

/// A recording's inputs, the number of its commands that are the forward, the forward's output y with the gradient that
/// the backward starts from, and the inputs with the gradients that it gives.
struct Gradients {
    probe: Probe,
    forward: usize,
    y: Tensor,
    d_y: Tensor,
    pairs: Vec<(Tensor, Tensor)>,
}

/// Checks the gradients of sum(y d_y) against central differences of the reference, both in f64.
fn gradients_match(name: &str, build: &dyn Fn(&mut Recording) -> Result<Gradients>) {
    let mut recording = Recording::new(&Caps::cpu());
    let case = build(&mut recording).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut executor = CpuExecutor::<f64>::new(Arc::new(recording));
    let floats = |tensor: Tensor| -> Vec<f64> {
        match case.probe.inputs.iter().find(|(input, _)| *input == tensor) {
            Some((_, Values::Float(values))) => values.iter().map(|&x| f64::from(x)).collect(),
            _ => panic!("{name}: not a float input"),
        }
    };
    let d_y = floats(case.d_y);
    let set_inputs = |executor: &mut CpuExecutor<f64>| {
        for (tensor, values) in &case.probe.inputs {
            match values {
                Values::Float(values) => executor.write(*tensor, values).unwrap(),
                Values::Index(values) => executor.write_u32(*tensor, values).unwrap(),
            }
        }
    };
    set_inputs(&mut executor);
    executor.run().unwrap();
    let gradients: Vec<Vec<f64>> = case.pairs.iter().map(|(_, d_x)| executor.get(*d_x).unwrap()).collect();
    for ((x, _), gradient) in case.pairs.iter().zip(&gradients) {
        let values = floats(*x);
        let largest = gradient.iter().fold(0.0f64, |m, g| m.max(g.abs()));
        assert!(largest > 0.0, "{name}: no gradient");
        for i in (0..values.len()).step_by(values.len().div_ceil(40)) {
            let h = 1e-4;
            let mut loss = |step: f64| -> f64 {
                set_inputs(&mut executor);
                let mut moved = values.clone();
                moved[i] += step;
                executor.set(*x, &moved).unwrap();
                executor.run_range(0..case.forward).unwrap();
                executor.get(case.y).unwrap().iter().zip(&d_y).map(|(y, d_y)| y * d_y).sum()
            };
            // The fourth-order formula: its error is far below the tolerance for any of the operators.
            let difference = (8.0 * (loss(h) - loss(-h)) - (loss(2.0 * h) - loss(-2.0 * h))) / (12.0 * h);
            approx::assert_abs_diff_eq!(gradient[i], difference, epsilon = 1e-9 * largest.max(1.0));
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let element = Element::F32;
    gradients_match("embedding", &|recording| {
        let shape = EmbeddingShape { rows: 37, vocab: 5, width: 8, element };
        let mut inputs = Inputs::new(recording, 16);
        let ids = inputs.index("ids", ids(16, 37, 5))?;
        let weight = inputs.float("weight", element, &[5, 8])?;
        let d_y = inputs.float("d_x", element, &[37, 8])?;
        let d_weight = inputs.output("d_weight", &[5, 8])?;
        let y = embedding::record_forward(inputs.recording, &shape, ids, weight)?;
        embedding::record_backward(inputs.recording, &shape, ids, d_y, d_weight)?;
        Ok(Gradients { probe: inputs.probe, forward: 1, y, d_y, pairs: vec![(weight, d_weight)] })
    });
    gradients_match("rms_norm", &|recording| {
        let shape = RmsNormShape { rows: 5, width: 24, element };
        let mut inputs = Inputs::new(recording, 17);
        let x = inputs.float("x", element, &[5, 24])?;
        let weight = inputs.float("weight", element, &[24])?;
        let d_y = inputs.float("d_y", element, &[5, 24])?;
        let d_w = inputs.output("d_weight", &[24])?;
        let norm = rms_norm::record_forward(inputs.recording, &shape, x, weight)?;
        let d_x = rms_norm::record_backward(inputs.recording, &shape, [x, weight, norm.inverse_rms], d_y, None, d_w)?;
        Ok(Gradients { probe: inputs.probe, forward: 1, y: norm.y, d_y, pairs: vec![(x, d_x), (weight, d_w)] })
    });
    gradients_match("linear", &|recording| {
        let shape = LinearShape { rows: 19, inputs: 16, outputs: 8, element };
        let mut inputs = Inputs::new(recording, 18);
        let x = inputs.float("x", element, &[19, 16])?;
        let weight = inputs.float("weight", element, &[8, 16])?;
        let d_y = inputs.float("d_y", element, &[19, 8])?;
        let d_weight = inputs.output("d_weight", &[8, 16])?;
        let y = linear::record_forward(inputs.recording, &shape, x, weight, None)?;
        let d_x = linear::record_backward_input(inputs.recording, &shape, d_y, weight)?;
        linear::record_backward_weight(inputs.recording, &shape, d_y, x, d_weight)?;
        Ok(Gradients { probe: inputs.probe, forward: 1, y, d_y, pairs: vec![(x, d_x), (weight, d_weight)] })
    });
    for output in 0..3 {
        gradients_match("qkv", &|recording| {
            let shape = QkvShape { rows: 6, tokens: 3, width: 16, heads: 2, kv_heads: 1, head_dim: 8, element };
            let linear = LinearShape { rows: 6, inputs: 16, outputs: shape.outputs(), element };
            let mut inputs = Inputs::new(recording, 19);
            let angles = inputs.values("angles", element, &[3, 8], qkv::angles(3, 8, qkv::THETA))?;
            let x = inputs.float("x", element, &[6, 16])?;
            let weight = inputs.float("weight", element, &[shape.outputs(), 16])?;
            let d_weight = inputs.output("d_weight", &[shape.outputs(), 16])?;
            let mut gradient = |name, heads: usize, number| {
                let values = data::tensor(29, number, &[6, heads, 8]);
                let scale = if number == output { 1.0 } else { 0.0 };
                inputs.values(name, element, &[6, heads, 8], values.into_iter().map(|x| scale * x).collect())
            };
            let d_qkv = [gradient("d_q", 2, 0)?, gradient("d_k", 1, 1)?, gradient("d_v", 1, 2)?];
            let recording = &mut *inputs.recording;
            let qkv = qkv::record_forward(recording, &shape, angles, x, weight)?;
            let d_y = qkv::record_backward(recording, &shape, angles, d_qkv)?;
            linear::record_backward_weight(recording, &linear, d_y, x, d_weight)?;
            let d_x = linear::record_backward_input(recording, &linear, d_y, weight)?;
            let (y, d_y) = (qkv[output as usize], d_qkv[output as usize]);
            Ok(Gradients { probe: inputs.probe, forward: 1, y, d_y, pairs: vec![(x, d_x), (weight, d_weight)] })
        });
    }
    gradients_match("swiglu", &|recording| {
        let shape = SwigluShape { rows: 5, width: 16, hidden: 8, element };
        let gate_up = LinearShape { rows: 5, inputs: 16, outputs: 16, element };
        let down = LinearShape { rows: 5, inputs: 8, outputs: 16, element };
        let mut inputs = Inputs::new(recording, 20);
        let x = inputs.float("x", element, &[5, 16])?;
        let weight = inputs.float("weight", element, &[16, 16])?;
        let d_weight = inputs.output("d_weight", &[16, 16])?;
        let down_weight = inputs.float("down_weight", element, &[16, 8])?;
        let d_down_weight = inputs.output("d_down_weight", &[16, 8])?;
        let d_z = inputs.float("d_z", element, &[5, 16])?;
        let recording = &mut *inputs.recording;
        let swiglu = swiglu::record_forward(recording, &shape, x, weight)?;
        let z = linear::record_forward(recording, &down, swiglu.y, down_weight, None)?;
        let back = swiglu::record_backward(recording, &shape, swiglu.gate_up, d_z, down_weight)?;
        linear::record_backward_weight(recording, &down, d_z, back.y, d_down_weight)?;
        linear::record_backward_weight(recording, &gate_up, back.d_gate_up, x, d_weight)?;
        let d_x = linear::record_backward_input(recording, &gate_up, back.d_gate_up, weight)?;
        let pairs = vec![(x, d_x), (weight, d_weight), (down_weight, d_down_weight)];
        Ok(Gradients { probe: inputs.probe, forward: 2, y: z, d_y: d_z, pairs })
    });
    gradients_match("cross_entropy", &|recording| {
        let shape = CrossEntropyShape { rows: 4, vocab: 16, element };
        let mut inputs = Inputs::new(recording, 21);
        let logits = inputs.float("logits", element, &[4, 16])?;
        let targets = inputs.index("targets", ids(21, 4, 16))?;
        let d_y = inputs.values("d_loss", element, &[1], vec![8.0])?;
        // Loss scale / rows is rounded to f32: 8 / 4 is exact.
        let out = cross_entropy::record_forward_backward(inputs.recording, &shape, logits, targets, 8.0)?;
        Ok(Gradients { probe: inputs.probe, forward: 1, y: out.loss, d_y, pairs: vec![(logits, out.d_logits)] })
    });
}

#[test]
fn adamw_is_the_published_algorithm() -> Result<()> {
    let (elements, steps) = (2 * BLOCK, 5);
    let mut recording = Recording::new(&Caps::cpu());
    let mut external = |name: &str, shape: &[usize]| recording.external(name, Element::F32, shape);
    let (master, gradient) = (external("master", &[elements])?, external("gradient", &[elements])?);
    let (m, v) = (external("m", &[elements])?, external("v", &[elements])?);
    let schedule = external("schedule", &[Schedule::LEN])?;
    let decay = recording.external("decay", Element::U32, &[2])?;
    let norm = grad_norm::record(&mut recording, gradient)?;
    let config = AdamW { beta1: 0.875, beta2: 0.9375, epsilon: 1e-8 };
    adamw::record(
        &mut recording,
        &config,
        &AdamWTensors { master, gradient, m, v, weights: None, schedule, norm, decay },
    )?;
    let mut executor = CpuExecutor::<f64>::new(Arc::new(recording));
    executor.write_u32(decay, &[1, 0])?;
    let mut weights: Vec<f64> = data::tensor(22, 0, &[elements]).into_iter().map(f64::from).collect();
    executor.set(master, &weights)?;
    let (mut first, mut second) = (vec![0.0; elements], vec![0.0; elements]);
    for step in 1..=steps {
        // The third step's gradient is short enough not to be clipped.
        let size = if step == 3 { 0.01 } else { 4.0 };
        let scaled: Vec<f64> =
            data::tensor(23, step, &[elements]).into_iter().map(|g| f64::from(g) * size * 1024.0).collect();
        let (rate, weight_decay) = (0.125 / step as f64, 0.25);
        let corrections = [1.0 - 0.875f64.powi(step as i32), 1.0 - 0.9375f64.powi(step as i32)];
        executor.set(gradient, &scaled)?;
        let encoded = [rate, corrections[0], corrections[1], weight_decay, 1.0, 1.0 / 1024.0, 0.0, 0.0];
        executor.set(schedule, &encoded)?;
        executor.run()?;

        let length = scaled.iter().map(|g| (g / 1024.0).powi(2)).sum::<f64>().sqrt();
        for i in 0..elements {
            let g = scaled[i] / 1024.0 * (1.0 / (length + f64::from(1e-6f32))).min(1.0);
            if i < BLOCK {
                weights[i] *= 1.0 - rate * weight_decay;
            }
            first[i] = 0.875 * first[i] + 0.125 * g;
            second[i] = 0.9375 * second[i] + 0.0625 * g * g;
            let root = (second[i] / corrections[1]).sqrt();
            weights[i] -= rate * (first[i] / corrections[0]) / (root + f64::from(1e-8f32));
        }
        for (got, expected) in executor.get(master)?.iter().zip(&weights) {
            approx::assert_abs_diff_eq!(got, expected, epsilon = 1e-12);
        }
    }
    Ok(())
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() -> Result<()> {
    for norm in [f32::NAN, f32::INFINITY] {
        let mut recording = Recording::new(&Caps::cpu());
        let mut inputs = Inputs::new(&mut recording, 24);
        let tensors = record_adamw(&mut inputs, Some(Element::F16), 1.0, norm)?;
        let probe = inputs.probe;
        let mut executor = CpuExecutor::<f32>::new(Arc::new(recording));
        for (tensor, values) in &probe.inputs {
            match values {
                Values::Float(values) => executor.write(*tensor, values)?,
                Values::Index(values) => executor.write_u32(*tensor, values)?,
            }
        }
        let before = executor.read(tensors.master)?;
        executor.run()?;
        assert_eq!(executor.read(tensors.master)?, before);
        let rounded: Vec<f32> = before.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
        assert_eq!(executor.read(tensors.weights.unwrap())?, rounded);
    }
    Ok(())
}

#[test]
fn the_schedule_is_encoded_in_the_order_of_its_fields() {
    let schedule = Schedule {
        learning_rate: 1.0,
        correction1: 2.0,
        correction2: 3.0,
        weight_decay: 4.0,
        clip_norm: 5.0,
        inverse_loss_scale: 6.0,
    };
    assert_eq!(schedule.encode(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0]);
}

#[test]
fn sizes_that_are_not_allowed_are_named() {
    let named = |result: Result<()>, parameter: &str| match result {
        Err(Error::Parameter { parameter: named, .. }) => assert_eq!(named, parameter),
        Err(Error::Tensor { problem, .. }) => assert!(problem.contains(parameter), "{problem}"),
        other => panic!("{parameter}: {other:?}"),
    };
    let element = Element::F32;
    let mut recording = Recording::new(&Caps::cpu());
    let recording = &mut recording;
    let x = recording.external("x", element, &[24]).unwrap();
    let ids = recording.external("ids", Element::U32, &[3]).unwrap();

    let shape = EmbeddingShape { rows: 3, vocab: 2, width: 12, element };
    named(embedding::record_forward(recording, &shape, ids, x).map(drop), "width");
    named(embedding::record_forward(recording, &EmbeddingShape { vocab: 0, ..shape }, ids, x).map(drop), "vocab");
    named(embedding::record_forward(recording, &EmbeddingShape { width: 8, ..shape }, ids, x).map(drop), "weight");
    named(rms_norm::record_forward(recording, &RmsNormShape { rows: 0, width: 8, element }, x, x).map(drop), "rows");
    let shape = LinearShape { rows: 3, inputs: 8, outputs: 9, element };
    named(linear::record_forward(recording, &shape, x, x, None).map(drop), "outputs");
    named(linear::record_forward(recording, &LinearShape { outputs: 8, ..shape }, x, x, None).map(drop), "weight");
    let shape = QkvShape { rows: 3, tokens: 2, width: 8, heads: 1, kv_heads: 1, head_dim: 8, element };
    named(qkv::record_forward(recording, &shape, x, x, x).map(drop), "rows");
    let odd = QkvShape { head_dim: 4, tokens: 3, ..shape };
    named(qkv::record_forward(recording, &odd, x, x, x).map(drop), "head_dim");
    let shape = SwigluShape { rows: 3, width: 8, hidden: 8, element: Element::U32 };
    named(swiglu::record_forward(recording, &shape, x, x).map(drop), "element");
    let shape = CrossEntropyShape { rows: 3, vocab: 8, element };
    named(cross_entropy::record_forward(recording, &shape, x, x).map(drop), "targets");
    let odd = recording.external("odd", element, &[9]).unwrap();
    named(grad_norm::record(recording, odd).map(drop), "gradient");
    let tensors = AdamWTensors { master: x, gradient: x, m: x, v: x, weights: None, schedule: x, norm: x, decay: ids };
    named(adamw::record(recording, &AdamW::default(), &tensors), "master");
    assert!(recording.is_empty());
}
