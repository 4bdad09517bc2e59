// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask sabotage`: breaks the pool and the daemon on purpose, one fault at a time, and sees that the test that must
//! catch it does. A suite that has never failed proves nothing.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use vssd_tests::paths::{self, BACKEND_ENV};

use crate::stages::{cargo, show};

/// Where a test is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Suite {
    /// The unit tests of the pool or of the daemon.
    Unit(&'static str),
    /// An integration test of the pool.
    Pool(&'static str),
    /// A scenario, with a daemon that is broken.
    Scenario(&'static str),
}

/// What `VSSD_SABOTAGE` is set to, and the test that must fail then.
struct Fault {
    name: &'static str,
    suite: Suite,
    test: &'static str,
}

const CRASH: &str = "power_cut_anywhere_loses_nothing_flushed_and_shows_nothing_foreign";

const fn fault(name: &'static str, suite: Suite, test: &'static str) -> Fault {
    Fault { name, suite, test }
}

const FAULTS: [Fault; 13] = [
    fault("skip-flush", Suite::Pool("crash"), CRASH),
    fault(
        "skip-opening-flush",
        Suite::Pool("crash"),
        "failures::flush_covers_what_an_earlier_process_answered",
    ),
    fault(
        "forget-failed-flush",
        Suite::Pool("crash"),
        "failures::flush_after_one_that_failed_is_never_acknowledged",
    ),
    fault("forget-zero", Suite::Pool("crash"), CRASH),
    fault("forget-reserve", Suite::Pool("crash"), CRASH),
    fault(
        "free-before-fence",
        Suite::Pool("concurrency"),
        "unplug_waits_for_open_batches_and_requests_wait_for_the_unplug",
    ),
    fault(
        "capacity-off-by-one",
        Suite::Pool("pool"),
        "blocks_go_from_one_vssd_to_another_without_their_bytes",
    ),
    fault("skip-hand-over", Suite::Pool("crash"), CRASH),
    fault("ignore-journal-checksum", Suite::Pool("crash"), CRASH),
    fault("overwrite-live-checkpoint", Suite::Pool("crash"), CRASH),
    fault(
        "take-short-for-whole",
        Suite::Unit("vssd-pool"),
        "lane::ring::tests::short_transfers_are_continued",
    ),
    fault(
        "fetch-length-twice",
        Suite::Unit("vssd-backend"),
        "vhost_user::chain::tests::length_that_changes_after_its_check_is_not_used",
    ),
    fault(
        "drop-in-flight",
        Suite::Scenario("wire_kill"),
        "twenty_kills_under_load_lose_no_request_on_an_ssd",
    ),
];

pub(crate) fn run() -> Result<()> {
    let dir = paths::repo_root().join("target/sabotage");
    let build = |args: &[&str]| {
        let mut build = cargo(args);
        build.arg("--target-dir").arg(&dir);
        show(build)
    };
    let mut pool = vec!["test", "--quiet", "--no-run", "--package", "vssd-pool", "--features"];
    pool.extend([
        "vssd-pool/sabotage",
        "--lib",
        "--test",
        "crash",
        "--test",
        "concurrency",
        "--test",
        "pool",
    ]);
    build(&pool)?;
    build(&[
        "test",
        "--quiet",
        "--no-run",
        "--package",
        "vssd-backend",
        "--lib",
        "--features",
        "vssd-backend/sabotage",
    ])?;
    build(&["build", "--quiet", "--package", "vssd-backend", "--features", "vssd-backend/sabotage"])?;
    let daemon = dir.join("debug/vssd-backend");
    // A test that fails anyway catches nothing.
    for suite in [Suite::Pool("crash"), Suite::Pool("concurrency"), Suite::Pool("pool")] {
        let mut healthy = std::collections::BTreeSet::new();
        healthy.extend(FAULTS.iter().filter(|fault| fault.suite == suite).map(|fault| fault.test));
        for test in healthy {
            if !passes(command(suite, test, &dir, &daemon))? {
                bail!("{test} fails without any sabotage");
            }
        }
    }
    let mut missed = Vec::new();
    for fault in &FAULTS {
        let started = Instant::now();
        let mut test = command(fault.suite, fault.test, &dir, &daemon);
        test.env("VSSD_SABOTAGE", fault.name);
        if passes(test)? {
            eprintln!("MISSED {} by {}", fault.name, fault.test);
            missed.push(fault.name);
        } else {
            eprintln!("caught {} by {} in {:.1} s", fault.name, fault.test, started.elapsed().as_secs_f64());
        }
    }
    if !missed.is_empty() {
        bail!("{} of {} sabotages went unnoticed: {}", missed.len(), FAULTS.len(), missed.join(", "));
    }
    eprintln!("{} sabotages caught", FAULTS.len());
    Ok(())
}

fn command(suite: Suite, test: &str, dir: &Path, daemon: &Path) -> Command {
    let mut command = match suite {
        Suite::Unit(package) => {
            let feature = format!("{package}/sabotage");
            let mut command = cargo(&["test", "--quiet", "--package", package, "--lib"]);
            command.args(["--features", &feature, "--target-dir"]).arg(dir);
            command
        }
        Suite::Pool(target) => {
            let mut command = cargo(&["test", "--quiet", "--package", "vssd-pool", "--test", target]);
            command.args(["--features", "vssd-pool/sabotage", "--target-dir"]).arg(dir);
            // A fault that is there is found in far fewer states.
            command.env("CRASH_STATES", "20000");
            command
        }
        Suite::Scenario(target) => {
            let mut command = cargo(&["test", "--quiet", "--package", "vssd-tests", "--test", target]);
            command.env(BACKEND_ENV, daemon);
            command
        }
    };
    command.args(["--", "--exact", test]).env("RUST_BACKTRACE", "0").env("RUST_LIB_BACKTRACE", "0");
    command
}

/// Whether the test passes; that it was run at all is made sure of.
fn passes(mut command: Command) -> Result<bool> {
    let output = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .context("start cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !text.contains("running 1 test") {
        bail!("no test was run:\n{text}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    if env::var_os("SABOTAGE_SHOW").is_some() {
        eprintln!("{text}");
    }
    Ok(output.status.success())
}
