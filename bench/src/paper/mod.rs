// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench paper`: the three experiments of *Elastic Persistent Memory for Virtualized Environments* (B. Singh, 2017) on real
//! guests, with a report.
//!
//! ```text
//!   correctness ┐              ┌─ host: a daemon with its pool, seen by an operator
//!   eviction    ├──► lab ──────┤
//!   resize      ┘              └─ a guest with our driver, and tools in it
//!       │ values
//!       ▼
//!     report: report.md, plots as SVG, what was measured as CSV
//! ```
//!
//! Each experiment has a plan (numbers), a run that gives values, and a section of the report that is made from those values alone. What this
//! does not know: how a shrink is carried out. It acts as the operator and as a program in the guest.

mod correctness;
mod eviction;
mod host;
mod lab;
pub(crate) mod plots;
mod progress;
pub(crate) mod report;
mod resize;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use vssd_tests::serial::guest_slot;

use lab::Lab;
use report::Section;

/// Fewer give no confidence interval.
const FEWEST_SEEDS: u64 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Experiment {
    /// Read errors against evicted blocks
    Correctness,
    /// Blocks of the guest's choice against random ones
    Eviction,
    /// Time to shrink and to grow
    Resize,
}

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which experiments; all if none is named
    #[arg(value_enum, value_name = "EXPERIMENT")]
    experiments: Vec<Experiment>,
    /// Folder of the report [default: target/bench/paper]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Small disks and few repetitions: to see that it works, not to quote
    #[arg(long)]
    quick: bool,
    /// Seeds of `eviction`, at least 2
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(FEWEST_SEEDS..=1000))]
    seeds: Option<u64>,
    /// Repetitions of each resize
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    rounds: Option<u64>,
}

/// Carries the experiments out and writes the report. Gives whether all that is required was reached; an error if something could not be
/// measured.
pub fn run(args: &Args) -> Result<bool> {
    let out = args.out.clone().unwrap_or_else(|| vssd_tests::paths::repo_root().join("target/bench/paper"));
    // Before minutes are spent on what could not be kept.
    std::fs::create_dir_all(&out).with_context(|| {
        format!("cannot make the folder {} for the report: choose another with --out", out.display())
    })?;
    let _slot = guest_slot()?;
    let lab = Lab::open()?;
    let wanted = |which| args.experiments.is_empty() || args.experiments.contains(&which);
    let mut sections: Vec<Section> = Vec::new();
    if wanted(Experiment::Correctness) {
        let plan = if args.quick { correctness::Plan::QUICK } else { correctness::Plan::FULL };
        let steps = correctness::run(&lab, &plan).context("experiment `correctness`")?;
        sections.push(correctness::section(&plan, &steps)?);
    }
    if wanted(Experiment::Eviction) {
        let mut plan = if args.quick { eviction::Plan::QUICK } else { eviction::Plan::FULL };
        plan.seeds = args.seeds.unwrap_or(plan.seeds);
        let found = eviction::run(&lab, &plan).context("experiment `eviction`")?;
        sections.push(eviction::section(&plan, &found)?);
    }
    if wanted(Experiment::Resize) {
        let mut plan = if args.quick { resize::Plan::QUICK } else { resize::Plan::FULL };
        plan.rounds = args.rounds.unwrap_or(plan.rounds);
        let found = resize::run(&lab, &plan).context("experiment `resize`")?;
        sections.push(resize::section(&plan, &found)?);
    }
    ensure!(!sections.is_empty(), "no experiment was carried out");
    let about = lab.about(args.quick)?;
    let report = report::write(&out, &about, &sections)?;
    print!("{}", report::summary(&sections));
    println!("report: {}", report.display());
    Ok(sections.iter().flat_map(|section| &section.verdicts).all(|verdict| verdict.pass != Some(false)))
}
