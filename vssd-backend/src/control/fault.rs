// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Why an operator's call failed: a stable code, a message, what to do next, the numbers behind it.

use serde_json::{Value, json};
use vssd_protocol::control::{ErrorCode, ErrorData, RpcError};
use vssd_protocol::units::ByteCount;

use super::negotiation::Refusal;

/// The error of one call.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub code: ErrorCode,
    pub message: String,
    pub hint: Option<String>,
    pub detail: Value,
}

impl Fault {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, detail: Value::Null }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn detail(mut self, detail: Value) -> Self {
        self.detail = detail;
        self
    }

    pub fn pool_full(requested_bytes: u64, available_bytes: u64) -> Self {
        let message = format!(
            "the pool can promise {} more, {} more are needed",
            ByteCount(available_bytes),
            ByteCount(requested_bytes)
        );
        Self::new(ErrorCode::PoolFull, message)
            .hint("balloon-ctl pool status shows who holds what; shrink or delete a vSSD first")
            .detail(json!({ "requested_bytes": requested_bytes, "available_bytes": available_bytes }))
    }

    /// What the pool said, in the words of the control channel.
    pub fn of_pool(error: &vssd_pool::Error, block_bytes: u64) -> Self {
        use vssd_pool::Error;
        let code = match error {
            Error::PoolFull { requested_blocks, available_blocks } => {
                return Self::pool_full(
                    requested_blocks.saturating_mul(block_bytes),
                    available_blocks.saturating_mul(block_bytes),
                );
            }
            Error::NotFound { .. } => ErrorCode::NotFound,
            Error::Exists { .. } => ErrorCode::Exists,
            Error::Invalid { .. } => ErrorCode::InvalidParams,
            Error::Locked { .. } | Error::Busy { .. } => ErrorCode::Busy,
            Error::ReadOnly => ErrorCode::Permission,
            Error::Damaged { .. } | Error::Medium { .. } | Error::Io { .. } => ErrorCode::Media,
        };
        let fault = Self::new(code, error.to_string());
        match error.hint() {
            Some(hint) => fault.hint(hint),
            None => fault,
        }
    }

    pub fn into_rpc(self) -> RpcError {
        let data = ErrorData { code: self.code, hint: self.hint, detail: self.detail };
        RpcError { code: self.code.rpc_code(), message: self.message, data }
    }
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        let detail = match refusal {
            Refusal::BelowMin { requested_bytes, min_bytes } => {
                json!({ "requested_bytes": requested_bytes, "min_bytes": min_bytes })
            }
            Refusal::AboveMax { requested_bytes, max_bytes } => {
                json!({ "requested_bytes": requested_bytes, "max_bytes": max_bytes })
            }
            Refusal::Conflict { expected_bytes, actual_bytes } => {
                json!({ "expected_bytes": expected_bytes, "actual_bytes": actual_bytes })
            }
            Refusal::InUse { requested_bytes, smallest_bytes, last_allocated_bytes } => json!({
                "requested_bytes": requested_bytes,
                "smallest_bytes": smallest_bytes,
                "last_allocated_bytes": last_allocated_bytes,
            }),
        };
        Self::new(refusal.code(), refusal.to_string()).hint(refusal.hint()).detail(detail)
    }
}
