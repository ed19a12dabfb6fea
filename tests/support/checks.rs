//! The named checks that `tests/conformance.rs` and the example of that name run on every adapter and tier.

use std::sync::OnceLock;

use lighthouse_attention::stage::{gather, pool_score, scatter, select};
use lighthouse_attention::{Element, Error, LighthouseConfig, Recording, Result, Shape, Tensor};

use super::golden::Case;
use super::{Aspect, Expected, Outcome, Probe, Target, compare, data, devices, expect};

/// Records one problem of a check.
type Record = fn(&mut Recording, &Problem) -> Result<Probe>;

/// What a check computes on: a config and a shape, with the seed of the inputs.
#[derive(Clone, Debug)]
pub struct Problem {
    pub config: LighthouseConfig,
    pub shape: Shape,
    pub seed: u64,
}

/// The spread of spec section 9: tokens that nothing divides, GQA and MQA, levels 2 to 5, pooling 2, 4 and 8, budgets
/// that take a few entries and all.
fn problems(element: Element) -> Vec<Problem> {
    let problem = |(levels, pooling, top_k, chunk), (batch, tokens, heads, kv_heads, head_dim)| Problem {
        config: LighthouseConfig { levels, pooling, top_k, chunk },
        shape: Shape { batch, tokens, heads, kv_heads, head_dim, element },
        seed: tokens as u64,
    };
    vec![
        problem((2, 2, 8, 4), (1, 128, 1, 1, 8)),
        problem((2, 4, 16, 4), (2, 277, 4, 2, 24)),
        problem((3, 4, 32, 8), (1, 501, 3, 1, 64)),
        problem((4, 2, 32, 16), (1, 333, 2, 2, 128)),
        problem((5, 2, 16, 8), (1, 250, 2, 1, 40)),
        problem((3, 8, 128, 128), (1, 700, 1, 1, 256)),
    ]
}

/// All checks, those of the stages in the order of the layer's forward and backward.
pub fn table() -> Vec<Check> {
    let mut table = Vec::new();
    for element in [Element::F32, Element::F16] {
        let mut check = |name: &str, factor, record: Record| {
            table.push(Check::reference(format!("{name} {element}"), factor, record, problems(element)));
        };
        check("pool_score", FORWARD, pool_score);
        check("select", FORWARD, select);
        check("gather", FORWARD, gather);
        check("scatter", FORWARD, scatter);
        check("scatter backward", BACKWARD, scatter_backward);
        check("gather backward", BACKWARD, gather_backward);
    }
    table
}

/// How many times the error of the CPU in the same storage type a device may err (design section 6).
const FORWARD: f64 = 2.0;
const BACKWARD: f64 = 3.0;

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
    let out = scatter::record_backward(recording, shape, &pyramid, d_o, selection.indices)?;
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

/// A check by its name. A conformance run has a row for each, on each adapter and tier.
pub struct Check {
    pub name: String,
    body: Body,
}

enum Body {
    /// Against the float64 reference by the error rule.
    Reference { factor: f64, record: Record, problems: Vec<Problem>, expected: OnceLock<Result<Vec<Expected>>> },
    /// Against golden vectors.
    Golden(Box<Case>),
}

impl Check {
    fn reference(name: String, factor: f64, record: Record, problems: Vec<Problem>) -> Self {
        Self { name, body: Body::Reference { factor, record, problems, expected: OnceLock::new() } }
    }

    /// The check of a golden case.
    pub fn golden(case: Case) -> Self {
        Self { name: case.name.clone(), body: Body::Golden(Box::new(case)) }
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
            Body::Golden(_) => Ok(Vec::new()),
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
