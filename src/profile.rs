//! Milliseconds per stage of a replay.

/// What one stage took.
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

impl Profile {
    /// Adds a command's time to its stage.
    pub(crate) fn add(&mut self, stage: &'static str, milliseconds: f64) {
        match self.rows.iter_mut().find(|row| row.stage == stage) {
            Some(row) => {
                row.commands += 1;
                row.milliseconds += milliseconds;
            }
            None => self.rows.push(ProfileRow { stage, commands: 1, milliseconds }),
        }
    }

    /// The sum over all stages.
    pub fn milliseconds(&self) -> f64 {
        self.rows.iter().map(|row| row.milliseconds).sum()
    }
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
