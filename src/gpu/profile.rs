//! Milliseconds per stage from timestamp queries.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::gpu::executor::GpuExecutor;
use crate::recording::Executor;

/// What one stage took in a replay.
#[derive(Clone, Debug, PartialEq)]
pub struct ProfileRow {
    /// The stage's name.
    pub stage: &'static str,
    /// How many commands of it ran.
    pub commands: usize,
    /// Their time together.
    pub milliseconds: f64,
}

/// The stages of a replay with their times, in order of first appearance.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// One row per stage.
    pub rows: Vec<ProfileRow>,
}

/// Queries of one set; WebGPU allows no more.
const QUERIES: usize = 4096;

impl Profile {
    pub(crate) fn measure(executor: &mut GpuExecutor, range: Range<usize>) -> Result<Self> {
        require_timestamps(executor)?;
        let mut profile = Self::default();
        let commands: Vec<usize> = range.collect();
        for commands in commands.chunks(QUERIES / 2) {
            profile.measure_some(executor, commands)?;
        }
        Ok(profile)
    }

    fn measure_some(&mut self, executor: &mut GpuExecutor, commands: &[usize]) -> Result<()> {
        let spans: Vec<Range<usize>> = commands.iter().map(|&command| command..command + 1).collect();
        let times = timed_passes(executor, &spans)?;
        for (&command, milliseconds) in commands.iter().zip(times) {
            let Some(stage) = executor.recording().commands().get(command).map(|command| command.stage()) else {
                continue;
            };
            match self.rows.iter_mut().find(|row| row.stage == stage) {
                Some(row) => {
                    row.commands += 1;
                    row.milliseconds += milliseconds;
                }
                None => self.rows.push(ProfileRow { stage, commands: 1, milliseconds }),
            }
        }
        Ok(())
    }

    /// The sum over all stages.
    pub fn milliseconds(&self) -> f64 {
        self.rows.iter().map(|row| row.milliseconds).sum()
    }
}

/// Milliseconds of `range` as one pass between two timestamps: what a replay takes on the GPU, the gaps between its
/// dispatches included.
///
/// # Errors
/// [`Error::Gpu`] if the adapter has no timestamp queries.
pub(crate) fn time(executor: &mut GpuExecutor, range: Range<usize>) -> Result<f64> {
    require_timestamps(executor)?;
    Ok(timed_passes(executor, &[range])?.into_iter().sum())
}

fn require_timestamps(executor: &GpuExecutor) -> Result<()> {
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
        );
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

impl std::fmt::Display for Profile {
    /// A table, the slowest stage first.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let total = self.milliseconds();
        let mut rows: Vec<&ProfileRow> = self.rows.iter().collect();
        rows.sort_by(|a, b| b.milliseconds.total_cmp(&a.milliseconds));
        writeln!(f, "{:<28} {:>8} {:>12} {:>7}", "stage", "commands", "ms", "share")?;
        for row in rows {
            let share = 100.0 * row.milliseconds / total.max(f64::MIN_POSITIVE);
            writeln!(f, "{:<28} {:>8} {:>12.4} {share:>6.1}%", row.stage, row.commands, row.milliseconds)?;
        }
        write!(f, "{:<28} {:>8} {total:>12.4}", "total", self.rows.iter().map(|row| row.commands).sum::<usize>())
    }
}
