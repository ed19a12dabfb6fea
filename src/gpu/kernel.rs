//! Kernels: a shader with its element types and constants, and the pipeline made of it.

use std::borrow::Cow;

use crate::error::{Error, Result};
use crate::gpu::caps::{Caps, Tier};
use crate::gpu::components::ComponentLayout;
use crate::gpu::shader::{BindingKind, Composed, Reflection, compose, parse, reflect};
use crate::gpu::translate::{order_workgroup_memory, to_spirv};
use crate::tensor::Element;

/// A kernel's uniform block: `#[repr(C)]` with 4-byte scalars, and its members' names and offsets for the check
/// against the shader.
pub(crate) trait Params: bytemuck::Pod {
    const FIELDS: &'static [(&'static str, usize)];
}

/// Declares a uniform block once, with the list that is checked against the shader's `struct Params`.
macro_rules! params {
    ($(#[$meta:meta])* $name:ident { $($field:ident: $ty:ty),* $(,)? }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
        struct $name { $($field: $ty),* }
        impl $crate::gpu::Params for $name {
            const FIELDS: &'static [(&'static str, usize)] =
                &[$((stringify!($field), std::mem::offset_of!($name, $field))),*];
        }
    };
}
pub(crate) use params;

/// A workgroup grid of `count` workgroups, in two dimensions where one does not hold them; the kernel gets its number
/// from `linear_workgroup` in `shared/grid.wgsl` and leaves when it is not below the count.
///
/// # Errors
/// [`Error::Limit`] when even two dimensions do not hold them.
pub(crate) fn grid(caps: &Caps, count: u64) -> Result<[u32; 3]> {
    let limit = u64::from(caps.limits.max_compute_workgroups_per_dimension);
    let rows = count.div_ceil(limit);
    if rows > limit {
        return Err(Error::Limit {
            what: "a dispatch, counted in workgroups,".into(),
            needed: count,
            limit: "max_compute_workgroups_per_dimension (squared)",
            available: limit.saturating_mul(limit),
        });
    }
    Ok([count.div_ceil(rows.max(1)) as u32, rows as u32, 1])
}

/// Vectors of four elements in 16 bytes.
fn wide(element: Element) -> usize {
    4 / element.bytes() as usize
}

/// Invocations that share a row of `head_dim` elements in a memory-bound kernel.
fn loads(head_dim: usize, element: Element) -> usize {
    head_dim / (4 * wide(element))
}

/// Whether groups of so many neighbouring invocations can exchange values within subgroups.
fn exchange(caps: &Caps, lanes: usize) -> bool {
    lanes.is_power_of_two() && lanes <= caps.exchange
}

/// Rows of `head_dim` elements that a workgroup of a memory-bound kernel has at a time (`shaders/shared/rows.wgsl`).
pub(crate) fn rows_per_workgroup(head_dim: usize, element: Element) -> usize {
    256 / loads(head_dim, element)
}

/// The grid of a memory-bound kernel: `rows` rows of each of `heads` heads (of the whole batch) of each of `tensors`
/// tensors. A workgroup takes further rows where the device allows fewer workgroups than there are rows for.
pub(crate) fn grid_of_rows(
    caps: &Caps,
    rows: usize,
    rows_per_workgroup: usize,
    heads: usize,
    tensors: u32,
) -> [u32; 3] {
    let limit = caps.limits.max_compute_workgroups_per_dimension as usize;
    [u32::try_from(heads).unwrap_or(u32::MAX), rows.div_ceil(rows_per_workgroup).min(limit) as u32, tensors]
}

/// A constant of a shader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Constant {
    U32(u32),
    Bool(bool),
}

