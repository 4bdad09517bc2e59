// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong with vSSDs and their jobs, beside what can with any daemon ([`control_client::Error`]).

use control_client::{Exit, Failure, Millis, Program, word};
use serde_json::{Map, Value};
use vssd_protocol::control::{ErrorCode, JobInfo, JobKind, JobState};
use vssd_protocol::units::ByteCount;

pub(crate) type Result<T> = std::result::Result<T, CtlError>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CtlError {
    #[error(transparent)]
    Control(#[from] control_client::Error),
    /// A job ended otherwise than asked.
    #[error("{}", job_message(.0))]
    Job(Box<JobInfo>),
    #[error("{failed} of {checks} checks failed")]
    Unhealthy { failed: usize, checks: usize },
}

impl Failure for CtlError {
    fn code(&self) -> &str {
        match self {
            Self::Control(err) => err.code(),
            Self::Job(job) => match (job.error, job.state) {
                (Some(code), _) => code.as_str(),
                (None, JobState::Expired) => ErrorCode::TimedOut.as_str(),
                (None, JobState::Superseded) => ErrorCode::Conflict.as_str(),
                (None, JobState::Cancelled) => "E_CANCELLED",
                (None, _) => ErrorCode::GuestRefused.as_str(),
            },
            Self::Unhealthy { .. } => "E_UNHEALTHY",
        }
    }

    fn exit(&self) -> Exit {
        match self {
            Self::Control(err) => err.exit(),
            Self::Job(job) => match (job.state, job.error) {
                (JobState::Expired, _) => Exit::TimedOut,
                (_, Some(code)) => Exit::of_code(code),
                (_, None) => Exit::Refused,
            },
            Self::Unhealthy { .. } => Exit::Failed,
        }
    }

    fn hint(&self, program: &Program) -> Option<String> {
        match self {
            Self::Control(err) => err.hint(program),
            Self::Job(job) => job_hint(job),
            Self::Unhealthy { .. } => None,
        }
    }

    fn details(&self) -> Map<String, Value> {
        match self {
            Self::Control(err) => err.details(),
            Self::Job(_) | Self::Unhealthy { .. } => Map::new(),
        }
    }
}

/// Why the job is no success, with the numbers.
fn job_message(job: &JobInfo) -> String {
    let (device, now, target) = (&job.device, ByteCount(job.plugged_bytes), ByteCount(job.target_bytes));
    if job.kind == JobKind::Reclaim {
        let used = format!("{device} has {now} in use ({target} wished), {}", word(&job.state));
        return if job.message.is_empty() { used } else { format!("{used}: {}", job.message) };
    }
    let what = match job.state {
        JobState::Refused => format!("{device} stays at {now} ({target} asked)"),
        JobState::Partial => {
            format!("{device} went only from {} to {now} ({target} asked)", ByteCount(job.from_bytes))
        }
        JobState::Expired => {
            format!("{device} is at {now} after {} ({target} asked)", Millis(job.elapsed_ms))
        }
        JobState::Cancelled => format!("job {} was cancelled: {device} is at {now} ({target} asked)", job.id),
        JobState::Superseded => {
            format!("a newer resize took the place of job {}: {device} is at {now} ({target} asked)", job.id)
        }
        JobState::Created
        | JobState::Offered
        | JobState::Evacuating
        | JobState::Committing
        | JobState::Done => {
            format!("job {} of {device} did not succeed", job.id)
        }
    };
    if job.message.is_empty() { what } else { format!("{what}: {}", job.message) }
}

fn job_hint(job: &JobInfo) -> Option<String> {
    let device = &job.device;
    match job.state {
        JobState::Refused | JobState::Partial => Some(format!(
            "`balloon-ctl show {device}` says what the guest could give; ask again later or for less"
        )),
        JobState::Expired => Some(format!(
            "`balloon-ctl show {device}` says whether the guest is still asked; `balloon-ctl limits {device} \
             --on-timeout` decides what a deadline does"
        )),
        JobState::Superseded => Some(format!("`balloon-ctl jobs` shows the job that replaced {}", job.id)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(state: JobState, error: Option<ErrorCode>) -> CtlError {
        CtlError::Job(Box::new(JobInfo {
            id: 41,
            kind: JobKind::Resize,
            device: "vm2".to_owned(),
            state,
            from_bytes: 40 << 30,
            target_bytes: 28 << 30,
            plugged_bytes: 35 << 30,
            started_ms: 0,
            elapsed_ms: 60_000,
            deadline_ms: Some(60_000),
            message: "guest is busy".to_owned(),
            error,
            requested_by_uid: 0,
            requested_by_pid: 1,
        }))
    }

    #[test]
    fn job_that_ended_otherwise_maps_state_then_code() {
        for (state, error, code, exit) in [
            (JobState::Refused, None, "E_GUEST_REFUSED", Exit::Refused),
            (JobState::Partial, Some(ErrorCode::GuestRefused), "E_GUEST_REFUSED", Exit::Refused),
            (JobState::Partial, Some(ErrorCode::PoolFull), "E_POOL_FULL", Exit::PoolFull),
            (JobState::Expired, None, "E_TIMED_OUT", Exit::TimedOut),
            (JobState::Expired, Some(ErrorCode::NoDriver), "E_NO_DRIVER", Exit::TimedOut),
            (JobState::Cancelled, None, "E_CANCELLED", Exit::Refused),
            (JobState::Superseded, None, "E_CONFLICT", Exit::Refused),
            (JobState::Refused, Some(ErrorCode::Media), "E_MEDIA", Exit::Failed),
        ] {
            let err = job(state, error);
            assert_eq!((err.code(), err.exit()), (code, exit), "{state:?} {error:?}");
        }
        assert_eq!(
            job(JobState::Partial, None).to_string(),
            "vm2 went only from 40 GiB to 35 GiB (28 GiB asked): guest is busy"
        );
    }
}
