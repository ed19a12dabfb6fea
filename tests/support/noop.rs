//! Devices that run nothing: wgpu's noop backend, with the limits and features that a test gives it. They allocate
//! buffers and check shaders, pipelines and bind groups as any device does.

use lighthouse_attention::Gpu;

/// A device with these limits and features; with cooperative matrices, its subgroups have `subgroup` invocations.
pub fn noop(
    limits: wgpu::Limits,
    features: wgpu::Features,
    subgroup: u32,
    matrices: &[wgpu::CooperativeMatrixProperties],
) -> Gpu {
    let options = wgpu::NoopBackendOptions {
        enable: true,
        limits: Some(limits),
        features: Some(features),
        subgroup_min_size: Some(subgroup),
        subgroup_max_size: Some(subgroup),
        ..Default::default()
    };
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: wgpu::Backends::NOOP,
        backend_options: wgpu::BackendOptions { noop: options, ..Default::default() },
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::NOOP));
    Gpu::from_adapter(&adapters[0]).expect("a noop device opens").with_cooperative_matrices(matrices)
}

/// A device with WebGPU's default limits and no features.
pub fn least() -> Gpu {
    noop(wgpu::Limits::default(), wgpu::Features::empty(), 0, &[])
}
