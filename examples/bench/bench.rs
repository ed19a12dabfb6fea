//! What the row groups share: the machine, its measured bandwidth, the budget, and the rows so far.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use lighthouse_attention::{Element, Recording, Tensor};

use crate::Result;
use crate::device::{Clock, Device, Kind, Runner};
use crate::groups::attention;
use crate::report::{self, BOTH, FORWARD, Report, Row, significant, thousands};
use crate::stats::{Budget, Timing};

/// Default sizes for a kind of device.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Sequences of attention by itself.
    pub batch: usize,
    pub heads: usize,
    /// Key/value heads of attention by itself, by default `heads`.
    pub kv_heads: Option<usize>,
    pub head_dim: usize,
    /// Bytes of the buffer that is copied to measure the bandwidth.
    pub copied: u64,
    pub attention: Vec<usize>,
    pub layer: Vec<usize>,
    pub stages: Vec<usize>,
    /// Rows and columns of the matrix products.
    pub gemm: usize,
    /// From and to, for the growth of the layer's time.
    pub growth: Option<[usize; 2]>,
    /// Tokens of the attention that warms the device up.
    warm_tokens: usize,
    pub warmup: f64,
}

impl Sizes {
    pub fn of(kind: Kind) -> Self {
        match kind {
            Kind::Discrete => Self {
                batch: 1,
                heads: 8,
                kv_heads: None,
                head_dim: 128,
                copied: 1 << 30,
                attention: vec![4096, 18_432, 32_768],
                layer: vec![32_768, 98_304, 131_072, 262_144, 524_288],
                stages: vec![98_304, 524_288],
                gemm: 8192,
                growth: Some([131_072, 1_048_576]),
                warm_tokens: 4096,
                warmup: 2.5,
            },
            Kind::Small => Self {
                batch: 1,
                heads: 8,
                kv_heads: None,
                head_dim: 128,
                copied: 1 << 28,
                attention: vec![2048, 4096],
                layer: vec![8192, 16_384, 32_768],
                stages: vec![32_768],
                gemm: 2048,
                growth: None,
                warm_tokens: 1024,
                warmup: 2.5,
            },
            Kind::Software => Self {
                batch: 1,
                heads: 2,
                kv_heads: None,
                head_dim: 64,
                copied: 1 << 27,
                attention: vec![512, 1024],
                layer: vec![1024, 2048, 4096],
                stages: vec![1024, 4096],
                gemm: 512,
                growth: None,
                warm_tokens: 256,
                warmup: 0.5,
            },
        }
    }

    /// The sizes in words.
    pub fn describe(&self, tokens: Option<&[usize]>) -> String {
        let list = |tokens: &[usize]| tokens.iter().map(|&n| thousands(n)).collect::<Vec<_>>().join(" ");
        let tokens = match tokens {
            Some(tokens) => format!("tokens {}", list(tokens)),
            None => format!(
                "attention {}; layer {}; stages {}",
                list(&self.attention),
                list(&self.layer),
                list(&self.stages)
            ),
        };
        let batch = if self.batch == 1 { String::new() } else { format!("batch {}, ", self.batch) };
        let kv_heads = self.kv_heads.map(|kv_heads| format!(" and {kv_heads} kv heads")).unwrap_or_default();
        format!("{batch}{} heads{kv_heads} of {}; {tokens}", self.heads, self.head_dim)
    }
}

