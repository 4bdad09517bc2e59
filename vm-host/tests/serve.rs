// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The daemon as it is started, and its command: both are the same program.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vm-host");

struct Daemon {
    dir: TempDir,
    /// A medium in memory, whose operator vouches for it.
    _nvram: TempDir,
    child: Child,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let nvram = tempfile::tempdir_in("/dev/shm").unwrap();
        let config = write_config(dir.path(), nvram.path());
        let child = serve(&config).stderr(Stdio::null()).spawn().unwrap();
        let daemon = Self { dir, _nvram: nvram, child };
        let give_up = Instant::now() + Duration::from_secs(20);
        while !daemon.run(&["version", "--json"]).contains("\"server\":{") {
            assert!(Instant::now() < give_up, "the daemon does not answer");
            thread::sleep(Duration::from_millis(20));
        }
        daemon
    }

    fn command(&self, args: &[&str]) -> Output {
        let socket = self.dir.path().join("run/control.sock");
        Command::new(PROGRAM).args(args).env("VM_HOST_SOCKET", socket).output().unwrap()
    }

    fn run(&self, args: &[&str]) -> String {
        String::from_utf8(self.command(args).stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.run(args)).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_config(dir: &Path, nvram: &Path) -> PathBuf {
    let path = dir.join("vm-host.toml");
    let place = |name: &str| dir.join(name).display().to_string();
    let text = format!(
        "state_dir = {:?}\nruntime_dir = {:?}\nlog_dir = {:?}\n[[nvram]]\nname = 'nv0'\npath = {nvram:?}\ndeclared_persistent = true\n",
        place("state"),
        place("run"),
        place("log")
    );
    fs::write(&path, text).unwrap();
    path
}

fn serve(config: &Path) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("serve").arg("--config").arg(config);
    command
}

#[test]
fn vm_is_defined_shown_and_removed() {
    let mut daemon = Daemon::start();
    let file = daemon.dir.path().join("db.toml");
    fs::write(&file, "name = 'db'\nmemory = '64MiB'\nnvram = 'nv0'\n").unwrap();
    let file = file.to_str().unwrap().to_owned();
    assert_eq!(daemon.run(&["define", &file]), "db is defined: 64 MiB, 1 CPUs, persistent on nv0\n");
    let again = daemon.command(&["define", &file]);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8(again.stderr).unwrap().starts_with("error[E_EXISTS]"));
    let list = daemon.json(&["list", "--json"]);
    assert_eq!((&list["vms"][0]["name"], &list["vms"][0]["state"]), (&json!("db"), &json!("stopped")));
    assert!(daemon.run(&["show", "db"]).contains("64 MiB"));
    assert_eq!(daemon.json(&["nvram", "list", "--json"])["media"][0]["name"], "nv0");
    assert!(daemon.run(&["nvram", "list"]).contains("nv0"));
    assert_eq!(daemon.json(&["power", "status", "--json"])["power"]["state"], "online");
    assert!(daemon.run(&["power", "status"]).contains("in time"));
    let probed = daemon.dir.path().to_str().unwrap().to_owned();
    assert!(daemon.run(&["nvram", "probe", &probed]).contains("directory"));
    assert_eq!(daemon.run(&["undefine", "db", "--yes"]), "db is removed\n");
    assert_eq!(daemon.command(&["show", "db"]).status.code(), Some(3));
    // A test of the power is heard, and said to subscribers.
    assert_eq!(daemon.command(&["power", "test", "on-battery"]).status.code(), Some(0));
    let give_up = Instant::now() + Duration::from_secs(20);
    while !daemon.run(&["events", "--type", "power."]).contains("power.state") {
        assert!(Instant::now() < give_up, "no event");
        thread::sleep(Duration::from_millis(20));
    }

    let pid = Pid::from_child(&daemon.child);
    kill_process(pid, Signal::TERM).unwrap();
    assert!(daemon.child.wait().unwrap().success(), "an end that was asked for is none that failed");
}

#[test]
fn configuration_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("bad.toml");
    fs::write(&config, "colour = 'red'\n").unwrap();
    let ended = serve(&config).output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(2), "{said}");
    assert!(said.starts_with("error[E_CONFIG]: ") && said.contains("colour"), "{said}");
}

#[test]
fn second_daemon_does_not_start() {
    let daemon = Daemon::start();
    let ended = serve(&daemon.dir.path().join("vm-host.toml")).output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("another vm-host"), "{said}");
}
