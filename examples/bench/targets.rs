//! The marks that this crate sets itself on an H100 (8 heads of 128, f16, batch 1), and what a run makes of them.
//! BENCHMARKS.md says where they come from.

use crate::groups::layer::LIGHTHOUSE;
use crate::report::{BOTH, CUBLAS, CUDNN, FLASH2, FORWARD, Report, Row, UNUSUAL, significant, thousands};

/// A mark and the measured value.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    pub what: String,
    pub value: f64,
    pub unit: &'static str,
    /// What must be reached: at least, or at most where `less` is better.
    pub bound: f64,
    pub aim: f64,
    pub less: bool,
}

impl Mark {
    fn at_least(what: String, value: f64, [bound, aim]: [f64; 2]) -> Self {
        Self { what, value, unit: "x", bound, aim, less: false }
    }

    fn at_most(what: String, value: f64, unit: &'static str, [bound, aim]: [f64; 2]) -> Self {
        Self { what, value, unit, bound, aim, less: true }
    }

    fn reaches(&self, mark: f64) -> bool {
        if self.less { self.value <= mark } else { self.value >= mark }
    }

    pub fn outcome(&self) -> &'static str {
        match (self.reaches(self.bound), self.reaches(self.aim)) {
            (true, true) => "aim reached",
            (true, false) => "reached",
            (false, _) => "not reached",
        }
    }
}

/// A layer of the authors' code on an H100, in milliseconds, beside dense cuDNN in the same run where it was measured.
/// Their code is not here, so a run is compared through cuDNN: theirs would take as much longer as cuDNN now takes.
struct Authors {
    tokens: usize,
    /// S, which tells the pyramid that was measured.
    gathered: usize,
    pass: &'static str,
    eager: f64,
    /// With its scorer compiled.
    compiled: Option<f64>,
    cudnn: Option<f64>,
}

const fn authors(
    [tokens, gathered]: [usize; 2],
    pass: &'static str,
    eager: f64,
    compiled: Option<f64>,
    cudnn: Option<f64>,
) -> Authors {
    Authors { tokens, gathered, pass, eager, compiled, cudnn }
}

const AUTHORS: [Authors; 10] = [
    authors([32_768, 18_432], FORWARD, 2.35, Some(2.53), Some(3.52)),
    authors([98_304, 18_432], FORWARD, 3.46, Some(3.26), Some(35.7)),
    authors([131_072, 24_576], FORWARD, 4.95, Some(4.77), Some(60.9)),
    authors([262_144, 28_672], FORWARD, 8.67, Some(8.98), Some(285.0)),
    authors([524_288, 32_768], FORWARD, 14.7, None, None),
    authors([32_768, 18_432], BOTH, 8.38, Some(7.31), Some(13.2)),
    authors([98_304, 18_432], BOTH, 12.6, Some(8.17), Some(128.0)),
    authors([131_072, 24_576], BOTH, 18.4, Some(12.5), Some(236.0)),
    authors([262_144, 28_672], BOTH, 37.6, Some(20.2), Some(954.0)),
    authors([524_288, 32_768], BOTH, 66.8, None, None),
];

/// Where cuDNN was not measured at a layer's own length, this one relates the runs.
const ANCHOR: usize = 98_304;

/// All marks for which this run has rows.
pub fn marks(report: &Report, baseline: Option<&Report>, bandwidth: f64) -> Vec<Mark> {
    let mut marks = Vec::new();
    for row in &report.rows {
        let tokens = row.size("tokens").unwrap_or(0);
        let usual = row.element == "f16"
            && row.size("heads") == Some(8)
            && row.size("head_dim") == Some(128)
            && UNUSUAL.iter().all(|name| row.size(name).is_none());
        if usual && let Some(baseline) = baseline {
            marks.extend(of_peers(row, tokens, baseline));
        }
        if let (Some(baseline), "gemm", Some(8192)) = (baseline, row.name.as_str(), row.size("m")) {
            let ratio = baseline.times_as_fast(CUBLAS, row);
            marks.extend(ratio.map(|ratio| Mark::at_least("gemm 8192^3, against cuBLAS".into(), ratio, [0.38, 0.5])));
        }
        if usual && row.pass.is_empty() && [98_304, 524_288].contains(&tokens) {
            marks.extend(of_stage(row, tokens, bandwidth));
        }
    }
    marks.extend([FORWARD, BOTH].into_iter().filter_map(|pass| growth(report, pass)));
    marks
}

