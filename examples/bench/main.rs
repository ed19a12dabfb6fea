//! Measures this crate on this machine: attention, whole layers and single stages, beside the floor that bytes and
//! operations set and, with `--baseline`, beside what `tests/peers/pytorch.py` measured on the same card.
//!
//! `cargo run --release --example bench -- --help` says how; BENCHMARKS.md has results.

mod bench;
mod chart;
mod device;
mod groups;
mod report;
mod stats;
mod targets;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use lighthouse_attention::Error;

use crate::bench::{Bench, Sizes, one_line};
use crate::device::Device;
use crate::groups::{GROUPS, Group};
use crate::report::Report;

/// Any error ends in one line.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Measures attention, layers and stages on this machine.
#[derive(Parser)]
#[command(
    after_help = "Times are medians of warm runs, from the GPU's timestamps or, where it has none, from the wall \
                        clock; the spread is from the 10th to the 90th percentile. The floor of bytes goes by a copy \
                        measured in the same run, that of operations by cuBLAS's rate in the baseline."
)]
struct Args {
    /// Row groups: stages, attention, gemm, layer, operators, step or all [default: all]
    groups: Vec<String>,
    /// Sequence lengths in place of the default ones
    #[arg(long, value_delimiter = ',', value_name = "N,N..")]
    tokens: Option<Vec<usize>>,
    /// Heads in place of the default number
    #[arg(long)]
    heads: Option<usize>,
    /// Sequences at a time, of `attention` alone [default: 1]
    #[arg(long)]
    batch: Option<usize>,
    /// Key/value heads, of `attention` alone [default: as many as heads]
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Head dimension in place of the default
    #[arg(long)]
    head_dim: Option<usize>,
    /// all, vulkan, metal, dx12, gl or cpu
    #[arg(long, default_value = "all")]
    backend: String,
    /// Seconds of attention before anything is measured [default: 2.5; 0.5 on a software driver]
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    warmup: Option<f64>,
    /// Writes the rows
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Peers' rows, as tests/peers/pytorch.py writes them: adds floors of operations, ratios and marks
    #[arg(long, value_name = "FILE")]
    baseline: Option<PathBuf>,
    /// Draws the layer's time over its tokens
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Keeps the driver's pipelines, for tests/tools/nvidia_code.py: on Vulkan, in a folder of their own
    #[arg(long, value_name = "FOLDER")]
    pipelines: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            // Help. Where it cannot be printed there is nobody to tell.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            let message = error.to_string();
            eprintln!("bench: {}", message.lines().next().unwrap_or_default().trim_start_matches("error: "));
            return ExitCode::from(2);
        }
    };
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {}", one_line(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    let groups = parse_groups(&args.groups)?;
    let warmup = args.warmup.unwrap_or(0.0);
    if !(0.0..=3600.0).contains(&warmup) {
        return Err(format!("--warmup {warmup} is not allowed: it must be from 0 to 3600 seconds").into());
    }
    if args.tokens.as_ref().is_some_and(|tokens| tokens.contains(&0)) {
        return Err("--tokens 0 is not allowed: a sequence has at least 1".into());
    }
    if args.svg.is_some() && !groups.iter().any(|group| group.name == "layer") {
        return Err("--svg draws the rows of `layer`, which were not asked for".into());
    }
    for (option, given) in [("batch", args.batch.is_some()), ("kv-heads", args.kv_heads.is_some())] {
        if given && groups.iter().any(|group| group.name != "attention") {
            return Err(format!("--{option} is for `attention` alone: ask for that group only").into());
        }
    }
    let baseline = args.baseline.as_deref().map(Report::read).transpose()?;
    // Opened before the measuring, so that a path that cannot be written costs nothing.
    let json = args.json.map(create).transpose()?;
    let svg = args.svg.map(create).transpose()?;

    let device = Device::open(&args.backend, args.pipelines.as_deref())?;
    let mut sizes = Sizes::of(device.kind());
    sizes.batch = args.batch.unwrap_or(sizes.batch);
    sizes.heads = args.heads.unwrap_or(sizes.heads);
    sizes.kv_heads = args.kv_heads;
    sizes.head_dim = args.head_dim.unwrap_or(sizes.head_dim);
    let warmup = args.warmup.unwrap_or(sizes.warmup);
    println!("{}", device.name());
    println!("sizes for {}: {}", device.kind().name(), sizes.describe(args.tokens.as_deref()));
    if let Some(baseline) = &baseline {
        println!("baseline: {}", baseline.device);
    }

    let mut bench = Bench::start(device, sizes, args.tokens, warmup, baseline)?;
    // What was measured before an error is worth keeping.
    let outcome = groups.iter().try_for_each(|group| {
        report::print_header(group.name, group.about, bench.baseline.is_some());
        (group.run)(&mut bench)
    });
    targets::print(&targets::marks(&bench.report, bench.baseline.as_ref(), bench.bandwidth));
    if let Some(mut file) = json {
        serde_json::to_writer_pretty(&mut file, &bench.report)?;
        writeln!(file)?;
    }
    if let Some(mut file) = svg {
        match chart::layer(&bench.report, bench.baseline.as_ref()) {
            Some(svg) => file.write_all(svg.as_bytes())?,
            None => eprintln!("bench: no chart: no layer was measured"),
        }
    }
    outcome.and(bench.device.store_pipelines())
}

fn create(path: PathBuf) -> Result<File> {
    File::create(&path).map_err(|e| format!("{}: {e}", path.display()).into())
}

/// The groups that the words name, each once, in the order of [`GROUPS`].
fn parse_groups(words: &[String]) -> Result<Vec<&'static Group>> {
    let known = || GROUPS.iter().map(|group| group.name).chain(["all"]);
    if let Some(word) = words.iter().find(|word| !known().any(|name| name == *word)) {
        let known = known().collect::<Vec<_>>().join(", ");
        return Err(Error::Unknown { what: "row group", value: word.clone(), known }.into());
    }
    let all = words.is_empty() || words.iter().any(|word| word == "all");
    Ok(GROUPS.iter().filter(|group| all || words.iter().any(|word| word == group.name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(words: &[&str]) -> Result<Vec<&'static str>> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        Ok(parse_groups(&words)?.into_iter().map(|group| group.name).collect())
    }

    #[test]
    fn words_name_groups() {
        let all = ["stages", "attention", "gemm", "layer", "operators", "step"];
        assert_eq!(names(&[]).unwrap(), all);
        assert_eq!(names(&["layer", "all"]).unwrap(), all);
        assert_eq!(names(&["layer", "stages", "layer"]).unwrap(), ["stages", "layer"]);
        let message = names(&["layers"]).unwrap_err().to_string();
        assert!(
            message.contains("`layers`") && message.contains("stages, attention, gemm, layer, operators, step, all"),
            "{message}"
        );
    }

    #[test]
    fn options_are_read() {
        let args = Args::try_parse_from(["bench", "layer", "--tokens", "512,1024", "--warmup", "1.5"]).unwrap();
        assert_eq!((args.tokens, args.warmup), (Some(vec![512, 1024]), Some(1.5)));
        for bad in [["--tokens", "many"], ["--warmup", "x"], ["--nothing", "1"]] {
            assert!(Args::try_parse_from(["bench", bad[0], bad[1]]).is_err());
        }
    }
}
