// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the pool and the negotiation refuse, in the words of the control channel.

pub use control_server::Fault;
use serde_json::json;
use vssd_protocol::control::ErrorCode;
use vssd_protocol::units::ByteCount;

use super::negotiation::Refusal;

pub fn pool_full(requested_bytes: u64, available_bytes: u64) -> Fault {
    let message = format!(
        "the pool can promise {} more, {} more are needed",
        ByteCount(available_bytes),
        ByteCount(requested_bytes)
    );
    Fault::new(ErrorCode::PoolFull, message)
        .hint("balloon-ctl pool status shows who holds what; shrink or delete a vSSD first")
        .detail(json!({ "requested_bytes": requested_bytes, "available_bytes": available_bytes }))
}

/// What the pool said, in the words of the control channel.
pub fn of_pool(error: &vssd_pool::Error, block_bytes: u64) -> Fault {
    use vssd_pool::Error;
    let code = match error {
        Error::PoolFull { requested_blocks, available_blocks } => {
            return pool_full(
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
    let fault = Fault::new(code, error.to_string());
    match error.hint() {
        Some(hint) => fault.hint(hint),
        None => fault,
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
