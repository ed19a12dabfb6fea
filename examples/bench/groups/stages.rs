//! The stages of one Lighthouse layer, forward and backward, each as a pass of its own in a layer's order.

use std::collections::BTreeMap;

use lighthouse_attention::{LighthouseAttention, Shape};

use crate::Result;
use crate::bench::{Bench, Passes};
use crate::device::Clock;
use crate::groups::layer::{Lighthouse, cost, passes};
use crate::report::{BOTH, FORWARD, Row};
use crate::stats::Timing;

pub fn run(bench: &mut Bench) -> Result<()> {
    for tokens in bench.tokens_or(&bench.sizes.stages) {
        let lighthouse = Lighthouse::new(&bench.sizes, tokens, None);
        let shape = *lighthouse.shape();
        let whole = Row::new("stages", BOTH, shape.element, &lighthouse.sizes());
        let layer = match lighthouse.layer() {
            Ok(layer) => layer,
            Err(error) => {
                bench.skip(&whole, &error.to_string());
                continue;
            }
        };
        let too_long = bench.too_long(BOTH, shape.element, cost(&layer, BOTH));
        if bench.is_far_too_long(BOTH, shape.element, cost(&layer, BOTH)) {
            bench.skip(&whole, &too_long.unwrap_or_default());
            continue;
        }
        let Passes { mut runner, ranges: [_, (range, written)] } = match passes(bench, &layer) {
            Ok(passes) => passes,
            Err(error) => {
                bench.skip(&whole, &error.to_string());
                continue;
            }
        };
        // Every stage works on what a whole run left, and a slow attention is run no further.
        runner.time(range.clone(), Clock::Wall)?;
        runner.expect_written(written)?;
        let mut spans = vec![range.clone()];
        if let Some(reason) = too_long {
            bench.skip(&Row { name: "flash".into(), ..whole }, &reason);
            spans = range.map(|at| at..at + 1).filter(|at| !runner.stage(at.start).starts_with("flash")).collect();
        }
        let clock = bench.clock;
        let runs = bench.budget.collect(|| {
            let mut times = Vec::new();
            for span in &spans {
                times.extend(runner.stage_times(span.clone(), clock)?);
            }
            Ok(times)
        })?;
        let mut samples: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for &(stage, milliseconds) in runs.iter().flatten() {
            samples.entry(stage).or_default().push(milliseconds);
        }
        for (stage, _) in runs.first().into_iter().flatten() {
            let Some(timing) = samples.get(stage).and_then(|samples| Timing::of(samples)) else { continue };
            let mut row = Row::new(stage, "", shape.element, &lighthouse.sizes());
            row.bytes = least_bytes(stage, &layer);
            row.flops = (*stage == "flash_forward").then(|| cost(&layer, FORWARD).flops);
            row.floor_ms = bench.floor_ms(shape.element, row.bytes, row.flops);
            bench.add(row.timed(timing, clock));
        }
    }
    Ok(())
}

/// The memory stages of a forward, and those that its backward adds.
pub const FORWARD_STAGES: [&str; 4] = ["pool_score", "select", "gather", "scatter"];
pub const BACKWARD_STAGES: [&str; 2] = ["scatter_backward", "gather_backward"];

/// Least traffic of a memory stage (spec section 11): the pyramid's P entries are its N / (p - 1), counted exactly, and a
/// stage that stands between two others also moves the sub-sequence that it takes or gives. `None` for other stages.
pub fn least_bytes(stage: &str, layer: &LighthouseAttention) -> Option<u64> {
    let Shape { batch, tokens, heads, kv_heads, head_dim, element } = *layer.shape();
    let rows = |rows: usize| (batch * rows * head_dim) as u64 * element.bytes();
    let (entries, gathered) = (layer.pyramid().entries, layer.pyramid().gathered);
    let qkv_heads = heads + 2 * kv_heads;
    Some(match stage {
        "pool_score" => rows(qkv_heads * tokens) + rows(qkv_heads * entries),
        // The scores.
        "select" => (4 * batch * (heads + kv_heads) * entries) as u64,
        "gather" => 2 * rows(3 * heads * gathered),
        "scatter" | "scatter_backward" => rows(heads * gathered) + rows(heads * tokens),
        "gather_backward" => rows(3 * heads * gathered) + rows(qkv_heads * tokens),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Sizes;
    use crate::device::Kind;

    #[test]
    fn bytes_are_the_specs() {
        let lighthouse = Lighthouse::new(&Sizes::of(Kind::Discrete), 98_304, None);
        let layer = lighthouse.layer().unwrap();
        let (n, s, p, hd) = (98_304, 18_432, 98_304 / 4 + 98_304 / 16, 2 * 8 * 128);
        for (stage, bytes) in [
            ("pool_score", 3 * (n + p) * hd),
            ("select", 4 * 16 * p),
            ("gather", 6 * s * hd),
            ("scatter", (n + s) * hd),
            ("scatter_backward", (n + s) * hd),
            ("gather_backward", 3 * (n + s) * hd),
        ] {
            assert_eq!(least_bytes(stage, &layer), Some(bytes), "{stage}");
        }
        assert_eq!(least_bytes("flash_forward", &layer), None);
    }
}
