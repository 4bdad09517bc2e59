// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench …`: builds what is measured with optimisation and hands over to `vssd-bench`, which knows the rest.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context, Result};
use vssd_tests::paths::{self, PREBUILT_ENV};

use crate::stages::{cargo, show};

#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Args {
    /// What to measure, and how; `datapath --help`, `paper --help` and so on say more.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "datapath|paper|persistence|nv-hypervisor|power-cut …"
    )]
    args: Vec<OsString>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    // What guests need comes from the tests' package.
    let packages = ["balloon-ctl", "vm-host", "vssd-backend", "vssd-bench", "vssd-tests"];
    let mut build = cargo(&["build", "--quiet", "--release", "--bins"]);
    build.args(packages.iter().flat_map(|package| ["--package", package]));
    show(build)?;
    let target = paths::profile_dir()?.parent().context("a profile folder has a parent")?.to_owned();
    let mut bench = Command::new(target.join("release/vssd-bench"));
    bench.args(&args.args).env(PREBUILT_ENV, "1");
    show(bench)
}
