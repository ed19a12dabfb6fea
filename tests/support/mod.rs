//! What the tests share: devices, inputs, and the comparison of a recording on a device with the CPU's references.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

pub mod data;

use std::sync::{Arc, OnceLock};

use lighthouse_attention::gpu::{NO_DRIVER_HINT, adapters, parse_backends};
use lighthouse_attention::{Caps, CpuExecutor, Element, Executor, Gpu, GpuExecutor, Recording, Result, Tensor, Tier};

/// Values for an input tensor.
#[derive(Clone, Debug)]
pub enum Values {
    Float(Vec<f32>),
    Index(Vec<u32>),
}

/// A recording's inputs, and the outputs that are compared.
#[derive(Clone, Debug, Default)]
pub struct Probe {
    pub inputs: Vec<(Tensor, Values)>,
    pub outputs: Vec<Tensor>,
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
        let devices = if backend == "cpu" { Vec::new() } else { open_devices(&backend) };
        if devices.is_empty() {
            let message = format!("no adapter on backend {backend}: only the CPU is tested; {NO_DRIVER_HINT}");
            assert!(backend == "cpu" || std::env::var_os("CI").is_none(), "{message}");
            eprintln!("{message}");
        }
        devices
    })
}

/// All devices of a backend's name.
pub fn open_devices(backend: &str) -> Vec<Device> {
    let forced: Option<Tier> = std::env::var("LIGHTHOUSE_TIER").ok().map(|tier| tier.parse().expect("LIGHTHOUSE_TIER"));
    let mut devices = Vec::new();
    for adapter in adapters(parse_backends(backend).expect("LIGHTHOUSE_BACKEND")) {
        let gpu = Gpu::from_adapter(&adapter).expect("the adapter opens");
        for tier in gpu.caps().tiers() {
            if forced.is_none_or(|forced| forced == tier) {
                let gpu = gpu.clone().with_tier(tier).expect("the tier is there");
                devices.push(Device { adapter: gpu.name().to_owned(), gpu, tier });
            }
        }
    }
    devices
}

/// The outcome of one output's comparison.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub output: String,
    pub error: f64,
    pub allowed: f64,
}

impl Outcome {
    pub fn passed(&self) -> bool {
        // False for NaN.
        self.error <= self.allowed
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

/// Runs the CPU's part of a case.
pub fn expect(build: Build<'_>) -> Result<Expected> {
    let mut recording = Recording::new(&Caps::cpu());
    let probe = build(&mut recording)?;
    let recording = Arc::new(recording);
    let mut exact = CpuExecutor::<f64>::new(recording.clone());
    let mut single = CpuExecutor::<f32>::new(recording.clone());
    for (tensor, values) in &probe.inputs {
        for executor in [&mut exact as &mut dyn Executor, &mut single] {
            match values {
                Values::Float(values) => executor.write(*tensor, values)?,
                Values::Index(values) => executor.write_u32(*tensor, values)?,
            }
        }
    }
    exact.run()?;
    single.run()?;
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

/// Units in the last place that storing alone may cost: the floor of the error rule. A driver may round to half by
/// truncation, which is one unit of f16 where rounding to nearest is half of one.
fn floor(element: Element, exact: &[f64]) -> f64 {
    let largest = exact.iter().filter(|x| x.is_finite()).fold(0.0f64, |m, x| m.max(x.abs()));
    match element {
        Element::F16 => largest * 2.0f64.powi(-10),
        _ => largest * 2.0f64.powi(-22),
    }
}

/// Runs a case on a device and compares by the error rule (design section 6): at most `factor` times the error of the
/// CPU in the same storage type, plus the floor; indices exactly. Also checks that two runs give the same bits, that
/// every output was written (they and all scratch memory are poisoned) and that nothing past the tensors was.
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
    for _ in 0..2 {
        for info in recording.tensors() {
            if let Ok(buffer) = executor.buffer(info.tensor) {
                // All ones: NaN in f32 and f16, no index.
                device.gpu.queue().write_buffer(buffer, 0, &vec![0xffu8; buffer.size() as usize]);
            }
        }
        for (tensor, values) in &probe.inputs {
            match values {
                Values::Float(values) => executor.write(*tensor, values)?,
                Values::Index(values) => executor.write_u32(*tensor, values)?,
            }
        }
        executor.run()?;
        let mut bits = Vec::new();
        for (tensor, buffer) in &buffers {
            bits.push(match tensor.element() {
                Element::U32 => executor.read_u32(*tensor)?,
                _ => executor.read(*tensor)?.into_iter().map(f32::to_bits).collect(),
            });
            let canary = read_tail(&device.gpu, buffer, CANARY);
            assert!(canary.iter().all(|&byte| byte == 0xff), "{}: written past its end", recording.info(*tensor)?.name);
        }
        runs.push(bits);
    }
    let mut outcomes = Vec::new();
    for (i, (name, tensor, truth)) in expected.outputs.iter().enumerate() {
        let (first, second) = (&runs[0][i], &runs[1][i]);
        let differ = first.iter().zip(second).filter(|(a, b)| a != b).count();
        assert_eq!(differ, 0, "{name}: elements whose bits differ between two runs");
        let (error, allowed) = match truth {
            Truth::Index(truth) => (truth.iter().zip(first).filter(|(a, b)| a != b).count() as f64, 0.0),
            Truth::Float { exact, same_storage } => {
                let got: Vec<f32> = first.iter().map(|&bits| f32::from_bits(bits)).collect();
                (max_error(exact, &got), factor * max_error(exact, same_storage) + floor(tensor.element(), exact))
            }
        };
        outcomes.push(Outcome { output: name.clone(), error, allowed });
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
                "{case} on {}, {}: {} errs by {:e}, allowed {:e}",
                device.adapter,
                device.tier,
                outcome.output,
                outcome.error,
                outcome.allowed
            );
        }
    }
}
