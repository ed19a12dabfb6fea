//! Every shader that the crate can record, without a GPU: composed, validated, translated to SPIR-V, MSL and HLSL, and
//! built as a pipeline on wgpu's noop backend. The variants are found by recording, so that no list of them can age.

#[path = "support/noop.rs"]
mod noop;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use lighthouse_attention::gpu::{ComponentLayout, Kernel, MatrixKind, SHADERS, layout_kernel};
use lighthouse_attention::model::{Model, ModelConfig};
use lighthouse_attention::nn::adamw::AdamW;
use lighthouse_attention::stage::flash::{self, FlashShape, Layout};
use lighthouse_attention::{
    Caps, Element, Gpu, GpuExecutor, LighthouseAttention, LighthouseConfig, Recording, Result, Shape, Tier,
};
use naga::back::{hlsl, msl, spv};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use rayon::prelude::*;

/// Noop devices with each of their tiers: WebGPU's least, Apple's, llvmpipe's, NVIDIA's and AMD's as far as plans look at
/// them, and one with large limits, for which tiles may be larger.
fn devices() -> Vec<Gpu> {
    let least = wgpu::Limits::default();
    let large = wgpu::Limits {
        max_compute_workgroup_storage_size: 64 << 10,
        max_compute_invocations_per_workgroup: 1024,
        max_compute_workgroup_size_x: 1024,
        max_storage_buffers_per_shader_stage: 16,
        ..wgpu::Limits::default()
    };
    let f16 = wgpu::Features::SHADER_F16;
    let coop = f16
        | wgpu::Features::SUBGROUP
        | wgpu::Features::SUBGROUP_BARRIER
        | wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let matrices = |size, ab_type| wgpu::CooperativeMatrixProperties {
        m_size: size,
        n_size: size,
        k_size: size,
        ab_type,
        cr_type: wgpu::CooperativeScalarType::F32,
        saturating_accumulation: false,
    };
    let half = |size| matrices(size, wgpu::CooperativeScalarType::F16);
    let single = |size| matrices(size, wgpu::CooperativeScalarType::F32);
    let devices = [
        noop::least(),
        noop::noop(large.clone(), f16, 0, &[]),
        noop::noop(large.clone(), f16 | wgpu::Features::SUBGROUP, 4, &[]),
        noop::noop(least.clone(), wgpu::Features::SUBGROUP, 8, &[]),
        noop::noop(large.clone(), coop, 8, &[half(8)]),
        noop::noop(large.clone(), coop, 32, &[half(8), single(8)]),
        noop::noop(least.clone(), coop, 32, &[half(8), single(8), half(16)]),
        noop::noop(large.clone(), coop, 32, &[half(16)]),
        noop::noop(large, coop, 64, &[half(16)]),
    ];
    let tiers = devices.into_iter().flat_map(|gpu| {
        let tiers = gpu.caps().tiers().into_iter();
        tiers.map(|tier| gpu.clone().with_tier(tier).expect("it has the tier")).collect::<Vec<_>>()
    });
    tiers.collect()
}

/// A layer, forward and backward.
fn layer(caps: &Caps, config: LighthouseConfig, shape: Shape) -> Result<Recording> {
    let mut recording = Recording::new(caps);
    let q = recording.external("q", shape.element, &shape.q())?;
    let k = recording.external("k", shape.element, &shape.kv())?;
    let v = recording.external("v", shape.element, &shape.kv())?;
    let d_o = recording.external("d_o", shape.element, &shape.q())?;
    let layer = LighthouseAttention::new(config, shape)?;
    let forward = layer.record_forward(&mut recording, [q, k, v])?;
    layer.record_backward(&mut recording, &forward, d_o)?;
    Ok(recording)
}

/// Attention by itself: its backward goes by heads and tokens.
fn attention(caps: &Caps, element: Element, (heads, kv_heads): (usize, usize), tokens: usize) -> Result<Recording> {
    let layout = Layout::HeadsTokens;
    let shape = FlashShape { batch: 1, tokens, heads, kv_heads, head_dim: 64, element, layout };
    let mut recording = Recording::new(caps);
    let mut external = |name: &str, size: [usize; 4]| recording.external(name, element, &size);
    let qkv = [external("q", shape.q())?, external("k", shape.kv())?, external("v", shape.kv())?];
    let d_o = external("d_o", shape.q())?;
    let forward = flash::record_forward(&mut recording, &shape, qkv, None)?;
    flash::record_backward(&mut recording, &shape, qkv, &forward, d_o, None)?;
    Ok(recording)
}

