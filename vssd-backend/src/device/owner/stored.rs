// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the control side keeps with a vSSD in the pool, so that a restart of the daemon forgets nothing an operator
//! said: the policy, the deadline of a resize that is under way, and the soft size.

use serde::{Deserialize, Serialize};
use vssd_protocol::control::{OnTimeout, Policy};

/// A resize whose deadline passed while nobody served the guest gets this long after all: time for its front-end to
/// come back and for its driver to hear of it.
const LEAST_LEFT_MS: u64 = 10_000;

/// Kept as JSON in the vSSD's attributes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stored {
    pub(super) policy: Policy,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) deadline: Option<Deadline>,
    /// How many blocks the guest is asked to use at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) soft: Option<u32>,
}

/// Until when a resize has time, on the wall clock: the daemon's own clock ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Deadline {
    pub(super) unix_ms: u64,
    pub(super) on_timeout: OnTimeout,
}

impl Stored {
    pub(super) fn policy(policy: Policy) -> Self {
        Self { policy, deadline: None, soft: None }
    }

    /// Nothing stored is the default.
    pub(super) fn decode(text: &str) -> serde_json::Result<Self> {
        if text.is_empty() { Ok(Self::default()) } else { serde_json::from_str(text) }
    }

    pub(super) fn encode(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }
}

impl Deadline {
    pub(super) fn left_ms(self, unix_now_ms: u64) -> u64 {
        self.unix_ms.saturating_sub(unix_now_ms).max(LEAST_LEFT_MS)
    }
}

#[cfg(test)]
mod tests {
    use vssd_protocol::control::PullPolicy;

    use super::*;

    #[test]
    fn what_is_stored_is_found_again_and_fits_the_pools_limit() {
        let stored = Stored {
            policy: Policy { on_timeout: OnTimeout::Force, deadline_ms: u64::MAX, pull: PullPolicy::Notify },
            deadline: Some(Deadline { unix_ms: u64::MAX, on_timeout: OnTimeout::Force }),
            soft: Some(u32::MAX),
        };
        let text = stored.encode().unwrap();
        assert!(text.len() <= 256, "{} bytes", text.len());
        assert_eq!(Stored::decode(&text).unwrap(), stored);
        assert_eq!(Stored::decode("").unwrap(), Stored::default());
        assert!(Stored::decode("{}").is_err() && Stored::decode("x").is_err());
    }

    #[test]
    fn a_deadline_that_passed_meanwhile_leaves_time_to_come_back() {
        let deadline = Deadline { unix_ms: 100_000, on_timeout: OnTimeout::Fail };
        assert_eq!(deadline.left_ms(30_000), 70_000);
        assert_eq!(deadline.left_ms(200_000), LEAST_LEFT_MS);
    }
}
