// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `reclaim`: a wish to the agent of a guest whose driver cannot give blocks up.

use control_client::{Answer, Millis, Session};
use serde_json::Value;
use vssd_protocol::control::{ReclaimAnswer, ReclaimParams, method};

use super::job;
use crate::args::SoftSize;
use crate::error::Result;

pub(super) struct Options {
    pub(super) deadline: Option<Millis>,
    pub(super) no_wait: bool,
    pub(super) dry_run: bool,
}

pub(super) fn run(session: &Session, name: &str, size: SoftSize, options: &Options) -> Result<()> {
    let mut client = session.connect()?;
    let soft_bytes = match size {
        SoftSize::Bytes(bytes) => Some(bytes),
        SoftSize::Off => None,
    };
    let deadline_ms = options.deadline.map(|time| time.0);
    let params = ReclaimParams { name: name.to_owned(), soft_bytes, deadline_ms, dry_run: options.dry_run };
    let mut answer: Answer<ReclaimAnswer> = client.call(method::DEVICE_RECLAIM, &params)?;
    let out = &session.out;
    let accepted = answer.typed.job.take().filter(|_| !options.no_wait);
    let Some(accepted) = accepted else {
        if out.json {
            out.object([("reclaim", answer.raw), ("dry_run", options.dry_run.into())])?;
        } else {
            let mode = if options.dry_run { " (dry run)" } else { "" };
            out.done(&format!("{name}{mode}: {}", answer.typed.plan))?;
        }
        return Ok(());
    };
    out.note(&format!("job {}: {}", accepted.id, answer.typed.plan));
    let first = Answer { raw: answer.raw.get("job").cloned().unwrap_or(Value::Null), typed: accepted };
    let last = job::follow(session, &mut client, first)?;
    if out.json {
        answer.raw["job"] = last.raw;
        out.object([("reclaim", answer.raw), ("dry_run", false.into())])?;
    }
    job::verdict(session, last.typed)
}
