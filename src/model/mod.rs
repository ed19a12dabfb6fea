//! A Llama-style byte-level language model, recorded once and replayed: forward, backward and optimizer.
//!
//! Pre-norm blocks of attention and SwiGLU with residuals, rotary positions, an untied head. Some layers attend densely
//! (the paper keeps the first two and last two dense), the rest through Lighthouse Attention.

mod parameters;

pub use parameters::{ALIGNMENT, Init, Parameter, ParameterTable};

use std::ops::Range;

use crate::config::{LighthouseConfig, Shape};
use crate::error::{Error, Result};
use crate::layer::{Forward, Gradients, LighthouseAttention};
use crate::nn::adamw::{self, AdamW, AdamWTensors};
use crate::nn::cross_entropy::{self, CrossEntropyShape};
use crate::nn::embedding::{self, EmbeddingShape};
use crate::nn::grad_norm;
use crate::nn::linear::{self, LinearShape};
use crate::nn::qkv::{self, QkvShape};
use crate::nn::rms_norm::{self, RmsNorm, RmsNormShape};
use crate::nn::swiglu::{self, SwigluShape};
use crate::recording::{Executor, Recording};
use crate::tensor::{Element, Tensor};

/// Bytes are the vocabulary.
pub const VOCABULARY: usize = 256;

/// The model's sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// B, sequences of a step.
    pub batch: usize,
    /// N, tokens of a sequence.
    pub tokens: usize,
    /// Columns of the residual stream, a multiple of 8 and of `heads`.
    pub width: usize,
    /// Blocks.
    pub layers: usize,
    /// H, query heads; head_dim is `width / heads`.
    pub heads: usize,
    /// KV, key and value heads.
    pub kv_heads: usize,
    /// Columns of the feed-forward, a multiple of 8.
    pub hidden: usize,
    /// Storage of activations, their gradients and the working copy of the weights. Master weights, weight gradients and
    /// moments are f32.
    pub element: Element,
    /// The pyramid of the layers that are not dense.
    pub attention: LighthouseConfig,
    /// Layers that attend densely.
    pub dense_layers: Vec<usize>,
}

impl ModelConfig {
    /// Columns of a head.
    pub fn head_dim(&self) -> usize {
        self.width / self.heads.max(1)
    }

    /// The gradient is multiplied by this on its way back: the mean over all rows makes it too small for f16.
    pub fn loss_scale(&self) -> f32 {
        match self.element {
            // A power of two near the number of rows; 1/16 of it, so that sums over many columns stay in range.
            Element::F16 => (self.rows().next_power_of_two() as f32 / 16.0).max(1.0),
            _ => 1.0,
        }
    }

    /// T = B * N.
    pub fn rows(&self) -> usize {
        self.batch * self.tokens
    }

    fn shape(&self) -> Shape {
        Shape {
            batch: self.batch,
            tokens: self.tokens,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim(),
            element: self.element,
        }
    }

    /// The attention of a layer; `dense` makes all layers dense: the resume stage and evaluation.
    fn attention_of(&self, layer: usize, dense: bool) -> Result<LighthouseAttention> {
        let levels = if dense || self.dense_layers.contains(&layer) { 1 } else { self.attention.levels };
        LighthouseAttention::new(LighthouseConfig { levels, ..self.attention }, self.shape())
    }

