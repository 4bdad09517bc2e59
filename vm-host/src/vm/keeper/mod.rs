// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The thread of one VM: orders in, one after the other; in between it watches the machine.
//!
//! ```text
//!             Start                    Save, Hold              SwapOut
//!   stopped ─────────► running ◄─────────────────────► saved ◄─────────► swapped-out
//!      ▲  ▲              │   │         Resume           │  ▲    SwapIn
//!      │  └── Stop, off ─┘   │ the power or the         │  └─ Hold ── paused ◄─ a disk's error, a failed save
//!      │                     ▼ hypervisor goes          │ it cannot be used
//!      └───── Discard ───── lost        broken ◄────────┘
//! ```

mod recovery;

use std::fs;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use control_client::word;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use tracing::{error, info, warn};
use vssd_protocol::control::ErrorCode;

use super::console::Console;
use super::log::Log;
use super::save::{Found, Kept};
use super::status::{Status, VmState, Work};
use super::{Answer, Letter, Order, Shared, VmNews, clock, swap};
use crate::definition::Definition;
use crate::fault::Fault;
use crate::nvram::{Nvram, SavedState};
use crate::record::{Incarnation, Life, Record, Wanted};
use crate::vmm::{self, Begin, Launch, Machine, Memory, Places, RunState, Vmm, VmmError, process};

/// How often those who watch long work see it.
const SHOWN_EVERY: Duration = Duration::from_millis(100);
/// A guest's agent that does not answer must not keep a thread for ever; one whose guest was just restored, beside many others, is slow.
const AGENT_LIMIT: Duration = Duration::from_secs(30);

/// States of a VM whose guest can be saved, or continued.
const WITH_GUEST: [VmState; 3] = [VmState::Running, VmState::Paused, VmState::Saved];

/// A machine that was killed.
const END: Duration = Duration::from_secs(10);

const OFF: &str = "the guest turned itself off";
const HALTED: &str = "the guest has panicked, or a disk failed";

type Done = Result<(), Fault>;

/// Takes care of one VM.
#[derive(Debug)]
pub(super) struct Keeper {
    shared: Arc<Shared>,
    record: Record,
    places: Places,
    machine: Option<Box<dyn Machine>>,
    console: Option<Console>,
    log: Option<Log>,
    kept: Option<Kept>,
    status: Arc<Mutex<Status>>,
}

impl Keeper {
    pub(super) fn new(record: Record, shared: Arc<Shared>, status: Arc<Mutex<Status>>) -> Self {
        let places = shared.places(&record.definition.name);
        Self { shared, record, places, machine: None, console: None, log: None, kept: None, status }
    }

    /// Until it is told to leave, or the VM is no more.
    pub(super) fn run(mut self, inbox: &Receiver<Letter>, bell: &OwnedFd) {
        loop {
            self.wait(Some(bell), None);
            let _ = rustix::io::read(bell, &mut [0; 8]);
            loop {
                match inbox.try_recv() {
                    Ok(Letter::Order(order, sender)) => {
                        let done = self.carry_out(order);
                        if self.conclude(done, &sender) && order == Order::Undefine {
                            return;
                        }
                    }
                    Ok(Letter::Redefine(definition, sender)) => {
                        let done = self.redefine(*definition);
                        self.conclude(done, &sender);
                    }
                    Ok(Letter::Leave) | Err(TryRecvError::Disconnected) => return,
                    Err(TryRecvError::Empty) => break,
                }
            }
            self.look_at_machine();
        }
    }

    /// Answers; true if all went well.
    fn conclude(&self, done: Done, sender: &Sender<Answer>) -> bool {
        let answer = done.map(|()| self.status());
        let went_well = answer.is_ok();
        // Nobody may be waiting any more.
        let _ = sender.send(answer);
        went_well
    }

