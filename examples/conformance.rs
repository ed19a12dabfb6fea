//! Checks this machine's adapters: every stage and both layers, forward and backward, against the CPU's float64
//! references, or with `--golden DIR` against the golden vectors in a folder.
//!
//! Prints one row per adapter, tier and check. Exit status 1 if any fails, 2 if the arguments cannot be used.

#[path = "../tests/support/mod.rs"]
mod support;

use std::error::Error;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressStyle};
use lighthouse_attention::Error as LighthouseError;
use lighthouse_attention::gpu::NO_DRIVER_HINT;
use serde_json::{Value, json};
use support::checks::{Check, Row, Verdict, run, table};
use support::{Target, golden, open};

/// Checks this machine's adapters against the CPU's references.
#[derive(Parser)]
struct Arguments {
    /// Which adapters; all: each GPU once, by its best backend [default: LIGHTHOUSE_BACKEND, else all]
    #[arg(long, value_parser = PossibleValuesParser::new(["all", "cpu", "vulkan", "metal", "dx12", "gl"]))]
    backend: Option<String>,
    /// A folder with cases.toml and safetensors files: checks these and nothing else
    #[arg(long, value_name = "DIR")]
    golden: Option<PathBuf>,
    /// Also writes the rows to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if error.use_stderr() => {
            // The first paragraph, which is the error, as one line; usage is what `--help` is for.
            let message = error.to_string();
            eprintln!(
                "{}",
                message.lines().take_while(|line| !line.is_empty()).map(str::trim).collect::<Vec<_>>().join(" ")
            );
            return ExitCode::from(2);
        }
        Err(help) => help.exit(),
    };
    match conformance(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// Whether all checks passed.
fn conformance(arguments: &Arguments) -> Result<bool, Box<dyn Error>> {
    let backend = arguments.backend.clone().or_else(|| std::env::var("LIGHTHOUSE_BACKEND").ok());
    let backend = backend.unwrap_or_else(|| "all".into());
    let checks = match &arguments.golden {
        Some(dir) => golden::read(dir)?.into_iter().map(Check::golden).collect(),
        None => table(),
    };
    // Created before the checks run, so that a path that cannot be written is known at once.
    let json = arguments.json.as_deref().map(create).transpose()?;

    let (mut targets, mut rows) = gpus(&backend)?;
    targets.insert(0, Target::CpuF32);
    if arguments.golden.is_some() {
        targets.insert(1, Target::CpuF64);
    }

    let names = targets.iter().map(Target::adapter).chain(rows.iter().map(|row| row.adapter.as_str()));
    let width = names.map(str::len).max().unwrap_or(0);
    println!("{:width$}  tier      {:30} {:>9} {:>9}  result", "adapter", "check", "error", "allowed");
    rows.iter().for_each(|row| println!("{}", line(row, width)));
    let bar = ProgressBar::new((targets.len() * checks.len()) as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len}, {elapsed}: {msg}")?);
    for target in &targets {
        let begin = |check: &str| {
            bar.set_message(format!("{check}, {}, {}", target.tier(), target.adapter()));
            bar.inc(1);
        };
        let done = |row: Row| {
            bar.suspend(|| println!("{}", line(&row, width)));
            rows.push(row);
        };
        run(&checks, target, begin, done);
    }
    bar.finish_and_clear();

    let count = |word| rows.iter().filter(|row| row.verdict.word() == word).count();
    let (passed, failed, skipped) = (count("pass"), count("fail"), count("skip"));
    if let Some(file) = json {
        let rows: Vec<Value> = rows.iter().map(object).collect();
        let all = json!({ "rows": rows, "passed": passed, "failed": failed, "skipped": skipped });
        serde_json::to_writer_pretty(file, &all)?;
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0)
}

/// The backend's adapters with their tiers, and rows for those that cannot be checked. The CPU is all that is left where
/// a machine has none.
fn gpus(backend: &str) -> lighthouse_attention::Result<(Vec<Target>, Vec<Row>)> {
    let (mut targets, mut rows) = (Vec::new(), Vec::new());
    let adapters = open(backend)?;
    match backend {
        "cpu" => eprintln!("checking the CPU only; for a GPU, {NO_DRIVER_HINT}"),
        "all" if adapters.is_empty() => {
            eprintln!("no GPU adapter found: checking the CPU only; for a GPU, {NO_DRIVER_HINT}");
        }
        _ if adapters.is_empty() => {
            return Err(LighthouseError::NoAdapter { backends: backend.into(), hint: NO_DRIVER_HINT });
        }
        _ => {}
    }
    let mut lacking = None;
    for (adapter, devices) in adapters {
        let verdict = match devices {
            Ok(devices) => {
                targets.extend(devices.into_iter().map(|device| Target::Gpu(Box::new(device))));
                continue;
            }
            // LIGHTHOUSE_TIER names a tier that this adapter lacks; another may have it.
            Err(error @ LighthouseError::Tier { .. }) => {
                let reason = error.to_string();
                lacking = Some(error);
                Verdict::Skipped(reason)
            }
            Err(error) => Verdict::Broken(error.to_string()),
        };
        rows.push(Row { adapter, tier: "-", check: "open".into(), verdict });
    }
    match lacking {
        Some(error) if targets.is_empty() => Err(error),
        _ => Ok((targets, rows)),
    }
}

fn create(path: &Path) -> Result<File, String> {
    File::create(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// A row as it is printed.
fn line(row: &Row, width: usize) -> String {
    let Row { adapter, tier, check, verdict } = row;
    let result = verdict.word();
    let head = format!("{adapter:width$}  {tier:9} {check:30}");
    match verdict {
        Verdict::Measured(outcome) => {
            let output = if outcome.passed() { String::new() } else { format!(": {}", outcome.output) };
            format!("{head} {:>9.1e} {:>9.1e}  {result}{output}", outcome.error, outcome.allowed)
        }
        Verdict::Skipped(reason) | Verdict::Broken(reason) => {
            format!("{head} {:>9} {:>9}  {result}: {reason}", "-", "-")
        }
    }
}

/// A row for a machine; an error that is no number, such as that of an output which was never written, is null.
fn object(row: &Row) -> Value {
    let mut object = json!({
        "adapter": row.adapter,
        "tier": row.tier,
        "check": row.check,
        "result": row.verdict.word(),
    });
    match &row.verdict {
        Verdict::Measured(outcome) => {
            object["output"] = json!(outcome.output);
            object["error"] = json!(outcome.error);
            object["allowed"] = json!(outcome.allowed);
        }
        Verdict::Skipped(reason) | Verdict::Broken(reason) => object["reason"] = json!(reason),
    }
    object
}
