//! The learning rate over a run.

/// Linear warm-up, then half a cosine down to a tenth of the peak.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The highest learning rate.
    pub peak: f32,
    /// Steps of the warm-up.
    pub warmup: usize,
    /// Steps in all.
    pub steps: usize,
}

impl Schedule {
    /// The learning rate of a step, counted from 0.
    pub fn learning_rate(&self, step: usize) -> f32 {
        if step < self.warmup {
            return self.peak * (step + 1) as f32 / self.warmup as f32;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1);
        let done = ((step - self.warmup) as f32 / span as f32).min(1.0);
        self.peak * (0.1 + 0.45 * (1.0 + (std::f32::consts::PI * done).cos()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_then_falls_to_a_tenth() {
        let schedule = Schedule { peak: 1.0, warmup: 10, steps: 110 };
        assert!((schedule.learning_rate(0) - 0.1).abs() < 1e-6);
        assert!((schedule.learning_rate(9) - 1.0).abs() < 1e-6);
        assert!((schedule.learning_rate(10) - 1.0).abs() < 1e-6);
        assert!((schedule.learning_rate(60) - 0.55).abs() < 1e-6);
        assert!((schedule.learning_rate(110) - 0.1).abs() < 1e-6);
    }
}
