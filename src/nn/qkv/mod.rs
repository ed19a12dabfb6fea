//! Queries, keys and values: linear maps of the same rows by one product, with rotary position embedding (Su et al., 2021)
//! of q and k. The halves of a head's row are the pairs that turn, as in Llama and GPT-NeoX.

mod reference;

use crate::error::{Error, Result};
use crate::gpu::{Kernel, params};
use crate::nn::gemm::{self, Gemm, GemmPlan};
use crate::nn::{check_count, check_element, check_width, grid_of_invocations};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

params!(QkvBackwardParams { rows: u32 });

/// The base of the angles in the original and in Llama.
pub const THETA: f64 = 10_000.0;

/// Sizes of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QkvShape {
    /// T, tokens of the whole batch, a multiple of `tokens`.
    pub rows: usize,
    /// N, tokens of one sequence: row t has position t mod N.
    pub tokens: usize,
    /// Columns of x, a multiple of 8.
    pub width: usize,
    /// H, heads of q.
    pub heads: usize,
    /// KV, heads of k and v.
    pub kv_heads: usize,
    /// D, a multiple of 8.
    pub head_dim: usize,
    /// Storage type of activations and weight.
    pub element: Element,
}

impl QkvShape {
    fn check(&self) -> Result<()> {
        check_count("tokens", self.tokens)?;
        check_count("rows", self.rows)?;
        if !self.rows.is_multiple_of(self.tokens) {
            return Err(Error::parameter("rows", self.rows, format!("a multiple of tokens = {}", self.tokens)));
        }
        check_width("width", self.width)?;
        check_count("heads", self.heads)?;
        check_count("kv_heads", self.kv_heads)?;
        check_width("head_dim", self.head_dim)?;
        check_element(self.element)
    }

    /// Heads of q, k and v together.
    fn all_heads(&self) -> usize {
        self.heads + 2 * self.kv_heads
    }

    /// Columns of q, k and v together: rows of the weight.
    pub fn outputs(&self) -> usize {
        self.all_heads() * self.head_dim
    }

    /// Gives a kernel the heads and the tokens.
    fn constants(&self, kernel: Kernel) -> Kernel {
        kernel.constant("HEADS", self.heads).constant("KV_HEADS", self.kv_heads).constant("TOKENS", self.tokens)
    }
}

/// The angles' table for `angles`, `[N, D]`: in each row D/2 cosines, then D/2 sines, of position * theta^(-2i/D).
/// It comes from the host, because a shader's sine may be wrong in the fourth digit at large angles.
pub fn angles(tokens: usize, head_dim: usize, theta: f64) -> Vec<f32> {
    let half = head_dim / 2;
    let angle = |position: usize, i: usize| position as f64 * theta.powf(-2.0 * i as f64 / head_dim as f64);
    (0..tokens)
        .flat_map(|position| {
            let cosines = (0..half).map(move |i| angle(position, i).cos() as f32);
            cosines.chain((0..half).map(move |i| angle(position, i).sin() as f32))
        })
        .collect()
}

/// Records q `[T, H, D]`, k and v `[T, KV, D]` of `x` `[T, width]`. The rows of `weight` `[outputs, width]` are those of
/// q, then of k, then of v; `angles` f32 `[N, D]` is the table of [`angles`].
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_forward(
    recording: &mut Recording,
    shape: &QkvShape,
    angles: Tensor,
    x: Tensor,
    weight: Tensor,
) -> Result<[Tensor; 3]> {
    shape.check()?;
    let &QkvShape { rows, tokens, width, heads, kv_heads, head_dim, element } = shape;
    recording.require("angles", angles, Element::F32, &[tokens, head_dim])?;
    recording.require("x", x, element, &[rows, width])?;
    recording.require("weight", weight, element, &[shape.outputs(), width])?;
    let q = recording.scratch("q", element, &[rows, heads, head_dim])?;
    let k = recording.scratch("k", element, &[rows, kv_heads, head_dim])?;
    let v = recording.scratch("v", element, &[rows, kv_heads, head_dim])?;
    let gemm = Gemm { half: Some(head_dim / 2), ..Gemm::forward(rows, width, shape.outputs(), element) };
    let plan = GemmPlan::whole(recording.caps(), &gemm);
    let command = Command::new("qkv", reference::Forward { shape: *shape })
        .reads("a", x)
        .reads("b", weight)
        .reads("angles", angles)
        .writes("q", q)
        .writes("k", k)
        .writes("v", v);
    let kernel = shape.constants(gemm::kernel(recording.caps(), "nn/qkv", &gemm, &plan));
    let command = gemm::dispatch(recording, command, kernel, &gemm, &plan)?;
    recording.push(command)?;
    Ok([q, k, v])
}

/// Records the opposite rotation of the gradients `d_q` `[T, H, D]` and `d_k` `[T, KV, D]`, which gives them and `d_v`
/// `[T, KV, D]` side by side, `[T, outputs]`: the linear map's backward takes it from here.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_backward(
    recording: &mut Recording,
    shape: &QkvShape,
    angles: Tensor,
    [d_q, d_k, d_v]: [Tensor; 3],
) -> Result<Tensor> {
    shape.check()?;
    let &QkvShape { rows, tokens, heads, kv_heads, head_dim, element, .. } = shape;
    recording.require("angles", angles, Element::F32, &[tokens, head_dim])?;
    recording.require("d_q", d_q, element, &[rows, heads, head_dim])?;
    recording.require("d_k", d_k, element, &[rows, kv_heads, head_dim])?;
    recording.require("d_v", d_v, element, &[rows, kv_heads, head_dim])?;
    let d_qkv = recording.scratch("d_qkv", element, &[rows, shape.outputs()])?;
    let kernel =
        Kernel::new(recording.caps(), "nn/qkv_backward").element("elem", element).constant("HALF", head_dim / 2);
    let elements = rows * shape.outputs();
    let command = Command::new("qkv_backward", reference::Backward { shape: *shape })
        .reads("angles", angles)
        .reads("d_q", d_q)
        .reads("d_k", d_k)
        .reads("d_v", d_v)
        .writes("d_qkv", d_qkv)
        .dispatch(
            shape.constants(kernel),
            QkvBackwardParams { rows: rows as u32 },
            grid_of_invocations(recording.caps(), elements / 8)?,
            3 * elements as u64,
        );
    recording.push(command)?;
    Ok(d_qkv)
}
