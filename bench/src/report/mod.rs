// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What was found, as values; [`table`] and [`plot`] show them to people, `serde` to programs.

pub mod figures;
pub mod machine;
pub mod plot;
pub mod table;

use serde::Serialize;

use crate::cases::{Bound, Figure, Gate, Steady};
use crate::client::Kind;
use crate::peer::Contender;
use crate::run::Effort;
use crate::sample::{Sample, Series};
use figures::{count, seconds, share, times};
use machine::Machine;

/// One contender's line.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub contender: String,
    pub median: Sample,
    pub series: Series,
    /// IOPS against the peer's.
    pub ratio: Option<f64>,
}

impl Row {
    pub fn new(name: impl Into<String>, series: Series, ratio: Option<f64>) -> Self {
        Self { contender: name.into(), median: series.median(), series, ratio }
    }
}

/// Whether a figure is what it must be.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    pub what: String,
    pub reached: String,
    pub required: String,
    /// `None` if it was not measured, or is only reported.
    pub pass: Option<bool>,
}

impl Verdict {
    /// A figure that nobody requires anything of.
    pub fn info(what: impl Into<String>, reached: impl Into<String>) -> Self {
        Self { what: what.into(), reached: reached.into(), required: String::new(), pass: None }
    }

    pub fn of(
        what: impl Into<String>,
        reached: impl Into<String>,
        required: impl Into<String>,
        pass: bool,
    ) -> Self {
        Self { what: what.into(), reached: reached.into(), required: required.into(), pass: Some(pass) }
    }
}

/// All of one case.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CaseReport {
    pub name: String,
    /// Load, client and placement in words.
    pub about: String,
    pub rows: Vec<Row>,
    pub verdicts: Vec<Verdict>,
    pub notes: Vec<String>,
}

impl CaseReport {
    /// Says which runs were disturbed by other programs.
    pub fn note_disturbances(&mut self) {
        for Row { contender, series, .. } in &self.rows {
            let (repeated, disturbed, all) = (series.repeated, series.disturbed(), series.samples.len());
            if repeated > 0 || disturbed > 0 {
                self.notes.push(format!(
                    "{contender}: {repeated} runs made again because others used the machine; {disturbed} of the {all} that \
                     count were disturbed"
                ));
            }
        }
    }
}

/// All of one invocation.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub effort: Effort,
    pub cases: Vec<CaseReport>,
}

impl Report {
    /// Required figures that were measured and not reached.
    pub fn missed(&self) -> usize {
        self.cases
            .iter()
            .flat_map(|case| &case.verdicts)
            .filter(|verdict| verdict.pass == Some(false))
            .count()
    }
}

/// The report of a steady case.
pub fn steady(case: &Steady, series: Vec<(Contender, Series)>, notes: Vec<String>) -> CaseReport {
    let median =
        |of: Contender| series.iter().find(|(contender, _)| *contender == of).map(|(_, s)| s.median());
    let peer = median(Contender::Qsd);
    let mut verdicts: Vec<Verdict> = case.gates.iter().map(|gate| judge(gate, &median)).collect();
    if case.load.kind == Kind::DurableWrite {
        for (contender, series) in &series {
            let sample = series.median();
            let what = format!("{contender}: flushes of the disk for each FLUSH of the client");
            let shown = format!(
                "{:.2} ({}/s for {}/s)",
                sample.media_flushes / sample.iops.max(1.0),
                count(sample.media_flushes),
                count(sample.iops)
            );
            verdicts.push(Verdict::info(what, shown));
        }
    }
    let rows = series
        .into_iter()
        .map(|(contender, series)| {
            let ratio = peer
                .filter(|peer| contender != Contender::Qsd && peer.iops > 0.0)
                .map(|peer| series.median().iops / peer.iops);
            Row::new(contender.name(), series, ratio)
        })
        .collect();
    CaseReport { name: String::new(), about: about(case), rows, verdicts, notes }
}

