//! What the rows run on, how it is timed, and what is measured of it first: its copy bandwidth.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use lighthouse_attention::{Caps, CpuExecutor, Element, Executor, Gpu, GpuExecutor, Recording, Tensor};
use rayon::prelude::*;

use crate::Result;

/// A GPU, or the CPU with the references.
#[derive(Clone, Debug)]
pub enum Device {
    Gpu(Box<Gpu>),
    Cpu,
}

/// Default sizes go by this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A GPU of its own memory: the sizes of BENCHMARKS.md.
    Discrete,
    /// Any other GPU.
    Small,
    /// A driver that computes on the CPU, or the references.
    Software,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Discrete => "a discrete GPU",
            Self::Small => "a GPU without memory of its own",
            Self::Software => "the CPU",
        }
    }
}

/// Where times come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Timestamps that the GPU writes around a pass.
    Gpu,
    /// The host's clock around submission and waiting.
    Wall,
}

impl Clock {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Wall => "wall",
        }
    }
}

impl Device {
    /// `pipelines` is the folder for [`store_pipelines`](Self::store_pipelines).
    pub fn open(backend: &str, pipelines: Option<&Path>) -> Result<Self> {
        let gpu = Gpu::open(backend)?;
        let Some(folder) = pipelines else { return Ok(gpu.map_or(Self::Cpu, |gpu| Self::Gpu(Box::new(gpu)))) };
        let keeps = |gpu: &Gpu| gpu.device().features().contains(wgpu::Features::PIPELINE_CACHE);
        let gpu = gpu.filter(keeps).ok_or("--pipelines: only a Vulkan device keeps its pipelines")?;
        // Made now, so that a folder that cannot be written costs no measuring.
        let problem = |problem: String| format!("--pipelines {}: {problem}", folder.display());
        let files =
            fs::create_dir_all(folder).and_then(|()| fs::read_dir(folder)).map_err(|e| problem(e.to_string()))?;
        if files.count() > 0 {
            return Err(problem("not empty, and older pipelines would be among these".into()).into());
        }
        Ok(Self::Gpu(Box::new(gpu.with_pipeline_cache(folder))))
    }

    /// Writes what the driver made of the kernels that were measured.
    pub fn store_pipelines(&self) -> Result<()> {
        match self {
            Self::Gpu(gpu) => Ok(gpu.store_pipelines()?),
            Self::Cpu => Ok(()),
        }
    }

    /// Adapter, backend, driver, tier, and the multiprocessors where they are known.
    pub fn name(&self) -> String {
        match self {
            Self::Gpu(gpu) => {
                let caps = gpu.caps();
                let processors = Some(caps.processors).filter(|_| caps.processors_known);
                let processors = processors.map(|count| format!(", {count} multiprocessors")).unwrap_or_default();
                format!("{}, tier {}{processors}", gpu.name(), caps.tier)
            }
            Self::Cpu => format!("the CPU's references on {} threads", rayon::current_num_threads()),
        }
    }

