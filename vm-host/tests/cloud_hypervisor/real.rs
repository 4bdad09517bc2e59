// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The program itself, where it and KVM are: what the stand-in is believed to do, done.
//!
//! `CLOUD_HYPERVISOR` names the program, `CLOUD_HYPERVISOR_KERNEL` a kernel that it boots. That needs no file system: it waits for one
//! that never comes (`rootwait`), and keeps the time meanwhile.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vm_host::definition::Definition;
use vm_host::vmm::cloud_hypervisor::CloudHypervisor;
use vm_host::vmm::{Begin, Launch, Memory, Places, RunState, Vmm};

use crate::machine::Running;
use crate::program::wait_for;

const BYTES: u64 = 256 << 20;

/// The program and a kernel, or what is missing.
fn found() -> Result<(PathBuf, PathBuf), String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let program = env::var_os("CLOUD_HYPERVISOR").map(PathBuf::from).or_else(|| {
        env::split_paths(&path).map(|dir| dir.join("cloud-hypervisor")).find(|file| file.is_file())
    });
    let program = program.ok_or("no cloud-hypervisor here")?;
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(|error| format!("no KVM here: {error}"))?;
    let kernel = env::var_os("CLOUD_HYPERVISOR_KERNEL").map(PathBuf::from).or_else(|| {
        let mut kernels: Vec<PathBuf> = fs::read_dir("/boot")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.to_string_lossy().contains("vmlinuz"))
            .filter(|path| File::open(path).is_ok())
            .collect();
        kernels.sort();
        kernels.pop()
    });
    Ok((program, kernel.ok_or("no kernel here for cloud-hypervisor: name one with CLOUD_HYPERVISOR_KERNEL")?))
}

/// Whether the guest says something on its serial port.
fn speaks(console: &Path) -> bool {
    let Ok(mut port) = UnixStream::connect(console) else { return false };
    port.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    port.read(&mut [0; 64]).is_ok_and(|count| count > 0)
}

fn launch(launch: &Launch, memory: &Path, begin: Begin, places: &Places) -> Running {
    let memory = Memory::Named { path: memory.to_owned(), offset: 0, bytes: BYTES, align: None, pmem: false };
    Running(Some(CloudHypervisor.launch(launch, &memory, begin, places).unwrap()))
}

#[test]
fn program_itself_saves_a_guest_and_lets_it_go_on() {
    let (program, kernel) = match found() {
        Ok(found) => found,
        // Past the test runner's capture, for `cargo xtask test` to sum up.
        Err(why) => return io::stderr().write_all(format!("\nNOT RUN: {why}\n").as_bytes()).unwrap(),
    };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| dir.path().join(name);
    let places = Places {
        control: at("control.sock"),
        work: at("work"),
        log: at("log"),
        console: at("console.sock"),
        guest_agent: at("agent.sock"),
        vssds: dir.path().to_owned(),
    };
    for name in ["memory", "moved"] {
        File::create(at(name)).unwrap().set_len(BYTES).unwrap();
    }
    let text = format!(
        "name = 'a'\nmemory = '256MiB'\nnvram = 'nv0'\nhypervisor = 'cloud-hypervisor'\nemulator = {program:?}\nkernel = {kernel:?}\n\
         cmdline = 'console=ttyS0 root=/dev/vda rootwait'\n"
    );
    let definition = Definition::parse(&text).unwrap();
    CloudHypervisor.check(&definition).unwrap();
    let planned = CloudHypervisor.plan(&definition, &places).unwrap();

    let mut machine = launch(&planned, &at("memory"), Begin::Boot, &places);
    assert_eq!(machine.get().run_state().unwrap(), RunState::Stopped);
    machine.get().resume().unwrap();
    assert!(speaks(&places.console), "{}", fs::read_to_string(&places.log).unwrap());
    let id = machine.leave();
    let mut machine = Running(CloudHypervisor.adopt(&id, &places).unwrap());
    assert_eq!(machine.get().run_state().unwrap(), RunState::Running);
    machine.get().pause().unwrap();
    machine.get().pause().unwrap();
    let earlier = machine.get().save().unwrap();
    machine.get().resume().unwrap();
    assert_eq!(machine.get().run_state().unwrap(), RunState::Running);
    machine.get().pause().unwrap();
    let state = machine.get().save().unwrap();
    assert_ne!(state, earlier);
    machine.kill();

    fs::copy(at("memory"), at("moved")).unwrap();
    let mut machine = launch(&planned, &at("moved"), Begin::Restore, &places);
    assert_eq!(machine.get().run_state().unwrap(), RunState::AwaitsState);
    machine.get().load(&state).unwrap();
    assert_eq!(machine.get().run_state().unwrap(), RunState::Stopped);
    let before = fs::read(at("moved")).unwrap();
    machine.get().resume().unwrap();
    wait_for("the guest to change its memory", || fs::read(at("moved")).unwrap() != before);
    assert_eq!(machine.get().run_state().unwrap(), RunState::Running);
    let id = machine.leave();
    CloudHypervisor.end_orphan(&places).unwrap();
    wait_for("it to end", || CloudHypervisor.adopt(&id, &places).unwrap().is_none());
}
