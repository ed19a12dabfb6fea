//! The GPU executor: pipelines, buffers and bind groups of one recording, made once and replayed.

use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::{Arc, mpsc};

use rayon::prelude::*;

use crate::cpu::CpuExecutor;
use crate::error::{Error, Result};
use crate::gpu::context::Gpu;
use crate::gpu::kernel::Pipeline;
use crate::gpu::memory::MemoryPlan;
use crate::gpu::profile;
use crate::gpu::shader::BindingKind;
use crate::profile::Profile;
use crate::recording::{Access, Command, Dispatch, Executor, Recording, part};
use crate::tensor::{Element, Role, Tensor};

/// A dispatch, ready to be encoded.
#[derive(Debug)]
struct Step {
    pipeline: Arc<Pipeline>,
    bind_group: wgpu::BindGroup,
    workgroups: [u32; 3],
    work: u64,
}

/// Runs a recording on a GPU. Making one allocates and compiles; running it does neither.
#[derive(Debug)]
pub struct GpuExecutor {
    gpu: Gpu,
    recording: Arc<Recording>,
    /// The buffer of each tensor.
    buffers: Vec<Option<wgpu::Buffer>>,
    /// The steps of each command.
    steps: Vec<Vec<Step>>,
    /// Staging for reads, grown to the largest so far.
    readback: Option<wgpu::Buffer>,
}

/// Bytes that an executor of this recording allocates, the buffers that the caller brings included.
pub(crate) fn memory_bytes(recording: &Recording) -> u64 {
    MemoryPlan::new(recording).bytes()
}

