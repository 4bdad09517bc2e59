// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask test`: everything that must hold, cheapest first.
//!
//! A guest seldom keeps two processors busy, so what measures no time runs beside it, at last a second guest. The scenarios that do measure
//! have the machine for themselves, at the end.

use anyhow::{Result, ensure};
use vssd_tests::paths::PREBUILT_ENV;
use vssd_tests::setup;

use crate::programs::{self, Program};
use crate::stages::{self, Stages, Step, cargo, show};
use crate::{fuzz, sabotage, schedules};

/// Scenarios with guests that measure no time, the longest first so that none of them is left alone at the end.
const UNHURRIED: [&str; 18] = [
    "guest_agent",
    "guest_dm_cache",
    "guest_vssd",
    "host_kill",
    "guest_agent_only",
    "host_power",
    "host_power_cut",
    "host_clock",
    "guest_stock",
    "guest_hints",
    "demo",
    "guest_boot",
    "guest_service",
    "harness",
    "host_service",
    "host_versions",
    "host_again",
    "host_rotate",
];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave out what needs a kernel or a guest.
    #[arg(long)]
    quick: bool,
    /// Only the scenarios whose name contains this.
    #[arg(long, value_name = "NAME")]
    scenario: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let stages = Stages::new();
    let outcome = match &args.scenario {
        Some(name) => run_scenarios_like(name, &stages),
        None => run_all(args.quick, &stages),
    };
    stages.finish();
    outcome
}

fn run_scenarios_like(name: &str, stages: &Stages) -> Result<()> {
    stages.run("set up", setup::ensure)?;
    let programs = stages.run("build", build)?;
    stages.run("guest driver, every kernel", stages::build_modules)?;
    let scenarios: Vec<&Program> = programs.iter().filter(|program| program.is_scenario()).collect();
    run_scenarios(&scenarios, &[name], stages)
}

fn run_all(quick: bool, stages: &Stages) -> Result<()> {
    if !quick {
        stages.run("set up", setup::ensure)?;
    }
    stages.run("format", || {
        show(cargo(&["fmt", "--all", "--check"]))?;
        show(cargo(&["fmt", "--check", "--manifest-path", "fuzz/Cargo.toml"]))
    })?;
    stages.run("lints", || {
        for what in [&["--workspace"][..], &["--manifest-path", "fuzz/Cargo.toml", "--target-dir", "target"]]
        {
            let mut clippy = cargo(&["clippy", "--quiet", "--all-targets"]);
            clippy.args(what).args(["--", "-D", "warnings"]);
            show(clippy)?;
        }
        Ok(())
    })?;
    stages.run("documentation", || {
        let mut doc = cargo(&["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
        doc.env("RUSTDOCFLAGS", "-D warnings");
        show(doc)
    })?;
    if quick {
        return without_guests(&stages.run("build", build)?, stages);
    }
    let broken = stages.run("build with sabotage", sabotage::build)?;
    let programs = stages.run("build", build)?;
    stages.run("guest driver, every kernel", stages::build_modules)?;
    let (mut unhurried, measuring): (Vec<&Program>, Vec<&Program>) =
        programs.iter().filter(|program| program.is_scenario()).partition(|program| at(program).is_some());
    ensure!(unhurried.len() == UNHURRIED.len(), "a scenario of {UNHURRIED:?} is missing");
    unhurried.sort_by_key(|program| at(program));
    let guests = unhurried.iter().map(|scenario| Box::new(|| run_scenario(scenario, &[], stages)) as Step);
    stages::beside(
        || {
            without_guests(&programs, stages)?;
            stages.run("fuzz targets", || fuzz::run(&fuzz::Args::default()))?;
            stages.run("sabotage", || sabotage::run(&broken, &programs))
        },
        guests.collect(),
    )?;
    run_scenarios(&measuring, &[], stages)
}

fn at(scenario: &Program) -> Option<usize> {
    UNHURRIED.iter().position(|name| *name == scenario.name())
}

/// Builds everything that is tested or used by a test, and gives the test programs.
pub(crate) fn build() -> Result<Vec<Program>> {
    let built = programs::build(&["build", "--workspace", "--all-targets"])?;
    ensure!(!built.tests.is_empty(), "cargo built no test program");
    Ok(built.tests)
}

/// What takes neither a kernel nor a guest.
fn without_guests(programs: &[Program], stages: &Stages) -> Result<()> {
    for program in programs.iter().filter(|program| !program.is_scenario()) {
        // These say how much they saw; of the first two each test takes all processors as it is.
        let args: &[&str] = match (program.room(), program.name()) {
            ("model" | "schedules", _) => &["--nocapture", "--test-threads=1"],
            ("vssd-pool", "crash") => &["--nocapture"],
            _ => &["--quiet"],
        };
        stages.run(&program.label(), || program.run(program.command(args)))?;
    }
    stages
        .run("examples in the documentation", || show(cargo(&["test", "--quiet", "--workspace", "--doc"])))?;
    stages.run("codecs, map and journal under Miri", schedules::miri)
}

/// One after the other, to the end whatever fails.
fn run_scenarios(scenarios: &[&Program], filter: &[&str], stages: &Stages) -> Result<()> {
    let outcomes = scenarios.iter().map(|scenario| run_scenario(scenario, filter, stages));
    let failed: Vec<String> =
        outcomes.filter_map(|run| run.err().map(|error| format!("{error:#}"))).collect();
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

fn run_scenario(scenario: &Program, filter: &[&str], stages: &Stages) -> Result<()> {
    let mut command = scenario.command(&["--test-threads=1", "--nocapture"]);
    // A scenario's error says what happened; where in the harness it was made does not matter.
    command.args(filter).env(PREBUILT_ENV, "1").env("RUST_LIB_BACKTRACE", "0");
    stages.run(&scenario.label(), || scenario.run(command))
}
