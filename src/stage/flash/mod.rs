//! Flash: exact causal attention, tile by tile with an online softmax, forward and backward (spec sections 6 and 8).
//!
//! It serves the sub-sequence that Lighthouse Attention gathers and, as the dense layer, the caller's own tensors.

mod coop;
mod plan;
mod reference;
mod scratch;

use std::ops::Range;

use crate::config::Shape;
use crate::error::Result;
use crate::gpu::{Caps, Kernel, grid, params};
use crate::real::Real;
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};
use plan::Units;
pub use plan::{Tile, TilePlan, plan};

params!(TileParams {
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    token_stride: u32,
    head_stride: u32,
    kv_token_stride: u32,
    kv_head_stride: u32,
    scale: f32,
    first_unit: u32,
    units: u32,
    heads_at_once: u32,
});

params!(ChunkParams {
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    token_stride: u32,
    head_stride: u32,
    kv_token_stride: u32,
    kv_head_stride: u32,
    scale: f32,
    first_unit: u32,
    units: u32,
    first_kv_head: u32,
    kv_head_count: u32,
    first_member: u32,
    members: u32,
    first_block: u32,
    end_block: u32,
    parts: u32,
});

impl TileParams {
    /// The same for the kernels whose units may be of some heads and, by blocks, of some queries only.
    fn of_chunk(self, heads: &scratch::Heads, chunk: &scratch::Chunk) -> ChunkParams {
        ChunkParams {
            tokens: self.tokens,
            heads: self.heads,
            kv_heads: self.kv_heads * heads.parts as u32,
            token_stride: self.token_stride,
            head_stride: self.head_stride,
            kv_token_stride: self.kv_token_stride,
            kv_head_stride: self.kv_head_stride,
            scale: self.scale,
            first_unit: self.first_unit,
            units: self.units,
            first_kv_head: heads.kv_heads.start as u32,
            kv_head_count: heads.kv_heads.len() as u32,
            first_member: heads.members.start as u32,
            members: heads.members.len() as u32,
            first_block: chunk.blocks.start as u32,
            end_block: chunk.blocks.end as u32,
            parts: chunk.dq_parts as u32,
        }
    }
}

/// Invocations that share a row of `flash_backward_delta`.
const DELTA_LANES: usize = 8;

params!(DeltaParams { tokens: u32, heads: u32, token_stride: u32, head_stride: u32, rows: u32 });

/// The order of the axes of q, k, v, o and their gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// `[B, N, H, D]`, as callers have it.
    TokensHeads,
    /// `[B, H, S, D]`, as the gather stage makes it.
    HeadsTokens,
}

/// An attention problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlashShape {
    /// B, independent sequences.
    pub batch: usize,
    /// S (N for the dense layer), tokens or entries of each.
    pub tokens: usize,
    /// H, query heads.
    pub heads: usize,
    /// KV, key and value heads; query head h reads kv head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// D, a multiple of 8 from 8 to 256.
    pub head_dim: usize,
    /// Storage type of q, k, v, o and their gradients.
    pub element: Element,
    /// Order of their axes.
    pub layout: Layout,
}

impl FlashShape {
    /// Dense attention over a layer's own tensors.
    pub fn dense(shape: &Shape) -> Self {
        let Shape { batch, tokens, heads, kv_heads, head_dim, element } = *shape;
        Self { batch, tokens, heads, kv_heads, head_dim, element, layout: Layout::TokensHeads }
    }

    /// Attention over a layer's gathered sub-sequences of `gathered` entries, one for each query head.
    pub fn gathered(shape: &Shape, gathered: usize) -> Self {
        let Shape { batch, heads, head_dim, element, .. } = *shape;
        Self { batch, tokens: gathered, heads, kv_heads: heads, head_dim, element, layout: Layout::HeadsTokens }
    }

