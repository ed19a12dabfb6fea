//! Trains a small byte-level language model with Lighthouse Attention on real text: by default the sources of this crate
//! and of its dependencies. A step (forward, backward and optimizer) is recorded once and replayed; only the loss comes
//! back. The last steps attend densely, and the held-out loss is that of the dense model.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use lighthouse_attention::model::ModelConfig;
use lighthouse_attention::train::{Corpus, Trainer, TrainerConfig, crate_sources};
use lighthouse_attention::{Element, Error, Gpu, LighthouseConfig, Result};

#[derive(Parser)]
#[command(about = "Trains a byte-level language model with Lighthouse Attention")]
struct Options {
    /// Optimizer steps
    #[arg(long)]
    steps: Option<usize>,
    /// Tokens of a sequence
    #[arg(long)]
    tokens: Option<usize>,
    /// Sequences of a step
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Columns of the residual stream
    #[arg(long)]
    width: Option<usize>,
    /// Blocks of attention and feed-forward
    #[arg(long)]
    layers: Option<usize>,
    /// Query heads
    #[arg(long)]
    heads: Option<usize>,
    /// Key and value heads [default: as many as query heads]
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Columns of the feed-forward [default: 3/2 of the width, as in the paper, rounded up to 8]
    #[arg(long)]
    hidden: Option<usize>,
    /// Attention of the training steps
    #[arg(long, value_enum, default_value_t = Attention::Lighthouse)]
    attention: Attention,
    /// Layers that always attend densely, as `0,1,28,29` [default: first and last, from four layers on]
    #[arg(long, value_delimiter = ',')]
    dense_layers: Option<Vec<usize>>,
    /// Levels of the pyramid
    #[arg(long, default_value_t = 3)]
    levels: usize,
    /// Pooling factor
    #[arg(long, default_value_t = 4)]
    pooling: usize,
    /// Entries that are expanded per level [default: a 64th of the tokens, at least two chunks]
    #[arg(long)]
    top_k: Option<usize>,
    /// Budget of one chunk [default: 128, less for short sequences]
    #[arg(long)]
    chunk: Option<usize>,
    /// Share of the steps, the last ones, that attend densely
    #[arg(long, default_value_t = 0.2)]
    resume: f64,
    /// Storage of activations: f32 or f16
    #[arg(long)]
    element: Option<Element>,
    /// Peak learning rate [default: 0.04 / sqrt(width)]
    #[arg(long)]
    learning_rate: Option<f32>,
    /// all, vulkan, metal, dx12, gl or cpu
    #[arg(long, default_value = "all")]
    backend: String,
    /// A file or a folder of text [default: the sources of this crate and its dependencies]
    #[arg(long)]
    data: Option<PathBuf>,
    /// Seed of parameters and samples
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Measure one step stage by stage after the last one
    #[arg(long)]
    profile: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Attention {
    Lighthouse,
    Dense,
}

/// Sizes by what the machine can do in a minute or two.
struct Defaults {
    steps: usize,
    tokens: usize,
    width: usize,
    layers: usize,
    heads: usize,
    element: Element,
}

fn defaults(gpu: Option<&Gpu>) -> Defaults {
    match gpu {
        Some(gpu) if !gpu.is_software() => {
            Defaults { steps: 300, tokens: 16_384, width: 512, layers: 8, heads: 8, element: Element::F16 }
        }
        _ => Defaults { steps: 160, tokens: 512, width: 64, layers: 4, heads: 2, element: Element::F32 },
    }
}

/// Most bytes of the default text: enough for any run here, and read in a second.
const TEXT_LIMIT: usize = 32 << 20;
/// Held-out tokens that are evaluated.
const HELD_OUT_TOKENS: usize = 16 << 10;

/// Where compiled pipelines are kept between runs.
fn cache_folder() -> PathBuf {
    let home = || std::env::home_dir().map(|home| home.join(".cache"));
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
    base.unwrap_or_else(std::env::temp_dir).join("lighthouse-attention")
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn config(options: &Options, gpu: Option<&Gpu>) -> Result<TrainerConfig> {
    let defaults = defaults(gpu);
    let tokens = options.tokens.unwrap_or(defaults.tokens);
    let width = options.width.unwrap_or(defaults.width);
    let layers = options.layers.unwrap_or(defaults.layers);
    let heads = options.heads.unwrap_or(defaults.heads);
    let steps = options.steps.unwrap_or(defaults.steps);
    if !(0.0..=1.0).contains(&options.resume) {
        return Err(Error::Parameter {
            parameter: "resume",
            value: options.resume.to_string(),
            allowed: "from 0 to 1".into(),
        });
    }
    let chunk = options.chunk.unwrap_or(if tokens < 16_384 { 16 } else { 128 });
    let top_k = options.top_k.unwrap_or((tokens / 64).next_multiple_of(chunk.max(1)).max(2 * chunk));
    let levels = if options.attention == Attention::Dense { 1 } else { options.levels };
    let ends = if layers >= 4 { vec![0, layers - 1] } else { Vec::new() };
    Ok(TrainerConfig {
        model: ModelConfig {
            batch: options.batch,
            tokens,
            width,
            layers,
            heads,
            kv_heads: options.kv_heads.unwrap_or(heads),
            hidden: options.hidden.unwrap_or((width * 3 / 2).next_multiple_of(8)),
            element: options.element.unwrap_or(defaults.element),
            attention: LighthouseConfig { levels, pooling: options.pooling, top_k, chunk },
            dense_layers: options.dense_layers.clone().unwrap_or(ends),
        },
        steps,
        resume_steps: (steps as f64 * options.resume).round() as usize,
        seed: options.seed,
        learning_rate: options.learning_rate.unwrap_or(0.04 / (width as f32).sqrt()),
        weight_decay: 0.1,
        clip_norm: 1.0,
    })
}

fn run(options: &Options) -> Result<()> {
    let gpu = Gpu::open(&options.backend)?.map(|gpu| gpu.with_pipeline_cache(&cache_folder()));
    let gpu = gpu.as_ref();
    let config = config(options, gpu)?;
    let tokens = config.model.tokens;
    let corpus = match &options.data {
        Some(path) => Corpus::read(path, tokens)?,
        None => {
            let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map_or(PathBuf::from("."), PathBuf::from);
            Corpus::from_files(&crate_sources(&manifest)?, TEXT_LIMIT, tokens)?
        }
    };
    let mut trainer = Trainer::new(gpu, config.clone())?;
    let model = &config.model;
    match gpu {
        Some(gpu) => println!("adapter     {}, tier {}", gpu.name(), gpu.caps().tier),
        None => println!("adapter     none: the CPU, with the references"),
    }
    println!(
        "model       {} parameters: {} layers, width {}, {} heads of {}, {}",
        trainer.model().table().count(),
        model.layers,
        model.width,
        model.heads,
        model.head_dim(),
        model.element
    );
    match options.attention {
        Attention::Dense => println!("attention   dense, {tokens} tokens"),
        Attention::Lighthouse => println!(
            "attention   Lighthouse, {tokens} tokens through {} entries (L = {}, p = {}, k = {}, m = {}); dense in layers {:?} and in the last {} steps",
            model.attention.pyramid(tokens)?.gathered,
            model.attention.levels,
            model.attention.pooling,
            model.attention.top_k,
            model.attention.chunk,
            model.dense_layers,
            config.resume_steps
        ),
    }
    println!("memory      {:.1} MiB", trainer.memory_bytes(gpu) as f64 / (1 << 20) as f64);
    println!(
        "text        {:.1} MiB, byte entropy {:.2} nats",
        corpus.len() as f64 / (1 << 20) as f64,
        corpus.byte_entropy()
    );
    let begin = Instant::now();
    trainer.start(gpu)?;
    println!("start       {:.2} s to compile and allocate", begin.elapsed().as_secs_f64());
    // A cache that cannot be written costs the next start some seconds and nothing else.
    if let Err(error) = gpu.map_or(Ok(()), Gpu::store_pipelines) {
        eprintln!("compiled pipelines are not kept: {error}");
    }

    let bar = ProgressBar::new(config.steps as u64).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  {eta} left").unwrap_or(ProgressStyle::default_bar()),
    );
    let begin = Instant::now();
    let mut shown = Instant::now();
    for step in 1..=config.steps {
        let segment = trainer.step(&corpus)?;
        // Reading the loss waits for the GPU, so it is read about five times a second and not after every step.
        if step == 1 || step == config.steps || shown.elapsed() > Duration::from_millis(200) {
            let loss = trainer.loss(&segment)?;
            let rate = (step * model.rows()) as f64 / begin.elapsed().as_secs_f64();
            bar.set_message(format!("loss {loss:.3}  {rate:.0} tokens/s"));
            bar.set_position(step as u64);
            if bar.is_hidden() && (step == 1 || step == config.steps || step.is_multiple_of((config.steps / 10).max(1)))
            {
                println!("step {step:>5}   loss {loss:.3}   {rate:.0} tokens/s");
            }
            shown = Instant::now();
        }
    }
    bar.finish();
    println!("trained     {} tokens in {:.1} s", config.steps * model.rows(), begin.elapsed().as_secs_f64());
    if options.profile {
        println!("{}", trainer.profile(&corpus)?);
    }
    let held_out = trainer.evaluate(&corpus, (HELD_OUT_TOKENS / model.rows()).max(1))?;
    println!("held-out loss {held_out:.2} nats, byte entropy {:.2} nats", corpus.byte_entropy());
    Ok(())
}
