//! Pool and score against the reference.

mod support;

use lighthouse_attention::stage::pool_score;
use lighthouse_attention::{Element, LighthouseConfig, Shape};
use support::{Probe, check, data};

#[test]
fn pool_score_matches_the_reference() {
    let mut case = 0;
    for (levels, pooling) in [(2, 2), (2, 8), (3, 2), (3, 4), (4, 2), (5, 2), (3, 8)] {
        for (batch, tokens, heads, kv_heads, head_dim) in
            [(1, 64, 1, 1, 8), (2, 37, 4, 2, 24), (1, 1001, 3, 1, 64), (1, 130, 2, 2, 256)]
        {
            case += 1;
            let element = if case % 2 == 0 { Element::F16 } else { Element::F32 };
            let shape = Shape { batch, tokens, heads, kv_heads, head_dim, element };
            let config = LighthouseConfig { levels, pooling, top_k: 2, chunk: 2 };
            let name = format!("{config:?} {shape:?}");
            check(&name, 2.0, &|recording| {
                let mut probe = Probe::default();
                let q = probe.input(recording, "q", element, &shape.q(), data::tensor(case, 0, &shape.q()))?;
                let k = probe.input(recording, "k", element, &shape.kv(), data::tensor(case, 1, &shape.kv()))?;
                let v = probe.input(recording, "v", element, &shape.kv(), data::tensor(case, 2, &shape.kv()))?;
                let out = pool_score::record(recording, &shape, &config.pyramid(tokens)?, [q, k, v])?;
                probe.outputs(recording, &[out.pyramid, out.score_q, out.score_k])?;
                Ok(probe)
            });
        }
    }
}