/// A model: a step, a dense step, an evaluation.
fn model(caps: &Caps, width: usize, heads: usize, hidden: usize, tokens: usize, element: Element) -> Result<Recording> {
    let config = ModelConfig {
        batch: 1,
        tokens,
        width,
        layers: 2,
        heads,
        kv_heads: 1,
        hidden,
        element,
        attention: LighthouseConfig { levels: 2, pooling: 2, top_k: 4, chunk: 4 },
        dense_layers: vec![0],
    };
    let mut recording = Recording::new(caps);
    Model::new(config)?.record(&mut recording, &AdamW::default())?;
    Ok(recording)
}

/// All head dims that kernels take.
fn head_dims() -> Vec<usize> {
    (8..=256).step_by(8).collect()
}

/// Layers and models of all levels, pooling factors and widths that make a kernel differ, in both storage types.
fn recordings(caps: &Caps, head_dims: &[usize]) -> Result<Vec<Recording>> {
    let mut recordings = Vec::new();
    for element in [Element::F32, Element::F16] {
        let shape = |head_dim| Shape { batch: 1, tokens: 64, heads: 2, kv_heads: 1, head_dim, element };
        for &head_dim in head_dims {
            let config = LighthouseConfig { levels: 2, pooling: 2, top_k: 4, chunk: 4 };
            recordings.push(layer(caps, config, shape(head_dim))?);
        }
        for (levels, pooling, chunk) in [(1, 2, 2), (2, 2, 1024), (3, 4, 128), (4, 8, 2), (5, 2, 8), (6, 4, 64)] {
            let config = LighthouseConfig { levels, pooling, top_k: chunk, chunk };
            recordings.push(layer(caps, config, shape(64))?);
        }
        for (heads, tokens) in [((1, 1), 8320), ((64, 64), 1024), ((8, 2), 1024)] {
            recordings.push(attention(caps, element, heads, tokens)?);
        }
        // In slices of tokens.
        let mut small = caps.clone();
        small.limits.max_storage_buffer_binding_size = 80 << 10 >> u32::from(element == Element::F16);
        let config = LighthouseConfig { levels: 3, pooling: 4, top_k: 4, chunk: 4 };
        recordings.push(layer(&small, config, Shape { tokens: 256, ..shape(64) })?);
        for (width, heads, hidden, tokens) in [(16, 2, 24, 40), (128, 1, 192, 600), (1280, 5, 24, 16)] {
            recordings.push(model(caps, width, heads, hidden, tokens, element)?);
        }
    }
    Ok(recordings)
}

/// A device that tells how it holds its matrices, as Vulkan's do, if there is one with such matrices and subgroups:
/// NVIDIA's or lavapipe's.
fn with_layouts(caps: &Caps) -> Option<Caps> {
    let (size, layout) = match (caps.tier, caps.subgroup) {
        (Tier::Coop16, 32) => (16, ComponentLayout { rows: 2, columns: 4, run: 2 }),
        (Tier::Coop8, 8) => (8, ComponentLayout { rows: 8, columns: 1, run: 1 }),
        _ => return None,
    };
    let kinds = [Element::F16, Element::F32].map(|factors| MatrixKind { size, factors });
    let layouts = kinds.into_iter().filter(|kind| caps.matrices.contains(kind)).map(|kind| (kind, layout)).collect();
    Some(Caps { layouts, ..caps.clone() })
}

/// Each WGSL text that can be recorded, or that asks a device for its layouts, once, with a kernel that composes to it.
fn variants() -> Result<HashMap<String, Kernel>> {
    let mut kernels = HashSet::new();
    for gpu in devices() {
        for caps in [Some(gpu.caps().clone()), with_layouts(gpu.caps())].into_iter().flatten() {
            for recording in recordings(&caps, &head_dims())? {
                kernels.extend(recording.commands().iter().flat_map(|command| command.kernels().cloned()));
            }
        }
        let caps = gpu.caps();
        kernels.extend([Element::F16, Element::F32].into_iter().filter_map(|e| layout_kernel(caps, caps.tier, e)));
    }
    // A text may be valid on two tiers: the lesser must hold it.
    let mut kernels: Vec<Kernel> = kernels.into_iter().collect();
    kernels.sort_by_key(|kernel| std::cmp::Reverse(kernel.tier()));
    kernels.into_iter().map(|kernel| Ok((kernel.compose()?.source, kernel))).collect()
}

