//! Gather and scatter with their backwards against the references, over real selections.

mod support;

use lighthouse_attention::stage::{gather, pool_score, scatter, select};
use lighthouse_attention::{Element, LighthouseConfig, Recording, Result, Shape, Tensor};
use support::{Probe, check, data};

/// The spread of spec section 9: tokens that nothing divides, GQA and MQA, levels 2 to 5, pooling 2, 4 and 8, budgets
/// that take a few entries and all.
fn cases() -> Vec<(LighthouseConfig, Shape)> {
    let config = |levels, pooling, top_k, chunk| LighthouseConfig { levels, pooling, top_k, chunk };
    let shape =
        |batch, tokens, heads, kv_heads, head_dim, element| Shape { batch, tokens, heads, kv_heads, head_dim, element };
    vec![
        (config(2, 2, 8, 4), shape(1, 128, 1, 1, 8, Element::F32)),
        (config(2, 2, 8, 4), shape(2, 77, 4, 2, 24, Element::F16)),
        (config(3, 4, 8, 4), shape(1, 501, 3, 1, 64, Element::F32)),
        (config(3, 2, 4, 2), shape(1, 61, 2, 2, 128, Element::F16)),
        (config(4, 2, 32, 8), shape(2, 333, 4, 4, 16, Element::F32)),
        (config(5, 2, 16, 8), shape(1, 250, 2, 1, 40, Element::F32)),
        (config(3, 8, 4, 2), shape(1, 700, 2, 1, 8, Element::F16)),
        (config(2, 8, 128, 128), shape(1, 700, 1, 1, 256, Element::F32)),
    ]
}

struct Selected {
    inputs: [Tensor; 3],
    pooled: Tensor,
    selection: select::Selection,
}

fn selected(
    recording: &mut Recording,
    probe: &mut Probe,
    config: &LighthouseConfig,
    shape: &Shape,
) -> Result<Selected> {
    let pyramid = config.pyramid(shape.tokens)?;
    let mut input =
        |name, tensor, dims: &[usize]| probe.input(recording, name, shape.element, dims, data::exact(7, tensor, dims));
    let inputs = [input("q", 0, &shape.q())?, input("k", 1, &shape.kv())?, input("v", 2, &shape.kv())?];
    let pooled = pool_score::record(recording, shape, &pyramid, inputs)?;
    let selection = select::record(recording, shape, &pyramid, [pooled.score_q, pooled.score_k])?;
    Ok(Selected { inputs, pooled: pooled.pyramid, selection })
}

#[test]
fn gather_matches_the_reference() {
    for (config, shape) in cases() {
        check(&format!("{config:?} {shape:?}"), 2.0, &|recording| {
            let mut probe = Probe::default();
            let at = selected(recording, &mut probe, &config, &shape)?;
            let pyramid = config.pyramid(shape.tokens)?;
            let out = gather::record_forward(recording, &shape, &pyramid, at.inputs, at.pooled, at.selection.indices)?;
            probe.outputs(recording, &[at.selection.indices])?;
            probe.outputs(recording, &out)?;
            Ok(probe)
        });
    }
}

#[test]
fn scatter_matches_the_reference() {
    for (config, shape) in cases() {
        check(&format!("{config:?} {shape:?}"), 2.0, &|recording| {
            let mut probe = Probe::default();
            let at = selected(recording, &mut probe, &config, &shape)?;
            let pyramid = config.pyramid(shape.tokens)?;
            let gathered = [shape.batch, shape.heads, pyramid.gathered, shape.head_dim];
            let from = probe.input(recording, "gathered_o", shape.element, &gathered, data::tensor(8, 0, &gathered))?;
            let o = recording.external("o", shape.element, &shape.q())?;
            scatter::record_forward(recording, &shape, &pyramid, from, at.selection.positions, o)?;
            probe.outputs(recording, &[o])?;
            Ok(probe)
        });
    }
}

#[test]
fn scatter_backward_matches_the_reference() {
    for (config, shape) in cases() {
        check(&format!("{config:?} {shape:?}"), 3.0, &|recording| {
            let mut probe = Probe::default();
            let at = selected(recording, &mut probe, &config, &shape)?;
            let d_o = probe.input(recording, "d_o", shape.element, &shape.q(), data::tensor(8, 3, &shape.q()))?;
            let pyramid = config.pyramid(shape.tokens)?;
            let out = scatter::record_backward(recording, &shape, &pyramid, d_o, at.selection.positions)?;
            probe.outputs(recording, &[out])?;
            Ok(probe)
        });
    }
}

#[test]
fn gather_backward_matches_the_reference() {
    for (config, shape) in cases() {
        check(&format!("{config:?} {shape:?}"), 3.0, &|recording| {
            let mut probe = Probe::default();
            let at = selected(recording, &mut probe, &config, &shape)?;
            let pyramid = config.pyramid(shape.tokens)?;
            let dims = [shape.batch, shape.heads, pyramid.gathered, shape.head_dim];
            let mut input =
                |name, tensor| probe.input(recording, name, shape.element, &dims, data::tensor(9, tensor, &dims));
            let from = [input("gathered_dq", 0)?, input("gathered_dk", 1)?, input("gathered_dv", 2)?];
            let out = [
                recording.external("dq", shape.element, &shape.q())?,
                recording.external("dk", shape.element, &shape.kv())?,
                recording.external("dv", shape.element, &shape.kv())?,
            ];
            gather::record_backward(recording, &shape, &pyramid, from, at.selection.positions, out)?;
            probe.outputs(recording, &out)?;
            Ok(probe)
        });
    }
}
