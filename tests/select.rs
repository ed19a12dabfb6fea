//! Selection against sorting, index for index, with ties, NaN and infinity among the scores.

mod support;

use lighthouse_attention::stage::select;
use lighthouse_attention::{Element, LighthouseConfig, Shape};
use support::{Probe, check, data};

fn case(name: &str, shape: Shape, config: LighthouseConfig, score: impl Fn(u64, u64) -> f32) {
    check(name, 1.0, &|recording| {
        let pyramid = config.pyramid(shape.tokens)?;
        let mut probe = Probe::default();
        let sizes = [[shape.batch, shape.heads, pyramid.entries], [shape.batch, shape.kv_heads, pyramid.entries]];
        let values = |tensor: usize| {
            (0..sizes[tensor].iter().product::<usize>() as u64).map(|i| score(tensor as u64, i)).collect()
        };
        let q = probe.input(recording, "score_q", Element::F32, &sizes[0], values(0))?;
        let k = probe.input(recording, "score_k", Element::F32, &sizes[1], values(1))?;
        let out = select::record(recording, &shape, &pyramid, [q, k])?;
        probe.outputs(recording, &[out.indices, out.positions])?;
        Ok(probe)
    });
}

const CONFIGS: [LighthouseConfig; 7] = [
    LighthouseConfig { levels: 2, pooling: 2, top_k: 8, chunk: 4 },
    LighthouseConfig { levels: 3, pooling: 4, top_k: 12, chunk: 4 },
    LighthouseConfig { levels: 4, pooling: 2, top_k: 64, chunk: 32 },
    LighthouseConfig { levels: 5, pooling: 2, top_k: 16, chunk: 8 },
    LighthouseConfig { levels: 3, pooling: 8, top_k: 128, chunk: 128 },
    // One chunk with thousands of candidates, and a budget that takes all.
    LighthouseConfig { levels: 2, pooling: 2, top_k: 128, chunk: 128 },
    LighthouseConfig { levels: 2, pooling: 2, top_k: 4096, chunk: 1024 },
];

fn shapes() -> impl Iterator<Item = Shape> {
    let shape =
        |batch, tokens, heads, kv_heads| Shape { batch, tokens, heads, kv_heads, head_dim: 8, element: Element::F32 };
    [shape(1, 9001, 1, 1), shape(2, 997, 4, 2), shape(1, 3000, 3, 1)].into_iter()
}

/// All combinations that spec section 9 allows.
fn cases(name: &str, score: impl Fn(u64, u64) -> f32 + Copy) {
    let mut run = 0;
    for config in CONFIGS {
        for shape in shapes().filter(|shape| config.pyramid(shape.tokens).is_ok()) {
            case(&format!("{name}, {config:?}, {shape:?}"), shape, config, score);
            run += 1;
        }
    }
    assert!(run >= 18, "only {run} combinations");
}

#[test]
fn select_matches_sorting() {
    cases("random scores of both signs", |tensor, i| data::uniform(1, tensor, i));
}

#[test]
fn ties_go_to_the_lower_index() {
    cases("few distinct scores", |tensor, i| (data::uniform(2, tensor, i) * 3.0).round());
    cases("equal scores", |_, _| 1.5);
    cases("zeros of both signs", |tensor, i| if data::uniform(3, tensor, i) < 0.0 { -0.0 } else { 0.0 });
}

#[test]
fn nan_ranks_below_every_number() {
    cases("NaN and infinities", |tensor, i| match (data::uniform(4, tensor, i) * 4.0) as i32 {
        -3 => f32::NEG_INFINITY,
        -2 => f32::NAN,
        2 => -f32::NAN,
        3 => f32::INFINITY,
        _ => data::uniform(5, tensor, i),
    });
}
