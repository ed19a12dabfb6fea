//! Exact causal attention against the reference, forward and backward.

mod support;

use std::num::NonZeroUsize;
use std::sync::Arc;

use lighthouse_attention::stage::flash::{self, FlashShape, Layout};
use lighthouse_attention::{Caps, CpuExecutor, Element, Error, Executor, GpuExecutor, Recording, Result};
use support::{Build, Device, Probe, Values, check, compare, data, devices, expect};

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

/// Values of q, k, v and d_o by the golden vectors' formula.
fn uniform(shape: &FlashShape) -> [Vec<f32>; 4] {
    let axes = [shape.q(), shape.kv(), shape.kv(), shape.q()];
    std::array::from_fn(|tensor| data::tensor(shape.head_dim as u64, tensor as u64, &axes[tensor]))
}

/// The first element of a row of a tensor with so many heads.
fn row(shape: &FlashShape, heads: usize, (b, h, t): (usize, usize, usize)) -> usize {
    shape.head_dim
        * match shape.layout {
            TokensHeads => (b * shape.tokens + t) * heads + h,
            HeadsTokens => (b * heads + h) * shape.tokens + t,
        }
}

/// Records forward and backward; the outputs are o, lse, dq, dk, dv, or only the first two.
fn build(recording: &mut Recording, shape: &FlashShape, values: &[Vec<f32>; 4], backward: bool) -> Result<Probe> {
    let mut probe = Probe::default();
    let axes = [shape.q(), shape.kv(), shape.kv(), shape.q()];
    let mut input = |i: usize, name: &str| probe.input(recording, name, shape.element, &axes[i], values[i].clone());
    let (qkv, d_o) = ([input(0, "q")?, input(1, "k")?, input(2, "v")?], input(3, "d_o")?);
    let forward = flash::record_forward(recording, shape, qkv, None)?;
    probe.outputs(recording, &[forward.o, forward.lse])?;
    if backward {
        let out = flash::record_backward(recording, shape, qkv, &forward, d_o, None)?;
        probe.outputs(recording, &[out.dq, out.dk, out.dv])?;
        // A single token's dq and dk are zero because dP and delta are equal: two sums of D products, each with a
        // rounding of about sqrt(D) units, times 1 / sqrt(D).
        if shape.tokens == 1 {
            let largest = |i: usize| values[i].iter().fold(0.0, |largest: f64, &x| largest.max(f64::from(x).abs()));
            probe.terms = largest(2) * largest(3) * largest(0).max(largest(1));
        }
    }
    Ok(probe)
}

/// Both directions by the error rule, a factor of 2 forward and of 3 backward.
fn check_both(shape: &FlashShape, values: &[Vec<f32>; 4]) {
    check(&format!("forward of {shape:?}"), 2.0, &|recording| build(recording, shape, values, false));
    check(&format!("backward of {shape:?}"), 3.0, &|recording| build(recording, shape, values, true));
}

// Every class of head_dim, lengths that divide nothing, groups, batches, both layouts, both storage types; in three
// tests, because software drivers compile the matrix kernels for minutes, and tests run side by side.

#[test]
fn f32_matches_the_reference() {
    for shape in [
        shape((1, 1, 1, 1, 8), F32, HeadsTokens),
        shape((1, 31, 2, 2, 16), F32, TokensHeads),
        shape((2, 65, 4, 1, 64), F32, TokensHeads),
        shape((2, 127, 2, 2, 96), F32, HeadsTokens),
        shape((1, 97, 1, 1, 200), F32, TokensHeads),
        shape((1, 700, 2, 1, 32), F32, TokensHeads),
    ] {
        check_both(&shape, &uniform(&shape));
    }
}

#[test]
fn f16_matches_the_reference() {
    for shape in [
        shape((2, 2, 2, 1, 8), F16, TokensHeads),
        shape((1, 127, 4, 2, 24), F16, TokensHeads),
        shape((1, 290, 4, 2, 80), F16, HeadsTokens),
        shape((1, 64, 2, 1, 256), F16, TokensHeads),
    ] {
        check_both(&shape, &uniform(&shape));
    }
}

