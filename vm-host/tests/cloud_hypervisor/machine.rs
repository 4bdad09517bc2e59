// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A machine and what is asked of it, when all goes well.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vm_host::definition::Definition;
use vm_host::vmm::cloud_hypervisor::CloudHypervisor;
use vm_host::vmm::process::{Process, ProcessId};
use vm_host::vmm::{Begin, Launch, Machine, Memory, News, Places, RunState, Vmm, VmmError};

use crate::program::{StandIn, count, expect_counting, expect_still, wait_for};

pub(crate) const BYTES: u64 = 32 << 20;

/// A place for machines.
pub(crate) struct Site {
    dir: TempDir,
    pub(crate) stand_in: StandIn,
    pub(crate) places: Places,
    pub(crate) memory: PathBuf,
}

impl Site {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        // What has a meaning in a URL has none in a path.
        let run = dir.path().join("run #1 100%");
        fs::create_dir(&run).unwrap();
        let places = Places {
            control: run.join("control.sock"),
            work: run.join("work"),
            log: dir.path().join("log"),
            console: run.join("console.sock"),
            guest_agent: run.join("agent.sock"),
            vssds: dir.path().to_owned(),
        };
        let memory = dir.path().join("memory");
        File::create(&memory).unwrap().set_len(BYTES).unwrap();
        fs::write(dir.path().join("kernel"), "").unwrap();
        let stand_in = StandIn::make(dir.path());
        Self { dir, stand_in, places, memory }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn plan_with(&self, more: &str) -> Result<Launch, VmmError> {
        let text = format!(
            "name = 'a'\nmemory = '32MiB'\nnvram = 'nv0'\nhypervisor = 'cloud-hypervisor'\nemulator = {:?}\nkernel = {:?}\n{more}",
            self.stand_in.program,
            self.path("kernel"),
        );
        let definition = Definition::parse(&text).unwrap();
        CloudHypervisor.check(&definition).unwrap();
        CloudHypervisor.plan(&definition, &self.places)
    }

    pub(crate) fn plan(&self) -> Launch {
        self.plan_with("").unwrap()
    }

    pub(crate) fn launch(&self, begin: Begin) -> Result<Running, VmmError> {
        self.launch_in(&self.plan(), &self.memory, begin)
    }

    pub(crate) fn launch_in(
        &self,
        launch: &Launch,
        memory: &Path,
        begin: Begin,
    ) -> Result<Running, VmmError> {
        let memory =
            Memory::Named { path: memory.to_owned(), offset: 0, bytes: BYTES, align: None, pmem: false };
        CloudHypervisor.launch(launch, &memory, begin, &self.places).map(|machine| Running(Some(machine)))
    }

    pub(crate) fn adopt(&self, id: &ProcessId) -> Option<Running> {
        CloudHypervisor.adopt(id, &self.places).unwrap().map(|machine| Running(Some(machine)))
    }

    /// A guest that counts.
    pub(crate) fn booted(&self) -> Running {
        let mut machine = self.launch(Begin::Boot).unwrap();
        machine.get().resume().unwrap();
        machine
    }
}

/// A machine that ends with the test, unless it was left.
pub(crate) struct Running(pub(crate) Option<Box<dyn Machine>>);

impl Running {
    pub(crate) fn get(&mut self) -> &mut dyn Machine {
        self.0.as_deref_mut().unwrap()
    }

    pub(crate) fn kill(mut self) {
        self.0.take().unwrap().kill().unwrap();
    }

    /// As a daemon leaves it that ends.
    pub(crate) fn leave(mut self) -> ProcessId {
        self.0.take().unwrap().process().id().clone()
    }

    pub(crate) fn wait_news(&mut self, wanted: &News) {
        wait_for(&format!("{wanted:?}"), || self.get().news().unwrap().contains(wanted));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut machine) = self.0.take() {
            let _ = machine.kill();
        }
    }
}

