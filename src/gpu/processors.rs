//! How many multiprocessors a GPU has. wgpu does not tell; Vulkan's drivers for NVIDIA and AMD do.

use std::num::NonZeroUsize;

/// The multiprocessors (NVIDIA) or compute units (AMD) of a device's GPU, where its driver names them.
#[cfg(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd"))]
#[allow(unsafe_code, reason = "wgpu does not have these properties; two questions to the driver, which change nothing")]
pub(super) fn processors(device: &wgpu::Device) -> Option<NonZeroUsize> {
    use ash::{amd, nv, vk};

    // SAFETY: neither the device nor its instance is destroyed; both are used while the guard holds them.
    let device = unsafe { device.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let (instance, gpu) = (device.shared_instance().raw_instance(), device.raw_physical_device());
    // SAFETY: the GPU is one of the instance's.
    let extensions = unsafe { instance.enumerate_device_extension_properties(gpu) }.ok()?;
    let has = |name| extensions.iter().any(|extension| extension.extension_name_as_c_str() == Ok(name));
    let mut nvidia = vk::PhysicalDeviceShaderSMBuiltinsPropertiesNV::default();
    let mut amd = vk::PhysicalDeviceShaderCoreProperties2AMD::default();
    let mut properties = vk::PhysicalDeviceProperties2::default();
    if has(nv::shader_sm_builtins::NAME) {
        properties = properties.push_next(&mut nvidia);
    } else if has(amd::shader_core_properties2::NAME) {
        properties = properties.push_next(&mut amd);
    } else {
        return None;
    }
    // SAFETY: as above; the structure that it is to fill in is of an extension that the GPU has.
    unsafe { instance.get_physical_device_properties2(gpu, &mut properties) };
    NonZeroUsize::new(nvidia.shader_sm_count.max(amd.active_compute_unit_count) as usize)
}

/// No driver of this system names them.
#[cfg(not(any(windows, target_os = "linux", target_os = "android", target_os = "freebsd")))]
pub(super) fn processors(_: &wgpu::Device) -> Option<NonZeroUsize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Result;

    const NVIDIA: u32 = 0x10de;

    #[test]
    fn drivers_name_them_or_not() -> Result<()> {
        for gpu in crate::gpu::tested()? {
            let info = gpu.device().adapter_info();
            let found = processors(gpu.device());
            assert_eq!(gpu.caps().processors_known, found.is_some(), "{}", gpu.name());
            if info.device_type == wgpu::DeviceType::Cpu || info.backend != wgpu::Backend::Vulkan {
                assert_eq!(found, None, "{}", gpu.name());
            } else if info.vendor == NVIDIA {
                assert!(found.is_some_and(|found| found.get() < 1024), "{}: {found:?}", gpu.name());
            }
        }
        Ok(())
    }
}
