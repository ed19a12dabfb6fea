//! What a device can do, reduced to what the plans ask.

use crate::error::{Error, Result};

/// The kernel families, in ascending order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// WebGPU's default limits and nothing else; f16 tensors are unpacked from u32 pairs.
    SimtF32,
    /// Native f16 storage, f32 arithmetic.
    SimtF16,
}

impl Tier {
    /// All tiers, the least demanding first.
    pub const ALL: [Self; 2] = [Self::SimtF32, Self::SimtF16];

    /// The tier's name, as `LIGHTHOUSE_TIER` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SimtF32 => "simt_f32",
            Self::SimtF16 => "simt_f16",
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

/// A device's capabilities. Plans are pure functions of them and of shapes, so they are tested without a GPU.
#[derive(Clone, Debug)]
pub struct Caps {
    /// The device's limits.
    pub limits: wgpu::Limits,
    /// Native f16 in shaders.
    pub shader_f16: bool,
    /// Timestamps around passes.
    pub timestamps: bool,
    /// The kernels to use.
    pub tier: Tier,
    /// Most floating-point operations of one dispatch: desktop drivers reset a device whose dispatch runs for about
    /// 2 s, so longer ones are cut.
    pub work_per_dispatch: u64,
}

/// A GPU of 1 TFLOP/s takes 0.25 s for this much.
const WORK_PER_DISPATCH: u64 = 1 << 38;

impl Default for Caps {
    /// WebGPU's default limits: what every adapter has, and what a recording for the CPU is planned with, except that
    /// there buffers may be as large as memory.
    fn default() -> Self {
        Self {
            limits: wgpu::Limits::default(),
            shader_f16: false,
            timestamps: false,
            tier: Tier::SimtF32,
            work_per_dispatch: WORK_PER_DISPATCH,
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

    /// Capabilities of a device; `LIGHTHOUSE_TIER` is not looked at.
    pub fn of_device(device: &wgpu::Device) -> Self {
        let features = device.features();
        let shader_f16 = features.contains(wgpu::Features::SHADER_F16);
        Self {
            limits: device.limits(),
            shader_f16,
            timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
            tier: if shader_f16 { Tier::SimtF16 } else { Tier::SimtF32 },
            work_per_dispatch: WORK_PER_DISPATCH,
        }
    }

    /// The tiers that the device has.
    pub fn tiers(&self) -> Vec<Tier> {
        Tier::ALL.into_iter().filter(|&tier| self.has(tier)).collect()
    }

    fn has(&self, tier: Tier) -> bool {
        match tier {
            Tier::SimtF32 => true,
            Tier::SimtF16 => self.shader_f16,
        }
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
        self.tier = tier;
        Ok(self)
    }
}
