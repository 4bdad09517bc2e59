// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong between a command and its daemon, with the stable code, the hint and the exit code of each case.
//!
//! ```text
//!   error[E_BELOW_MIN]: vm1 cannot go to 2 GiB: minimum is 5 GiB
//!   hint: the largest shrink now is 7.6 GiB
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use vssd_protocol::control::ErrorCode;

use crate::program::Program;
use crate::text::{envelope, eprint_line, print_error};

pub type Result<T> = std::result::Result<T, Error>;

/// Exit codes; [`Program::after_help`] documents them, scripts rely on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
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
    /// What a program ends with whose daemon answered `code`.
    pub fn of_code(code: ErrorCode) -> Self {
        match code {
            ErrorCode::NotFound => Self::NotFound,
            ErrorCode::BelowMin
            | ErrorCode::AboveMax
            | ErrorCode::Conflict
            | ErrorCode::InUse
            | ErrorCode::NoDriver
            | ErrorCode::GuestRefused
            | ErrorCode::Budget
            | ErrorCode::Lint
            | ErrorCode::WrongState => Self::Refused,
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
            | ErrorCode::State
            | ErrorCode::Vmm
            | ErrorCode::Internal => Self::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error answer, read leniently: a newer daemon may send codes that this program does not know,
/// and what answers on a socket may be another daemon.
#[derive(Clone, Debug, Deserialize)]
pub struct Refusal {
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
    fn new(code: ErrorCode, message: String) -> Self {
        let data = RefusalData { code: Some(code.as_str().to_owned()), ..RefusalData::default() };
        Self { code: code.rpc_code().into(), message, data }
    }

    fn known_code(&self) -> Option<ErrorCode> {
        let code = self.data.code.clone()?;
        serde_json::from_value(Value::String(code)).ok()
    }
}

/// What a command fails with, whatever it is: the shared [`Error`], or a program's own that wraps it.
pub trait Failure: std::error::Error {
    /// The stable code, `E_…`.
    fn code(&self) -> &str;

    fn exit(&self) -> Exit;

    /// What to do next, where there is something to say.
    fn hint(&self, program: &Program) -> Option<String>;

    /// What programs are told beyond code, message and hint.
    fn details(&self) -> Map<String, Value> {
        Map::new()
    }

    /// What happened, with its causes.
    fn message(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(err) = cause {
            text.push_str(": ");
            text.push_str(&err.to_string());
            cause = err.source();
        }
        text
    }

    /// The error for programs.
    fn to_json(&self, program: &Program) -> Value {
        let mut error =
            json!({"code": self.code(), "message": self.message(), "exit_code": self.exit() as u8});
        if let Some(hint) = self.hint(program) {
            error["hint"] = Value::String(hint);
        }
        for (key, value) in self.details() {
            error[key] = value;
        }
        error
    }

    /// Says it on standard error, to people or to programs.
    fn report(&self, program: &Program, json: bool) {
        if json {
            eprint_line(&envelope(program.schema, [("error", self.to_json(program))]));
        } else {
            print_error(self.code(), &self.message(), self.hint(program).as_deref());
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line is well formed but makes no sense.
    #[error("{message}")]
    Usage { message: String, hint: Option<&'static str> },
    /// The connection could not be made, or ended before the answer came.
    #[error("cannot reach the daemon at {}: {reason}", path.display())]
    Unreachable { path: PathBuf, reason: String, hint: String },
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
    /// The operator answered no.
    #[error("nothing was done")]
    Declined,
    /// Something on this host failed.
    #[error("{what}")]
    Local { what: String, source: io::Error },
}

impl Error {
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), hint: None }
    }

    /// A refusal of this program's own, in the words of the daemon.
    pub fn refused(code: ErrorCode, message: String) -> Self {
        Self::Refused(Box::new(Refusal::new(code, message)))
    }

    /// Why the socket at `path` could not be connected to.
    pub(crate) fn of_connect(program: &Program, path: &Path, source: &io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Denied { path: path.to_owned() },
            kind => Self::Unreachable {
                path: path.to_owned(),
                reason: source.to_string(),
                hint: program.connect_hint(kind),
            },
        }
    }
}

impl Failure for Error {
    fn code(&self) -> &str {
        match self {
            Self::Usage { .. } => "E_USAGE",
            Self::Unreachable { .. } => "E_UNREACHABLE",
            Self::Denied { .. } => ErrorCode::Permission.as_str(),
            Self::TimedOut { .. } => ErrorCode::TimedOut.as_str(),
            Self::Protocol(_) => "E_PROTOCOL",
            Self::Refused(refusal) => refusal.data.code.as_deref().unwrap_or("E_RPC"),
            Self::Declined => "E_DECLINED",
            Self::Local { .. } => "E_LOCAL",
        }
    }

    fn exit(&self) -> Exit {
        match self {
            Self::Usage { .. } => Exit::Usage,
            Self::Unreachable { .. } => Exit::Unreachable,
            Self::Denied { .. } => Exit::NotPermitted,
            Self::TimedOut { .. } => Exit::TimedOut,
            Self::Refused(refusal) => refusal.known_code().map_or(Exit::Failed, Exit::of_code),
            Self::Protocol(_) | Self::Declined | Self::Local { .. } => Exit::Failed,
        }
    }

    fn hint(&self, program: &Program) -> Option<String> {
        match self {
            Self::Usage { hint, .. } => hint.map(str::to_owned),
            Self::Unreachable { hint, .. } | Self::TimedOut { hint, .. } => Some(hint.clone()),
            Self::Denied { .. } => Some(program.denied_hint()),
            Self::Protocol(_) => Some(program.protocol_hint()),
            Self::Refused(refusal) => refusal.data.hint.clone(),
            Self::Declined | Self::Local { .. } => None,
        }
    }

    fn details(&self) -> Map<String, Value> {
        let mut details = Map::new();
        if let Self::Refused(refusal) = self {
            details.insert("rpc_code".to_owned(), refusal.code.into());
            if !refusal.data.detail.is_null() {
                details.insert("detail".to_owned(), refusal.data.detail.clone());
            }
        }
        details
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::LAMPCTL;

    fn refusal(text: &str) -> Error {
        Error::Refused(Box::new(serde_json::from_str(text).unwrap()))
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
            (ErrorCode::Budget, 4),
            (ErrorCode::State, 1),
            (ErrorCode::Vmm, 1),
            (ErrorCode::Lint, 4),
            (ErrorCode::WrongState, 4),
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
        assert_eq!(newer.hint(&LAMPCTL).as_deref(), Some("cool it"));
        let foreign = refusal(r#"{"code":-32601,"message":"Method not found"}"#);
        assert_eq!((foreign.code(), foreign.exit()), ("E_RPC", Exit::Failed));
    }

    #[test]
    fn connect_errors_say_what_to_do() {
        let path = Path::new("/run/lamp/control.sock");
        let of = |kind: io::ErrorKind| Error::of_connect(&LAMPCTL, path, &io::Error::from(kind));
        assert_eq!(of(io::ErrorKind::PermissionDenied).exit(), Exit::NotPermitted);
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused, io::ErrorKind::InvalidInput] {
            assert_eq!(of(kind).exit(), Exit::Unreachable);
            assert!(of(kind).hint(&LAMPCTL).is_some());
        }
    }

    #[test]
    fn programs_are_told_code_causes_hint_and_numbers() {
        let refused = refusal(
            r#"{"code":-32003,"message":"too dark","data":{"code":"E_BELOW_MIN","hint":"2 %","detail":{"min":2}}}"#,
        );
        assert_eq!(
            refused.to_json(&LAMPCTL),
            json!({
                "code": "E_BELOW_MIN", "message": "too dark", "exit_code": 4, "hint": "2 %",
                "rpc_code": -32003, "detail": {"min": 2}
            })
        );
        let local =
            Error::Local { what: "cannot read it".to_owned(), source: io::Error::other("it is gone") };
        assert_eq!(
            local.to_json(&LAMPCTL),
            json!({"code": "E_LOCAL", "message": "cannot read it: it is gone", "exit_code": 1})
        );
    }
}
