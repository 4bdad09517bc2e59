// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A load that stays the same, on every contender in turn.

use anyhow::{Context, Result};

use crate::cases::Steady;
use crate::memory;
use crate::peer::Contender;
use crate::report::figures::share;
use crate::report::{self, CaseReport, Verdict};
use crate::run::{Bench, Setting, on_cpu};
use crate::sample::Series;
use crate::stats::median;

pub fn run(bench: &mut Bench, case: &Steady) -> Result<CaseReport> {
    let client = bench.cpus.client(case.placement);
    let setting = Setting { medium: case.medium, load: &case.load, waiting: case.waiting, client };
    let (mut rivals, mut notes) = (Vec::new(), Vec::new());
    for &contender in &case.contenders {
        let (rival, note) =
            bench.rival(contender, &setting).with_context(|| format!("set up {contender}"))?;
        notes.extend(note);
        rivals.push((contender, rival, Series::default()));
    }
    let pages = bench.media.pages();
    let mut copies = case.against_memory.then(|| memory::Copies::new(case.load.kind, case.load.block, pages));
    let mut bandwidths = Vec::new();
    for round in 0..bench.effort.rounds * case.rounds {
        for (contender, rival, series) in &mut rivals {
            series
                .add(|| bench.run(rival, &setting, round as u64))
                .with_context(|| format!("{contender}, round {round}"))?;
        }
        if let Some(copies) = &mut copies {
            bandwidths.push(on_cpu(bench.cpus.backend(), || Ok(copies.bandwidth(bench.effort.measured)))?);
        }
    }
    let series: Vec<(Contender, Series)> =
        rivals.into_iter().map(|(contender, _, series)| (contender, series)).collect();
    let mut report = report::steady(case, series, notes);
    if !bandwidths.is_empty() {
        let memory = median(&bandwidths);
        for row in &report.rows {
            let reached = row.median.bytes_per_second / row.median.backend_cores.max(f64::EPSILON) / memory;
            let what =
                format!("{}: share of memcpy's {:.1} GB/s, per backend core", row.contender, memory / 1e9);
            report.verdicts.push(Verdict::info(what, share(reached)));
        }
    }
    Ok(report)
}
