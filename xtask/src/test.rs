// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask test`: everything that must hold, cheapest first, guests last.

use anyhow::Result;
use vssd_tests::paths::PREBUILT_ENV;
use vssd_tests::setup;

use crate::stages::{self, Stages, cargo, show};
use crate::{fuzz, model, sabotage, schedules};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leave out what needs a kernel or a guest.
    #[arg(long)]
    quick: bool,
    /// Only the guest scenarios whose name contains this.
    #[arg(long, value_name = "NAME")]
    scenario: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut stages = Stages::new();
    let outcome = run_stages(args, &mut stages);
    stages.finish();
    outcome
}

fn run_stages(args: &Args, stages: &mut Stages) -> Result<()> {
    if !args.quick {
        stages.run("set up", setup::ensure)?;
    }
    if args.scenario.is_none() {
        stages.run("format", || show(cargo(&["fmt", "--all", "--check"])))?;
        stages.run("lints", || {
            show(cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))
        })?;
        stages.run("documentation", || {
            let mut doc = cargo(&["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
            doc.env("RUSTDOCFLAGS", "-D warnings");
            show(doc)
        })?;
    }
    stages.run("build", || stages::build_binaries(&["--quiet"]))?;
    if args.scenario.is_none() {
        stages.run("unit tests", || {
            let others =
                ["--exclude", "vssd-tests", "--exclude", "vssd-model", "--exclude", "vssd-schedules"];
            let mut units = cargo(&["test", "--quiet", "--workspace"]);
            units.args(others);
            show(units)?;
            show(cargo(&["test", "--quiet", "--package", "vssd-tests", "--lib", "--bins"]))?;
            show(cargo(&["test", "--quiet", "--package", "vssd-tests", "--doc"]))
        })?;
        stages.run("model of the negotiation", || model::run(&model::Args::default()))?;
        stages.run("hand-offs between threads", || schedules::run(&schedules::Args::default()))?;
        stages.run("codecs, map and journal under Miri", schedules::miri)?;
    }
    if args.quick {
        return Ok(());
    }
    if args.scenario.is_none() {
        stages.run("fuzz targets", || fuzz::run(&fuzz::Args::default()))?;
        stages.run("sabotage", sabotage::run)?;
    }
    stages.run("guest driver, every kernel", stages::build_modules)?;
    stages.run("guest scenarios", || {
        let mut scenarios =
            cargo(&["test", "--package", "vssd-tests", "--test", "*", "--no-fail-fast", "--"]);
        // A scenario's error says what happened; where in the harness it was made does not matter.
        scenarios.env(PREBUILT_ENV, "1").env("RUST_LIB_BACKTRACE", "0");
        scenarios.args(["--test-threads=1", "--nocapture"]);
        if let Some(name) = &args.scenario {
            scenarios.arg(name);
        }
        show(scenarios)
    })
}
