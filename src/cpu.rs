//! The CPU executor: runs a recording with the stages' references. It is the oracle of the GPU tests, the fallback
//! on a machine with no GPU driver, and the tool for bisecting a wrong result.

use std::cell::{Ref, RefCell, RefMut};
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::real::Real;
use crate::recording::{Access, Arg, Executor, Recording};
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
    memory: &'a [RefCell<Storage<T>>],
}

impl<T: Real> Args<'_, T> {
    fn cell(&self, name: &str) -> Result<&RefCell<Storage<T>>> {
        let arg = self.args.iter().find(|arg| arg.name == name);
        arg.and_then(|arg| self.memory.get(arg.tensor.index()))
            .ok_or_else(|| Error::tensor(name, "is not an argument of this command"))
    }

    /// Whether the command has an argument of that name.
    pub fn has(&self, name: &str) -> bool {
        self.args.iter().any(|arg| arg.name == name)
    }

    /// A float argument.
    pub fn read(&self, name: &str) -> Result<Ref<'_, [T]>> {
        let storage = self.cell(name)?.try_borrow().map_err(|e| Error::tensor(name, e.to_string()))?;
        Ref::filter_map(storage, |storage| match storage {
            Storage::Float(values) => Some(values.as_slice()),
            Storage::Index(_) => None,
        })
        .map_err(|_| Error::tensor(name, "holds indices, not numbers"))
    }

    /// A float argument, to be written.
    pub fn write(&self, name: &str) -> Result<RefMut<'_, [T]>> {
        let storage = self.cell(name)?.try_borrow_mut().map_err(|e| Error::tensor(name, e.to_string()))?;
        RefMut::filter_map(storage, |storage| match storage {
            Storage::Float(values) => Some(values.as_mut_slice()),
            Storage::Index(_) => None,
        })
        .map_err(|_| Error::tensor(name, "holds indices, not numbers"))
    }

    /// An index argument.
    pub fn read_u32(&self, name: &str) -> Result<Ref<'_, [u32]>> {
        let storage = self.cell(name)?.try_borrow().map_err(|e| Error::tensor(name, e.to_string()))?;
        Ref::filter_map(storage, |storage| match storage {
            Storage::Index(values) => Some(values.as_slice()),
            Storage::Float(_) => None,
        })
        .map_err(|_| Error::tensor(name, "holds numbers, not indices"))
    }

    /// An index argument, to be written.
    pub fn write_u32(&self, name: &str) -> Result<RefMut<'_, [u32]>> {
        let storage = self.cell(name)?.try_borrow_mut().map_err(|e| Error::tensor(name, e.to_string()))?;
        RefMut::filter_map(storage, |storage| match storage {
            Storage::Index(values) => Some(values.as_mut_slice()),
            Storage::Float(_) => None,
        })
        .map_err(|_| Error::tensor(name, "holds numbers, not indices"))
    }
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
                let len = info.tensor.len as usize;
                RefCell::new(match info.tensor.element {
                    Element::F32 | Element::F16 => Storage::Float(vec![T::zero(); len]),
                    Element::U32 => Storage::Index(vec![0; len]),
                })
            })
            .collect();
        Self { recording, memory }
    }

    fn storage(&mut self, tensor: Tensor, len: Option<usize>) -> Result<&mut Storage<T>> {
        let name = &self.recording.info(tensor)?.name;
        if let Some(len) = len.filter(|&len| len as u64 != tensor.len) {
            return Err(Error::tensor(name.clone(), format!("holds {} elements, {len} were given", tensor.len)));
        }
        match self.memory.get_mut(tensor.index()) {
            Some(cell) => Ok(cell.get_mut()),
            None => Err(Error::tensor(name.clone(), "is not of this executor's recording")),
        }
    }

    /// Sets a float tensor in this executor's own precision, without rounding.
    pub fn set(&mut self, tensor: Tensor, values: &[T]) -> Result<()> {
        match self.storage(tensor, Some(values.len()))? {
            Storage::Float(to) => to.copy_from_slice(values),
            Storage::Index(_) => return Err(wrong_type(&self.recording, tensor)),
        }
        Ok(())
    }

    /// A float tensor in this executor's own precision.
    pub fn get(&mut self, tensor: Tensor) -> Result<Vec<T>> {
        match self.storage(tensor, None)? {
            Storage::Float(values) => Ok(values.clone()),
            Storage::Index(_) => Err(wrong_type(&self.recording, tensor)),
        }
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
        let round = tensor.element == Element::F16;
        match self.storage(tensor, Some(values.len()))? {
            Storage::Float(to) => {
                for (to, &x) in to.iter_mut().zip(values) {
                    let x = T::from_f32(x);
                    *to = if round { round_f16(x) } else { x };
                }
                Ok(())
            }
            Storage::Index(_) => Err(wrong_type(&self.recording, tensor)),
        }
    }

    fn write_u32(&mut self, tensor: Tensor, values: &[u32]) -> Result<()> {
        match self.storage(tensor, Some(values.len()))? {
            Storage::Index(to) => {
                to.copy_from_slice(values);
                Ok(())
            }
            Storage::Float(_) => Err(wrong_type(&self.recording, tensor)),
        }
    }

    fn read(&mut self, tensor: Tensor) -> Result<Vec<f32>> {
        match self.storage(tensor, None)? {
            Storage::Float(values) => Ok(values.iter().map(|x| x.as_f32()).collect()),
            Storage::Index(_) => Err(wrong_type(&self.recording, tensor)),
        }
    }

    fn read_u32(&mut self, tensor: Tensor) -> Result<Vec<u32>> {
        match self.storage(tensor, None)? {
            Storage::Index(values) => Ok(values.clone()),
            Storage::Float(_) => Err(wrong_type(&self.recording, tensor)),
        }
    }

    fn run_range(&mut self, range: Range<usize>) -> Result<()> {
        let single = T::epsilon() > T::from_f64(1e-10);
        for command in self.recording.commands().get(range).unwrap_or_default() {
            let args = Args { args: &command.args, memory: &self.memory };
            T::run(&*command.reference, &args)?;
            for arg in &command.args {
                if single && arg.access != Access::Read && arg.tensor.element == Element::F16 {
                    args.write(arg.name)?.iter_mut().for_each(|x| *x = round_f16(*x));
                }
            }
        }
        Ok(())
    }
}
