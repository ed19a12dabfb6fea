//! What the tests share: devices, inputs, and the comparison of a recording on a device with the CPU's references.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

pub mod checks;
pub mod data;
pub mod golden;
#[cfg(feature = "train")]
mod training_step;

use std::sync::{Arc, OnceLock};

use lighthouse_attention::gpu::{NO_DRIVER_HINT, adapters, parse_backends};
use lighthouse_attention::{
    Caps, CpuExecutor, Element, Error, Executor, Gpu, GpuExecutor, Recording, Result, Tensor, Tier,
};

/// A tensor's contents.
#[derive(Clone, Debug)]
pub enum Values {
    Float(Vec<f32>),
    Index(Vec<u32>),
}

impl Values {
    /// The bits of the elements, NaN's included.
    pub fn bits(&self) -> Vec<u32> {
        match self {
            Self::Float(values) => values.iter().map(|x| x.to_bits()).collect(),
            Self::Index(values) => values.clone(),
        }
    }
}

/// A recording's inputs, and the outputs that are compared.
#[derive(Clone, Debug, Default)]
pub struct Probe {
    pub inputs: Vec<(Tensor, Values)>,
    pub outputs: Vec<Tensor>,
    /// Magnitude of the terms that an output sums where they cancel to nothing: their rounding stays.
    pub terms: f64,
}

impl Probe {
    /// An external float tensor with these values, rounded to its storage type.
    pub fn input(
        &mut self,
        recording: &mut Recording,
        name: &str,
        element: Element,
        shape: &[usize],
        values: Vec<f32>,
    ) -> Result<Tensor> {
        let tensor = recording.external(name, element, shape)?;
        let round = |x: f32| if element == Element::F16 { half::f16::from_f32(x).to_f32() } else { x };
        self.inputs.push((tensor, Values::Float(values.into_iter().map(round).collect())));
        Ok(tensor)
    }

    /// An external index tensor with these values.
    pub fn input_u32(
        &mut self,
        recording: &mut Recording,
        name: &str,
        shape: &[usize],
        values: Vec<u32>,
    ) -> Result<Tensor> {
        let tensor = recording.external(name, Element::U32, shape)?;
        self.inputs.push((tensor, Values::Index(values)));
        Ok(tensor)
    }

    /// Keeps tensors readable and compares them.
    pub fn outputs(&mut self, recording: &mut Recording, tensors: &[Tensor]) -> Result<()> {
        for &tensor in tensors {
            recording.keep(tensor)?;
            self.outputs.push(tensor);
        }
        Ok(())
    }

    /// Sets the inputs.
    fn write(&self, executor: &mut dyn Executor) -> Result<()> {
        self.inputs.iter().try_for_each(|(tensor, values)| match values {
            Values::Float(values) => executor.write(*tensor, values),
            Values::Index(values) => executor.write_u32(*tensor, values),
        })
    }

    /// Sets the inputs, runs, and reads the outputs.
    fn run(&self, executor: &mut dyn Executor) -> Result<Vec<Values>> {
        self.write(executor)?;
        executor.run()?;
        let read = |&tensor: &Tensor| match tensor.element() {
            Element::U32 => executor.read_u32(tensor).map(Values::Index),
            _ => executor.read(tensor).map(Values::Float),
        };
        self.outputs.iter().map(read).collect()
    }
}

/// Records a case and says what goes in and what is compared.
pub type Build<'a> = &'a dyn Fn(&mut Recording) -> Result<Probe>;

/// An adapter with one of its tiers.
#[derive(Clone, Debug)]
pub struct Device {
    pub gpu: Gpu,
    pub adapter: String,
    pub tier: Tier,
}

/// Every adapter of the backends that `LIGHTHOUSE_BACKEND` names (all, if it is not set; none, if it is `cpu`), with
/// every tier that it has (one, if `LIGHTHOUSE_TIER` names it).
pub fn devices() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let backend = std::env::var("LIGHTHOUSE_BACKEND").unwrap_or_else(|_| "all".into());
        let mut devices = Vec::new();
        let mut lacking = None;
        for (name, tiers) in open(&backend).unwrap_or_else(|e| panic!("LIGHTHOUSE_BACKEND, LIGHTHOUSE_TIER: {e}")) {
            match tiers {
                Ok(tiers) => devices.extend(tiers),
                Err(error @ Error::Tier { .. }) => lacking = Some(error),
                Err(error) => panic!("{name}: {error}"),
            }
        }
        match lacking {
            Some(error) if devices.is_empty() => panic!("{error}"),
            Some(error) => eprintln!("not tested: {error}"),
            None if devices.is_empty() => {
                let message = format!("no adapter on backend {backend}: only the CPU is tested; {NO_DRIVER_HINT}");
                assert!(backend == "cpu" || std::env::var_os("CI").is_none(), "{message}");
                eprintln!("{message}");
            }
            None => {}
        }
        devices
    })
}