    /// Until the bell rings for an order, or the machine has something to say or ends, or `limit` has passed.
    fn wait(&self, bell: Option<&OwnedFd>, limit: Option<Duration>) {
        let mut fds: Vec<PollFd<'_>> =
            bell.map(|bell| PollFd::new(bell, PollFlags::IN)).into_iter().collect();
        if let Some(machine) = &self.machine {
            fds.push(PollFd::from_borrowed_fd(machine.control(), PollFlags::IN));
            fds.push(PollFd::from_borrowed_fd(machine.process().ended(), PollFlags::IN));
        }
        if let Some(log) = &self.log {
            fds.push(PollFd::from_borrowed_fd(log.changed(), PollFlags::IN));
        }
        if let Some(console) = &self.console {
            fds.push(PollFd::from_borrowed_fd(console.fd(), PollFlags::IN));
        }
        let timeout = limit.and_then(|limit| Timespec::try_from(limit).ok());
        // What failed is tried again; an error that stays would be one of these descriptors, of which none is ever closed early.
        let _ = poll(&mut fds, timeout.as_ref());
    }

    fn carry_out(&mut self, order: Order) -> Done {
        let done = match order {
            Order::Start => self.start(),
            Order::Stop { grace } => self.stop(grace),
            Order::Save => self.save(),
            Order::Hold if !WITH_GUEST.contains(&self.state()) => Ok(()),
            Order::Hold => self.hold(),
            Order::Resume => self.resume(),
            Order::Recover => self.recover(),
            Order::SwapOut => self.swap_out(),
            Order::SwapIn => self.swap_in(),
            Order::Discard => self.discard(),
            Order::Undefine => self.undefine(),
        };
        self.with_status(|status| status.work = None);
        if let Err(fault) = &done {
            warn!(vm = self.name(), ?order, code = fault.code.as_str(), "{fault}");
        }
        done
    }

    // ---- orders ----

    fn start(&mut self) -> Done {
        self.require("start", &[VmState::Stopped])?;
        self.shared.may_run(self.name())?;
        self.kept = match self.medium()? {
            None => None,
            Some(nvram) => Some(self.make_regions(&nvram)?),
        };
        let launch = self.vmm().plan(&self.record.definition, &self.places)?;
        self.launch(&launch, Begin::Boot)?;
        if let Err(fault) = self.go(launch, "started") {
            self.end_machine();
            self.settle(Life::Stopped, Wanted::Stopped)?;
            self.enter(VmState::Stopped, &fault.message);
            return Err(fault);
        }
        Ok(())
    }

    /// Turns the guest off, and its machine.
    fn stop(&mut self, grace: Duration) -> Done {
        self.require("stop", &[VmState::Running, VmState::Paused])?;
        let until = Instant::now() + grace;
        let runs = self.state() == VmState::Running;
        if let Some(machine) = &mut self.machine
            && runs
            && !grace.is_zero()
        {
            machine.power_button()?;
            while self.state() == VmState::Running {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                self.wait(None, Some(left));
                self.look_at_machine();
            }
        }
        self.put_away("stopped")
    }

    /// The guest has come to its end. In this order: a machine that is left over is ended at the next start of the daemon.
    fn put_away(&mut self, why: &str) -> Done {
        self.settle(Life::Stopped, Wanted::Stopped)?;
        self.end_machine();
        self.enter(VmState::Stopped, why);
        Ok(())
    }

    /// Saves the guest and ends its machine.
    fn save(&mut self) -> Done {
        self.hold()?;
        let life = self.record.life.clone();
        self.settle(life, Wanted::Saved)?;
        self.end_machine();
        self.enter(VmState::Saved, "saved");
        Ok(())
    }

