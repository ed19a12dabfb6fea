//! What a device can do, reduced to what the plans ask.

use std::num::NonZeroUsize;

use crate::error::{Error, Result};
use crate::gpu::components::ComponentLayout;
use crate::gpu::processors::processors;
use crate::tensor::Element;

/// The kernel families, in ascending order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// WebGPU's default limits and nothing else; f16 tensors are unpacked from u32 pairs.
    SimtF32,
    /// Native f16 storage, f32 arithmetic.
    SimtF16,
    /// Cooperative matrices of 8x8: Apple's GPUs, llvmpipe of Mesa 26.
    Coop8,
    /// Cooperative matrices of 16x16 with f16 inputs and f32 accumulators: NVIDIA, AMD.
    Coop16,
}

impl Tier {
    /// All tiers, the least demanding first.
    pub const ALL: [Self; 4] = [Self::SimtF32, Self::SimtF16, Self::Coop8, Self::Coop16];

    /// The tier's name, as `LIGHTHOUSE_TIER` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SimtF32 => "simt_f32",
            Self::SimtF16 => "simt_f16",
            Self::Coop8 => "coop8",
            Self::Coop16 => "coop16",
        }
    }

    /// Rows and columns of the tier's cooperative matrices.
    pub const fn matrix(self) -> Option<usize> {
        match self {
            Self::SimtF32 | Self::SimtF16 => None,
            Self::Coop8 => Some(8),
            Self::Coop16 => Some(16),
        }
    }
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Tier {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|tier| tier.name() == word).ok_or_else(|| Error::Unknown {
            what: "tier",
            value: word.into(),
            known: Self::ALL.map(Self::name).join(", "),
        })
    }
}

/// Square cooperative matrices that accumulate in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixKind {
    /// Rows and columns.
    pub size: usize,
    /// Type of the factors' elements.
    pub factors: Element,
}

impl MatrixKind {
    /// What an adapter's configuration is to the kernels; `None` if they have no use for it.
    fn new(properties: &wgpu::CooperativeMatrixProperties) -> Option<Self> {
        let wgpu::CooperativeMatrixProperties { m_size, n_size, k_size, ab_type, cr_type, .. } = *properties;
        let factors = match ab_type {
            wgpu::CooperativeScalarType::F16 => Element::F16,
            wgpu::CooperativeScalarType::F32 => Element::F32,
            _ => return None,
        };
        let square = m_size == n_size && n_size == k_size;
        (square && cr_type == wgpu::CooperativeScalarType::F32).then_some(Self { size: m_size as usize, factors })
    }
}

/// A device's capabilities. Plans are pure functions of them and of shapes, so they are tested without a GPU.
#[derive(Clone, Debug)]
pub struct Caps {
    /// The device's limits.
    pub limits: wgpu::Limits,
    /// Native f16 in shaders.
    pub shader_f16: bool,
    /// Timestamps around passes.
    pub timestamps: bool,
    /// Cooperative matrices; none where the size of a subgroup is not known.
    pub matrices: Vec<MatrixKind>,
    /// How subgroups hold those of the matrices whose components kernels can reach.
    pub layouts: Vec<(MatrixKind, ComponentLayout)>,
    /// Invocations of a subgroup; 0 if unknown.
    pub subgroup: usize,
    /// Invocations of the smallest subgroup whose invocations can exchange values; 0 if they cannot.
    pub exchange: usize,
    /// Whether a subgroup can pass barriers of its own in a branch that others of its workgroup do not take.
    pub lone_barriers: bool,
    /// The kernels to use.
    pub tier: Tier,
    /// Multiprocessors that plans count with.
    pub processors: NonZeroUsize,
    /// Whether that is what the driver says; otherwise they are those of an H100.
    pub processors_known: bool,
    /// Most floating-point operations of one dispatch: desktop drivers reset a device whose dispatch runs for about
    /// 2 s, so longer ones are cut.
    pub work_per_dispatch: u64,
    /// Most bytes of scratch memory that a stage takes for speed alone.
    pub scratch_bytes: u64,
}

/// Those of an H100.
const PROCESSORS: NonZeroUsize = NonZeroUsize::new(132).unwrap();
/// 2 GiB, what a binding can hold: at lengths that ask for so much, what a training step keeps of its forward is many times
/// that.
const SCRATCH_BYTES: u64 = 2 << 30;
/// A GPU of 1 TFLOP/s takes 0.25 s for this much.
const WORK_PER_DISPATCH: u64 = 1 << 38;
/// The slowest GPU with 16x16 cooperative matrices does 8 TFLOP/s with them, and takes 0.5 s for this much.
const WORK_PER_COOP16_DISPATCH: u64 = 1 << 42;

