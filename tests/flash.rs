//! Exact causal attention against the reference, forward and backward.

mod support;

use lighthouse_attention::stage::flash::{self, FlashShape, Layout};
use lighthouse_attention::{Element, Recording, Result, Tensor};
use support::{Probe, check, data};

const F32: Element = Element::F32;
const F16: Element = Element::F16;
use Layout::{HeadsTokens, TokensHeads};

fn shape(
    (batch, tokens, heads, kv_heads, head_dim): (usize, usize, usize, usize, usize),
    element: Element,
    layout: Layout,
) -> FlashShape {
    FlashShape { batch, tokens, heads, kv_heads, head_dim, element, layout }
}

/// Inputs q, k, v by the golden vectors' formula, times `magnitude`.
fn inputs(recording: &mut Recording, shape: &FlashShape, magnitude: f32) -> Result<(Probe, [Tensor; 3])> {
    let mut probe = Probe::default();
    let mut input = |name, tensor, axes: [usize; 4]| {
        let values = data::tensor(shape.head_dim as u64, tensor, &axes).into_iter().map(|x| x * magnitude).collect();
        probe.input(recording, name, shape.element, &axes, values)
    };
    let qkv = [input("q", 0, shape.q())?, input("k", 1, shape.kv())?, input("v", 2, shape.kv())?];
    Ok((probe, qkv))
}

fn check_forward(shape: &FlashShape, magnitude: f32) {
    check(&format!("forward of {shape:?}"), 2.0, &|recording| {
        let (mut probe, qkv) = inputs(recording, shape, magnitude)?;
        let out = flash::record_forward(recording, shape, qkv, None)?;
        probe.outputs(recording, &[out.o, out.lse])?;
        Ok(probe)
    });
}

fn check_backward(shape: &FlashShape, magnitude: f32) {
    check(&format!("backward of {shape:?}"), 3.0, &|recording| {
        let (mut probe, qkv) = inputs(recording, shape, magnitude)?;
        let d_o = data::tensor(shape.head_dim as u64, 3, &shape.q());
        let d_o = probe.input(recording, "d_o", shape.element, &shape.q(), d_o)?;
        let forward = flash::record_forward(recording, shape, qkv, None)?;
        let out = flash::record_backward(recording, shape, qkv, &forward, d_o, None)?;
        probe.outputs(recording, &[out.dq, out.dk, out.dv])?;
        Ok(probe)
    });
}

/// Every head_dim class, lengths that divide nothing, groups, batches, both layouts.
fn shapes() -> Vec<FlashShape> {
    vec![
        shape((1, 1, 1, 1, 8), F32, HeadsTokens),
        shape((2, 2, 2, 1, 8), F16, TokensHeads),
        shape((1, 31, 2, 2, 16), F32, TokensHeads),
        shape((1, 127, 4, 2, 24), F16, TokensHeads),
        shape((2, 65, 4, 1, 64), F32, TokensHeads),
        shape((1, 33, 2, 2, 80), F16, HeadsTokens),
        shape((2, 127, 2, 2, 96), F32, HeadsTokens),
        shape((1, 130, 3, 1, 128), F16, TokensHeads),
        shape((1, 97, 1, 1, 200), F32, TokensHeads),
        shape((1, 64, 2, 1, 256), F16, TokensHeads),
        shape((1, 700, 2, 1, 32), F32, TokensHeads),
    ]
}

#[test]
fn forward_matches_the_reference() {
    for shape in shapes() {
        check_forward(&shape, 1.0);
    }
}

#[test]
fn backward_matches_the_reference() {
    for shape in shapes() {
        check_backward(&shape, 1.0);
    }
}