    /// Checks all sizes.
    ///
    /// # Errors
    /// [`Error::Parameter`] naming the parameter, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        for (parameter, value) in [("layers", self.layers), ("heads", self.heads)] {
            if value == 0 {
                return Err(Error::parameter(parameter, value, "at least 1"));
            }
        }
        if self.width == 0 || !self.width.is_multiple_of(self.heads) {
            return Err(Error::parameter(
                "width",
                self.width,
                format!("a positive multiple of heads = {}", self.heads),
            ));
        }
        if self.hidden == 0 || !self.hidden.is_multiple_of(8) {
            return Err(Error::parameter("hidden", self.hidden, "a positive multiple of 8"));
        }
        if let Some(layer) = self.dense_layers.iter().find(|&&layer| layer >= self.layers) {
            return Err(Error::parameter("dense_layers", layer, format!("below layers = {}", self.layers)));
        }
        (0..self.layers).try_for_each(|layer| self.attention_of(layer, false).map(drop))
    }

    fn norm(&self) -> RmsNormShape {
        RmsNormShape { rows: self.rows(), width: self.width, element: self.element }
    }

    fn linear(&self, inputs: usize, outputs: usize) -> LinearShape {
        LinearShape { rows: self.rows(), inputs, outputs, element: self.element }
    }

    fn qkv(&self) -> QkvShape {
        let Self { tokens, width, heads, kv_heads, element, .. } = *self;
        QkvShape { rows: self.rows(), tokens, width, heads, kv_heads, head_dim: self.head_dim(), element }
    }

    fn swiglu(&self) -> SwigluShape {
        SwigluShape { rows: self.rows(), width: self.width, hidden: self.hidden, element: self.element }
    }

    fn embedding(&self) -> EmbeddingShape {
        EmbeddingShape { rows: self.rows(), vocab: VOCABULARY, width: self.width, element: self.element }
    }

    fn cross_entropy(&self) -> CrossEntropyShape {
        CrossEntropyShape { rows: self.rows(), vocab: VOCABULARY, element: self.element }
    }
}

/// Numbers of a block's parameters in the table.
#[derive(Clone, Copy, Debug)]
struct Block {
    attention_norm: usize,
    wqkv: usize,
    wo: usize,
    feed_forward_norm: usize,
    gate_up: usize,
    down: usize,
}

/// A model: its sizes and its table of parameters.
#[derive(Clone, Debug)]
pub struct Model {
    config: ModelConfig,
    table: ParameterTable,
    embedding: usize,
    blocks: Vec<Block>,
    final_norm: usize,
    head: usize,
}

/// The tensors of a recorded model that the host writes and reads.
#[derive(Clone, Copy, Debug)]
pub struct ModelTensors {
    /// Token ids, u32 `[B, N]`.
    pub ids: Tensor,
    /// The ids that follow them, u32 `[B, N]`.
    pub targets: Tensor,
    /// [`adamw::Schedule::encode`], f32.
    pub schedule: Tensor,
    /// Parameters in f32, flat.
    pub master: Tensor,
    /// Gradients in f32, flat, times the loss scale.
    pub gradient: Tensor,
    angles: Tensor,
    decay: Tensor,
    m: Tensor,
    v: Tensor,
    /// The working copy in half precision, if there is one.
    weights: Option<Tensor>,
}

/// A part of the recording that runs by itself, and the mean loss that it gives.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its commands.
    pub commands: Range<usize>,
    /// Nats per byte, f32 `[1]`.
    pub loss: Tensor,
}

/// A recorded model. All segments share parameters and scratch memory.
#[derive(Clone, Debug)]
pub struct RecordedModel {
    /// What the host writes and reads.
    pub tensors: ModelTensors,
    /// A step with the configured attention.
    pub train: Segment,
    /// A step with dense attention in all layers: the resume stage.
    pub resume: Segment,
    /// The loss alone, with dense attention in all layers.
    pub evaluate: Segment,
}

/// What a block's backward needs of its forward. The rest is computed again where that costs little: at the paper's sizes,
/// of a step's time, the norms' results 0.4 %, the outputs of Lighthouse Attention 0.1 %, and q, k and v of a step with
/// dense attention in all layers 0.9 %. The activation's results come with its gradient.
struct SavedBlock {
    x: Tensor,
    attention: Forward,
    middle: Tensor,
    gate_up: Tensor,
}

/// Views of every parameter and of its gradient.
struct Views {
    weights: Vec<Tensor>,
    gradients: Vec<Tensor>,
}

impl Views {
    fn weight(&self, parameter: usize) -> Result<Tensor> {
        self.weights.get(parameter).copied().ok_or_else(|| Error::tensor(format!("#{parameter}"), "is no parameter"))
    }

    fn gradient(&self, parameter: usize) -> Result<Tensor> {
        self.gradients.get(parameter).copied().ok_or_else(|| Error::tensor(format!("#{parameter}"), "is no parameter"))
    }
}

