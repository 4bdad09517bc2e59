// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong, with the stable code, the hint and the exit code of each case.
//!
//! ```text
//!   error[E_BELOW_MIN]: vm1 cannot go to 2 GiB: minimum is 5 GiB
//!   hint: the largest shrink now is 7.6 GiB
//! ```

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};
use vssd_protocol::control::{ErrorCode, JobInfo, JobKind, JobState};
use vssd_protocol::units::ByteCount;

use crate::output::word;
use crate::size::Millis;

pub(crate) type Result<T> = std::result::Result<T, CtlError>;

/// Exit codes; the help of the command documents them, scripts rely on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Failed = 1,
    Usage = 2,
    NotFound = 3,
    Refused = 4,
    TimedOut = 5,
    PoolFull = 6,
    Unreachable = 7,
    NotPermitted = 8,
}

impl Exit {
    fn of_code(code: ErrorCode) -> Self {
        match code {
            ErrorCode::NotFound => Self::NotFound,
            ErrorCode::BelowMin
            | ErrorCode::AboveMax
            | ErrorCode::Conflict
            | ErrorCode::InUse
            | ErrorCode::NoDriver
            | ErrorCode::GuestRefused => Self::Refused,
            ErrorCode::TimedOut => Self::TimedOut,
            ErrorCode::PoolFull => Self::PoolFull,
            ErrorCode::Permission => Self::NotPermitted,
            // The command line was well formed, but one of its values is not acceptable.
            ErrorCode::InvalidParams => Self::Usage,
            ErrorCode::Parse
            | ErrorCode::InvalidRequest
            | ErrorCode::UnknownMethod
            | ErrorCode::Exists
            | ErrorCode::TooLarge
            | ErrorCode::Busy
            | ErrorCode::Media
            | ErrorCode::Internal => Self::Failed,
        }
    }
}

/// An error answer, read leniently: a newer daemon may send codes that this program does not know,
/// and what answers on a socket may be no vSSD daemon at all.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Refusal {
    code: i64,
    message: String,
    #[serde(default)]
    data: RefusalData,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct RefusalData {
    code: Option<String>,
    hint: Option<String>,
    detail: Value,
}

impl Refusal {
    /// A refusal of this program's own, in the words of the daemon.
    pub(crate) fn new(code: ErrorCode, message: String) -> Self {
        let data = RefusalData { code: Some(code.as_str().to_owned()), ..RefusalData::default() };
        Self { code: code.rpc_code().into(), message, data }
    }

