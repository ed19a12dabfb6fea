//! Everything that touches wgpu: adapters, capabilities, shader composition, pipelines and the executor.

mod caps;
mod components;
mod context;
mod executor;
mod kernel;
mod memory;
mod pipeline_cache;
mod processors;
mod profile;
mod shader;
mod translate;

pub use caps::{Caps, MatrixKind, Tier};
pub use components::{ComponentLayout, layout_kernel};
#[cfg(test)]
pub(crate) use context::tested;
pub use context::{Gpu, NO_DRIVER_HINT, adapters, parse_backends};
pub use executor::GpuExecutor;
pub use kernel::Kernel;
pub(crate) use kernel::{Params, grid, grid_of_rows, params, rows_per_workgroup};
pub use shader::{SHADERS, compose};
#[cfg(test)]
pub(crate) use shader::{parse, reflect};
