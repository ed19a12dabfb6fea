//! Components of cooperative matrices: the elements that an invocation holds.
//!
//! Which ones a lane holds is the driver's own choice, so a kernel asks each device for it. How kernels reach them is in
//! `translate.rs`.

use std::sync::mpsc;

use crate::error::{Error, Result};
use crate::gpu::caps::{Caps, MatrixKind, Tier};
use crate::gpu::kernel::{Kernel, Pipeline};
use crate::tensor::Element;

/// How a subgroup holds a cooperative matrix, be it a first factor or a product: each lane has `rows * columns` components.
///
/// NVIDIA's matrices of 16x16 have 2 rows of 4 columns in runs of 2, lavapipe's of 8x8 have 8 rows of 1 column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ComponentLayout {
    /// Rows of the matrix that a lane has components of, evenly spaced.
    pub rows: usize,
    /// Components that it has of each.
    pub columns: usize,
    /// Neighbouring columns among them.
    pub run: usize,
}

impl ComponentLayout {
    /// Row and column of a lane's component in a matrix of `size` rows and columns.
    pub fn position(&self, size: usize, lane: usize, component: usize) -> (usize, usize) {
        let Self { rows, columns, run } = *self;
        let row_lanes = size / columns;
        let (h, c) = (component / columns, component % columns);
        (h * (size / rows) + lane / row_lanes, lane % row_lanes * run + c % run + c / run * row_lanes * run)
    }

    /// All layouts of a matrix, each one once: where one lane has all of a row, its run is the whole row.
    fn candidates(size: usize, subgroup: usize) -> impl Iterator<Item = Self> {
        let divisors = move |n: usize| (1..=n).rev().filter(move |divisor| n.is_multiple_of(*divisor));
        divisors(size)
            .flat_map(move |rows| divisors(size).map(move |columns| (rows, columns)))
            .filter(move |(rows, columns)| rows * columns * subgroup == size * size)
            .flat_map(move |(rows, columns)| divisors(columns).map(move |run| Self { rows, columns, run }))
    }

    /// The layout that explains what each subgroup wrote in `shaders/gpu/matrix_layout.wgsl`.
    fn of_values(size: usize, subgroup: usize, values: &[f32]) -> Option<Self> {
        let elements = size * size;
        let components = elements / subgroup;
        let explains = |layout: &Self| {
            values.chunks(elements).enumerate().all(|(part, values)| {
                values.iter().enumerate().all(|(at, &value)| {
                    let (row, column) = layout.position(size, at / components, at % components);
                    let is_matrix = part % 4 >= 2;
                    value == if is_matrix { at + 1 } else { row * size + column } as f32
                })
            })
        };
        Self::candidates(size, subgroup).find(explains)
    }
}

/// Subgroups of a workgroup of the kernel that asks for a layout.
const SUBGROUPS: usize = 2;

/// The kernel that asks a device how it holds a tier's matrices with factors of this type; `None` if it does not have them.
/// No recording has it.
pub fn layout_kernel(caps: &Caps, tier: Tier, factors: Element) -> Option<Kernel> {
    let size = tier.matrix().filter(|_| caps.has_matrix(tier, factors))?;
    let components = (size * size).checked_div(caps.subgroup).filter(|n| n * caps.subgroup == size * size)?;
    let caps = Caps { tier, ..caps.clone() };
    let kernel = Kernel::new(&caps, "gpu/matrix_layout")
        .element("elem", factors)
        .matrices(size, factors)
        // Only how many there are is known.
        .components(ComponentLayout { rows: 1, columns: components, run: 1 })
        .constant("SUBGROUP", caps.subgroup)
        .constant("SUBGROUPS", SUBGROUPS);
    Some(kernel)
}

/// How a device holds its matrices, as far as it lets kernels reach their components. Whatever goes wrong on the way leaves
/// a device without: the other kernels serve it.
pub(super) fn layouts(device: &wgpu::Device, queue: &wgpu::Queue, caps: &Caps) -> Vec<(MatrixKind, ComponentLayout)> {
    let vulkan = device.adapter_info().backend == wgpu::Backend::Vulkan;
    if !vulkan || !device.features().contains(wgpu::Features::PASSTHROUGH_SHADERS) {
        return Vec::new();
    }
    let mut layouts = Vec::new();
    for tier in caps.tiers() {
        for factors in [Element::F16, Element::F32] {
            let (Some(size), Some(kernel)) = (tier.matrix(), layout_kernel(caps, tier, factors)) else { continue };
            match run(device, queue, &kernel, SUBGROUPS * 4 * size * size) {
                Ok(values) => {
                    let layout = ComponentLayout::of_values(size, caps.subgroup, &values);
                    tracing::debug!(%tier, ?factors, ?layout, "components of cooperative matrices");
                    layouts.extend(layout.map(|layout| (MatrixKind { size, factors }, layout)));
                }
                Err(error) => tracing::debug!(%tier, ?factors, %error, "no components of cooperative matrices"),
            }
        }
    }
    layouts
}

