// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a source of power events can say: the vocabulary between [`super::sources`], which know how to hear it, and
//! [`super::state`], which knows what follows from it.

use std::fmt;

use serde::Serialize;

/// A source: its place in the configuration, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct SourceId(pub u16);

impl SourceId {
    /// The operator's test trigger, which is always there.
    pub const TEST: Self = Self(u16::MAX);
}

impl fmt::Display for SourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::TEST { f.write_str("test") } else { write!(f, "source {}", self.0) }
    }
}

/// What a source's word is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// A supply of this machine: one of those that the policy counts.
    Supply,
    /// The host itself, which says that it is about to be shut down.
    Host,
}

/// One thing that a source said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    pub source: SourceId,
    pub kind: Kind,
}

/// What is the case at a source. Levels, not edges: saying the same thing twice changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Kind {
    /// There is mains power.
    Online,
    /// The supply lives on what it has stored.
    OnBattery {
        /// How long that lasts, where the supply can say.
        #[serde(skip_serializing_if = "Option::is_none")]
        runtime_left_ms: Option<u64>,
    },
    /// What is stored is about to end.
    LowBattery,
    /// The supply is going to be switched off, whatever it still holds.
    ForcedShutdown,
    /// The power-good line has fallen: what is left is in the capacitors.
    PowerFailing,
    /// The host is about to shut down.
    ShutdownPlanned {
        /// For how long it waits for us.
        #[serde(skip_serializing_if = "Option::is_none")]
        within_ms: Option<u64>,
    },
    /// It is not going to, after all.
    ShutdownCancelled,
    /// The source cannot be heard.
    Lost,
    /// There is no such source on this machine.
    NotAvailable,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Online => f.write_str("online"),
            Self::OnBattery { runtime_left_ms: None } => f.write_str("on battery"),
            Self::OnBattery { runtime_left_ms: Some(ms) } => write!(f, "on battery, {} s left", ms / 1000),
            Self::LowBattery => f.write_str("low battery"),
            Self::ForcedShutdown => f.write_str("forced shutdown"),
            Self::PowerFailing => f.write_str("power failing"),
            Self::ShutdownPlanned { .. } => f.write_str("shutdown planned"),
            Self::ShutdownCancelled => f.write_str("shutdown cancelled"),
            Self::Lost => f.write_str("lost"),
            Self::NotAvailable => f.write_str("not available"),
        }
    }
}
