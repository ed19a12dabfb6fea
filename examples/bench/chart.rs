//! The chart of a layer's time over its tokens, both logarithmic, as SVG.

use std::fmt::Write;

use crate::groups::layer::{DENSE, LIGHTHOUSE};
use crate::report::{BOTH, CUDNN, FORWARD, Report, Row, significant, thousands};

const SIZE: [f64; 2] = [960.0, 480.0];
/// Left, top, right and bottom of the plot.
const PLOT: [f64; 4] = [80.0, 64.0, 660.0, 420.0];

/// A line of the chart.
struct Series {
    label: String,
    color: &'static str,
    dashes: &'static str,
    /// Tokens and milliseconds, in ascending order.
    points: Vec<(f64, f64)>,
}

/// The chart of a run's layer rows, with dense cuDNN from a baseline; `None` without a layer row.
pub fn layer(report: &Report, baseline: Option<&Report>) -> Option<String> {
    let first = report.rows.iter().find(|row| row.name == LIGHTHOUSE || row.name == DENSE)?;
    let shown = |row: &&Row| ["heads", "head_dim"].iter().all(|size| row.size(size) == first.size(size));
    let shortest =
        report.rows.iter().filter(|row| row.name == first.name).filter_map(|row| row.size("tokens")).min()?;
    let none = Report::default();
    let mut series = Vec::new();
    for (rows, name, label, color) in [
        (report, LIGHTHOUSE, "Lighthouse", "#0b62a4"),
        (report, DENSE, "dense, this crate", "#b5491d"),
        (baseline.unwrap_or(&none), CUDNN, "dense, cuDNN", "#5a7d2a"),
    ] {
        for (pass, dashes) in [(FORWARD, ""), (BOTH, "7 4")] {
            let mut points: Vec<(f64, f64)> = Vec::new();
            let rows =
                rows.rows.iter().filter(|row| row.name == name && row.pass == pass && row.element == first.element);
            for row in rows.filter(shown) {
                let tokens = row.size("tokens").unwrap_or(0);
                // The first row of a length is its usual config.
                if tokens >= shortest && points.iter().all(|(other, _)| *other != tokens as f64) {
                    points.push((tokens as f64, row.median_ms));
                }
            }
            points.retain(|(_, milliseconds)| *milliseconds > 0.0);
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            if !points.is_empty() {
                series.push(Series { label: format!("{label}, {pass}"), color, dashes, points });
            }
        }
    }
    let title = format!(
        "One attention layer, {} heads of {}, {}: milliseconds over tokens",
        first.size("heads")?,
        first.size("head_dim")?,
        first.element
    );
    draw(&title, &report.device, &series)
}

/// Least and most of some numbers.
fn bounds(values: impl Iterator<Item = f64>) -> Option<[f64; 2]> {
    values.fold(None, |bounds, x| match bounds {
        None => Some([x, x]),
        Some([least, most]) => Some([x.min(least), x.max(most)]),
    })
}

