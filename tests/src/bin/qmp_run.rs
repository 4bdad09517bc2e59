// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs on an emulated host: has a QEMU there execute commands, one after the other, and prints what it returns.
//!
//! ```text
//! qmp_run SOCKET COMMAND=ARGUMENTS …     ARGUMENTS is a JSON object; `migrated` waits until a migration has ended
//! ```

use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vssd_tests::qmp::Qmp;
use vssd_tests::tool;
use vssd_tests::wait::Deadline;

fn main() -> ExitCode {
    tool::main("qmp_run", run)
}

fn run(words: &[&str]) -> Result<()> {
    let Some((socket, commands)) = words.split_first() else {
        bail!("usage: qmp_run SOCKET COMMAND=ARGUMENTS …");
    };
    let port = UnixStream::connect(socket).with_context(|| format!("connect to {socket}"))?;
    let mut qmp = Qmp::new(port)?;
    for word in commands {
        if *word == "migrated" {
            println!("{}", migrated(&mut qmp)?);
            continue;
        }
        let (command, arguments) = word.split_once('=').unwrap_or((word, "{}"));
        let arguments = serde_json::from_str(arguments).with_context(|| format!("{command}: {arguments}"))?;
        println!("{}", qmp.execute(command, arguments)?);
    }
    Ok(())
}

fn migrated(qmp: &mut Qmp) -> Result<Value> {
    Deadline::after(Duration::from_secs(60)).poll("the migration to end", || {
        let said = qmp.execute("query-migrate", json!({}))?;
        match said["status"].as_str() {
            Some("completed") => Ok(Some(said)),
            Some("failed" | "cancelled") => bail!("the migration failed: {said}"),
            _ => Ok(None),
        }
    })
}
