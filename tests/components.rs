//! Components of cooperative matrices: which devices let kernels reach them, and how they hold the matrices.

mod support;

use lighthouse_attention::gpu::ComponentLayout;
use support::devices;

/// The layout of an adapter's matrices of this size, where it is known.
fn known(adapter: &str, size: usize) -> Option<ComponentLayout> {
    match size {
        8 if adapter.contains("llvmpipe") => Some(ComponentLayout { rows: 8, columns: 1, run: 1 }),
        16 if adapter.contains("NVIDIA") => Some(ComponentLayout { rows: 2, columns: 4, run: 2 }),
        _ => None,
    }
}

#[test]
fn vulkan_devices_tell_their_layouts() {
    let off = std::env::var("LIGHTHOUSE_COMPONENTS").is_ok_and(|value| value == "off");
    for device in devices() {
        let caps = device.gpu.caps();
        let vulkan = device.gpu.device().adapter_info().backend == wgpu::Backend::Vulkan;
        for &matrix in &caps.matrices {
            if let Some(known) = known(&device.adapter, matrix.size).filter(|_| vulkan && !off) {
                // Devices without components are among them.
                let same = devices().iter().filter(|other| other.adapter == device.adapter);
                let mut layouts = same.flat_map(|other| &other.gpu.caps().layouts);
                assert!(layouts.any(|layout| *layout == (matrix, known)), "{matrix:?} on {}", device.adapter);
            }
        }
        for (matrix, layout) in &caps.layouts {
            assert!(caps.matrices.contains(matrix), "{matrix:?} on {}", device.adapter);
            assert_eq!(layout.rows * layout.columns * caps.subgroup, matrix.size * matrix.size);
        }
        assert!((vulkan && !off) || caps.layouts.is_empty(), "{}: {:?}", device.adapter, caps.layouts);
    }
}