    /// Checks spec section 9.
    ///
    /// # Errors
    /// As [`Shape::check`].
    pub fn check(&self) -> Result<()> {
        let Self { batch, tokens, heads, kv_heads, head_dim, element, .. } = *self;
        Shape { batch, tokens, heads, kv_heads, head_dim, element }.check()
    }

    /// Shape of q and o.
    pub fn q(&self) -> [usize; 4] {
        self.axes(self.heads)
    }

    /// Shape of k and v.
    pub fn kv(&self) -> [usize; 4] {
        self.axes(self.kv_heads)
    }

    /// Shape of the log-sum-exp.
    pub fn lse(&self) -> [usize; 3] {
        [self.batch, self.heads, self.tokens]
    }

    fn axes(&self, heads: usize) -> [usize; 4] {
        match self.layout {
            Layout::TokensHeads => [self.batch, self.tokens, heads, self.head_dim],
            Layout::HeadsTokens => [self.batch, heads, self.tokens, self.head_dim],
        }
    }

    /// Rows from a token to the next, and from a head to the next, in a tensor with so many heads.
    fn strides(&self, heads: usize) -> [u32; 2] {
        match self.layout {
            Layout::TokensHeads => [heads as u32, 1],
            Layout::HeadsTokens => [1, self.tokens as u32],
        }
    }

    /// Pairs of a query and a key that it may attend to; what lies past the last token counts for nothing.
    fn pairs(&self, queries: Range<usize>, keys: Range<usize>) -> u64 {
        let end = |token: usize| token.min(self.tokens) as u64;
        let (first, keys) = (end(keys.start), end(keys.end) - end(keys.start));
        // Of the queries before one.
        let before = |query: u64| {
            let seen = query.saturating_sub(first);
            let of_diagonal = seen.min(keys);
            of_diagonal * (of_diagonal + 1) / 2 + (seen - of_diagonal) * keys
        };
        before(end(queries.end)) - before(end(queries.start))
    }

    /// 1 / sqrt(D).
    fn scale<T: Real>(&self) -> T {
        T::from_f64((self.head_dim as f64).sqrt().recip())
    }

    /// The kernel of a tile of queries, see [`query_units`](plan::query_units).
    fn query_kernel(&self, caps: &Caps, tile: &Tile) -> Kernel {
        self.kernel(caps, tile, plan::query_units(caps, self, tile, 1).heads < self.heads)
    }

    /// The kernel of a tile; whether the heads take turns concerns those of queries.
    fn kernel(&self, caps: &Caps, tile: &Tile, heads_in_turn: bool) -> Kernel {
        let mut kernel = Kernel::new(caps, tile.shader)
            .element("elem", self.element)
            .constant("HEAD_DIM", self.head_dim)
            .constant("BLOCK_M", tile.block_m)
            .constant("BLOCK_N", tile.block_n)
            .flag("HEADS_IN_TURN", heads_in_turn);
        if let Some(size) = tile.matrix {
            kernel = kernel.matrices(size, self.element);
            if let Some(layout) = tile.layout {
                kernel = kernel.components(layout);
            }
            if tile.shader == coop::FORWARD_IN_REGISTERS {
                kernel = kernel.branch(caps);
            }
        } else if tile.shader == plan::FORWARD {
            kernel = kernel.group_reduce(caps, tile.block_n / 4);
        }
        tile.constants.iter().fold(kernel, |kernel, &(name, value)| kernel.constant(name, value))
    }

    /// The dispatches of a kernel of such units.
    fn parts(
        &self,
        caps: &Caps,
        scale: f32,
        units: Units,
        work: impl Fn(usize) -> u64,
    ) -> Result<Vec<(TileParams, [u32; 3], u64)>> {
        let [token_stride, head_stride] = self.strides(self.heads);
        let [kv_token_stride, kv_head_stride] = self.strides(self.kv_heads);
        let parts = plan::cut(units, work, caps.work_per_dispatch);
        let dispatch = |part: plan::Part| {
            let params = TileParams {
                tokens: self.tokens as u32,
                heads: self.heads as u32,
                kv_heads: self.kv_heads as u32,
                token_stride,
                head_stride,
                kv_token_stride,
                kv_head_stride,
                scale,
                first_unit: part.first_unit,
                units: part.units,
                heads_at_once: units.heads as u32,
            };
            Ok((params, grid(caps, u64::from(part.units))?, part.work))
        };
        parts.into_iter().map(dispatch).collect()
    }
}

