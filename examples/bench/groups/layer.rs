//! A whole layer over N: Lighthouse Attention, and this crate's dense attention of the same tensors.

use std::ops::Range;

use lighthouse_attention::layer::{Forward, Gradients};
use lighthouse_attention::{DenseAttention, Element, LighthouseAttention, LighthouseConfig, Recording, Shape, Tensor};

use crate::Result;
use crate::bench::{Bench, Cost, Passes, Sizes, inputs};
use crate::groups::attention;
use crate::groups::stages::{BACKWARD_STAGES, FORWARD_STAGES, least_bytes};
use crate::report::{BOTH, FORWARD, Row, significant, thousands};

pub const LIGHTHOUSE: &str = "lighthouse";
pub const DENSE: &str = "dense";

pub fn run(bench: &mut Bench) -> Result<()> {
    let lengths = bench.tokens_or(&bench.sizes.layer);
    for &tokens in &lengths {
        let lighthouse = Lighthouse::new(&bench.sizes, tokens, None);
        measure_lighthouse(bench, &lighthouse)?;
        let Shape { heads, head_dim, element, .. } = *lighthouse.shape();
        let cost = |pass: &str| Cost { bytes: 0, flops: attention::flops(pass, tokens, heads, head_dim) };
        let sizes = [("tokens", tokens), ("heads", heads), ("head_dim", head_dim)];
        bench.measure_passes(DENSE, element, &sizes, cost, |bench| dense_passes(bench, *lighthouse.shape()))?;
    }
    for tokens in lengths {
        for pass in [FORWARD, BOTH] {
            let of = |name: &str| {
                let is_it = |row: &&Row| row.name == name && row.pass == pass && row.size("tokens") == Some(tokens);
                bench.report.rows.iter().find(is_it).map(|row| row.median_ms)
            };
            if let (Some(lighthouse), Some(dense)) = (of(LIGHTHOUSE), of(DENSE)) {
                let ratio = significant(dense / lighthouse);
                println!("lighthouse {pass} at {} is {ratio} times as fast as dense", thousands(tokens));
            }
        }
    }
    if let (Some(tokens), None) = (bench.sizes.growth, &bench.tokens) {
        growth(bench, tokens)?;
    }
    Ok(())
}

fn measure_lighthouse(bench: &mut Bench, lighthouse: &Lighthouse) -> Result<()> {
    let element = lighthouse.shape().element;
    let layer = match lighthouse.layer() {
        Ok(layer) => layer,
        Err(error) => {
            bench.skip(&Row::new(LIGHTHOUSE, "", element, &lighthouse.sizes()), &error.to_string());
            return Ok(());
        }
    };
    let cost = |pass: &str| cost(&layer, pass);
    bench.measure_passes(LIGHTHOUSE, element, &lighthouse.sizes(), cost, |bench| passes(bench, &layer))
}

/// The layer's time at the larger length over that at the smaller, with 4 levels and then 5 at an equal k. Both have
/// as many of the heads as the device holds at the larger length.
fn growth(bench: &mut Bench, [from, to]: [usize; 2]) -> Result<()> {
    let with = |bench: &Bench, heads: usize, tokens: usize, levels: usize| {
        let mut sizes = bench.sizes.clone();
        sizes.heads = heads;
        Lighthouse::new(&sizes, tokens, Some(levels))
    };
    let halves = std::iter::successors(Some(bench.sizes.heads), |heads| Some(heads / 2)).take_while(|heads| *heads > 0);
    let holds = |heads: &usize| {
        let layer = with(bench, *heads, to, 5).layer();
        layer.is_ok_and(|layer| recorded_lighthouse(bench, &layer).is_ok())
    };
    let Some(heads) = halves.into_iter().find(holds) else {
        println!("growth: not measured: the device does not hold one head of {} tokens", thousands(to));
        return Ok(());
    };
    let rows = bench.report.rows.len();
    for (tokens, levels) in [(from, 4), (to, 5)] {
        measure_lighthouse(bench, &with(bench, heads, tokens, levels))?;
    }
    for pass in [FORWARD, BOTH] {
        let measured = bench.report.rows.get(rows..).unwrap_or_default().iter();
        let times: Vec<f64> = measured.filter(|row| row.pass == pass).map(|row| row.median_ms).collect();
        if let [short, long] = times[..] {
            let (from, to) = (thousands(from), thousands(to));
            println!("growth of {pass} from {from} to {to}: {} times", significant(long / short));
        }
    }
    Ok(())
}

/// A Lighthouse layer's shape and config.
pub struct Lighthouse {
    shape: Shape,
    config: LighthouseConfig,
}

