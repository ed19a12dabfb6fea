//! Exact causal attention on contiguous heads, as a gathered sub-sequence has them, in both storage types.

use lighthouse_attention::stage::flash::{self, FlashShape, Layout};
use lighthouse_attention::{Element, Recording};

use crate::Result;
use crate::bench::{Bench, Cost, Passes, Sizes, inputs};
use crate::report::{FORWARD, UNUSUAL};

pub fn run(bench: &mut Bench) -> Result<()> {
    let Sizes { batch, heads, kv_heads, head_dim, .. } = bench.sizes;
    for element in [Element::F16, Element::F32] {
        for tokens in bench.tokens_or(&bench.sizes.attention) {
            let mut shape = vec![("tokens", tokens), ("heads", heads), ("head_dim", head_dim)];
            let unusual = [(batch != 1).then_some(batch), kv_heads.filter(|kv_heads| *kv_heads != heads)];
            shape.extend(UNUSUAL.into_iter().zip(unusual).filter_map(|(name, size)| Some((name, size?))));
            let cost =
                |pass: &str| Cost { bytes: 0, flops: flops(pass, tokens, batch.saturating_mul(heads), head_dim) };
            bench.measure_passes("flash", element, &shape, cost, |bench| passes(bench, tokens, element))?;
        }
    }
    Ok(())
}

/// Operations of exact causal attention as the field counts them: 2 S² H D forward, 5 S² H D backward.
pub fn flops(pass: &str, tokens: usize, heads: usize, head_dim: usize) -> u64 {
    let factor = if pass == FORWARD { 2 } else { 7 };
    let width = (heads as u64).saturating_mul(head_dim as u64);
    (tokens as u64).saturating_pow(2).saturating_mul(width).saturating_mul(factor)
}

/// Attention at the bench's batch and heads.
pub fn passes(bench: &Bench, tokens: usize, element: Element) -> Result<Passes> {
    let Sizes { batch, heads, kv_heads, head_dim, .. } = bench.sizes;
    let (kv_heads, layout) = (kv_heads.unwrap_or(heads), Layout::HeadsTokens);
    let shape = FlashShape { batch, tokens, heads, kv_heads, head_dim, element, layout };
    let mut recording = Recording::new(&bench.device.caps());
    let [q, k, v, d_o] = inputs(&mut recording, element, [shape.q(), shape.kv(), shape.kv(), shape.q()])?;
    let forward = flash::record_forward(&mut recording, &shape, [q, k, v], None)?;
    let at = recording.len();
    let gradients = flash::record_backward(&mut recording, &shape, [q, k, v], &forward, d_o, None)?;
    recording.keep(forward.o)?;
    recording.keep(gradients.dq)?;
    let ranges = [(0..at, forward.o), (0..recording.len(), gradients.dq)];
    Ok(Passes { runner: bench.device.runner(recording, &[q, k, v, d_o])?, ranges })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::BOTH;

    #[test]
    fn operations_are_counted_as_the_field_does() {
        assert_eq!(flops(FORWARD, 18_432, 8, 128), 695_784_701_952);
        assert_eq!(flops(BOTH, 4096, 8, 128), 7 * 4096 * 4096 * 1024);
    }
}
