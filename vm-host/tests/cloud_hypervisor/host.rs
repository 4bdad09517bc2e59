// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The whole daemon, with a guest that counts behind it.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use vm_host::definition::Hypervisor;
use vm_host::record::Records;

use crate::program::{PATIENCE, StandIn, count, expect_counting, expect_still, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vm-host");
const MEMORY: &str = "32MiB";
const BYTES: u64 = 32 << 20;

struct Host {
    dir: TempDir,
    stand_in: StandIn,
    daemon: Option<Child>,
}

impl Host {
    /// A host with one guest, `db`, that runs.
    fn with_guest() -> Self {
        let mut host = Self::new();
        host.start_daemon();
        host.define("db", &host.definition("db", "")).unwrap();
        host.ok(&["start", "db"]);
        expect_counting(&host.memory());
        host
    }

    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let stand_in = StandIn::make(dir.path());
        let host = Self { dir, stand_in, daemon: None };
        for name in ["nv", "kernel"] {
            fs::create_dir(host.path(name)).unwrap();
        }
        fs::File::create(host.path("device")).unwrap().set_len(256 << 20).unwrap();
        let at = |name: &str| host.path(name).display().to_string();
        let config = format!(
            "state_dir = '{}'\nruntime_dir = '{}'\nlog_dir = '{}'\n[power]\ndisarm_after_ms = 100\nresume_after_ms = 100\n\
             [[nvram]]\nname = 'nv0'\npath = '{}'\ndeclared_persistent = true\n\
             [[nvram]]\nname = 'device'\npath = '{}'\ndeclared_persistent = true\n",
            at("state"),
            at("run"),
            at("log"),
            at("nv"),
            at("device"),
        );
        fs::write(host.path("vm-host.toml"), config).unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn definition(&self, name: &str, more: &str) -> String {
        format!(
            "name = '{name}'\nmemory = '{MEMORY}'\nnvram = 'nv0'\nhypervisor = 'cloud-hypervisor'\nemulator = {:?}\nkernel = {:?}\n{more}",
            self.stand_in.program,
            self.path("kernel"),
        )
    }

    /// The file with the guest's memory: the largest, for a saved state has half of it.
    fn memory(&self) -> PathBuf {
        let files = fs::read_dir(self.path("nv")).unwrap().map(|entry| entry.unwrap());
        files.into_iter().find(|file| file.metadata().unwrap().len() == BYTES).unwrap().path()
    }

    // ---- the daemon ----

    fn start_daemon(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.path("daemon.log")).unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("serve").arg("--config").arg(self.path("vm-host.toml")).stderr(log);
        self.daemon = Some(command.stdout(Stdio::null()).spawn().unwrap());
        wait_for("the daemon to answer", || self.call(&["list"]).status.success());
    }

    /// `kill -9`
    fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }

    /// The machines of this host that there are.
    fn machines(&self) -> Vec<Pid> {
        let mark = self.path("orders").display().to_string();
        let all = fs::read_dir("/proc").unwrap().flatten();
        let all = all.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
        all.filter(|&pid| String::from_utf8_lossy(&line_of(pid)).contains(&mark)).collect()
    }

    /// `kill -9` of every one.
    fn kill_machines(&self) {
        for pid in self.machines() {
            let _ = kill_process(pid, Signal::KILL);
            wait_for("a machine to end", || line_of(pid).is_empty());
        }
    }

    // ---- operators ----

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("--socket").arg(self.path("run/control.sock")).args(["--json", "--timeout", "60s"]);
        command.args(words);
        command
    }

    fn call(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Moments from before a save begins until after it is over, as fast as it is here, in no order.
    fn moments(&self, how_many: u32) -> impl Iterator<Item = Duration> + use<> {
        let begun = Instant::now();
        self.ok(&["save", "db"]);
        let took = begun.elapsed();
        self.ok(&["restore", "db"]);
        (0..how_many).map(move |at| took * (at * 7 % how_many) * 3 / 2 / how_many)
    }

    /// Gives an order and kills the daemon so much later, wherever it is by then.
    fn interrupt(&mut self, words: &[&str], after: Duration) {
        let mut order = self.command(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(after);
        self.kill_daemon();
        order.wait().unwrap();
    }

    fn ok(&self, words: &[&str]) -> Value {
        let output = self.call(words);
        let said = String::from_utf8_lossy(&output.stderr);
        let log = fs::read_to_string(self.path("daemon.log")).unwrap_or_default();
        assert!(output.status.success(), "{words:?}: {said}\n{log}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What a command that fails says.
    fn refused(&self, words: &[&str]) -> Value {
        let output = self.call(words);
        assert!(!output.status.success(), "{words:?}");
        serde_json::from_slice::<Value>(&output.stderr).unwrap()["error"].take()
    }

    fn define(&self, name: &str, text: &str) -> Result<(), Value> {
        let path = self.path(&format!("{name}.toml"));
        fs::write(&path, text).unwrap();
        let output = self.call(&["define", path.to_str().unwrap()]);
        if output.status.success() {
            return Ok(());
        }
        Err(serde_json::from_slice::<Value>(&output.stderr).unwrap()["error"].take())
    }

    fn show(&self) -> Value {
        self.ok(&["show", "db"])["vm"].take()
    }

    fn state(&self) -> String {
        self.show()["state"].as_str().unwrap().to_owned()
    }

    fn wait_state(&self, state: &str) {
        wait_for(state, || self.state() == state);
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.show()["pid"].as_i64().unwrap()).unwrap()
    }

    fn events(&self) -> String {
        String::from_utf8(self.call(&["events"]).stdout).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill_daemon();
        for pid in self.machines() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// The command line of a process; none once it has ended.
fn line_of(pid: Pid) -> Vec<u8> {
    fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default()
}

#[test]
fn guest_that_was_saved_goes_on_after_the_power_was_gone() {
    let mut host = Host::with_guest();
    assert_eq!(host.show()["machine"], "cloud-hypervisor");
    host.ok(&["save", "db"]);
    let saved_at = expect_still(&host.memory());
    assert_eq!(host.state(), "saved");
    host.ok(&["restore", "db"]);
    assert!(expect_counting(&host.memory()) >= saved_at);

    // Held, with its machine: the power goes, and all that runs with it.
    host.ok(&["power", "test", "critical"]);
    host.wait_state("saved");
    let saved_at = expect_still(&host.memory());
    host.kill_machines();
    host.kill_daemon();
    host.start_daemon();
    assert_eq!(host.state(), "running");
    assert!(expect_counting(&host.memory()) >= saved_at);
    // A state counts once.
    host.kill_machines();
    host.wait_state("lost");
    assert_eq!(host.refused(&["restore", "db"])["code"], "E_WRONG_STATE");
}

#[test]
fn guest_that_is_held_goes_on_in_its_machine_when_the_power_is_back() {
    let host = Host::with_guest();
    let pid = host.pid();
    host.ok(&["power", "test", "critical"]);
    host.wait_state("saved");
    let saved_at = expect_still(&host.memory());
    host.ok(&["power", "test", "online"]);
    host.wait_state("running");
    assert!(expect_counting(&host.memory()) >= saved_at);
    assert_eq!(host.pid(), pid);
}

#[test]
fn guest_does_not_notice_that_the_daemon_is_killed() {
    let mut host = Host::with_guest();
    let pid = host.pid();
    host.kill_daemon();
    expect_counting(&host.memory());
    host.start_daemon();
    assert_eq!((host.state().as_str(), host.pid()), ("running", pid));
    host.ok(&["save", "db"]);
    host.kill_daemon();
    // Nothing of a machine is needed: it may have been another boot.
    fs::remove_dir_all(host.path("run")).unwrap();
    host.start_daemon();
    assert_eq!(host.state(), "saved");
    host.ok(&["restore", "db"]);
    expect_counting(&host.memory());
}

#[test]
fn guest_outlives_daemons_that_are_killed_in_the_middle_of_things() {
    let mut host = Host::with_guest();
    let mut seen = BTreeSet::new();
    for (round, after) in host.moments(30).enumerate() {
        let before = count(&host.memory());
        host.interrupt(&["save", "db"], after);
        host.start_daemon();
        let state = host.state();
        seen.insert(format!("{state} after a save"));
        if state == "saved" {
            host.interrupt(&["restore", "db"], after);
            host.start_daemon();
            seen.insert(format!("{} after a restore", host.state()));
            host.ok(&["restore", "db"]);
        }
        assert_eq!(host.state(), "running", "round {round}");
        assert!(expect_counting(&host.memory()) >= before, "round {round}");
    }
    assert!(seen.len() > 2, "no two rounds ended otherwise: {seen:?}");
}

#[test]
fn power_that_goes_in_the_middle_of_things_leaves_a_guest_that_is_whole_or_none() {
    let mut host = Host::with_guest();
    let mut seen = BTreeSet::new();
    for (round, after) in host.moments(20).enumerate() {
        let before = count(&host.memory());
        host.interrupt(&["save", "db"], after);
        host.kill_machines();
        host.start_daemon();
        let state = host.state();
        match state.as_str() {
            "saved" | "running" => {
                host.ok(&["restore", "db"]);
                assert!(expect_counting(&host.memory()) >= before, "round {round}");
            }
            _ => {
                assert_eq!(state, "lost", "round {round}");
                host.ok(&["discard", "db", "--yes"]);
                host.ok(&["start", "db"]);
            }
        }
        seen.insert(state);
    }
    assert!(seen.len() > 1, "no two rounds ended otherwise: {seen:?}");
}

#[test]
fn guest_is_met_by_the_hypervisor_that_made_it() {
    let mut host = Host::with_guest();
    let pid = host.pid();
    host.kill_daemon();
    let records = Records::open(&host.path("state/vms")).unwrap();
    let mut record = records.all().unwrap().remove(0).1.unwrap();
    record.definition.hypervisor = Hypervisor::Qemu;
    records.write(&record).unwrap();
    host.start_daemon();
    assert_eq!((host.state().as_str(), host.pid()), ("running", pid));
    host.ok(&["save", "db"]);
    host.ok(&["restore", "db"]);
    expect_counting(&host.memory());
}

#[test]
fn guest_goes_to_secondary_storage_and_comes_back_elsewhere() {
    let host = Host::with_guest();
    host.ok(&["save", "db"]);
    let (before, saved_at) = (host.memory(), count(&host.memory()));
    host.ok(&["swap-out", "db"]);
    assert!(!before.exists());
    // Its place is taken by another's.
    host.define("other", &host.definition("other", "").replace(MEMORY, "64MiB")).unwrap();
    host.ok(&["start", "other"]);
    host.ok(&["swap-in", "db"]);
    let now = host.memory();
    assert_ne!(now, before, "the zone is another file");
    assert_eq!(count(&now), saved_at);
    host.ok(&["restore", "db"]);
    expect_counting(&now);
    host.ok(&["stop", "other", "--kill", "--yes"]);
}

#[test]
fn what_the_guest_does_is_heard() {
    let host = Host::with_guest();
    let console = || fs::read_to_string(host.path("log/db.console")).unwrap_or_default();
    wait_for("words on the serial port", || console().contains("count "));
    host.stand_in.order("guest", "panic");
    wait_for("its panic", || host.events().contains("vm.panicked"));
    host.stand_in.order("guest", "reboot");
    wait_for("its restart", || host.events().contains("vm.reset"));
    assert_eq!(host.state(), "running");
    let said = console().len();
    wait_for("words after the restart", || console().len() > said + 20);
    let begun = Instant::now();
    host.ok(&["stop", "db"]);
    assert!(begun.elapsed() < PATIENCE, "it has not heard the button");
    assert_eq!(host.state(), "stopped");
    host.ok(&["start", "db"]);
    host.stand_in.order("guest", "poweroff");
    host.wait_state("stopped");
    assert_eq!(host.show()["why"], "the guest turned itself off");
}

#[test]
fn save_that_copies_memory_fails_and_the_guest_is_whole() {
    let host = Host::with_guest();
    host.stand_in.order("snapshot", "memory");
    let error = host.refused(&["save", "db"]);
    assert_eq!(error["code"], "E_STATE");
    assert!(error["message"].as_str().unwrap().contains("its memory was copied"), "{error}");
    assert_eq!(host.state(), "paused");
    host.ok(&["restore", "db"]);
    expect_counting(&host.memory());

    // A restore that fails has changed nothing, and can be tried again.
    host.ok(&["save", "db"]);
    for (call, order) in
        [("start", ""), ("vm.restore", "refuse"), ("vm.restore", "die"), ("vm.restore", "nonsense")]
    {
        host.stand_in.order(call, order);
        host.refused(&["restore", "db"]);
        assert_eq!(host.state(), "saved", "{call} {order}");
    }
    host.ok(&["restore", "db"]);
    expect_counting(&host.memory());
}

#[test]
fn saved_state_that_was_damaged_is_not_used() {
    let mut host = Host::with_guest();
    host.ok(&["save", "db"]);
    host.kill_daemon();
    let slot = fs::read_dir(host.path("nv"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| fs::metadata(path).unwrap().len() == 16 << 20)
        .unwrap();
    let mut bytes = fs::read(&slot).unwrap();
    let at = bytes.windows(9).position(|nine| nine == b"registers").unwrap();
    bytes[at] ^= 1;
    fs::write(&slot, bytes).unwrap();
    host.start_daemon();
    assert_eq!(host.state(), "lost");
    assert_ne!(count(&host.memory()), 0, "its memory is kept");
    host.ok(&["discard", "db", "--yes"]);
    host.ok(&["start", "db"]);
    expect_counting(&host.memory());
}

#[test]
fn start_that_fails_leaves_the_vm_stopped_and_says_why() {
    let mut host = Host::new();
    host.start_daemon();
    host.define("db", &host.definition("db", "")).unwrap();
    for (call, order, code) in [
        ("start", "", "E_VMM"),
        ("vm.create", "refuse", "E_VMM"),
        ("vm.boot", "refuse", "E_VMM"),
        ("vm.boot", "die", "E_VMM"),
        ("--version", "cloud-hypervisor v40.0", "E_VMM"),
    ] {
        host.stand_in.order(call, order);
        assert_eq!(host.refused(&["start", "db"])["code"], code, "{call} {order}");
        assert_eq!(host.state(), "stopped", "{call} {order}");
    }
    host.ok(&["start", "db"]);
    expect_counting(&host.memory());
}

#[test]
fn what_it_cannot_make_is_refused_when_it_is_defined() {
    let mut host = Host::new();
    host.start_daemon();
    for (more, key, hint) in [
        ("guest_agent = true", "guest_agent", "leave it out"),
        ("[[disk]]\npath = '/d'", "disk.0.cache", "vSSD"),
        ("[[network]]\nnetdev = 'user'", "network.0.netdev", "tap"),
    ] {
        let error = host.define("db", &host.definition("db", more)).unwrap_err();
        assert_eq!(error["code"], "E_INVALID_PARAMS");
        assert!(
            error["message"].as_str().unwrap().starts_with(&format!("{key}: cloud-hypervisor ")),
            "{error}"
        );
        assert!(error["hint"].as_str().unwrap().contains(hint), "{error}");
    }
    let on_device = host.definition("db", "").replace("'nv0'", "'device'");
    let error = host.define("db", &on_device).unwrap_err();
    assert!(error["message"].as_str().unwrap().contains("one device for all"), "{error}");
    assert!(error["hint"].as_str().unwrap().contains("directory"), "{error}");
    // QEMU can, from 8.1 on.
    let qemu = "name = 'db'\nmemory = '32MiB'\nnvram = 'device'\n";
    host.define("db", qemu).unwrap();
}
