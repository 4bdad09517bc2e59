// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask sabotage`: breaks the pool and the daemon on purpose, one fault at a time, and sees that the test that must
//! catch it does. A suite that has never failed proves nothing.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use vssd_tests::paths::{self, BACKEND_ENV, PREBUILT_ENV};

use crate::programs::{self, Program};

/// Where a test is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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

const FAULTS: [Fault; 14] = [
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
        "fetch-length-twice",
        Suite::Scenario("wire_hostile_changes"),
        "class_06_a_length_that_changes_after_its_check_is_not_used",
    ),
    fault(
        "drop-in-flight",
        Suite::Scenario("wire_kill"),
        "twenty_kills_under_load_lose_no_request_on_an_ssd",
    ),
];

/// What can be broken.
pub(crate) struct Broken {
    programs: Vec<Program>,
    daemon: PathBuf,
}

/// Builds pool and daemon with the faults in them. What else they consist of, they share with the sound ones; therefore the daemon takes
/// the place of the sound one and is moved away, and whoever calls builds that one afterwards.
pub(crate) fn build() -> Result<Broken> {
    // All packages, as in the sound build: with fewer, cargo would choose other features for what they depend on.
    let common = ["--workspace", "--features", "vssd-pool/sabotage,vssd-backend/sabotage"];
    let suites = ["--bin", "vssd-backend", "--test", "crash", "--test", "concurrency", "--test", "pool"];
    let mut built = programs::build(&[&["build"], &common[..], &suites[..]].concat())?;
    let units = programs::build(&[&["test", "--no-run", "--lib"], &common[..]].concat())?;
    built.tests.extend(units.tests);
    let daemon = built.binaries.get("vssd-backend").context("cargo built no daemon")?;
    let dir = paths::repo_root().join("target/sabotage");
    fs::create_dir_all(&dir)?;
    let away = dir.join("vssd-backend");
    fs::rename(daemon, &away).with_context(|| format!("move {}", daemon.display()))?;
    Ok(Broken { programs: built.tests, daemon: away })
}

/// `scenarios` are the sound programs.
pub(crate) fn run(broken: &Broken, scenarios: &[Program]) -> Result<()> {
    let tests = Tests { broken, scenarios };
    // A test that fails anyway catches nothing.
    for (suite, test) in BTreeSet::from(FAULTS.map(|fault| (fault.suite, fault.test))) {
        ensure!(passes(tests.command(suite, test)?)?, "{test} fails without any sabotage");
    }
    let mut missed = Vec::new();
    for fault in &FAULTS {
        let started = Instant::now();
        // A scenario meets its fault in a race with another processor, which may have something else to do.
        let attempts = if matches!(fault.suite, Suite::Scenario(_)) { 3 } else { 1 };
        let mut noticed = false;
        for _ in 0..attempts {
            let mut test = tests.command(fault.suite, fault.test)?;
            test.env("VSSD_SABOTAGE", fault.name);
            noticed = !passes(test)?;
            if noticed {
                break;
            }
        }
        if noticed {
            eprintln!("caught {} by {} in {:.1} s", fault.name, fault.test, started.elapsed().as_secs_f64());
        } else {
            eprintln!("MISSED {} by {}", fault.name, fault.test);
            missed.push(fault.name);
        }
    }
    if !missed.is_empty() {
        bail!("{} of {} sabotages went unnoticed: {}", missed.len(), FAULTS.len(), missed.join(", "));
    }
    eprintln!("{} sabotages caught", FAULTS.len());
    Ok(())
}

struct Tests<'a> {
    broken: &'a Broken,
    scenarios: &'a [Program],
}

impl Tests<'_> {
    fn command(&self, suite: Suite, test: &str) -> Result<Command> {
        let find = |programs: &[Program], room: &str, name: &str| {
            let found = programs.iter().find(|program| program.room() == room && program.name() == name);
            let program = found.with_context(|| format!("{room}/{name} was not built"))?;
            anyhow::Ok(program.command(&["--exact", test]))
        };
        let mut command = match suite {
            Suite::Unit(room) => find(&self.broken.programs, room, &room.replace('-', "_"))?,
            Suite::Pool(name) => find(&self.broken.programs, "vssd-pool", name)?,
            Suite::Scenario(name) => find(self.scenarios, "tests", name)?,
        };
        // A fault that is there is found in far fewer states.
        command.env("CRASH_STATES", "20000").env(BACKEND_ENV, &self.broken.daemon).env(PREBUILT_ENV, "1");
        command.env("RUST_BACKTRACE", "0").env("RUST_LIB_BACKTRACE", "0");
        Ok(command)
    }
}

/// Whether the test passes; that it was run at all is made sure of.
fn passes(mut command: Command) -> Result<bool> {
    let output = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()
        .context("start the test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !text.contains("running 1 test") {
        bail!("no test was run:\n{text}\n{}", String::from_utf8_lossy(&output.stderr));
    }
    if env::var_os("SABOTAGE_SHOW").is_some() {
        eprintln!("{text}");
    }
    Ok(output.status.success())
}
