//! Bad input of every kind is a typed error that names what has to change; nothing panics. No GPU is needed: the
//! devices are noop ones.

#[path = "support/noop.rs"]
mod noop;

use std::sync::Arc;

use lighthouse_attention::gpu::{Gpu, parse_backends};
use lighthouse_attention::layer::Forward;
use lighthouse_attention::{
    Caps, CpuExecutor, DenseAttention, Element, Error, Executor, GpuExecutor, LighthouseAttention, LighthouseConfig,
    Recording, Result, Shape, Tensor, Tier, executor,
};
use proptest::prelude::*;

const CONFIG: LighthouseConfig = LighthouseConfig { levels: 2, pooling: 2, top_k: 8, chunk: 4 };
const SHAPE: Shape = Shape { batch: 1, tokens: 50, heads: 4, kv_heads: 2, head_dim: 16, element: Element::F32 };

/// Asserts that a result is an error of a variant, with these words in its message.
macro_rules! assert_error {
    ($result:expr, $variant:pat, $($words:expr),+) => {
        let error = $result.err().expect(concat!(stringify!($result), " is refused"));
        assert!(matches!(error, $variant), "{error:?} is no {}", stringify!($variant));
        let message = error.to_string();
        $(assert!(message.contains(&*$words), "{:?} is not in {message:?}", $words);)+
    };
}

fn inputs(recording: &mut Recording, shape: &Shape) -> Result<[Tensor; 3]> {
    Ok([
        recording.external("q", shape.element, &shape.q())?,
        recording.external("k", shape.element, &shape.kv())?,
        recording.external("v", shape.element, &shape.kv())?,
    ])
}

/// A layer's forward and backward.
fn record(caps: &Caps, config: LighthouseConfig, shape: Shape) -> Result<(Recording, [Tensor; 3], Forward)> {
    let layer = LighthouseAttention::new(config, shape)?;
    let mut recording = Recording::new(caps);
    let qkv = inputs(&mut recording, &shape)?;
    let d_o = recording.external("d_o", shape.element, &shape.q())?;
    let forward = layer.record_forward(&mut recording, qkv)?;
    layer.record_backward(&mut recording, &forward, d_o)?;
    recording.keep(forward.o)?;
    Ok((recording, qkv, forward))
}

#[test]
fn parameters_out_of_range() {
    let config = |levels, pooling, top_k, chunk| LighthouseConfig { levels, pooling, top_k, chunk };
    for (config, parameter, allowed) in [
        (config(2, 3, 8, 4), "pooling = 3", "a power of two"),
        (config(2, 1, 8, 4), "pooling = 1", "at least 2"),
        (config(2, 0, 8, 4), "pooling = 0", "at least 2"),
        (config(2, 2, 10, 4), "top_k = 10", "multiple of chunk = 4"),
        (config(2, 2, 0, 4), "top_k = 0", "positive"),
        (config(2, 2, 9, 3), "chunk = 3", "even"),
        (config(2, 2, 0, 0), "chunk = 0", "at least 2"),
        // 25 entries on level 1.
        (config(2, 2, 26 * 4, 4), "top_k = 104", "4 * 25 = 100"),
        (config(0, 2, 8, 4), "levels = 0", "from 1 to 16"),
        (config(17, 2, 8, 4), "levels = 17", "from 1 to 16"),
    ] {
        assert_error!(LighthouseAttention::new(config, SHAPE), Error::Parameter { .. }, parameter, allowed);
    }
    for (shape, parameter, allowed) in [
        (Shape { batch: 0, ..SHAPE }, "batch = 0", "at least 1"),
        (Shape { tokens: 0, ..SHAPE }, "tokens = 0", "at least 1"),
        (Shape { heads: 0, ..SHAPE }, "heads = 0", "at least 1"),
        (Shape { kv_heads: 0, ..SHAPE }, "kv_heads = 0", "at least 1"),
        (Shape { kv_heads: 3, ..SHAPE }, "kv_heads = 3", "a divisor of heads = 4"),
        (Shape { kv_heads: 8, ..SHAPE }, "kv_heads = 8", "a divisor of heads = 4"),
        (Shape { head_dim: 0, ..SHAPE }, "head_dim = 0", "from 8 to 256"),
        (Shape { head_dim: 20, ..SHAPE }, "head_dim = 20", "a multiple of 8"),
        (Shape { head_dim: 264, ..SHAPE }, "head_dim = 264", "from 8 to 256"),
        (Shape { element: Element::U32, ..SHAPE }, "element = u32", "f32 or f16"),
    ] {
        assert_error!(LighthouseAttention::new(CONFIG, shape), Error::Parameter { .. }, parameter, allowed);
        assert_error!(DenseAttention::new(shape), Error::Parameter { .. }, parameter, allowed);
    }
}

