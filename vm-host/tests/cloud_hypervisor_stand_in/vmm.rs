// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The states of a machine and the calls that each allows, as `impl RequestHandler for Vmm` in `vmm/src/lib.rs` has them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{exit, id};

use memmap2::MmapMut;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::config::{MemoryRestoreMode, Mode, RestoreConfig, VmConfig, VmSnapshotConfig};
use crate::guest::{Guest, Registers, SerialPort, map_file};
use crate::http::Answer;
use crate::orders::Orders;
use crate::{BUILD, Monitor, VERSION};

/// A refused call.
pub struct Refusal {
    pub status: u16,
    /// What went wrong, and what was behind it each time.
    pub chain: Vec<String>,
}

impl Refusal {
    pub fn new(status: u16, chain: &[&str]) -> Self {
        Self { status, chain: chain.iter().map(|&text| text.to_owned()).collect() }
    }
}

fn refusal(chain: &[&str]) -> Refusal {
    let status = if chain.last() == Some(&"VM is not created") { 404 } else { 500 };
    Refusal::new(status, &[&["Error from API"], chain].concat())
}

fn refuse(chain: &[&str]) -> Answer {
    Err(refusal(chain))
}

/// A machine that exists.
struct Vm {
    guest: Guest,
    running: bool,
}

pub struct Vmm {
    config: Option<VmConfig>,
    vm: Option<Vm>,
    /// Bound when the machine is described.
    port: Option<SerialPort>,
    monitor: Monitor,
    orders: Orders,
    no_shutdown: bool,
}

impl Vmm {
    pub fn new(monitor: Monitor, orders: Orders, no_shutdown: bool) -> Self {
        Self { config: None, vm: None, port: None, monitor, orders, no_shutdown }
    }

    pub fn running(&mut self) -> Option<&mut Guest> {
        self.vm.as_mut().filter(|vm| vm.running).map(|vm| &mut vm.guest)
    }

    pub fn call(&mut self, method: &str, call: &str, body: Option<&str>) -> Answer {
        match (method, call, body) {
            ("GET", "vmm.ping", None) => Ok(Some(self.ping())),
            ("GET", "vm.info", None) => self.info(),
            ("PUT", "vmm.shutdown", None) => {
                self.tell("vmm", "shutdown");
                Ok(None)
            }
            ("PUT", "vm.boot", None) => self.boot(),
            ("PUT", "vm.pause", None) => self.pause(),
            ("PUT", "vm.resume", None) => self.resume(),
            ("PUT", "vm.power-button", None) => match self.vm {
                Some(_) => {
                    self.guest_does("poweroff");
                    Ok(None)
                }
                None => refuse(&["The VM could not be powered off", "VM is not running"]),
            },
            ("PUT", "vm.create", Some(body)) => {
                let config = read(body)?;
                self.create(config)
            }
            ("PUT", "vm.snapshot", Some(body)) => {
                let VmSnapshotConfig { destination_url } = read(body)?;
                self.snapshot(&destination_url)
            }
            ("PUT", "vm.restore", Some(body)) => {
                let config = read(body)?;
                self.restore(&config)
            }
            ("PUT" | "GET", "", _) => Err(Refusal::new(404, &["Not Found"])),
            _ => Err(Refusal::new(400, &["Bad Request"])),
        }
    }

    /// What the guest has been told to do of itself.
    pub fn guest_turn(&mut self) {
        if let Some(does) = self.orders.take("guest") {
            self.guest_does(&does);
        }
    }

    fn guest_does(&mut self, what: &str) {
        match what {
            "panic" => self.monitor.tell("guest", "panic", &json!({ "event": "panic" })),
            "reboot" => {
                self.tell("vm", "rebooting");
                let guest = self.vm.take().unwrap().guest;
                self.port = Some(guest.into_port().bind_again().unwrap());
                self.vm = Some(Vm { guest: self.new_guest(None).unwrap(), running: true });
                self.tell("vm", "rebooted");
            }
            "poweroff" => {
                self.port = Some(self.vm.take().unwrap().guest.into_port());
                self.tell("vm", "shutdown");
                if !self.no_shutdown {
                    exit(0);
                }
            }
            odd => panic!("no guest does {odd}"),
        }
    }

