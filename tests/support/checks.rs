//! The named checks that `tests/conformance.rs` and the example of that name run on every adapter and tier.

use std::sync::OnceLock;

use lighthouse_attention::stage::flash::{self, FlashShape};
use lighthouse_attention::stage::{gather, pool_score, scatter, select};
use lighthouse_attention::{Element, Error, LighthouseAttention, LighthouseConfig, Recording, Result, Shape, Tensor};

use super::golden::Case;
use super::{Aspect, Expected, Outcome, Probe, Target, Values, compare, data, devices, expect, largest, max_error};

/// Records one problem of a check.
type Record = fn(&mut Recording, &Problem) -> Result<Probe>;

/// Looks at a property of a target's own results.
type Measure = fn(&Target, &Problem) -> Result<Vec<Outcome>>;

/// What a check computes on: a config and a shape, with the seed of the inputs.
#[derive(Clone, Debug)]
pub struct Problem {
    pub config: LighthouseConfig,
    pub shape: Shape,
    pub seed: u64,
}

fn problem(
    (levels, pooling, top_k, chunk): (usize, usize, usize, usize),
    (batch, tokens, heads, kv_heads, head_dim): (usize, usize, usize, usize, usize),
    element: Element,
) -> Problem {
    let config = LighthouseConfig { levels, pooling, top_k, chunk };
    let shape = Shape { batch, tokens, heads, kv_heads, head_dim, element };
    Problem { config, shape, seed: tokens as u64 }
}

/// The spread of spec section 9: tokens that nothing divides, GQA and MQA, levels 2 to 5, pooling 2, 4 and 8, budgets
/// that take a few entries and all. A software driver compiles for seconds for each head_dim, so there are few, and the
/// largest is for f32 alone: for f16 its kernels differ in nothing but loads and stores.
fn problems(element: Element) -> Vec<Problem> {
    let largest = if element == Element::F32 { 256 } else { 64 };
    vec![
        problem((2, 2, 8, 4), (1, 128, 1, 1, 8), element),
        problem((2, 4, 16, 4), (2, 277, 4, 2, 40), element),
        problem((3, 4, 32, 8), (1, 501, 3, 1, 64), element),
        problem((4, 2, 32, 16), (1, 333, 2, 2, 8), element),
        problem((5, 2, 16, 8), (1, 250, 2, 1, 64), element),
        problem((3, 8, 128, 128), (1, 700, 1, 1, largest), element),
    ]
}

/// The same for L = 1.
fn dense_problems(element: Element) -> Vec<Problem> {
    let one_level = (1, 2, 2, 2);
    vec![
        problem(one_level, (1, 3, 1, 1, 8), element),
        problem(one_level, (2, 65, 4, 2, 40), element),
        problem(one_level, (1, 301, 3, 1, 64), element),
    ]
}

/// Problems of both kinds with the head_dim of most models. A check of its own, because a software driver takes a minute
/// to compile the matrix kernels for it.
fn head_dim_128(element: Element) -> Vec<Problem> {
    vec![problem((3, 2, 32, 16), (1, 333, 2, 1, 128), element), problem((1, 2, 2, 2), (1, 301, 2, 1, 128), element)]
}

/// Problems of both kinds that are quick, for checks that run them in many variants; matrices take their head_dim.
fn small_problems(element: Element) -> Vec<Problem> {
    vec![problem((3, 2, 16, 4), (1, 157, 2, 1, 64), element), problem((1, 2, 2, 2), (1, 157, 2, 1, 64), element)]
}

/// A problem whose budget takes all candidates: no rounding of the scores can change the selection.
#[cfg(feature = "train")]
fn certain_problems(element: Element) -> Vec<Problem> {
    vec![problem((3, 2, 128, 128), (1, 157, 2, 1, 64), element)]
}

