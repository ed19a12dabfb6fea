//! A recording: named commands over tensors of static length, made once and replayed by an executor.

use std::ops::Range;
use std::sync::Arc;

use crate::cpu::{AnyReference, CpuExecutor, Reference};
use crate::error::{Error, Result};
use crate::gpu::{Caps, Gpu, GpuExecutor, Kernel, Params};
use crate::profile::Profile;
use crate::tensor::{Element, Role, Tensor, TensorInfo};

/// How a command uses a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    /// Every element is written, none is read before that.
    Write,
    ReadWrite,
}

/// A tensor under the name that the shader's binding and the reference use for it.
#[derive(Clone, Debug)]
pub(crate) struct Arg {
    pub name: &'static str,
    pub tensor: Tensor,
    pub access: Access,
    /// It is `[B, N, ..]`, and its kernels can have it in slices of tokens.
    pub by_tokens: bool,
}

/// The part of its tensors that a dispatch binds.
#[derive(Clone, Debug)]
pub(crate) struct Slice {
    /// Entries of the batch, the outermost axis of every tensor.
    pub entries: Range<u64>,
    /// Length of that axis.
    pub batch: u64,
    /// Of arguments that are `by_tokens` some tokens of the one entry, and all that it has.
    pub tokens: Option<(Range<u64>, u64)>,
}

impl Slice {
    /// Offset in the tensor and length, in bytes.
    pub fn bytes(&self, arg: &Arg) -> (u64, u64) {
        let entry = arg.tensor.len / self.batch * arg.tensor.element.bytes();
        let (first, len) = (self.entries.start * entry, (self.entries.end - self.entries.start) * entry);
        match &self.tokens {
            Some((tokens, all)) if arg.by_tokens => {
                let token = entry / all;
                (first + tokens.start * token, (tokens.end - tokens.start) * token)
            }
            _ => (first, len),
        }
    }
}

/// How a stage can be cut along the tokens of a sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TokenSlices {
    /// N.
    pub tokens: usize,
    /// Slices begin at multiples of this.
    pub multiple: usize,
    /// A slice's binding goes on for this many tokens behind it.
    pub overlap: usize,
}

/// One dispatch of a kernel. It binds the command's arguments by name.
#[derive(Clone, Debug)]
pub(crate) struct Dispatch {
    pub kernel: Kernel,
    pub params: Vec<u8>,
    pub fields: &'static [(&'static str, usize)],
    pub workgroups: [u32; 3],
    /// Floating-point operations, for the watchdog rule (design section 5).
    pub work: u64,
    /// `None` binds whole tensors.
    pub slice: Option<Slice>,
}

/// One stage's work: its tensors, its dispatches for the GPU and its reference for the CPU.
pub struct Command {
    pub(crate) stage: &'static str,
    pub(crate) args: Vec<Arg>,
    pub(crate) dispatches: Vec<Dispatch>,
    pub(crate) reference: Arc<dyn AnyReference>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Command")
            .field("stage", &self.stage)
            .field("args", &self.args)
            .field("dispatches", &self.dispatches)
            .finish_non_exhaustive()
    }
}

impl Command {
    /// A command of `stage`, computed on the CPU by `reference`.
    pub(crate) fn new(stage: &'static str, reference: impl Reference) -> Self {
        Self { stage, args: Vec::new(), dispatches: Vec::new(), reference: Arc::new(reference) }
    }