    fn tell(&self, source: &str, event: &str) {
        self.monitor.tell(source, event, &Value::Null);
    }

    fn ping(&self) -> String {
        let version = self.orders.take("version").unwrap_or(VERSION.to_owned());
        let pid = if self.orders.take("pid").is_some() { 1 } else { id() };
        json!({ "build_version": BUILD, "version": version, "pid": pid, "features": ["kvm"] }).to_string()
    }

    fn info(&self) -> Answer {
        let Some(config) = &self.config else {
            return refuse(&["The VM info is not available", "VM is not created"]);
        };
        let state = match &self.vm {
            None => "Created",
            Some(vm) if vm.running => "Running",
            Some(_) => "Paused",
        };
        let tree =
            json!({ "disk0": { "id": "disk0", "resources": [], "children": [], "pci_bdf": "0000:00:01.0" } });
        Ok(Some(
            json!({ "config": config, "state": state, "memory_actual_size": 1, "device_tree": tree })
                .to_string(),
        ))
    }

    fn create(&mut self, config: VmConfig) -> Answer {
        if self.config.is_some() {
            return refuse(&["The VM could not be created", "VM is already created"]);
        }
        // The machine is looked at when it is booted, and its sockets are bound now.
        self.bind_port(&config).map_err(|error| refusal(&["The VM could not be created", &error]))?;
        self.config = Some(config);
        Ok(None)
    }

    fn bind_port(&mut self, config: &VmConfig) -> Result<(), String> {
        let serial = config.serial.as_ref().filter(|port| port.mode == Mode::Socket);
        let path = serial.and_then(|port| port.socket.as_ref()).ok_or("no socket for the serial port")?;
        self.port = Some(SerialPort::bind(path)?);
        Ok(())
    }

    fn boot(&mut self) -> Answer {
        const BOOT: &str = "The VM could not boot";
        if self.vm.is_some() {
            return refuse(&[BOOT, "VM is already created"]);
        }
        let Some(config) = &self.config else { return refuse(&[BOOT, "VM config is missing"]) };
        self.tell("vm", "booting");
        config.validate().map_err(|error| refusal(&[BOOT, &error]))?;
        let guest = self.new_guest(None).map_err(|error| refusal(&[BOOT, &error]))?;
        self.vm = Some(Vm { guest, running: true });
        self.tell("vm", "booted");
        Ok(None)
    }

    fn new_guest(&mut self, registers: Option<Registers>) -> Result<Guest, String> {
        let memory = &self.config.as_ref().unwrap().memory;
        let mapped = match memory.zones.as_deref() {
            Some([zone]) if zone.shared => map_file(zone.file.as_deref().unwrap(), zone.size)?,
            _ => MmapMut::map_anon(usize::try_from(memory.size).unwrap()).unwrap(),
        };
        let port = self.port.take().unwrap();
        Ok(match registers {
            None => Guest::boot(mapped, port),
            Some(registers) => Guest::restore(mapped, port, registers),
        })
    }

    fn pause(&mut self) -> Answer {
        const PAUSE: &str = "The VM could not be paused";
        match &mut self.vm {
            None => refuse(&[PAUSE, "VM is not running"]),
            Some(vm) if !vm.running => {
                refuse(&[PAUSE, "Invalid transition: InvalidStateTransition(Paused, Paused)"])
            }
            Some(vm) => {
                vm.running = false;
                self.tell("vm", "paused");
                Ok(None)
            }
        }
    }

    fn resume(&mut self) -> Answer {
        const RESUME: &str = "The VM could not resume";
        match &mut self.vm {
            None => refuse(&[RESUME, "VM is not running"]),
            Some(vm) if vm.running => {
                refuse(&[RESUME, "Invalid transition: InvalidStateTransition(Running, Running)"])
            }
            Some(vm) => {
                vm.running = true;
                self.tell("vm", "resumed");
                Ok(None)
            }
        }
    }

