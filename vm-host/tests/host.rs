// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A host's VMs, with hypervisors that are none.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::fd::OwnedFd;
use tempfile::TempDir;
use vm_host::config::{Config, VssdConfig};
use vm_host::definition::{Definition, Hypervisor};
use vm_host::fault::Fault;
use vm_host::host::Host;
use vm_host::nvram::MediumConfig;
use vm_host::record::{Incarnation, Life, Record, Records, Wanted};
use vm_host::vm::{Order, Tell, VmNews, VmState};
use vm_host::vmm::Launch;
use vm_host::vmm::process::{Process, ProcessId};
use vssd_protocol::control::ErrorCode;

#[derive(Debug)]
struct Nobody;

impl Tell for Nobody {
    fn tell(&self, _vm: &str, _news: VmNews) {}

    fn sync_vssds(&self, _definition: &Definition) -> Result<(), Fault> {
        Ok(())
    }
}

fn launch() -> Launch {
    Launch {
        hypervisor: Hypervisor::Qemu,
        program: "/q".into(),
        args: Vec::new(),
        config: None,
        machine: "pc".to_owned(),
        version: "1.0".to_owned(),
    }
}

fn config(dir: &TempDir) -> Config {
    let place = |name: &str| dir.path().join(name);
    let config = Config {
        state_dir: place("state"),
        runtime_dir: place("run"),
        log_dir: place("log"),
        vssd: VssdConfig { runtime_dir: place("vssd") },
        ..Config::default()
    };
    fs::create_dir(&config.log_dir).unwrap();
    config
}

fn open(config: &Config) -> Host {
    Host::open(config, Arc::new(Nobody)).unwrap()
}

fn define(host: &Host, more: &str) {
    host.define(&format!("name = 'db'\nmemory = '64MiB'\n{more}"), false).unwrap();
}

#[test]
fn vm_on_a_medium_that_could_not_be_opened_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&dir);
    let foreign = dir.path().join("foreign");
    fs::write(&foreign, vec![1; 4 << 20]).unwrap();
    config.nvram = vec![MediumConfig::new("nv0", &foreign)];
    let host = open(&config);
    define(&host, "nvram = 'nv0'");
    let said = host.media()[0].nvram.as_ref().unwrap_err();
    for order in [Order::Undefine, Order::Recover] {
        let fault = host.order("db", order).unwrap_err();
        assert_eq!((fault.code, &fault.message, &fault.hint), (ErrorCode::Media, &said.message, &said.hint));
    }
    host.define("name = 'other'\nmemory = '64MiB'\nnvram = 'nv1'", false).unwrap();
    let fault = host.order("other", Order::Undefine).unwrap_err();
    assert_eq!(fault.code, ErrorCode::NotFound);
}

#[test]
fn vssd_without_a_named_socket_is_looked_for_where_the_back_end_serves_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&dir);
    let (emulator, args) = (dir.path().join("qemu"), dir.path().join("args"));
    // It is asked about itself and its machines, and then notes how it is started, and ends.
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n--version) echo 'QEMU emulator version 10.0.2' ;;\n\
        '-machine help') echo 'q35  Standard PC (alias of pc-q35-10.0)' ;;\n*) echo \"$@\" > {args:?}; exit 1 ;;\nesac\n"
    );
    fs::write(&emulator, script).unwrap();
    fs::set_permissions(&emulator, fs::Permissions::from_mode(0o700)).unwrap();
    let host = open(&config);
    let vssds = "[[vssd]]\nname = 'data'\n[[vssd]]\nname = 'log'\nsocket = '/s'";
    define(&host, &format!("emulator = {emulator:?}\n{vssds}"));
    host.start("db").unwrap_err();
    let args = fs::read_to_string(&args).unwrap();
    // As vssd-backend has it: `<runtime_dir>/dev/NAME.sock`.
    for (id, path) in
        [("vssd0", dir.path().join("vssd/dev/data.sock")), ("vssd1", Path::new("/s").to_owned())]
    {
        let wanted = format!("socket,id={id},path={},", path.display());
        assert!(args.contains(&wanted), "{wanted} in {args}");
    }
}

#[test]
fn machine_that_does_not_answer_can_be_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&dir);
    let control = config.runtime_dir.join("vms/db/control.sock");
    fs::create_dir_all(control.parent().unwrap()).unwrap();
    // As QEMU has it; but it never says anything.
    let socket = OwnedFd::from(UnixListener::bind(&control).unwrap());
    let mut hung = Command::new("sleep").arg("60").stdin(Stdio::from(socket)).spawn().unwrap();
    let process = Process::of_pid(hung.id()).unwrap();
    let mut record = Record::new(Definition::parse("name = 'db'\nmemory = '64MiB'").unwrap());
    let incarnation = Incarnation::random().unwrap();
    record.life = Life::Live { incarnation, launch: launch(), process: Some(process.id().clone()) };
    record.wanted = Wanted::Running;
    Records::open(&config.state_dir.join("vms")).unwrap().write(&record).unwrap();

    let host = open(&config);
    assert_eq!(host.order("db", Order::Discard).unwrap().state, VmState::Stopped);
    assert!(process.has_ended());
    host.undefine("db").unwrap();
    let _ = hung.wait();
}

#[test]
fn another_process_of_the_same_number_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(&dir);
    let mut stranger = Command::new("sleep").arg("60").spawn().unwrap();
    let process = Process::of_pid(stranger.id()).unwrap();
    let mut record = Record::new(Definition::parse("name = 'db'\nmemory = '64MiB'").unwrap());
    let noted = ProcessId { began: process.id().began + 1, ..process.id().clone() };
    let incarnation = Incarnation::random().unwrap();
    record.life = Life::Live { incarnation, launch: launch(), process: Some(noted) };
    Records::open(&config.state_dir.join("vms")).unwrap().write(&record).unwrap();

    assert_eq!(open(&config).order("db", Order::Discard).unwrap().state, VmState::Stopped);
    assert!(!process.has_ended());
    stranger.kill().unwrap();
    let _ = stranger.wait();
}