    /// The stage's name: that of its shader, its module, its test and its row in a profile.
    pub fn stage(&self) -> &'static str {
        self.stage
    }

    /// The kernels that its dispatches run.
    pub fn kernels(&self) -> impl Iterator<Item = &Kernel> {
        self.dispatches.iter().map(|dispatch| &dispatch.kernel)
    }

    /// The number of dispatches that it takes on a GPU: more than one where a tensor is bound in slices, or where one
    /// dispatch would run too long.
    pub fn dispatches(&self) -> usize {
        self.dispatches.len()
    }

    pub(crate) fn reads(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.args.push(Arg { name, tensor, access: Access::Read, by_tokens: false });
        self
    }

    pub(crate) fn writes(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.args.push(Arg { name, tensor, access: Access::Write, by_tokens: false });
        self
    }

    pub(crate) fn updates(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.args.push(Arg { name, tensor, access: Access::ReadWrite, by_tokens: false });
        self
    }

    /// Marks arguments that kernels can have in slices of tokens.
    pub(crate) fn by_tokens(mut self, names: &[&str]) -> Self {
        self.args.iter_mut().for_each(|arg| arg.by_tokens = names.contains(&arg.name));
        self
    }

    /// Adds a dispatch over whole tensors.
    pub(crate) fn dispatch<P: Params>(mut self, kernel: Kernel, params: P, workgroups: [u32; 3], work: u64) -> Self {
        self.dispatches.push(Dispatch {
            kernel,
            params: bytemuck::bytes_of(&params).to_vec(),
            fields: P::FIELDS,
            workgroups,
            work,
            slice: None,
        });
        self
    }

    /// Adds one dispatch where all bindings fit the device's largest binding, and otherwise one for each slice of the
    /// batch, which is the outermost axis of every tensor of the command. `make(batch)` gives parameters, workgroups
    /// and work for that many batch entries; the kernel counts them from 0.
    pub(crate) fn dispatch_batched<P: Params>(
        self,
        caps: &Caps,
        batch: usize,
        kernel: Kernel,
        make: impl Fn(usize) -> Result<(P, [u32; 3], u64)>,
    ) -> Result<Self> {
        self.dispatch_parts(caps, batch, kernel, |batch| Ok(vec![make(batch)?]))
    }

    /// As [`dispatch_batched`](Self::dispatch_batched), where the work on a slice may itself be cut into several
    /// dispatches (design section 5).
    pub(crate) fn dispatch_parts<P: Params>(
        mut self,
        caps: &Caps,
        batch: usize,
        kernel: Kernel,
        make: impl Fn(usize) -> Result<Vec<(P, [u32; 3], u64)>>,
    ) -> Result<Self> {
        let batch = batch as u64;
        let step = self.entries_at_once(caps, batch);
        if step == 0 {
            return Err(self.too_large(caps, batch, |_| true));
        }
        let mut start = 0;
        while start < batch {
            let end = (start + step).min(batch);
            for (params, workgroups, work) in make((end - start) as usize)? {
                let slice = (step < batch).then_some(Slice { entries: start..end, batch, tokens: None });
                self = self.dispatch_slice(kernel.clone(), params, workgroups, work, slice);
            }
            start = end;
        }
        Ok(self)
    }

    /// As [`dispatch_batched`](Self::dispatch_batched), and where not even one batch entry fits a binding, dispatches for
    /// slices of its tokens: of the arguments named in [`by_tokens`](Self::by_tokens). The kernel has the flag `SLICED`
    /// (`shaders/shared/token_slice.wgsl`), and `make(batch, tokens)` is for these tokens.
    pub(crate) fn dispatch_tokens<P: Params>(
        mut self,
        caps: &Caps,
        batch: usize,
        slices: TokenSlices,
        kernel: Kernel,
        make: impl Fn(usize, Range<usize>) -> Result<(P, [u32; 3], u64)>,
    ) -> Result<Self> {
        let TokenSlices { tokens, multiple, overlap } = slices;
        let entries = batch as u64;
        if self.entries_at_once(caps, entries) > 0 {
            return self.dispatch_batched(caps, batch, kernel.flag("SLICED", false), |batch| make(batch, 0..tokens));
        }
        let kernel = kernel.flag("SLICED", true);
        let limit = caps.limits.max_storage_buffer_binding_size;
        let alignment = u64::from(caps.limits.min_storage_buffer_offset_alignment);
        let bytes = |arg: &Arg| arg.tensor.bytes() / entries;
        // Of one token, in the tensors that are cut.
        let of_token = || self.args.iter().filter(|arg| arg.by_tokens).map(|arg| bytes(arg) / tokens as u64);
        let rest = |arg: &Arg| !arg.by_tokens;
        let rest_fits = self.args.iter().filter(|arg| rest(arg)).all(|arg| bytes(arg) <= limit);
        let entries_aligned = batch == 1 || self.args.iter().all(|arg| bytes(arg).is_multiple_of(alignment));
        if !(rest_fits && entries_aligned) {
            return Err(self.too_large(caps, entries, |arg| rest_fits || rest(arg)));
        }
        let most = of_token().max().map_or(0, |largest| limit / largest.max(1)) as usize;
        let mut step = most.saturating_sub(overlap) / multiple * multiple;
        while step > 0 && !of_token().all(|bytes| (bytes * step as u64).is_multiple_of(alignment)) {
            step -= multiple;
        }
        if step == 0 {
            return Err(self.too_large(caps, entries, |arg| arg.by_tokens));
        }
        for entry in 0..entries {
            for start in (0..tokens).step_by(step) {
                let end = (start + step).min(tokens);
                let (params, workgroups, work) = make(1, start..end)?;
                let bound = start as u64..(end + overlap).min(tokens) as u64;
                let slice = Slice { entries: entry..entry + 1, batch: entries, tokens: Some((bound, tokens as u64)) };
                self = self.dispatch_slice(kernel.clone(), params, workgroups, work, Some(slice));
            }
        }
        Ok(self)
    }

    fn dispatch_slice<P: Params>(
        mut self,
        kernel: Kernel,
        params: P,
        workgroups: [u32; 3],
        work: u64,
        slice: Option<Slice>,
    ) -> Self {
        self = self.dispatch(kernel, params, workgroups, work);
        if let Some(dispatch) = self.dispatches.last_mut() {
            dispatch.slice = slice;
        }
        self
    }

    /// The batch entries whose part of every tensor fits a binding and begins where one can begin; 0 if there is no such
    /// number.
    fn entries_at_once(&self, caps: &Caps, batch: u64) -> u64 {
        let limit = caps.limits.max_storage_buffer_binding_size;
        let largest = self.args.iter().map(|arg| arg.tensor.bytes()).max().unwrap_or(0);
        if largest <= limit {
            return batch;
        }
        let alignment = u64::from(caps.limits.min_storage_buffer_offset_alignment);
        let aligned =
            |step: u64| self.args.iter().all(|arg| (arg.tensor.bytes() / batch * step).is_multiple_of(alignment));
        let most = (limit / (largest / batch).max(1)).min(batch);
        (1..=most).rev().find(|&step| aligned(step)).unwrap_or(0)
    }

    /// The error for the largest of these tensors.
    fn too_large(&self, caps: &Caps, batch: u64, of: impl Fn(&Arg) -> bool) -> Error {
        let arg = self.args.iter().filter(|arg| of(arg)).max_by_key(|arg| arg.tensor.bytes());
        Error::Limit {
            what: format!("one batch entry of `{}` in stage {}", arg.map_or("", |arg| arg.name), self.stage),
            needed: arg.map_or(0, |arg| arg.tensor.bytes() / batch),
            limit: "max_storage_buffer_binding_size",
            available: caps.limits.max_storage_buffer_binding_size,
        }
    }
}