impl Lighthouse {
    /// The config for a length: the paper's at the lengths that the authors measured, k ~ N / 16 for short ones.
    pub fn new(sizes: &Sizes, tokens: usize, levels: Option<usize>) -> Self {
        let Sizes { heads, head_dim, .. } = *sizes;
        let shape = Shape { batch: 1, tokens, heads, kv_heads: heads, head_dim, element: Element::F16 };
        let by_length = match tokens {
            0..=131_072 => 3,
            131_073..=524_288 => 4,
            _ => 5,
        };
        let chunk = LighthouseConfig::default().chunk;
        let top_k = if tokens == 98_304 { 1536 } else { (tokens / 16 / chunk * chunk).clamp(chunk, 2048) };
        Self { shape, config: LighthouseConfig { levels: levels.unwrap_or(by_length), pooling: 4, top_k, chunk } }
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn layer(&self) -> Result<LighthouseAttention> {
        Ok(LighthouseAttention::new(self.config, self.shape)?)
    }

    /// The sizes that name its rows.
    pub fn sizes(&self) -> Vec<(&'static str, usize)> {
        let Shape { tokens, heads, head_dim, .. } = self.shape;
        let LighthouseConfig { levels, pooling, top_k, .. } = self.config;
        let mut sizes = vec![("tokens", tokens), ("heads", heads), ("head_dim", head_dim)];
        sizes.extend([("levels", levels), ("pooling", pooling), ("top_k", top_k)]);
        sizes.extend(self.config.pyramid(tokens).ok().map(|pyramid| ("gathered", pyramid.gathered)));
        sizes
    }
}

/// The least that a Lighthouse layer takes: its memory stages' traffic and its sub-sequence's attention.
pub fn cost(layer: &LighthouseAttention, pass: &str) -> Cost {
    let Shape { heads, head_dim, .. } = *layer.shape();
    let of = |stages: &[&str]| stages.iter().filter_map(|stage| least_bytes(stage, layer)).sum::<u64>();
    let backward = if pass == FORWARD { 0 } else { of(&BACKWARD_STAGES) };
    let flops = attention::flops(pass, layer.pyramid().gathered, heads, head_dim);
    Cost { bytes: of(&FORWARD_STAGES) + backward, flops }
}

/// A Lighthouse layer, ready to run.
pub fn passes(bench: &Bench, layer: &LighthouseAttention) -> Result<Passes> {
    recorded_lighthouse(bench, layer)?.passes(bench)
}

fn recorded_lighthouse(bench: &Bench, layer: &LighthouseAttention) -> Result<Recorded> {
    record(
        bench,
        layer.shape(),
        |recording, qkv| layer.record_forward(recording, qkv),
        |recording, forward, d_o| layer.record_backward(recording, forward, d_o),
    )
}

fn dense_passes(bench: &Bench, shape: Shape) -> Result<Passes> {
    let layer = DenseAttention::new(shape)?;
    let recorded = record(
        bench,
        &shape,
        |recording, qkv| layer.record_forward(recording, qkv),
        |recording, forward, d_o| layer.record_backward(recording, forward, d_o),
    )?;
    recorded.passes(bench)
}

/// A layer's recording, before anything is allocated.
struct Recorded {
    recording: Recording,
    inputs: [Tensor; 4],
    ranges: [(Range<usize>, Tensor); 2],
}

impl Recorded {
    fn passes(self, bench: &Bench) -> Result<Passes> {
        Ok(Passes { runner: bench.device.runner(self.recording, &self.inputs)?, ranges: self.ranges })
    }
}

fn record(
    bench: &Bench,
    shape: &Shape,
    forward: impl FnOnce(&mut Recording, [Tensor; 3]) -> lighthouse_attention::Result<Forward>,
    backward: impl FnOnce(&mut Recording, &Forward, Tensor) -> lighthouse_attention::Result<Gradients>,
) -> Result<Recorded> {
    let mut recording = Recording::new(&bench.device.caps());
    let shapes = [shape.q(), shape.kv(), shape.kv(), shape.q()];
    let [q, k, v, d_o] = inputs(&mut recording, shape.element, shapes)?;
    let forward = forward(&mut recording, [q, k, v])?;
    let at = recording.len();
    let gradients = backward(&mut recording, &forward, d_o)?;
    recording.keep(forward.o)?;
    recording.keep(gradients.dq)?;
    let ranges = [(0..at, forward.o), (0..recording.len(), gradients.dq)];
    Ok(Recorded { recording, inputs: [q, k, v, d_o], ranges })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Kind;

    #[test]
    fn configs_are_those_that_the_authors_measured() {
        let sizes = Sizes::of(Kind::Discrete);
        for (tokens, levels, top_k, gathered) in [
            (32_768, 3, 2048, 18_432),
            (98_304, 3, 1536, 18_432),
            (131_072, 3, 2048, 24_576),
            (262_144, 4, 2048, 28_672),
            (524_288, 4, 2048, 32_768),
        ] {
            let Lighthouse { config, .. } = Lighthouse::new(&sizes, tokens, None);
            assert_eq!((config.levels, config.pooling, config.top_k), (levels, 4, top_k));
            assert_eq!(config.pyramid(tokens).unwrap().gathered, gathered);
        }
    }

    #[test]
    fn every_default_length_has_a_layer() {
        for kind in [Kind::Discrete, Kind::Small, Kind::Software] {
            let sizes = Sizes::of(kind);
            for &tokens in sizes.layer.iter().chain(&sizes.stages) {
                assert!(Lighthouse::new(&sizes, tokens, None).layer().is_ok(), "{kind:?} {tokens}");
            }
        }
    }

    #[test]
    fn a_backward_adds_to_the_cost() {
        let layer = Lighthouse::new(&Sizes::of(Kind::Software), 4096, None).layer().unwrap();
        let [forward, both] = [FORWARD, BOTH].map(|pass| cost(&layer, pass));
        assert!(both.bytes > forward.bytes && 2 * both.flops == 7 * forward.flops);
    }
}