    fn known_code(&self) -> Option<ErrorCode> {
        let code = self.data.code.clone()?;
        serde_json::from_value(Value::String(code)).ok()
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CtlError {
    /// The command line is well formed but makes no sense.
    #[error("{message}")]
    Usage { message: String, hint: Option<&'static str> },
    /// The connection could not be made, or ended before the answer came.
    #[error("cannot reach the daemon at {}: {reason}", path.display())]
    Unreachable { path: PathBuf, reason: String, hint: &'static str },
    #[error("not allowed to open {}", path.display())]
    Denied { path: PathBuf },
    #[error("{message}")]
    TimedOut { message: String, hint: String },
    /// The answer is not what the control channel allows.
    #[error("the daemon's answer makes no sense: {0}")]
    Protocol(String),
    /// The daemon answered with an error.
    #[error("{}", .0.message)]
    Refused(Box<Refusal>),
    /// A job ended otherwise than asked.
    #[error("{}", job_message(.0))]
    Job(Box<JobInfo>),
    /// The operator answered no.
    #[error("nothing was done")]
    Declined,
    /// Something on this host failed.
    #[error("{what}")]
    Local { what: String, source: io::Error },
    #[error("{failed} of {checks} checks failed")]
    Unhealthy { failed: usize, checks: usize },
}

impl CtlError {
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: None }
    }

    /// Why the socket at `path` could not be connected to.
    pub(crate) fn of_connect(path: &Path, source: &io::Error) -> Self {
        let unreachable =
            |hint| Self::Unreachable { path: path.to_owned(), reason: source.to_string(), hint };
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Denied { path: path.to_owned() },
            io::ErrorKind::NotFound => unreachable(
                "start vssd-backend, or name its control socket with --socket or BALLOON_CTL_SOCKET",
            ),
            io::ErrorKind::ConnectionRefused => {
                unreachable("the socket is there but nobody listens: vssd-backend has ended; start it again")
            }
            _ => unreachable("see whether vssd-backend runs and which control socket it has"),
        }
    }

    /// What happened, with its causes.
    pub(crate) fn message(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(err) = cause {
            text.push_str(": ");
            text.push_str(&err.to_string());
            cause = err.source();
        }
        text
    }

    /// The stable code, `E_…`.
    pub(crate) fn code(&self) -> &str {
        match self {
            Self::Usage { .. } => "E_USAGE",
            Self::Unreachable { .. } => "E_UNREACHABLE",
            Self::Denied { .. } => ErrorCode::Permission.as_str(),
            Self::TimedOut { .. } => ErrorCode::TimedOut.as_str(),
            Self::Protocol(_) => "E_PROTOCOL",
            Self::Refused(refusal) => refusal.data.code.as_deref().unwrap_or("E_RPC"),
            Self::Job(job) => match (job.error, job.state) {
                (Some(code), _) => code.as_str(),
                (None, JobState::Expired) => ErrorCode::TimedOut.as_str(),
                (None, JobState::Superseded) => ErrorCode::Conflict.as_str(),
                (None, JobState::Cancelled) => "E_CANCELLED",
                (None, _) => ErrorCode::GuestRefused.as_str(),
            },
            Self::Declined => "E_DECLINED",
            Self::Local { .. } => "E_LOCAL",
            Self::Unhealthy { .. } => "E_UNHEALTHY",
        }
    }

    pub(crate) fn exit(&self) -> Exit {
        match self {
            Self::Usage { .. } => Exit::Usage,
            Self::Unreachable { .. } => Exit::Unreachable,
            Self::Denied { .. } => Exit::NotPermitted,
            Self::TimedOut { .. } => Exit::TimedOut,
            Self::Refused(refusal) => refusal.known_code().map_or(Exit::Failed, Exit::of_code),
            Self::Job(job) => match (job.state, job.error) {
                (JobState::Expired, _) => Exit::TimedOut,
                (_, Some(code)) => Exit::of_code(code),
                (_, None) => Exit::Refused,
            },
            Self::Protocol(_) | Self::Declined | Self::Local { .. } | Self::Unhealthy { .. } => Exit::Failed,
        }
    }

    /// What to do next, where there is something to say.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Usage { hint, .. } => hint.map(str::to_owned),
            Self::Unreachable { hint, .. } => Some((*hint).to_owned()),
            Self::Denied { .. } => Some(
                "run as root or as a member of the socket's group; the monitor socket beside it is for reading by all"
                    .to_owned(),
            ),
            Self::TimedOut { hint, .. } => Some(hint.clone()),
            Self::Protocol(_) => {
                Some("is this the control socket of vssd-backend? `balloon-ctl version` compares versions".to_owned())
            }
            Self::Refused(refusal) => refusal.data.hint.clone(),
            Self::Job(job) => job_hint(job),
            Self::Declined | Self::Local { .. } | Self::Unhealthy { .. } => None,
        }
    }

    /// The error for programs.
    pub(crate) fn to_json(&self) -> Value {
        let mut error =
            json!({"code": self.code(), "message": self.message(), "exit_code": self.exit() as i32});
        if let Some(hint) = self.hint() {
            error["hint"] = Value::String(hint);
        }
        if let Self::Refused(refusal) = self {
            error["rpc_code"] = refusal.code.into();
            if !refusal.data.detail.is_null() {
                error["detail"] = refusal.data.detail.clone();
            }
        }
        error
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

    fn refusal(text: &str) -> CtlError {
        CtlError::Refused(Box::new(serde_json::from_str(text).unwrap()))
    }

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
    fn every_daemon_code_has_its_exit_code() {
        for (code, exit) in [
            (ErrorCode::Parse, 1),
            (ErrorCode::InvalidRequest, 1),
            (ErrorCode::UnknownMethod, 1),
            (ErrorCode::InvalidParams, 2),
            (ErrorCode::NotFound, 3),
            (ErrorCode::Exists, 1),
            (ErrorCode::BelowMin, 4),
            (ErrorCode::AboveMax, 4),
            (ErrorCode::PoolFull, 6),
            (ErrorCode::Conflict, 4),
            (ErrorCode::InUse, 4),
            (ErrorCode::NoDriver, 4),
            (ErrorCode::GuestRefused, 4),
            (ErrorCode::TimedOut, 5),
            (ErrorCode::Permission, 8),
            (ErrorCode::TooLarge, 1),
            (ErrorCode::Busy, 1),
            (ErrorCode::Media, 1),
            (ErrorCode::Internal, 1),
        ] {
            let text = json!({"code": code.rpc_code(), "message": "m", "data": {"code": code}}).to_string();
            let err = refusal(&text);
            assert_eq!((err.code(), err.exit() as i32), (code.as_str(), exit), "{code:?}");
        }
    }

    #[test]
    fn error_of_a_newer_or_foreign_daemon_is_shown_as_it_is() {
        let newer = refusal(
            r#"{"code":-32099,"message":"too hot","data":{"code":"E_TOO_HOT","hint":"cool it","x":1}}"#,
        );
        assert_eq!((newer.code(), newer.exit()), ("E_TOO_HOT", Exit::Failed));
        assert_eq!(newer.hint().as_deref(), Some("cool it"));
        let foreign = refusal(r#"{"code":-32601,"message":"Method not found"}"#);
        assert_eq!((foreign.code(), foreign.exit()), ("E_RPC", Exit::Failed));
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

    #[test]
    fn connect_errors_say_what_to_do() {
        let path = Path::new("/run/vssd/control.sock");
        let of = |kind: io::ErrorKind| CtlError::of_connect(path, &io::Error::from(kind));
        assert_eq!(of(io::ErrorKind::PermissionDenied).exit(), Exit::NotPermitted);
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused, io::ErrorKind::InvalidInput] {
            assert_eq!(of(kind).exit(), Exit::Unreachable);
            assert!(of(kind).hint().is_some());
        }
    }
}
