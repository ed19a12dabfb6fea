//! Which buffer each tensor of a recording gets: scratch tensors whose lifetimes do not meet share one.

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
    /// First fit by lifetime: a scratch tensor takes the free buffer that wastes least, or grows the largest free one.
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
                (Role::Scratch, Some((first, last))) => scratch.push((first, last, index, info.tensor.bytes())),
                (Role::Scratch, None) => {}
            }
        }
        scratch.sort_unstable();
        // Shared buffers with the command at which they become free again.
        let mut shared: Vec<(usize, usize)> = Vec::new();
        for (first, last, index, bytes) in scratch {
            let size = |buffer: usize| plan.buffers.get(buffer).copied().unwrap_or(0);
            let free = shared.iter_mut().filter(|(_, until)| *until < first).min_by_key(|(buffer, _)| {
                let size = size(*buffer);
                (size < bytes, size.abs_diff(bytes))
            });
            let buffer = match free {
                Some((buffer, until)) => {
                    *until = last;
                    *buffer
                }
                None => {
                    shared.push((plan.buffers.len(), last));
                    plan.buffers.push(0);
                    plan.buffers.len() - 1
                }
            };
            if let Some(size) = plan.buffers.get_mut(buffer) {
                *size = (*size).max(bytes);
            }
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