impl GpuExecutor {
    /// Builds pipelines, buffers and bind groups. External tensors named in `brought` use the caller's buffers.
    ///
    /// # Errors
    /// [`Error::Buffer`] for a brought buffer that is too small, lacks a usage or stands for a scratch tensor;
    /// [`Error::Limit`] and [`Error::Shader`] from building kernels; [`Error::Gpu`] when memory runs out.
    pub fn new(gpu: &Gpu, recording: Arc<Recording>, brought: &[(Tensor, wgpu::Buffer)]) -> Result<Self> {
        let plan = MemoryPlan::new(&recording);
        tracing::debug!(bytes = plan.bytes(), buffers = plan.buffers.len(), tier = %recording.caps().tier, "memory plan");
        let buffers = allocate(gpu, &recording, &plan, brought)?;
        let dispatches: Vec<(&Command, &Dispatch)> =
            recording.commands().iter().flat_map(|c| c.dispatches.iter().map(move |d| (c, d))).collect();
        let mut kernels: Vec<&Dispatch> = dispatches.iter().map(|(_, dispatch)| *dispatch).collect();
        let mut seen = std::collections::HashSet::new();
        kernels.retain(|dispatch| seen.insert(&dispatch.kernel));
        kernels.par_iter().try_for_each(|dispatch| gpu.pipeline(&dispatch.kernel, dispatch.fields).map(drop))?;

        let (params, offsets) = upload_params(gpu, &dispatches);
        let scope = gpu.device().push_error_scope(wgpu::ErrorFilter::Validation);
        let mut offsets = offsets.into_iter();
        let mut steps = Vec::with_capacity(recording.len());
        for command in recording.commands() {
            let mut of_command = Vec::with_capacity(command.dispatches.len());
            for dispatch in &command.dispatches {
                let pipeline = gpu.pipeline(&dispatch.kernel, dispatch.fields)?;
                let offset = offsets.next().unwrap_or(0);
                let bind_group = bind(gpu, &recording, &buffers, command, dispatch, &pipeline, (&params, offset))?;
                of_command.push(Step { pipeline, bind_group, workgroups: dispatch.workgroups, work: dispatch.work });
            }
            steps.push(of_command);
        }
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(Error::Gpu(error.to_string()));
        }
        Ok(Self { gpu: gpu.clone(), recording, buffers, steps, readback: None })
    }

    /// Bytes that an executor of `recording` needs, before any is allocated.
    pub fn memory_bytes(recording: &Recording) -> u64 {
        memory_bytes(recording)
    }

    /// The device that this runs on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// A tensor's buffer; a view's is its parent's, and begins there at [`offset`](Self::offset).
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor of another recording, or one that no command uses.
    pub fn buffer(&self, tensor: Tensor) -> Result<&wgpu::Buffer> {
        let info = self.recording.info(tensor)?;
        let buffer = self.buffers.get(tensor.index()).and_then(Option::as_ref);
        buffer.ok_or_else(|| Error::tensor(info.name.clone(), "is used by no command and has no buffer"))
    }

    /// The byte of its buffer that a tensor begins at: 0, except for views.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor of another recording.
    pub fn offset(&self, tensor: Tensor) -> Result<u64> {
        offset(&self.recording, tensor)
    }

    /// Encodes commands into an encoder of the caller's, as one compute pass.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a range that is reversed or ends past the recording; nothing is encoded then.
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder, range: Range<usize>) -> Result<()> {
        encode_pass(encoder, &self.steps(range)?, None);
        Ok(())
    }

    /// The steps of a range of commands.
    fn steps(&self, range: Range<usize>) -> Result<Vec<&Step>> {
        Ok(part(&self.steps, range)?.iter().flatten().collect())
    }

    /// Runs the part of the recording before `stage` on the CPU executor, moves the tensors over and runs the rest
    /// here: for finding the stage at which a result goes wrong.
    ///
    /// # Errors
    /// [`Error::Unknown`] if there is no such stage.
    pub fn run_from(&mut self, cpu: &mut CpuExecutor<f32>, stage: &str) -> Result<()> {
        let at = self.recording.position(stage)?;
        cpu.run_range(0..at)?;
        let recording = self.recording.clone();
        let owner = |tensor| recording.info(tensor).ok().map(|info| info.owner());
        for info in recording.tensors().iter().filter(|info| info.view.is_none()) {
            let written =
                |c: &Command| c.args.iter().any(|a| owner(a.tensor) == Some(info.tensor) && a.access != Access::Read);
            let before = recording.commands().get(..at).unwrap_or_default().iter().any(written);
            // Scratch memory may be shared: only what is alive at the hand-over is moved.
            let first = recording
                .commands()
                .get(at..)
                .unwrap_or_default()
                .iter()
                .find_map(|c| c.args.iter().find(|a| a.tensor == info.tensor).map(|a| a.access));
            let alive = matches!(first, Some(Access::Read | Access::ReadWrite));
            if info.role == Role::External || (before && alive) {
                match info.tensor.element {
                    Element::U32 => self.write_u32(info.tensor, &cpu.read_u32(info.tensor)?)?,
                    Element::F32 | Element::F16 => self.write(info.tensor, &cpu.read(info.tensor)?)?,
                }
            }
        }
        self.run_range(at..recording.len())
    }

    /// Milliseconds of `range` as one pass between two timestamps: what a replay takes on the GPU, the gaps between its
    /// dispatches included. The pass is one submission: for work within the driver's watchdog.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a range that is reversed or ends past the recording; [`Error::Gpu`] if the adapter has no
    /// timestamp queries.
    pub fn time(&mut self, range: Range<usize>) -> Result<f64> {
        profile::time(self, range)
    }

    /// Encodes a span of commands as a pass of its own.
    pub(crate) fn encode_timed(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        span: Range<usize>,
        timestamps: wgpu::ComputePassTimestampWrites<'_>,
    ) -> Result<()> {
        encode_pass(encoder, &self.steps(span)?, Some(timestamps));
        Ok(())
    }

    fn upload(&self, tensor: Tensor, len: usize, bytes: &[u8]) -> Result<()> {
        if len as u64 != tensor.len {
            let name = self.recording.info(tensor)?.name.clone();
            return Err(Error::tensor(name, format!("holds {} elements, {len} were given", tensor.len)));
        }
        let buffer = self.buffer(tensor)?;
        self.require(tensor, buffer, wgpu::BufferUsages::COPY_DST, "to be written by the host")?;
        self.gpu.queue().write_buffer(buffer, self.offset(tensor)?, bytes);
        Ok(())
    }

    /// A tensor's bytes. Waits for the GPU.
    fn bytes(&mut self, tensor: Tensor) -> Result<Vec<u8>> {
        let buffer = self.buffer(tensor)?.clone();
        self.require(tensor, &buffer, wgpu::BufferUsages::COPY_SRC, "to be read by the host")?;
        self.download(&buffer, self.offset(tensor)?, tensor.bytes())
    }

    /// A brought buffer may lack what only the host's access needs.
    fn require(&self, tensor: Tensor, buffer: &wgpu::Buffer, usage: wgpu::BufferUsages, purpose: &str) -> Result<()> {
        if buffer.usage().contains(usage) {
            return Ok(());
        }
        let tensor = self.recording.info(tensor)?.name.clone();
        Err(Error::Buffer {
            tensor,
            problem: format!("has usage {:?}, which lacks {usage:?} {purpose}", buffer.usage()),
        })
    }

    /// Copies bytes of a buffer back. Waits for the GPU.
    pub(crate) fn download(&mut self, source: &wgpu::Buffer, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        let device = self.gpu.device();
        let staging = match self.readback.take().filter(|staging| staging.size() >= bytes) {
            Some(staging) => staging,
            None => device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("readback"),
                size: bytes,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            }),
        };
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("readback") });
        encoder.copy_buffer_to_buffer(source, offset, &staging, 0, bytes);
        self.gpu.queue().submit([encoder.finish()]);
        let (send, receive) = mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, 0..bytes, move |result| {
            let _ = send.send(result);
        });
        self.gpu.wait()?;
        receive.recv().map_err(|e| Error::Gpu(e.to_string()))?.map_err(|e| Error::Gpu(e.to_string()))?;
        let contents = staging.get_mapped_range(0..bytes).map_err(|e| Error::Gpu(e.to_string()))?.to_vec();
        staging.unmap();
        self.readback = Some(staging);
        Ok(contents)
    }
}