    /// Saves the guest and keeps its machine.
    fn hold(&mut self) -> Done {
        self.require("save", &WITH_GUEST)?;
        if self.state() == VmState::Saved {
            return Ok(());
        }
        let definition = &self.record.definition;
        let name = &definition.name;
        let (Some(kept), Life::Live { incarnation, launch, .. }) = (&self.kept, &self.record.life) else {
            return Err(Fault::new(ErrorCode::WrongState, format!("{name} is not in NV-RAM"))
                .hint("name a medium with `nvram` in its definition"));
        };
        let machine = self.machine.as_deref_mut().ok_or_else(|| gone(name))?;
        let saved =
            kept.save(machine, *incarnation, launch, name, || self.shared.teller.sync_vssds(definition));
        match saved {
            Ok(last) => {
                // Durable with the next change: now there is something more urgent.
                self.record.worst =
                    Some(self.record.worst.map_or(last.steps, |worst| worst.worst(&last.steps)));
                self.with_status(|status| status.last_save = Some(last));
                self.enter(VmState::Saved, "saved");
                Ok(())
            }
            Err(fault) => {
                self.enter_for(VmState::Paused, &format!("it could not be saved: {fault}"), &fault);
                Err(fault)
            }
        }
    }

    /// Continues the guest where it was.
    fn resume(&mut self) -> Done {
        self.require("resume", &WITH_GUEST)?;
        if self.state() == VmState::Running {
            return Ok(());
        }
        self.shared.may_run(self.name())?;
        let Life::Live { launch, incarnation, .. } = self.record.life.clone() else {
            return Err(gone(self.name()));
        };
        if self.machine.is_some() {
            return self.go_on(launch, "resumed");
        }
        let begun = Instant::now();
        let name = self.name().to_owned();
        let found = self.kept.as_ref().map(|kept| kept.look(incarnation, &launch, &name)).transpose()?;
        match found {
            Some(Found::State(saved)) => self.restore(&saved, launch)?,
            Some(Found::Unusable(fault)) => {
                self.enter_for(VmState::Broken, &fault.message, &fault);
                return Err(fault);
            }
            Some(Found::Nothing(why)) => return Err(self.lose(&why)),
            None => return Err(self.lose("it has no regions")),
        }
        let us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.with_status(|status| status.last_restore_us = Some(us));
        Ok(())
    }

    /// Puts a saved state into a new machine and lets it run. Until the record is written nothing has changed; if it fails before, it can
    /// be tried again.
    fn restore(&mut self, saved: &SavedState, launch: Launch) -> Done {
        self.launch(&launch, Begin::Restore)?;
        let loaded = self.load(saved, &launch).and_then(|version| {
            // What it is saved by the next time, an older one need not understand.
            self.go_on(Launch { version, ..launch }, "restored")
        });
        if let Err(fault) = loaded {
            if self.state() == VmState::Saved {
                self.end_machine();
            }
            self.with_status(|status| status.blame(Some(&fault)));
            return Err(fault);
        }
        Ok(())
    }

    /// Gives the version of the hypervisor that took it.
    fn load(&mut self, saved: &SavedState, launch: &Launch) -> Result<String, Fault> {
        let name = self.name().to_owned();
        let machine = self.machine.as_deref_mut().ok_or_else(|| gone(&name))?;
        if is_older(machine.version(), &launch.version) {
            let message = format!(
                "{name} was saved by version {} of its hypervisor, and this is {}",
                launch.version,
                machine.version()
            );
            return Err(Fault::new(ErrorCode::State, message)
                .hint("install that version again, or a later one; nothing was changed"));
        }
        machine.load(&saved.payload)?;
        Ok(machine.version().to_owned())
    }

    fn swap_out(&mut self) -> Done {
        self.require("swap out", &[VmState::Saved, VmState::Stopped, VmState::SwappedOut])?;
        let name = self.name().to_owned();
        match (self.state(), self.record.life.clone()) {
            (VmState::SwappedOut, _) => Ok(()),
            (VmState::Stopped, _) => {
                // Memory without a guest has no worth.
                self.free_regions()
            }
            (_, Life::Live { incarnation, launch, .. }) => {
                self.end_machine();
                let Some(kept) = &self.kept else { return Err(gone(&name)) };
                let saved = match kept.look(incarnation, &launch, &name)? {
                    Found::State(saved) => saved,
                    Found::Nothing(why) => return Err(Fault::new(ErrorCode::State, why)),
                    Found::Unusable(fault) => return Err(fault),
                };
                let progress = self.progress("swapping out");
                let image = swap::write(&self.shared.swap_dir, &name, kept.memory_region(), &saved, progress)
                    .map_err(|fault| self.broken_off(fault))?;
                self.settle(Life::SwappedOut { incarnation, launch, image }, Wanted::Saved)?;
                self.enter(VmState::SwappedOut, "swapped out");
                self.free_regions()
            }
            _ => Err(gone(&name)),
        }
    }

