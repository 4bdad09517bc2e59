// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Why no more blocks go.

/// Why no more blocks go, as the host is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Nothing,
    Busy,
    Policy,
    Error,
}

impl Why {
    /// The driver's word for it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Busy => "busy",
            Self::Policy => "policy",
            Self::Error => "error",
        }
    }
}
