// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table with the original's figures beside ours, the plot, and what was measured as CSV.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use plotters::prelude::{
    Color, IntoDrawingArea, LineSeries, PathElement, Rectangle, SVGBackend, Text, WHITE,
};
use vssd_tests::qemu::Accel;

use super::Plan;
use super::arm::{DARK, Outcome};
use super::host::{MEMORY, PROCESSORS};
use super::rates::FULL;
use crate::paper::plots;
use crate::paper::report::csv;
use crate::report::Verdict;
use crate::report::machine::Host as Computer;
use crate::stats::range;

/// Seconds there: commodity and NV-Hypervisor. Two Xeons, MySQL, sysbench.
const ORIGINAL_HOST: [(&str, Option<f64>, Option<f64>); 4] = [
    ("server boot", Some(36.0), Some(36.0)),
    ("BIOS", Some(15.0), Some(15.0)),
    ("host boot", Some(108.0), Some(108.0)),
    ("NV-DIMM recovery", None, Some(109.0)),
];
const ORIGINAL_QEMU: (f64, f64) = (0.2, 8.0);
const ORIGINAL_BOOT: f64 = 31.0;
const ORIGINAL_RECOVERY: f64 = 54.0;
const ORIGINAL_WARM_UP: f64 = 566.0;

/// Processors that others may keep busy.
const QUIET: f64 = 0.15;
/// How far the two rates before the cut may lie apart.
const SAME: f64 = 1.2;

/// A place of the table that has no figure.
const NOTHING: &str = "–";
const NOT_PART: &str = "not part";

#[derive(Debug)]
pub(super) struct Report {
    pub(super) plan: Plan,
    pub(super) quick: bool,
    pub(super) accel: Accel,
    /// PostgreSQL's version.
    pub(super) database: String,
    pub(super) commodity: Outcome,
    pub(super) persistent: Outcome,
}