    fn swap_in(&mut self) -> Done {
        self.require("swap in", &[VmState::SwappedOut, VmState::Saved])?;
        let Life::SwappedOut { incarnation, launch, image } = self.record.life.clone() else { return Ok(()) };
        let name = self.name().to_owned();
        let nvram = self.medium()?.ok_or_else(|| gone(&name))?;
        // What an interrupted swap-in left.
        Kept::free(&nvram, &name)?;
        let kept = self.make_regions(&nvram)?;
        let read = swap::read(&image, incarnation, kept.memory_region(), self.progress("swapping in"))
            .and_then(|saved| kept.install(saved, &launch, &name));
        if let Err(fault) = read {
            drop(kept);
            Kept::free(&nvram, &name)?;
            return Err(self.broken_off(fault));
        }
        self.settle(Life::Live { incarnation, launch, process: None }, Wanted::Saved)?;
        self.kept = Some(kept);
        self.enter(VmState::Saved, "swapped in");
        swap::remove(&image)
    }

    fn discard(&mut self) -> Done {
        self.require(
            "discard",
            &[
                VmState::Stopped,
                VmState::Paused,
                VmState::Saved,
                VmState::SwappedOut,
                VmState::Lost,
                VmState::Broken,
            ],
        )?;
        self.end_machine();
        self.end_noted()?;
        self.vmm().end_orphan(&self.places)?;
        let life = self.record.life.clone();
        self.settle(Life::Stopped, Wanted::Stopped)?;
        if let Life::SwappedOut { image, .. } = life {
            swap::remove(&image)?;
        }
        self.enter(VmState::Stopped, "discarded");
        Ok(())
    }

    fn undefine(&mut self) -> Done {
        self.require("undefine", &[VmState::Stopped])?;
        let name = self.name().to_owned();
        self.free_regions()?;
        self.shared.records.remove(&name)?;
        let _ = fs::remove_dir_all(self.shared.runtime_dir.join(&name));
        Ok(())
    }

    fn redefine(&mut self, definition: Definition) -> Done {
        self.require("redefine", &[VmState::Stopped])?;
        if definition.nvram != self.record.definition.nvram {
            self.free_regions()?;
        }
        let mut record = self.record.clone();
        record.definition = definition;
        self.note(record)
    }

    // ---- the machine ----

    fn launch(&mut self, launch: &Launch, begin: Begin) -> Done {
        let dir = self.shared.runtime_dir.join(self.name());
        fs::create_dir_all(&dir).map_err(|error| {
            Fault::new(ErrorCode::Media, format!("cannot make {}: {error}", dir.display()))
        })?;
        let vmm = vmm::of(launch.hypervisor);
        vmm.end_orphan(&self.places)?;
        let memory = match &self.kept {
            Some(kept) => kept.memory(),
            None => Memory::Ordinary { bytes: self.record.definition.memory.0 },
        };
        self.machine = Some(vmm.launch(launch, &memory, begin, &self.places)?);
        Ok(())
    }

    /// Lets the guest run, as a new incarnation: from the write of the record on, no state that was saved before counts.
    fn go(&mut self, launch: Launch, why: &str) -> Done {
        let name = self.name().to_owned();
        self.shared.may_run(&name)?;
        let machine = self.machine.as_deref().ok_or_else(|| gone(&name))?;
        let process = Some(machine.process().id().clone());
        let incarnation = Incarnation::random()
            .map_err(|error| Fault::new(ErrorCode::Internal, format!("no random numbers: {error}")))?;
        self.settle(Life::Live { incarnation, launch, process }, Wanted::Running)?;
        if self.console.is_none() {
            self.open_logs();
        }
        let machine = self.machine.as_deref_mut().ok_or_else(|| gone(&name))?;
        if let Err(error) = machine.resume() {
            // No saved state counts any more: the machine is all there is of the guest.
            let fault = Fault::from(error);
            self.enter_for(VmState::Paused, &format!("it could not be continued: {fault}"), &fault);
            return Err(fault);
        }
        self.enter(VmState::Running, why);
        Ok(())
    }