impl Default for Caps {
    /// WebGPU's default limits: what every adapter has, and what a recording for the CPU is planned with, except that
    /// there buffers may be as large as memory.
    fn default() -> Self {
        Self {
            limits: wgpu::Limits::default(),
            shader_f16: false,
            timestamps: false,
            matrices: Vec::new(),
            layouts: Vec::new(),
            subgroup: 0,
            exchange: 0,
            lone_barriers: false,
            tier: Tier::SimtF32,
            processors: PROCESSORS,
            processors_known: false,
            work_per_dispatch: WORK_PER_DISPATCH,
            scratch_bytes: SCRATCH_BYTES,
        }
    }
}

impl Caps {
    /// For a recording that only the CPU will run: nothing bounds a tensor but memory.
    pub fn cpu() -> Self {
        let limits = wgpu::Limits {
            max_buffer_size: u64::MAX,
            max_storage_buffer_binding_size: u64::MAX,
            max_compute_workgroups_per_dimension: u32::MAX,
            ..wgpu::Limits::default()
        };
        Self { limits, ..Self::default() }
    }

    /// Capabilities of a device, with the best tier for it; `LIGHTHOUSE_TIER` is not looked at. A device does not
    /// tell the cooperative matrices of its adapter: they are the caller's to give, and count if the device has the
    /// features for them.
    pub fn of_device(device: &wgpu::Device, matrices: &[wgpu::CooperativeMatrixProperties]) -> Self {
        let features = device.features();
        let info = device.adapter_info();
        let subgroup =
            if info.subgroup_min_size == info.subgroup_max_size { info.subgroup_max_size as usize } else { 0 };
        let needed = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX
            | wgpu::Features::SUBGROUP
            | wgpu::Features::SUBGROUP_BARRIER
            | wgpu::Features::SHADER_F16;
        let usable = subgroup > 0 && features.contains(needed);
        let software = info.device_type == wgpu::DeviceType::Cpu;
        let processors = processors(device);
        let mut caps = Self {
            limits: device.limits(),
            shader_f16: features.contains(wgpu::Features::SHADER_F16),
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            matrices: matrices.iter().filter(|_| usable).filter_map(MatrixKind::new).collect(),
            subgroup,
            exchange: if features.contains(wgpu::Features::SUBGROUP) { info.subgroup_min_size as usize } else { 0 },
            // llvmpipe's wait for the whole workgroup.
            lone_barriers: usable && !software,
            processors: processors.unwrap_or(PROCESSORS),
            processors_known: processors.is_some(),
            ..Self::default()
        };
        // Drivers that compute on the CPU gain nothing by matrices, and compile their kernels for a minute.
        let best = caps.tiers().into_iter().rfind(|tier| !software || tier.matrix().is_none());
        caps.set_tier(best.unwrap_or(Tier::SimtF32));
        caps
    }

    /// The tiers that the device has.
    pub fn tiers(&self) -> Vec<Tier> {
        Tier::ALL.into_iter().filter(|&tier| self.has(tier)).collect()
    }

    fn has(&self, tier: Tier) -> bool {
        match tier {
            Tier::SimtF32 => true,
            Tier::SimtF16 => self.shader_f16,
            Tier::Coop8 => self.matrices.iter().any(|matrix| matrix.size == 8),
            Tier::Coop16 => self.has_matrix(Tier::Coop16, Element::F16),
        }
    }

    /// Whether the device has a tier's cooperative matrices for factors of this type.
    pub fn has_matrix(&self, tier: Tier, factors: Element) -> bool {
        tier.matrix().is_some_and(|size| self.matrices.contains(&MatrixKind { size, factors }))
    }

    /// How a subgroup holds a tier's cooperative matrices, if kernels can reach the components of those with factors of
    /// this type.
    pub fn layout(&self, tier: Tier, factors: Element) -> Option<ComponentLayout> {
        let matrix = MatrixKind { size: tier.matrix()?, factors };
        self.layouts.iter().find(|(kind, _)| *kind == matrix).map(|&(_, layout)| layout)
    }

    fn set_tier(&mut self, tier: Tier) {
        self.tier = tier;
        self.work_per_dispatch = if tier == Tier::Coop16 { WORK_PER_COOP16_DISPATCH } else { WORK_PER_DISPATCH };
    }

    /// The same device with a tier forced.
    ///
    /// # Errors
    /// [`Error::Tier`] if the device lacks it; it lists those that it has.
    pub fn with_tier(mut self, tier: Tier, adapter: &str) -> Result<Self> {
        if !self.has(tier) {
            let available: Vec<&str> = self.tiers().into_iter().map(Tier::name).collect();
            return Err(Error::Tier {
                tier: tier.to_string(),
                adapter: adapter.to_owned(),
                available: available.join(", "),
            });
        }
        self.set_tier(tier);
        Ok(self)
    }
}
