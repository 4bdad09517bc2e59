// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How a VM is, for those who ask.

use serde::{Deserialize, Serialize};
use vssd_protocol::control::ErrorCode;

use crate::fault::Fault;
use crate::power::budget::Steps;
use crate::record::{Incarnation, Life, Record, Wanted};

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// It has no guest.
    Stopped,
    Running,
    /// The guest does not run, and nothing is saved: an operator or an error of a disk stopped it.
    Paused,
    /// The guest's memory and a state of it are durable.
    Saved,
    /// On secondary storage.
    SwappedOut,
    /// It had a guest, of which only the memory is left: the power went before it was saved, or its hypervisor crashed.
    Lost,
    /// Its saved state or its memory cannot be used; both are kept.
    Broken,
}

/// Work that takes a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// `swapping out`
    pub doing: String,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// The last save, step by step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastSave {
    pub unix_ms: i64,
    pub state_bytes: u64,
    #[serde(flatten)]
    pub steps: Steps,
}

/// How a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub name: String,
    pub state: VmState,
    pub wanted: Wanted,
    /// What became of it last, for people.
    pub why: String,
    pub memory_bytes: u64,
    pub cpus: u16,
    /// The medium of its memory; none for an ordinary VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<String>,
    pub priority: u8,
    pub vssds: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Incarnation>,
    /// Of its hypervisor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_save: Option<LastSave>,
    /// Microseconds from the order to the running guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_restore_us: Option<u64>,
    /// The worst of all its saves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worst: Option<Steps>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<Work>,
    /// Of a VM that is lost or broken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorCode>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Status {
    pub(super) fn new(record: &Record) -> Self {
        let definition = &record.definition;
        Self {
            name: definition.name.clone(),
            state: if matches!(record.life, Life::SwappedOut { .. }) {
                VmState::SwappedOut
            } else {
                VmState::Stopped
            },
            wanted: record.wanted,
            why: String::new(),
            memory_bytes: definition.memory.0,
            cpus: definition.cpus,
            nvram: definition.nvram.clone(),
            priority: definition.priority,
            vssds: definition.vssd.iter().map(|vssd| vssd.name.clone()).collect(),
            machine: None,
            incarnation: record.life.incarnation(),
            pid: None,
            last_save: None,
            last_restore_us: None,
            worst: record.worst,
            work: None,
            error: None,
            hint: None,
        }
    }

    /// The parts that follow the record.
    pub(super) fn follow(&mut self, record: &Record) {
        let new = Self::new(record);
        self.wanted = new.wanted;
        self.memory_bytes = new.memory_bytes;
        self.cpus = new.cpus;
        self.nvram = new.nvram;
        self.priority = new.priority;
        self.vssds = new.vssds;
        self.incarnation = new.incarnation;
        self.worst = new.worst;
        (self.machine, self.pid) = match &record.life {
            Life::Live { launch, process, .. } => {
                (Some(launch.machine.clone()), process.as_ref().map(|process| process.pid))
            }
            Life::SwappedOut { launch, .. } => (Some(launch.machine.clone()), None),
            Life::Stopped => (None, None),
        };
    }

    pub(super) fn blame(&mut self, fault: Option<&Fault>) {
        self.error = fault.map(|fault| fault.code);
        self.hint = fault.and_then(|fault| fault.hint.clone());
    }
}
