//! Matrix products of the model's linear maps, square: forward, and the gradients of input and weight.

use lighthouse_attention::nn::linear::{self, LinearShape};
use lighthouse_attention::{Element, Recording};

use crate::Result;
use crate::bench::Bench;
use crate::report::Row;
use crate::stats::Timing;

pub fn run(bench: &mut Bench) -> Result<()> {
    let size = bench.sizes.gemm;
    let element = Element::F16;
    let shape = LinearShape { rows: size, inputs: size, outputs: size, element };
    let mut recording = Recording::new(&bench.device.caps());
    let x = recording.external("x", element, &[size, size])?;
    let weight = recording.external("weight", element, &[size, size])?;
    let d_y = recording.external("d_y", element, &[size, size])?;
    let d_weight = recording.external("d_weight", Element::F32, &[size, size])?;
    let y = linear::record_forward(&mut recording, &shape, x, weight, None)?;
    let forward = recording.len();
    let d_x = linear::record_backward_input(&mut recording, &shape, d_y, weight)?;
    let input = recording.len();
    linear::record_backward_weight(&mut recording, &shape, d_y, x, d_weight)?;
    let rows = [
        ("gemm", 0..forward, y),
        ("gemm of d_x", forward..input, d_x),
        ("gemm of d_weight", input..recording.len(), d_weight),
    ];
    recording.keep(y)?;
    recording.keep(d_x)?;
    let mut runner = bench.device.runner(recording, &[x, weight, d_y])?;
    for (name, range, written) in rows {
        let mut row = Row::new(name, "", element, &[("m", size), ("n", size), ("k", size)]);
        row.flops = Some(2 * (size as u64).pow(3));
        row.floor_ms = bench.floor_ms(element, None, row.flops);
        let clock = bench.clock;
        let samples = bench.budget.collect(|| runner.time(range.clone(), clock))?;
        runner.expect_written(written)?;
        bench.add(row.timed(Timing::of(&samples).ok_or("no runs")?, clock));
    }
    Ok(())
}
