//! The operators of a training step around attention, each as a pass of its own, at the sizes of the step's model.

use std::ops::Range;

use lighthouse_attention::model::{ModelConfig, VOCABULARY};
use lighthouse_attention::nn::adamw::{self, AdamW, AdamWTensors, Schedule};
use lighthouse_attention::nn::cross_entropy::{self, CrossEntropyShape};
use lighthouse_attention::nn::embedding::{self, EmbeddingShape};
use lighthouse_attention::nn::grad_norm;
use lighthouse_attention::nn::linear::{self, LinearShape};
use lighthouse_attention::nn::qkv::{self, QkvShape};
use lighthouse_attention::nn::rms_norm::{self, RmsNormShape};
use lighthouse_attention::nn::swiglu::{self, SwigluShape};
use lighthouse_attention::{Element, Recording, Tensor};

use crate::Result;
use crate::bench::{Bench, Cost};
use crate::device::Kind;
use crate::groups::step;
use crate::report::Row;
use crate::stats::Timing;

pub fn run(bench: &mut Bench) -> Result<()> {
    let kind = bench.device.kind();
    let model = step::model(kind);
    for tokens in bench.tokens_or(&[model.tokens]) {
        measure(bench, &ModelConfig { tokens, ..model.clone() })?;
    }
    Ok(())
}

/// One row.
struct Operator {
    row: Row,
    commands: Range<usize>,
    written: Tensor,
}

/// The operators recorded so far. All that they read is external, so that each can run by itself, again and again.
struct Operators<'a> {
    model: &'a ModelConfig,
    recording: Recording,
    /// Tensors for random numbers.
    random: Vec<Tensor>,
    operators: Vec<Operator>,
    /// Activations `[T, width]` and their gradient, and the bytes of a text, u32 `[T]`.
    x: Tensor,
    d_x: Tensor,
    ids: Tensor,
}

/// A product of so many rows, columns and terms, and what its epilogue moves besides, in elements.
fn product(element: Element, [m, n, k]: [usize; 3], epilogue: usize) -> Cost {
    let bytes = (m * k + n * k + m * n + epilogue) as u64 * element.bytes();
    Cost { bytes, flops: 2 * m as u64 * n as u64 * k as u64 }
}

