//! Compiled pipelines kept between runs of a program, where the driver offers it: with Vulkan.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// wgpu's cache with the file that it is kept in.
#[derive(Debug)]
pub(crate) struct PipelineCache {
    cache: wgpu::PipelineCache,
    file: PathBuf,
}

impl PipelineCache {
    /// Reads the cache of this adapter and driver in `folder`, or begins one; `None` where the device has no caches.
    pub fn open(device: &wgpu::Device, folder: &Path) -> Option<Self> {
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let file = folder.join(wgpu::util::pipeline_cache_key(&device.adapter_info())?);
        let data = fs::read(&file).ok();
        Some(Self { cache: create(device, data.as_deref()), file })
    }

    pub fn cache(&self) -> &wgpu::PipelineCache {
        &self.cache
    }

    /// Writes the file, whole or not at all.
    pub fn store(&self) -> Result<()> {
        let Some(data) = self.cache.get_data() else { return Ok(()) };
        let part = self.file.with_extension("part");
        let write = || {
            self.file.parent().map_or(Ok(()), fs::create_dir_all)?;
            fs::write(&part, &data)?;
            fs::rename(&part, &self.file)
        };
        write().map_err(|e| Error::Data { path: self.file.display().to_string(), problem: e.to_string() })
    }
}

#[allow(unsafe_code, reason = "a file that this crate wrote; wgpu and the driver check its header")]
fn create(device: &wgpu::Device, data: Option<&[u8]>) -> wgpu::PipelineCache {
    let label = Some("lighthouse-attention");
    // SAFETY: the data comes from `get_data`, by way of a file named after the adapter; with `fallback`, data of another
    // driver or wgpu is left unused.
    unsafe { device.create_pipeline_cache(&wgpu::PipelineCacheDescriptor { label, data, fallback: true }) }
}