#[test]
fn f16_of_head_dim_128_matches_the_reference() {
    let shape = shape((1, 130, 3, 1, 128), F16, TokensHeads);
    check_both(&shape, &uniform(&shape));
}

/// Scores before the scale grow with the key from -30 to 30, so that every tile raises the maximum, and shrink for
/// every other query, so that the first tile outweighs all others.
fn growing(shape: &FlashShape) -> [Vec<f32>; 4] {
    let mut values = uniform(shape);
    let width = shape.head_dim;
    for t in 0..shape.tokens {
        let slope = (t as f32 / shape.tokens as f32 * 2.0 - 1.0) * 30.0 / width as f32;
        let sign = if t % 2 == 0 { 1.0 } else { -1.0 };
        for b in 0..shape.batch {
            for h in 0..shape.heads {
                values[0][row(shape, shape.heads, (b, h, t))..][..width].iter_mut().for_each(|q| *q = sign + 0.1 * *q);
            }
            for h in 0..shape.kv_heads {
                values[1][row(shape, shape.kv_heads, (b, h, t))..][..width]
                    .iter_mut()
                    .for_each(|k| *k = slope + 0.1 * *k);
            }
        }
    }
    values
}

#[test]
fn a_growing_maximum_rescales() {
    for element in [F32, F16] {
        let shape = shape((1, 200, 2, 1, 64), element, HeadsTokens);
        check_both(&shape, &growing(&shape));
    }
}

/// With many workgroups scores stay in registers where a device tells how it holds its matrices.
#[test]
fn many_workgroups_match_the_reference() {
    for (shape, growing_too) in [
        (shape((32, 150, 8, 4, 64), F16, TokensHeads), true),
        (shape((16, 130, 16, 16, 80), F16, HeadsTokens), false),
        (shape((16, 130, 16, 4, 112), F16, TokensHeads), false),
        (shape((16, 130, 16, 4, 128), F16, HeadsTokens), true),
        (shape((64, 65, 4, 1, 16), F32, TokensHeads), true),
        (shape((40, 65, 8, 1, 96), F32, HeadsTokens), false),
    ] {
        let forward = |values: &[Vec<f32>; 4]| {
            check(&format!("forward of {shape:?}"), 2.0, &|recording| build(recording, &shape, values, false));
        };
        forward(&uniform(&shape));
        if growing_too {
            forward(&growing(&shape));
        }
    }
}

/// What q, k, v and d_o, in this order, may hold in one element.
const NON_FINITE: [(usize, f32); 6] =
    [(0, f32::NAN), (1, f32::NAN), (2, f32::NAN), (3, f32::NAN), (2, f32::INFINITY), (3, f32::NEG_INFINITY)];

/// NaN and infinities: the same elements are non-finite as in the reference, and nothing hangs.
#[test]
fn non_finite_inputs_reach_what_depends_on_them() {
    for (tensor, value) in NON_FINITE {
        for element in [F32, F16] {
            let shape = shape((1, 150, 2, 1, 24), element, TokensHeads);
            let mut values = uniform(&shape);
            let heads = [2, 1, 1, 2][tensor];
            for t in [45, 100] {
                values[tensor][row(&shape, heads, (0, heads - 1, t)) + 5] = value;
            }
            check_both(&shape, &values);
            check_with_scratch(&shape, &values, &[0]);
        }
    }
    for (tensor, value) in NON_FINITE.into_iter().filter(|(tensor, _)| *tensor < 3) {
        // Of head_dim 128 some of q is stored.
        let shape = shape((64, 150, 4, 1, [128, 16, 16][tensor]), F16, HeadsTokens);
        let mut values = uniform(&shape);
        for (b, t) in [(0, 45), (0, 100), (63, 100), (63, 149)] {
            values[tensor][row(&shape, [4, 1, 1][tensor], (b, 0, t)) + 5] = value;
        }
        let what = format!("forward of {shape:?} with {value} in tensor {tensor}");
        check(&what, 2.0, &|recording| build(recording, &shape, &values, false));
    }
}

