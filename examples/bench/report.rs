//! Rows, the table, and the JSON that `--json` writes and `--baseline` reads.
//!
//! `tests/peers/pytorch.py` writes the same schema:
//!
//! ```json
//! {"device": "card, driver, software", "rows": [{
//!     "name": "flash", "pass": "forward", "element": "f16",
//!     "shape": {"tokens": 18432, "heads": 8, "head_dim": 128},
//!     "median_ms": 1.25, "low_ms": 1.24, "high_ms": 1.27, "runs": 30, "clock": "gpu",
//!     "bytes": null, "flops": 695784701952, "floor_ms": 0.98
//! }]}
//! ```
//!
//! `low_ms` and `high_ms` are the 10th and 90th percentile; `clock` is `gpu` (timestamps, events) or `wall`; `bytes`
//! and `flops` are the least that the row's work takes, `floor_ms` the least time that follows from them. `pass` is
//! `forward`, `forward+backward` or empty. A row's peers are those of equal `pass` and `element` whose `shape` agrees in
//! all that it has; that of an operator is named `torch` and the operator's name.

use std::collections::BTreeMap;

use lighthouse_attention::Element;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::device::Clock;
use crate::stats::Timing;

/// The peers' names.
pub const FLASH2: &str = "flash2";
pub const CUDNN: &str = "cudnn";
pub const CUBLAS: &str = "cublas";
/// Before the name of an operator: PyTorch's own form of it.
pub const TORCH: &str = "torch";

pub const FORWARD: &str = "forward";
pub const BOTH: &str = "forward+backward";

/// A measured row.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    #[serde(default)]
    pub pass: String,
    #[serde(default)]
    pub element: String,
    /// Named sizes.
    #[serde(default)]
    pub shape: BTreeMap<String, usize>,
    pub median_ms: f64,
    pub low_ms: f64,
    pub high_ms: f64,
    pub runs: usize,
    pub clock: String,
    /// Least traffic.
    #[serde(default)]
    pub bytes: Option<u64>,
    /// Operations, as the field counts them.
    #[serde(default)]
    pub flops: Option<u64>,
    #[serde(default)]
    pub floor_ms: Option<f64>,
}

/// Sizes that a row has only where they are not as usual: one sequence, as many kv heads as heads.
pub const UNUSUAL: [&str; 2] = ["batch", "kv_heads"];

impl Row {
    /// A row that is still to be measured.
    pub fn new(name: &str, pass: &str, element: Element, shape: &[(&str, usize)]) -> Self {
        Self {
            name: name.into(),
            pass: pass.into(),
            element: element.name().into(),
            shape: shape.iter().map(|&(name, value)| (name.into(), value)).collect(),
            ..Self::default()
        }
    }

    pub fn timed(mut self, timing: Timing, clock: Clock) -> Self {
        (self.median_ms, self.low_ms, self.high_ms) = (timing.median_ms, timing.low_ms, timing.high_ms);
        self.runs = timing.runs;
        self.clock = clock.name().into();
        self
    }

    pub fn size(&self, name: &str) -> Option<usize> {
        self.shape.get(name).copied()
    }

    fn spread(&self) -> f64 {
        (self.high_ms - self.low_ms) / self.median_ms
    }

    /// Bytes per second.
    pub fn bandwidth(&self) -> Option<f64> {
        finite(self.bytes? as f64 / (self.median_ms * 1e-3))
    }

    /// Operations per second.
    pub fn rate(&self) -> Option<f64> {
        finite(self.flops? as f64 / (self.median_ms * 1e-3))
    }

    /// Whether this is a peer's row for the same problem.
    fn is_peer_of(&self, row: &Self) -> bool {
        self.pass == row.pass
            && self.element == row.element
            && self.shape.iter().all(|(name, value)| row.shape.get(name) == Some(value))
            && UNUSUAL.iter().all(|name| self.size(name) == row.size(name))
    }

