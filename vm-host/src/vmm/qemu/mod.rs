// SPDX-License-Identifier: Apache-2.0 OR MIT

//! QEMU, from 7.2 on, controlled over QMP.
//!
//! * It starts with `-S`, so that nobody but the host lets a guest run.
//! * Its state is what `migrate` sends with `x-ignore-shared`: all but memory that lies in a named file. It comes over a socket that
//!   QEMU is given for it (`getfd`), for `file:` came with QEMU 8.2 and a file could be there half-written.
//! * It is a process group of its own, which signals to this daemon's do not reach, and its control socket is one that we bind
//!   and it inherits as its standard input: the connection is there before QEMU is, and the next daemon finds it by its path.

pub mod argv;
pub mod qmp;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use serde_json::{Value, json};

use super::process::{Process, ProcessId};
use super::program::{self, connection, last_words, listen, tail};
use super::{Begin, Launch, Machine, Memory, News, Places, RunState, Vmm, VmmError};
use crate::definition::{Definition, DefinitionError};
use argv::Emulator;
use qmp::Qmp;

/// A QEMU that hangs must be noticed before the energy is gone; one on a busy machine must not be taken for one.
const LIMIT: Duration = Duration::from_secs(10);
/// Firmware, devices, and memory that is touched.
const START: Duration = Duration::from_secs(30);
const END: Duration = Duration::from_secs(10);
/// More than the state of any machine that is reasonable; what a broken one could send has no end.
const LARGEST_STATE: u64 = 256 << 20;
/// The name under which QEMU keeps the socket for a state.
const STATE_FD: &str = "state";

/// QEMU as a kind of hypervisor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Qemu;

impl Vmm for Qemu {
    fn check(&self, _: &Definition) -> Result<(), DefinitionError> {
        // Its options are many and its own to check.
        Ok(())
    }

    fn can_use_part_of_file(&self) -> bool {
        // From 8.1 on; an older one says so when it starts.
        true
    }

    fn plan(&self, definition: &Definition, places: &Places) -> Result<Launch, VmmError> {
        Ok(Emulator::probe(definition.emulator())?.plan(definition, places))
    }

    fn launch(
        &self,
        launch: &Launch,
        memory: &Memory,
        begin: Begin,
        places: &Places,
    ) -> Result<Box<dyn Machine>, VmmError> {
        Ok(Box::new(QemuMachine::launch(launch, memory, begin, places)?))
    }

    fn adopt(&self, id: &ProcessId, places: &Places) -> Result<Option<Box<dyn Machine>>, VmmError> {
        Ok(QemuMachine::adopt(id, places)?.map(|machine| Box::new(machine) as Box<dyn Machine>))
    }

