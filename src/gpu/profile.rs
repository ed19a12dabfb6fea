//! Times from timestamp queries.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::gpu::executor::GpuExecutor;
use crate::profile::Profile;
use crate::recording::{Executor, part};

/// Queries of one set; WebGPU allows no more.
const QUERIES: usize = 4096;

/// Runs each command of `range` as a pass between two timestamps.
///
/// # Errors
/// [`Error::Parameter`] for a range that the recording does not have; [`Error::Gpu`] if the adapter has no timestamp queries.
pub(crate) fn profile(executor: &mut GpuExecutor, range: Range<usize>) -> Result<Profile> {
    require(executor, &range)?;
    let mut profile = Profile::default();
    let commands: Vec<usize> = range.collect();
    for commands in commands.chunks(QUERIES / 2) {
        let spans: Vec<Range<usize>> = commands.iter().map(|&command| command..command + 1).collect();
        let times = timed_passes(executor, &spans)?;
        for (&command, milliseconds) in commands.iter().zip(times) {
            if let Some(command) = executor.recording().commands().get(command) {
                profile.add(command.stage(), milliseconds);
            }
        }
    }
    Ok(profile)
}

/// Milliseconds of `range` as one pass between two timestamps: what a replay takes on the GPU, the gaps between its
/// dispatches included.
///
/// # Errors
/// [`Error::Parameter`] for a range that the recording does not have; [`Error::Gpu`] if the adapter has no timestamp queries.
pub(crate) fn time(executor: &mut GpuExecutor, range: Range<usize>) -> Result<f64> {
    require(executor, &range)?;
    Ok(timed_passes(executor, &[range])?.into_iter().sum())
}

fn require(executor: &GpuExecutor, range: &Range<usize>) -> Result<()> {
    part(executor.recording().commands(), range.clone())?;
    if executor.gpu().caps().timestamps {
        return Ok(());
    }
    Err(Error::Gpu(format!("{} has no timestamp queries", executor.gpu().name())))
}

/// Runs each span of commands as a pass of its own and gives the milliseconds of each.
fn timed_passes(executor: &mut GpuExecutor, spans: &[Range<usize>]) -> Result<Vec<f64>> {
    let device = executor.gpu().device().clone();
    let queue = executor.gpu().queue().clone();
    let count = 2 * spans.len() as u32;
    let queries = device.create_query_set(&wgpu::QuerySetDescriptor {
        label: Some("profile"),
        ty: wgpu::QueryType::Timestamp,
        count,
    });
    let resolved = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("profile"),
        size: u64::from(count) * 8,
        usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });
    for (i, span) in spans.iter().enumerate() {
        // One submission per span, so that a long one cannot add to another's watchdog time.
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let begin = 2 * i as u32;
        executor.encode_timed(
            &mut encoder,
            span.clone(),
            wgpu::ComputePassTimestampWrites {
                query_set: &queries,
                beginning_of_pass_write_index: Some(begin),
                end_of_pass_write_index: Some(begin + 1),
            },
        )?;
        queue.submit([encoder.finish()]);
    }
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.resolve_query_set(&queries, 0..count, &resolved, 0);
    queue.submit([encoder.finish()]);
    let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&executor.download(&resolved, 0, u64::from(count) * 8)?);
    let period = f64::from(queue.get_timestamp_period());
    let milliseconds = |ticks: &[u64]| match ticks {
        [begin, end] => end.saturating_sub(*begin) as f64 * period * 1e-6,
        _ => 0.0,
    };
    Ok(ticks.chunks_exact(2).map(milliseconds).collect())
}