    /// The sizes in words: `N 98,304 8x128 f16 L3 p4 k1536 S 18,432`; `4x8:2x128` for a batch of 4 and 2 kv heads.
    pub fn describe(&self) -> String {
        let mut words = Vec::new();
        if let Some(tokens) = self.size("tokens") {
            words.push(format!("N {}", thousands(tokens)));
        }
        if let (Some(heads), Some(head_dim)) = (self.size("heads"), self.size("head_dim")) {
            let batch = self.size("batch").map(|batch| format!("{batch}x")).unwrap_or_default();
            let kv_heads = self.size("kv_heads").map(|kv_heads| format!(":{kv_heads}")).unwrap_or_default();
            words.push(format!("{batch}{heads}{kv_heads}x{head_dim}"));
        }
        if let (Some(m), Some(n), Some(k)) = (self.size("m"), self.size("n"), self.size("k")) {
            words.push(format!("{m}x{n}x{k}"));
        }
        if let (Some(rows), Some(width)) = (self.size("rows"), self.size("width")) {
            words.push(format!("{rows}x{width}"));
        }
        words.extend(self.size("parameters").map(thousands));
        words.push(self.element.clone());
        for (letter, name) in [("L", "levels"), ("p", "pooling"), ("k", "top_k"), ("S ", "gathered")] {
            if let Some(value) = self.size(name) {
                words
                    .push(format!("{letter}{}", if name == "gathered" { thousands(value) } else { value.to_string() }));
            }
        }
        words.join(" ")
    }
}

fn finite(x: f64) -> Option<f64> {
    Some(x).filter(|x| x.is_finite())
}

/// All rows of a run on one machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Card, driver and what measured.
    pub device: String,
    pub rows: Vec<Row>,
}

impl Report {
    /// Reads a peer's report.
    pub fn read(path: &std::path::Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("baseline {}: {e}", path.display()))?;
        let report: Self = serde_json::from_str(&text).map_err(|e| format!("baseline {}: {e}", path.display()))?;
        match report.rows.iter().find(|row| !(row.median_ms > 0.0 && row.median_ms.is_finite())) {
            Some(row) => {
                let problem = format!("row `{}` has median_ms = {}", row.name, row.median_ms);
                Err(format!("baseline {}: {problem}, which is no time", path.display()).into())
            }
            None => Ok(report),
        }
    }

    /// The row `name` for the same problem.
    pub fn peer(&self, name: &str, row: &Row) -> Option<&Row> {
        self.rows.iter().find(|peer| peer.name == name && peer.is_peer_of(row))
    }

    /// How many times as fast as the peer a row is.
    pub fn times_as_fast(&self, name: &str, row: &Row) -> Option<f64> {
        finite(self.peer(name, row)?.median_ms / row.median_ms)
    }

    /// The best rate of the peer's matrix product, in operations per second: what the floor of FLOPs goes by.
    pub fn matrix_rate(&self, element: &str) -> Option<f64> {
        let products = self.rows.iter().filter(|row| row.name == CUBLAS && row.element == element);
        products.filter_map(Row::rate).max_by(f64::total_cmp)
    }
}

/// The columns that name no peer.
const HEADER: &str = concat!(
    "row                         pass              shape                                          ",
    "median ms  spread runs clock             rate   floor ms  x floor"
);

/// The head of a row group's table.
pub fn print_header(group: &str, about: &str, with_peers: bool) {
    println!("\n{group}: {about}");
    println!("{HEADER}{}", if with_peers { "   flash2    cudnn   cublas    torch" } else { "" });
}

/// One line of the table.
pub fn line(row: &Row, bandwidth: f64, peers: Option<&Report>) -> String {
    let rate = match (row.rate(), row.bandwidth()) {
        (Some(rate), _) => format!("{} TFLOP/s", significant(rate * 1e-12)),
        (None, Some(rate)) if bandwidth > 0.0 => {
            format!("{} GB/s {:>3.0}%", significant(rate * 1e-9), 100.0 * rate / bandwidth)
        }
        (None, Some(rate)) => format!("{} GB/s", significant(rate * 1e-9)),
        (None, None) => "-".into(),
    };
    let (floor, ratio) = match row.floor_ms {
        Some(floor) => (significant(floor), format!("{:.2}", row.median_ms / floor)),
        None => ("-".into(), "-".into()),
    };
    let mut line = format!(
        "{:<27} {:<17} {:<46} {:>9} {:>6.1}% {:>4} {:<5} {rate:>16} {floor:>10} {ratio:>8}",
        row.name,
        row.pass,
        row.describe(),
        significant(row.median_ms),
        100.0 * row.spread(),
        row.runs,
        row.clock,
    );
    if let Some(peers) = peers {
        for name in [FLASH2, CUDNN, CUBLAS] {
            let ratio = peers.times_as_fast(name, row).map_or("-".into(), |ratio| format!("{ratio:.2}x"));
            line.push_str(&format!(" {ratio:>8}"));
        }
        let ratio = peers.times_as_fast(&format!("{TORCH} {}", row.name), row);
        line.push_str(&format!(" {:>8}", ratio.map_or("-".into(), |ratio| format!("{ratio:.2}x"))));
    }
    line
}