/// All adapters of a backend, or of `all`, with their tiers (one, if `LIGHTHOUSE_TIER` names it); `cpu` has none.
///
/// # Errors
/// An unknown backend or tier; beside an adapter's name, that it lacks the tier, or what its driver says when it does
/// not open.
pub fn open(backend: &str) -> Result<Vec<(String, Result<Vec<Device>>)>> {
    let forced: Option<Tier> = std::env::var("LIGHTHOUSE_TIER").ok().map(|tier| tier.parse()).transpose()?;
    if backend == "cpu" {
        return Ok(Vec::new());
    }
    let opened = adapters(parse_backends(backend)?).into_iter().map(|adapter| {
        let tiers = Gpu::from_adapter(&adapter).and_then(|gpu| {
            let tiers = forced.map_or_else(|| gpu.caps().tiers(), |tier| vec![tier]).into_iter();
            let mut devices = Vec::new();
            for tier in tiers {
                let gpu = gpu.clone().with_tier(tier)?;
                devices.extend(variants(&gpu).into_iter().map(|gpu| Device {
                    adapter: gpu.name().to_owned(),
                    gpu,
                    tier,
                }));
            }
            Ok(devices)
        });
        (adapter.get_info().name, tiers)
    });
    Ok(opened.collect())
}

/// A device, and once more without components of matrices if it has them in its tier. They are compiled for minutes by
/// drivers that compute on the CPU, which are one or the other: the latter if `LIGHTHOUSE_COMPONENTS` is `off`.
fn variants(gpu: &Gpu) -> Vec<Gpu> {
    let caps = gpu.caps();
    let has_components =
        [Element::F16, Element::F32].into_iter().any(|factors| caps.layout(caps.tier, factors).is_some());
    let off = std::env::var("LIGHTHOUSE_COMPONENTS").is_ok_and(|value| value == "off");
    let mut variants = Vec::new();
    if !off {
        variants.push(gpu.clone());
    }
    if off || (has_components && !gpu.is_software()) {
        variants.push(gpu.clone().without_components());
    }
    variants
}

/// Where a recording can run.
#[derive(Clone, Debug)]
pub enum Target {
    /// The references in single precision, with storage rounding.
    CpuF32,
    /// The references in double precision.
    CpuF64,
    Gpu(Box<Device>),
}

impl Target {
    pub fn adapter(&self) -> &str {
        match self {
            Self::CpuF32 | Self::CpuF64 => "CPU",
            Self::Gpu(device) => &device.adapter,
        }
    }

    pub fn tier(&self) -> &'static str {
        match self {
            Self::CpuF32 => "f32",
            Self::CpuF64 => "f64",
            Self::Gpu(device) => device.tier.name(),
        }
    }

    /// Whether cooperative matrices of this type are used, and computed on the CPU.
    pub fn has_software_matrices(&self, element: Element) -> bool {
        matches!(self, Self::Gpu(device) if device.gpu.is_software() && device.gpu.caps().has_matrix(device.tier, element))
    }

    /// What a recording for the target is planned with.
    pub fn caps(&self) -> Caps {
        match self {
            Self::CpuF32 | Self::CpuF64 => Caps::cpu(),
            Self::Gpu(device) => device.gpu.caps().clone(),
        }
    }

    /// What runs a recording on the target.
    pub fn executor(&self, recording: Arc<Recording>) -> Result<Box<dyn Executor>> {
        Ok(match self {
            Self::CpuF32 => Box::new(CpuExecutor::<f32>::new(recording)),
            Self::CpuF64 => Box::new(CpuExecutor::<f64>::new(recording)),
            Self::Gpu(device) => Box::new(GpuExecutor::new(&device.gpu, recording, &[])?),
        })
    }

    /// Records a case, runs it once and returns its outputs in order.
    pub fn run(&self, build: Build<'_>) -> Result<Vec<Values>> {
        let mut recording = Recording::new(&self.caps());
        let probe = build(&mut recording)?;
        probe.run(&mut *self.executor(Arc::new(recording))?)
    }
}