    /// Lets a guest that stood still run.
    fn go_on(&mut self, launch: Launch, why: &str) -> Done {
        self.go(launch, why)?;
        self.set_guest_clock();
        Ok(())
    }

    /// Writes down what the guest says, and sees that its hypervisor does not say too much. A log that cannot be written is no reason to harm it.
    fn open_logs(&mut self) {
        match Log::open(&self.places.log) {
            Ok(log) => self.log = Some(log),
            Err(error) => warn!(vm = self.name(), %error, "cannot keep the log of a hypervisor short"),
        }
        let log = self.shared.console_log(self.name());
        match Console::open(&self.places.console, &log) {
            Ok(console) => self.console = Some(console),
            Err(error) => warn!(vm = self.name(), %error, "cannot keep what the guest says on its console"),
        }
    }

    fn listen_to_guest(&mut self) {
        let Some(console) = &mut self.console else { return };
        match console.write_down() {
            Ok(true) => {}
            Ok(false) => {
                // One that only ever ends would keep this thread busy.
                let has_spoken = console.has_spoken();
                self.console = None;
                if has_spoken {
                    self.find_console_again();
                }
            }
            Err(error) => {
                warn!(vm = self.name(), %error, "what the guest says on its console is kept no longer");
                self.console = None;
            }
        }
    }

    /// A hypervisor may make the serial port anew when its guest restarts.
    fn find_console_again(&mut self) {
        if self.console.is_none() && self.machine.is_some() && self.state() == VmState::Running {
            // None yet, or none any more: what happens next tells.
            self.console = Console::open(&self.places.console, &self.shared.console_log(self.name())).ok();
        }
    }

    fn end_machine(&mut self) {
        if let Some(mut machine) = self.machine.take()
            && let Err(error) = machine.kill()
        {
            error!(vm = self.name(), %error, "cannot end a machine");
        }
        // Its last words.
        self.listen_to_guest();
        (self.console, self.log) = (None, None);
    }

