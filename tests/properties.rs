//! The invariants of spec sections 4 to 7 over random configs and shapes, against an implementation that is as naive as
//! the spec's text: sets and sorting, no pyramid walk.

mod support;

use std::collections::BTreeSet;

use lighthouse_attention::stage::{pool_score, scatter, select};
use lighthouse_attention::{Element, LighthouseConfig, Shape};
use proptest::prelude::*;
use support::{Probe, Target, Values, data};

/// A problem that spec section 9 allows.
fn problems() -> impl Strategy<Value = (LighthouseConfig, Shape)> {
    let config = (2usize..=5, 1u32..=3, 1usize..=4, 1usize..=4);
    let shape = (1usize..=2, 1usize..=400, 1usize..=2, 1usize..=2);
    (config, shape).prop_filter_map(
        "more chunks than coarsest entries",
        |((levels, log_pooling, half_chunk, chunks), (batch, tokens, kv_heads, group))| {
            let (pooling, chunk) = (1 << log_pooling, 2 * half_chunk);
            let config = LighthouseConfig { levels, pooling, top_k: chunk * chunks, chunk };
            let shape = Shape { batch, tokens, heads: kv_heads * group, kv_heads, head_dim: 8, element: Element::F32 };
            config.pyramid(tokens).is_ok().then_some((config, shape))
        },
    )
}

/// An entry of the pyramid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    level: usize,
    index: usize,
}

impl Entry {
    fn window(self, pooling: usize) -> std::ops::Range<usize> {
        let size = pooling.pow(self.level as u32);
        self.index * size..(self.index + 1) * size
    }
}

/// Squared norms of one head's tokens, those past the end included.
fn norms(x: &[f32], shape: &Shape, padded: usize, heads: usize, batch: usize, head: usize) -> Vec<f32> {
    let norm = |token| {
        let row = &x[((batch * shape.tokens + token) * heads + head) * shape.head_dim..][..shape.head_dim];
        row.iter().map(|x| x * x).sum()
    };
    (0..padded).map(|token| if token < shape.tokens { norm(token) } else { 0.0 }).collect()
}

/// Sections 4 and 5: the sub-sequence of one head, in its order, with the entries that are expanded.
fn select_naively(config: &LighthouseConfig, q: &[f32], k: &[f32]) -> (Vec<Entry>, BTreeSet<Entry>) {
    let LighthouseConfig { levels, pooling, top_k, chunk } = *config;
    let score = |norms: &[f32], entry: Entry| norms[entry.window(pooling)].iter().copied().fold(0.0, f32::max);
    // The k-th step of the cascade takes the best of `from` by one score; the lower index wins a tie.
    let best = |from: &BTreeSet<Entry>, norms: &[f32], count: usize| -> BTreeSet<Entry> {
        let mut sorted: Vec<Entry> = from.iter().copied().collect();
        sorted.sort_by(|&a, &b| score(norms, b).total_cmp(&score(norms, a)).then(a.index.cmp(&b.index)));
        sorted.into_iter().take(count).collect()
    };
    let n = q.len() / pooling.pow(levels as u32 - 1);
    let chunks = top_k / chunk;
    let (mut members, mut expanded) = (BTreeSet::new(), BTreeSet::new());
    for c in 0..chunks {
        let coarsest = (c * n / chunks..(c + 1) * n / chunks).map(|index| Entry { level: levels - 1, index });
        let mut candidates: BTreeSet<Entry> = coarsest.collect();
        for level in (1..levels).rev() {
            members.extend(&candidates);
            let selected = if candidates.len() <= chunk {
                candidates
            } else {
                let by_query = best(&candidates, q, chunk / 2);
                let by_key = best(&(&candidates - &by_query), k, chunk / 2);
                &by_query | &by_key
            };
            let children = |entry: &Entry| {
                let first = entry.index * pooling;
                (first..first + pooling).map(move |index| Entry { level: level - 1, index })
            };
            candidates = selected.iter().flat_map(children).collect();
            expanded.extend(selected);
        }
        members.extend(&candidates);
    }
    let mut order: Vec<Entry> = members.into_iter().collect();
    // An entry comes when all of its window has been seen; of those that end together, the finer first.
    order.sort_by_key(|entry| (entry.window(pooling).end, entry.level));
    (order, expanded)
}

/// Section 7: the tokens that an entry adds to.
fn tokens_of(entry: Entry, pooling: usize, tokens: usize) -> std::ops::Range<usize> {
    let window = entry.window(pooling);
    let start = (window.end - 1).min(tokens);
    start..(window.end - 1 + window.len()).min(tokens)
}

fn index(values: &Values) -> &[u32] {
    match values {
        Values::Index(values) => values,
        Values::Float(_) => panic!("numbers where indices belong"),
    }
}

