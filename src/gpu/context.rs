//! Adapters and devices.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::gpu::caps::{Caps, Tier};
use crate::gpu::components;
use crate::gpu::kernel::{Kernel, Pipeline};
use crate::gpu::pipeline_cache::PipelineCache;

/// What to tell a person whose machine shows no adapter.
pub const NO_DRIVER_HINT: &str = "install a Vulkan driver (Debian, Ubuntu: apt install mesa-vulkan-drivers libvulkan1; \
                                  NVIDIA: the vendor's driver and libvulkan1)";

/// Reads a backend's name: `all`, `vulkan`, `metal`, `dx12` or `gl`.
///
/// # Errors
/// [`Error::Unknown`] for any other word.
pub fn parse_backends(word: &str) -> Result<wgpu::Backends> {
    match word {
        "all" => Ok(wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12 | wgpu::Backends::GL),
        "vulkan" => Ok(wgpu::Backends::VULKAN),
        "metal" => Ok(wgpu::Backends::METAL),
        "dx12" => Ok(wgpu::Backends::DX12),
        "gl" => Ok(wgpu::Backends::GL),
        _ => Err(Error::Unknown { what: "backend", value: word.into(), known: "all, vulkan, metal, dx12, gl".into() }),
    }
}

fn names(backends: wgpu::Backends) -> String {
    backends.iter_names().map(|(name, _)| name.to_lowercase()).collect::<Vec<_>>().join(", ")
}

fn instance(backends: wgpu::Backends) -> wgpu::Instance {
    wgpu::Instance::new(wgpu::InstanceDescriptor { backends, ..wgpu::InstanceDescriptor::new_without_display_handle() })
}

/// The adapters of the backends that can run compute shaders, each GPU once: an OpenGL adapter of a vendor whose GPU
/// another of the backends reaches is left out. (Asked for alone it is there; beside Vulkan on an NVIDIA GPU without a
/// display, both devices were lost.)
pub fn adapters(backends: wgpu::Backends) -> Vec<wgpu::Adapter> {
    let mut adapters = pollster::block_on(instance(backends).enumerate_adapters(backends));
    adapters
        .retain(|adapter| adapter.get_downlevel_capabilities().flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS));
    let infos: Vec<wgpu::AdapterInfo> = adapters.iter().map(wgpu::Adapter::get_info).collect();
    let is_again = |info: &wgpu::AdapterInfo| {
        let same = |other: &&wgpu::AdapterInfo| other.backend != wgpu::Backend::Gl && other.vendor == info.vendor;
        info.backend == wgpu::Backend::Gl && infos.iter().any(|other| same(&other))
    };
    adapters.retain(|adapter| {
        let info = adapter.get_info();
        let again = is_again(&info);
        if again {
            tracing::info!(adapter = info.name, "left out on OpenGL: another backend reaches this GPU");
        }
        !again
    });
    adapters
}

/// Ranks adapters: real GPUs before software, Vulkan, Metal and DX12 before GL.
fn preference(info: &wgpu::AdapterInfo) -> (u8, bool) {
    let device = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    (device, info.backend == wgpu::Backend::Gl)
}

