//! Tensors of a recording: handles with a static length and element type.

use crate::error::{Error, Result};

/// Storage type of a tensor's elements. All arithmetic is in f32, whatever the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// Indices, positions and token ids.
    U32,
}

impl Element {
    /// Bytes of one element.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 | Self::U32 => 4,
            Self::F16 => 2,
        }
    }

    /// The type's usual short name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::U32 => "u32",
        }
    }
}

impl std::fmt::Display for Element {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Element {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        match word {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            _ => Err(Error::Unknown { what: "element type", value: word.into(), known: "f32, f16".into() }),
        }
    }
}

/// How long a tensor lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Keeps its contents between replays; the host may read and write it, or bring the buffer.
    External,
    /// Lives from its first writer to its last reader inside one replay; may share memory with others.
    Scratch,
}

/// A handle to a tensor of one [`Recording`](crate::Recording).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tensor {
    pub(crate) id: u32,
    pub(crate) element: Element,
    pub(crate) len: u64,
}

impl Tensor {
    /// Number of elements.
    pub const fn len(self) -> u64 {
        self.len
    }

    /// True for no tensor that a recording hands out: empty tensors are refused.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Storage type.
    pub const fn element(self) -> Element {
        self.element
    }

    /// Size in bytes, rounded up to the four bytes that a storage binding counts in.
    pub const fn bytes(self) -> u64 {
        (self.len * self.element.bytes()).next_multiple_of(4)
    }

    pub(crate) const fn index(self) -> usize {
        self.id as usize
    }
}

/// What a recording knows of a tensor.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// Name for errors, labels and profiles.
    pub name: String,
    /// The handle.
    pub tensor: Tensor,
    /// Its lifetime.
    pub role: Role,
    /// For a view: the external tensor whose memory it is, and the element of it that the view begins at.
    pub view: Option<(Tensor, u64)>,
}

impl TensorInfo {
    /// The tensor that holds the memory: the parent of a view, or the tensor itself.
    pub fn owner(&self) -> Tensor {
        self.view.map_or(self.tensor, |(parent, _)| parent)
    }
}