/// A flat list of commands over tensors with static shapes: record once, replay every step.
///
/// A recording is made for a device's [`Caps`], which decide kernels and tile sizes; the CPU runs any of them.
#[derive(Debug)]
pub struct Recording {
    caps: Caps,
    tensors: Vec<TensorInfo>,
    commands: Vec<Command>,
}

impl Recording {
    /// An empty recording for a device with these capabilities.
    pub fn new(caps: &Caps) -> Self {
        Self { caps: caps.clone(), tensors: Vec::new(), commands: Vec::new() }
    }

    /// The capabilities that kernels are chosen for.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// A tensor that keeps its contents between replays and that the host can read, write or bring.
    ///
    /// # Errors
    /// [`Error::Parameter`] for an empty tensor, [`Error::Limit`] for one that the device cannot hold.
    pub fn external(&mut self, name: impl Into<String>, element: Element, shape: &[usize]) -> Result<Tensor> {
        self.tensor(name.into(), element, shape, Role::External)
    }

    /// A tensor that lives from its first writer to its last reader. [`Error`]s as [`external`](Self::external).
    pub fn scratch(&mut self, name: impl Into<String>, element: Element, shape: &[usize]) -> Result<Tensor> {
        self.tensor(name.into(), element, shape, Role::Scratch)
    }