#[allow(unsafe_code, reason = "cooperative matrices are experimental in wgpu; the tests cover every use of them")]
fn experimental_features() -> wgpu::ExperimentalFeatures {
    // SAFETY: the kernels with cooperative matrices keep to the forms that the tests run on every driver.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

/// A device with its queue, its capabilities and the pipelines built for it.
///
/// Cloning shares all of these.
#[derive(Clone, Debug)]
pub struct Gpu {
    device: wgpu::Device,
    queue: wgpu::Queue,
    caps: Caps,
    name: String,
    pipelines: Arc<Mutex<HashMap<Kernel, Arc<Pipeline>>>>,
    cache: Option<Arc<PipelineCache>>,
    lost: Arc<Mutex<Option<String>>>,
}

impl Gpu {
    /// Opens the best adapter of the backends: a discrete GPU before an integrated one before a software driver.
    ///
    /// `LIGHTHOUSE_TIER` forces a tier.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if there is none, [`Error::Gpu`] if it cannot be opened, [`Error::Tier`] if it lacks the
    /// forced tier.
    pub fn new(backends: wgpu::Backends) -> Result<Self> {
        let adapter = adapters(backends).into_iter().min_by_key(|adapter| preference(&adapter.get_info()));
        let adapter = adapter.ok_or_else(|| Error::NoAdapter { backends: names(backends), hint: NO_DRIVER_HINT })?;
        let gpu = Self::from_adapter(&adapter)?;
        match std::env::var("LIGHTHOUSE_TIER") {
            Ok(tier) => gpu.with_tier(tier.parse()?),
            Err(_) => Ok(gpu),
        }
    }

    /// Opens what a person names: `all`, `vulkan`, `metal`, `dx12` or `gl` as [`new`](Self::new), or `cpu` for `None`.
    /// With `all`, a machine without any adapter also gives `None`, after a line on the standard error that says so and
    /// how to get a driver: that is a normal case, and the CPU executor runs every recording.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Unknown`] for another word.
    pub fn open(backend: &str) -> Result<Option<Self>> {
        if backend == "cpu" {
            return Ok(None);
        }
        match Self::new(parse_backends(backend)?) {
            Ok(gpu) => Ok(Some(gpu)),
            Err(Error::NoAdapter { .. }) if backend == "all" => {
                eprintln!("no GPU adapter found: running on the CPU. For a GPU, {NO_DRIVER_HINT}.");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Opens an adapter with all its limits and the features that kernels can use.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver refuses.
    pub fn from_adapter(adapter: &wgpu::Adapter) -> Result<Self> {
        let wanted = wgpu::Features::SHADER_F16
            | wgpu::Features::TIMESTAMP_QUERY
            | wgpu::Features::SUBGROUP
            | wgpu::Features::SUBGROUP_BARRIER
            | wgpu::Features::PIPELINE_CACHE
            | wgpu::Features::PASSTHROUGH_SHADERS
            | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("lighthouse-attention"),
            required_features: adapter.features() & wanted,
            required_limits: adapter.limits(),
            memory_hints: wgpu::MemoryHints::Performance,
            experimental_features: experimental_features(),
            ..Default::default()
        };
        let (device, queue) =
            pollster::block_on(adapter.request_device(&descriptor)).map_err(|e| Error::Gpu(e.to_string()))?;
        let mut gpu = Self::from_device(device, queue);
        let info = adapter.get_info();
        gpu.name = format!("{} ({:?}, {} {})", info.name, info.backend, info.driver, info.driver_info);
        let lost = gpu.lost.clone();
        gpu.device.on_uncaptured_error(Arc::new(move |error| {
            lost.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error.to_string());
        }));
        Ok(gpu.with_cooperative_matrices(&adapter.cooperative_matrix_properties()))
    }

    /// Takes a device of the caller's. Its error handlers stay the caller's. For the tiers with cooperative matrices
    /// it needs [`with_cooperative_matrices`](Self::with_cooperative_matrices) too.
    pub fn from_device(device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let caps = Caps::of_device(&device, &[]);
        let info = device.adapter_info();
        Self {
            caps,
            name: format!("{} ({:?})", info.name, info.backend),
            device,
            queue,
            pipelines: Arc::default(),
            cache: None,
            lost: Arc::default(),
        }
    }

    /// The same device with its adapter's cooperative matrices, of which a device itself tells nothing
    /// ([`wgpu::Adapter::cooperative_matrix_properties`]), and with the best tier that it has then. They count if the
    /// device was made with SHADER_F16, SUBGROUP, SUBGROUP_BARRIER and EXPERIMENTAL_COOPERATIVE_MATRIX, and if its
    /// subgroups have one size. With PASSTHROUGH_SHADERS as well, on Vulkan, kernels may reach the components of the
    /// matrices, which makes attention faster; a small kernel runs here for each kind of matrix and finds out.
    pub fn with_cooperative_matrices(mut self, properties: &[wgpu::CooperativeMatrixProperties]) -> Self {
        self.caps = Caps::of_device(&self.device, properties);
        self.caps.layouts = components::layouts(&self.device, &self.queue, &self.caps);
        self
    }

    /// The same device with a tier forced.
    ///
    /// # Errors
    /// [`Error::Tier`] if the device lacks it.
    pub fn with_tier(mut self, tier: Tier) -> Result<Self> {
        self.caps = self.caps.with_tier(tier, &self.name)?;
        Ok(self)
    }

    /// The same device, whose kernels do without the components of cooperative matrices, as on a device without
    /// PASSTHROUGH_SHADERS: scores of attention pass through workgroup memory.
    pub fn without_components(mut self) -> Self {
        self.caps.layouts.clear();
        self
    }

    /// The same device with compiled pipelines kept in `folder` from one run of the program to the next, where the
    /// driver offers it. [`store_pipelines`](Self::store_pipelines) writes them.
    pub fn with_pipeline_cache(mut self, folder: &Path) -> Self {
        self.cache = PipelineCache::open(&self.device, folder).map(Arc::new);
        self
    }

    /// Writes the pipelines compiled so far, if [`with_pipeline_cache`](Self::with_pipeline_cache) was called and the
    /// driver offers it.
    ///
    /// # Errors
    /// [`Error::Data`] if the folder or the file cannot be written.
    pub fn store_pipelines(&self) -> Result<()> {
        self.cache.as_ref().map_or(Ok(()), |cache| cache.store())
    }

    /// The same device, on which stages take at most this many bytes of scratch memory for speed alone.
    pub fn with_scratch_bytes(mut self, bytes: u64) -> Self {
        self.caps.scratch_bytes = bytes;
        self
    }

    /// What the device can do.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Adapter, backend and driver.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the adapter is a driver that computes on the CPU.
    pub fn is_software(&self) -> bool {
        self.device.adapter_info().device_type == wgpu::DeviceType::Cpu
    }

    /// The device.
    pub fn device(&self) -> &wgpu::Device {
        &self.device
    }

    /// The queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    /// The pipeline of a kernel, built at its first use.
    pub(crate) fn pipeline(&self, kernel: &Kernel, fields: &[(&'static str, usize)]) -> Result<Arc<Pipeline>> {
        if let Some(pipeline) = self.pipelines.lock().unwrap_or_else(PoisonError::into_inner).get(kernel) {
            return Ok(pipeline.clone());
        }
        // Built outside the lock, so that many can be built at a time.
        let cache = self.cache.as_ref().map(|cache| cache.cache());
        let pipeline = Arc::new(Pipeline::new(&self.device, kernel, fields, cache)?);
        let mut pipelines = self.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(pipelines.entry(kernel.clone()).or_insert(pipeline).clone())
    }

    /// Waits for all submitted work.
    ///
    /// # Errors
    /// [`Error::Gpu`] with what the device reported since the last call.
    pub fn wait(&self) -> Result<()> {
        self.device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| Error::Gpu(e.to_string()))?;
        self.check()
    }

    /// Passes on an error that the device reported.
    pub(crate) fn check(&self) -> Result<()> {
        match self.lost.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(message) => Err(Error::Gpu(message)),
            None => Ok(()),
        }
    }
}

/// The GPUs that tests run on: all, or those of LIGHTHOUSE_BACKEND.
#[cfg(test)]
pub(crate) fn tested() -> Result<Vec<Gpu>> {
    let backend = std::env::var("LIGHTHOUSE_BACKEND").unwrap_or_else(|_| "all".into());
    let adapters = if backend == "cpu" { Vec::new() } else { adapters(parse_backends(&backend)?) };
    adapters.iter().map(Gpu::from_adapter).collect()
}
