// SPDX-License-Identifier: Apache-2.0 OR MIT

//! cloud-hypervisor, from v53 on, controlled over its HTTP API.
//!
//! **Exercised against a stand-in, not yet against the program itself**: `tests/cloud_hypervisor_stand_in`, made from its API document
//! (0.3.0) and source as of v53. `tests/cloud_hypervisor` runs the program where there is one, and KVM.
//!
//! ```text
//!   launch(Boot):     vm.create                 resume, first: vm.boot     later: vm.resume
//!   launch(Restore):  -         load: vm.restore, which leaves it paused
//!   pause: vm.pause   save: vm.snapshot ► config.json, state.json ► one run of bytes
//! ```
//!
//! * `vm.create` only describes a machine: nothing exists, and nothing runs, before the first `vm.boot`.
//! * A guest's memory is one zone in a shared, named file, which a snapshot leaves out and a restore maps again. A restore that maps on
//!   demand fails without a copy of memory (cloud-hypervisor issue 8848), so it is told to copy, of which there is nothing.
//! * Its API socket is one that we bind and it inherits as its standard input, its events go into a pipe that is its standard output: both
//!   are there before it is, and the next daemon finds them by their paths.
//! * It keeps no note of whether a guest has turned itself off or was never booted (`Created`, in both cases): a file says that we have
//!   told it to boot.
//! * Pausing waits for what its disks have under way, and does not make it durable. So their images are synced then, for a guest that
//!   outlives a power cut will not flush again what it was told is written.
//! * Where the guest's clock source is kvm-clock (x86-64), it goes on as if the guest had never stood still: cloud-hypervisor sets that
//!   clock forward when the guest goes on, after a pause as after a restore (its pull request 8256). Uptime goes with it.
//! * A disk that fails is not told of; a guest's panic is, and the guest's processors go on.
//! * For a vSSD whose backend is not there it waits 60 s, at its start and later; a resize by the host it sees from its pull request 8824
//!   on, which no release up to v54 has. That a machine with vhost-user disks is saved and restored, its own tests do not cover (issue 7850).

mod api;
mod config;
mod container;
mod events;
mod http;
mod snapshot;

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::fd::{BorrowedFd, OwnedFd};
use serde_json::{Value, json};

use super::process::{Process, ProcessId};
use super::program::{self, connection, last_words, listen};
use super::{Begin, Launch, Machine, Memory, News, Places, RunState, Vmm, VmmError};
use crate::definition::{Definition, DefinitionError, Hypervisor};
use api::{Api, VmState, file_url, release};
use container::Snapshot;
use events::Events;
use snapshot::Folder;

/// The first that stays when its guest turns itself off (`--no-shutdown`), waits for disks before it is paused, and sets the guest's clock.
const OLDEST: (u32, u32) = (53, 0);
/// One that hangs must be noticed before the energy is gone; one on a busy machine must not be taken for one.
const LIMIT: Duration = Duration::from_secs(10);
const START: Duration = Duration::from_secs(30);
/// It waits 60 s for the backend of a disk.
const MAKE: Duration = Duration::from_secs(70);
const END: Duration = Duration::from_secs(10);
/// In the machine's folder.
const EVENTS: &str = "events";
const SNAPSHOT: &str = "snapshot";
/// There once it was told to boot.
const BOOTED: &str = "booted";

/// cloud-hypervisor as a kind of hypervisor.
#[derive(Clone, Copy, Debug, Default)]
pub struct CloudHypervisor;

impl Vmm for CloudHypervisor {
    fn check(&self, definition: &Definition) -> Result<(), DefinitionError> {
        config::check(definition)
    }

    fn can_use_part_of_file(&self) -> bool {
        false
    }

    fn plan(&self, definition: &Definition, places: &Places) -> Result<Launch, VmmError> {
        let program = definition.emulator();
        let said = program::run(program, &["--version"])?;
        let banner = said.lines().next().unwrap_or_default();
        let number = banner.starts_with("cloud-hypervisor ").then(|| release(banner)).flatten();
        let Some(number) = number else {
            let what = format!("{} is not cloud-hypervisor: it says {banner:?}", program.display());
            return Err(VmmError::Protocol(what));
        };
        if number < OLDEST {
            let reason = format!("it is v{}, and v{} or later is needed", name(number), name(OLDEST));
            return Err(VmmError::Refused { command: "--version", reason });
        }
        let config = config::plan(definition, places)
            .map_err(|error| VmmError::Protocol(format!("no configuration: {error}")))?;
        Ok(Launch {
            hypervisor: Hypervisor::CloudHypervisor,
            program: program.to_owned(),
            args: definition.extra.clone(),
            config: Some(config),
            machine: "cloud-hypervisor".to_owned(),
            version: name(number),
        })
    }