impl Model {
    /// Lays out the parameters.
    ///
    /// # Errors
    /// As [`ModelConfig::check`].
    pub fn new(config: ModelConfig) -> Result<Self> {
        config.check()?;
        let ModelConfig { width, layers, hidden, .. } = config;
        let qkv_width = config.qkv().outputs();
        let mut table = ParameterTable::default();
        let by_inputs = |inputs: usize| Init::Normal((inputs as f64).sqrt().recip());
        // Outputs into the residual stream begin smaller, so that its variance does not grow with depth.
        let into_residual = |inputs: usize| Init::Normal(((inputs * 2 * layers) as f64).sqrt().recip());
        let embedding = table.add("embedding", &[VOCABULARY, width], Init::Normal(1.0));
        let blocks = (0..layers)
            .map(|l| {
                let mut add = |name: &str, shape: &[usize], init| table.add(format!("layers.{l}.{name}"), shape, init);
                Block {
                    attention_norm: add("attention_norm", &[width], Init::Ones),
                    wqkv: add("attention.wqkv", &[qkv_width, width], by_inputs(width)),
                    wo: add("attention.wo", &[width, width], into_residual(width)),
                    feed_forward_norm: add("feed_forward_norm", &[width], Init::Ones),
                    gate_up: add("feed_forward.gate_up", &[2 * hidden, width], by_inputs(width)),
                    down: add("feed_forward.down", &[width, hidden], into_residual(hidden)),
                }
            })
            .collect();
        let final_norm = table.add("final_norm", &[width], Init::Ones);
        // Small, so that the first loss is that of equal probabilities.
        let head = table.add("head", &[VOCABULARY, width], Init::Normal(0.02));
        Ok(Self { config, table, embedding, blocks, final_norm, head })
    }

    /// Its sizes.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Its parameters.
    pub fn table(&self) -> &ParameterTable {
        &self.table
    }

    /// Records everything that training and evaluation need.
    ///
    /// # Errors
    /// A device that cannot hold what is needed.
    pub fn record(&self, recording: &mut Recording, adamw: &AdamW) -> Result<RecordedModel> {
        let config = &self.config;
        let rows = [config.batch, config.tokens];
        let tensors = ModelTensors {
            ids: recording.external("ids", Element::U32, &rows)?,
            targets: recording.external("targets", Element::U32, &rows)?,
            schedule: recording.external("schedule", Element::F32, &[adamw::Schedule::LEN])?,
            master: self.table.flat(recording, "master", Element::F32)?,
            gradient: self.table.flat(recording, "gradient", Element::F32)?,
            angles: recording.external("angles", Element::F32, &[config.tokens, config.head_dim()])?,
            decay: recording.external("decay", Element::U32, &[self.table.len() / adamw::BLOCK])?,
            m: self.table.flat(recording, "m", Element::F32)?,
            v: self.table.flat(recording, "v", Element::F32)?,
            weights: match config.element {
                Element::F32 => None,
                element => Some(self.table.flat(recording, "weights", element)?),
            },
        };
        let views = Views {
            weights: self.table.views(recording, "", tensors.weights.unwrap_or(tensors.master))?,
            gradients: self.table.views(recording, "d.", tensors.gradient)?,
        };
        Ok(RecordedModel {
            train: self.record_step(recording, &tensors, &views, adamw, false)?,
            resume: self.record_step(recording, &tensors, &views, adamw, true)?,
            evaluate: self.record_evaluation(recording, &tensors, &views)?,
            tensors,
        })
    }

    /// Writes what does not change from step to step, and the initial parameters.
    ///
    /// # Errors
    /// As the executor's.
    pub fn initialize(&self, executor: &mut dyn Executor, tensors: &ModelTensors, seed: u64) -> Result<()> {
        let config = &self.config;
        executor.write(tensors.angles, &qkv::angles(config.tokens, config.head_dim(), qkv::THETA))?;
        let mut decay = vec![0; self.table.len() / adamw::BLOCK];
        for parameter in self.table.parameters().iter().filter(|parameter| parameter.decays()) {
            let blocks = parameter.start / adamw::BLOCK..(parameter.start + parameter.len()).div_ceil(adamw::BLOCK);
            decay.get_mut(blocks).unwrap_or_default().fill(1);
        }
        executor.write_u32(tensors.decay, &decay)?;
        // The gradient too: nothing writes the gaps between its parameters, and its norm counts them.
        for tensor in [tensors.m, tensors.v, tensors.gradient] {
            executor.clear(tensor)?;
        }
        let initial = self.table.initial(seed);
        executor.write(tensors.master, &initial)?;
        tensors.weights.map_or(Ok(()), |weights| executor.write(weights, &initial))
    }