/// What an outcome is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aspect {
    /// The values: the largest difference, or how many indices differ.
    Values,
    /// How many elements have other bits in a second run.
    SecondRun,
    /// How many bytes past the end of the tensor were written.
    Canary,
}

/// The outcome of one output's comparison.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub aspect: Aspect,
    pub output: String,
    pub error: f64,
    pub allowed: f64,
}

impl Outcome {
    pub fn passed(&self) -> bool {
        // False for NaN.
        self.error <= self.allowed
    }

    /// How much of what is allowed the error takes: more than 1 is a failure.
    pub fn share(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.allowed }
    }
}

/// Results of the CPU in f64 (the truth), and in f32 with storage rounding.
pub struct Expected {
    outputs: Vec<(String, Tensor, Truth)>,
}

enum Truth {
    Float { exact: Vec<f64>, same_storage: Vec<f32> },
    Index(Vec<u32>),
}

impl Expected {
    /// The CPU in single precision against itself in double.
    pub fn on_cpu(&self) -> Vec<Outcome> {
        let outcome = |(output, tensor, truth): &(String, Tensor, Truth)| {
            let (error, allowed) = match truth {
                // `expect` has compared them.
                Truth::Index(_) => (0.0, 0.0),
                Truth::Float { exact, same_storage } => {
                    (max_error(exact, same_storage), stated_bound(tensor.element(), exact))
                }
            };
            Outcome { aspect: Aspect::Values, output: output.clone(), error, allowed }
        };
        self.outputs.iter().map(outcome).collect()
    }
}

/// What the CPU in single precision may err: there is no other machine to compare it with, so this is the bound of the
/// golden vectors for f32, and eight roundings of the storage type for f16.
pub fn stated_bound(element: Element, exact: &[f64]) -> f64 {
    let unit = if element == Element::F16 { 8.0 * 2.0f64.powi(-11) } else { 5e-6 };
    unit * largest(exact).max(1.0)
}

/// Runs the CPU's part of a case.
pub fn expect(build: Build<'_>) -> Result<Expected> {
    let mut recording = Recording::new(&Caps::cpu());
    let probe = build(&mut recording)?;
    let recording = Arc::new(recording);
    let mut exact = CpuExecutor::<f64>::new(recording.clone());
    let mut single = CpuExecutor::<f32>::new(recording.clone());
    for executor in [&mut exact as &mut dyn Executor, &mut single] {
        probe.write(executor)?;
        executor.run()?;
    }
    let mut outputs = Vec::new();
    for &tensor in &probe.outputs {
        let truth = match tensor.element() {
            Element::U32 => {
                let truth = exact.read_u32(tensor)?;
                let other = single.read_u32(tensor)?;
                assert_eq!(
                    truth, other,
                    "f32 and f64 references choose differently: give scores that both compute exactly"
                );
                Truth::Index(truth)
            }
            _ => Truth::Float { exact: exact.get(tensor)?, same_storage: single.read(tensor)? },
        };
        outputs.push((recording.info(tensor)?.name.clone(), tensor, truth));
    }
    Ok(Expected { outputs })
}

/// Largest difference; infinite when one side is non-finite where the other is not.
pub fn max_error(exact: &[f64], got: &[f32]) -> f64 {
    assert_eq!(exact.len(), got.len());
    let error = |(&x, &y): (&f64, &f32)| {
        let y = f64::from(y);
        if x.is_finite() && y.is_finite() {
            (x - y).abs()
        } else if x.is_finite() == y.is_finite() {
            0.0
        } else {
            f64::INFINITY
        }
    };
    exact.iter().zip(got).map(error).fold(0.0, f64::max)
}

/// The largest finite magnitude.
fn largest(values: &[f64]) -> f64 {
    values.iter().filter(|x| x.is_finite()).fold(0.0, |largest, x| largest.max(x.abs()))
}

/// Units in the last place that storing alone may cost: the floor of the error rule. A driver may round to half by
/// truncation, which is one unit of f16 where rounding to nearest is half of one. Terms are summed in f32.
fn floor(element: Element, exact: &[f64], terms: f64) -> f64 {
    let single = 2.0f64.powi(-22);
    let stored = if element == Element::F16 { 2.0f64.powi(-10) } else { single };
    (largest(exact) * stored).max(terms * single)
}