fn draw(title: &str, subtitle: &str, series: &[Series]) -> Option<String> {
    let points = || series.iter().flat_map(|series| &series.points);
    let [x_least, x_most] = bounds(points().map(|point| point.0.log2()))?;
    let [x_least, x_most] = [x_least.floor(), x_most.ceil().max(x_least.floor() + 1.0)];
    let [y_least, y_most] = bounds(points().map(|point| point.1.log10()))?;
    let [y_least, y_most] = [y_least.floor(), y_most.ceil().max(y_least.floor() + 1.0)];
    let [left, top, right, bottom] = PLOT;
    let x = |tokens: f64| left + (tokens.log2() - x_least) / (x_most - x_least) * (right - left);
    let y = |milliseconds: f64| bottom - (milliseconds.log10() - y_least) / (y_most - y_least) * (bottom - top);

    let mut svg = String::new();
    let [width, height] = SIZE;
    // Writing to a string cannot fail.
    let mut line = |text: std::fmt::Arguments<'_>| {
        let _ = writeln!(svg, "{text}");
    };
    line(format_args!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\" fill=\"#222\">"
    ));
    line(format_args!("<rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>"));
    line(format_args!("<text x=\"{left}\" y=\"28\" font-size=\"16\">{}</text>", escape(title)));
    line(format_args!("<text x=\"{left}\" y=\"46\" fill=\"#666\">{}</text>", escape(subtitle)));

    let step = ((x_most - x_least) / 8.0).ceil().max(1.0);
    let mut exponent = x_least;
    while exponent <= x_most {
        let (at, label) = (x(exponent.exp2()), thousands(exponent.exp2() as usize));
        line(format_args!("<path d=\"M{at:.1} {top}V{bottom}\" stroke=\"#ddd\"/>"));
        line(format_args!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>", bottom + 18.0));
        exponent += step;
    }
    let mut exponent = y_least;
    while exponent <= y_most {
        for part in [1.0, 2.0, 5.0] {
            let value = part * 10f64.powf(exponent);
            if value.log10() > y_most + 1e-9 {
                continue;
            }
            let color = if part == 1.0 { "#bbb" } else { "#eee" };
            let at = y(value);
            line(format_args!("<path d=\"M{left} {at:.1}H{right}\" stroke=\"{color}\"/>"));
            if part == 1.0 || y_most - y_least <= 3.0 {
                let label = if value >= 1.0 { thousands(value.round() as usize) } else { significant_short(value) };
                line(format_args!(
                    "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                    left - 8.0,
                    at + 4.0
                ));
            }
        }
        exponent += 1.0;
    }
    line(format_args!("<path d=\"M{left} {top}V{bottom}H{right}\" fill=\"none\" stroke=\"#222\"/>"));
    let middle = (left + right) / 2.0;
    line(format_args!("<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">tokens N</text>", bottom + 42.0));
    let middle = (top + bottom) / 2.0;
    line(format_args!(
        "<text x=\"24\" y=\"{middle}\" text-anchor=\"middle\" transform=\"rotate(-90 24 {middle})\">milliseconds</text>"
    ));

    for (i, Series { label, color, dashes, points }) in series.iter().enumerate() {
        let stroke = format!("fill=\"none\" stroke=\"{color}\" stroke-width=\"2\" stroke-dasharray=\"{dashes}\"");
        let path: Vec<String> = points.iter().map(|point| format!("{:.1} {:.1}", x(point.0), y(point.1))).collect();
        line(format_args!("<path d=\"M{}\" {stroke}/>", path.join("L")));
        for point in points {
            let tip = format!("{label}, N = {}: {} ms", thousands(point.0 as usize), significant(point.1));
            line(format_args!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{color}\"><title>{}</title></circle>",
                x(point.0),
                y(point.1),
                escape(&tip)
            ));
        }
        let at = top + 14.0 + 22.0 * i as f64;
        line(format_args!("<path d=\"M{} {at}h32\" {stroke}/>", right + 16.0));
        line(format_args!("<text x=\"{}\" y=\"{}\">{}</text>", right + 54.0, at + 4.0, escape(label)));
    }
    line(format_args!("</svg>"));
    Some(svg)
}

/// A number below 1 without trailing zeros.
fn significant_short(value: f64) -> String {
    let text = format!("{value:.6}");
    text.trim_end_matches('0').to_owned()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Clock;
    use crate::stats::Timing;
    use lighthouse_attention::Element;

    fn row(name: &str, tokens: usize, median_ms: f64) -> Row {
        let timing = Timing { median_ms, low_ms: median_ms, high_ms: median_ms, runs: 5 };
        let shape = [("tokens", tokens), ("heads", 8), ("head_dim", 128)];
        Row::new(name, FORWARD, Element::F16, &shape).timed(timing, Clock::Gpu)
    }

    #[test]
    fn every_row_is_a_point_within_the_plot() {
        let rows = vec![row(LIGHTHOUSE, 32_768, 2.0), row(LIGHTHOUSE, 524_288, 14.0), row(DENSE, 32_768, 9.0)];
        let report = Report { device: "<card> & driver".into(), rows };
        let baseline = Report { device: String::new(), rows: vec![row(CUDNN, 98_304, 35.0), row(CUDNN, 4096, 0.3)] };
        let svg = layer(&report, Some(&baseline)).unwrap();
        assert_eq!(svg.matches("<circle").count(), 4);
        assert_eq!(svg.matches("stroke-dasharray").count(), 6);
        assert!(svg.contains("&lt;card&gt; &amp; driver") && svg.contains("tokens N") && svg.contains(">524,288<"));
        for part in svg.split("cx=\"").skip(1) {
            let at: f64 = part.split('"').next().unwrap().parse().unwrap();
            assert!((PLOT[0]..=PLOT[2]).contains(&at), "{at}");
        }
    }

    #[test]
    fn one_point_is_drawn_and_none_is_not() {
        let report = Report { device: String::new(), rows: vec![row(DENSE, 1024, 1.0)] };
        assert!(layer(&report, None).is_some_and(|svg| !svg.contains("NaN")));
        assert_eq!(layer(&Report::default(), None), None);
    }
}
