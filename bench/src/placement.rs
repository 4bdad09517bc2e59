// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which processor the client runs on and which the backend.
//!
//! With sleeping clients the placement decides the result more than the backend does: a wake-up across processors costs tens
//! of microseconds where the other one has gone idle. So it is always set, and always stated.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;

/// A processor by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Cpu(pub usize);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Client and backend on a processor each.
    Split,
    /// Both on one.
    Same,
}

impl Placement {
    pub fn name(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::Same => "same",
        }
    }
}

/// The two processors that measurements use.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Cpus {
    first: Cpu,
    second: Cpu,
}

impl Cpus {
    /// The first two that this process may use.
    pub fn choose() -> Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).map(Cpu);
        match (cpus.next(), cpus.next()) {
            (Some(first), Some(second)) => Ok(Self { first, second }),
            _ => bail!("the measurements need two processors"),
        }
    }

    pub fn backend(self) -> Cpu {
        self.second
    }

    pub fn client(self, placement: Placement) -> Cpu {
        match placement {
            Placement::Split => self.first,
            Placement::Same => self.second,
        }
    }
}

fn set(cpu: Cpu) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu.0);
    set
}

/// Binds the calling thread.
pub fn pin_thread(cpu: Cpu) -> Result<()> {
    Ok(sched_setaffinity(None, &set(cpu))?)
}

/// Binds a program that is to be started, with all threads it will make.
pub fn pin_command(command: &mut Command, cpu: Cpu) {
    let set = set(cpu);
    // SAFETY: between fork and exec the closure makes one system call on a value it owns: it allocates nothing and takes no
    // lock.
    unsafe {
        command.pre_exec(move || sched_setaffinity(None, &set).map_err(Into::into));
    }
}