impl FlashShape {
    /// Operations of a product of a block of queries, blocks counted from the last, with all keys that they see.
    fn query_work(&self, tile: &Tile, block: usize) -> u64 {
        let blocks = self.tokens.div_ceil(tile.block_m);
        self.product_work(tile, blocks - 1 - block)
    }

    /// Operations of a product of a block of queries with all keys that they see.
    fn product_work(&self, tile: &Tile, block: usize) -> u64 {
        let queries = block * tile.block_m..(block + 1) * tile.block_m;
        2 * self.head_dim as u64 * self.pairs(queries, 0..self.tokens)
    }

    /// Operations of the four products of a block of keys with these queries of so many query heads, for dk and dv.
    fn dkdv_work(&self, tile: &Tile, block: usize, queries: Range<usize>, heads: usize) -> u64 {
        let keys = block * tile.block_n..(block + 1) * tile.block_n;
        8 * (self.head_dim * heads) as u64 * self.pairs(queries, keys)
    }

    /// The dispatches of the backward for k and v by itself.
    fn dkdv_dispatches(&self, caps: &Caps, tile: &Tile, command: Command) -> Result<Command> {
        let kernel = self.kernel(caps, tile, false);
        let group = self.heads / self.kv_heads;
        let work = |block| self.dkdv_work(tile, block, 0..self.tokens, group);
        let Some(size) = tile.matrix else {
            let blocks = self.tokens.div_ceil(tile.block_n);
            return command.dispatch_parts(caps, self.batch, kernel, |batch| {
                self.parts(caps, self.scale(), Units::new(batch, blocks, self.kv_heads), work)
            });
        };
        let ds_block = coop::ds_block(size);
        let chunk = scratch::Chunk { blocks: 0..self.tokens.div_ceil(ds_block), dq_parts: 1 };
        command.dispatch_parts(caps, self.batch, kernel, |batch| {
            let heads = scratch::Heads { kv_heads: 0..batch * self.kv_heads, members: 0..group, parts: 1 };
            let blocks = chunk.blocks.end * (ds_block / tile.block_n);
            let parts = self.parts(caps, self.scale(), Units::new(1, blocks, heads.kv_heads.len()), work)?;
            Ok(parts.into_iter().map(|(params, grid, work)| (params.of_chunk(&heads, &chunk), grid, work)).collect())
        })
    }

