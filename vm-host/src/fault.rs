// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Why something an operator asked for failed, in the words of the control channel.

pub use control_server::Fault;
use vssd_protocol::control::ErrorCode;

use crate::definition::DefinitionError;
use crate::nvram;
use crate::record::RecordError;
use crate::vmm::VmmError;

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
        let fault = Self::of(ErrorCode::InvalidParams, &error);
        match error {
            DefinitionError::Unsupported { hint, .. } => fault.hint(hint),
            DefinitionError::Syntax(_) | DefinitionError::Value { .. } => fault,
        }
    }
}