/// All checks, those of the stages in the order of the layer's forward and backward.
pub fn table() -> Vec<Check> {
    let mut table = Vec::new();
    for element in [Element::F32, Element::F16] {
        let name = |name: &str| format!("{name} {element}");
        let mut stage = |check: &str, factor, record: Record| {
            table.push(Check::reference(name(check), factor, record, problems(element)));
        };
        stage("pool_score", FORWARD, pool_score);
        stage("select", FORWARD, select);
        stage("gather", FORWARD, gather);
        stage("flash", FORWARD, flash);
        stage("scatter", FORWARD, scatter);
        stage("scatter backward", BACKWARD, scatter_backward);
        stage("flash backward", BACKWARD, flash_backward);
        stage("gather backward", BACKWARD, gather_backward);
        stage("layer", FORWARD, layer);
        stage("layer backward", BACKWARD, layer_backward);
        let mut dense = |check: &str, factor, record: Record| {
            table.push(Check::reference(name(check), factor, record, dense_problems(element)));
        };
        dense("dense layer", FORWARD, layer);
        dense("dense layer backward", BACKWARD, layer_backward);
        for (check, factor, record) in
            [("head_dim 128", FORWARD, layer as Record), ("head_dim 128 backward", BACKWARD, layer_backward)]
        {
            let check = Check::reference(name(check), factor, record, head_dim_128(element));
            table.push(Check { slow: Some(element), ..check });
        }
        table.push(Check::reference(name("equal scores"), BACKWARD, equal_scores, small_problems(element)));
        table.push(Check::property(name("causality"), causality, small_problems(element)));
        table.push(Check::property(name("NaN and infinity"), non_finite, small_problems(element)));
        #[cfg(feature = "train")]
        table.push(Check::property(name("training step"), super::training_step::measure, certain_problems(element)));
    }
    table
}

/// How many times the error of the CPU in the same storage type a device may err (design section 6).
const FORWARD: f64 = 2.0;
pub const BACKWARD: f64 = 3.0;

/// q, k and v whose selection is the same in any precision.
fn inputs(recording: &mut Recording, probe: &mut Probe, problem: &Problem) -> Result<[Tensor; 3]> {
    let Problem { shape, seed, .. } = problem;
    let mut input = |name, tensor, dims: &[usize]| {
        probe.input(recording, name, shape.element, dims, data::exact(*seed, tensor, dims))
    };
    Ok([input("q", 0, &shape.q())?, input("k", 1, &shape.kv())?, input("v", 2, &shape.kv())?])
}

/// An input for a stage's tensor of any shape.
fn input(
    recording: &mut Recording,
    probe: &mut Probe,
    problem: &Problem,
    name: &str,
    tensor: u64,
    dims: &[usize],
) -> Result<Tensor> {
    probe.input(recording, name, problem.shape.element, dims, data::tensor(problem.seed, tensor, dims))
}

fn pool_score(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let Problem { config, shape, .. } = problem;
    let mut probe = Probe::default();
    let from = inputs(recording, &mut probe, problem)?;
    let out = pool_score::record(recording, shape, &config.pyramid(shape.tokens)?, from)?;
    probe.outputs(recording, &[out.pyramid, out.score_q, out.score_k])?;
    Ok(probe)
}

/// Records everything up to the selection.
fn selected(
    recording: &mut Recording,
    probe: &mut Probe,
    problem: &Problem,
) -> Result<([Tensor; 3], Tensor, select::Selection)> {
    let Problem { config, shape, .. } = problem;
    let pyramid = config.pyramid(shape.tokens)?;
    let from = inputs(recording, probe, problem)?;
    let pooled = pool_score::record(recording, shape, &pyramid, from)?;
    let selection = select::record(recording, shape, &pyramid, [pooled.score_q, pooled.score_k])?;
    Ok((from, pooled.pyramid, selection))
}

fn select(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let mut probe = Probe::default();
    let (_, _, selection) = selected(recording, &mut probe, problem)?;
    probe.outputs(recording, &[selection.indices, selection.positions])?;
    Ok(probe)
}

fn gather(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let Problem { config, shape, .. } = problem;
    let mut probe = Probe::default();
    let (from, pooled, selection) = selected(recording, &mut probe, problem)?;
    let pyramid = config.pyramid(shape.tokens)?;
    let out = gather::record_forward(recording, shape, &pyramid, from, pooled, selection.indices)?;
    probe.outputs(recording, &out)?;
    Ok(probe)
}

/// Shape of the gathered sub-sequence, `[B, H, S, D]`.
fn gathered(problem: &Problem) -> Result<[usize; 4]> {
    let Shape { batch, tokens, heads, head_dim, .. } = problem.shape;
    Ok([batch, heads, problem.config.pyramid(tokens)?.gathered, head_dim])
}