    pub fn caps(&self) -> Caps {
        match self {
            Self::Gpu(gpu) => gpu.caps().clone(),
            Self::Cpu => Caps::cpu(),
        }
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::Gpu(gpu) => match gpu.device().adapter_info().device_type {
                wgpu::DeviceType::DiscreteGpu => Kind::Discrete,
                wgpu::DeviceType::Cpu => Kind::Software,
                _ => Kind::Small,
            },
            Self::Cpu => Kind::Software,
        }
    }

    pub fn clock(&self) -> Clock {
        if self.caps().timestamps { Clock::Gpu } else { Clock::Wall }
    }

    /// An executor of a recording whose external float tensors hold random numbers.
    pub fn runner(&self, recording: Recording, inputs: &[Tensor]) -> Result<Runner> {
        let recording = std::sync::Arc::new(recording);
        match self {
            Self::Gpu(gpu) => {
                let executor = GpuExecutor::new(gpu, recording, &[])?;
                let fill = Fill::new(gpu);
                for (seed, &tensor) in inputs.iter().enumerate() {
                    fill.run(executor.buffer(tensor)?, tensor.element(), tensor.bytes() / 4, seed as u32);
                }
                gpu.wait()?;
                Ok(Runner::Gpu(Box::new(executor)))
            }
            Self::Cpu => {
                let mut executor = CpuExecutor::new(recording);
                for (seed, &tensor) in inputs.iter().enumerate() {
                    executor.write(tensor, &normal_numbers(tensor.len() as usize, seed as u32))?;
                }
                Ok(Runner::Cpu(executor))
            }
        }
    }

    /// One run of copying `bytes` bytes to another place, in milliseconds, to be called many times.
    pub fn copier(&self, bytes: u64) -> Result<Box<dyn FnMut() -> Result<f64>>> {
        match self {
            Self::Gpu(gpu) => {
                let copy = Copy::new(gpu, bytes)?;
                let gpu = gpu.clone();
                Ok(Box::new(move || copy.run(&gpu)))
            }
            Self::Cpu => {
                let source = vec![0x5au8; bytes as usize];
                let mut target = vec![0u8; bytes as usize];
                Ok(Box::new(move || {
                    let start = Instant::now();
                    let part = 1 << 20;
                    target.par_chunks_mut(part).zip(source.par_chunks(part)).for_each(|(to, from)| {
                        to.copy_from_slice(from);
                    });
                    std::hint::black_box(&target);
                    Ok(milliseconds(start.elapsed()))
                }))
            }
        }
    }
}

pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// An executor with clocks.
pub enum Runner {
    Gpu(Box<GpuExecutor>),
    Cpu(CpuExecutor<f32>),
}

impl Runner {
    pub fn executor(&mut self) -> &mut dyn Executor {
        match self {
            Self::Gpu(executor) => &mut **executor,
            Self::Cpu(executor) => executor,
        }
    }

    /// Milliseconds of one run of `range`.
    pub fn time(&mut self, range: Range<usize>, clock: Clock) -> Result<f64> {
        match (self, clock) {
            (Self::Gpu(executor), Clock::Gpu) => Ok(executor.time(range)?),
            (runner, _) => runner.wall(range),
        }
    }

    fn wall(&mut self, range: Range<usize>) -> Result<f64> {
        let start = Instant::now();
        self.executor().run_range(range)?;
        if let Self::Gpu(executor) = self {
            executor.gpu().wait()?;
        }
        Ok(milliseconds(start.elapsed()))
    }

    /// The stage of a command.
    pub fn stage(&mut self, at: usize) -> &'static str {
        self.executor().recording().commands().get(at).map_or("", |command| command.stage())
    }

    /// Milliseconds of each stage in `range`, in order; each command is a pass of its own.
    pub fn stage_times(&mut self, range: Range<usize>, clock: Clock) -> Result<Vec<(&'static str, f64)>> {
        if let (Self::Gpu(executor), Clock::Gpu) = (&mut *self, clock) {
            let profile = executor.profile(range)?;
            return Ok(profile.rows.into_iter().map(|row| (row.stage, row.milliseconds)).collect());
        }
        let mut times: Vec<(&'static str, f64)> = Vec::new();
        for at in range {
            let milliseconds = self.wall(at..at + 1)?;
            let stage = self.stage(at);
            match times.iter_mut().find(|(name, _)| *name == stage) {
                Some((_, sum)) => *sum += milliseconds,
                None => times.push((stage, milliseconds)),
            }
        }
        Ok(times)
    }

    /// Fails unless the tensor, which a run has written, begins with finite numbers that are not all zero: a kernel
    /// that did not run is no result.
    pub fn expect_written(&mut self, tensor: Tensor) -> Result<()> {
        const BYTES: u64 = 4096;
        let values: Vec<f32> = match self {
            Self::Gpu(executor) => {
                let half = tensor.element() == Element::F16;
                let bytes = read_end(executor.gpu(), executor.buffer(tensor)?, tensor.bytes(), BYTES)?;
                let halves = || bytemuck::pod_collect_to_vec::<u8, half::f16>(&bytes);
                if half { halves().into_iter().map(f32::from).collect() } else { bytemuck::pod_collect_to_vec(&bytes) }
            }
            Self::Cpu(executor) => executor.read(tensor)?,
        };
        if values.iter().all(|x| x.is_finite()) && values.iter().any(|x| *x != 0.0) {
            return Ok(());
        }
        Err("the result is not finite, or zero throughout: the figures would mean nothing".into())
    }
}