    fn record_step(
        &self,
        recording: &mut Recording,
        tensors: &ModelTensors,
        views: &Views,
        adamw: &AdamW,
        dense: bool,
    ) -> Result<Segment> {
        let begin = recording.len();
        let config = &self.config;
        // Forward.
        let mut x =
            embedding::record_forward(recording, &config.embedding(), tensors.ids, views.weight(self.embedding)?)?;
        let mut saved = Vec::with_capacity(self.blocks.len());
        for (layer, block) in self.blocks.iter().enumerate() {
            let attention = config.attention_of(layer, dense)?;
            let (out, block) = self.record_block(recording, tensors, views, block, &attention, x)?;
            saved.push(block);
            x = out;
        }
        let norm = rms_norm::record_forward(recording, &config.norm(), x, views.weight(self.final_norm)?)?;
        let head = config.linear(config.width, VOCABULARY);
        let logits = linear::record_forward(recording, &head, norm.y, views.weight(self.head)?, None)?;
        let (shape, scale) = (config.cross_entropy(), config.loss_scale());
        let loss = cross_entropy::record_forward_backward(recording, &shape, logits, tensors.targets, scale)?;
        recording.keep(loss.loss)?;

        // Backward.
        let d_norm = linear::record_backward_input(recording, &head, loss.d_logits, views.weight(self.head)?)?;
        linear::record_backward_weight(recording, &head, loss.d_logits, norm.y, views.gradient(self.head)?)?;
        let mut d_x = rms_norm::record_backward(
            recording,
            &config.norm(),
            [x, views.weight(self.final_norm)?, norm.inverse_rms],
            d_norm,
            None,
            views.gradient(self.final_norm)?,
        )?;
        for ((layer, block), saved) in self.blocks.iter().enumerate().zip(&saved).rev() {
            let attention = config.attention_of(layer, dense)?;
            d_x = self.record_block_backward(recording, tensors, views, block, &attention, saved, d_x, dense)?;
        }
        embedding::record_backward(recording, &config.embedding(), tensors.ids, d_x, views.gradient(self.embedding)?)?;

        // Optimizer.
        let norm = grad_norm::record(recording, tensors.gradient)?;
        let &ModelTensors { master, gradient, m, v, weights, schedule, decay, .. } = tensors;
        adamw::record(recording, adamw, &AdamWTensors { master, gradient, m, v, weights, schedule, norm, decay })?;
        Ok(Segment { commands: begin..recording.len(), loss: loss.loss })
    }

