//! The CPU executor: runs a recording with the stages' references. It is the oracle of the GPU tests, the fallback
//! on a machine with no GPU driver, and the tool for bisecting a wrong result.

use std::cell::{Ref, RefCell, RefMut};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::profile::Profile;
use crate::real::Real;
use crate::recording::{Access, Arg, Executor, Recording, part};
use crate::tensor::{Element, Tensor};

/// A stage's formula, written once for f32 and f64.
pub trait Reference: Send + Sync + 'static {
    /// Computes the stage from and into its arguments.
    fn run<T: Real>(&self, args: &Args<'_, T>) -> Result<()>;
}

/// [`Reference`] as an object: a command holds one without knowing the scalar type.
pub(crate) trait AnyReference: Send + Sync {
    fn run_f32(&self, args: &Args<'_, f32>) -> Result<()>;
    fn run_f64(&self, args: &Args<'_, f64>) -> Result<()>;
}

impl<R: Reference> AnyReference for R {
    fn run_f32(&self, args: &Args<'_, f32>) -> Result<()> {
        self.run(args)
    }
    fn run_f64(&self, args: &Args<'_, f64>) -> Result<()> {
        self.run(args)
    }
}

/// Chooses the instance of a reference for a scalar type.
trait Instance: Real {
    fn run(reference: &dyn AnyReference, args: &Args<'_, Self>) -> Result<()>;
}

impl Instance for f32 {
    fn run(reference: &dyn AnyReference, args: &Args<'_, Self>) -> Result<()> {
        reference.run_f32(args)
    }
}

impl Instance for f64 {
    fn run(reference: &dyn AnyReference, args: &Args<'_, Self>) -> Result<()> {
        reference.run_f64(args)
    }
}

#[derive(Debug)]
enum Storage<T> {
    Float(Vec<T>),
    Index(Vec<u32>),
}

/// A command's arguments, by the names that its shader's bindings have.
pub struct Args<'a, T> {
    args: &'a [Arg],
    recording: &'a Recording,
    memory: &'a [RefCell<Storage<T>>],
}

impl<T: Real> Args<'_, T> {
    /// The memory that holds an argument, and the argument's part of it.
    fn cell(&self, name: &str) -> Result<(&RefCell<Storage<T>>, Range<usize>)> {
        let unknown = || Error::tensor(name, "is not an argument of this command");
        let arg = self.args.iter().find(|arg| arg.name == name).ok_or_else(unknown)?;
        let (owner, range) = place(self.recording, arg.tensor)?;
        Ok((self.memory.get(owner).ok_or_else(unknown)?, range))
    }

    /// Whether the command has an argument of that name.
    pub fn has(&self, name: &str) -> bool {
        self.args.iter().any(|arg| arg.name == name)
    }

    /// A float argument.
    pub fn read(&self, name: &str) -> Result<Ref<'_, [T]>> {
        let (cell, range) = self.cell(name)?;
        let storage = cell.try_borrow().map_err(|e| Error::tensor(name, e.to_string()))?;
        Ref::filter_map(storage, |storage| match storage {
            Storage::Float(values) => values.get(range),
            Storage::Index(_) => None,
        })
        .map_err(|_| Error::tensor(name, "holds indices, not numbers"))
    }

    /// A float argument, to be written.
    pub fn write(&self, name: &str) -> Result<RefMut<'_, [T]>> {
        let (cell, range) = self.cell(name)?;
        let storage = cell.try_borrow_mut().map_err(|e| Error::tensor(name, e.to_string()))?;
        RefMut::filter_map(storage, |storage| match storage {
            Storage::Float(values) => values.get_mut(range),
            Storage::Index(_) => None,
        })
        .map_err(|_| Error::tensor(name, "holds indices, not numbers"))
    }

    /// An index argument.
    pub fn read_u32(&self, name: &str) -> Result<Ref<'_, [u32]>> {
        let (cell, range) = self.cell(name)?;
        let storage = cell.try_borrow().map_err(|e| Error::tensor(name, e.to_string()))?;
        Ref::filter_map(storage, |storage| match storage {
            Storage::Index(values) => values.get(range),
            Storage::Float(_) => None,
        })
        .map_err(|_| Error::tensor(name, "holds numbers, not indices"))
    }

    /// An index argument, to be written.
    pub fn write_u32(&self, name: &str) -> Result<RefMut<'_, [u32]>> {
        let (cell, range) = self.cell(name)?;
        let storage = cell.try_borrow_mut().map_err(|e| Error::tensor(name, e.to_string()))?;
        RefMut::filter_map(storage, |storage| match storage {
            Storage::Index(values) => values.get_mut(range),
            Storage::Float(_) => None,
        })
        .map_err(|_| Error::tensor(name, "holds numbers, not indices"))
    }
}

/// The number of the tensor that holds a tensor's memory, and the part of it.
fn place(recording: &Recording, tensor: Tensor) -> Result<(usize, Range<usize>)> {
    let info = recording.info(tensor)?;
    let start = info.view.map_or(0, |(_, start)| start as usize);
    Ok((info.owner().index(), start..start + tensor.len as usize))
}