/// The last bytes of the first `size` bytes of a buffer.
fn read_end(gpu: &Gpu, buffer: &wgpu::Buffer, size: u64, bytes: u64) -> Result<Vec<u8>> {
    let bytes = bytes.min(size);
    let staging = buffer_of(gpu, bytes, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
    let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(buffer, size - bytes, &staging, 0, bytes);
    gpu.queue().submit([encoder.finish()]);
    map(gpu, &staging)
}

/// The contents of a mappable buffer, after all submitted work.
fn map(gpu: &Gpu, staging: &wgpu::Buffer) -> Result<Vec<u8>> {
    let (send, receive) = std::sync::mpsc::channel();
    staging.map_async(wgpu::MapMode::Read, .., move |result| {
        // The receiver is gone only if waiting failed, which is reported.
        let _ = send.send(result);
    });
    gpu.wait()?;
    receive.recv()??;
    let contents = staging.get_mapped_range(..)?.to_vec();
    staging.unmap();
    Ok(contents)
}

fn buffer_of(gpu: &Gpu, size: u64, usage: wgpu::BufferUsages) -> wgpu::Buffer {
    gpu.device().create_buffer(&wgpu::BufferDescriptor { label: Some("bench"), size, usage, mapped_at_creation: false })
}

fn pipeline(gpu: &Gpu, label: &'static str, wgsl: &'static str) -> wgpu::ComputePipeline {
    let source = wgpu::ShaderSource::Wgsl(wgsl.into());
    let module = gpu.device().create_shader_module(wgpu::ShaderModuleDescriptor { label: Some(label), source });
    gpu.device().create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(label),
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    })
}

/// Binds buffers to a pipeline of this file, whose uniform is binding 1.
fn bind(
    gpu: &Gpu,
    pipeline: &wgpu::ComputePipeline,
    params: [u32; 4],
    buffers: &[(u32, wgpu::BufferBinding<'_>)],
) -> wgpu::BindGroup {
    let uniform = buffer_of(gpu, 16, wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST);
    gpu.queue().write_buffer(&uniform, 0, bytemuck::bytes_of(&params));
    let mut entries = vec![wgpu::BindGroupEntry { binding: 1, resource: uniform.as_entire_binding() }];
    entries.extend(buffers.iter().map(|(binding, buffer)| wgpu::BindGroupEntry {
        binding: *binding,
        resource: wgpu::BindingResource::Buffer(buffer.clone()),
    }));
    gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some("bench"),
        layout: &pipeline.get_bind_group_layout(0),
        entries: &entries,
    })
}

/// A grid for that many invocations of workgroups of 256, in two dimensions.
fn grid(invocations: u64) -> [u32; 2] {
    let groups = invocations.div_ceil(256);
    let rows = groups.div_ceil(65_535).max(1);
    [groups.div_ceil(rows) as u32, rows as u32]
}

/// Fills buffers with random numbers.
struct Fill<'a> {
    gpu: &'a Gpu,
    pipeline: wgpu::ComputePipeline,
}

impl<'a> Fill<'a> {
    fn new(gpu: &'a Gpu) -> Self {
        Self { gpu, pipeline: pipeline(gpu, "fill", include_str!("fill.wgsl")) }
    }

    fn run(&self, buffer: &wgpu::Buffer, element: Element, words: u64, seed: u32) {
        let limit = self.gpu.caps().limits.max_storage_buffer_binding_size.min(1 << 30) / 256 * 64;
        let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut first = 0;
        while first < words {
            let count = limit.min(words - first);
            let params = [first as u32, count as u32, seed, u32::from(element == Element::F16)];
            let part = wgpu::BufferBinding { buffer, offset: 4 * first, size: std::num::NonZeroU64::new(4 * count) };
            let bind_group = bind(self.gpu, &self.pipeline, params, &[(0, part)]);
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&self.pipeline);
            pass.set_bind_group(0, &bind_group, &[]);
            let [x, y] = grid(count);
            pass.dispatch_workgroups(x, y, 1);
            drop(pass);
            first += count;
        }
        self.gpu.queue().submit([encoder.finish()]);
    }
}