fn scatter(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let Problem { config, shape, .. } = problem;
    let mut probe = Probe::default();
    let (_, _, selection) = selected(recording, &mut probe, problem)?;
    let from = input(recording, &mut probe, problem, "gathered_o", 3, &gathered(problem)?)?;
    let o = recording.external("o", shape.element, &shape.q())?;
    scatter::record_forward(recording, shape, &config.pyramid(shape.tokens)?, from, selection.positions, o)?;
    probe.outputs(recording, &[o])?;
    Ok(probe)
}

fn scatter_backward(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let Problem { config, shape, .. } = problem;
    let mut probe = Probe::default();
    let (_, _, selection) = selected(recording, &mut probe, problem)?;
    let d_o = input(recording, &mut probe, problem, "d_o", 3, &shape.q())?;
    let pyramid = config.pyramid(shape.tokens)?;
    let out = scatter::record_backward(recording, shape, &pyramid, d_o, selection.positions)?;
    probe.outputs(recording, &[out])?;
    Ok(probe)
}

fn gather_backward(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let Problem { config, shape, .. } = problem;
    let mut probe = Probe::default();
    let (_, _, selection) = selected(recording, &mut probe, problem)?;
    let dims = gathered(problem)?;
    let mut input = |name, tensor| input(recording, &mut probe, problem, name, tensor, &dims);
    let from = [input("gathered_dq", 3)?, input("gathered_dk", 4)?, input("gathered_dv", 5)?];
    let out = [
        recording.external("dq", shape.element, &shape.q())?,
        recording.external("dk", shape.element, &shape.kv())?,
        recording.external("dv", shape.element, &shape.kv())?,
    ];
    gather::record_backward(recording, shape, &config.pyramid(shape.tokens)?, from, selection.positions, out)?;
    probe.outputs(recording, &out)?;
    Ok(probe)
}

fn flash(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let mut probe = Probe::default();
    let (shape, from) = flash_inputs(recording, &mut probe, problem)?;
    let out = flash::record_forward(recording, &shape, from, None)?;
    probe.outputs(recording, &[out.o, out.lse])?;
    Ok(probe)
}

/// Attention over the sub-sequence, on inputs that are not gathered ones: every row has weights of its own.
fn flash_inputs(recording: &mut Recording, probe: &mut Probe, problem: &Problem) -> Result<(FlashShape, [Tensor; 3])> {
    let shape = FlashShape::gathered(&problem.shape, problem.config.pyramid(problem.shape.tokens)?.gathered);
    let mut input = |name, tensor, dims: &[usize]| input(recording, probe, problem, name, tensor, dims);
    Ok((shape, [input("q", 0, &shape.q())?, input("k", 1, &shape.kv())?, input("v", 2, &shape.kv())?]))
}

fn flash_backward(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let mut probe = Probe::default();
    let (shape, from) = flash_inputs(recording, &mut probe, problem)?;
    let d_o = input(recording, &mut probe, problem, "d_o", 3, &shape.q())?;
    let forward = flash::record_forward(recording, &shape, from, None)?;
    let out = flash::record_backward(recording, &shape, from, &forward, d_o, None)?;
    probe.outputs(recording, &[out.dq, out.dk, out.dv])?;
    Ok(probe)
}

fn layer(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let mut probe = Probe::default();
    let from = inputs(recording, &mut probe, problem)?;
    let forward = LighthouseAttention::new(problem.config, problem.shape)?.record_forward(recording, from)?;
    let selection = forward.selection.map(|selection| selection.indices);
    probe.outputs(recording, &Vec::from_iter(selection))?;
    probe.outputs(recording, &[forward.o])?;
    Ok(probe)
}

fn layer_backward(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let values = |tensor, dims: &[usize]| match tensor {
        3 => data::tensor(problem.seed, tensor, dims),
        _ => data::exact(problem.seed, tensor, dims),
    };
    let mut probe = Probe::default();
    whole_layer(recording, &mut probe, problem, values)?;
    // The forward is a check of its own, by a bound of its own.
    probe.outputs.drain(..probe.outputs.len() - 3);
    Ok(probe)
}