/// Rates seen so far, in operations per second, by pass and element: what predictions go by.
type Rates = HashMap<(&'static str, Element), f64>;

/// A run of the bench.
pub struct Bench {
    pub device: Device,
    pub clock: Clock,
    pub sizes: Sizes,
    /// `--tokens`, in place of the default sizes.
    pub tokens: Option<Vec<usize>>,
    pub budget: Budget,
    pub baseline: Option<Report>,
    pub report: Report,
    /// Bytes per second of a copy, read and written.
    pub bandwidth: f64,
    rates: Rates,
}

impl Bench {
    /// Warms the device up and measures its bandwidth.
    pub fn start(
        device: Device,
        sizes: Sizes,
        tokens: Option<Vec<usize>>,
        warmup: f64,
        baseline: Option<Report>,
    ) -> Result<Self> {
        let software = device.kind() == Kind::Software;
        let budget = Budget {
            warm: Duration::from_millis(if software { 0 } else { 300 }),
            timed: Duration::from_millis(if software { 200 } else { 1000 }),
            cap: Duration::from_millis(if software { 2000 } else { 1500 }),
            last: None,
        };
        let report = Report { device: device.name(), rows: Vec::new() };
        let clock = device.clock();
        let mut bench =
            Self { device, clock, sizes, tokens, budget, baseline, report, bandwidth: 0.0, rates: Rates::new() };
        for element in [Element::F16, Element::F32] {
            bench.warm_up(element, Duration::from_secs_f64(warmup / 2.0))?;
        }
        bench.measure_copy()?;
        Ok(bench)
    }

    /// Runs attention until the time is over, and takes its rate for the first predictions.
    fn warm_up(&mut self, element: Element, time: Duration) -> Result<()> {
        let Sizes { batch, heads, head_dim, warm_tokens, .. } = self.sizes;
        let Passes { mut runner, ranges } = attention::passes(self, warm_tokens, element)?;
        // Drivers that compile at the first dispatch would spoil the first rate.
        runner.time(ranges[1].0.clone(), Clock::Wall)?;
        let start = Instant::now();
        loop {
            for (pass, (range, _)) in [FORWARD, BOTH].into_iter().zip(&ranges) {
                let milliseconds = runner.time(range.clone(), Clock::Wall)?;
                let flops = attention::flops(pass, warm_tokens, batch.saturating_mul(heads), head_dim);
                self.learn(pass, element, Some(flops as f64 / (milliseconds * 1e-3)));
            }
            if start.elapsed() >= time {
                return Ok(());
            }
        }
    }

    fn measure_copy(&mut self) -> Result<()> {
        let limits = self.device.caps().limits;
        let bytes =
            self.sizes.copied.min(limits.max_storage_buffer_binding_size).min(limits.max_buffer_size) / 256 * 256;
        let mut copy = self.device.copier(bytes)?;
        let samples = self.budget.collect(&mut copy)?;
        let timing = Timing::of(&samples).ok_or("no run of the copy")?;
        let mut row = Row::new("copy", "", Element::U32, &[("bytes", bytes as usize)]).timed(timing, self.clock);
        row.bytes = Some(2 * bytes);
        self.bandwidth = row.bandwidth().ok_or("the copy took no time: this adapter's timestamps are of no use")?;
        println!(
            "copy of {} MiB: {} GB/s read and written (median of {} runs, spread {:.1}%, {} clock)",
            bytes >> 20,
            significant(self.bandwidth * 1e-9),
            timing.runs,
            100.0 * timing.spread(),
            self.clock.name(),
        );
        self.report.rows.push(row);
        Ok(())
    }

    fn learn(&mut self, pass: &'static str, element: Element, rate: Option<f64>) {
        if let Some(rate) = rate.filter(|rate| rate.is_finite()) {
            let best = self.rates.entry((pass, element)).or_insert(0.0);
            *best = best.max(rate);
        }
    }

    /// The sizes that a row group measures.
    pub fn tokens_or(&self, default: &[usize]) -> Vec<usize> {
        let mut tokens = self.tokens.clone().unwrap_or_else(|| default.to_vec());
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    /// Least time, in milliseconds: the bytes at the copy's bandwidth, then the operations at the peer's matrix rate.
    /// `None` for operations without such a rate.
    pub fn floor_ms(&self, element: Element, bytes: Option<u64>, flops: Option<u64>) -> Option<f64> {
        let matrix_rate = || self.baseline.as_ref().and_then(|baseline| baseline.matrix_rate(element.name()));
        let of_flops = match flops {
            Some(flops) => flops as f64 / matrix_rate()?,
            None => 0.0,
        };
        Some(1e3 * (of_flops + bytes.unwrap_or(0) as f64 / self.bandwidth)).filter(|floor| *floor > 0.0)
    }

    /// What one run is predicted to take: operations at the best rate seen so far, bytes at the bandwidth.
    fn predict(&self, pass: &'static str, element: Element, cost: Cost) -> Duration {
        let rate = self.rates.get(&(pass, element)).copied().unwrap_or(f64::INFINITY);
        Duration::from_secs_f64((cost.flops as f64 / rate + cost.bytes as f64 / self.bandwidth).min(1e9))
    }

    /// Why a row of this cost is left out; `None` if one run is predicted to be within the cap.
    pub fn too_long(&self, pass: &'static str, element: Element, cost: Cost) -> Option<String> {
        let (predicted, cap) = (self.predict(pass, element, cost), self.budget.cap);
        let text = || {
            format!("predicted to take {:.1} s a run, the most is {:.1} s", predicted.as_secs_f64(), cap.as_secs_f64())
        };
        (predicted > cap).then(text)
    }

    /// Whether even a single run of this cost, which needs no more than itself, is not worth its wait.
    pub fn is_far_too_long(&self, pass: &'static str, element: Element, cost: Cost) -> bool {
        self.predict(pass, element, cost) > 6 * self.budget.cap
    }

    /// Measures forward and forward + backward and prints their rows. A row that would take too long, or that the device
    /// cannot hold, is named with the reason; `build` is called only if a row is measured.
    pub fn measure_passes(
        &mut self,
        name: &str,
        element: Element,
        shape: &[(&str, usize)],
        cost: impl Fn(&str) -> Cost,
        build: impl FnOnce(&Self) -> Result<Passes>,
    ) -> Result<()> {
        let mut rows = Vec::new();
        for pass in [FORWARD, BOTH] {
            let mut row = Row::new(name, pass, element, shape);
            let cost = cost(pass);
            (row.bytes, row.flops) = ((cost.bytes > 0).then_some(cost.bytes), Some(cost.flops));
            row.floor_ms = self.floor_ms(element, row.bytes, row.flops);
            rows.push((pass, row, cost));
        }
        rows.retain(|(pass, row, cost)| match self.too_long(pass, element, *cost) {
            Some(reason) => {
                self.skip(row, &reason);
                false
            }
            None => true,
        });
        if rows.is_empty() {
            return Ok(());
        }
        let Passes { mut runner, ranges } = match build(self) {
            Ok(passes) => passes,
            Err(error) => {
                rows.iter().for_each(|(_, row, _)| self.skip(row, &error.to_string()));
                return Ok(());
            }
        };
        for (pass, row, cost) in rows {
            let (range, written) = if pass == FORWARD { &ranges[0] } else { &ranges[1] };
            // Long runs are cut into several submissions for the driver's watchdog, which only the wall clock spans.
            let long = self.predict(pass, element, cost) > Duration::from_millis(500);
            let clock = if long { Clock::Wall } else { self.clock };
            let samples = self.budget.collect(|| runner.time(range.clone(), clock))?;
            runner.expect_written(*written)?;
            let row = row.timed(Timing::of(&samples).ok_or("no runs")?, clock);
            self.learn(pass, element, row.rate());
            self.add(row);
        }
        Ok(())
    }

    /// Prints a row and keeps it.
    pub fn add(&mut self, row: Row) {
        println!("{}", report::line(&row, self.bandwidth, self.baseline.as_ref()));
        self.report.rows.push(row);
    }

    /// Prints that a row was not measured.
    pub fn skip(&self, row: &Row, reason: &str) {
        println!("{:<27} {:<17} {:<46} not measured: {}", row.name, row.pass, row.describe(), one_line(reason));
    }
}

/// A message without line breaks.
pub fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The least that a row's work takes.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    pub bytes: u64,
    pub flops: u64,
}

/// A forward and its backward, ready to run.
pub struct Passes {
    pub runner: Runner,
    /// The commands of forward and of forward + backward, and a tensor that each writes.
    pub ranges: [(Range<usize>, Tensor); 2],
}

/// q, k, v and d_o.
pub fn inputs(recording: &mut Recording, element: Element, [q, k, v, d_o]: [[usize; 4]; 4]) -> Result<[Tensor; 4]> {
    Ok([
        recording.external("q", element, &q)?,
        recording.external("k", element, &k)?,
        recording.external("v", element, &v)?,
        recording.external("d_o", element, &d_o)?,
    ])
}
