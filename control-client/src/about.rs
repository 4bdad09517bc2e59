// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What every operator's command can say about itself and its daemon: `version`, `rpc`, `completion`, `man`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use clap::Command;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::session::Session;

/// Prints the versions of both ends; `server` is the line about the daemon.
///
/// # Errors
/// Only of printing: a version is asked for before any daemon runs, too.
pub fn version<T: DeserializeOwned>(session: &Session, server: impl FnOnce(&T) -> String) -> Result<()> {
    let answer = session.connect().and_then(|mut client| client.hello::<T>());
    let (out, program) = (&session.out, session.program);
    if out.json {
        let server = answer.map_or(Value::Null, |answer| answer.raw);
        let client = json!({"name": program.name, "version": program.version});
        return out.object([("client", client), ("server", server)]);
    }
    out.line(&format!("{} (schema {})", program.title(), program.schema))?;
    match answer {
        Ok(answer) => out.line(&server(&answer.typed)),
        Err(err) => {
            out.note(&format!("no daemon: {err}"));
            Ok(())
        }
    }
}

/// Calls any method, with `params` as JSON, and prints its answer as it comes. The method may take `patience` on top of the usual time.
///
/// # Errors
/// Those of the call.
pub fn rpc(session: &Session, method: &str, params: Option<&str>, patience: Duration) -> Result<()> {
    let params: Value = serde_json::from_str(params.unwrap_or("{}"))
        .map_err(|err| Error::usage(format!("the parameters are no JSON: {err}")))?;
    let result = session.connect()?.call_raw(method, params, patience)?;
    session.out.value(&result)
}

/// Prints a shell's completion script for `command`.
///
/// # Errors
/// Only of printing.
pub fn completion(session: &Session, mut command: Command, shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, session.program.name, &mut script);
    session.out.text(&String::from_utf8_lossy(&script))
}

/// Writes the manual pages of `command` and all that is under it into a folder.
///
/// # Errors
/// `Local`.
pub fn man(command: Command, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(command, dir))
        .map_err(|source| Error::Local { what: format!("cannot write to {}", dir.display()), source })
}
