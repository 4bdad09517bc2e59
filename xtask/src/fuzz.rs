// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask fuzz`: builds the targets in `fuzz/` once and runs each for a while on its kept corpus, two at a time.
//!
//! The flags are those of `cargo fuzz`, which works in that folder too; set here, the targets need neither it nor a nightly toolchain: the one
//! that builds everything else has the address sanitizer as well, behind an option that it calls unstable. Where it was packaged without,
//! the targets run without.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use vssd_tests::paths;

use crate::stages::{cargo, show};

const TARGETS: [&str; 8] =
    ["vhost_user", "chain", "inflight", "pool_image", "guest_channel", "control", "host_media", "host_lines"];
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0 --cfg fuzzing";
const SANITIZER: &str = " -Zsanitizer=address";
/// Lets a stable compiler take options that may change.
const UNSTABLE_ENV: &str = "RUSTC_BOOTSTRAP";
/// How long a target runs.
const DEFAULT_S: u32 = 20;
/// What a target may take of memory; that includes the sanitizer's shadow.
const MEMORY_MIB: u32 = 1024;
/// An input that takes longer hangs.
const HANG_S: u32 = 10;
const LONGEST_INPUT: u32 = 4096;
const AT_A_TIME: usize = 2;
/// Inputs kept for a target; they are part of the repository.
const MOST_KEPT: usize = 48;

#[derive(Debug, Default, clap::Args)]
pub(crate) struct Args {
    /// How long each target runs; 20 unless told.
    #[arg(long)]
    seconds: Option<u32>,
    /// Only this target.
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
    /// Add what was found to the kept corpus, as few inputs as reach as much.
    #[arg(long)]
    keep: bool,
    /// Run these inputs only, for example one that made a target fail.
    #[arg(value_name = "FILE", requires = "target")]
    inputs: Vec<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let targets: Vec<&str> =
        TARGETS.into_iter().filter(|name| args.target.as_deref().is_none_or(|only| only == *name)).collect();
    ensure!(!targets.is_empty(), "there is no such target; there are {}", TARGETS.join(", "));
    let folder = build()?;
    if !args.inputs.is_empty() {
        let mut program = Command::new(folder.join(targets[0]));
        program.args(limits()).args(&args.inputs);
        return show(program);
    }
    run_all(&targets, &folder, args)
}

/// Builds every target; gives the folder of the programs.
fn build() -> Result<PathBuf> {
    let root = paths::repo_root();
    // Without a triple, the flags would go to build scripts as well.
    let mut cargo = cargo(&["build", "--quiet", "--release", "--bins", "--target", TRIPLE]);
    let mut flags = COVERAGE.to_owned();
    let has_sanitizer = has_sanitizer()?;
    if has_sanitizer {
        flags.push_str(SANITIZER);
        cargo.env(UNSTABLE_ENV, "1");
    }
    eprintln!(
        "fuzz targets are built {} the address sanitizer",
        if has_sanitizer { "with" } else { "without" }
    );
    cargo.env("RUSTFLAGS", flags);
    cargo.args(["--manifest-path", "fuzz/Cargo.toml", "--target-dir", "target/fuzz"]);
    show(cargo)?;
    Ok(root.join("target/fuzz").join(TRIPLE).join("release"))
}

/// Whether the compiler came with the address sanitizer's library.
fn has_sanitizer() -> Result<bool> {
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let printed = output(rustc.args(["--print", "target-libdir", "--target", TRIPLE]))?;
    ensure!(printed.status.success(), "rustc: {}", String::from_utf8_lossy(&printed.stderr));
    let folder = String::from_utf8(printed.stdout)?;
    let folder = folder.trim_end();
    let files = fs::read_dir(folder).with_context(|| format!("read {folder}"))?;
    Ok(files.flatten().any(|file| file.file_name().to_string_lossy().ends_with("rt.asan.a")))
}

fn limits() -> [String; 4] {
    [
        format!("-timeout={HANG_S}"),
        format!("-rss_limit_mb={MEMORY_MIB}"),
        // A vSSD's map may reserve 4 GiB of addresses, of which it touches what it uses: what is touched is limited above.
        "-malloc_limit_mb=8192".to_owned(),
        format!("-max_len={LONGEST_INPUT}"),
    ]
}