fn seconds(value: f64) -> String {
    match value {
        v if v < 0.095 => format!("{v:.3}"),
        v if v < 9.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

fn or_nothing(value: Option<f64>) -> String {
    value.map_or_else(|| NOTHING.to_owned(), seconds)
}

impl Report {
    fn verdicts(&self) -> Vec<Verdict> {
        let (commodity, persistent) = (&self.commodity, &self.persistent);
        let ratio = commodity.full_speed().zip(persistent.full_speed()).map(|(ours, theirs)| ours / theirs);
        let speed = |arm: &Outcome| match arm.full_speed() {
            Some(time) => format!("{} s", seconds(time)),
            None => format!("not within {:.0} s", self.plan.patience.as_secs_f64()),
        };
        let lost = |arm: &Outcome| format!("{} of {}", arm.lost, arm.acknowledged);
        vec![
            Verdict::of(
                "full speed again, continued against rebooted",
                ratio.map_or_else(|| speed(persistent), |ratio| format!("{ratio:.1} × sooner")),
                "sooner",
                ratio.is_some_and(|ratio| ratio > 1.0),
            ),
            Verdict::of("acknowledged updates lost, persistent", lost(persistent), "0", persistent.lost == 0),
            Verdict::of("acknowledged updates lost, commodity", lost(commodity), "0", commodity.lost == 0),
            Verdict::of(
                "the load's connections and transactions go on, persistent",
                if persistent.connected { "yes" } else { "no" },
                "yes",
                persistent.connected,
            ),
            Verdict::info(
                "the same, commodity",
                if commodity.connected { "yes" } else { "no: the load begins anew" },
            ),
            Verdict::info(
                "from the power event to the end of the save",
                format!("{} s", or_nothing(persistent.save)),
            ),
            Verdict::info(
                "transactions a second before the cut, commodity / persistent",
                format!("{:.0} / {:.0}", commodity.before, persistent.before),
            ),
        ]
    }

    /// Whether all that is required was reached.
    pub(super) fn reached(&self) -> bool {
        self.verdicts().iter().all(|verdict| verdict.pass != Some(false))
    }

    fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header([
            "step (s)",
            "commodity, 2014",
            "NV-Hypervisor, 2014",
            "commodity, here",
            "persistent, here",
        ]);
        for row in self.rows() {
            let cells = row.into_iter().enumerate().map(|(at, text)| {
                Cell::new(text).set_alignment(if at == 0 {
                    CellAlignment::Left
                } else {
                    CellAlignment::Right
                })
            });
            table.add_row(cells);
        }
        table.to_string()
    }

    fn rows(&self) -> Vec<[String; 5]> {
        let (commodity, persistent) = (&self.commodity, &self.persistent);
        let row = |what: &str, there: [Option<f64>; 2], here: [Option<f64>; 2]| {
            let [a, b] = there.map(or_nothing);
            let [c, d] = here.map(or_nothing);
            [what.to_owned(), a, b, c, d]
        };
        let mut rows: Vec<[String; 5]> = ORIGINAL_HOST
            .iter()
            .map(|(what, a, b)| {
                let here = || NOT_PART.to_owned();
                [(*what).to_owned(), or_nothing(*a), or_nothing(*b), here(), here()]
            })
            .collect();
        let warm_up = |arm: &Outcome| arm.warm_up;
        rows.extend([
            row("daemons start", [None, None], [Some(commodity.daemons), Some(persistent.daemons)]),
            row(
                "QEMU starts",
                [Some(ORIGINAL_QEMU.0), Some(ORIGINAL_QEMU.1)],
                [Some(commodity.qemu), Some(persistent.qemu)],
            ),
            row("guest OS boot", [Some(ORIGINAL_BOOT), None], [commodity.boot, persistent.boot]),
            row(
                "DB recovery, to the first answer",
                [Some(ORIGINAL_RECOVERY), None],
                [Some(commodity.recovery), Some(persistent.recovery)],
            ),
            row(
                "DB warm-up, to full speed",
                [Some(ORIGINAL_WARM_UP), None],
                [warm_up(commodity), warm_up(persistent)],
            ),
        ]);
        let host = |at: usize| -> f64 {
            ORIGINAL_HOST.iter().filter_map(|(_, a, b)| if at == 0 { *a } else { *b }).sum()
        };
        let there = ORIGINAL_QEMU.0 + ORIGINAL_BOOT + ORIGINAL_RECOVERY + ORIGINAL_WARM_UP;
        rows.push(row(
            "**without the host's steps**",
            [Some(there), Some(ORIGINAL_QEMU.1)],
            [commodity.full_speed(), persistent.full_speed()],
        ));
        rows.push([
            "**power on to full speed**".to_owned(),
            seconds(host(0) + there),
            seconds(host(1) + ORIGINAL_QEMU.1),
            NOT_PART.to_owned(),
            NOT_PART.to_owned(),
        ]);
        rows
    }

    /// What the figures are of.
    fn about(&self) -> Vec<String> {
        let computer = Computer::look();
        let processors = match self.accel {
            Accel::Kvm => "under KVM",
            Accel::Tcg => {
                "on **emulated processors**: what a processor does in a guest (boot, recovery, warm-up, transactions) takes many times as \
                 long as on real ones"
            }
        };
        let mut lines = vec![
            format!(
                "Machine: {} × {}, {} GiB, Linux {}",
                computer.processors, computer.processor, computer.memory_gib, computer.kernel
            ),
            format!("Guests: {MEMORY}, {PROCESSORS} processors, {processors}."),
            format!(
                "Database: PostgreSQL {}, 400 MB of shared buffers, ext4 on a vSSD; pgbench, scale {} (about {} MiB), 4 clients, nine reads \
                 of a random account to one update.",
                self.database,
                self.plan.scale,
                self.plan.scale * 15
            ),
            "Not part of ours: boot of server, BIOS and host, and recovery of NV-DIMMs. The power cut is `kill -9` of the VM and of both \
             daemons; NV-RAM, the vSSD's medium too, is a tmpfs: reading it costs nothing, so the commodity guest warms up faster than \
             from a disk."
                .to_owned(),
            format!(
                "Times are the host's, at which it heard the guest. Full speed: {:.0} % of the median rate of the last {} s before the cut, in \
                 a second that begins five whose median is that, too; in whole seconds.",
                FULL * 100.0,
                self.plan.median
            ),
        ];
        let others = [&self.commodity, &self.persistent].map(|arm| arm.others);
        let (_, most) = range(&others.concat());
        let (low, high) = range(&[self.commodity.before, self.persistent.before]);
        if most > QUIET || high > low * SAME {
            lines.push(format!(
                "**Disturbed**: other programs kept up to {most:.1} processors busy; before the cut, where both arms are the same, the faster \
                 made {:.1} times as many transactions. Not to be quoted.",
                high / low
            ));
        }
        if self.quick {
            lines.push(
                "**Quick form**: small tables and a short load. It shows that the comparison works, its figures are not to be quoted."
                    .to_owned(),
            );
        }
        lines
    }

    /// For a terminal.
    pub(super) fn summary(&self) -> String {
        let mut text = format!("{}\n", self.table());
        for line in self.about() {
            let _ = writeln!(text, "- {line}");
        }
        for verdict in self.verdicts() {
            let outcome = verdict.pass.map_or("", |pass| if pass { "PASS" } else { "MISS" });
            let _ = writeln!(text, "  {outcome:4} {}: {}", verdict.what, verdict.reached);
        }
        text
    }

    /// Writes everything into the folder `out`; gives the report's path.
    pub(super) fn write(&self, out: &Path) -> Result<PathBuf> {
        let put = |name: &str, content: &str| {
            let path = out.join(name);
            fs::write(&path, content).with_context(|| {
                format!(
                    "cannot write {}: free some space, or choose another folder with --out",
                    path.display()
                )
            })?;
            Ok::<_, anyhow::Error>(path)
        };
        let arms = [("commodity", &self.commodity), ("persistent", &self.persistent)];
        let rates = arms.iter().flat_map(|(name, arm)| {
            arm.rates.iter().map(move |point| format!("{name},{:.3},{:.1}", point.at, point.tps))
        });
        put("rates.csv", &csv("arm,seconds_after_cut,tps", rates))?;
        let ledger = arms
            .iter()
            .flat_map(|(name, arm)| arm.ledger.iter().map(move |(at, n)| format!("{name},{at:.3},{n}")));
        put("ledger.csv", &csv("arm,seconds_after_cut,acknowledged", ledger))?;
        put("rates.svg", &plot(&self.commodity, &self.persistent)?)?;
        put("report.md", &self.markdown())
    }

    fn markdown(&self) -> String {
        let mut text = "# A database after a power cut\n\n\
             *Hypervisor-based Persistence for Virtual Machines* (Sartakov, Kapitza; DSN 2014) compared a database in a VM that is rebooted after \
             a power cut with one whose memory lies in NV-RAM. Here this is done with PostgreSQL, and the same VM with and without `nvram`.\n\n\
             Made by `cargo xtask bench nv-hypervisor`.\n\n"
            .to_owned();
        let _ = writeln!(text, "{}\n", self.table());
        for line in self.about() {
            let _ = writeln!(text, "- {line}");
        }
        text.push_str("\n![Transactions a second](rates.svg)\n\n");
        text.push_str("`rates.csv` holds every second, `ledger.csv` every acknowledged update.\n\n");
        text.push_str("| what | reached | required | |\n|---|---:|---:|---|\n");
        for verdict in self.verdicts() {
            let outcome = verdict.pass.map_or("", |pass| if pass { "PASS" } else { "MISS" });
            let _ = writeln!(
                text,
                "| {} | {} | {} | {outcome} |",
                verdict.what, verdict.reached, verdict.required
            );
        }
        text
    }
}

/// Throughput of both arms over time, the cut and the time without power.
fn plot(commodity: &Outcome, persistent: &Outcome) -> Result<String> {
    let all = || commodity.rates.iter().chain(&persistent.rates);
    let most = all().map(|point| point.tps).fold(1.0, f64::max) * 1.4;
    let first = all().map(|point| point.at).fold(0.0, f64::min).max(-40.0);
    let last = all().map(|point| point.at).fold(DARK.as_secs_f64(), f64::max) + 1.0;
    let back = commodity.back.max(persistent.back);
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, (900, 440)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = plots::chart(&area, "A database after a power cut", first..last, 0.0..most)?;
    plots::axes(
        &mut chart,
        ("seconds after the cut", &plots::whole),
        ("transactions a second", &plots::whole),
    )?;
    chart.draw_series([Rectangle::new([(0.0, 0.0), (back, most)], plots::GREY.mix(0.3).filled())])?;
    chart
        .draw_series([PathElement::new([(0.0, 0.0), (0.0, most)], plots::GREY.stroke_width(2))])?
        .label("power cut, and no power")
        .legend(|(x, y)| Rectangle::new([(x, y - 5), (x + 18, y + 5)], plots::GREY.mix(0.3).filled()));
    for (arm, name, colour, height) in [
        (commodity, "commodity: rebooted", plots::ORANGE, 0.06),
        (persistent, "persistent: continued", plots::BLUE, 0.12),
    ] {
        // Nothing was reported in between, and a line across it would say that something was.
        let (before, after): (Vec<_>, Vec<_>) = arm
            .rates
            .iter()
            .filter(|point| point.at >= first)
            .map(|point| (point.at, point.tps))
            .partition(|(at, _)| *at <= 0.0);
        chart.draw_series(LineSeries::new(before, colour.stroke_width(2)))?;
        chart
            .draw_series(LineSeries::new(after, colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        if let Some(full) = arm.full_speed() {
            let at = arm.back + full;
            chart.draw_series([PathElement::new([(at, 0.0), (at, most * 0.78)], colour.stroke_width(1))])?;
            let text = format!("full speed after {} s", seconds(full));
            // Beside the line, on the side where there is room.
            let width = (last - first) * if at > f64::midpoint(first, last) { -0.17 } else { 0.01 };
            chart.draw_series([Text::new(text, (at + width, most * height), plots::SMALL)])?;
        }
    }
    plots::legend(&mut chart, plotters::chart::SeriesLabelPosition::UpperRight)?;
    area.present().context("finish the plot")?;
    drop(chart);
    drop(area);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nv_hypervisor::rates::Point;

    fn outcome(boot: Option<f64>, recovery: f64, warm_up: Option<f64>) -> Outcome {
        let rates = (-20i32..40).filter(|at| !(0..5).contains(at)).map(|at| Point {
            at: f64::from(at),
            tps: if at < 0 || boot.is_none() { 1000.0 } else { 500.0 },
        });
        Outcome {
            save: boot.is_none().then_some(0.2),
            daemons: 0.5,
            qemu: 0.25,
            boot,
            recovery,
            warm_up,
            back: 5.0,
            before: 1000.0,
            acknowledged: 300,
            lost: 0,
            connected: boot.is_none(),
            others: [0.05, 0.1],
            rates: rates.collect(),
            ledger: vec![(-1.0, 300), (7.0, 301)],
        }
    }

    fn report(commodity: Outcome, persistent: Outcome) -> Report {
        Report {
            plan: Plan::QUICK,
            quick: true,
            accel: Accel::Tcg,
            database: "15.1".into(),
            commodity,
            persistent,
        }
    }

    #[test]
    fn the_table_adds_the_steps_up_beside_the_originals() {
        let report = report(outcome(Some(10.0), 3.0, Some(30.0)), outcome(None, 0.05, Some(0.5)));
        let rows = report.rows();
        let of = |what: &str| rows.iter().find(|row| row[0].contains(what)).unwrap().clone();
        assert_eq!(of("without the host")[1..], ["651", "8.0", "44", "1.3"]);
        assert_eq!(of("power on")[1..3], ["810", "276"]);
        assert_eq!(of("guest OS boot")[1..], ["31", "–", "10", "–"]);
        assert!(report.reached() && !report.summary().contains("Disturbed"));
        let out = tempfile::tempdir().unwrap();
        report.write(out.path()).unwrap();
        let rates = fs::read_to_string(out.path().join("rates.csv")).unwrap();
        assert_eq!(rates.lines().count(), 1 + 2 * 55);
        let plot = fs::read_to_string(out.path().join("rates.svg")).unwrap();
        assert!(plot.contains("full speed after 1.3 s") && plot.contains("full speed after 44 s"));
    }

    #[test]
    fn what_was_lost_or_never_reached_is_missed() {
        let good = || (outcome(Some(10.0), 3.0, Some(30.0)), outcome(None, 0.05, Some(0.5)));
        let (commodity, mut persistent) = good();
        persistent.lost = 1;
        assert!(!report(commodity, persistent).reached());
        let (commodity, mut persistent) = good();
        persistent.before = 1500.0;
        assert!(report(commodity, persistent).summary().contains("Disturbed"));
        let (mut commodity, persistent) = good();
        commodity.others[1] = 0.4;
        assert!(report(commodity, persistent).summary().contains("up to 0.4 processors"));
        let (commodity, mut persistent) = good();
        persistent.connected = false;
        assert!(!report(commodity, persistent).reached());
        let (commodity, mut persistent) = good();
        persistent.warm_up = None;
        let missed = report(commodity, persistent);
        assert!(!missed.reached() && missed.summary().contains("not within 120 s"), "{}", missed.summary());
    }
}
