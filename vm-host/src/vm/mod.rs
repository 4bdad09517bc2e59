// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One VM: a thread that owns its machine, its record and its regions, and carries out one order after the other.
//!
//! ```text
//!   host ── Order ──► mailbox ──► Keeper ──► machine, record, slot
//!    ▲                               │
//!    └──── answer, Status, events ───┘
//! ```
//!
//! Nothing is shared between two VMs that one could hold and the other need: a guest whose disk hangs keeps no other from being
//! saved. Whether a VM *may* run (budget, power) is the host's to say. Of power this module knows one word, [`Shared::held_back`]: a
//! keeper looks at it last thing before a guest runs. The host sets it before it tells every VM to hold, so whichever came first, a
//! guest that was let run has that order behind it.

mod clock;
mod console;
#[doc(hidden)]
pub mod fuzzing;
mod keeper;
mod log;
mod save;
mod status;
mod swap;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use vssd_protocol::control::ErrorCode;

use crate::definition::Definition;
use crate::fault::Fault;
use crate::nvram::{MediumConfig, Nvram};
use crate::record::{Record, Records};
use crate::vmm::{News, Places};
use keeper::Keeper;
pub use status::{LastSave, Status, VmState, Work};

/// A medium that the configuration names.
#[derive(Debug)]
pub struct Medium {
    pub config: MediumConfig,
    /// Open, or why it is not.
    pub nvram: Result<Arc<Nvram>, Fault>,
}

/// What all VMs of a host use.
#[derive(Debug)]
pub struct Shared {
    pub records: Records,
    pub media: Vec<Medium>,
    /// Sockets and logs, a folder for each VM.
    pub runtime_dir: PathBuf,
    pub log_dir: PathBuf,
    /// Where vssd-backend serves a socket for each vSSD.
    pub vssd_dir: PathBuf,
    /// The folder for what is swapped out.
    pub swap_dir: PathBuf,
    pub teller: Arc<dyn Tell>,
    /// The power is failing: no guest begins to run, and long work is broken off.
    pub held_back: AtomicBool,
}

impl Shared {
    /// The medium of this name, if it is open.
    pub fn medium(&self, name: &str) -> Result<&Arc<Nvram>, Fault> {
        let Some(medium) = self.media.iter().find(|medium| medium.config.name == name) else {
            return Err(Fault::new(ErrorCode::NotFound, format!("there is no NV-RAM {name:?}"))
                .hint("`vm-host nvram list` shows those that there are"));
        };
        medium.nvram.as_ref().map_err(Clone::clone)
    }

    /// Why a guest does not begin to run now.
    fn may_run(&self, name: &str) -> Result<(), Fault> {
        if !self.held_back.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(Fault::new(ErrorCode::Busy, format!("{name} is left as it is: the power is failing"))
            .hint("`vm-host power status` says how it is; what was saved resumes by itself when it is back"))
    }

    /// Where what a guest says on its console is written down.
    fn console_log(&self, name: &str) -> PathBuf {
        self.log_dir.join(format!("{name}.console"))
    }

    fn places(&self, name: &str) -> Places {
        let dir = self.runtime_dir.join(name);
        Places {
            control: dir.join("control.sock"),
            work: dir.join("work"),
            guest_agent: dir.join("agent.sock"),
            log: self.log_dir.join(format!("{name}.log")),
            console: dir.join("console.sock"),
            vssds: self.vssd_dir.clone(),
        }
    }
}

/// Takes news of VMs.
pub trait Tell: fmt::Debug + Send + Sync {
    fn tell(&self, vm: &str, news: VmNews);

    /// Makes what a VM's vSSDs have acknowledged durable. Called with the guest stopped.
    fn sync_vssds(&self, definition: &Definition) -> Result<(), Fault>;
}

/// What happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmNews {
    State { from: VmState, to: VmState, why: String },
    Guest(News),
}

/// What a VM may be asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Boot it.
    Start,
    /// The power button, and the plug after `grace`.
    Stop {
        grace: Duration,
    },
    /// Save it and end its machine.
    Save,
    /// Save it and keep its machine, stopped: the power may come back. Of a VM without a guest nothing is asked.
    Hold,
    /// Continue it where it was: from its machine, or from its saved state.
    Resume,
    /// As after a start of the daemon: adopt a machine that is there, resume what was saved if it is wanted and may be.
    Recover,
    /// To secondary storage.
    SwapOut,
    SwapIn,
    /// Take what a crash left of its guest away: memory is kept until here.
    Discard,
    /// Remove it and all that is its.
    Undefine,
}

/// What is on its way to a VM.
#[derive(Debug)]
pub(crate) enum Letter {
    Order(Order, Sender<Answer>),
    Redefine(Box<Definition>, Sender<Answer>),
    /// The daemon ends; the machine stays.
    Leave,
}

/// The end of an order.
pub type Answer = Result<Status, Fault>;

/// A VM, as the host holds it.
#[derive(Debug)]
pub struct Vm {
    name: String,
    letters: Sender<Letter>,
    wake: Arc<OwnedFd>,
    status: Arc<Mutex<Status>>,
    definition: Mutex<Definition>,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    /// Takes care of the VM of a record. Its machine is not looked at before [`Order::Recover`].
    pub fn new(record: Record, shared: Arc<Shared>) -> io::Result<Self> {
        let name = record.definition.name.clone();
        let (letters, inbox) = mpsc::channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let status = Arc::new(Mutex::new(Status::new(&record)));
        let definition = Mutex::new(record.definition.clone());
        let keeper = Keeper::new(record, shared, Arc::clone(&status));
        let bell = Arc::clone(&wake);
        let thread = thread::Builder::new()
            .name(format!("vm {name}").chars().take(15).collect())
            .spawn(move || keeper.run(&inbox, &bell))?;
        Ok(Self { name, letters, wake, status, definition, thread: Some(thread) })
    }

    /// How it is now; never waits for the VM.
    pub fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Its definition, as it was last read or written.
    pub fn definition(&self) -> Definition {
        self.definition.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives an order; its end comes through `answers`.
    pub fn send_order(&self, order: Order, answers: Sender<Answer>) {
        self.send(Letter::Order(order, answers));
    }

    /// Gives an order and waits for its end.
    pub fn call(&self, order: Order) -> Answer {
        let (sender, receiver) = mpsc::channel();
        self.send_order(order, sender);
        self.await_answer(&receiver)
    }

    pub fn redefine(&self, definition: Definition) -> Answer {
        let (sender, receiver) = mpsc::channel();
        self.send(Letter::Redefine(Box::new(definition.clone()), sender));
        let status = self.await_answer(&receiver)?;
        *self.definition.lock().unwrap_or_else(PoisonError::into_inner) = definition;
        Ok(status)
    }

    fn await_answer(&self, receiver: &Receiver<Answer>) -> Answer {
        receiver.recv().unwrap_or_else(|_| {
            Err(Fault::new(ErrorCode::NotFound, format!("{} is being taken care of no longer", self.name)))
        })
    }

    fn send(&self, letter: Letter) {
        // A keeper that has ended drops the letter, and its sender learns that from the channel.
        let _ = self.letters.send(letter);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.send(Letter::Leave);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