/// Runs one workgroup of a kernel whose one binding holds so many values, and reads them. The device's errors are caught,
/// and not the business of its error handler.
fn run(device: &wgpu::Device, queue: &wgpu::Queue, kernel: &Kernel, values: usize) -> Result<Vec<f32>> {
    let filters = [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal];
    let scopes = filters.map(|filter| device.push_error_scope(filter));
    let values = run_uncaught(device, queue, kernel, 4 * values as u64);
    let caught = scopes.into_iter().rev().filter_map(|scope| pollster::block_on(scope.pop())).last();
    caught.map_or(values, |error| Err(Error::Gpu(error.to_string())))
}

fn run_uncaught(device: &wgpu::Device, queue: &wgpu::Queue, kernel: &Kernel, size: u64) -> Result<Vec<f32>> {
    let gpu_error = |error: &dyn std::error::Error| Error::Gpu(error.to_string());
    let label = Some(kernel.shader());
    let Pipeline { pipeline, layout, .. } = Pipeline::new(device, kernel, &[], None)?;
    let buffer =
        |usage| device.create_buffer(&wgpu::BufferDescriptor { label, size, usage, mapped_at_creation: false });
    let out = buffer(wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
    let readback = buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
    let entries = &[wgpu::BindGroupEntry { binding: 0, resource: out.as_entire_binding() }];
    let bind_group = device.create_bind_group(&wgpu::BindGroupDescriptor { label, layout: &layout, entries });
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label });
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes: None });
    pass.set_pipeline(&pipeline);
    pass.set_bind_group(0, &bind_group, &[]);
    pass.dispatch_workgroups(1, 1, 1);
    drop(pass);
    encoder.copy_buffer_to_buffer(&out, 0, &readback, 0, size);
    queue.submit([encoder.finish()]);
    let (send, receive) = mpsc::channel();
    readback.map_async(wgpu::MapMode::Read, .., move |result| {
        let _ = send.send(result);
    });
    device.poll(wgpu::PollType::wait_indefinitely()).map_err(|e| gpu_error(&e))?;
    receive.try_recv().map_err(|e| gpu_error(&e))?.map_err(|e| gpu_error(&e))?;
    let bytes = readback.get_mapped_range(..).map_err(|e| gpu_error(&e))?;
    Ok(bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const NVIDIA: ComponentLayout = ComponentLayout { rows: 2, columns: 4, run: 2 };
    const LAVAPIPE: ComponentLayout = ComponentLayout { rows: 8, columns: 1, run: 1 };

    /// What the kernel writes on a device with this layout.
    fn written(size: usize, subgroup: usize, layout: ComponentLayout) -> Vec<f32> {
        let elements = size * size;
        let components = elements / subgroup;
        let number = |at: usize| {
            let (row, column) = layout.position(size, at / components, at % components);
            (row * size + column) as f32
        };
        let parts: Vec<f32> = (0..2 * elements)
            .map(|at| number(at % elements))
            .chain((0..2 * elements).map(|at| (at % elements + 1) as f32))
            .collect();
        parts.repeat(SUBGROUPS)
    }

    #[test]
    fn layouts_are_told_apart() {
        for (size, subgroup) in [(16, 32), (16, 64), (8, 8), (8, 32), (8, 64)] {
            let all: Vec<ComponentLayout> = ComponentLayout::candidates(size, subgroup).collect();
            for &layout in &all {
                let values = written(size, subgroup, layout);
                let held: HashSet<u32> = values[..size * size].iter().map(|value| *value as u32).collect();
                assert_eq!(held.len(), size * size, "{layout:?} has each element once");
                let found = ComponentLayout::of_values(size, subgroup, &values).expect("it is a candidate");
                assert_eq!(written(size, subgroup, found), values);
                // One lane has a row: any run is the whole row.
                assert!(found == layout || layout.columns == size && found.run == size, "{layout:?}: {found:?}");
            }
            let known = if size == 16 { NVIDIA } else { LAVAPIPE };
            assert_eq!(all.contains(&known), [(16, 32), (8, 8)].contains(&(size, subgroup)));
        }
        assert_eq!(NVIDIA.position(16, 5, 7), (9, 11));
        assert_eq!(LAVAPIPE.position(8, 5, 7), (7, 5));
    }

    #[test]
    fn what_no_layout_explains_has_none() {
        let values = written(16, 32, NVIDIA);
        // In either subgroup: a component of a result, of a factor, and an element of either's matrix.
        for at in [3, 256 + 3, 512 + 3, 768 + 3, 1024 + 3, 1024 + 768 + 3] {
            for wrong in [-1.0, f32::NAN] {
                let mut values = values.clone();
                values[at] = wrong;
                assert_eq!(ComponentLayout::of_values(16, 32, &values), None);
            }
        }
        // A factor that is held in another way than a result.
        let mut mixed = values;
        let other = written(16, 32, ComponentLayout { run: 4, ..NVIDIA });
        for from in [256, 1024 + 256] {
            mixed[from..from + 256].copy_from_slice(&other[256..512]);
        }
        assert_eq!(ComponentLayout::of_values(16, 32, &mixed), None);
    }
}