    fn launch(
        &self,
        launch: &Launch,
        memory: &Memory,
        begin: Begin,
        places: &Places,
    ) -> Result<Box<dyn Machine>, VmmError> {
        Ok(Box::new(CloudMachine::launch(launch, memory, begin, places)?))
    }

    fn adopt(&self, id: &ProcessId, places: &Places) -> Result<Option<Box<dyn Machine>>, VmmError> {
        Ok(CloudMachine::adopt(id, places)?.map(|machine| Box::new(machine) as Box<dyn Machine>))
    }

    fn end_orphan(&self, places: &Places) -> Result<(), VmmError> {
        // Whoever listens there was started by us; nobody does once that has ended.
        match Api::new(&places.control).shut_down(END) {
            Err(VmmError::Connection { .. }) => Ok(()),
            other => other,
        }
    }
}

#[derive(Debug)]
struct CloudMachine {
    process: Process,
    api: Api,
    events: Events,
    places: Places,
    version: String,
    /// Where a state that is loaded finds its memory. None of a machine that was adopted, which has it.
    memory: Option<Memory>,
    /// What its disks write to.
    images: Vec<PathBuf>,
}

impl CloudMachine {
    fn launch(launch: &Launch, memory: &Memory, begin: Begin, places: &Places) -> Result<Self, VmmError> {
        let failed = |source| VmmError::Start { program: launch.program.clone(), source };
        let missing = || failed(io::Error::other("its record has no configuration"));
        let planned = launch.config.as_ref().ok_or_else(missing)?;
        let whole = config::with_memory(planned, memory).map_err(|why| failed(io::Error::other(why)))?;
        let (process, events) = spawn(launch, places).map_err(failed)?;
        let machine = Self {
            process,
            api: Api::new(&places.control),
            events,
            places: places.clone(),
            version: String::new(),
            memory: Some(memory.clone()),
            images: config::written_images(planned),
        };
        machine.begin(begin, &whole)
    }

    /// What a new process has to be told. One that cannot be told could never be controlled.
    fn begin(mut self, begin: Begin, config: &Value) -> Result<Self, VmmError> {
        let begun = self.greet(START).and_then(|()| match begin {
            Begin::Boot => self.put("vm.create", Some(config), LIMIT),
            Begin::Restore => Ok(()),
        });
        match begun {
            Ok(()) => Ok(self),
            Err(error) => {
                let _ = self.process.kill(END);
                Err(error)
            }
        }
    }