/// Copies a buffer to another with a kernel.
struct Copy {
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
    grid: [u32; 2],
    timestamps: Option<(wgpu::QuerySet, wgpu::Buffer, wgpu::Buffer)>,
}

impl Copy {
    fn new(gpu: &Gpu, bytes: u64) -> Result<Self> {
        let scope = gpu.device().push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let [source, target] = [0, 1].map(|_| buffer_of(gpu, bytes, wgpu::BufferUsages::STORAGE));
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(format!("allocating 2 x {bytes} bytes: {error}").into());
        }
        Fill::new(gpu).run(&source, Element::F32, bytes / 4, 0);
        let pipeline = pipeline(gpu, "copy", include_str!("copy.wgsl"));
        let params = [(bytes / 16) as u32, 0, 0, 0];
        let [from, to] = [&source, &target].map(|buffer| buffer.as_entire_buffer_binding());
        let bind_group = bind(gpu, &pipeline, params, &[(0, from), (2, to)]);
        let timestamps = gpu.caps().timestamps.then(|| {
            let queries = gpu.device().create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("copy"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            });
            let resolved = buffer_of(gpu, 16, wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC);
            let staging = buffer_of(gpu, 16, wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
            (queries, resolved, staging)
        });
        Ok(Self { pipeline, bind_group, grid: grid(bytes / 16), timestamps })
    }

    fn run(&self, gpu: &Gpu) -> Result<f64> {
        let start = Instant::now();
        let mut encoder = gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("copy"),
            timestamp_writes: self.timestamps.as_ref().map(|(queries, ..)| wgpu::ComputePassTimestampWrites {
                query_set: queries,
                beginning_of_pass_write_index: Some(0),
                end_of_pass_write_index: Some(1),
            }),
        });
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[]);
        pass.dispatch_workgroups(self.grid[0], self.grid[1], 1);
        drop(pass);
        let Some((queries, resolved, staging)) = &self.timestamps else {
            gpu.queue().submit([encoder.finish()]);
            gpu.wait()?;
            return Ok(milliseconds(start.elapsed()));
        };
        encoder.resolve_query_set(queries, 0..2, resolved, 0);
        encoder.copy_buffer_to_buffer(resolved, 0, staging, 0, 16);
        gpu.queue().submit([encoder.finish()]);
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&map(gpu, staging)?);
        let elapsed = match ticks[..] {
            [begin, end] => end.saturating_sub(begin),
            _ => 0,
        };
        Ok(elapsed as f64 * f64::from(gpu.queue().get_timestamp_period()) * 1e-6)
    }
}

/// As `fill.wgsl`.
fn normal_numbers(len: usize, seed: u32) -> Vec<f32> {
    let hash = |x: u32| {
        let state = x.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
        let word = ((state >> ((state >> 28) + 4)) ^ state).wrapping_mul(277_803_737);
        (word >> 22) ^ word
    };
    let uniform = |x: u32| ((hash(x) >> 8) as f32 + 1.0) / 16_777_216.0;
    let number = |i: usize| {
        let counter = hash(i as u32).wrapping_add(seed.wrapping_mul(0x632b_e59b));
        let radius = (-2.0 * uniform(counter).ln()).sqrt();
        radius * (std::f32::consts::TAU * uniform(counter ^ 0x9e37_79b9)).cos()
    };
    (0..len).into_par_iter().map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_standard_normal() {
        let numbers = normal_numbers(1 << 16, 3);
        let mean = |f: fn(f32) -> f64| numbers.iter().map(|&x| f(x)).sum::<f64>() / numbers.len() as f64;
        assert!(mean(f64::from).abs() < 0.02);
        assert!((mean(|x| f64::from(x * x)) - 1.0).abs() < 0.03);
        assert!(numbers.iter().all(|x| x.is_finite()));
    }

    #[test]
    fn grids_cover_all_invocations() {
        for count in [1, 256, 257, 65_535 * 256, 65_535 * 256 + 1, 1 << 28] {
            let [x, y] = grid(count);
            assert!(u64::from(x) * u64::from(y) * 256 >= count && x <= 65_535 && y <= 65_535);
        }
    }
}
