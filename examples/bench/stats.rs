//! Warm runs and their median.

use std::time::{Duration, Instant};

use crate::Result;

/// Median and spread of warm runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    pub median_ms: f64,
    /// The 10th percentile.
    pub low_ms: f64,
    /// The 90th percentile.
    pub high_ms: f64,
    pub runs: usize,
}

impl Timing {
    /// Of samples in milliseconds; `None` without any.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            median_ms: quantile(&sorted, 0.5)?,
            low_ms: quantile(&sorted, 0.1)?,
            high_ms: quantile(&sorted, 0.9)?,
            runs: sorted.len(),
        })
    }

    /// Distance of the percentiles over the median.
    pub fn spread(&self) -> f64 {
        (self.high_ms - self.low_ms) / self.median_ms
    }
}

/// A quantile of sorted values, interpolated.
fn quantile(sorted: &[f64], at: f64) -> Option<f64> {
    let place = at * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted.get(place.floor() as usize)?, sorted.get(place.ceil() as usize)?);
    Some(below + (above - below) * place.fract())
}

/// How long rows are measured.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Untimed running of a row before its timed runs, so that clocks are up again after its set-up.
    pub warm: Duration,
    /// Timed running of a row.
    pub timed: Duration,
    /// A row whose one run is predicted to take longer is left out.
    pub cap: Duration,
    /// End of the row before.
    pub last: Option<Instant>,
}

impl Budget {
    const FEWEST: usize = 5;
    const MOST: usize = 30;
    /// Fewest runs where one takes as long as the whole of `timed`.
    const FEWEST_LONG: usize = 3;
    /// Without work for longer, while kernels compile, a GPU may lower its clocks: an H100 did after 2 s, not after 1, and took
    /// 0.25 to 0.72 s to be back.
    const IDLE: Duration = Duration::from_secs(1);
    const WARM_AFTER_IDLE: u32 = 4;

    /// Runs until warm, then collects samples: 5 to 30, as many as fit `timed`, and 3 of long runs.
    pub fn collect<T>(&mut self, mut run: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
        // The first run may compile.
        let mut start = Instant::now();
        run()?;
        let (mut warm, mut warm_runs) = (self.warm, 1);
        if !warm.is_zero() && self.last.is_none_or(|last| last.elapsed() > Self::IDLE) {
            (start, warm, warm_runs) = (Instant::now(), warm * Self::WARM_AFTER_IDLE, 0);
        }
        while start.elapsed() < warm {
            run()?;
            warm_runs += 1;
        }
        let fewest = if start.elapsed() > self.timed * warm_runs { Self::FEWEST_LONG } else { Self::FEWEST };
        let start = Instant::now();
        let mut samples = Vec::new();
        while samples.len() < fewest || (samples.len() < Self::MOST && start.elapsed() < self.timed) {
            samples.push(run()?);
        }
        self.last = Some(Instant::now());
        Ok(samples)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Budget = Budget { warm: Duration::ZERO, timed: Duration::ZERO, cap: Duration::MAX, last: None };

    #[test]
    fn median_and_percentiles_are_interpolated() {
        let timing = Timing::of(&[5.0, 1.0, 3.0, 2.0, 4.0]).unwrap();
        assert_eq!((timing.median_ms, timing.runs), (3.0, 5));
        assert!((timing.low_ms - 1.4).abs() < 1e-12 && (timing.high_ms - 4.6).abs() < 1e-12);
        assert!((timing.spread() - 3.2 / 3.0).abs() < 1e-12);
        assert_eq!(Timing::of(&[2.0, 4.0]).unwrap().median_ms, 3.0);
        assert_eq!(Timing::of(&[]), None);
    }

    #[test]
    fn runs_are_between_the_fewest_and_the_most() {
        let budget = |millis| Budget { timed: Duration::from_millis(millis), ..NONE };
        assert_eq!(budget(60_000).collect(|| Ok(())).unwrap().len(), 30);
        let sleep = |millis| {
            move || -> Result<()> {
                std::thread::sleep(Duration::from_millis(millis));
                Ok(())
            }
        };
        assert_eq!(budget(12).collect(sleep(4)).unwrap().len(), 5);
        assert_eq!(budget(2).collect(sleep(10)).unwrap().len(), 3);
    }

    #[test]
    fn an_error_ends_the_runs() {
        assert!({ NONE }.collect(|| -> Result<()> { Err("lost".into()) }).is_err());
    }

    #[test]
    fn a_device_that_was_idle_is_warmed_longer() {
        let milliseconds = Duration::from_millis;
        let collect = |last: Option<Instant>| {
            let mut budget = Budget { warm: milliseconds(20), last, ..NONE };
            let (start, mut runs) = (Instant::now(), 0);
            let run = || -> Result<()> {
                std::thread::sleep(milliseconds(4));
                runs += 1;
                Ok(())
            };
            budget.collect(run).unwrap();
            assert!(budget.last.is_some_and(|last| last > start));
            (runs, start.elapsed())
        };
        // Sleep is never shorter: five runs, and three that are kept.
        assert!(collect(Some(Instant::now())).0 <= 8);
        assert!(collect(None).1 > 4 * milliseconds(20));
        let idle = Instant::now().checked_sub(2 * Budget::IDLE);
        assert!(collect(idle).1 > 4 * milliseconds(20));
    }
}