    fn snapshot(&mut self, url: &str) -> Answer {
        const SNAPSHOT: &str = "The VM could not be snapshotted";
        let vm = match &self.vm {
            None => return refuse(&[SNAPSHOT, "VM is not running"]),
            Some(vm) if vm.running => return refuse(&[SNAPSHOT, "Trying to snapshot while VM is running"]),
            Some(vm) => vm,
        };
        let dir = folder(url).map_err(|error| refusal(&[SNAPSHOT, &error]))?;
        let mut config = self.config.clone().unwrap();
        let spoilt = self.orders.take("snapshot").unwrap_or_default();
        let named = config.memory.zones.as_deref().is_some_and(|zones| zones.iter().all(|zone| zone.shared));
        if spoilt == "private" {
            config.memory.zones.as_mut().unwrap()[0].shared = false;
        }
        let mut state = json!({ "snapshots": { "vm": { "registers": vm.guest.registers } } }).to_string();
        if spoilt == "torn" {
            state.truncate(state.len() / 2);
        }
        let write = |name: &str, text: &[u8]| {
            let made = fs::File::options().write(true).create_new(true).mode(0o600).open(dir.join(name));
            made.and_then(|mut file| file.write_all(text))
                .map_err(|error| refusal(&[SNAPSHOT, &error.to_string()]))
        };
        write("config.json", serde_json::to_string(&config).unwrap().as_bytes())?;
        if spoilt != "no-state" {
            write("state.json", state.as_bytes())?;
        }
        if !named || spoilt == "memory" {
            write("memory-ranges", &[0; 4096])?;
        }
        self.tell("vm", "snapshotted");
        Ok(None)
    }

    fn restore(&mut self, asked: &RestoreConfig) -> Answer {
        const RESTORE: &str = "The VM could not be restored";
        if self.config.is_some() {
            return refuse(&[RESTORE, "VM is already created"]);
        }
        if asked.prefault && asked.memory_restore_mode == MemoryRestoreMode::OnDemand {
            return refuse(&[RESTORE, "'prefault' cannot be used with 'ondemand'"]);
        }
        let failed = |why: String| refusal(&[RESTORE, &why]);
        let dir = folder(&asked.source_url).map_err(failed)?;
        let file = |name: &str| {
            fs::read_to_string(dir.join(name)).map_err(|error| refusal(&[RESTORE, name, &error.to_string()]))
        };
        let config: VmConfig = read(&file("config.json")?)?;
        let state: Value = read(&file("state.json")?)?;
        if asked.memory_restore_mode == MemoryRestoreMode::OnDemand {
            // As it was before its pull request 8849.
            file("memory-ranges")?;
        }
        let registers: Result<Registers, _> =
            serde_json::from_value(state["snapshots"]["vm"]["registers"].clone());
        let registers = registers.map_err(|error| failed(error.to_string()))?;
        config.validate().map_err(failed)?;
        self.bind_port(&config).map_err(failed)?;
        self.config = Some(config);
        match self.new_guest(Some(registers)) {
            Ok(guest) => {
                self.vm = Some(Vm { guest, running: asked.resume });
                self.tell("vm", "restored");
                Ok(None)
            }
            Err(error) => {
                self.config = None;
                Err(failed(error))
            }
        }
    }
}

fn read<T: DeserializeOwned>(text: &str) -> Result<T, Refusal> {
    serde_json::from_str(text)
        .map_err(|error| Refusal::new(400, &["Failed to deserialize JSON", &error.to_string()]))
}

/// The folder that is named so (`url_to_path` in `vmm/src/migration.rs`): whatever follows, as it is.
fn folder(url: &str) -> Result<PathBuf, String> {
    let path =
        PathBuf::from(url.strip_prefix("file://").ok_or(format!("Could not extract path from URL: {url}"))?);
    if path.is_dir() { Ok(path) } else { Err(format!("Destination is not a directory: {}", path.display())) }
}
