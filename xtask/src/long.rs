// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask long`: the long forms of the tests, each by one command. What is counted, and what a run asserts, the tests
//! say themselves. The model and the fuzz targets have commands of their own.

use anyhow::Result;

use crate::stages::{cargo, show};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[arg(value_enum)]
    what: What,
    /// How much, where not the usual: states, traces, rounds, requests or minutes.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum What {
    /// A million crash states of the pool
    Crash,
    /// A hundred traces with every operation failing once
    Failures,
    /// More than a thousand kills of the daemon under verified load
    Kill,
    /// A hundred thousand blocks that change hands, on each medium
    Isolation,
    /// Ten million requests beside QEMU's storage daemon
    Differential,
    /// Ten thousand rounds of each kind of hostile guest and front-end
    Hostile,
    /// An hour of everything at once
    Soak,
}

/// How a long form is run.
struct Form {
    package: &'static str,
    tests: &'static [&'static str],
    /// What cargo's test program is told.
    filter: &'static [&'static str],
    /// The variable that says how much, and the usual amount; `None` where the test knows.
    amount: Option<(&'static str, u64)>,
}

impl What {
    fn form(self) -> Form {
        let ignored = &["--ignored"];
        let form = |package, tests, filter, amount| Form { package, tests, filter, amount };
        match self {
            Self::Crash => form("vssd-pool", &["crash"], &["power_cut"], Some(("CRASH_STATES", 1_000_000))),
            Self::Failures => {
                form("vssd-pool", &["crash"], &["failing_operation"], Some(("CRASH_TRACES", 100)))
            }
            Self::Kill => form("vssd-tests", &["wire_kill"], ignored, None),
            Self::Isolation => form("vssd-tests", &["wire_isolation"], ignored, None),
            Self::Differential => {
                form("vssd-tests", &["wire_differential"], ignored, Some(("VSSD_REQUESTS", 10_000_000)))
            }
            Self::Hostile => form(
                "vssd-tests",
                &[
                    "wire_hostile",
                    "wire_hostile_changes",
                    "wire_hostile_channel",
                    "wire_hostile_frontend",
                    "wire_hostile_load",
                    "wire_hostile_memory",
                ],
                &[],
                Some(("VSSD_HOSTILE_ROUNDS", 10_000)),
            ),
            Self::Soak => form("vssd-tests", &["soak"], ignored, Some(("VSSD_SOAK_MINUTES", 60))),
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let Form { package, tests, filter, amount } = args.what.form();
    if package == "vssd-tests" {
        vssd_tests::setup::ensure()?;
    }
    let mut test = cargo(&["test", "--release", "--quiet", "--package", package]);
    for name in tests {
        test.args(["--test", name]);
    }
    test.args(["--", "--nocapture"]);
    if package == "vssd-tests" {
        test.arg("--test-threads=1");
    }
    test.args(filter);
    if let Some((variable, usual)) = amount {
        test.env(variable, args.count.unwrap_or(usual).to_string());
    }
    show(test)
}
