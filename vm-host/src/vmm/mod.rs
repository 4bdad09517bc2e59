// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the host asks of a hypervisor, whichever it is: a machine that starts stopped, can be stopped and continued, and whose
//! state without its memory can be taken out and put in. [`of`] is the one place that knows which hypervisors there are.
//!
//! Knows neither NV-RAM nor power, and does not decide when a guest may run.
//!
//! ```text
//!              launch(Boot)                resume
//!   definition ─────────────► stopped ◄──────────────► running
//!        plan                   ▲  │ save: bytes          │ pause
//!                 load(bytes)   │  ▼                      ▼
//!              launch(Restore) ─┘  kill                 stopped
//! ```

pub mod cloud_hypervisor;
pub mod process;
mod program;
pub mod qemu;

use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fd::BorrowedFd;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::definition::{Definition, DefinitionError, Hypervisor};
use cloud_hypervisor::CloudHypervisor;
use process::{Process, ProcessId};
use qemu::Qemu;

/// How to use a hypervisor.
pub fn of(hypervisor: Hypervisor) -> &'static dyn Vmm {
    match hypervisor {
        Hypervisor::Qemu => &Qemu,
        Hypervisor::CloudHypervisor => &CloudHypervisor,
    }
}

/// Reads a definition, and looks whether its hypervisor can make it.
pub fn read_definition(text: &str) -> Result<Definition, DefinitionError> {
    let definition = Definition::parse(text)?;
    of(definition.hypervisor).check(&definition)?;
    Ok(definition)
}

/// What a machine is made from, once and for all: a restored machine has the same, byte for byte, for its state fits no other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    #[serde(default)]
    pub hypervisor: Hypervisor,
    pub program: PathBuf,
    /// Without what connects it to this daemon, and without its memory, which may lie elsewhere the next time.
    pub args: Vec<String>,
    /// What it is told when it runs, where that is how it learns what to make; without its memory, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Value>,
    /// What the hypervisor calls the kind of machine, with its version: `pc-q35-7.2`.
    pub machine: String,
    /// The hypervisor's own version, for people: a state is only read by the same or a newer one.
    pub version: String,
}

/// Where a guest's memory lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Memory {
    /// In this host's ordinary memory, gone with the machine.
    Ordinary { bytes: u64 },
    /// In a file or device that has a name, and stays.
    Named {
        path: PathBuf,
        offset: u64,
        bytes: u64,
        /// What mappings must be aligned to, where the hypervisor does not find out itself.
        align: Option<u64>,
        /// Synchronous mappings of persistent memory (MAP_SYNC).
        pmem: bool,
    },
}

/// Where a machine puts what it needs while it runs, and finds what it uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// The socket over which it is controlled.
    pub control: PathBuf,
    /// A folder for what else connects it to the daemon, and for what passes between them. In memory.
    pub work: PathBuf,
    /// What it says on its standard output and error.
    pub log: PathBuf,
    /// The socket of the guest's serial port.
    pub console: PathBuf,
    /// The socket of the guest's own agent.
    pub guest_agent: PathBuf,
    /// The folder with a socket for each vSSD, `<name>.sock`.
    pub vssds: PathBuf,
}

/// How a machine begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// From its firmware or kernel.
    Boot,
    /// Waiting for a state: [`Machine::load`] is next.
    Restore,
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Its processors run.
    Running,
    /// They do not, and can.
    Stopped,
    /// It waits for a state.
    AwaitsState,
    /// The guest has turned itself off.
    Off,
    /// It has panicked, or met an I/O error that stops it.
    Halted,
}

/// What a machine says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// The guest has restarted.
    Reset,
    /// The guest has turned itself off.
    Shutdown,
    Panicked,
    /// A disk does not answer as it should.
    DiskError(String),
}

/// Why a hypervisor did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    #[error("cannot start {}", program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("the hypervisor has ended: {said}")]
    Ended { said: String },
    #[error("the hypervisor does not answer {command} within {} ms", limit.as_millis())]
    Silent { command: &'static str, limit: Duration },
    #[error("the hypervisor refuses {command}: {reason}")]
    Refused { command: &'static str, reason: String },
    #[error("the hypervisor says what makes no sense: {0}")]
    Protocol(String),
    #[error("the connection to the hypervisor failed: {doing}")]
    Connection { doing: &'static str, source: io::Error },
    #[error("the state of the machine cannot be {doing}: {reason}")]
    State { doing: &'static str, reason: String },
    #[error("process {pid} is not the machine that this daemon started")]
    Stranger { pid: u32 },
}

/// A kind of hypervisor.
pub trait Vmm: Debug + Send + Sync {
    /// What of a definition it cannot make is an error, with what to do about it.
    fn check(&self, definition: &Definition) -> Result<(), DefinitionError>;

    /// Whether it can use memory that begins inside a file or device.
    fn can_use_part_of_file(&self) -> bool;

    /// What a definition becomes. Nothing is started.
    fn plan(&self, definition: &Definition, places: &Places) -> Result<Launch, VmmError>;

    /// Starts a machine; its processors do not run yet.
    fn launch(
        &self,
        launch: &Launch,
        memory: &Memory,
        begin: Begin,
        places: &Places,
    ) -> Result<Box<dyn Machine>, VmmError>;

    /// Finds a machine that an earlier daemon started.
    fn adopt(&self, id: &ProcessId, places: &Places) -> Result<Option<Box<dyn Machine>>, VmmError>;

    /// Ends a machine that an earlier daemon launched and did not live to note. Its guest has never run.
    fn end_orphan(&self, places: &Places) -> Result<(), VmmError>;
}

/// A machine that exists.
pub trait Machine: Debug + Send {
    fn process(&self) -> &Process;

    /// Of the hypervisor that runs it.
    fn version(&self) -> &str;

    /// Readable when [`Machine::news`] may have something.
    fn control(&self) -> BorrowedFd<'_>;

    /// What it has said since the last call; never waits.
    fn news(&mut self) -> Result<Vec<News>, VmmError>;

    fn run_state(&mut self) -> Result<RunState, VmmError>;

    /// Stops its processors and waits for what its disks have under way.
    fn pause(&mut self) -> Result<(), VmmError>;

    /// Lets its processors run (again).
    fn resume(&mut self) -> Result<(), VmmError>;

    /// The state of a stopped machine's processors and devices, without its memory. It can be resumed afterwards.
    fn save(&mut self) -> Result<Vec<u8>, VmmError>;

    /// Gives a state to a machine that awaits one; it is stopped afterwards.
    fn load(&mut self, state: &[u8]) -> Result<(), VmmError>;

    /// Asks the guest to turn itself off.
    fn power_button(&mut self) -> Result<(), VmmError>;

    /// Ends it at once, as if its power had gone, and waits until it has ended.
    fn kill(&mut self) -> Result<(), VmmError>;
}