fn offset(recording: &Recording, tensor: Tensor) -> Result<u64> {
    Ok(recording.info(tensor)?.view.map_or(0, |(_, start)| start * tensor.element.bytes()))
}

/// One pass over the steps. Each dispatch is a usage scope of its own, so order is kept.
fn encode_pass(
    encoder: &mut wgpu::CommandEncoder,
    steps: &[&Step],
    timestamp_writes: Option<wgpu::ComputePassTimestampWrites<'_>>,
) {
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: None, timestamp_writes });
    let mut current: Option<&Arc<Pipeline>> = None;
    for step in steps {
        if !current.is_some_and(|pipeline| Arc::ptr_eq(pipeline, &step.pipeline)) {
            pass.set_pipeline(&step.pipeline.pipeline);
            current = Some(&step.pipeline);
        }
        pass.set_bind_group(0, &step.bind_group, &[]);
        let [x, y, z] = step.workgroups;
        pass.dispatch_workgroups(x, y, z);
    }
}

fn allocate(
    gpu: &Gpu,
    recording: &Recording,
    plan: &MemoryPlan,
    brought: &[(Tensor, wgpu::Buffer)],
) -> Result<Vec<Option<wgpu::Buffer>>> {
    let mut given: Vec<Option<&wgpu::Buffer>> = vec![None; plan.buffers.len()];
    for (tensor, buffer) in brought {
        let info = recording.info(*tensor)?;
        let error = |problem: String| Error::Buffer { tensor: info.name.clone(), problem };
        if info.role != Role::External || info.view.is_some() {
            return Err(error("only external tensors that are no views can be brought".into()));
        }
        if buffer.size() < tensor.bytes() {
            return Err(error(format!("holds {} bytes, the tensor needs {}", buffer.size(), tensor.bytes())));
        }
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(error(format!("has usage {:?}, which lacks STORAGE", buffer.usage())));
        }
        let slot = plan.of_tensor.get(tensor.index()).copied().flatten().and_then(|index| given.get_mut(index));
        if let Some(slot) = slot {
            *slot = Some(buffer);
        }
    }
    let device = gpu.device();
    // The recording has checked its own device's limits, which need not be this one's.
    let available = device.limits().max_buffer_size;
    if let Some(&needed) = plan.buffers.iter().find(|&&size| size > available) {
        return Err(Error::Limit { what: "a tensor".into(), needed, limit: "max_buffer_size", available });
    }
    let scope = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let buffers: Vec<wgpu::Buffer> = plan
        .buffers
        .iter()
        .zip(given)
        .map(|(&size, given)| match given {
            Some(buffer) => buffer.clone(),
            None => device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("tensor"),
                size,
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            }),
        })
        .collect();
    if let Some(error) = pollster::block_on(scope.pop()) {
        return Err(Error::Gpu(format!("allocating {} bytes: {error}", plan.bytes())));
    }
    Ok(plan.of_tensor.iter().map(|index| index.and_then(|index| buffers.get(index).cloned())).collect())
}