#[test]
fn guest_goes_on_from_a_saved_state_with_its_memory_elsewhere() {
    let site = Site::new();
    let launch = site.plan();
    let mut machine = site.launch(Begin::Boot).unwrap();
    assert_eq!(machine.get().version(), "53.0");
    assert_eq!(machine.get().run_state().unwrap(), RunState::Stopped);
    assert_eq!(expect_still(&site.memory), 0, "nothing runs before it is told to");
    machine.get().resume().unwrap();
    assert_eq!(machine.get().run_state().unwrap(), RunState::Running);
    expect_counting(&site.memory);

    machine.get().pause().unwrap();
    machine.get().pause().unwrap();
    assert_eq!(machine.get().run_state().unwrap(), RunState::Stopped);
    expect_still(&site.memory);
    let earlier = machine.get().save().unwrap();
    machine.get().resume().unwrap();
    expect_counting(&site.memory);
    machine.get().pause().unwrap();
    let state = machine.get().save().unwrap();
    let left: Vec<_> =
        fs::read_dir(&site.places.work).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "no copy of a state stays: {left:?}");
    let saved_at = count(&site.memory);
    machine.kill();
    assert!(!site.places.work.exists() && !site.places.control.exists());

    let moved = site.path("moved");
    fs::rename(&site.memory, &moved).unwrap();
    let mut machine = site.launch_in(&launch, &moved, Begin::Restore).unwrap();
    assert_eq!(machine.get().run_state().unwrap(), RunState::AwaitsState);
    machine.get().load(&state).unwrap();
    assert_eq!(machine.get().run_state().unwrap(), RunState::Stopped);
    assert_eq!(expect_still(&moved), saved_at);
    machine.get().resume().unwrap();
    expect_counting(&moved);
    machine.kill();

    // The guest would notice memory that is not its own: it does so with that of another time.
    let mut machine = site.launch_in(&launch, &moved, Begin::Restore).unwrap();
    machine.get().load(&earlier).unwrap();
    machine.get().resume().unwrap();
    wait_for("the guest to crash", || machine.get().process().has_ended());
    let said = loop {
        match machine.get().news() {
            Ok(_) => {}
            Err(error) => break error.to_string(),
        }
    };
    assert!(said.contains("the guest has crashed"), "{said}");
}

#[test]
fn next_daemon_finds_a_machine_and_what_it_has_said() {
    let site = Site::new();
    let id = site.booted().leave();
    expect_counting(&site.memory);
    site.stand_in.order("guest", "reboot");
    wait_for("the guest to restart", || site.stand_in.orders_left() == 0);
    let mut machine = site.adopt(&id).unwrap();
    machine.wait_news(&News::Reset);
    assert_eq!(machine.get().run_state().unwrap(), RunState::Running);
    machine.get().pause().unwrap();
    assert!(!machine.get().save().unwrap().is_empty());
    assert!(machine.get().load(b"").is_err(), "it has a state");

    let id = machine.leave();
    let mut machine = site.adopt(&id).unwrap();
    assert_eq!(machine.get().run_state().unwrap(), RunState::Stopped);
    machine.get().resume().unwrap();
    site.stand_in.order("guest", "panic");
    machine.wait_news(&News::Panicked);
    machine.get().power_button().unwrap();
    machine.wait_news(&News::Shutdown);
    assert_eq!(machine.get().run_state().unwrap(), RunState::Off);
    let id = machine.leave();
    let mut machine = site.adopt(&id).unwrap();
    assert_eq!(machine.get().run_state().unwrap(), RunState::Off, "not one that was never booted");
    assert!(machine.get().resume().is_err(), "nobody boots it by mistake");
    machine.kill();
    assert!(site.adopt(&id).is_none());
}

#[test]
fn machine_that_was_never_booted_is_not_taken_for_one_that_is_off() {
    let site = Site::new();
    let id = site.launch(Begin::Boot).unwrap().leave();
    let mut machine = site.adopt(&id).unwrap();
    assert_eq!(machine.get().run_state().unwrap(), RunState::Stopped);
    machine.get().resume().unwrap();
    expect_counting(&site.memory);
}

#[test]
fn machine_that_nobody_knows_is_ended() {
    let site = Site::new();
    CloudHypervisor.end_orphan(&site.places).unwrap();
    for begin in [Begin::Boot, Begin::Restore] {
        let id = site.launch(begin).unwrap().leave();
        CloudHypervisor.end_orphan(&site.places).unwrap();
        wait_for("it to end", || Process::find(&id).unwrap().is_none());
        CloudHypervisor.end_orphan(&site.places).unwrap();
    }
}