fn about(case: &Steady) -> String {
    let load = &case.load;
    let queues = if load.queues > 1 { format!(" on each of {} queues", load.queues) } else { String::new() };
    format!(
        "{}, random {} of {} KiB, {} in flight{queues}, {:?} client, {} placement",
        case.medium.name(),
        load.kind.name(),
        load.block >> 10,
        load.depth,
        case.waiting,
        case.placement.name()
    )
    .to_lowercase()
    .replace("nv-ram", "NV-RAM")
    .replace("ssd", "SSD")
    .replace("kib", "KiB")
}

fn shown(figure: Figure, value: f64) -> String {
    match figure {
        Figure::Iops | Figure::IopsPerCore => count(value),
        Figure::BytesPerSecond => format!("{:.2} GB/s", value / 1e9),
        Figure::P50 => seconds(value / 1e6),
    }
}

fn judge(gate: &Gate, median: &dyn Fn(Contender) -> Option<Sample>) -> Verdict {
    let figure = gate.figure;
    let what = format!("{}: {}", gate.of, figure.name());
    let value = median(gate.of).map(|sample| figure.of(&sample));
    let required = match gate.bound {
        Bound::Times(factor, other) if factor < 1.0 => format!("≥ {} of {other}", share(factor)),
        Bound::Times(factor, other) => format!("≥ {} {other}", times(factor)),
        Bound::AtLeast(bound) => format!("≥ {}", shown(figure, bound)),
        Bound::AtMost(bound) => format!("≤ {}", shown(figure, bound)),
    };
    let Some(value) = value else {
        return Verdict { what, reached: "not available".into(), required, pass: None };
    };
    match gate.bound {
        Bound::Times(factor, other) => match median(other).map(|sample| figure.of(&sample)) {
            Some(base) if base > 0.0 => {
                let ratio = value / base;
                let reached = if factor < 1.0 { share(ratio) } else { times(ratio) };
                Verdict::of(what, reached, required, ratio >= factor)
            }
            _ => Verdict { what, reached: format!("no {other} to compare with"), required, pass: None },
        },
        Bound::AtLeast(bound) => Verdict::of(what, shown(figure, value), required, value >= bound),
        Bound::AtMost(bound) => Verdict::of(what, shown(figure, value), required, value <= bound),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::{Plan, all};

    fn series(rates: &[f64], cores: f64) -> Series {
        let sample =
            |iops: &f64| Sample { iops: *iops, backend_cores: cores, p50_us: 5.0, ..Sample::default() };
        Series { samples: rates.iter().map(sample).collect(), repeated: 0 }
    }

    fn report(vssd: Series, qsd: Series) -> CaseReport {
        let case = all().into_iter().find(|case| case.name == "nvram-4k-qd32-read-same").unwrap();
        let Plan::Steady(steady_case) = &case.plan else { panic!("not a steady case") };
        steady(steady_case, vec![(Contender::Vssd, vssd), (Contender::Qsd, qsd)], Vec::new())
    }

    #[test]
    fn a_case_is_judged_by_medians_against_the_peer_of_the_same_run() {
        let report = report(series(&[599e3, 700e3, 601e3], 0.5), series(&[100e3, 1.0, 1e9], 0.5));
        assert_eq!(report.rows[0].ratio, Some(6.01));
        let verdicts: Vec<_> = report.verdicts.iter().map(|v| (v.reached.as_str(), v.pass)).collect();
        assert_eq!(verdicts, [("6.01 ×", Some(true)), ("1.20 M", Some(true))]);
    }

    #[test]
    fn a_missed_figure_is_a_miss_and_one_without_a_peer_is_neither() {
        let missed = report(series(&[599e3], 0.9), series(&[100e3], 0.5));
        assert_eq!(missed.verdicts.iter().map(|v| v.pass).collect::<Vec<_>>(), [Some(false), Some(false)]);
        let alone = report(series(&[599e3], 0.5), Series::default());
        assert_eq!(alone.verdicts[0].pass, None);
    }
}