    /// Ends the machine that the record names, whether it answers or not.
    fn end_noted(&self) -> Done {
        let Life::Live { process: Some(id), .. } = &self.record.life else { return Ok(()) };
        match process::end(id, END) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Fault::new(ErrorCode::TimedOut, format!("process {} does not end", id.pid))
                .hint("it was killed, and waits in the kernel for a disk or for memory")),
            Err(error) => {
                Err(Fault::new(ErrorCode::Internal, format!("cannot end process {}: {error}", id.pid)))
            }
        }
    }

    fn look_at_machine(&mut self) {
        self.listen_to_guest();
        if let Some(log) = &self.log
            && let Err(error) = log.bound()
        {
            warn!(vm = self.name(), %error, "cannot keep the log of a hypervisor short");
            self.log = None;
        }
        let Some(machine) = &mut self.machine else { return };
        let ended = machine.process().has_ended();
        let heard = machine.news();
        let news = match heard {
            Ok(news) => news,
            Err(VmmError::Ended { said }) => return self.has_ended(&said),
            Err(error) if ended => return self.has_ended(&error.to_string()),
            Err(error) => {
                // A machine that cannot be controlled cannot be saved either; it is not harmed for that.
                error!(vm = self.name(), %error, "cannot hear the hypervisor");
                self.machine = None;
                let why = error.to_string();
                return self.enter_for(VmState::Broken, &why, &error.into());
            }
        };
        if ended {
            return self.has_ended("without a word");
        }
        let happened = !news.is_empty();
        for one in news {
            self.shared.teller.tell(self.record.definition.name.as_str(), VmNews::Guest(one));
        }
        if happened {
            self.find_console_again();
        }
        if happened && self.state() == VmState::Running {
            self.look_at_guest();
        }
    }

    /// Something has happened to the guest: does it run still?
    fn look_at_guest(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        match machine.run_state() {
            Ok(RunState::Off) => {
                if let Err(fault) = self.settle(Life::Stopped, Wanted::Stopped) {
                    error!(vm = self.name(), %fault, "cannot note that a guest has turned itself off");
                }
                self.end_machine();
                self.enter(VmState::Stopped, OFF);
            }
            Ok(RunState::Halted) => self.enter(VmState::Paused, HALTED),
            Ok(RunState::Running | RunState::Stopped | RunState::AwaitsState) => {}
            Err(error) => warn!(vm = self.name(), %error, "cannot ask how a machine is"),
        }
    }

    /// The hypervisor is there no longer, and nobody here ended it.
    fn has_ended(&mut self, said: &str) {
        self.machine = None;
        if self.state() == VmState::Saved {
            // What counts is in the slot.
            return self.enter(VmState::Saved, &format!("saved; its hypervisor has ended since: {said}"));
        }
        self.lose(&format!("its hypervisor has ended: {said}"));
    }

    /// The guest cannot go on.
    fn lose(&mut self, why: &str) -> Fault {
        if self.record.definition.is_persistent() {
            let fault = Fault::new(ErrorCode::State, format!("{} cannot go on: {why}", self.name()))
                .hint("its memory is kept; `vm-host discard` gives it up, `vm-host start` then boots it");
            self.enter_for(VmState::Lost, why, &fault);
            return fault;
        }
        if let Err(fault) = self.settle(Life::Stopped, Wanted::Stopped) {
            error!(vm = self.name(), %fault, "cannot note that a guest has ended");
        }
        self.enter(VmState::Stopped, why);
        Fault::new(ErrorCode::WrongState, format!("{} has ended: {why}", self.name()))
    }

    /// Has the guest's agent set its clock, beside everything else: it may be slow, or not there.
    fn set_guest_clock(&self) {
        if !self.record.definition.guest_agent {
            return;
        }
        let (path, vm) = (self.places.guest_agent.clone(), self.name().to_owned());
        let set = move || match clock::set(&path, AGENT_LIMIT) {
            Ok(()) => info!(vm, "the guest's agent has set its clock"),
            Err(error) => {
                let fault = Fault::of(ErrorCode::TimedOut, &error);
                warn!(vm, "the guest's clock is behind by as long as it stood still: {fault}");
            }
        };
        if let Err(error) = thread::Builder::new().name("guest clock".to_owned()).spawn(set) {
            warn!(vm = self.name(), %error, "cannot start a thread");
        }
    }

    // ---- what is known ----

    /// The hypervisor of the guest that there is, or of the next one.
    fn vmm(&self) -> &'static dyn Vmm {
        let launch = self.record.life.launch();
        vmm::of(launch.map_or(self.record.definition.hypervisor, |launch| launch.hypervisor))
    }

    fn name(&self) -> &str {
        &self.record.definition.name
    }

    fn state(&self) -> VmState {
        self.with_status(|status| status.state)
    }

    fn status(&self) -> Status {
        self.with_status(|status| status.clone())
    }

    fn with_status<T>(&self, look: impl FnOnce(&mut Status) -> T) -> T {
        look(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn enter(&self, to: VmState, why: &str) {
        let from = self.with_status(|status| {
            status.follow(&self.record);
            if self.machine.is_none() {
                status.pid = None;
            }
            why.clone_into(&mut status.why);
            if !matches!(to, VmState::Lost | VmState::Broken) {
                status.blame(None);
            }
            std::mem::replace(&mut status.state, to)
        });
        if from != to {
            info!(vm = self.name(), ?from, ?to, why, "state");
            self.shared.teller.tell(self.name(), VmNews::State { from, to, why: why.to_owned() });
        }
    }

    /// The same, through somebody's fault.
    fn enter_for(&self, to: VmState, why: &str, fault: &Fault) {
        self.enter(to, why);
        self.with_status(|status| status.blame(Some(fault)));
    }

    fn require(&self, doing: &str, states: &[VmState]) -> Done {
        let state = self.state();
        if states.contains(&state) {
            return Ok(());
        }
        let possible = states.iter().map(word).collect::<Vec<_>>().join(", ");
        let message =
            format!("cannot {doing} {}: it is {}, and must be {possible}", self.name(), word(&state));
        let hint = match state {
            VmState::Lost | VmState::Broken => {
                "`vm-host show` says what happened; `vm-host discard` gives the guest up"
            }
            VmState::Saved => "`vm-host restore` lets it go on; `vm-host discard` gives the guest up",
            VmState::SwappedOut => "`vm-host swap-in` brings it back",
            VmState::Running | VmState::Paused => "`vm-host save` or `vm-host stop` first",
            VmState::Stopped => "`vm-host start` first",
        };
        Err(Fault::new(ErrorCode::WrongState, message).hint(hint))
    }

    /// Makes a new life durable, and only then believes it.
    fn settle(&mut self, life: Life, wanted: Wanted) -> Done {
        let mut record = self.record.clone();
        (record.life, record.wanted) = (life, wanted);
        self.note(record)
    }

    fn note(&mut self, record: Record) -> Done {
        self.shared.records.write(&record)?;
        self.record = record;
        self.with_status(|status| status.follow(&self.record));
        Ok(())
    }

    /// Gives back what of NV-RAM is this VM's.
    fn free_regions(&mut self) -> Done {
        let medium = self.medium()?;
        self.kept = None;
        medium.map_or(Ok(()), |nvram| Kept::free(&nvram, self.name()))
    }

    fn make_regions(&self, nvram: &Arc<Nvram>) -> Result<Kept, Fault> {
        Kept::make(nvram, &self.record.definition, self.progress("making the memory"))
            .map_err(|fault| self.broken_off(fault))
    }

    /// The medium that its definition names.
    fn medium(&self) -> Result<Option<Arc<Nvram>>, Fault> {
        let Some(name) = &self.record.definition.nvram else { return Ok(None) };
        Ok(Some(Arc::clone(self.shared.medium(name)?)))
    }

    /// Shows how far long work has come, and breaks it off when the power fails.
    fn progress(&self, doing: &'static str) -> impl FnMut(u64, u64) -> io::Result<()> + use<> {
        let (status, shared) = (Arc::clone(&self.status), Arc::clone(&self.shared));
        let mut shown = Instant::now().checked_sub(SHOWN_EVERY);
        move |done_bytes, total_bytes| {
            if shared.held_back.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            if shown.is_some_and(|shown| shown.elapsed() < SHOWN_EVERY) && done_bytes < total_bytes {
                return Ok(());
            }
            shown = Some(Instant::now());
            status.lock().unwrap_or_else(PoisonError::into_inner).work =
                Some(Work { doing: doing.to_owned(), done_bytes, total_bytes });
            Ok(())
        }
    }

    /// Of long work that failed: because the power does, or of itself.
    fn broken_off(&self, fault: Fault) -> Fault {
        self.shared.may_run(self.name()).err().unwrap_or(fault)
    }
}

fn gone(name: &str) -> Fault {
    Fault::new(ErrorCode::Internal, format!("the machine of {name} has gone"))
}

/// Whether `version` comes before `other`; what is no number is not compared.
fn is_older(version: &str, other: &str) -> bool {
    let numbers =
        |text: &str| text.split(['.', '-']).map_while(|part| part.parse::<u64>().ok()).collect::<Vec<_>>();
    numbers(version) < numbers(other)
}

#[cfg(test)]
mod tests {
    use super::is_older;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(is_older("7.2.22", "10.0.2"));
        assert!(is_older("10.0.1", "10.0.2"));
        assert!(!is_older("10.0.2", "10.0.2"));
        assert!(!is_older("10.0.2 (Debian)", "7.2.22"));
    }
}