/// Records a layer forward and backward on `values(t, shape)`, t being 0 for q, 1 for k, 2 for v and 3 for d_o. Outputs
/// are the indices where there are any, o, dq, dk and dv.
fn whole_layer(
    recording: &mut Recording,
    probe: &mut Probe,
    problem: &Problem,
    values: impl Fn(u64, &[usize]) -> Vec<f32>,
) -> Result<()> {
    let shape = &problem.shape;
    let mut input =
        |name, tensor, dims: [usize; 4]| probe.input(recording, name, shape.element, &dims, values(tensor, &dims));
    let from = [input("q", 0, shape.q())?, input("k", 1, shape.kv())?, input("v", 2, shape.kv())?];
    let d_o = input("d_o", 3, shape.q())?;
    let layer = LighthouseAttention::new(problem.config, *shape)?;
    let forward = layer.record_forward(recording, from)?;
    let gradients = layer.record_backward(recording, &forward, d_o)?;
    probe.outputs(recording, &Vec::from_iter(forward.selection.map(|selection| selection.indices)))?;
    probe.outputs(recording, &[forward.o, gradients.dq, gradients.dk, gradients.dv])
}

/// All tokens have the same norm, so that nothing but the tie rule selects.
fn equal_scores(recording: &mut Recording, problem: &Problem) -> Result<Probe> {
    let values = |tensor, dims: &[usize]| {
        let values = data::tensor(problem.seed, tensor, dims).into_iter();
        if tensor < 2 { values.map(|x| 0.5f32.copysign(x)).collect() } else { values.collect() }
    };
    let mut probe = Probe::default();
    whole_layer(recording, &mut probe, problem, values)?;
    Ok(probe)
}

/// A named count of what must not be.
fn none_of(output: impl Into<String>, count: usize) -> Outcome {
    Outcome { aspect: Aspect::Values, output: output.into(), error: count as f64, allowed: 0.0 }
}

/// The names of [`whole_layer`]'s float outputs.
const RESULTS: [&str; 4] = ["o", "dq", "dk", "dv"];

/// The float outputs of [`whole_layer`], run on a target.
fn results(target: &Target, problem: &Problem, values: &dyn Fn(u64, &[usize]) -> Vec<f32>) -> Result<Vec<Vec<f32>>> {
    let outputs = target.run(&|recording| {
        let mut probe = Probe::default();
        whole_layer(recording, &mut probe, problem, values)?;
        Ok(probe)
    })?;
    let floats = outputs.into_iter().filter_map(|values| match values {
        Values::Float(values) => Some(values),
        Values::Index(_) => None,
    });
    Ok(floats.collect())
}

/// No output depends on later tokens, with the indices held fixed (spec section 9): later tokens of q and k change their
/// signs, which keeps all norms, and those of v their values; o keeps its bits. Where d_o is 0 from a token on, so are
/// all gradients.
fn causality(target: &Target, problem: &Problem) -> Result<Vec<Outcome>> {
    let tokens = problem.shape.tokens;
    let mut outcomes = Vec::new();
    for cut in [1, tokens / 2, tokens - 1] {
        // One batch entry: an element's token is its place in the tensor.
        let later = |i: usize, len: usize| i >= cut * (len / tokens);
        let values = |changed: bool| {
            move |tensor, dims: &[usize]| {
                let mut values = data::exact(problem.seed, tensor, dims);
                let len = values.len();
                let late = values.iter_mut().enumerate().filter(|(i, _)| later(*i, len)).map(|(_, x)| x);
                match tensor {
                    0 | 1 if changed => late.for_each(|x| *x = -*x),
                    2 if changed => late.for_each(|x| *x += 1.0),
                    3 => late.for_each(|x| *x = 0.0),
                    _ => {}
                }
                values
            }
        };
        let (before, after) = (results(target, problem, &values(false))?, results(target, problem, &values(true))?);
        let pairs = before[0].iter().zip(&after[0]).enumerate();
        let differs = pairs.filter(|(_, (a, b))| a.to_bits() != b.to_bits()).map(|(i, _)| i);
        let (late, early): (Vec<usize>, Vec<usize>) = differs.partition(|&i| later(i, before[0].len()));
        outcomes.push(none_of(format!("o before token {cut}"), early.len()));
        // Otherwise this would check nothing.
        outcomes.push(none_of(format!("no change of o from token {cut} on"), usize::from(late.is_empty())));
        for (name, values) in RESULTS.iter().zip(&before).skip(1) {
            let count = values.iter().enumerate().filter(|(i, x)| later(*i, values.len()) && **x != 0.0).count();
            outcomes.push(none_of(format!("{name} from token {cut} on"), count));
        }
    }
    Ok(outcomes)
}