#[test]
fn every_file_is_registered() {
    let shaders = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    for folder in std::fs::read_dir(&shaders).expect("readable") {
        for file in std::fs::read_dir(folder.expect("readable").path()).expect("a folder") {
            let path = file.expect("readable").path().with_extension("");
            let name =
                path.strip_prefix(&shaders).expect("below it").to_str().expect("a plain name").replace('\\', "/");
            assert!(SHADERS.iter().any(|(shader, _)| *shader == name), "shaders/{name}.wgsl is not in SHADERS");
        }
    }
}

#[test]
fn every_shader_is_recorded() -> Result<()> {
    let recorded: HashSet<&str> = variants()?.values().map(Kernel::shader).collect();
    for (name, _) in SHADERS.iter().filter(|(name, _)| !name.starts_with("shared/")) {
        assert!(recorded.contains(name), "nothing runs shaders/{name}.wgsl");
    }
    Ok(())
}

/// Validates and translates a shader; what goes wrong, in words.
fn translate(source: &str, kernel: &Kernel) -> Result<(), String> {
    let coop = source.contains("coop_mat");
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SHADER_FLOAT16, kernel.tier() >= Tier::SimtF16);
    let matrices = Capabilities::COOPERATIVE_MATRIX | Capabilities::SUBGROUP_BARRIER;
    capabilities.set(matrices, coop && kernel.tier().matrix().is_some());
    capabilities.set(Capabilities::SUBGROUP, coop || source.contains("subgroupShuffleXor"));
    let module = naga::front::wgsl::parse_str(source).map_err(|e| e.emit_to_string(source))?;
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .validate(&module)
        .map_err(|e| format!("not valid: {}", e.emit_to_string(source)))?;
    if kernel.spirv().map_err(|e| e.to_string())?.is_some() {
        // It is for Vulkan alone, and its WGSL means nothing.
        return Ok(());
    }
    let options = spv::Options { lang_version: (1, 3), ..spv::Options::default() };
    spv::write_vec(&module, &info, &options, None).map_err(|e| format!("SPIR-V: {e}"))?;
    let options = msl::Options { lang_version: (2, 4), ..msl::Options::default() };
    msl::write_string(&module, &info, &options, &msl::PipelineOptions::default()).map_err(|e| format!("MSL: {e}"))?;
    if coop {
        // HLSL has no cooperative matrices: a DX12 device has none of these tiers.
        return Ok(());
    }
    // f16 needs shader model 6.2.
    let options = hlsl::Options { shader_model: hlsl::ShaderModel::V6_2, ..hlsl::Options::default() };
    let pipeline = hlsl::PipelineOptions::default();
    let mut text = String::new();
    hlsl::Writer::new(&mut text, &options, &pipeline)
        .write(&module, &info, None)
        .map(drop)
        .map_err(|e| format!("HLSL: {e}"))
}

#[test]
fn every_variant_translates_to_spirv_msl_and_hlsl() -> Result<()> {
    let variants = variants()?;
    let failures: Vec<String> = variants
        .par_iter()
        .filter_map(|(source, kernel)| translate(source, kernel).err().map(|e| format!("{kernel:?}: {e}")))
        .collect();
    assert!(failures.is_empty(), "{} of {} variants:\n{}", failures.len(), variants.len(), failures.join("\n"));
    // Two storage types and 32 head dims of four attention kernels, at least.
    assert!(variants.len() > 256, "only {} variants", variants.len());
    Ok(())
}

#[test]
fn pipelines_and_bind_groups_build() -> Result<()> {
    for gpu in devices() {
        // Fewer head dims: what differs between them is in the texts, which another test validates.
        for recording in recordings(gpu.caps(), &[8, 24, 128, 256])? {
            GpuExecutor::new(&gpu, Arc::new(recording), &[])?;
        }
    }
    Ok(())
}

#[test]
fn every_tier_is_met() {
    let tiers: HashSet<Tier> = devices().iter().map(|gpu| gpu.caps().tier).collect();
    assert_eq!(tiers.len(), Tier::ALL.len(), "{tiers:?}");
}
