// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `ping`, `version`, `rpc`, and what this program says about itself: `completion` and `man`.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::CommandFactory;
use control_client::{Answer, Error, Millis, Result, Session};
use serde_json::{Value, json};
use vssd_protocol::control::ServerInfo;

use crate::args::Cli;

pub(super) fn ping(session: &Session) -> Result<()> {
    let mut client = session.connect()?;
    let asked_at = Instant::now();
    let answer: Answer<ServerInfo> = client.hello()?;
    let round_trip = asked_at.elapsed();
    let out = &session.out;
    if out.json {
        let micros = u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX);
        return out.object([("server", answer.raw), ("round_trip_us", micros.into())]);
    }
    let info = answer.typed;
    out.done(&format!(
        "{} {} serves pool {} on {} ({} socket), up {}, answered in {:.1} ms",
        info.server,
        info.version,
        info.pool,
        client.path().display(),
        info.socket,
        Millis(info.uptime_ms),
        round_trip.as_secs_f64() * 1000.0
    ))
}

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
            let info = answer.typed;
            out.line(&format!("{} {} (schema {})", info.server, info.version, info.schema))
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
    let result = session.connect()?.call_raw(method, params, Duration::ZERO)?;
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