/// What depends on a NaN or an infinity is not finite: what the f64 reference says so of, is so on every target.
fn non_finite(target: &Target, problem: &Problem) -> Result<Vec<Outcome>> {
    let tokens = problem.shape.tokens;
    let mut outcomes = Vec::new();
    for (tensor, input) in ["q", "k", "v", "d_o"].into_iter().enumerate() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let values = |t: u64, dims: &[usize]| {
                let mut values = data::exact(problem.seed, t, dims);
                if t == tensor as u64 {
                    let middle = tokens / 2 * (values.len() / tokens);
                    values[middle] = value;
                }
                values
            };
            let (truth, got) = (results(&Target::CpuF64, problem, &values)?, results(target, problem, &values)?);
            for (name, (truth, got)) in RESULTS.iter().zip(truth.iter().zip(&got)) {
                let count = truth.iter().zip(got).filter(|(truth, got)| !truth.is_finite() && got.is_finite()).count();
                outcomes.push(none_of(format!("finite {name} of a {value} in {input}"), count));
            }
        }
    }
    Ok(outcomes)
}

/// A golden case's outcomes: indices exactly, float32 values within 5e-6 times the tensor's largest magnitude, at
/// least 1.
fn golden(target: &Target, case: &Case) -> Result<Vec<Outcome>> {
    let problem = Problem { config: case.config, shape: case.shape, seed: case.seed };
    let outputs = target.run(&|recording| {
        let mut probe = Probe::default();
        whole_layer(recording, &mut probe, &problem, |tensor, dims| data::tensor(case.seed, tensor, dims))?;
        Ok(probe)
    })?;
    let mut results = case.results.iter();
    let outcomes = outputs.into_iter().filter_map(|values| match (values, &case.indices) {
        (Values::Index(got), Some(expected)) => {
            Some(none_of("indices", expected.iter().zip(&got).filter(|(a, b)| a != b).count()))
        }
        (Values::Index(_), None) => None,
        (Values::Float(got), _) => results.next().map(|(name, expected)| {
            let expected: Vec<f64> = expected.iter().map(|&x| f64::from(x)).collect();
            let error = max_error(&expected, &case.pick(got));
            let allowed = 5e-6 * largest(&expected).max(1.0);
            Outcome { aspect: Aspect::Values, output: (*name).into(), error, allowed }
        }),
    });
    Ok(outcomes.collect())
}

/// A check by its name. A conformance run has a row for each, on each adapter and tier.
pub struct Check {
    pub name: String,
    /// A storage type whose matrix kernels are left to the tests where they are computed by a software driver.
    slow: Option<Element>,
    body: Body,
}

enum Body {
    /// Against the float64 reference by the error rule.
    Reference { factor: f64, record: Record, problems: Vec<Problem>, expected: OnceLock<Result<Vec<Expected>>> },
    /// Of a target's own results.
    Property { measure: Measure, problems: Vec<Problem> },
    /// Against golden vectors.
    Golden(Box<Case>),
}

impl Check {
    fn reference(name: String, factor: f64, record: Record, problems: Vec<Problem>) -> Self {
        Self { name, slow: None, body: Body::Reference { factor, record, problems, expected: OnceLock::new() } }
    }

    fn property(name: String, measure: Measure, problems: Vec<Problem>) -> Self {
        Self { name, slow: None, body: Body::Property { measure, problems } }
    }

    /// The check of a golden case.
    pub fn golden(case: Case) -> Self {
        Self { name: case.name.clone(), slow: None, body: Body::Golden(Box::new(case)) }
    }

