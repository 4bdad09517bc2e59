// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `version`, `rpc`, and what this program says about itself: `completion` and `man`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use clap::CommandFactory;
use control_client::{Error, Result, Session};
use serde_json::{Value, json};
use vm_host::wire::ServerInfo;

use super::args::Cli;

pub(super) fn version(session: &Session) -> Result<()> {
    let server = session.connect().and_then(|mut client| client.hello::<ServerInfo>());
    let (out, program) = (&session.out, session.program);
    if out.json {
        let server = server.map_or(Value::Null, |answer| answer.raw);
        let client = json!({"name": program.name, "version": program.version});
        return out.object([("client", client), ("server", server)]);
    }
    out.line(&format!("{} (schema {})", program.title(), program.schema))?;
    match server {
        Ok(answer) => {
            let ServerInfo { server, version, schema, .. } = answer.typed;
            out.line(&format!("{server} {version} (schema {schema}), the daemon"))
        }
        // A version is asked for before anything runs, too.
        Err(err) => {
            out.note(&format!("no daemon: {err}"));
            Ok(())
        }
    }
}

pub(super) fn rpc(session: &Session, method: &str, params: Option<&str>) -> Result<()> {
    let params: Value = serde_json::from_str(params.unwrap_or("{}"))
        .map_err(|err| Error::usage(format!("the parameters are no JSON: {err}")))?;
    // Any method: those that take long, too.
    let patience = if session.give_up_at().is_some() { Duration::ZERO } else { Duration::MAX };
    let result = session.connect()?.call_raw(method, params, patience)?;
    session.out.value(&result)
}

pub(super) fn completion(session: &Session, shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), session.program.name, &mut script);
    session.out.text(&String::from_utf8_lossy(&script))
}

pub(super) fn man(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
        .map_err(|source| Error::Local { what: format!("cannot write to {}", dir.display()), source })
}
