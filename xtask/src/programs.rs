// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The workspace's test programs: built all at once, so that every package is compiled with one set of features, and run one by
//! one, so that each has its time and its place in the order. What they test, they know themselves.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use vssd_tests::paths;

use crate::stages::{self, NOT_RUN_MARK, cargo};

/// A program with tests in it.
#[derive(Debug)]
pub(crate) struct Program {
    /// The folder of its package.
    dir: PathBuf,
    name: String,
    is_integration: bool,
    path: PathBuf,
}

/// What came of a build.
#[derive(Debug, Default)]
pub(crate) struct Built {
    pub(crate) tests: Vec<Program>,
    /// Programs without tests in them, by name.
    pub(crate) binaries: BTreeMap<String, PathBuf>,
}

/// Has cargo build.
pub(crate) fn build(args: &[&str]) -> Result<Built> {
    let mut cargo = cargo(args);
    cargo.args(["--quiet", "--message-format=json-render-diagnostics"]).stderr(Stdio::inherit());
    let output = cargo.output().context("start cargo")?;
    ensure!(output.status.success(), "cargo {} ended with {}", args.join(" "), output.status);
    let mut built = Built::default();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: Value = serde_json::from_str(line).with_context(|| format!("cargo said {line}"))?;
        let text = |pointer| message.pointer(pointer).and_then(Value::as_str);
        let (Some(path), Some(manifest), Some(name)) =
            (text("/executable"), text("/manifest_path"), text("/target/name"))
        else {
            continue;
        };
        if message.pointer("/profile/test").and_then(Value::as_bool) == Some(true) {
            built.tests.push(Program {
                dir: Path::new(manifest).parent().map(Path::to_path_buf).unwrap_or_default(),
                name: name.to_owned(),
                is_integration: text("/target/kind/0") == Some("test"),
                path: path.into(),
            });
        } else {
            built.binaries.insert(name.to_owned(), path.into());
        }
    }
    built.tests.sort_by(|a, b| (&a.dir, &a.name).cmp(&(&b.dir, &b.name)));
    Ok(built)
}

impl Program {
    /// The name of its package's folder.
    pub(crate) fn room(&self) -> &str {
        self.dir.file_name().and_then(OsStr::to_str).unwrap_or_default()
    }

    /// The name of its target.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn is_scenario(&self) -> bool {
        self.room() == "tests" && self.is_integration
    }

    /// Its room and name, for people.
    pub(crate) fn label(&self) -> String {
        format!("{}/{}", self.room(), self.name)
    }

    /// As cargo would start it.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.path);
        command.current_dir(&self.dir).env("CARGO_MANIFEST_DIR", &self.dir).args(args).stdin(Stdio::null());
        command
    }

    /// Runs a command of this program and shows all its output at the end, in one piece; until then it grows in a file. What the
    /// program says it could not test is noted for the summary.
    pub(crate) fn run(&self, mut command: Command) -> Result<()> {
        let logs = paths::repo_root().join("target/test-logs");
        fs::create_dir_all(&logs)?;
        let log = logs.join(format!("{}-{}.log", self.room(), self.name));
        let file = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let status = command
            .stdout(file.try_clone()?)
            .stderr(file)
            .status()
            .with_context(|| format!("start {}", self.path.display()))?;
        let text = fs::read(&log)?;
        let mut out = io::stdout().lock();
        writeln!(out, "---- {}", self.label())?;
        out.write_all(&text)?;
        out.flush()?;
        let text = String::from_utf8_lossy(&text);
        text.lines().filter(|line| line.starts_with(NOT_RUN_MARK)).for_each(stages::not_run);
        if !status.success() {
            bail!("{} ended with {status}; its output is in {}", self.label(), log.display());
        }
        Ok(())
    }
}