/// A shader with what specialises it. Two equal kernels are one pipeline.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    pub(crate) shader: &'static str,
    tier: Tier,
    elements: Vec<(&'static str, Element)>,
    matrices: Option<(usize, Element)>,
    components: Option<ComponentLayout>,
    wide: Option<&'static str>,
    module: Option<&'static str>,
    constants: Vec<(&'static str, Constant)>,
}

impl Kernel {
    /// The shader at `shaders/<shader>.wgsl`.
    pub(crate) fn new(caps: &Caps, shader: &'static str) -> Self {
        Self {
            shader,
            tier: caps.tier,
            elements: Vec::new(),
            matrices: None,
            components: None,
            wide: None,
            module: None,
            constants: Vec::new(),
        }
    }

    /// The shader's path below `shaders/` without the ending.
    pub fn shader(&self) -> &'static str {
        self.shader
    }

    /// The tier that it is made for.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// Gives the shader `alias NAME4` for four stored elements, with `unpack_NAME` to and `pack_NAME` from `vec4<f32>`.
    pub(crate) fn element(mut self, name: &'static str, element: Element) -> Self {
        self.elements.push((name, element));
        self
    }

    /// Gives the shader cooperative matrices of `size` rows and columns with factors of this type: `MatrixA` and
    /// `MatrixB`, their elements' type `factor`, their product `MatrixC` in f32, and `const MATRIX: u32`, the size; and
    /// with them the module that moves factors from storage in loads of 16 bytes, which are `const LOAD_VECTORS: u32`
    /// vectors of four.
    pub(crate) fn matrices(mut self, size: usize, factors: Element) -> Self {
        self.matrices = Some((size, factors));
        self.constant("MATRIX", size).constant("LOAD_VECTORS", 4 / factors.bytes() as usize)
    }

    /// Gives the shader the components of its cooperative matrices (`shaders/shared/components.wgsl`), held in this layout,
    /// which is `COMPONENT_ROWS`, `COMPONENT_COLUMNS` and `COMPONENT_RUN`. It runs on devices with such a layout only
    /// ([`Caps::layout`]).
    pub(crate) fn components(mut self, layout: ComponentLayout) -> Self {
        self.components = Some(layout);
        self.constant("COMPONENT_ROWS", layout.rows)
            .constant("COMPONENT_COLUMNS", layout.columns)
            .constant("COMPONENT_RUN", layout.run)
    }

    /// Gives the shader loads of 16 bytes of this type: `alias wide` with `const WIDE: u32` vectors of four, `unpack_wide`
    /// and `pack_wide`.
    pub(crate) fn wide(mut self, element: Element) -> Self {
        self.wide = Some(if element == Element::F16 { "shared/wide_f16" } else { "shared/wide_f32" });
        self.constant("WIDE", wide(element))
    }

    /// As [`wide`](Self::wide) with one vector of four, in the storage type of the element named `c`.
    pub(crate) fn wide_one(mut self) -> Self {
        self.wide = Some("shared/wide_one");
        self.constant("WIDE", 1)
    }

    /// Gives the shader a module that it does not name itself: the one, of several with the same functions, that suits
    /// the device.
    pub(crate) fn module(mut self, module: &'static str) -> Self {
        self.module = Some(module);
        self
    }

    /// Gives the shader `group_max` and `group_sum` over `lanes` neighbouring invocations: by exchange within subgroups
    /// where these have so many, otherwise through workgroup memory.
    pub(crate) fn group_reduce(self, caps: &Caps, lanes: usize) -> Self {
        self.module(if exchange(caps, lanes) { "shared/group_reduce_subgroup" } else { "shared/group_reduce" })
    }

    /// Gives the shader `takes_branch`, for branches with barriers of a subgroup in them.
    pub(crate) fn branch(self, caps: &Caps) -> Self {
        self.module(if caps.lone_barriers { "shared/branch_subgroup" } else { "shared/branch_workgroup" })
    }

    /// Gives the shader `row_norms` over the row groups of `shared/rows`, likewise.
    pub(crate) fn row_norms(self, caps: &Caps, head_dim: usize, element: Element) -> Self {
        let exchange = exchange(caps, loads(head_dim, element));
        self.module(if exchange { "shared/row_norms_subgroup" } else { "shared/row_norms" })
    }

    /// Gives the shader `const NAME: u32`.
    pub(crate) fn constant(mut self, name: &'static str, value: usize) -> Self {
        self.constants.push((name, Constant::U32(value as u32)));
        self
    }

    /// Gives the shader `const NAME: bool`.
    pub(crate) fn flag(mut self, name: &'static str, value: bool) -> Self {
        self.constants.push((name, Constant::Bool(value)));
        self
    }

    fn prelude(&self) -> String {
        let native = self.tier >= Tier::SimtF16;
        let mut prelude = String::new();
        if native && self.elements.iter().any(|(_, element)| *element == Element::F16) {
            prelude.push_str("enable f16;\n");
        }
        if let Some((size, factors)) = self.matrices {
            let (scalar, load) = match factors {
                Element::F16 => ("f16", "load_f16"),
                Element::F32 | Element::U32 => ("f32", "load_f32"),
            };
            // naga derives no uniform control flow from subgroup operations, and refuses matrices after them.
            prelude.push_str(&format!(
                "enable wgpu_cooperative_matrix;\n\
                 diagnostic(off, derivative_uniformity);\n\
                 alias factor = {scalar};\n\
                 alias MatrixA = coop_mat{size}x{size}<{scalar}, A>;\n\
                 alias MatrixB = coop_mat{size}x{size}<{scalar}, B>;\n\
                 alias MatrixC = coop_mat{size}x{size}<f32, C>;\n\
                 #import shared/{load}\n"
            ));
        }
        let components = self.components.map(|_| "shared/components");
        for module in self.wide.into_iter().chain(components).chain(self.module) {
            prelude.push_str(&format!("#import {module}\n"));
        }
        for (name, element) in &self.elements {
            let (alias, unpack, pack) = match element {
                Element::F16 if native => ("vec4<f16>", "vec4<f32>(x)", "vec4<f16>(x)"),
                Element::F16 => (
                    "vec2<u32>",
                    "vec4<f32>(unpack2x16float(x.x), unpack2x16float(x.y))",
                    "vec2<u32>(pack2x16float(x.xy), pack2x16float(x.zw))",
                ),
                Element::F32 | Element::U32 => ("vec4<f32>", "x", "x"),
            };
            prelude.push_str(&format!(
                "alias {name}4 = {alias};\n\
                 fn unpack_{name}(x: {name}4) -> vec4<f32> {{ return {unpack}; }}\n\
                 fn pack_{name}(x: vec4<f32>) -> {name}4 {{ return {pack}; }}\n"
            ));
        }
        for (name, constant) in &self.constants {
            prelude.push_str(&match constant {
                Constant::U32(value) => format!("const {name}: u32 = {value}u;\n"),
                Constant::Bool(value) => format!("const {name}: bool = {value};\n"),
            });
        }
        prelude
    }

    /// The kernel's WGSL.
    ///
    /// # Errors
    /// [`Error::Shader`] as [`compose`](crate::gpu::compose).
    pub fn compose(&self) -> Result<Composed> {
        let numbers: Vec<(&'static str, u32)> = self
            .constants
            .iter()
            .filter_map(|&(name, constant)| match constant {
                Constant::U32(value) => Some((name, value)),
                Constant::Bool(_) => None,
            })
            .collect();
        compose(self.shader, &self.prelude(), &numbers)
    }

    /// The SPIR-V that a device gets instead of the WGSL, for a kernel with components of cooperative matrices.
    ///
    /// # Errors
    /// [`Error::Shader`] if the kernel is not valid.
    pub fn spirv(&self) -> Result<Option<Vec<u32>>> {
        if self.components.is_none() {
            return Ok(None);
        }
        let module = parse(self.shader, &self.compose()?)?;
        to_spirv(module, self.shader).map(Some)
    }
}

/// A built kernel.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
    pub reflection: Reflection,
}

