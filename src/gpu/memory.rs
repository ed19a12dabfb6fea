//! Which buffer each tensor of a recording gets: scratch tensors whose lifetimes do not meet share one.

use std::cmp::Reverse;

use crate::recording::Recording;
use crate::tensor::Role;

/// Buffer sizes, and the buffer of each tensor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MemoryPlan {
    /// Bytes of each buffer.
    pub buffers: Vec<u64>,
    /// The buffer's number, by tensor; `None` for a tensor that no command uses and the host cannot see.
    pub of_tensor: Vec<Option<usize>>,
}

impl MemoryPlan {
    /// The largest scratch tensors are placed first, each in a buffer that is free all its life: so no buffer grows, and small
    /// tensors fill the time that large ones leave.
    pub fn new(recording: &Recording) -> Self {
        let tensors = recording.tensors();
        let mut lifetimes: Vec<Option<(usize, usize)>> = vec![None; tensors.len()];
        for (at, command) in recording.commands().iter().enumerate() {
            for arg in &command.args {
                if let Some(lifetime) = lifetimes.get_mut(arg.tensor.index()) {
                    let (first, _) = lifetime.unwrap_or((at, at));
                    *lifetime = Some((first, at));
                }
            }
        }
        let mut plan = Self { buffers: Vec::new(), of_tensor: vec![None; tensors.len()] };
        let mut scratch = Vec::new();
        for (index, info) in tensors.iter().enumerate() {
            match (info.role, lifetimes.get(index).copied().flatten()) {
                (Role::External, _) if info.view.is_some() => {
                    // A parent is made before its views.
                    let buffer = plan.of_tensor.get(info.owner().index()).copied().flatten();
                    plan.set(index, buffer.unwrap_or(0));
                }
                (Role::External, _) => {
                    plan.set(index, plan.buffers.len());
                    plan.buffers.push(info.tensor.bytes());
                }
                (Role::Scratch, Some((first, last))) => {
                    scratch.push((Reverse(info.tensor.bytes()), first, last, index));
                }
                (Role::Scratch, None) => {}
            }
        }
        scratch.sort_unstable();
        // Of each shared buffer, the lifetimes that it holds.
        let mut shared: Vec<(usize, Vec<(usize, usize)>)> = Vec::new();
        for (Reverse(bytes), first, last, index) in scratch {
            let apart = |&(from, until): &(usize, usize)| until < first || last < from;
            let buffer = match shared.iter_mut().find(|(_, lifetimes)| lifetimes.iter().all(apart)) {
                Some((buffer, lifetimes)) => {
                    lifetimes.push((first, last));
                    *buffer
                }
                None => {
                    shared.push((plan.buffers.len(), vec![(first, last)]));
                    plan.buffers.push(bytes);
                    plan.buffers.len() - 1
                }
            };
            plan.set(index, buffer);
        }
        plan
    }

    fn set(&mut self, tensor: usize, buffer: usize) {
        if let Some(slot) = self.of_tensor.get_mut(tensor) {
            *slot = Some(buffer);
        }
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        self.buffers.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Args, Reference};
    use crate::error::Result;
    use crate::gpu::Caps;
    use crate::real::Real;
    use crate::recording::Command;
    use crate::tensor::{Element, Tensor};

    struct Nothing;

    impl Reference for Nothing {
        fn run<T: Real>(&self, _: &Args<'_, T>) -> Result<()> {
            Ok(())
        }
    }

    /// Records scratch tensors of so many elements that live from one command to another.
    fn record(lives: &[(usize, usize, usize)]) -> Result<(Recording, Vec<Tensor>)> {
        let mut recording = Recording::new(&Caps::cpu());
        let tensors: Vec<Tensor> =
            lives.iter().map(|&(len, ..)| recording.scratch("", Element::F32, &[len])).collect::<Result<_>>()?;
        for at in 0..=lives.iter().map(|&(_, _, last)| last).max().unwrap_or(0) {
            let mut command = Command::new("", Nothing);
            for (&(_, first, last), &tensor) in lives.iter().zip(&tensors) {
                if first == at {
                    command = command.writes("", tensor);
                } else if last == at {
                    command = command.reads("", tensor);
                }
            }
            recording.push(command)?;
        }
        Ok((recording, tensors))
    }

    #[test]
    fn tensors_alive_together_lie_apart() -> Result<()> {
        let lives: Vec<_> = (0..200usize).map(|i| (1 + i * 37 % 50, i / 2, i / 2 + i * 61 % 30)).collect();
        let (recording, tensors) = record(&lives)?;
        let plan = MemoryPlan::new(&recording);
        for (i, (&(len, first, last), a)) in lives.iter().zip(&tensors).enumerate() {
            let buffer = plan.of_tensor[a.index()].expect("it is used");
            assert!(plan.buffers[buffer] >= 4 * len as u64);
            for (&(_, from, until), b) in lives.iter().zip(&tensors).take(i) {
                assert!(until < first || last < from || plan.of_tensor[b.index()] != Some(buffer));
            }
        }
        Ok(())
    }

    /// The sizes that meet in a model's backward: a short large tensor, and small ones that come and go before it.
    #[test]
    fn small_tensors_share_with_large_ones() -> Result<()> {
        let (recording, _) = record(&[(10, 0, 1), (20, 2, 3), (10, 4, 5), (30, 6, 7), (20, 7, 8)])?;
        assert_eq!(MemoryPlan::new(&recording).bytes(), 4 * (30 + 20));
        Ok(())
    }
}
