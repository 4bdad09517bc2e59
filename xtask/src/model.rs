// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask model`: the negotiation in every order of events. The bounds stand in `model/tests/negotiation.rs`.

use anyhow::Result;

use crate::stages::{cargo, show};

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Also the scenes with wide bounds, each up to a number of steps.
    #[arg(long)]
    long: bool,
    /// Steps of each long scene.
    #[arg(long, requires = "long")]
    steps: Option<u64>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut test =
        cargo(&["test", "--quiet", "--package", "vssd-model", "--", "--nocapture", "--test-threads=1"]);
    if args.long {
        test.env("VSSD_MODEL", "long");
    }
    if let Some(steps) = args.steps {
        test.env("VSSD_MODEL_STEPS", steps.to_string());
    }
    show(test)
}
