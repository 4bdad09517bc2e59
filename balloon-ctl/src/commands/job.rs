// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `jobs`, `job show|cancel|wait`, and following a job to its end.

use std::thread;
use std::time::{Duration, Instant};

use control_client::{Answer, Client, Error, Millis, NOTHING, Session, word};
use serde_json::json;
use vssd_protocol::control::{JobInfo, JobKind, JobList, JobParams, JobState, JobWaitParams, method};

use crate::error::{CtlError, Result};
use crate::progress::Progress;

/// How long one `job.wait` may take: well below the daemon's limit, so that a dead daemon is noticed.
const SLICE: Duration = Duration::from_secs(20);
/// Least time between two questions, should the daemon answer without news.
const PAUSE: Duration = Duration::from_millis(50);

pub(super) fn list(session: &Session) -> control_client::Result<()> {
    let answer: Answer<JobList> = session.connect()?.call(method::JOB_LIST, &json!({}))?;
    let out = &session.out;
    if out.json {
        return out.object([("jobs", answer.raw["jobs"].clone())]);
    }
    out.table(
        ["ID", "DEVICE", "STATE", "FROM", "TARGET", "NOW", "ELAPSED", "MESSAGE"],
        answer.typed.jobs.into_iter().map(|job| {
            [
                job.id.to_string(),
                job.device,
                word(&job.state),
                out.size(job.from_bytes),
                out.size(job.target_bytes),
                out.size(job.plugged_bytes),
                Millis(job.elapsed_ms).to_string(),
                job.message,
            ]
        }),
    )
}

pub(super) fn show(session: &Session, id: u64) -> control_client::Result<()> {
    let answer: Answer<JobInfo> = session.connect()?.call(method::JOB_SHOW, &JobParams { id })?;
    let out = &session.out;
    if out.json {
        return out.object([("job", answer.raw)]);
    }
    let job = answer.typed;
    let or_nothing = |text: Option<String>| text.unwrap_or_else(|| NOTHING.to_owned());
    out.pairs([
        ("id", job.id.to_string()),
        ("device", job.device),
        ("state", word(&job.state)),
        ("from", out.size(job.from_bytes)),
        ("target", out.size(job.target_bytes)),
        ("now", out.size(job.plugged_bytes)),
        ("elapsed", Millis(job.elapsed_ms).to_string()),
        ("deadline", or_nothing(job.deadline_ms.filter(|&ms| ms > 0).map(|ms| Millis(ms).to_string()))),
        ("message", or_nothing(Some(job.message).filter(|text| !text.is_empty()))),
        ("error", or_nothing(job.error.map(|code| code.as_str().to_owned()))),
        ("requested by", format!("uid {}, pid {}", job.requested_by_uid, job.requested_by_pid)),
    ])
}

pub(super) fn cancel(session: &Session, id: u64) -> control_client::Result<()> {
    let answer: Answer<JobInfo> = session.connect()?.call(method::JOB_CANCEL, &JobParams { id })?;
    let out = &session.out;
    if out.json {
        return out.object([("job", answer.raw)]);
    }
    let job = answer.typed;
    out.done(&format!("job {id} {}: {} is at {}", word(&job.state), job.device, out.size(job.plugged_bytes)))
}

pub(super) fn wait(session: &Session, id: u64) -> Result<()> {
    let mut client = session.connect()?;
    let first = client.call(method::JOB_SHOW, &JobParams { id })?;
    let last = follow(session, &mut client, first)?;
    if session.out.json {
        session.out.object([("job", last.raw)])?;
    }
    verdict(session, last.typed)
}

/// Shows the progress of a job until it has ended, and returns how.
pub(super) fn follow(
    session: &Session,
    client: &mut Client,
    first: Answer<JobInfo>,
) -> control_client::Result<Answer<JobInfo>> {
    let give_up_at = session.give_up_at();
    let mut progress = Progress::new(&session.out, &first.typed);
    let mut last = first;
    while !last.typed.state.is_final() {
        progress.show(&last.typed);
        let asked_at = Instant::now();
        let left = give_up_at.map_or(SLICE, |at| at.saturating_duration_since(asked_at));
        if left.is_zero() {
            return Err(still_pending(session, &last.typed));
        }
        let patience = left.min(SLICE);
        let params = JobWaitParams {
            id: last.typed.id,
            timeout_ms: u64::try_from(patience.as_millis()).unwrap_or(1).max(1),
        };
        let next: Answer<JobInfo> =
            client.call_for(method::JOB_WAIT, &params, patience).map_err(lost_sight)?;
        let has_news =
            next.typed.state != last.typed.state || next.typed.plugged_bytes != last.typed.plugged_bytes;
        if !has_news && asked_at.elapsed() < PAUSE {
            thread::sleep(PAUSE);
        }
        last = next;
    }
    Ok(last)
}

/// Says what became of a job; anything but `done` is an error.
pub(super) fn verdict(session: &Session, job: JobInfo) -> Result<()> {
    if job.state != JobState::Done {
        return Err(CtlError::Job(Box::new(job)));
    }
    let out = &session.out;
    if out.json {
        return Ok(());
    }
    let (from, now) = (job.from_bytes, job.plugged_bytes);
    let what = if job.kind == JobKind::Reclaim { " in use" } else { "" };
    let moved =
        if now < from { format!("; {} returned to the pool", out.size(from - now)) } else { String::new() };
    let why = if job.message.is_empty() { String::new() } else { format!(" ({})", job.message) };
    out.done(&format!(
        "{}: {} -> {}{what} in {}{moved}{why}",
        job.device,
        out.size(from),
        out.size(now),
        Millis(job.elapsed_ms)
    ))?;
    Ok(())
}

/// A daemon that starts again goes on with what was asked, under a new number.
fn lost_sight(err: Error) -> Error {
    match err {
        Error::Unreachable { path, reason, .. } => Error::Unreachable {
            path,
            reason,
            hint: "what was asked is kept: once the daemon runs again, `balloon-ctl jobs` shows the job that goes on"
                .to_owned(),
        },
        other => other,
    }
}

fn still_pending(session: &Session, job: &JobInfo) -> Error {
    let (id, out) = (job.id, &session.out);
    Error::TimedOut {
        message: format!(
            "job {id} is still {}: {} is at {} ({} asked)",
            word(&job.state),
            job.device,
            out.size(job.plugged_bytes),
            out.size(job.target_bytes)
        ),
        hint: format!("it goes on; `balloon-ctl job wait {id}` or `balloon-ctl job cancel {id}`"),
    }
}
