// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Named steps with their times, and the steps that several commands share.

use std::env;
use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use vssd_tests::kernel::Kernel;
use vssd_tests::paths;

/// Steps run one after the other; each is announced and timed on standard error.
#[derive(Debug)]
pub(crate) struct Stages {
    started: Instant,
    times: Vec<(String, Duration)>,
}

impl Stages {
    pub(crate) fn new() -> Self {
        Self { started: Instant::now(), times: Vec::new() }
    }

    /// Runs a step; an error carries its name.
    pub(crate) fn run<T>(&mut self, name: &str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("==> {name}");
        let start = Instant::now();
        let outcome = step().with_context(|| format!("{name} failed"));
        let took = start.elapsed();
        eprintln!(
            "<== {name}: {} in {:.1} s",
            if outcome.is_ok() { "ok" } else { "FAILED" },
            took.as_secs_f64()
        );
        self.times.push((name.to_owned(), took));
        outcome
    }

    /// Prints where the time went.
    pub(crate) fn finish(self) {
        for (name, took) in &self.times {
            eprintln!("{:>8.1} s  {name}", took.as_secs_f64());
        }
        eprintln!("{:>8.1} s  in all", self.started.elapsed().as_secs_f64());
    }
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

/// Builds the driver for each kernel; a compiler warning is an error.
pub(crate) fn build_modules() -> Result<()> {
    let source = paths::repo_root().join("guest-driver");
    for kernel in Kernel::all()? {
        let built = kernel.build_module(&source)?;
        eprintln!("{}: {}", kernel.release(), built.join("vssd.ko").display());
    }
    Ok(())
}