    /// The dispatches of the backward that keeps d_scores in scratch memory: for some heads and some queries at a time dk
    /// and dv, then dq.
    fn scratch_dispatches(
        &self,
        caps: &Caps,
        plan: &scratch::BackwardWithScratch,
        mut command: Command,
    ) -> Result<Command> {
        let tiles = [&plan.dkdv, &plan.dkdv_sum, &plan.dq, &plan.dq_sum];
        let [dkdv, dkdv_sum, dq, dq_sum] = tiles.map(|tile| self.kernel(caps, tile, false));
        let add = |mut command: Command,
                   kernel: &Kernel,
                   (heads, chunk): (&scratch::Heads, &scratch::Chunk),
                   (blocks, heads_at_once): (usize, usize),
                   work: &dyn Fn(usize) -> u64| {
            for (params, grid, work) in self.parts(caps, self.scale(), Units::new(1, blocks, heads_at_once), work)? {
                command = command.dispatch(kernel.clone(), params.of_chunk(heads, chunk), grid, work);
            }
            Result::Ok(command)
        };
        let key_blocks = plan.dq.block_n / plan.dkdv.block_n;
        for heads in plan.heads(self) {
            let query_heads = heads.kv_heads.len() * heads.members.len();
            for chunk in &plan.chunks {
                let queries = chunk.queries(plan.dq.block_n, self.tokens);
                let in_parts = heads.in_parts(plan.dkdv_parts);
                let work = |block| self.dkdv_work(&plan.dkdv, block, queries.clone(), in_parts.members.len());
                let units = (chunk.blocks.end * key_blocks, in_parts.kv_heads.len());
                command = add(command, &dkdv, (&in_parts, chunk), units, &work)?;

                let (parts, end) = (chunk.dq_parts, queries.end.div_ceil(plan.dq.block_m));
                let work = |unit| self.product_work(&plan.dq, end - 1 - unit / parts).div_ceil(parts as u64);
                let blocks = end - queries.start / plan.dq.block_m;
                command = add(command, &dq, (&heads, chunk), (blocks * parts, query_heads), &work)?;
                if parts > 1 {
                    let work = |_| (coop::SUM_ROWS * self.head_dim * parts) as u64;
                    let blocks = queries.len().div_ceil(coop::SUM_ROWS);
                    command = add(command, &dq_sum, (&heads, chunk), (blocks, query_heads), &work)?;
                }
            }
            if let (Some(last), true) = (plan.chunks.last(), plan.dkdv_parts > 1) {
                let work = |_| (2 * plan.dkdv_sum.block_m * 2 * self.head_dim * plan.dkdv_parts) as u64;
                let rows = last.blocks.end * plan.dq.block_n / plan.dkdv_sum.block_m;
                command = add(command, &dkdv_sum, (&heads, last), (rows, heads.kv_heads.len()), &work)?;
            }
        }
        Ok(command)
    }
}

/// What the forward gives.
#[derive(Clone, Copy, Debug)]
pub struct FlashForward {
    /// The output, in q's layout.
    pub o: Tensor,
    /// Natural logarithm of each row's sum of exponentials, `[B, H, S]` f32.
    pub lse: Tensor,
}

/// What the backward gives, in the layouts of q, k and v.
#[derive(Clone, Copy, Debug)]
pub struct FlashGradients {
    /// Gradient of q.
    pub dq: Tensor,
    /// Gradient of k, summed over the query heads of a group.
    pub dk: Tensor,
    /// Gradient of v, summed over the query heads of a group.
    pub dv: Tensor,
}

/// Records o = softmax(q k^T / sqrt(D), causal) v and its log-sum-exp. `into` is where o goes, by default scratch.
///
/// # Errors
/// A shape outside spec section 9, tensors of the wrong size, or a device that cannot hold them.
pub fn record_forward(
    recording: &mut Recording,
    shape: &FlashShape,
    [q, k, v]: [Tensor; 3],
    into: Option<Tensor>,
) -> Result<FlashForward> {
    shape.check()?;
    recording.require("q", q, shape.element, &shape.q())?;
    recording.require("k", k, shape.element, &shape.kv())?;
    recording.require("v", v, shape.element, &shape.kv())?;
    let o = match into {
        Some(o) => o,
        None => recording.scratch("o", shape.element, &shape.q())?,
    };
    recording.require("o", o, shape.element, &shape.q())?;
    let lse = recording.scratch("lse", Element::F32, &shape.lse())?;
    let caps = recording.caps().clone();
    let tile = match coop::forward_in_registers(&caps, shape) {
        Some(tile) => tile,
        None => plan(&caps, shape.head_dim, shape.element)?.forward,
    };
    let kernel = shape.query_kernel(&caps, &tile);
    let command = Command::new("flash_forward", reference::ForwardReference(*shape))
        .reads("q", q)
        .reads("k", k)
        .reads("v", v)
        .writes("o", o)
        .writes("lse", lse)
        .dispatch_parts(&caps, shape.batch, kernel, |batch| {
            let scale = shape.scale::<f32>() * std::f32::consts::LOG2_E;
            let units = plan::query_units(&caps, shape, &tile, batch);
            shape.parts(&caps, scale, units, |block| 2 * shape.query_work(&tile, block))
        })?;
    recording.push(command)?;
    Ok(FlashForward { o, lse })
}