/// Runs a case on a device and compares by the error rule (design section 6): at most `factor` times the error of the
/// CPU in the same storage type, plus the floor; indices exactly. Also checks that two runs give the same bits, that
/// every output was written (they and all scratch memory are poisoned) and that nothing past the outputs was.
pub fn compare(device: &Device, expected: &Expected, factor: f64, build: Build<'_>) -> Result<Vec<Outcome>> {
    const CANARY: usize = 64;
    let mut recording = Recording::new(device.gpu.caps());
    let probe = build(&mut recording)?;
    let recording = Arc::new(recording);
    let buffers: Vec<(Tensor, wgpu::Buffer)> = probe
        .outputs
        .iter()
        .map(|&tensor| {
            let buffer = device.gpu.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("output with a canary"),
                size: tensor.bytes() + CANARY as u64,
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            });
            (tensor, buffer)
        })
        .collect();
    let mut executor = GpuExecutor::new(&device.gpu, recording.clone(), &buffers)?;
    let mut runs: Vec<Vec<Vec<u32>>> = Vec::new();
    let mut past_the_end = vec![0; buffers.len()];
    for _ in 0..2 {
        for info in recording.tensors() {
            if let Ok(buffer) = executor.buffer(info.tensor) {
                // All ones: NaN in f32 and f16, no index.
                device.gpu.queue().write_buffer(buffer, 0, &vec![0xffu8; buffer.size() as usize]);
            }
        }
        runs.push(probe.run(&mut executor)?.iter().map(Values::bits).collect());
        for ((_, buffer), past_the_end) in buffers.iter().zip(&mut past_the_end) {
            *past_the_end += read_tail(&device.gpu, buffer, CANARY).iter().filter(|&&byte| byte != 0xff).count();
        }
    }
    let mut outcomes = Vec::new();
    for (i, (name, tensor, truth)) in expected.outputs.iter().enumerate() {
        let (first, second) = (&runs[0][i], &runs[1][i]);
        let differ = first.iter().zip(second).filter(|(a, b)| a != b).count();
        let (error, allowed) = match truth {
            Truth::Index(truth) => (truth.iter().zip(first).filter(|(a, b)| a != b).count() as f64, 0.0),
            Truth::Float { exact, same_storage } => {
                let got: Vec<f32> = first.iter().map(|&bits| f32::from_bits(bits)).collect();
                (
                    max_error(exact, &got),
                    factor * max_error(exact, same_storage) + floor(tensor.element(), exact, probe.terms),
                )
            }
        };
        let counted =
            |aspect, count: usize| Outcome { aspect, output: name.clone(), error: count as f64, allowed: 0.0 };
        outcomes.push(Outcome { aspect: Aspect::Values, output: name.clone(), error, allowed });
        outcomes.push(counted(Aspect::SecondRun, differ));
        outcomes.push(counted(Aspect::Canary, past_the_end[i]));
    }
    Ok(outcomes)
}

fn read_tail(gpu: &Gpu, buffer: &wgpu::Buffer, bytes: usize) -> Vec<u8> {
    let staging = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some("canary"),
        size: bytes as u64,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(buffer, buffer.size() - bytes as u64, &staging, 0, bytes as u64);
    gpu.queue().submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |result| result.expect("mapping"));
    gpu.wait().expect("the device works");
    staging.get_mapped_range(..).expect("mapped").to_vec()
}

/// Runs a case on every device. `factor` is 2 for a forward, 3 for a backward.
#[track_caller]
pub fn check(case: &str, factor: f64, build: Build<'_>) {
    let expected = expect(build).unwrap_or_else(|e| panic!("{case}: {e}"));
    for device in devices() {
        let outcomes = compare(device, &expected, factor, build)
            .unwrap_or_else(|e| panic!("{case} on {}, {}: {e}", device.adapter, device.tier));
        for outcome in outcomes {
            assert!(
                outcome.passed(),
                "{case} on {}, {}: {:?} of {}: {:e}, allowed {:e}",
                device.adapter,
                device.tier,
                outcome.aspect,
                outcome.output,
                outcome.error,
                outcome.allowed
            );
        }
    }
}
