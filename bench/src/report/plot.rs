// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The report as a picture: IOPS of every contender in every case, on a logarithmic scale, as SVG.

use std::fmt::Write as _;

use super::Report;
use super::figures::{count, times};

const BAR: f64 = 13.0;
const GAP: f64 = 26.0;
/// Where the bars begin, and how long the longest may be.
const LEFT: f64 = 150.0;
const LENGTH: f64 = 560.0;
const WIDTH: f64 = 880.0;
const TOP: f64 = 40.0;

/// Ours are blue, the peers grey.
fn colour(contender: &str) -> &'static str {
    match contender {
        "vssd, polling" => "#7fb2e5",
        name if name.contains("qsd") => "#8a8a8a",
        "fio" => "#c2c2c2",
        _ => "#2f6fb0",
    }
}

/// Draws the cases that have rates.
pub fn svg(report: &Report) -> String {
    let cases = || report.cases.iter().filter(|case| case.rows.iter().any(|row| row.median.iops > 0.0));
    let rates = || cases().flat_map(|case| &case.rows).map(|row| row.median.iops).filter(|rate| *rate > 0.0);
    // Whole decades.
    let low = rates().fold(f64::INFINITY, f64::min).min(1e6).log10().floor();
    let high = rates().fold(0.0, f64::max).max(10.0).log10().ceil().max(low + 1.0);
    let length = |rate: f64| (rate.max(1.0).log10() - low) / (high - low) * LENGTH;

    let mut body = String::new();
    let mut y = TOP;
    for case in cases() {
        text(&mut body, 10.0, y + BAR, "bold", &case.name);
        y += BAR + 6.0;
        for row in case.rows.iter().filter(|row| row.median.iops > 0.0) {
            let long = length(row.median.iops);
            text(&mut body, 10.0, y + BAR - 3.0, "normal", &row.contender);
            let _ = writeln!(
                body,
                r#"<rect x="{LEFT}" y="{y:.1}" width="{long:.1}" height="{:.1}" fill="{}"/>"#,
                BAR - 2.0,
                colour(&row.contender)
            );
            let ratio = row.ratio.map(|ratio| format!(", {}", times(ratio))).unwrap_or_default();
            let label = format!("{}{ratio}", count(row.median.iops));
            text(&mut body, LEFT + long + 5.0, y + BAR - 3.0, "normal", &label);
            y += BAR;
        }
        y += GAP - BAR;
    }
    let mut axis = String::new();
    let mut decade = low;
    while decade <= high {
        let x = LEFT + length(10f64.powf(decade));
        let _ =
            writeln!(axis, r##"<line x1="{x:.1}" y1="{TOP}" x2="{x:.1}" y2="{y:.1}" stroke="#dddddd"/>"##);
        text(&mut axis, x - 12.0, TOP - 6.0, "normal", &count(10f64.powf(decade)));
        decade += 1.0;
    }
    let machine = &report.machine.host;
    let title = format!("IOPS and ratio to the peer; {} × {}", machine.processors, machine.processor);
    text(&mut axis, 10.0, 16.0, "bold", &title);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height:.0}\" \
         viewBox=\"0 0 {WIDTH} {height:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{axis}{body}</svg>\n",
        height = y + 10.0
    )
}

fn text(into: &mut String, x: f64, y: f64, weight: &str, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(into, r#"<text x="{x:.1}" y="{y:.1}" font-weight="{weight}">{content}</text>"#);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement::Cpus;
    use crate::report::machine::Machine;
    use crate::report::{CaseReport, Row};
    use crate::run::Effort;
    use crate::sample::{Sample, Series};

    #[test]
    fn every_rate_has_a_bar_and_ten_times_as_much_is_a_decade_longer() {
        let row = |name: &str, iops| {
            let sample = Sample { iops, ..Sample::default() };
            Row::new(name, Series { samples: vec![sample], repeated: 0 }, None)
        };
        let rows = vec![row("vssd", 1e6), row("qsd & <co>", 1e5), row("fio", 0.0)];
        let case = CaseReport { name: "a".into(), rows, ..CaseReport::default() };
        let machine = Machine::look(Cpus::choose().unwrap(), crate::peer::Pages::Small, &[]);
        let svg = svg(&Report { machine, effort: Effort::QUICK, cases: vec![case] });
        assert!(svg.contains("qsd &amp; &lt;co&gt;") && svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
        let lengths: Vec<f64> = svg
            .lines()
            .filter(|line| line.starts_with("<rect x="))
            .map(|line| line.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(lengths, [LENGTH, 0.0], "a scale of one decade");
    }
}