impl Pipeline {
    /// Composes, checks against the host's side and the device's limits, and builds.
    pub fn new(
        device: &wgpu::Device,
        kernel: &Kernel,
        fields: &[(&'static str, usize)],
        cache: Option<&wgpu::PipelineCache>,
    ) -> Result<Self> {
        let name = kernel.shader;
        let composed = kernel.compose()?;
        let mut parsed = parse(name, &composed)?;
        let reflection = reflect(name, &parsed)?;
        check(name, &reflection, fields, &device.limits())?;
        let entries: Vec<wgpu::BindGroupLayoutEntry> = reflection
            .bindings
            .iter()
            .map(|binding| wgpu::BindGroupLayoutEntry {
                binding: binding.index,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: match binding.kind {
                        BindingKind::Storage { writable } => wgpu::BufferBindingType::Storage { read_only: !writable },
                        BindingKind::Uniform => wgpu::BufferBindingType::Uniform,
                    },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let scope = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let layout =
            device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(name), entries: &entries });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let module = if kernel.components.is_some() {
            passthrough_module(device, name, to_spirv(parsed, name)?)
        } else if device.adapter_info().backend == wgpu::Backend::Vulkan {
            // WGSL has no words for it. On Metal naga writes such barriers right, and browsers take WGSL only.
            order_workgroup_memory(&mut parsed);
            shader_module(device, name, wgpu::ShaderSource::Naga(Cow::Owned(parsed)))
        } else {
            shader_module(device, name, wgpu::ShaderSource::Wgsl(composed.source.into()))
        };
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            // Kernels write their workgroup memory before they read it; zeroing it costs a pass over it per workgroup.
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..Default::default()
            },
            cache,
        });
        match pollster::block_on(scope.pop()) {
            Some(error) => Err(Error::Shader { shader: format!("shaders/{name}.wgsl"), message: error.to_string() }),
            None => Ok(Self { pipeline, layout, reflection }),
        }
    }
}