    fn end_orphan(&self, places: &Places) -> Result<(), VmmError> {
        // Whoever listens there was started by us; nobody does once that has ended.
        let Ok(stream) = UnixStream::connect(&places.control) else { return Ok(()) };
        let mut qmp = match Qmp::new(stream, LIMIT) {
            // It was on its way out.
            Err(VmmError::Connection { .. }) => return Ok(()),
            other => other?,
        };
        match qmp.call("quit", json!({}), LIMIT) {
            Ok(_) | Err(VmmError::Connection { .. }) => {}
            Err(error) => return Err(error),
        }
        // It closes the connection when it ends.
        match qmp.wait_event::<()>("quit", END, |_, _| None) {
            Err(VmmError::Connection { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Ok(()),
        }
    }
}

#[derive(Debug)]
struct QemuMachine {
    process: Process,
    qmp: Qmp,
    places: Places,
}

impl QemuMachine {
    fn launch(launch: &Launch, memory: &Memory, begin: Begin, places: &Places) -> Result<Self, VmmError> {
        let failed = |source| VmmError::Start { program: launch.program.clone(), source };
        let memory = argv::memory(memory, &launch.version).map_err(|why| failed(io::Error::other(why)))?;
        let listener = listen(&places.control).map_err(failed)?;
        let log = File::options().create(true).append(true).open(&places.log).map_err(failed)?;
        let mut command = Command::new(&launch.program);
        // A guest that turns itself off leaves its machine, so that its end is told from a crash.
        command.args(&launch.args).args(["-object", &memory]).args([
            "-S",
            "-no-shutdown",
            "-chardev",
            "socket,id=vmhost,fd=0,server=on,wait=off",
        ]);
        command.args(["-mon", "chardev=vmhost,mode=control"]);
        if begin == Begin::Restore {
            command.args(["-incoming", "defer"]);
        }
        command
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::from(log.try_clone().map_err(failed)?))
            .stderr(log);
        command.process_group(0);
        let child = command.spawn().map_err(failed)?;
        // Ours is the only other descriptor of the socket: without it, the end of QEMU is the end of the connection.
        drop(command);
        let process = Process::of_pid(child.id()).map_err(failed)?;
        let qmp = match control(&process, places, START) {
            Ok(qmp) => qmp,
            Err(error) => {
                // Nobody could ever control it.
                let _ = process.kill(END);
                return Err(error);
            }
        };
        let mut machine = Self { process, qmp, places: places.clone() };
        match machine.prepare() {
            Ok(()) => Ok(machine),
            Err(error) => {
                let _ = machine.process.kill(END);
                Err(error)
            }
        }
    }

    fn adopt(id: &ProcessId, places: &Places) -> Result<Option<Self>, VmmError> {
        let found = Process::find(id).map_err(|source| connection("find the process", source))?;
        let Some(process) = found else { return Ok(None) };
        let adopted = control(&process, places, LIMIT).and_then(|qmp| {
            let mut machine = Self { process, qmp, places: places.clone() };
            machine.prepare().map(|()| machine)
        });
        match adopted {
            Ok(machine) => Ok(Some(machine)),
            // It was on its way out.
            Err(VmmError::Ended { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What every save and restore needs; harmless to say twice.
    fn prepare(&mut self) -> Result<(), VmmError> {
        let on = |name: &str| json!({ "capability": name, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        match self.call("migrate-set-capabilities", capabilities) {
            // While a state is awaited they are what they were set to before.
            Err(VmmError::Refused { .. }) => {}
            other => drop(other?),
        }
        self.call("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 })).map(drop)
    }

    fn call(&mut self, command: &'static str, arguments: Value) -> Result<Value, VmmError> {
        self.qmp
            .call(command, arguments, LIMIT)
            .map_err(|error| last_words(&self.process, &self.places.log, error))
    }

    /// Gives QEMU one end of a socket for a state, and us the other.
    fn state_socket(&mut self) -> Result<UnixStream, VmmError> {
        let (ours, theirs) =
            UnixStream::pair().map_err(|source| connection("make a socket for a state", source))?;
        for end in [&ours, &theirs] {
            // The default takes a state in two parts and a change of threads between them.
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(end, 4 << 20);
        }
        self.qmp.call_with("getfd", json!({ "fdname": STATE_FD }), theirs.as_fd(), LIMIT)?;
        Ok(ours)
    }

    /// Waits until a state has gone or come.
    fn migrated(&mut self, doing: &'static str) -> Result<(), VmmError> {
        let outcome = self.qmp.wait_event(doing, LIMIT, |name, data| {
            let status = data["status"].as_str().unwrap_or_default();
            (name == "MIGRATION" && matches!(status, "completed" | "failed" | "cancelled"))
                .then(|| status.to_owned())
        });
        match outcome.map_err(|error| last_words(&self.process, &self.places.log, error))?.as_str() {
            "completed" => Ok(()),
            status => {
                let said = self.call("query-migrate", json!({})).unwrap_or_default();
                let reason = said["error-desc"].as_str().map_or_else(
                    || format!("QEMU says it {status}: {}", tail(&self.places.log)),
                    str::to_owned,
                );
                Err(VmmError::State { doing, reason })
            }
        }
    }

    fn status(&mut self) -> Result<String, VmmError> {
        let said = self.call("query-status", json!({}))?;
        Ok(said["status"].as_str().unwrap_or_default().to_owned())
    }
}

impl Machine for QemuMachine {
    fn process(&self) -> &Process {
        &self.process
    }

    fn version(&self) -> &str {
        self.qmp.version()
    }

    fn control(&self) -> BorrowedFd<'_> {
        self.qmp.fd()
    }

    fn news(&mut self) -> Result<Vec<News>, VmmError> {
        let events =
            self.qmp.take_events().map_err(|error| last_words(&self.process, &self.places.log, error))?;
        Ok(events.iter().filter_map(news_of).collect())
    }

    fn run_state(&mut self) -> Result<RunState, VmmError> {
        Ok(state_of(&self.status()?))
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.call("stop", json!({})).map(drop)
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.call("cont", json!({})).map(drop)
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        const DOING: &str = "saved";
        let ours = self.state_socket()?;
        self.call("migrate", json!({ "uri": format!("fd:{STATE_FD}") }))?;
        let state = read_state(ours);
        // What QEMU says goes before what the socket says: a socket ends early because of something.
        self.migrated(DOING)?;
        state.map_err(|error| VmmError::State { doing: DOING, reason: error.to_string() })
    }

    fn load(&mut self, state: &[u8]) -> Result<(), VmmError> {
        const DOING: &str = "loaded";
        let ours = self.state_socket()?;
        self.call("migrate-incoming", json!({ "uri": format!("fd:{STATE_FD}") }))?;
        let written = write_state(ours, state);
        self.migrated(DOING)?;
        written.map_err(|error| VmmError::State { doing: DOING, reason: error.to_string() })
    }

    fn power_button(&mut self) -> Result<(), VmmError> {
        self.call("system_powerdown", json!({})).map(drop)
    }

    fn kill(&mut self) -> Result<(), VmmError> {
        program::kill(&self.process, END)?;
        let _ = fs::remove_file(&self.places.control);
        Ok(())
    }
}

/// The control connection, once QEMU has made its machine.
fn control(process: &Process, places: &Places, limit: Duration) -> Result<Qmp, VmmError> {
    UnixStream::connect(&places.control)
        .map_err(|source| connection("connect to its control socket", source))
        .and_then(|stream| Qmp::new(stream, limit))
        .map_err(|error| last_words(process, &places.log, error))
}

/// The words for these are QEMU's, qapi/run-state.json.
fn state_of(status: &str) -> RunState {
    match status {
        "running" => RunState::Running,
        "inmigrate" => RunState::AwaitsState,
        "shutdown" => RunState::Off,
        "guest-panicked" | "internal-error" | "io-error" | "watchdog" => RunState::Halted,
        _ => RunState::Stopped,
    }
}

fn news_of(event: &Value) -> Option<News> {
    let data = &event["data"];
    match event["event"].as_str()? {
        "RESET" => Some(News::Reset),
        "SHUTDOWN" => Some(News::Shutdown),
        "GUEST_PANICKED" => Some(News::Panicked),
        "BLOCK_IO_ERROR" => {
            let disk = data["node-name"].as_str().or(data["device"].as_str()).unwrap_or("a disk");
            Some(News::DiskError(format!("{disk}: {}", data["reason"].as_str().unwrap_or("I/O error"))))
        }
        _ => None,
    }
}

fn read_state(mut from: UnixStream) -> io::Result<Vec<u8>> {
    from.set_read_timeout(Some(LIMIT))?;
    let mut state = Vec::with_capacity(1 << 20);
    let read = (&mut from).take(LARGEST_STATE + 1).read_to_end(&mut state)?;
    if u64::try_from(read).is_ok_and(|read| read <= LARGEST_STATE) {
        Ok(state)
    } else {
        Err(io::Error::other(format!("it is larger than {LARGEST_STATE} bytes")))
    }
}

fn write_state(mut to: UnixStream, state: &[u8]) -> io::Result<()> {
    to.set_write_timeout(Some(LIMIT))?;
    to.write_all(state)
    // Closed by the drop: QEMU reads to the end of the state itself.
}