#[test]
fn words_that_name_nothing() {
    assert_error!("simt".parse::<Tier>(), Error::Unknown { .. }, "tier `simt`", "simt_f32, simt_f16");
    assert_error!("f64".parse::<Element>(), Error::Unknown { .. }, "element type `f64`", "f32, f16");
    assert_error!(parse_backends("cuda"), Error::Unknown { .. }, "backend `cuda`", "vulkan, metal, dx12, gl");
    assert_error!(Gpu::open("opengl"), Error::Unknown { .. }, "backend `opengl`");
    assert_error!(Gpu::new(wgpu::Backends::empty()), Error::NoAdapter { .. }, "install a Vulkan driver");
}

#[test]
fn a_tier_that_the_device_lacks() {
    for tier in [Tier::SimtF16, Tier::Coop8, Tier::Coop16] {
        assert_error!(noop::least().with_tier(tier), Error::Tier { .. }, tier.name(), "noop", "has: simt_f32");
        assert_error!(Caps::default().with_tier(tier, "some GPU"), Error::Tier { .. }, tier.name(), "some GPU");
    }
}

#[test]
fn tensors_that_do_not_fit() -> Result<()> {
    let layer = LighthouseAttention::new(CONFIG, SHAPE)?;
    let mut recording = Recording::new(&Caps::default());
    let [q, k, v] = inputs(&mut recording, &SHAPE)?;
    let is = |error: Option<Error>, tensor: &str| {
        assert!(matches!(&error, Some(Error::Tensor { tensor: named, .. }) if named == tensor), "{error:?}");
    };

    let half = recording.external("half", Element::F16, &SHAPE.q())?;
    let short = recording.external("short", Element::F32, &[1, 49, 4, 16])?;
    let ids = recording.external("ids", Element::U32, &SHAPE.kv())?;
    is(layer.record_forward(&mut recording, [half, k, v]).err(), "half");
    is(layer.record_forward(&mut recording, [short, k, v]).err(), "short");
    is(layer.record_forward(&mut recording, [q, ids, v]).err(), "ids");
    is(layer.record_forward(&mut recording, [q, k, q]).err(), "q");
    is(layer.record_forward_scored(&mut recording, [q, k, v], [short, short]).err(), "short");

    let forward = layer.record_forward(&mut recording, [q, k, v])?;
    is(layer.record_backward(&mut recording, &forward, short).err(), "short");

    // Another recording's tensors, and a forward of one.
    let mut other = Recording::new(&Caps::default());
    assert_error!(layer.record_forward(&mut other, [q, k, v]), Error::Tensor { .. }, "does not belong");
    let d_o = other.external("d_o", Element::F32, &SHAPE.q())?;
    assert_error!(layer.record_backward(&mut other, &forward, d_o), Error::Tensor { .. }, "does not belong");
    assert_error!(other.keep(v), Error::Tensor { .. }, "does not belong");
    assert_error!(other.info(v), Error::Tensor { .. }, "does not belong");

    assert_error!(recording.external("none", Element::F32, &[3, 0]), Error::Parameter { .. }, "[3, 0]", "`none`");
    assert_error!(recording.view("view", forward.o, 0, &[8]), Error::Tensor { .. }, "only an external tensor");
    assert_error!(recording.view("view", q, 64, &SHAPE.q()), Error::Tensor { .. }, "reaches past its 3200");
    assert_error!(recording.view("view", q, usize::MAX, &[usize::MAX, 3]), Error::Tensor { .. }, "past its 3200");
    assert_error!(recording.view("view", q, 1, &[8]), Error::Tensor { .. }, "byte 4 is not aligned to 256");
    let view = recording.view("view", q, 64, &[128])?;
    assert_error!(recording.view("view", view, 0, &[8]), Error::Tensor { .. }, "no view itself");
    Ok(())
}