/// Records the gradients for d_o, given in q's layout. `into` is where they go, by default scratch.
///
/// # Errors
/// As [`record_forward`].
pub fn record_backward(
    recording: &mut Recording,
    shape: &FlashShape,
    [q, k, v]: [Tensor; 3],
    forward: &FlashForward,
    d_o: Tensor,
    into: Option<FlashGradients>,
) -> Result<FlashGradients> {
    shape.check()?;
    let gradients = match into {
        Some(gradients) => gradients,
        None => FlashGradients {
            dq: recording.scratch("dq", shape.element, &shape.q())?,
            dk: recording.scratch("dk", shape.element, &shape.kv())?,
            dv: recording.scratch("dv", shape.element, &shape.kv())?,
        },
    };
    for (parameter, tensor) in [("q", q), ("o", forward.o), ("d_o", d_o), ("dq", gradients.dq)] {
        recording.require(parameter, tensor, shape.element, &shape.q())?;
    }
    for (parameter, tensor) in [("k", k), ("v", v), ("dk", gradients.dk), ("dv", gradients.dv)] {
        recording.require(parameter, tensor, shape.element, &shape.kv())?;
    }
    recording.require("lse", forward.lse, Element::F32, &shape.lse())?;
    let lse_delta = record_delta(recording, shape, forward, d_o)?;

    let caps = recording.caps().clone();
    let reads = |command: Command| {
        command.reads("q", q).reads("k", k).reads("v", v).reads("d_o", d_o).reads("lse_delta", lse_delta)
    };
    if let Some(plan) = scratch::backward_with_scratch(&caps, shape) {
        let ds = recording.scratch("ds", Element::F16, &[plan.ds_len])?;
        let carried = recording.scratch("carried", Element::F32, &[plan.carried_len])?;
        let partial = recording.scratch("partial", Element::F32, &[plan.partial_len])?;
        let command = reads(Command::new("flash_backward", reference::BackwardReference(*shape)))
            .writes("ds", ds)
            .writes("carried", carried)
            .writes("partial", partial)
            .writes("dq", gradients.dq)
            .writes("dk", gradients.dk)
            .writes("dv", gradients.dv);
        recording.push(shape.scratch_dispatches(&caps, &plan, command)?)?;
        return Ok(gradients);
    }
    let plan = plan(&caps, shape.head_dim, shape.element)?;
    let command = reads(Command::new("flash_backward_dkdv", reference::DkdvReference(*shape)))
        .writes("dk", gradients.dk)
        .writes("dv", gradients.dv);
    recording.push(shape.dkdv_dispatches(&caps, &plan.dkdv, command)?)?;

    let command = reads(Command::new("flash_backward_dq", reference::DqReference(*shape))).writes("dq", gradients.dq);
    let kernel = shape.query_kernel(&caps, &plan.dq);
    recording.push(command.dispatch_parts(&caps, shape.batch, kernel, |batch| {
        let work = |block| 3 * shape.query_work(&plan.dq, block);
        shape.parts(&caps, shape.scale(), plan::query_units(&caps, shape, &plan.dq, batch), work)
    })?)?;
    Ok(gradients)
}

