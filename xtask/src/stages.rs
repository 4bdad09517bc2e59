// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Named steps with their times, two of them at a time, and the steps that several commands share.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vssd_tests::kernel::Kernel;
use vssd_tests::paths;

/// How much less than others what runs beside them asks for, as `nice` counts it.
const YIELDING: i32 = 10;
/// What takes less is not in the table.
const WORTH_A_LINE: Duration = Duration::from_millis(500);

/// Steps; each is announced and timed on standard error.
#[derive(Debug)]
pub(crate) struct Stages {
    started: Instant,
    times: Mutex<Vec<(String, Duration)>>,
}

impl Stages {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), times: Mutex::default() }
    }

    /// Runs a step; an error carries its name.
    pub(crate) fn run<T>(&self, name: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("==> {name}");
        let start = Instant::now();
        let outcome = step().with_context(|| format!("{name} failed"));
        let took = start.elapsed();
        eprintln!(
            "<== {name}: {} in {:.1} s",
            if outcome.is_ok() { "ok" } else { "FAILED" },
            took.as_secs_f64()
        );
        self.times.lock().unwrap_or_else(PoisonError::into_inner).push((name.to_owned(), took));
        outcome
    }

    /// Prints where the time went, most of it first. A step that consists of others stands there beside them.
    pub(crate) fn finish(self) {
        let mut times = self.times.into_inner().unwrap_or_else(PoisonError::into_inner);
        times.sort_by_key(|(_, took)| std::cmp::Reverse(*took));
        for (name, took) in times.iter().filter(|(_, took)| *took >= WORTH_A_LINE) {
            eprintln!("{:>8.1} s  {name}", took.as_secs_f64());
        }
        eprintln!("{:>8.1} s  in all", self.started.elapsed().as_secs_f64());
        for line in NOT_RUN.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            eprintln!("{line}");
        }
    }
}

/// How a line begins that says what this machine could not test.
pub(crate) const NOT_RUN_MARK: &str = "NOT RUN: ";
static NOT_RUN: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Notes such a line, for the end of the summary.
pub(crate) fn not_run(line: &str) {
    NOT_RUN.lock().unwrap_or_else(PoisonError::into_inner).push(line.to_owned());
}

/// A step that is run by whoever has time for it.
pub(crate) type Step<'a> = Box<dyn FnOnce() -> Result<()> + Send + 'a>;

/// Runs `first` with what `steps` leave of the processors, and beside it the steps, one at a time and from the front; once `first` has
/// ended, two at a time. Goes on whatever fails, and waits for all.
pub(crate) fn beside(first: impl FnOnce() -> Result<()> + Send, steps: Vec<Step<'_>>) -> Result<()> {
    let waiting = Mutex::new(VecDeque::from(steps));
    let failed = Mutex::new(Vec::new());
    let note = |outcome: Result<()>| {
        if let Err(error) = outcome {
            failed.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{error:#}"));
        }
    };
    let take = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let run_steps = || {
        while let Some(step) = take() {
            note(step());
        }
    };
    thread::scope(|scope| {
        let yielding = scope.spawn(|| {
            // A matter of the thread; the programs that it starts inherit it.
            rustix::process::nice(YIELDING).context("lower the priority")?;
            first()
        });
        scope.spawn(run_steps);
        note(yielding.join().unwrap_or_else(|_panic| bail!("a thread of this program panicked")));
        run_steps();
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    ensure!(failed.is_empty(), "{}", failed.join("; and "));
    Ok(())
}

/// A cargo command in the checkout's root, without input.
pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    cargo.current_dir(paths::repo_root()).args(args).stdin(Stdio::null());
    cargo
}

/// Runs a command whose output the reader should see.
pub(crate) fn show(mut command: Command) -> Result<()> {
    let line = format!("{} {}", command.get_program().to_string_lossy(), shown_args(&command));
    let status = command.status().with_context(|| format!("start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` ended with {status}");
    }
    Ok(())
}

fn shown_args(command: &Command) -> String {
    command.get_args().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Builds every program that the guests and the scenarios use.
pub(crate) fn build_binaries(extra: &[&str]) -> Result<()> {
    let mut args = vec!["build", "--workspace", "--bins", "--exclude", "xtask"];
    args.extend(extra);
    show(cargo(&args))
}

/// Builds the agent with its C library in it, for guests of any distribution and age.
pub(crate) fn build_static_agent() -> Result<PathBuf> {
    let target = &format!("{}-unknown-linux-gnu", env::consts::ARCH);
    // Named, so that what is built for this machine meanwhile, such as macros, is linked as usual.
    let mut build =
        cargo(&["rustc", "--package", "vssd-agent", "--bin", "vssd-agent", "--release", "--target", target]);
    build.args(["--", "-C", "target-feature=+crt-static"]);
    show(build)?;
    let agent = paths::profile_dir()?.with_file_name(target).join("release/vssd-agent");
    let linked = Command::new("ldd").arg(&agent).output().context("start ldd")?;
    let said = [linked.stdout, linked.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    if !["statically linked", "not a dynamic executable"].iter().any(|words| said.contains(words)) {
        bail!("{} still needs libraries: {said}", agent.display());
    }
    Ok(agent)
}

/// Builds the driver for each kernel; a compiler warning is an error.
pub(crate) fn build_modules() -> Result<()> {
    let source = paths::repo_root().join("guest-driver");
    for kernel in Kernel::all()? {
        let built = kernel.build_module(&source)?;
        eprintln!("{}: {}", kernel.release(), built.join("vssd.ko").display());
    }
    Ok(())
}
