// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs on an emulated host: has the agent of an inner guest run a shell command, and ends as it does.
//!
//! ```text
//! guest_run SOCKET SECONDS COMMAND       SOCKET is where the inner QEMU serves the agent's port
//! ```

use std::env;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use vssd_tests::agent::Agent;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("guest_run: {error:#}");
            ExitCode::from(125)
        }
    }
}

fn run() -> Result<ExitCode> {
    let words: Vec<String> = env::args().skip(1).collect();
    let [socket, seconds, command] = words.as_slice() else {
        bail!("usage: guest_run SOCKET SECONDS COMMAND");
    };
    let seconds = seconds.parse().with_context(|| format!("{seconds:?} is no number of seconds"))?;
    let port = UnixStream::connect(socket).with_context(|| format!("connect to {socket}"))?;
    let (agent, limit) = (Agent::new(port)?, Duration::from_secs(seconds));
    agent.wait_answer(limit)?;
    let job = agent.spawn(command)?;
    job.close_stdin()?;
    let output = job.wait(limit)?;
    io::stdout().write_all(&output.stdout)?;
    io::stderr().write_all(&output.stderr)?;
    Ok(u8::try_from(output.code).map_or(ExitCode::FAILURE, ExitCode::from))
}