/// Keys whose scores are minus infinity have no weight, whatever comes after them; rows that see no others have none at
/// all.
#[test]
fn scores_of_minus_infinity_have_no_weight() {
    let shape = shape((64, 150, 4, 1, 16), F16, HeadsTokens);
    let mut values = uniform(&shape);
    for b in [0, 63] {
        for (t, h) in (0..150).flat_map(|t| (0..4).map(move |h| (t, h))) {
            // Positive, so that no score is plus infinity.
            let q = &mut values[0][row(&shape, 4, (b, h, t)) + 5];
            *q = q.abs() + 0.1;
        }
        for t in 0..40 {
            values[1][row(&shape, 1, (b, 0, t)) + 5] = f32::NEG_INFINITY;
        }
    }
    check(&format!("forward of {shape:?}"), 2.0, &|recording| build(recording, &shape, &values, false));
}

/// The backward where devices with cooperative matrices have so many bytes of memory for d_scores.
fn check_with_scratch(shape: &FlashShape, values: &[Vec<f32>; 4], bytes: &[u64]) {
    let case: Build<'_> = &|recording| build(recording, shape, values, true);
    let expected = expect(case).expect("the CPU's part");
    for device in devices().iter().filter(|device| device.tier.matrix().is_some()) {
        for &bytes in bytes {
            let device = Device { gpu: device.gpu.clone().with_scratch_bytes(bytes), ..device.clone() };
            for outcome in compare(&device, &expected, 3.0, case).unwrap_or_else(|e| panic!("{shape:?}: {e}")) {
                let on = format!("{shape:?} in {bytes} bytes on {}, {}", device.adapter, device.tier);
                assert!(outcome.passed(), "{on}: {outcome:?}");
            }
        }
    }
}

/// With and without memory for d_scores; a batch, a group, lengths that divide nothing, an odd number of matrices.
#[test]
fn a_backward_without_scratch_matches_the_reference() {
    for shape in [shape((2, 150, 4, 2, 24), F16, TokensHeads), shape((1, 290, 1, 1, 16), F16, HeadsTokens)] {
        check_with_scratch(&shape, &uniform(&shape), &[0]);
    }
}

/// Few heads at a time, as where the cache does not hold what all read: the same bits. (Of so many workgroups that the
/// kernel is the same whatever the number of multiprocessors.)
#[test]
fn few_heads_at_a_time_give_the_same_bits() -> Result<()> {
    let shape = shape((4, 700, 16, 8, 32), F16, TokensHeads);
    let values = uniform(&shape);
    let case = |recording: &mut Recording| build(recording, &shape, &values, true);
    for device in devices().iter().filter(|device| device.tier.matrix().is_some()) {
        let all = Caps { scratch_bytes: 0, ..device.gpu.caps().clone() };
        let few = Caps { processors: NonZeroUsize::MIN, ..all.clone() };
        let units = |caps: &Caps| {
            let mut recording = Recording::new(caps);
            case(&mut recording)?;
            Result::Ok(recording.commands().iter().map(|command| format!("{command:?}")).collect::<Vec<_>>())
        };
        let on = format!("{shape:?} on {}, {}", device.adapter, device.tier);
        assert_ne!(units(&all)?, units(&few)?, "{on}");
        for (expected, got) in run(Some((device, &all)), &case)?.iter().zip(run(Some((device, &few)), &case)?) {
            assert!(same_bits(expected, &got), "{on}");
        }
    }
    Ok(())
}