fn run_all(targets: &[&str], folder: &Path, args: &Args) -> Result<()> {
    let queue = Mutex::new(targets.iter());
    let failures = Mutex::new(Vec::new());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next().copied();
    thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(target) = next() {
                    match run_one(target, folder, args) {
                        Ok(line) => println!("{line}"),
                        Err(error) => {
                            eprintln!("{target}: {error:#}");
                            failures.lock().unwrap_or_else(PoisonError::into_inner).push(target);
                        }
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    ensure!(failures.is_empty(), "failed: {}", failures.join(", "));
    Ok(())
}

fn run_one(target: &str, folder: &Path, args: &Args) -> Result<String> {
    let root = paths::repo_root();
    let kept = root.join("fuzz/corpus").join(target);
    let found = root.join("target/fuzz/found").join(target);
    let crashes = root.join("target/fuzz/crashes");
    if found.exists() {
        fs::remove_dir_all(&found)?;
    }
    for dir in [&kept, &found, &crashes] {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let program = folder.join(target);
    let seconds = args.seconds.unwrap_or(DEFAULT_S);
    let mut command = Command::new(&program);
    command.args(limits()).args([
        format!("-max_total_time={seconds}"),
        "-print_final_stats=1".to_owned(),
        "-reload=0".to_owned(),
        format!("-artifact_prefix={}/{target}-", crashes.display()),
    ]);
    let output = output(command.arg(&found).arg(&kept))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let tail: Vec<&str> = text.lines().rev().take(60).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!("ended with {}\n{}", output.status, tail.join("\n"));
    }
    let executions = number_behind(&text, "stat::number_of_executed_units:").unwrap_or(0);
    ensure!(executions > 0, "nothing was run:\n{text}");
    let coverage = text.lines().rev().find_map(|line| number_behind(line, "cov:")).unwrap_or(0);
    let seed = number_behind(&text, "INFO: Seed:").unwrap_or(0);
    if args.keep {
        merge(&program, &found, &kept)?;
    }
    let inputs = fs::read_dir(&kept)?.count();
    Ok(format!(
        "{target}: {executions} executions in {seconds} s, {coverage} edges covered, {inputs} inputs kept, seed {seed}",
    ))
}

/// Replaces the kept corpus by the fewest inputs that reach as much as it and what was found.
fn merge(program: &Path, found: &Path, kept: &Path) -> Result<()> {
    let merged = found.with_extension("merged");
    if merged.exists() {
        fs::remove_dir_all(&merged)?;
    }
    fs::create_dir_all(&merged)?;
    let mut command = Command::new(program);
    command.args(limits()).args(["-set_cover_merge=1"]).arg(&merged).arg(kept).arg(found);
    let output = output(&mut command)?;
    ensure!(output.status.success(), "merge: {}", String::from_utf8_lossy(&output.stderr));
    // What once made a target fail stays, whatever it reaches now.
    let is_regression =
        |path: &Path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("fixed-"));
    for entry in fs::read_dir(kept)? {
        let path = entry?.path();
        if !is_regression(&path) {
            fs::remove_file(path)?;
        }
    }
    // A target may take from the first byte what is to be done: of each, some are kept. The longest reach most.
    let mut by_first: BTreeMap<Option<u8>, Vec<(usize, PathBuf)>> = BTreeMap::new();
    for entry in fs::read_dir(&merged)? {
        let path = entry?.path();
        let input = fs::read(&path)?;
        by_first.entry(input.first().copied()).or_default().push((input.len(), path));
    }
    let mut inputs = Vec::new();
    for mut some in by_first.into_values() {
        some.sort_unstable_by(|a, b| b.cmp(a));
        inputs.extend(some.into_iter().enumerate().map(|(turn, (_, path))| (turn, path)));
    }
    inputs.sort_by_key(|(turn, _)| *turn);
    for (_, path) in inputs.iter().take(MOST_KEPT) {
        fs::copy(path, kept.join(path.file_name().unwrap_or_default()))?;
    }
    Ok(())
}

fn output(command: &mut Command) -> Result<Output> {
    let line = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).output().with_context(|| format!("start {line}"))
}

fn number_behind(text: &str, label: &str) -> Option<u64> {
    let rest = &text[text.find(label)? + label.len()..];
    rest.split_whitespace().next()?.parse().ok()
}