    fn adopt(id: &ProcessId, places: &Places) -> Result<Option<Self>, VmmError> {
        let found = Process::find(id).map_err(|source| connection("find the process", source))?;
        let Some(process) = found else { return Ok(None) };
        let events = Events::open(&places.work.join(EVENTS))
            .map_err(|source| connection("open the pipe of its events", source))?;
        let mut machine = Self {
            process,
            api: Api::new(&places.control),
            events,
            places: places.clone(),
            version: String::new(),
            memory: None,
            images: Vec::new(),
        };
        match machine.greet(LIMIT).and_then(|()| machine.info()) {
            Ok(info) => {
                machine.images = info.map_or_else(Vec::new, |info| config::written_images(&info.config));
                Ok(Some(machine))
            }
            // It was on its way out.
            Err(VmmError::Ended { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits until it answers, and asks who it is.
    fn greet(&mut self, limit: Duration) -> Result<(), VmmError> {
        let ping = self.api.ping(limit).map_err(|error| self.last_words(error))?;
        if ping.pid != self.process.id().pid {
            return Err(VmmError::Stranger { pid: ping.pid });
        }
        match release(&ping.version) {
            Some(number) => self.version = name(number),
            None => return Err(VmmError::Protocol(format!("it has version {:?}", ping.version))),
        }
        Ok(())
    }

    fn put(&self, command: &'static str, body: Option<&Value>, limit: Duration) -> Result<(), VmmError> {
        self.api.put(command, body, limit).map_err(|error| self.last_words(error))
    }

    fn info(&self) -> Result<Option<api::Info>, VmmError> {
        self.api.info(LIMIT).map_err(|error| self.last_words(error))
    }

    fn state(&self) -> Result<Option<VmState>, VmmError> {
        Ok(self.info()?.map(|info| info.state))
    }

    fn last_words(&self, error: VmmError) -> VmmError {
        last_words(&self.process, &self.places.log, error)
    }

    fn booted(&self) -> PathBuf {
        self.places.work.join(BOOTED)
    }

    fn boot(&self) -> Result<(), VmmError> {
        let booted = self.booted();
        File::create(&booted).map_err(|source| connection("note that it is booted", source))?;
        let done = self.put("vm.boot", None, MAKE);
        if let Err(VmmError::Refused { .. }) = done {
            let _ = fs::remove_file(booted);
        }
        done
    }

    fn snapshot(&self) -> Result<Vec<u8>, VmmError> {
        let wrong = |reason| VmmError::State { doing: "saved", reason };
        let folder = Folder::make(&self.places.work.join(SNAPSHOT)).map_err(wrong)?;
        let to = json!({ "destination_url": file_url(folder.path()).map_err(wrong)? });
        self.put("vm.snapshot", Some(&to), LIMIT)?;
        Ok(folder.take().map_err(wrong)?.pack())
    }
}

impl Machine for CloudMachine {
    fn process(&self) -> &Process {
        &self.process
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn control(&self) -> BorrowedFd<'_> {
        self.events.fd()
    }

    fn news(&mut self) -> Result<Vec<News>, VmmError> {
        self.events.take().map_err(|source| self.last_words(connection("read events", source)))
    }

    fn run_state(&mut self) -> Result<RunState, VmmError> {
        Ok(match self.state()? {
            None => RunState::AwaitsState,
            Some(VmState::Running) => RunState::Running,
            Some(VmState::Paused | VmState::BreakPoint) => RunState::Stopped,
            Some(VmState::Shutdown) => RunState::Off,
            Some(VmState::Created) if self.booted().exists() => RunState::Off,
            Some(VmState::Created) => RunState::Stopped,
        })
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        match self.put("vm.pause", None, LIMIT) {
            // It refuses to pause what is paused.
            Err(VmmError::Refused { .. }) if self.state()? == Some(VmState::Paused) => {}
            other => other?,
        }
        sync(self.images.clone())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        match self.state()? {
            Some(VmState::Created) if !self.booted().exists() => self.boot(),
            Some(VmState::Running) => Ok(()),
            _ => self.put("vm.resume", None, LIMIT),
        }
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        self.snapshot()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), VmmError> {
        let wrong = |reason| VmmError::State { doing: "loaded", reason };
        let Some(memory) = &self.memory else {
            return Err(wrong("the machine has one already".to_owned()));
        };
        let snapshot = Snapshot::unpack(state).map_err(wrong)?;
        let folder = Folder::make(&self.places.work.join(SNAPSHOT)).map_err(wrong)?;
        folder.put(&snapshot, memory).map_err(wrong)?;
        let from = json!({
            "source_url": file_url(folder.path()).map_err(wrong)?,
            "memory_restore_mode": "Copy",
            "resume": false,
        });
        match self.put("vm.restore", Some(&from), MAKE) {
            Ok(()) => {
                // It has begun to run at some time, whoever says later that there is no machine.
                File::create(self.booted())
                    .map_err(|source| connection("note that it was booted", source))?;
                Ok(())
            }
            Err(VmmError::Refused { reason, .. }) => Err(wrong(reason)),
            Err(error) => Err(error),
        }
    }

    fn power_button(&mut self) -> Result<(), VmmError> {
        self.put("vm.power-button", None, LIMIT)
    }

    fn kill(&mut self) -> Result<(), VmmError> {
        program::kill(&self.process, END)?;
        let _ = fs::remove_file(&self.places.control);
        let _ = snapshot::clear(&self.places.work);
        Ok(())
    }
}

/// Starts it, with all that connects it to us, and a process group of its own, which signals to this daemon's do not reach.
fn spawn(launch: &Launch, places: &Places) -> io::Result<(Process, Events)> {
    snapshot::clear(&places.work)?;
    DirBuilder::new().mode(0o700).create(&places.work)?;
    let listener = listen(&places.control)?;
    // It binds that itself, and not where something is.
    remove(&places.console)?;
    let (events, theirs) = Events::make(&places.work.join(EVENTS))?;
    let log = File::options().create(true).append(true).open(&places.log)?;
    let mut command = Command::new(&launch.program);
    command.args(&launch.args);
    command.args(["--api-socket", "fd=0", "--event-monitor", "fd=1", "--no-shutdown"]);
    command.stdin(OwnedFd::from(listener)).stdout(Stdio::from(theirs)).stderr(log);
    command.process_group(0);
    let child = command.spawn()?;
    // Ours are the only other descriptors of its ends: without them, its end is the end of the pipe and of the socket.
    drop(command);
    Ok((Process::of_pid(child.id())?, events))
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes durable what disks were told to write. A disk that hangs costs a thread, and not the daemon.
fn sync(images: Vec<PathBuf>) -> Result<(), VmmError> {
    const SYNC: &str = "fsync";
    if images.is_empty() {
        return Ok(());
    }
    let (sender, done) = mpsc::channel();
    let sync = move || {
        let synced = images.iter().try_for_each(|image| {
            File::open(image)
                .and_then(|file| file.sync_all())
                .map_err(|source| connection("make a disk's image durable", source))
        });
        // Nobody may be waiting any more.
        let _ = sender.send(synced);
    };
    thread::Builder::new()
        .name("sync disks".to_owned())
        .spawn(sync)
        .map_err(|source| connection("make a disk's image durable", source))?;
    done.recv_timeout(LIMIT).unwrap_or(Err(VmmError::Silent { command: SYNC, limit: LIMIT }))
}

fn name((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}