/// All dispatches' parameters in one buffer, and the offset of each.
fn upload_params(gpu: &Gpu, dispatches: &[(&Command, &Dispatch)]) -> (wgpu::Buffer, Vec<u64>) {
    let alignment = u64::from(gpu.device().limits().min_uniform_buffer_offset_alignment) as usize;
    let mut arena = Vec::new();
    let mut offsets = Vec::with_capacity(dispatches.len());
    for (_, dispatch) in dispatches {
        offsets.push(arena.len() as u64);
        arena.extend_from_slice(&dispatch.params);
        arena.resize(arena.len().next_multiple_of(alignment.max(16)), 0);
    }
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some("params"),
        size: arena.len().max(16) as u64,
        usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    gpu.queue().write_buffer(&buffer, 0, &arena);
    (buffer, offsets)
}

fn bind(
    gpu: &Gpu,
    recording: &Recording,
    buffers: &[Option<wgpu::Buffer>],
    command: &Command,
    dispatch: &Dispatch,
    pipeline: &Pipeline,
    (params, params_offset): (&wgpu::Buffer, u64),
) -> Result<wgpu::BindGroup> {
    let error = |message: String| Error::Shader { shader: format!("shaders/{}.wgsl", dispatch.kernel.shader), message };
    let mut entries = Vec::with_capacity(pipeline.reflection.bindings.len());
    for binding in &pipeline.reflection.bindings {
        let resource = match binding.kind {
            BindingKind::Uniform => wgpu::BufferBinding {
                buffer: params,
                offset: params_offset,
                size: NonZeroU64::new(dispatch.params.len().next_multiple_of(16) as u64),
            },
            BindingKind::Storage { writable } => {
                let arg = command.args.iter().find(|arg| arg.name == binding.name).ok_or_else(|| {
                    error(format!("binding `{}` is no argument of stage {}", binding.name, command.stage))
                })?;
                if arg.access != Access::Read && !writable {
                    return Err(error(format!(
                        "binding `{}` is read-only, stage {} writes it",
                        arg.name, command.stage
                    )));
                }
                let buffer = buffers.get(arg.tensor.index()).and_then(Option::as_ref);
                let buffer = buffer.ok_or_else(|| {
                    let name = recording.info(arg.tensor).map_or("", |info| info.name.as_str());
                    Error::tensor(name, "has no buffer")
                })?;
                let base = offset(recording, arg.tensor)?;
                let (offset, size) = match &dispatch.slice {
                    None => (base, arg.tensor.bytes()),
                    Some(slice) => {
                        let (first, len) = slice.bytes(arg);
                        (base + first, len.next_multiple_of(4))
                    }
                };
                wgpu::BufferBinding { buffer, offset, size: NonZeroU64::new(size) }
            }
        };
        entries
            .push(wgpu::BindGroupEntry { binding: binding.index, resource: wgpu::BindingResource::Buffer(resource) });
    }
    Ok(gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
        label: Some(command.stage),
        layout: &pipeline.layout,
        entries: &entries,
    }))
}

