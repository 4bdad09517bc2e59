// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Why an operator's call failed: a stable code, a message, what to do next, the numbers behind it.

use std::error::Error;

use serde_json::Value;
use vssd_protocol::control::{ErrorCode, ErrorData, RpcError};

/// The error of one call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
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

    /// The message of an error with its causes.
    pub fn of(code: ErrorCode, error: &dyn Error) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message.push_str(": ");
            message.push_str(&error.to_string());
            cause = error.source();
        }
        Self::new(code, message)
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

    pub fn into_rpc(self) -> RpcError {
        let data = ErrorData { code: self.code, hint: self.hint, detail: self.detail };
        RpcError { code: self.code.rpc_code(), message: self.message, data }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot light {lamp}")]
    struct Dark {
        lamp: &'static str,
        source: io::Error,
    }

    #[test]
    fn message_has_all_causes_once() {
        let dark = Dark { lamp: "one", source: io::Error::other("no bulb") };
        let fault = Fault::of(ErrorCode::Media, &dark);
        assert_eq!((fault.message.as_str(), fault.code), ("cannot light one: no bulb", ErrorCode::Media));
    }

    #[test]
    fn operators_are_told_code_hint_and_numbers() {
        let fault = Fault::new(ErrorCode::Busy, "m").hint("h").detail(serde_json::json!({ "n": 1 }));
        let rpc = serde_json::to_value(fault.into_rpc()).unwrap();
        let data = serde_json::json!({ "code": "E_BUSY", "hint": "h", "detail": { "n": 1 } });
        assert_eq!(rpc, serde_json::json!({ "code": -32013, "message": "m", "data": data }));
        let bare = serde_json::to_value(Fault::new(ErrorCode::Busy, "m").into_rpc()).unwrap();
        assert_eq!(bare["data"], serde_json::json!({ "code": "E_BUSY" }));
    }
}
