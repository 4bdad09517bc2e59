// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `pool status` asks the daemon; `pool create` and `pool check` work on media that no daemon has open, and
//! hand over to the program that knows their layout.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use control_client::{Answer, Error, Result, Session};
use serde_json::json;
use vssd_protocol::control::{PoolStatus, method};

use crate::args::PoolCreateArgs;

const BACKEND: &str = "vssd-backend";

pub(super) fn status(session: &Session) -> Result<()> {
    let answer: Answer<PoolStatus> = session.connect()?.call(method::POOL_STATUS, &json!({}))?;
    let out = &session.out;
    if out.json {
        return out.object([("pool", answer.raw)]);
    }
    let pool = answer.typed;
    let kinds: Vec<&str> = pool.media.iter().map(|medium| medium.kind.as_str()).collect();
    out.table(
        [
            "POOL",
            "MEDIA",
            "SIZE",
            "ALLOCATED",
            "PROMISED",
            "AVAILABLE",
            "FREE",
            "SCRUBBING",
            "OVERCOMMIT",
            "VSSDS",
            "HEALTH",
        ],
        [[
            pool.name.clone(),
            kinds.join("+"),
            out.size(pool.size_bytes),
            out.size(pool.allocated_bytes),
            out.size(pool.promised_bytes),
            out.size(pool.available_bytes),
            out.size(pool.free_bytes),
            out.size(pool.scrubbing_bytes),
            format!("{} %", pool.overcommit_percent),
            pool.devices.to_string(),
            pool.health.clone(),
        ]],
    )?;
    if let Some(problem) = &pool.problem {
        out.line("")?;
        out.line(problem)?;
    }
    if pool.refused_calls > 0 {
        out.line("")?;
        let count = pool.refused_calls;
        out.line(&format!(
            "the daemon's sandbox refused {count} system calls: its log says which; please report it"
        ))?;
    }
    out.line("")?;
    out.table(
        ["MEDIUM", "SIZE", "WRITTEN", "PERSISTENCE", "PATH"],
        pool.media.iter().map(|medium| {
            [
                medium.kind.clone(),
                out.size(medium.size_bytes),
                out.size(medium.written_bytes),
                medium.persistence.clone(),
                medium.path.clone(),
            ]
        }),
    )
}

pub(super) fn create(args: PoolCreateArgs) -> Result<()> {
    become_backend(create_args(args))
}

pub(super) fn check(session: &Session, files: Vec<OsString>) -> Result<()> {
    become_backend(check_args(session.out.json, files))
}

/// Becomes `vssd-backend pool …`; returns only when that fails.
fn become_backend(args: Vec<OsString>) -> Result<()> {
    let program = find_backend();
    let source = Command::new(&program).arg("pool").args(args).exec();
    Err(Error::Local { what: format!("cannot run {}", program.display()), source })
}

fn create_args(given: PoolCreateArgs) -> Vec<OsString> {
    let PoolCreateArgs { nvram, ssd, block_size, name, overcommit, force } = given;
    let mut args = vec!["create".into()];
    for (option, value) in [
        ("--nvram", nvram),
        ("--ssd", ssd),
        ("--block-size", block_size),
        ("--name", name),
        ("--overcommit", overcommit),
    ] {
        if let Some(value) = value {
            args.extend([option.into(), value]);
        }
    }
    if force {
        args.push("--force".into());
    }
    args
}

fn check_args(json: bool, files: Vec<OsString>) -> Vec<OsString> {
    let mut args = vec!["check".into()];
    if json {
        args.push("--json".into());
    }
    args.push("--".into());
    args.extend(files);
    args
}

/// Beside this program, as both are built and installed together; otherwise wherever PATH has it.
fn find_backend() -> PathBuf {
    let sibling = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(BACKEND)));
    sibling.filter(|path| path.is_file()).unwrap_or_else(|| Path::new(BACKEND).to_owned())
}