/// Records delta = rowsum(o * d_o) beside the log-sum-exp, `[B, H, S, 2]` f32.
fn record_delta(recording: &mut Recording, shape: &FlashShape, forward: &FlashForward, d_o: Tensor) -> Result<Tensor> {
    let [batch, heads, tokens] = shape.lse();
    let lse_delta = recording.scratch("lse_delta", Element::F32, &[batch, heads, tokens, 2])?;
    let caps = recording.caps().clone();
    let kernel = Kernel::new(&caps, "attention/flash_backward_delta")
        .wide(shape.element)
        .constant("HEAD_DIM", shape.head_dim)
        .constant("LANES", DELTA_LANES);
    let command = Command::new("flash_backward_delta", reference::DeltaReference(*shape))
        .reads("o", forward.o)
        .reads("d_o", d_o)
        .reads("lse", forward.lse)
        .writes("lse_delta", lse_delta)
        .dispatch_batched(&caps, shape.batch, kernel, |batch| {
            let [token_stride, head_stride] = shape.strides(shape.heads);
            let rows = batch * shape.heads * shape.tokens;
            let params = DeltaParams {
                tokens: shape.tokens as u32,
                heads: shape.heads as u32,
                token_stride,
                head_stride,
                rows: rows as u32,
            };
            let workgroups = rows.div_ceil(256 / DELTA_LANES) as u64;
            Ok((params, grid(&caps, workgroups)?, 2 * (rows * shape.head_dim) as u64))
        })?;
    recording.push(command)?;
    Ok(lse_delta)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MAX_HEAD_DIM;
    use crate::gpu::{ComponentLayout, MatrixKind, Tier, parse, reflect};

    /// A device of every tier.
    fn devices() -> Vec<Caps> {
        let coop = |tier: Tier, size, subgroup| {
            let limits = wgpu::Limits {
                max_compute_workgroup_storage_size: 48 << 10,
                max_storage_buffers_per_shader_stage: 10,
                ..wgpu::Limits::default()
            };
            let matrices = [Element::F16, Element::F32].map(|factors| MatrixKind { size, factors }).to_vec();
            Caps { limits, shader_f16: true, matrices, subgroup, tier, ..Caps::default() }
        };
        let with_layout = |caps: Caps, rows, columns, run| {
            let layout = ComponentLayout { rows, columns, run };
            Caps { layouts: caps.matrices.iter().map(|&kind| (kind, layout)).collect(), ..caps }
        };
        let simt_f16 = Caps { shader_f16: true, tier: Tier::SimtF16, ..Caps::default() };
        vec![
            Caps::default(),
            simt_f16,
            coop(Tier::Coop8, 8, 8),
            with_layout(coop(Tier::Coop8, 8, 8), 8, 1, 1),
            coop(Tier::Coop8, 8, 32),
            coop(Tier::Coop16, 16, 32),
            with_layout(coop(Tier::Coop16, 16, 32), 2, 4, 2),
        ]
    }

    #[test]
    fn plans_are_what_the_shaders_have() -> Result<()> {
        for (caps, head_dim) in devices().iter().flat_map(|caps| (8..=MAX_HEAD_DIM).step_by(8).map(move |d| (caps, d)))
        {
            for element in [Element::F16, Element::F32] {
                let layout = Layout::HeadsTokens;
                let shape = FlashShape { batch: 1, tokens: 1, heads: 1, kv_heads: 1, head_dim, element, layout };
                let in_registers = coop::forward_in_registers(caps, &FlashShape { batch: 1 << 12, ..shape });
                let plan = plan(caps, head_dim, element)?;
                let products = [2, 4].map(|row_parts| coop::dq_from_ds(caps, head_dim, element, row_parts));
                let with_scratch = scratch::backward_with_scratch(caps, &shape).map(|plan| {
                    [plan.dkdv, plan.dkdv_sum, plan.dq_sum].into_iter().chain(products.into_iter().flatten())
                });
                let with_scratch = with_scratch.into_iter().flatten();
                for tile in [plan.forward, plan.dkdv, plan.dq].into_iter().chain(in_registers).chain(with_scratch) {
                    let case = format!("{}, {}, head_dim {head_dim}, {element}", tile.shader, caps.tier);
                    let reflection =
                        reflect(tile.shader, &parse(tile.shader, &shape.kernel(caps, &tile, true).compose()?)?)?;
                    assert_eq!(reflection.workgroup_bytes, tile.workgroup_bytes as u64, "{case}");
                    assert_eq!(reflection.invocations as usize, tile.invocations, "{case}");
                }
            }
        }
        Ok(())
    }
}