fn of_stage(row: &Row, tokens: usize, bandwidth: f64) -> Option<Mark> {
    let what = format!("{} at {}", row.name, thousands(tokens));
    if row.name == "select" {
        let marks = if tokens == 98_304 { [0.15, 0.05] } else { [0.4, 0.15] };
        return Some(Mark::at_most(what, row.median_ms, " ms", marks));
    }
    let share = row.bandwidth()? / bandwidth;
    Some(Mark::at_least(format!("{what}, share of the copy bandwidth"), share, [0.8, 0.95]))
}

fn of_peers(row: &Row, tokens: usize, baseline: &Report) -> Vec<Mark> {
    let what = format!("{} {} at {}", row.name, row.pass, thousands(tokens));
    let mut marks = Vec::new();
    let mut against = |peer: &str, at: [f64; 2]| {
        let ratio = baseline.times_as_fast(peer, row);
        marks.extend(ratio.map(|ratio| Mark::at_least(format!("{what}, against {peer}"), ratio, at)));
    };
    match (row.name.as_str(), row.pass.as_str(), tokens) {
        ("flash", _, 4096) => against(FLASH2, [1.3, 1.7]),
        ("flash", FORWARD, 18_432 | 32_768) => against(FLASH2, [0.95, 1.1]),
        ("flash", BOTH, 18_432) => against(FLASH2, [0.92, 1.05]),
        ("flash", BOTH, 32_768) => against(FLASH2, [0.85, 1.05]),
        (LIGHTHOUSE, BOTH, ANCHOR) => against(CUDNN, [12.0, 16.0]),
        _ => {}
    }
    let gathered = row.size("gathered");
    let known = AUTHORS
        .iter()
        .find(|known| (known.tokens, Some(known.gathered)) == (tokens, gathered) && known.pass == row.pass);
    if let (LIGHTHOUSE, Some(known)) = (row.name.as_str(), known) {
        marks.extend(of_authors(row, known, baseline, &what));
    }
    marks
}

/// A layer against the authors' code, eager, or for a forward in its faster form.
fn of_authors(row: &Row, known: &Authors, baseline: &Report, what: &str) -> Option<Mark> {
    let at_anchor = || {
        let mut anchor = row.clone();
        anchor.shape.insert("tokens".into(), ANCHOR);
        let then = AUTHORS.iter().find(|other| other.tokens == ANCHOR && other.pass == known.pass)?.cudnn?;
        Some((baseline.peer(CUDNN, &anchor)?.median_ms, then, ANCHOR))
    };
    let at_own = || Some((baseline.peer(CUDNN, row)?.median_ms, known.cudnn?, known.tokens));
    let (now, then, at) = at_own().or_else(at_anchor)?;
    let forward = known.pass == FORWARD;
    let theirs = known.compiled.filter(|compiled| forward && *compiled < known.eager).unwrap_or(known.eager);
    let implied = theirs * now / then;
    let at = if at == known.tokens { String::new() } else { format!(" at {}", thousands(at)) };
    let what = format!(
        "{what} ({} ms, dense cuDNN{at} over it {}), against the authors' {theirs} ms where cuDNN took {then} ({})",
        significant(row.median_ms),
        significant(now / row.median_ms),
        significant(then / theirs),
    );
    // Their compiled form, where that is known, is what lies beyond.
    let aim = match (forward, known.compiled) {
        (true, _) => 1.4,
        (false, Some(compiled)) => known.eager / compiled,
        (false, None) => 1.2,
    };
    Some(Mark::at_least(what, implied / row.median_ms, [if forward { 1.0 } else { 1.2 }, aim]))
}