    fn tensor(&mut self, name: String, element: Element, shape: &[usize], role: Role) -> Result<Tensor> {
        let len = elements(shape);
        let len = len.filter(|&len| len <= u64::from(u32::MAX)).ok_or_else(|| Error::Limit {
            what: format!("tensor `{name}` of shape {shape:?}, counted in elements,"),
            needed: len.unwrap_or(u64::MAX),
            limit: "index range of a shader",
            available: u64::from(u32::MAX),
        })?;
        if len == 0 {
            return Err(Error::parameter("shape", format!("{shape:?} (tensor `{name}`)"), "without a zero"));
        }
        let tensor = Tensor { id: self.tensors.len() as u32, element, len };
        if tensor.bytes() > self.caps.limits.max_buffer_size {
            return Err(Error::Limit {
                what: format!("tensor `{name}` of shape {shape:?}"),
                needed: tensor.bytes(),
                limit: "max_buffer_size",
                available: self.caps.limits.max_buffer_size,
            });
        }
        self.tensors.push(TensorInfo { name, tensor, role, view: None });
        Ok(tensor)
    }

    /// A part of an external tensor as a tensor of its own, from element `start` on: many parameters in one buffer, so
    /// that the optimizer takes them in one dispatch.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a scratch parent, a view of a view, a part that reaches past the end, or a start that the
    /// device cannot bind (a multiple of 256 bytes always can be).
    pub fn view(&mut self, name: impl Into<String>, parent: Tensor, start: usize, shape: &[usize]) -> Result<Tensor> {
        let info = self.info(parent)?.clone();
        let error = |problem: String| Err(Error::tensor(info.name.clone(), problem));
        let alignment = u64::from(self.caps.limits.min_storage_buffer_offset_alignment);
        let (start, len) = (start as u64, elements(shape).unwrap_or(u64::MAX));
        if info.role != Role::External || info.view.is_some() {
            return error("only an external tensor that is no view itself can have views".into());
        }
        if start.saturating_add(len) > parent.len {
            return error(format!("a view of {len} elements from {start} reaches past its {}", parent.len));
        }
        if !(start * parent.element.bytes()).is_multiple_of(alignment) {
            return error(format!("a view from byte {} is not aligned to {alignment}", start * parent.element.bytes()));
        }
        let tensor = self.tensor(name.into(), parent.element, shape, Role::External)?;
        if let Some(info) = self.tensors.last_mut() {
            info.view = Some((parent, start));
        }
        Ok(tensor)
    }

    /// Makes a scratch tensor external, so that it can be read after a replay.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the handle is another recording's.
    pub fn keep(&mut self, tensor: Tensor) -> Result<()> {
        self.info(tensor)?;
        if let Some(info) = self.tensors.get_mut(tensor.index()) {
            info.role = Role::External;
        }
        Ok(())
    }

    /// What is known of a tensor.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the handle is another recording's.
    pub fn info(&self, tensor: Tensor) -> Result<&TensorInfo> {
        self.tensors
            .get(tensor.index())
            .filter(|info| info.tensor == tensor)
            .ok_or_else(|| Error::tensor(format!("#{}", tensor.id), "does not belong to this recording"))
    }

    /// Checks that a tensor is this recording's and has this type and length; `parameter` is its name for the error.
    pub(crate) fn require(&self, parameter: &str, tensor: Tensor, element: Element, shape: &[usize]) -> Result<()> {
        let info = self.info(tensor)?;
        if tensor.element != element || elements(shape) != Some(tensor.len) {
            return Err(Error::tensor(
                info.name.clone(),
                format!(
                    "as {parameter} it must hold {element} {shape:?}, but it holds {} {}",
                    tensor.len, tensor.element
                ),
            ));
        }
        Ok(())
    }

    /// Appends a command after checking its dispatches against the device's limits.
    pub(crate) fn push(&mut self, command: Command) -> Result<()> {
        for (i, arg) in command.args.iter().enumerate() {
            let owner = self.info(arg.tensor)?.owner();
            let twice = command.args.iter().take(i).find(|other| {
                self.info(other.tensor).is_ok_and(|info| info.owner() == owner)
                    && (other.access != Access::Read || arg.access != Access::Read)
            });
            if let Some(other) = twice {
                let name = self.info(arg.tensor)?.name.clone();
                let problem = format!("stage {} would use it as {} and as {}", command.stage, other.name, arg.name);
                return Err(Error::tensor(name, problem));
            }
        }
        let limit = self.caps.limits.max_compute_workgroups_per_dimension;
        for dispatch in &command.dispatches {
            if let Some(&count) = dispatch.workgroups.iter().find(|&&count| count > limit) {
                return Err(Error::Limit {
                    what: format!("stage {}, counted in workgroups,", command.stage),
                    needed: u64::from(count),
                    limit: "max_compute_workgroups_per_dimension",
                    available: u64::from(limit),
                });
            }
            if dispatch.slice.is_none() {
                for arg in &command.args {
                    if arg.tensor.bytes() > self.caps.limits.max_storage_buffer_binding_size {
                        return Err(Error::Limit {
                            what: format!("tensor `{}` in stage {}", self.info(arg.tensor)?.name, command.stage),
                            needed: arg.tensor.bytes(),
                            limit: "max_storage_buffer_binding_size",
                            available: self.caps.limits.max_storage_buffer_binding_size,
                        });
                    }
                }
            }
        }
        self.commands.push(command);
        Ok(())
    }

