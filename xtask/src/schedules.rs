// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask schedules`: the hand-offs between threads in every schedule, or in very many. `cargo xtask miri`: what decodes and what maps,
//! watched for undefined behaviour by Miri, which a nightly toolchain has as a component.

use std::env;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail};
use vssd_tests::paths;

use crate::stages::{self, NOT_RUN_MARK, cargo, show};

/// Set to 1 where Miri must not be missing.
const REQUIRE_MIRI_ENV: &str = "CI_REQUIRE_MIRI";
/// Cases of a property test under Miri, which is some hundred times slower than the machine.
const CASES_ENV: &str = "PROPTEST_CASES";
const CASES: &str = "2";

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// Schedules of each scene that has too many for all of them; 5,000 unless told.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut test = cargo(&["test", "--quiet", "--package", "vssd-schedules"]);
    test.args(["--", "--nocapture", "--test-threads=1"]);
    if let Some(count) = args.count {
        test.env("VSSD_SCHEDULES", count.to_string());
    }
    show(test)
}

/// The tests of a package that Miri runs.
struct Suite {
    package: &'static str,
    filter: &'static [&'static str],
}

const SUITES: [Suite; 2] = [
    // The header is compared as text, which takes longer than all the rest.
    Suite { package: "vssd-protocol", filter: &["--skip", "constants_equal_those_of_the_c_header"] },
    Suite {
        package: "vssd-pool",
        // One byte after the other is flipped: much time for the same code again and again.
        filter: &[
            "record::",
            "journal::",
            "checkpoint::",
            "superblock::",
            "map::",
            "crc::",
            "--skip",
            "bitmap::",
            "--skip",
            "flipped",
        ],
    },
];

pub(crate) fn miri() -> Result<()> {
    // It builds its own standard library, from sources that are a component too.
    let mut setup = nightly(&["miri", "setup", "--quiet"]);
    let is_there = setup.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|ran| ran.success());
    if !is_there {
        if env::var_os(REQUIRE_MIRI_ENV).is_some_and(|value| value == "1") {
            bail!("Miri is missing: `rustup component add miri rust-src --toolchain nightly`");
        }
        let line = format!(
            "{NOT_RUN_MARK}no nightly toolchain with Miri and the standard library's sources here ({REQUIRE_MIRI_ENV}=1 makes this an error)"
        );
        eprintln!("{line}");
        stages::not_run(&line);
        return Ok(());
    }
    for suite in &SUITES {
        show(suite.command(&["--no-run"], &[]))?;
    }
    // Miri runs a program on one processor.
    thread::scope(|scope| {
        let running = SUITES.each_ref().map(|suite| scope.spawn(|| suite.run()));
        running.into_iter().try_for_each(|suite| match suite.join() {
            Ok(outcome) => outcome,
            Err(_panic) => bail!("a thread of this program panicked"),
        })
    })
}

impl Suite {
    fn command(&self, how: &[&str], filter: &[&str]) -> Command {
        let mut miri = nightly(&["miri", "test", "--quiet", "--package", self.package, "--lib"]);
        miri.args(["--target-dir", "target/miri"]).args(how).arg("--").args(filter);
        // The journal's tests use files.
        miri.env("MIRIFLAGS", "-Zmiri-disable-isolation").env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1");
        if env::var_os(CASES_ENV).is_none() {
            miri.env(CASES_ENV, CASES);
        }
        miri
    }

    fn run(&self) -> Result<()> {
        let output = self.command(&[], self.filter).output().context("start Miri")?;
        let text = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!("{} under Miri:\n{text}\n{}", self.package, String::from_utf8_lossy(&output.stderr));
        }
        let result = text.lines().find(|line| line.starts_with("test result: ok. "));
        match result {
            Some(result) if !result.contains(" 0 passed") => {
                eprintln!("{} under Miri: {result}", self.package);
            }
            _ => bail!("Miri ran no test of {}:\n{text}", self.package),
        }
        Ok(())
    }
}

fn nightly(args: &[&str]) -> Command {
    let mut rustup = Command::new("rustup");
    rustup.args(["run", "nightly", "cargo"]).args(args).current_dir(paths::repo_root()).stdin(Stdio::null());
    // What runs this program has chosen another toolchain.
    for name in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        rustup.env_remove(name);
    }
    rustup
}