impl Executor for GpuExecutor {
    fn recording(&self) -> &Recording {
        &self.recording
    }

    fn write(&mut self, tensor: Tensor, values: &[f32]) -> Result<()> {
        match tensor.element {
            Element::F32 => self.upload(tensor, values.len(), bytemuck::cast_slice(values)),
            Element::F16 => {
                let mut halves: Vec<half::f16> = values.iter().map(|&x| half::f16::from_f32(x)).collect();
                // A buffer is written in words of four bytes.
                halves.resize(halves.len().next_multiple_of(2), half::f16::ZERO);
                self.upload(tensor, values.len(), bytemuck::cast_slice(&halves))
            }
            Element::U32 => Err(Error::tensor(self.recording.info(tensor)?.name.clone(), "holds indices")),
        }
    }

    fn write_u32(&mut self, tensor: Tensor, values: &[u32]) -> Result<()> {
        match tensor.element {
            Element::U32 => self.upload(tensor, values.len(), bytemuck::cast_slice(values)),
            Element::F32 | Element::F16 => {
                Err(Error::tensor(self.recording.info(tensor)?.name.clone(), "holds numbers"))
            }
        }
    }

    fn clear(&mut self, tensor: Tensor) -> Result<()> {
        let buffer = self.buffer(tensor)?;
        self.require(tensor, buffer, wgpu::BufferUsages::COPY_DST, "to be cleared")?;
        let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.clear_buffer(buffer, self.offset(tensor)?, Some(tensor.bytes()));
        self.gpu.queue().submit([encoder.finish()]);
        self.gpu.check()
    }

    fn read(&mut self, tensor: Tensor) -> Result<Vec<f32>> {
        let bytes = self.bytes(tensor)?;
        match tensor.element {
            Element::F32 => Ok(bytemuck::pod_collect_to_vec(&bytes)),
            Element::F16 => {
                let halves: Vec<half::f16> = bytemuck::pod_collect_to_vec(&bytes);
                Ok(halves.iter().take(tensor.len as usize).map(|x| f32::from(*x)).collect())
            }
            Element::U32 => Err(Error::tensor(self.recording.info(tensor)?.name.clone(), "holds indices")),
        }
    }

    fn read_u32(&mut self, tensor: Tensor) -> Result<Vec<u32>> {
        if tensor.element != Element::U32 {
            return Err(Error::tensor(self.recording.info(tensor)?.name.clone(), "holds numbers"));
        }
        let bytes = self.bytes(tensor)?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    fn run_range(&mut self, range: Range<usize>) -> Result<()> {
        let steps = self.steps(range)?;
        // A submission that runs too long is reset like a dispatch: it takes two of the longest.
        let limit = self.recording.caps().work_per_dispatch.saturating_mul(2);
        let mut rest = steps.as_slice();
        while !rest.is_empty() {
            let mut work = 0u64;
            let fits = rest.iter().take_while(|step| {
                let first = work == 0;
                work = work.saturating_add(step.work);
                first || work <= limit
            });
            let (now, later) = rest.split_at(fits.count().max(1));
            let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encode_pass(&mut encoder, now, None);
            self.gpu.queue().submit([encoder.finish()]);
            rest = later;
        }
        self.gpu.check()
    }

    fn profile(&mut self, range: Range<usize>) -> Result<Profile> {
        profile::profile(self, range)
    }
}