/// Runs a recording with the references, in f32 or f64.
///
/// With f32, tensors whose storage is f16 are rounded to it after each command, so that the CPU computes "the same
/// formula in the same storage type" (design section 6); with f64 nothing is rounded: that is the exact reference.
#[derive(Debug)]
pub struct CpuExecutor<T = f32> {
    recording: Arc<Recording>,
    memory: Vec<RefCell<Storage<T>>>,
}

impl<T: Real> CpuExecutor<T> {
    /// Allocates all tensors, filled with zeros.
    pub fn new(recording: Arc<Recording>) -> Self {
        let memory = recording
            .tensors()
            .iter()
            .map(|info| {
                let len = if info.view.is_some() { 0 } else { info.tensor.len as usize };
                RefCell::new(match info.tensor.element {
                    Element::F32 | Element::F16 => Storage::Float(vec![T::zero(); len]),
                    Element::U32 => Storage::Index(vec![0; len]),
                })
            })
            .collect();
        Self { recording, memory }
    }

    fn check_len(&self, tensor: Tensor, len: usize) -> Result<()> {
        if len as u64 == tensor.len {
            return Ok(());
        }
        let name = self.recording.info(tensor)?.name.clone();
        Err(Error::tensor(name, format!("holds {} elements, {len} were given", tensor.len)))
    }

    fn floats(&mut self, tensor: Tensor) -> Result<&mut [T]> {
        let (owner, range) = place(&self.recording, tensor)?;
        match self.memory.get_mut(owner).map(RefCell::get_mut) {
            Some(Storage::Float(values)) => values.get_mut(range).ok_or_else(|| wrong_type(&self.recording, tensor)),
            _ => Err(wrong_type(&self.recording, tensor)),
        }
    }

    fn indices(&mut self, tensor: Tensor) -> Result<&mut [u32]> {
        let (owner, range) = place(&self.recording, tensor)?;
        match self.memory.get_mut(owner).map(RefCell::get_mut) {
            Some(Storage::Index(values)) => values.get_mut(range).ok_or_else(|| wrong_type(&self.recording, tensor)),
            _ => Err(wrong_type(&self.recording, tensor)),
        }
    }

    /// Sets a float tensor in this executor's own precision, without rounding.
    pub fn set(&mut self, tensor: Tensor, values: &[T]) -> Result<()> {
        self.check_len(tensor, values.len())?;
        self.floats(tensor)?.copy_from_slice(values);
        Ok(())
    }

    /// A float tensor in this executor's own precision.
    pub fn get(&mut self, tensor: Tensor) -> Result<Vec<T>> {
        Ok(self.floats(tensor)?.to_vec())
    }
}

fn wrong_type(recording: &Recording, tensor: Tensor) -> Error {
    let name = recording.info(tensor).map_or(String::new(), |info| info.name.clone());
    Error::tensor(name, format!("has element type {}", tensor.element))
}

/// Rounds to half precision and back.
fn round_f16<T: Real>(x: T) -> T {
    T::from_f32(half::f16::from_f32(x.as_f32()).to_f32())
}

#[allow(private_bounds, reason = "the scalar types are f32 and f64, closed by the instance trait")]
impl<T: Instance> Executor for CpuExecutor<T> {
    fn recording(&self) -> &Recording {
        &self.recording
    }

    fn write(&mut self, tensor: Tensor, values: &[f32]) -> Result<()> {
        self.check_len(tensor, values.len())?;
        let round = tensor.element == Element::F16;
        for (to, &x) in self.floats(tensor)?.iter_mut().zip(values) {
            let x = T::from_f32(x);
            *to = if round { round_f16(x) } else { x };
        }
        Ok(())
    }

    fn write_u32(&mut self, tensor: Tensor, values: &[u32]) -> Result<()> {
        self.check_len(tensor, values.len())?;
        self.indices(tensor)?.copy_from_slice(values);
        Ok(())
    }

    fn clear(&mut self, tensor: Tensor) -> Result<()> {
        match tensor.element {
            Element::U32 => self.indices(tensor)?.fill(0),
            Element::F32 | Element::F16 => self.floats(tensor)?.fill(T::zero()),
        }
        Ok(())
    }

    fn read(&mut self, tensor: Tensor) -> Result<Vec<f32>> {
        Ok(self.floats(tensor)?.iter().map(|x| x.as_f32()).collect())
    }

    fn read_u32(&mut self, tensor: Tensor) -> Result<Vec<u32>> {
        Ok(self.indices(tensor)?.to_vec())
    }

    fn run_range(&mut self, range: Range<usize>) -> Result<()> {
        self.profile(range).map(drop)
    }

    fn profile(&mut self, range: Range<usize>) -> Result<Profile> {
        let single = T::epsilon() > T::from_f64(1e-10);
        let mut profile = Profile::default();
        for command in part(self.recording.commands(), range)? {
            let begin = Instant::now();
            let args = Args { args: &command.args, recording: &self.recording, memory: &self.memory };
            T::run(&*command.reference, &args)?;
            for arg in &command.args {
                if single && arg.access != Access::Read && arg.tensor.element == Element::F16 {
                    args.write(arg.name)?.iter_mut().for_each(|x| *x = round_f16(*x));
                }
            }
            profile.add(command.stage, begin.elapsed().as_secs_f64() * 1e3);
        }
        Ok(profile)
    }
}