/// Three significant digits, and all digits before the point.
pub fn significant(x: f64) -> String {
    if x == 0.0 || !x.is_finite() {
        return x.to_string();
    }
    // Rounded first, so that 9.999 has as many digits as 10.
    let rounded: f64 = format!("{x:.2e}").parse().unwrap_or(x);
    let digits = (2 - rounded.abs().log10().floor() as i32).max(0);
    format!("{x:.*}", digits as usize)
}

/// Digits in groups of three.
pub fn thousands(x: usize) -> String {
    let digits = x.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, shape: &[(&str, usize)]) -> Row {
        let timing = Timing { median_ms: 2.0, low_ms: 1.5, high_ms: 2.5, runs: 7 };
        Row::new(name, FORWARD, Element::F16, shape).timed(timing, Clock::Gpu)
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [1234.5, 12.345, 1.2345, 0.012345, 9.999].map(significant),
            ["1234", "12.3", "1.23", "0.0123", "10.0"]
        );
        assert_eq!([7, 1_000, 98_304, 1_048_576].map(thousands), ["7", "1,000", "98,304", "1,048,576"]);
    }

    #[test]
    fn a_report_survives_json() {
        let mut first = row("flash", &[("tokens", 64), ("heads", 2)]);
        first.flops = Some(1 << 50);
        let report = Report { device: "card".into(), rows: vec![first] };
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }

    #[test]
    fn peers_agree_in_all_that_they_state() {
        let own = row("lighthouse", &[("tokens", 64), ("heads", 2), ("levels", 3)]);
        let mut peer = row(CUDNN, &[("tokens", 64), ("heads", 2)]);
        peer.median_ms = 5.0;
        let other = row(CUDNN, &[("tokens", 128), ("heads", 2)]);
        let mut report = Report { device: String::new(), rows: vec![other, peer.clone()] };
        assert_eq!(report.times_as_fast(CUDNN, &own), Some(2.5));
        assert_eq!(report.times_as_fast(FLASH2, &own), None);
        let of_batch = row("flash", &[("tokens", 64), ("heads", 2), ("batch", 3)]);
        assert_eq!(report.times_as_fast(CUDNN, &of_batch), None);
        report.rows[1].shape.insert("batch".into(), 3);
        assert_eq!(report.times_as_fast(CUDNN, &of_batch), Some(2.5));
        assert_eq!(report.times_as_fast(CUDNN, &own), None);
        report.rows[1].shape.remove("batch");
        report.rows[1].pass = BOTH.into();
        assert_eq!(report.times_as_fast(CUDNN, &own), None);
    }

    #[test]
    fn rates_follow_from_the_median() {
        let mut own = row(CUBLAS, &[("m", 8), ("n", 8), ("k", 8)]);
        own.flops = Some(4_000_000);
        own.bytes = Some(6_000_000);
        assert_eq!((own.rate(), own.bandwidth()), (Some(2e9), Some(3e9)));
        assert_eq!(own.describe(), "8x8x8 f16");
        let sizes = [("tokens", 64), ("heads", 8), ("kv_heads", 2), ("head_dim", 16), ("batch", 4)];
        assert_eq!(row("flash", &sizes).describe(), "N 64 4x8:2x16 f16");
        let report = Report { device: String::new(), rows: vec![own] };
        assert_eq!((report.matrix_rate("f16"), report.matrix_rate("f32")), (Some(2e9), None));
    }

    #[test]
    fn a_baseline_that_is_none_is_named() {
        let path = std::env::temp_dir().join(format!("bench-baseline-{}.json", std::process::id()));
        for (text, named) in [("[]", "invalid"), ("{\"device\": \"\"}", "rows"), ("", "EOF")] {
            std::fs::write(&path, text).unwrap();
            let message = Report::read(&path).unwrap_err().to_string();
            assert!(message.contains(named) && message.contains("bench-baseline"), "{message}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(Report::read(&path).is_err());
    }
}