    /// Runs the check.
    ///
    /// # Errors
    /// What the library reports; [`Error::Limit`] for what the device cannot hold.
    pub fn run(&self, target: &Target) -> Result<Vec<Outcome>> {
        match &self.body {
            Body::Reference { factor, record, problems, expected } => {
                // The CPU's part is the same for every target.
                let expect = || problems.iter().map(|p| expect(&|recording| record(recording, p))).collect();
                let expected = expected.get_or_init(expect).as_ref().map_err(Error::clone)?;
                let outcomes = expected.iter().zip(problems).map(|(expected, problem)| match target {
                    Target::Gpu(device) => compare(device, expected, *factor, &|r| record(r, problem)),
                    Target::CpuF32 | Target::CpuF64 => Ok(expected.on_cpu()),
                });
                outcomes.collect::<Result<Vec<_>>>().map(|outcomes| outcomes.concat())
            }
            Body::Property { measure, problems } => {
                let outcomes = problems.iter().map(|problem| measure(target, problem));
                outcomes.collect::<Result<Vec<_>>>().map(|outcomes| outcomes.concat())
            }
            Body::Golden(case) => golden(target, case),
        }
    }
}

/// How a check went on a target.
pub enum Verdict {
    /// The outcome that took most of what was allowed.
    Measured(Outcome),
    /// Why the target cannot run it.
    Skipped(String),
    /// Why there is no outcome.
    Broken(String),
}

/// A line of a conformance table.
pub struct Row {
    pub adapter: String,
    pub tier: &'static str,
    pub check: String,
    pub verdict: Verdict,
}

impl Verdict {
    fn of(outcomes: Vec<Outcome>) -> Self {
        match outcomes.into_iter().max_by(|a, b| a.share().total_cmp(&b.share())) {
            Some(worst) => Self::Measured(worst),
            None => Self::Broken("compared nothing".into()),
        }
    }

    pub fn word(&self) -> &'static str {
        match self {
            Self::Measured(outcome) if outcome.passed() => "pass",
            Self::Measured(_) | Self::Broken(_) => "fail",
            Self::Skipped(_) => "skip",
        }
    }
}

/// Runs checks on a target; `begin` is called with each check's name before it runs, `done` with each row. The last two
/// rows sum up what every comparison also looks at: equal bits in a second run, and nothing written past the outputs.
pub fn run(checks: &[Check], target: &Target, begin: impl Fn(&str), mut done: impl FnMut(Row)) {
    let mut row = |check: &str, verdict| {
        done(Row { adapter: target.adapter().to_owned(), tier: target.tier(), check: check.to_owned(), verdict });
    };
    let mut others = Vec::new();
    for check in checks {
        begin(&check.name);
        if check.slow.is_some_and(|element| target.has_software_matrices(element)) {
            let reason = "a software driver compiles these matrix kernels for a minute; tests/flash.rs has them";
            row(&check.name, Verdict::Skipped(reason.into()));
            continue;
        }
        let verdict = match check.run(target) {
            Ok(outcomes) => {
                let (values, rest) = outcomes.into_iter().partition(|outcome| outcome.aspect == Aspect::Values);
                others.extend::<Vec<Outcome>>(rest);
                Verdict::of(values)
            }
            Err(error @ Error::Limit { .. }) => Verdict::Skipped(error.to_string()),
            Err(error) => Verdict::Broken(error.to_string()),
        };
        row(&check.name, verdict);
    }
    for (name, aspect) in [("second run", Aspect::SecondRun), ("canaries", Aspect::Canary)] {
        let of_aspect: Vec<Outcome> = others.iter().filter(|outcome| outcome.aspect == aspect).cloned().collect();
        if !of_aspect.is_empty() {
            row(name, Verdict::of(of_aspect));
        }
    }
}

/// Runs checks on the CPU and on every device and reports all failures together.
pub fn assert_all_pass(checks: &[Check]) {
    let mut failures = Vec::new();
    let mut count = 0;
    let devices = devices().iter().cloned().map(|device| Target::Gpu(Box::new(device)));
    for target in [Target::CpuF32, Target::CpuF64].into_iter().chain(devices) {
        let done = |Row { adapter, tier, check, verdict }| {
            count += 1;
            match verdict {
                Verdict::Measured(outcome) if outcome.passed() => {}
                Verdict::Measured(outcome) => failures.push(format!("{adapter}, {tier}, {check}: {outcome:?}")),
                Verdict::Skipped(reason) => eprintln!("{adapter}, {tier}, {check}: skipped, {reason}"),
                Verdict::Broken(reason) => failures.push(format!("{adapter}, {tier}, {check}: {reason}")),
            }
        };
        run(checks, &target, |_| {}, done);
    }
    assert!(count > 0 && failures.is_empty(), "{} of {count} failed:\n{}", failures.len(), failures.join("\n"));
}