#[test]
fn sizes_past_the_devices_limits() -> Result<()> {
    let lowered = |lower: fn(&mut wgpu::Limits)| {
        let mut caps = Caps::default();
        lower(&mut caps.limits);
        record(&caps, CONFIG, SHAPE).map(drop)
    };
    assert!(lowered(|_| {}).is_ok());
    for (lower, limit) in [
        ((|l| l.max_buffer_size = 4096) as fn(&mut wgpu::Limits), "max_buffer_size is 4096"),
        (|l| l.max_storage_buffer_binding_size = 4096, "max_storage_buffer_binding_size is 4096"),
        (|l| l.max_compute_workgroup_storage_size = 2048, "max_compute_workgroup_storage_size is 2048"),
        (|l| l.max_compute_invocations_per_workgroup = 64, "max_compute_invocations_per_workgroup is 64"),
        (|l| l.max_compute_workgroups_per_dimension = 1, "max_compute_workgroups_per_dimension"),
    ] {
        assert_error!(lowered(lower), Error::Limit { .. }, limit);
    }

    let wide = LighthouseConfig { levels: 5, top_k: 1 << 14, chunk: 1 << 14, ..CONFIG };
    assert_error!(record(&Caps::default(), wide, SHAPE), Error::Limit { .. }, "chunk = 16384");
    let long = LighthouseConfig { levels: 16, pooling: 1 << 10, ..CONFIG };
    assert_error!(LighthouseAttention::new(long, SHAPE), Error::Limit { .. }, "pyramid of 16 levels");
    let huge = Shape { tokens: 1 << 40, ..SHAPE };
    assert_error!(LighthouseAttention::new(CONFIG, huge), Error::Limit { .. }, "1099511627776 tokens");
    let mut recording = Recording::new(&Caps::cpu());
    for shape in [vec![1 << 33], vec![usize::MAX, usize::MAX]] {
        let refused = recording.external("huge", Element::F32, &shape);
        assert_error!(refused, Error::Limit { .. }, "`huge`", "index range of a shader");
    }

    // More storage buffers, or more of anything else, than the device has for a kernel.
    let limits = wgpu::Limits { max_storage_buffers_per_shader_stage: 4, ..wgpu::Limits::default() };
    let gpu = noop::noop(limits, wgpu::Features::empty(), 0, &[]);
    let (recording, ..) = record(gpu.caps(), CONFIG, SHAPE)?;
    let refused = GpuExecutor::new(&gpu, Arc::new(recording), &[]);
    assert_error!(refused, Error::Limit { .. }, "max_storage_buffers_per_shader_stage is 4");
    Ok(())
}