fn sizes([m, n, k]: [usize; 3]) -> [(&'static str, usize); 3] {
    [("m", m), ("n", n), ("k", k)]
}

fn activations(rows: usize, width: usize) -> [(&'static str, usize); 2] {
    [("rows", rows), ("width", width)]
}

impl<'a> Operators<'a> {
    fn new(bench: &Bench, model: &'a ModelConfig) -> Result<Self> {
        let mut recording = Recording::new(&bench.device.caps());
        let shape = [model.batch * model.tokens, model.width];
        let [x, d_x] =
            [recording.external("x", model.element, &shape)?, recording.external("d_x", model.element, &shape)?];
        let ids = recording.external("ids", Element::U32, &shape[..1])?;
        Ok(Self { model, recording, random: vec![x, d_x], operators: Vec::new(), x, d_x, ids })
    }

    fn rows(&self) -> usize {
        self.model.batch * self.model.tokens
    }

    /// An input in the model's storage type.
    fn input(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.input_of(name, self.model.element, shape)
    }

    fn input_of(&mut self, name: &str, element: Element, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.recording.external(name, element, shape)?;
        self.random.push(tensor);
        Ok(tensor)
    }

    /// What an operator writes into, or a host sets, in f32.
    fn external(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        Ok(self.recording.external(name, Element::F32, shape)?)
    }

    /// Bytes of so many elements and so many 32-bit words.
    fn moved(&self, elements: usize, words: usize) -> Cost {
        Cost { bytes: elements as u64 * self.model.element.bytes() + 4 * words as u64, flops: 0 }
    }

    fn add(
        &mut self,
        name: &str,
        shape: &[(&str, usize)],
        cost: Cost,
        record: impl FnOnce(&mut Recording) -> lighthouse_attention::Result<Tensor>,
    ) -> Result<()> {
        let begin = self.recording.len();
        let written = record(&mut self.recording)?;
        self.recording.keep(written)?;
        let mut row = Row::new(name, "", self.model.element, shape);
        (row.bytes, row.flops) = (Some(cost.bytes), (cost.flops > 0).then_some(cost.flops));
        self.operators.push(Operator { row, commands: begin..self.recording.len(), written });
        Ok(())
    }

    /// The ends of the model.
    fn embedding_and_loss(&mut self) -> Result<()> {
        let (rows, width, element, ids, d_x) = (self.rows(), self.model.width, self.model.element, self.ids, self.d_x);
        let table = self.input("table", &[VOCABULARY, width])?;
        let d_table = self.external("d_table", &[VOCABULARY, width])?;
        let shape = EmbeddingShape { rows, vocab: VOCABULARY, width, element };
        let cost = self.moved(rows * width, rows);
        self.add("embedding", &activations(rows, width), cost, |to| embedding::record_forward(to, &shape, ids, table))?;
        self.add("embedding_backward", &activations(rows, width), cost, |to| {
            embedding::record_backward(to, &shape, ids, d_x, d_table).map(|()| d_table)
        })?;
        let logits = self.input("logits", &[rows, VOCABULARY])?;
        let shape = CrossEntropyShape { rows, vocab: VOCABULARY, element };
        let cost = self.moved(2 * rows * VOCABULARY, rows);
        self.add("cross_entropy_backward", &activations(rows, VOCABULARY), cost, |to| {
            cross_entropy::record_forward_backward(to, &shape, logits, ids, 1.0).map(|out| out.d_logits)
        })
    }

    fn norms(&mut self) -> Result<()> {
        let (rows, width, element, x, d_x) = (self.rows(), self.model.width, self.model.element, self.x, self.d_x);
        let weight = self.input("norm", &[width])?;
        let inverse_rms = self.input_of("inverse_rms", Element::F32, &[rows])?;
        let d_weight = self.external("d_norm", &[width])?;
        let d_residual = self.input("d_residual", &[rows, width])?;
        let (shape, saved) = (RmsNormShape { rows, width, element }, [x, weight, inverse_rms]);
        let size = activations(rows, width);
        self.add("rms_norm", &size, self.moved(2 * rows * width, rows), |to| {
            rms_norm::record_forward(to, &shape, x, weight).map(|out| out.y)
        })?;
        self.add("rms_norm_backward", &size, self.moved(3 * rows * width, rows), |to| {
            rms_norm::record_backward(to, &shape, saved, d_x, None, d_weight)
        })?;
        self.add("rms_norm_backward_residual", &size, self.moved(4 * rows * width, rows), |to| {
            rms_norm::record_backward(to, &shape, saved, d_x, Some(d_residual), d_weight)
        })
    }

    /// q, k and v with rotary embedding, the way back through them, and attention's output.
    fn linear_maps(&mut self) -> Result<()> {
        let &ModelConfig { tokens, width, heads, kv_heads, element, .. } = self.model;
        let (rows, head_dim, x) = (self.rows(), self.model.head_dim(), self.x);
        let outputs = (heads + 2 * kv_heads) * head_dim;
        let qkv = QkvShape { rows, tokens, width, heads, kv_heads, head_dim, element };
        let angles = self.input_of("angles", Element::F32, &[tokens, head_dim])?;
        let wqkv = self.input("wqkv", &[outputs, width])?;
        let size = [rows, outputs, width];
        self.add("qkv", &sizes(size), product(element, size, 0), |to| {
            qkv::record_forward(to, &qkv, angles, x, wqkv).map(|[q, ..]| q)
        })?;
        let d_q = self.input("d_q", &[rows, heads, head_dim])?;
        let d_k = self.input("d_k", &[rows, kv_heads, head_dim])?;
        let d_v = self.input("d_v", &[rows, kv_heads, head_dim])?;
        self.add(
            "qkv_backward",
            &activations(rows, outputs),
            self.moved(2 * rows * outputs, tokens * head_dim),
            |to| qkv::record_backward(to, &qkv, angles, [d_q, d_k, d_v]),
        )?;
        let d_qkv = self.input("d_qkv", &[rows, outputs])?;
        let d_wqkv = self.external("d_wqkv", &[outputs, width])?;
        let shape = LinearShape { rows, inputs: width, outputs, element };
        let size = [rows, width, outputs];
        self.add("linear_backward_input", &sizes(size), product(element, size, 0), |to| {
            linear::record_backward_input(to, &shape, d_qkv, wqkv)
        })?;
        let size = [outputs, width, rows];
        // It is in f32.
        let wider = outputs * width * (4 / element.bytes() as usize - 1);
        self.add("linear_backward_weight", &sizes(size), product(element, size, wider), |to| {
            linear::record_backward_weight(to, &shape, d_qkv, x, d_wqkv).map(|()| d_wqkv)
        })?;
        let o = self.input("o", &[rows, heads * head_dim])?;
        let wo = self.input("wo", &[width, heads * head_dim])?;
        let residual = self.input("residual", &[rows, width])?;
        let shape = LinearShape { rows, inputs: heads * head_dim, outputs: width, element };
        let size = [rows, width, heads * head_dim];
        self.add("linear", &sizes(size), product(element, size, 0), |to| {
            linear::record_forward(to, &shape, o, wo, None)
        })?;
        self.add("linear_residual", &sizes(size), product(element, size, rows * width), |to| {
            linear::record_forward(to, &shape, o, wo, Some(residual))
        })
    }

    fn swiglu(&mut self) -> Result<()> {
        let &ModelConfig { width, hidden, element, .. } = self.model;
        let (rows, x, d_x) = (self.rows(), self.x, self.d_x);
        let shape = SwigluShape { rows, width, hidden, element };
        let weight = self.input("gate_up_weight", &[2 * hidden, width])?;
        let size = [rows, 2 * hidden, width];
        self.add("swiglu", &sizes(size), product(element, size, rows * hidden), |to| {
            swiglu::record_forward(to, &shape, x, weight).map(|out| out.y)
        })?;
        let gate_up = self.input("gate_up", &[rows, 2 * hidden])?;
        let down = self.input("down", &[width, hidden])?;
        let size = [rows, hidden, width];
        // Both halves read and their gradients written; y takes the place of the product's result.
        self.add("swiglu_backward", &sizes(size), product(element, size, 4 * rows * hidden), |to| {
            swiglu::record_backward(to, &shape, gate_up, d_x, down).map(|out| out.d_gate_up)
        })
    }

    /// The optimizer's part, over so many parameters.
    fn optimizer(&mut self, parameters: usize) -> Result<AdamWTensors> {
        let flat = [("parameters", parameters)];
        let gradient = self.input_of("gradient", Element::F32, &[parameters])?;
        self.add("grad_norm", &flat, self.moved(0, parameters), |to| grad_norm::record(to, gradient))?;
        let weights = match self.model.element {
            Element::F16 => Some(self.recording.external("weights", Element::F16, &[parameters])?),
            _ => None,
        };
        let tensors = AdamWTensors {
            master: self.external("master", &[parameters])?,
            gradient,
            m: self.external("m", &[parameters])?,
            v: self.external("v", &[parameters])?,
            weights,
            schedule: self.external("schedule", &[Schedule::LEN])?,
            norm: self.external("norm", &[1])?,
            decay: self.recording.external("decay", Element::U32, &[parameters / adamw::BLOCK])?,
        };
        let copied = if weights.is_some() { parameters } else { 0 };
        self.add("adamw", &flat, self.moved(copied, 7 * parameters), |to| {
            adamw::record(to, &AdamW::default(), &tensors).map(|()| tensors.master)
        })?;
        Ok(tensors)
    }
}

fn record<'a>(bench: &Bench, model: &'a ModelConfig, parameters: usize) -> Result<(Operators<'a>, AdamWTensors)> {
    let mut all = Operators::new(bench, model)?;
    all.embedding_and_loss()?;
    all.norms()?;
    all.linear_maps()?;
    all.swiglu()?;
    let tensors = all.optimizer(parameters)?;
    Ok((all, tensors))
}

fn measure(bench: &mut Bench, model: &ModelConfig) -> Result<()> {
    let parameters = match bench.device.kind() {
        Kind::Discrete => 1 << 26,
        Kind::Small => 1 << 24,
        Kind::Software => 1 << 20,
    };
    let (all, tensors) = match record(bench, model, parameters) {
        Ok(recorded) => recorded,
        Err(error) => {
            let size = [("tokens", model.tokens), ("heads", model.heads), ("head_dim", model.head_dim())];
            bench.skip(&Row::new("operators", "", model.element, &size), &error.to_string());
            return Ok(());
        }
    };
    let (rows, ids) = (all.rows(), all.ids);
    let Operators { recording, random, operators, .. } = all;
    let mut runner = match bench.device.runner(recording, &random) {
        Ok(runner) => runner,
        Err(error) => {
            operators.iter().for_each(|operator| bench.skip(&operator.row, &error.to_string()));
            return Ok(());
        }
    };
    // Bytes of a text that has them all.
    let text: Vec<u32> =
        (0..rows as u64).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u32 % VOCABULARY as u32).collect();
    let (correction1, correction2) = AdamW::default().corrections(1);
    let schedule = Schedule {
        learning_rate: 1e-3,
        correction1,
        correction2,
        weight_decay: 0.1,
        clip_norm: f32::MAX,
        inverse_loss_scale: 1.0,
    };
    let executor = runner.executor();
    executor.write_u32(ids, &text)?;
    executor.write_u32(tensors.decay, &vec![1; parameters / adamw::BLOCK])?;
    executor.write(tensors.schedule, &schedule.encode())?;
    executor.write(tensors.norm, &[1.0])?;
    for Operator { mut row, commands, written } in operators {
        // One kernel moves while it multiplies.
        let of_bytes = bench.floor_ms(model.element, row.bytes, None);
        let of_flops = row.flops.and_then(|flops| bench.floor_ms(model.element, None, Some(flops)));
        row.floor_ms = match row.flops {
            Some(_) => of_flops.zip(of_bytes).map(|(flops, bytes)| flops.max(bytes)),
            None => of_bytes,
        };
        let clock = bench.clock;
        let samples = bench.budget.collect(|| runner.time(commands.clone(), clock))?;
        runner.expect_written(written)?;
        bench.add(row.timed(Timing::of(&samples).ok_or("no runs")?, clock));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_counted_with_what_they_move() {
        // Two factors, the result, and a residual.
        let cost = product(Element::F16, [4, 3, 5], 12);
        assert_eq!((cost.bytes, cost.flops), (2 * (20 + 15 + 12 + 12), 120));
    }
}