/// d_scores of some heads or some queries at a time, and several workgroups for dq of a block.
#[test]
fn a_backward_in_chunks_matches_the_reference() -> Result<()> {
    for (shape, budgets) in [
        // Of few kv heads, workgroups that share a block of keys: in two chunks of queries, then in one; of both batch
        // entries.
        (shape((2, 1290, 2, 1, 16), F16, TokensHeads), vec![5_000_000, 1 << 24]),
        (shape((1, 2100, 3, 1, 16), F16, HeadsTokens), vec![4_000_000, 8_000_000, 1 << 24]),
        // Of many, a head of each group at a time, then whole groups.
        (shape((1, 1290, 16, 8, 16), F16, HeadsTokens), vec![19_200_000, 1 << 26]),
        // Some heads, then all; chunks of queries.
        (shape((1, 768, 64, 64, 16), F16, HeadsTokens), vec![24_000_000, 1 << 26]),
        (shape((1, 4400, 1, 1, 16), F16, HeadsTokens), vec![1 << 23, 3 << 22, 1 << 26]),
    ] {
        let values = uniform(&shape);
        let case = |recording: &mut Recording| build(recording, &shape, &values, true);
        for device in devices().iter().filter(|device| device.tier.matrix().is_some()) {
            let mut counts = Vec::new();
            for &scratch_bytes in &budgets {
                let caps = Caps { scratch_bytes, ..device.gpu.caps().clone() };
                let mut recording = Recording::new(&caps);
                case(&mut recording)?;
                counts.push(dispatches(&recording));
                let expected = run(Some((device, &caps)), &case)?;
                let caps = Caps { work_per_dispatch: 1 << 22, ..caps };
                for (expected, got) in expected.iter().zip(run(Some((device, &caps)), &case)?) {
                    let on = format!("{shape:?} on {}, {}", device.adapter, device.tier);
                    assert!(same_bits(expected, &got), "{on}, in {scratch_bytes} bytes");
                }
            }
            assert!(counts.is_sorted_by(|more, fewer| more > fewer), "{counts:?} dispatches");
        }
        check_with_scratch(&shape, &values, &budgets);
    }
    Ok(())
}

/// The same with NaN and infinities, before and after chunks begin.
#[test]
fn non_finite_inputs_pass_from_chunk_to_chunk() {
    for (tensor, value) in NON_FINITE {
        // Chunks of queries; parts of a group in chunks, of which the last or the first has them; a head of each group at a
        // time likewise.
        for (tokens, heads, kv_heads, at, bytes) in [
            (1290, 1, 1, 0, 1_500_000),
            (1290, 2, 1, 1, 3_000_000),
            (1290, 2, 1, 0, 3_000_000),
            (1290, 16, 8, 1, 19_200_000),
            (1290, 16, 8, 0, 19_200_000),
        ] {
            if at > 0 && ![0, 3].contains(&tensor) {
                // Of k and v the first head alone has them, as in another case.
                continue;
            }
            let shape = shape((1, tokens, heads, kv_heads, 16), F16, TokensHeads);
            let mut values = uniform(&shape);
            let heads = if [0, 3].contains(&tensor) { heads } else { kv_heads };
            for t in [45, tokens - 290, tokens - 261] {
                values[tensor][row(&shape, heads, (0, at, t)) + 5] = value;
            }
            check_with_scratch(&shape, &values, &[bytes]);
        }
    }
}

/// Runs a case on a device with other capabilities than its own, or on the CPU; the outputs in order.
fn run(device: Option<(&Device, &Caps)>, build: Build<'_>) -> Result<Vec<Vec<f32>>> {
    let caps = Caps::cpu();
    let mut recording = Recording::new(device.map_or(&caps, |(_, caps)| caps));
    let probe = build(&mut recording)?;
    let recording = Arc::new(recording);
    let mut executor: Box<dyn Executor> = match device {
        Some((device, _)) => Box::new(GpuExecutor::new(&device.gpu, recording, &[])?),
        None => Box::new(CpuExecutor::<f32>::new(recording)),
    };
    for (tensor, values) in &probe.inputs {
        match values {
            Values::Float(values) => executor.write(*tensor, values)?,
            Values::Index(values) => executor.write_u32(*tensor, values)?,
        }
    }
    executor.run()?;
    probe.outputs.iter().map(|&tensor| executor.read(tensor)).collect()
}

