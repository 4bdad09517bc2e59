// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs `balloon-ctl` as an operator's program would: JSON out, exit codes judged.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::paths;

/// `balloon-ctl` pointed at one daemon.
#[derive(Debug, Clone)]
pub struct Ctl {
    program: PathBuf,
    socket: PathBuf,
}

/// What one call gave.
#[derive(Debug, Clone)]
pub struct CtlOutput {
    /// The exit code.
    pub code: i32,
    /// Each JSON document printed, one a line or spread over several.
    pub documents: Vec<Value>,
    /// What it printed, unparsed.
    pub stdout: String,
    /// What it said to people.
    pub stderr: String,
}

impl Ctl {
    /// For the daemon whose control (or monitor) socket is `socket`.
    pub fn new(socket: &Path) -> Result<Self> {
        Ok(Self { program: paths::artifact("balloon-ctl", "balloon-ctl")?, socket: socket.to_path_buf() })
    }

    /// The command with the socket given; more can be added before it is run.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--socket").arg(&self.socket).stdin(Stdio::null());
        command
    }

    /// Runs with `--json`; the exit code is the caller's to judge.
    pub fn run(&self, args: &[&str]) -> Result<CtlOutput> {
        let mut command = self.command();
        command.arg("--json").args(args);
        let output = command.output().context("start balloon-ctl")?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let documents = serde_json::Deserializer::from_str(&stdout)
            .into_iter::<Value>()
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| format!("balloon-ctl {} printed what is not JSON: {stdout}", args.join(" ")))?;
        Ok(CtlOutput {
            code: output.status.code().unwrap_or(-1),
            documents,
            stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs what must succeed and gives its last document (`null` if it prints none).
    pub fn ok(&self, args: &[&str]) -> Result<Value> {
        let mut output = self.run(args)?;
        if output.code != 0 {
            bail!(
                "balloon-ctl {} ended with {}: {}{}",
                args.join(" "),
                output.code,
                output.stdout,
                output.stderr
            );
        }
        Ok(output.documents.pop().unwrap_or(Value::Null))
    }

    /// Runs what must be refused, and gives what was said.
    pub fn refused(&self, args: &[&str]) -> Result<CtlOutput> {
        let output = self.run(args)?;
        if output.code == 0 {
            bail!("balloon-ctl {} succeeded and should not have: {}", args.join(" "), output.stdout);
        }
        Ok(output)
    }
}

/// Reads a number from a JSON document by its path (`"/pool/free_bytes"`).
pub fn number(document: &Value, path: &str) -> Result<u64> {
    document
        .pointer(path)
        .and_then(Value::as_u64)
        .with_context(|| format!("no number at {path} in {document}"))
}