#[allow(unsafe_code, reason = "the kernels' bounds are proven by their tests; release builds drop the runtime checks")]
fn shader_module(device: &wgpu::Device, name: &str, source: wgpu::ShaderSource<'_>) -> wgpu::ShaderModule {
    let checks = if cfg!(debug_assertions) {
        wgpu::ShaderRuntimeChecks::checked()
    } else {
        wgpu::ShaderRuntimeChecks::unchecked()
    };
    // SAFETY: every index is bounded by the shapes that the host checked, and no loop is unbounded.
    unsafe { device.create_shader_module_trusted(wgpu::ShaderModuleDescriptor { label: Some(name), source }, checks) }
}

#[allow(unsafe_code, reason = "what naga wrote of a valid module, with components of matrices taken and set in it")]
fn passthrough_module(device: &wgpu::Device, name: &str, spirv: Vec<u32>) -> wgpu::ShaderModule {
    // SAFETY: as in `shader_module`; bindings are numbered as wgpu numbers them (`to_spirv`), and `check` has compared the
    // workgroup with the device's limits.
    unsafe {
        device.create_shader_module_passthrough(wgpu::ShaderModuleDescriptorPassthrough {
            label: Some(name),
            // Vulkan reads the workgroup's size from the SPIR-V.
            entry_points: vec![wgpu::PassthroughShaderEntryPoint { name: "main".into(), workgroup_size: (0, 0, 0) }]
                .into(),
            spirv: Some(spirv.into()),
            ..Default::default()
        })
    }
}

/// Host and shader must agree on parameters; the device must hold the workgroup.
pub(crate) fn check(
    name: &str,
    reflection: &Reflection,
    fields: &[(&'static str, usize)],
    limits: &wgpu::Limits,
) -> Result<()> {
    let params: Vec<(&str, usize)> = reflection.params.iter().map(|(name, offset)| (name.as_str(), *offset)).collect();
    if params != fields {
        return Err(Error::Shader {
            shader: format!("shaders/{name}.wgsl"),
            message: format!("Params is {params:?} in the shader and {fields:?} on the host"),
        });
    }
    let storage = reflection.bindings.iter().filter(|b| matches!(b.kind, BindingKind::Storage { .. })).count() as u64;
    let needs = [
        // The driver hangs on a dispatch that needs more, without any error (seen on an H100).
        (
            "workgroup memory",
            reflection.workgroup_bytes,
            "max_compute_workgroup_storage_size",
            limits.max_compute_workgroup_storage_size,
        ),
        (
            "invocations",
            u64::from(reflection.invocations),
            "max_compute_invocations_per_workgroup",
            limits.max_compute_invocations_per_workgroup,
        ),
        (
            "storage buffers",
            storage,
            "max_storage_buffers_per_shader_stage",
            limits.max_storage_buffers_per_shader_stage,
        ),
    ];
    for (what, needed, limit, available) in needs {
        if needed > u64::from(available) {
            let what = format!("shader {name}, counted in {what},");
            return Err(Error::Limit { what, needed, limit, available: u64::from(available) });
        }
    }
    Ok(())
}