fn float(values: &Values) -> &[f32] {
    match values {
        Values::Float(values) => values,
        Values::Index(_) => panic!("indices where numbers belong"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn gathered_length_is_that_of_the_naive_selection((config, shape) in problems()) {
        let pyramid = config.pyramid(shape.tokens).expect("allowed");
        let norms: Vec<f32> = (0..pyramid.padded_tokens as u64).map(|i| data::uniform(1, 0, i).abs()).collect();
        let (order, _) = select_naively(&config, &norms, &norms);
        prop_assert_eq!(pyramid.gathered, order.len());
        // Section 4's formula holds when every chunk has more than m candidates at each level.
        let n = pyramid.levels[config.levels - 1].entries;
        if n / config.chunks() > config.chunk {
            prop_assert_eq!(pyramid.gathered, n + (config.levels - 1) * config.pooling * config.top_k);
        }
    }

    #[test]
    fn selection_is_the_naive_one_and_keeps_the_invariants((config, shape) in problems(), seed in 0u64..1 << 20) {
        let pyramid = config.pyramid(shape.tokens).expect("allowed");
        let q = data::exact(seed, 0, &shape.q());
        let k = data::exact(seed, 1, &shape.kv());
        let outputs = Target::CpuF64.run(&|recording| {
            let mut probe = Probe::default();
            let inputs = [
                probe.input(recording, "q", Element::F32, &shape.q(), q.clone())?,
                probe.input(recording, "k", Element::F32, &shape.kv(), k.clone())?,
                probe.input(recording, "v", Element::F32, &shape.kv(), k.clone())?,
            ];
            let pooled = pool_score::record(recording, &shape, &pyramid, inputs)?;
            let selection = select::record(recording, &shape, &pyramid, [pooled.score_q, pooled.score_k])?;
            // With ones to scatter, an output counts its contributions.
            let gathered = [shape.batch, shape.heads, pyramid.gathered, shape.head_dim];
            let ones = vec![1.0; gathered.iter().product()];
            let ones = probe.input(recording, "ones", Element::F32, &gathered, ones)?;
            let counts = recording.external("counts", Element::F32, &shape.q())?;
            scatter::record_forward(recording, &shape, &pyramid, ones, selection.positions, counts)?;
            probe.outputs(recording, &[selection.indices, selection.positions, counts])?;
            Ok(probe)
        });
        let outputs = outputs.expect("runs");
        let (indices, positions, counts) = (index(&outputs[0]), index(&outputs[1]), float(&outputs[2]));

        for (at, indices) in indices.chunks_exact(pyramid.gathered).enumerate() {
            let (batch, head) = (at / shape.heads, at % shape.heads);
            let norms = |x: &[f32], heads, head| norms(x, &shape, pyramid.padded_tokens, heads, batch, head);
            let kv_head = head / shape.group();
            let (order, expanded) =
                select_naively(&config, &norms(&q, shape.heads, head), &norms(&k, shape.kv_heads, kv_head));
            let flat: Vec<u32> =
                order.iter().map(|entry| (pyramid.levels[entry.level].start + entry.index) as u32).collect();
            prop_assert_eq!(indices, &flat[..]);

            let mut covered = 0;
            let mut end = 0;
            for entry in &order {
                let window = entry.window(config.pooling);
                // Every entry before this one covers tokens up to this one's last only.
                prop_assert!(window.end >= end, "{:?} comes after an entry that sees up to token {}", entry, end);
                end = window.end;
                if !expanded.contains(entry) {
                    prop_assert_eq!(window.start, covered, "leaves tile the tokens");
                    covered = window.end;
                }
            }
            prop_assert_eq!(covered, pyramid.padded_tokens);

            let mut inverse = vec![select::ABSENT; pyramid.entries];
            for (place, entry) in order.iter().enumerate().filter(|(_, entry)| entry.level > 0) {
                let flag = if expanded.contains(entry) { select::EXPANDED } else { 0 };
                let row = pyramid.levels[entry.level].start + entry.index - pyramid.padded_tokens;
                inverse[row] = place as u32 | flag;
            }
            prop_assert_eq!(&positions[at * pyramid.entries..][..pyramid.entries], &inverse[..]);

            let mut contributions = vec![0; shape.tokens];
            for &entry in &order {
                contributions[tokens_of(entry, config.pooling, shape.tokens)].iter_mut().for_each(|count| *count += 1);
            }
            for (token, &count) in contributions.iter().enumerate() {
                prop_assert!(count <= config.levels);
                let row = ((batch * shape.tokens + token) * shape.heads + head) * shape.head_dim;
                prop_assert!(counts[row..][..shape.head_dim].iter().all(|&x| x == count as f32));
            }
        }
    }
}
