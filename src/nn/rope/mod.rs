//! Rotary position embedding (Su et al., 2021) with the halves of a head's row as the pairs, as in Llama and GPT-NeoX.

mod reference;

use crate::error::{Error, Result};
use crate::gpu::{Kernel, params};
use crate::nn::{check_count, check_element, check_width, grid_of_columns};
use crate::recording::{Command, Recording};
use crate::tensor::{Element, Tensor};

params!(RopeParams { rows: u32, tokens: u32, heads: u32, kv_heads: u32 });

/// The base of the angles in the original and in Llama.
pub const THETA: f64 = 10_000.0;

/// Sizes of a rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeShape {
    /// T, tokens of the whole batch, a multiple of `tokens`.
    pub rows: usize,
    /// N, tokens of one sequence: row t has position t mod N.
    pub tokens: usize,
    /// H, heads of q.
    pub heads: usize,
    /// KV, heads of k.
    pub kv_heads: usize,
    /// D, a multiple of 8.
    pub head_dim: usize,
    /// Storage type of q and k.
    pub element: Element,
}

impl RopeShape {
    fn check(&self) -> Result<()> {
        check_count("tokens", self.tokens)?;
        check_count("rows", self.rows)?;
        if !self.rows.is_multiple_of(self.tokens) {
            return Err(Error::parameter("rows", self.rows, format!("a multiple of tokens = {}", self.tokens)));
        }
        check_count("heads", self.heads)?;
        check_count("kv_heads", self.kv_heads)?;
        check_width("head_dim", self.head_dim)?;
        check_element(self.element)
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

/// Records the rotation of `q` `[T, H, D]` and `k` `[T, KV, D]` in place; `angles` f32 `[N, D]` is the table of
/// [`angles`].
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_forward(
    recording: &mut Recording,
    shape: &RopeShape,
    angles: Tensor,
    q: Tensor,
    k: Tensor,
) -> Result<()> {
    record(recording, shape, angles, [q, k], false)
}

/// Records the opposite rotation of the gradients `d_q` `[T, H, D]` and `d_k` `[T, KV, D]` in place.
///
/// # Errors
/// Sizes that are not allowed, or tensors that do not have them.
pub fn record_backward(
    recording: &mut Recording,
    shape: &RopeShape,
    angles: Tensor,
    d_q: Tensor,
    d_k: Tensor,
) -> Result<()> {
    record(recording, shape, angles, [d_q, d_k], true)
}

fn record(
    recording: &mut Recording,
    shape: &RopeShape,
    angles: Tensor,
    [q, k]: [Tensor; 2],
    backward: bool,
) -> Result<()> {
    shape.check()?;
    let &RopeShape { rows, tokens, heads, kv_heads, head_dim, element } = shape;
    recording.require("angles", angles, Element::F32, &[tokens, head_dim])?;
    recording.require("q", q, element, &[rows, heads, head_dim])?;
    recording.require("k", k, element, &[rows, kv_heads, head_dim])?;
    let kernel = Kernel::new(recording.caps(), "nn/rope")
        .element("elem", element)
        .constant("HEAD_DIM", head_dim)
        .flag("BACKWARD", backward);
    let params =
        RopeParams { rows: rows as u32, tokens: tokens as u32, heads: heads as u32, kv_heads: kv_heads as u32 };
    let elements = rows * (heads + kv_heads) * head_dim;
    let grid = grid_of_columns(recording.caps(), elements / 8)?;
    let stage = if backward { "rope_backward" } else { "rope" };
    let command = Command::new(stage, reference::Rotation { shape: *shape, backward })
        .reads("angles", angles)
        .updates("q", q)
        .updates("k", k)
        .dispatch(kernel, params, grid, 3 * elements as u64);
    recording.push(command)
}