    fn record_evaluation(&self, recording: &mut Recording, tensors: &ModelTensors, views: &Views) -> Result<Segment> {
        let begin = recording.len();
        let config = &self.config;
        let mut x =
            embedding::record_forward(recording, &config.embedding(), tensors.ids, views.weight(self.embedding)?)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let attention = config.attention_of(layer, true)?;
            (x, _) = self.record_block(recording, tensors, views, block, &attention, x)?;
        }
        let norm = rms_norm::record_forward(recording, &config.norm(), x, views.weight(self.final_norm)?)?;
        let head = config.linear(config.width, VOCABULARY);
        let logits = linear::record_forward(recording, &head, norm.y, views.weight(self.head)?, None)?;
        let loss = cross_entropy::record_forward(recording, &config.cross_entropy(), logits, tensors.targets)?;
        recording.keep(loss)?;
        Ok(Segment { commands: begin..recording.len(), loss })
    }

    /// x + attention(norm(x)), then that + swiglu(norm(that)).
    fn record_block(
        &self,
        recording: &mut Recording,
        tensors: &ModelTensors,
        views: &Views,
        block: &Block,
        attention: &LighthouseAttention,
        x: Tensor,
    ) -> Result<(Tensor, SavedBlock)> {
        let config = &self.config;
        let ModelConfig { width, hidden, .. } = *config;

        let norm = views.weight(block.attention_norm)?;
        let attention_norm = rms_norm::record_forward(recording, &config.norm(), x, norm)?;
        let wqkv = views.weight(block.wqkv)?;
        let qkv = qkv::record_forward(recording, &config.qkv(), tensors.angles, attention_norm.y, wqkv)?;
        let attention = attention.record_forward(recording, qkv)?;
        let (shape, wo) = (config.linear(width, width), views.weight(block.wo)?);
        let middle = linear::record_forward(recording, &shape, attention.o, wo, Some(x))?;

        let norm = views.weight(block.feed_forward_norm)?;
        let feed_forward_norm = rms_norm::record_forward(recording, &config.norm(), middle, norm)?;
        let gate_up = views.weight(block.gate_up)?;
        let swiglu = swiglu::record_forward(recording, &config.swiglu(), feed_forward_norm.y, gate_up)?;
        let (shape, down) = (config.linear(hidden, width), views.weight(block.down)?);
        let out = linear::record_forward(recording, &shape, swiglu.y, down, Some(middle))?;
        Ok((out, SavedBlock { x, attention, middle, gate_up: swiglu.gate_up }))
    }

    /// The gradient of a block's input from that of its output; gradients of its parameters go into their views. Where
    /// all layers are dense, q, k and v are computed again.
    #[allow(
        clippy::too_many_arguments,
        reason = "the forward's arguments, what it saved, the gradient, and whether all layers are dense"
    )]
    fn record_block_backward(
        &self,
        recording: &mut Recording,
        tensors: &ModelTensors,
        views: &Views,
        block: &Block,
        attention: &LighthouseAttention,
        saved: &SavedBlock,
        d_out: Tensor,
        dense: bool,
    ) -> Result<Tensor> {
        let config = &self.config;
        let ModelConfig { width, hidden, .. } = *config;

        // d_x = d_y W, and dW = d_y^T x.
        let linear = |recording: &mut Recording, outputs, inputs, parameter, d_y, x| {
            let shape = config.linear(inputs, outputs);
            linear::record_backward_weight(recording, &shape, d_y, x, views.gradient(parameter)?)?;
            linear::record_backward_input(recording, &shape, d_y, views.weight(parameter)?)
        };
        let norm = |recording: &mut Recording, parameter, x, norm: RmsNorm, d_y, d_residual| {
            let saved = [x, views.weight(parameter)?, norm.inverse_rms];
            let d_weight = views.gradient(parameter)?;
            rms_norm::record_backward(recording, &config.norm(), saved, d_y, Some(d_residual), d_weight)
        };

        let down = views.weight(block.down)?;
        let swiglu = swiglu::record_backward(recording, &config.swiglu(), saved.gate_up, d_out, down)?;
        let (shape, d_down) = (config.linear(hidden, width), views.gradient(block.down)?);
        linear::record_backward_weight(recording, &shape, d_out, swiglu.y, d_down)?;
        let weight = views.weight(block.feed_forward_norm)?;
        let normed = rms_norm::record_forward(recording, &config.norm(), saved.middle, weight)?;
        let d_normed = linear(recording, 2 * hidden, width, block.gate_up, swiglu.d_gate_up, normed.y)?;
        let d_middle = norm(recording, block.feed_forward_norm, saved.middle, normed, d_normed, d_out)?;

        let o = attention.record_output(recording, &saved.attention)?;
        let d_o = linear(recording, width, width, block.wo, d_middle, o)?;
        let weight = views.weight(block.attention_norm)?;
        let normed = rms_norm::record_forward(recording, &config.norm(), saved.x, weight)?;
        let mut forward = saved.attention;
        if dense {
            let wqkv = views.weight(block.wqkv)?;
            forward =
                forward.with_inputs(qkv::record_forward(recording, &config.qkv(), tensors.angles, normed.y, wqkv)?);
        }
        let Gradients { dq, dk, dv } = attention.record_backward(recording, &forward, d_o)?;
        let d_qkv = qkv::record_backward(recording, &config.qkv(), tensors.angles, [dq, dk, dv])?;
        let d_normed = linear(recording, config.qkv().outputs(), width, block.wqkv, d_qkv, normed.y)?;
        norm(recording, block.attention_norm, saved.x, normed, d_normed, d_middle)
    }
}