    /// The number of commands so far. Two such numbers bound a part of the recording that can be run by itself.
    pub fn len(&self) -> usize {
        self.commands.len()
    }

    /// True before the first command.
    pub fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }

    /// The commands in order.
    pub fn commands(&self) -> &[Command] {
        &self.commands
    }

    /// The tensors in order of their making.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The number of commands before the first one of `stage`.
    ///
    /// # Errors
    /// [`Error::Unknown`] if the recording has no such stage; it lists those that it has.
    pub fn position(&self, stage: &str) -> Result<usize> {
        self.commands.iter().position(|command| command.stage == stage).ok_or_else(|| {
            let mut known: Vec<&str> = self.commands.iter().map(|command| command.stage).collect();
            known.sort_unstable();
            known.dedup();
            Error::Unknown { what: "stage", value: stage.into(), known: known.join(", ") }
        })
    }
}

/// The part of a list of what belongs to each command that `range` names.
pub(crate) fn part<T>(of_commands: &[T], range: Range<usize>) -> Result<&[T]> {
    of_commands.get(range.clone()).ok_or_else(|| {
        let allowed = format!("in order and within the recording's commands, 0..{}", of_commands.len());
        Error::parameter("range", format!("{range:?}"), allowed)
    })
}

/// Elements of a shape; `None` past u64.
fn elements(shape: &[usize]) -> Option<u64> {
    shape.iter().try_fold(1u64, |len, &axis| len.checked_mul(axis as u64))
}

/// What runs a recording: [`GpuExecutor`](crate::GpuExecutor) or [`CpuExecutor`](crate::CpuExecutor).
pub trait Executor {
    /// The recording that is run.
    fn recording(&self) -> &Recording;

    /// Sets a float tensor, rounding to its storage type. Errors: wrong length or an index tensor.
    fn write(&mut self, tensor: Tensor, values: &[f32]) -> Result<()>;

    /// Sets an index tensor. Errors: wrong length or a float tensor.
    fn write_u32(&mut self, tensor: Tensor, values: &[u32]) -> Result<()>;

    /// Sets a tensor to zeros, without a copy from the host.
    fn clear(&mut self, tensor: Tensor) -> Result<()>;

    /// A float tensor's contents. Waits for what was submitted.
    fn read(&mut self, tensor: Tensor) -> Result<Vec<f32>>;

    /// An index tensor's contents. Waits for what was submitted.
    fn read_u32(&mut self, tensor: Tensor) -> Result<Vec<u32>>;

    /// Runs the commands of `range`; a GPU executor submits them and returns.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a range that is reversed or ends past the recording, of which nothing is run;
    /// [`Error::Gpu`] for what the device reports.
    fn run_range(&mut self, range: Range<usize>) -> Result<()>;

    /// Runs `range` and measures each command: on a GPU with timestamp queries, each in a pass of its own.
    ///
    /// # Errors
    /// As [`run_range`](Self::run_range), and [`Error::Gpu`] if the adapter has no timestamp queries.
    fn profile(&mut self, range: Range<usize>) -> Result<Profile>;

    /// Runs the whole recording.
    fn run(&mut self) -> Result<()> {
        self.run_range(0..self.recording().len())
    }
}

/// An executor on the GPU, or on the CPU where there is none.
///
/// # Errors
/// As [`GpuExecutor::new`](crate::GpuExecutor::new).
pub fn executor(gpu: Option<&Gpu>, recording: Arc<Recording>) -> Result<Box<dyn Executor>> {
    Ok(match gpu {
        Some(gpu) => Box::new(GpuExecutor::new(gpu, recording, &[])?),
        None => Box::new(CpuExecutor::<f32>::new(recording)),
    })
}