/// On the CPU and on every device.
fn everywhere(build: Build<'_>) -> Vec<(String, Vec<Vec<f32>>)> {
    let on = |device: Option<&Device>| {
        let name = device.map_or("the CPU".into(), |device| format!("{}, {}", device.adapter, device.tier));
        let outputs = run(device.map(|device| (device, device.gpu.caps())), build);
        (name.clone(), outputs.unwrap_or_else(|e| panic!("{name}: {e}")))
    };
    std::iter::once(None).chain(devices().iter().map(Some)).map(on).collect()
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// NaN in q, k, v and d_o from a token on: outputs and gradients of q before it keep their bits. NaN in q and d_o at
/// one token: gradients of k and v after it do, and so do all other rows.
#[test]
fn nothing_reaches_an_earlier_token() {
    for (element, layout) in [(F32, TokensHeads), (F16, HeadsTokens)] {
        let shape = shape((1, 150, 2, 1, 24), element, layout);
        let clean = uniform(&shape);
        let expected = everywhere(&|recording| build(recording, &shape, &clean, true));
        for token in [1, 40, 63, 64, 110] {
            let (mut later, mut at) = (clean.clone(), clean.clone());
            for (tensor, heads) in [2, 1, 1, 2].into_iter().enumerate() {
                for h in 0..heads {
                    for t in token..shape.tokens {
                        later[tensor][row(&shape, heads, (0, h, t))..][..24].fill(f32::NAN);
                    }
                    if tensor == 0 || tensor == 3 {
                        at[tensor][row(&shape, heads, (0, h, token))..][..24].fill(f32::NAN);
                    }
                }
            }
            let later = everywhere(&|recording| build(recording, &shape, &later, true));
            let at = everywhere(&|recording| build(recording, &shape, &at, true));
            for (((name, expected), (_, later)), (_, at)) in expected.iter().zip(&later).zip(&at) {
                let what = format!("{shape:?}, token {token} on {name}");
                for t in 0..shape.tokens {
                    for (output, heads) in [(0, 2), (2, 2), (3, 1), (4, 1)] {
                        for h in 0..heads {
                            let rows = row(&shape, heads, (0, h, t))..row(&shape, heads, (0, h, t)) + 24;
                            let same = |got: &[Vec<f32>]| {
                                same_bits(&expected[output][rows.clone()], &got[output][rows.clone()])
                            };
                            if heads == 2 {
                                assert_eq!(
                                    same(later),
                                    t < token,
                                    "{what}: row {t} of output {output}, NaN from the token on"
                                );
                                assert_eq!(
                                    same(at),
                                    t != token,
                                    "{what}: row {t} of output {output}, NaN at the token"
                                );
                            } else {
                                assert_eq!(same(at), t > token, "{what}: row {t} of output {output}, NaN at the token");
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The references' gradients are those of the references' forward.
#[test]
fn gradients_match_finite_differences() -> Result<()> {
    for layout in [TokensHeads, HeadsTokens] {
        let shape = shape((2, 9, 4, 2, 8), F32, layout);
        let values: [Vec<f64>; 4] = uniform(&shape).map(|x| x.into_iter().map(f64::from).collect());
        let mut recording = Recording::new(&Caps::cpu());
        let probe = build(&mut recording, &shape, &uniform(&shape), true)?;
        let mut executor = CpuExecutor::<f64>::new(Arc::new(recording));
        let mut evaluate = |values: &[Vec<f64>; 4]| -> Result<Vec<Vec<f64>>> {
            for ((tensor, _), values) in probe.inputs.iter().zip(values) {
                executor.set(*tensor, values)?;
            }
            executor.run()?;
            probe.outputs.iter().map(|&tensor| executor.get(tensor)).collect()
        };
        let gradients = evaluate(&values)?;
        for (tensor, gradient) in gradients[2..].iter().enumerate() {
            for i in (0..gradient.len()).step_by(13) {
                let mut loss = |step: f64| -> Result<f64> {
                    let mut values = values.clone();
                    values[tensor][i] += step;
                    let o: &[f64] = &evaluate(&values)?[0];
                    Ok(o.iter().zip(&values[3]).map(|(o, d_o)| o * d_o).sum())
                };
                let difference = (loss(1e-5)? - loss(-1e-5)?) / 2e-5;
                approx::assert_abs_diff_eq!(gradient[i], difference, epsilon = 1e-8);
            }
        }
    }
    Ok(())
}

fn dispatches(recording: &Recording) -> usize {
    recording.commands().iter().map(|command| format!("{command:?}").matches("Dispatch {").count()).sum()
}

/// Bindings too small for the batch and dispatches too long for the watchdog are cut, and the bits stay.
#[test]
fn cut_runs_give_the_same_bits() -> Result<()> {
    for (element, layout) in [(F32, TokensHeads), (F16, HeadsTokens)] {
        // A batch entry of every tensor is a multiple of 256 bytes, which any device can bind.
        let shape = shape((3, 192, 2, 1, 16), element, layout);
        let values = uniform(&shape);
        let case = |recording: &mut Recording| build(recording, &shape, &values, true);
        for device in devices() {
            // Where d_scores are kept, other kernels make dq: the cuts of those follow.
            let whole = &Caps { scratch_bytes: 0, ..device.gpu.caps().clone() };
            let expected = run(Some((device, whole)), &case)?;
            let entry = (shape.tokens * shape.heads * shape.head_dim) as u64 * element.bytes();
            let sliced = |entries: u64| {
                let mut caps = whole.clone();
                caps.limits.max_storage_buffer_binding_size = entries;
                caps
            };
            let plan = flash::plan(whole, shape.head_dim, element)?;
            let blocks = |rows| shape.tokens.div_ceil(rows);
            let units = 1 + 2 * blocks(plan.forward.block_m) + blocks(plan.dkdv.block_n) + 2 * blocks(plan.dq.block_m);
            for (caps, least) in [
                (sliced(2 * entry), 4 * 2),
                (sliced(entry), 4 * 3),
                (Caps { work_per_dispatch: 1, ..sliced(entry) }, 3 * units),
                (Caps { work_per_dispatch: 3_000_000, ..whole.clone() }, 4 + 3),
            ] {
                let mut recording = Recording::new(&caps);
                case(&mut recording)?;
                assert!(dispatches(&recording) >= least, "{} dispatches of at least {least}", dispatches(&recording));
                for (expected, got) in expected.iter().zip(run(Some((device, &caps)), &case)?) {
                    assert!(same_bits(expected, &got), "{shape:?} on {}, {}", device.adapter, device.tier);
                }
            }
            let expected = run(Some((device, device.gpu.caps())), &case)?;
            let caps = Caps { work_per_dispatch: 1, ..device.gpu.caps().clone() };
            for (expected, got) in expected.iter().zip(run(Some((device, &caps)), &case)?) {
                assert!(same_bits(expected, &got), "{shape:?} on {}, {}, with scratch", device.adapter, device.tier);
            }
            let refused = run(Some((device, &sliced(entry - 1))), &case);
            assert!(
                matches!(refused, Err(Error::Limit { limit: "max_storage_buffer_binding_size", .. })),
                "{refused:?}"
            );
        }
    }
    Ok(())
}

/// Outputs go where the caller wants them, and wrong tensors are refused by name.
#[test]
fn the_caller_can_supply_the_outputs() -> Result<()> {
    let shape = shape((1, 33, 2, 1, 16), F32, TokensHeads);
    let mut recording = Recording::new(&Caps::default());
    let mut external = |name: &str, axes: [usize; 4]| recording.external(name, F32, &axes);
    let [q, o, d_o, dq] =
        [external("q", shape.q())?, external("o", shape.q())?, external("d_o", shape.q())?, external("dq", shape.q())?];
    let [k, v, dk, dv] = [
        external("k", shape.kv())?,
        external("v", shape.kv())?,
        external("dk", shape.kv())?,
        external("dv", shape.kv())?,
    ];
    let forward = flash::record_forward(&mut recording, &shape, [q, k, v], Some(o))?;
    assert_eq!(forward.o, o);
    let into = flash::FlashGradients { dq, dk, dv };
    let out = flash::record_backward(&mut recording, &shape, [q, k, v], &forward, d_o, Some(into))?;
    assert_eq!([out.dq, out.dk, out.dv], [dq, dk, dv]);

    let refusal = |e: Result<flash::FlashForward>| e.err().map(|e| e.to_string()).unwrap_or_default();
    let message = refusal(flash::record_forward(&mut recording, &shape, [q, q, v], None));
    assert!(message.contains("as k it must hold"), "{message}");
    let message = refusal(flash::record_forward(&mut recording, &shape, [q, k, v], Some(dk)));
    assert!(message.contains("as o it must hold"), "{message}");
    let bad = FlashShape { head_dim: 20, ..shape };
    let message = refusal(flash::record_forward(&mut recording, &bad, [q, k, v], None));
    assert!(message.contains("head_dim = 20"), "{message}");
    Ok(())
}
