// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Why something an operator asked for failed: a stable code, a message, what to do next.

use vssd_protocol::control::ErrorCode;

use crate::definition::DefinitionError;
use crate::nvram;
use crate::record::RecordError;
use crate::vmm::VmmError;

/// The error of one call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub code: ErrorCode,
    pub message: String,
    pub hint: Option<String>,
}

impl Fault {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The message of an error with its causes.
    fn of(code: ErrorCode, error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message.push_str(": ");
            message.push_str(&error.to_string());
            cause = error.source();
        }
        Self::new(code, message)
    }
}

impl From<VmmError> for Fault {
    fn from(error: VmmError) -> Self {
        let code = match &error {
            VmmError::State { .. } => ErrorCode::State,
            VmmError::Silent { .. } => ErrorCode::TimedOut,
            _ => ErrorCode::Vmm,
        };
        Self::of(code, &error).hint("`vm-host logs NAME` shows what the hypervisor said")
    }
}

impl From<nvram::Error> for Fault {
    fn from(error: nvram::Error) -> Self {
        use nvram::Error;
        let code = match &error {
            Error::NoSpace { .. } | Error::OverQuota { .. } => ErrorCode::PoolFull,
            Error::NotFound { .. } => ErrorCode::NotFound,
            Error::Invalid { .. } => ErrorCode::InvalidParams,
            Error::Locked { .. } => ErrorCode::Busy,
            _ => ErrorCode::Media,
        };
        let fault = Self::of(code, &error);
        match error.hint() {
            Some(hint) => fault.hint(hint),
            None => fault,
        }
    }
}

impl From<RecordError> for Fault {
    fn from(error: RecordError) -> Self {
        Self::of(ErrorCode::Media, &error)
            .hint("see to the file system of state_dir; nothing was overwritten")
    }
}

impl From<DefinitionError> for Fault {
    fn from(error: DefinitionError) -> Self {
        Self::of(ErrorCode::InvalidParams, &error)
    }
}