#[test]
fn a_recording_made_for_another_device() -> Result<()> {
    // Planned for f16, which this device lacks.
    let half = noop::noop(wgpu::Limits::default(), wgpu::Features::SHADER_F16, 0, &[]);
    let (recording, ..) = record(half.caps(), CONFIG, Shape { element: Element::F16, ..SHAPE })?;
    let refused = GpuExecutor::new(&noop::least(), Arc::new(recording), &[]);
    assert_error!(refused, Error::Shader { .. }, "shaders/");

    // Planned without limits: a tensor that this device cannot hold.
    let limits = wgpu::Limits { max_buffer_size: 1 << 20, ..wgpu::Limits::default() };
    let gpu = noop::noop(limits, wgpu::Features::empty(), 0, &[]);
    let (recording, ..) = record(&Caps::cpu(), CONFIG, Shape { tokens: 8192, ..SHAPE })?;
    let refused = GpuExecutor::new(&gpu, Arc::new(recording), &[]);
    assert_error!(refused, Error::Limit { .. }, "max_buffer_size is 1048576");
    Ok(())
}

#[test]
fn buffers_that_do_not_fit() -> Result<()> {
    let gpu = noop::least();
    let (recording, [q, ..], forward) = record(gpu.caps(), CONFIG, SHAPE)?;
    let scratch = forward.selection.expect("two levels").positions;
    let recording = Arc::new(recording);
    let all = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let buffer = |size, usage| {
        gpu.device().create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    let bring =
        |tensor: Tensor, size, usage| GpuExecutor::new(&gpu, recording.clone(), &[(tensor, buffer(size, usage))]);
    assert!(bring(q, q.bytes(), all).is_ok());
    assert_error!(bring(q, q.bytes() - 4, all), Error::Buffer { .. }, "`q`", "12796 bytes", "needs 12800");
    assert_error!(bring(q, q.bytes(), wgpu::BufferUsages::COPY_DST), Error::Buffer { .. }, "`q`", "lacks STORAGE");
    assert_error!(bring(scratch, scratch.bytes(), all), Error::Buffer { .. }, "`positions`", "only external tensors");
    let (other, ..) = record(gpu.caps(), CONFIG, SHAPE)?;
    let mut other = Recording::new(other.caps());
    for _ in 0..1000 {
        other.external("filler", Element::F32, &[1])?;
    }
    let foreign = other.external("foreign", Element::F32, &[1])?;
    assert_error!(bring(foreign, 4, all), Error::Tensor { .. }, "does not belong");

    // What the host needs is asked for where the host needs it.
    let values = vec![0.0; q.len() as usize];
    let mut unwritable = bring(q, q.bytes(), wgpu::BufferUsages::STORAGE)?;
    assert_error!(unwritable.write(q, &values), Error::Buffer { .. }, "`q`", "COPY_DST");
    assert_error!(unwritable.read(q), Error::Buffer { .. }, "`q`", "COPY_SRC");
    Ok(())
}

#[test]
fn misuse_of_executors() -> Result<()> {
    let gpu = noop::least();
    let (recording, [q, ..], forward) = record(gpu.caps(), CONFIG, SHAPE)?;
    let recording = Arc::new(recording);
    let indices = forward.selection.expect("two levels").indices;
    let mut foreign = Recording::new(gpu.caps());
    for _ in 0..1000 {
        foreign.external("filler", Element::F32, &[1])?;
    }
    let foreign = foreign.external("foreign", Element::F32, &[1])?;
    for mut executor in [executor(Some(&gpu), recording.clone())?, executor(None, recording.clone())?] {
        let executor = &mut *executor;
        assert_error!(executor.write(q, &[0.0; 3]), Error::Tensor { .. }, "`q`", "holds 3200 elements, 3 were given");
        assert_error!(executor.write_u32(indices, &[]), Error::Tensor { .. }, "`indices`", "0 were given");
        assert_error!(executor.write(indices, &vec![0.0; indices.len() as usize]), Error::Tensor { .. }, "`indices`");
        assert_error!(executor.write_u32(q, &[0; 3200]), Error::Tensor { .. }, "`q`");
        assert_error!(executor.read(indices), Error::Tensor { .. }, "`indices`");
        assert_error!(executor.read_u32(q), Error::Tensor { .. }, "`q`");
        assert_error!(executor.write(foreign, &[0.0]), Error::Tensor { .. }, "does not belong");
        assert_error!(executor.read(foreign), Error::Tensor { .. }, "does not belong");
    }

    let mut executor = GpuExecutor::new(&gpu, recording.clone(), &[])?;
    let mut cpu = CpuExecutor::<f32>::new(recording.clone());
    let known = "flash_forward, gather, gather_backward, pool_score, scatter, scatter_backward, select";
    assert_error!(executor.run_from(&mut cpu, "atention"), Error::Unknown { .. }, "stage `atention`", known);
    assert_error!(recording.position("atention"), Error::Unknown { .. }, "stage `atention`", known);
    Ok(())
}

#[test]
fn ranges_that_a_recording_does_not_have() -> Result<()> {
    let gpu = noop::least();
    let (recording, ..) = record(gpu.caps(), CONFIG, SHAPE)?;
    let recording = Arc::new(recording);
    let len = recording.len();
    let mut on_gpu = GpuExecutor::new(&gpu, recording.clone(), &[])?;
    let mut on_cpu = CpuExecutor::<f32>::new(recording);
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let allowed = format!("in order and within the recording's commands, 0..{len}");
    for (start, end) in [(0, len + 1), (len, len + 1), (len + 1, len + 1), (2, 1), (0, usize::MAX), (usize::MAX, 0)] {
        let (range, named) = (start..end, format!("range = {start}..{end}"));
        for executor in [&mut on_gpu as &mut dyn Executor, &mut on_cpu] {
            assert_error!(executor.run_range(range.clone()), Error::Parameter { .. }, named, allowed);
            assert_error!(executor.profile(range.clone()), Error::Parameter { .. }, named, allowed);
        }
        assert_error!(on_gpu.time(range.clone()), Error::Parameter { .. }, named, allowed);
        assert_error!(on_gpu.encode(&mut encoder, range), Error::Parameter { .. }, named, allowed);
    }
    for empty in [0..0, 1..1, len..len] {
        on_gpu.run_range(empty.clone())?;
        on_cpu.run_range(empty.clone())?;
        on_gpu.encode(&mut encoder, empty)?;
    }
    Ok(())
}

#[cfg(feature = "train")]
mod training {
    use std::path::Path;

    use lighthouse_attention::model::{Model, ModelConfig};
    use lighthouse_attention::train::{Corpus, Trainer, TrainerConfig};

    use super::*;

    fn model() -> ModelConfig {
        ModelConfig {
            batch: 1,
            tokens: 64,
            width: 32,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            hidden: 48,
            element: Element::F32,
            attention: CONFIG,
            dense_layers: vec![0],
        }
    }

    #[test]
    fn models_out_of_range() {
        assert!(Model::new(model()).is_ok());
        for (config, parameter) in [
            (ModelConfig { layers: 0, ..model() }, "layers = 0"),
            (ModelConfig { heads: 0, ..model() }, "heads = 0"),
            (ModelConfig { heads: 3, ..model() }, "width = 32"),
            (ModelConfig { width: 0, ..model() }, "width = 0"),
            (ModelConfig { width: 40, ..model() }, "head_dim = 20"),
            (ModelConfig { hidden: 12, ..model() }, "hidden = 12"),
            (ModelConfig { tokens: 0, ..model() }, "tokens = 0"),
            (ModelConfig { batch: 0, ..model() }, "batch = 0"),
            (ModelConfig { kv_heads: 0, ..model() }, "kv_heads = 0"),
            (ModelConfig { dense_layers: vec![2], ..model() }, "dense_layers = 2"),
            (ModelConfig { element: Element::U32, ..model() }, "element = u32"),
            (ModelConfig { attention: LighthouseConfig { pooling: 6, ..CONFIG }, ..model() }, "pooling = 6"),
        ] {
            assert_error!(Model::new(config), Error::Parameter { .. }, parameter);
        }
    }

    #[test]
    fn runs_out_of_range() {
        let run = TrainerConfig {
            model: model(),
            steps: 4,
            resume_steps: 1,
            seed: 1,
            learning_rate: 1e-3,
            weight_decay: 0.1,
            clip_norm: 1.0,
        };
        let none = TrainerConfig { steps: 0, ..run.clone() };
        assert_error!(Trainer::new(None, none), Error::Parameter { .. }, "steps = 0");
        let more = TrainerConfig { resume_steps: 5, ..run.clone() };
        assert_error!(Trainer::new(None, more), Error::Parameter { .. }, "resume_steps = 5", "at most steps = 4");
        let corpus = Corpus::new(vec![0; 1 << 12], 64).expect("enough text");
        let mut trainer = Trainer::new(None, run).expect("in range");
        assert_error!(trainer.step(&corpus), Error::Tensor { .. }, "call start");
    }

    #[test]
    fn text_that_is_not_there_or_too_short() {
        // A test binary that is run on another machine finds no such folder there.
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        std::fs::create_dir_all(folder).expect("created");
        let missing = folder.join("no-such-text");
        assert_error!(Corpus::read(&missing, 64), Error::Data { .. }, "no-such-text", "No such file");
        let short = folder.join(format!("short-{}.txt", std::process::id()));
        std::fs::write(&short, [b'x'; 129]).expect("written");
        assert_error!(Corpus::read(&short, 64), Error::Data { .. }, "short-", "129 bytes", "at least 130");
        std::fs::write(&short, [b'x'; 130]).expect("written");
        assert!(Corpus::read(&short, 64).is_ok());
        std::fs::remove_file(&short).expect("removed");
    }
}

/// Mostly what is allowed, sometimes what is near a bound or absurd.
fn mostly(allowed: impl Strategy<Value = usize> + 'static) -> impl Strategy<Value = usize> {
    let near = prop_oneof![0usize..=20, Just(64), Just(100), Just(256), Just(257)];
    let absurd = prop_oneof![Just(1usize << 16), Just(1 << 24), Just(1 << 30), Just(1 << 33), Just(usize::MAX / 2)];
    prop_oneof![30 => allowed, 3 => near, 1 => absurd, 1 => Just(usize::MAX)]
}

/// Any numbers; about every fourth config and shape is allowed.
fn any_numbers() -> impl Strategy<Value = (LighthouseConfig, Shape)> {
    let config = (
        mostly(1usize..=5),
        mostly((1usize..=3).prop_map(|log| 1 << log)),
        mostly(1usize..=4),
        mostly((1usize..=16).prop_map(|half| 2 * half)),
    );
    let shape =
        (mostly(1usize..=3), mostly(1usize..=3000), mostly(1usize..=3), mostly(1usize..=3), mostly(1usize..=32));
    (config, shape, any::<bool>()).prop_map(
        |((levels, pooling, chunks, chunk), (batch, tokens, kv_heads, group, eighths), half)| {
            let config = LighthouseConfig { levels, pooling, top_k: chunks.saturating_mul(chunk), chunk };
            let element = if half { Element::F16 } else { Element::F32 };
            let (heads, head_dim) = (kv_heads.saturating_mul(group), eighths.saturating_mul(8));
            (config, Shape { batch, tokens, heads, kv_heads, head_dim, element })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the numbers, a layer is recorded or refused; overflow checks are on in this build.
    #[test]
    fn no_config_or_shape_panics((config, shape) in any_numbers()) {
        let _ = record(&Caps::default(), config, shape);
        if let Ok(layer) = LighthouseAttention::new(config, shape) {
            let mut recording = Recording::new(&Caps::cpu());
            let tiny = recording.external("tiny", shape.element, &[4]).expect("allowed");
            prop_assert!(layer.record_forward(&mut recording, [tiny; 3]).is_err());
        }
    }
}