fn growth(report: &Report, pass: &str) -> Option<Mark> {
    let at = |tokens: usize, levels: usize| {
        let is_it = |row: &&Row| {
            row.name == LIGHTHOUSE
                && row.pass == pass
                && row.size("tokens") == Some(tokens)
                && row.size("levels") == Some(levels)
        };
        report.rows.iter().rfind(is_it)
    };
    let (short, long) = (at(131_072, 4)?, at(1_048_576, 5)?);
    let what = format!("growth of {LIGHTHOUSE} {pass} from 131,072 to 1,048,576");
    Some(Mark::at_most(what, long.median_ms / short.median_ms, "x", [10.0, 8.5]))
}

/// Prints the marks.
pub fn print(marks: &[Mark]) {
    if marks.is_empty() {
        return;
    }
    println!("\nmarks for an H100 (BENCHMARKS.md)");
    println!("{:>9} {:>12} {:>9}  {:<12} what", "measured", "bound", "aim", "outcome");
    for mark in marks {
        let bound = format!("{} {}{}", if mark.less { "<=" } else { ">=" }, significant(mark.bound), mark.unit);
        let [value, aim] = [mark.value, mark.aim].map(|x| format!("{}{}", significant(x), mark.unit));
        println!("{value:>9} {bound:>12} {aim:>9}  {:<12} {}", mark.outcome(), mark.what);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Clock;
    use crate::stats::Timing;
    use lighthouse_attention::Element;

    fn row(name: &str, pass: &str, tokens: usize, median_ms: f64) -> Row {
        let timing = Timing { median_ms, low_ms: median_ms, high_ms: median_ms, runs: 5 };
        let shape = [("tokens", tokens), ("heads", 8), ("head_dim", 128)];
        Row::new(name, pass, Element::F16, &shape).timed(timing, Clock::Gpu)
    }

    fn lighthouse(pass: &str, [tokens, gathered]: [usize; 2], median_ms: f64) -> Row {
        let mut row = row(LIGHTHOUSE, pass, tokens, median_ms);
        row.shape.insert("gathered".into(), gathered);
        row
    }

    fn report(rows: Vec<Row>) -> Report {
        Report { device: String::new(), rows }
    }

    #[test]
    fn the_authors_are_scaled_by_cudnn() {
        let baseline = report(vec![row(CUDNN, FORWARD, ANCHOR, 71.4), row(CUDNN, BOTH, ANCHOR, 128.0)]);
        let own = report(vec![
            lighthouse(FORWARD, [ANCHOR, 18_432], 3.26),
            lighthouse(FORWARD, [524_288, 32_768], 24.5),
            lighthouse(BOTH, [ANCHOR, 18_432], 10.0),
            // The authors measured another pyramid.
            lighthouse(FORWARD, [ANCHOR, 24_576], 1.0),
        ]);
        let marks = marks(&own, Some(&baseline), 1.0);
        let values: Vec<f64> = marks.iter().map(|mark| mark.value).collect();
        assert_eq!(values.len(), 4, "{values:?}");
        // cuDNN takes twice as long as then, so the authors' code would.
        for (value, expected) in values.iter().zip([2.0, 1.2, 12.8, 1.26]) {
            assert!((value - expected).abs() < 1e-9, "{values:?}");
        }
        let outcomes: Vec<&str> = marks.iter().map(Mark::outcome).collect();
        assert_eq!(outcomes, ["aim reached", "reached", "reached", "reached"]);
    }

    #[test]
    fn stages_are_held_against_the_copy() {
        let mut gather = row("gather", "", 98_304, 1.0);
        gather.bytes = Some(700);
        let marks = marks(&report(vec![gather, row("select", "", 98_304, 0.1)]), None, 1e6);
        assert_eq!(marks.iter().map(Mark::outcome).collect::<Vec<_>>(), ["not reached", "reached"]);
        assert!((marks[0].value - 0.7).abs() < 1e-9);
    }
}
