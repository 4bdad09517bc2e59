// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The built command against a daemon of its channel whose VMs are only words: what it asks, what it prints, how it ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use control_server::blocking::{Access, Feed, Listeners, Service, serve};
use control_server::{About, Clock, Door, Fault, Peer, bind, rpc};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use vm_host::wire::{
    self, DefineParams, NameParams, PowerTestParams, ProbeParams, Stage, StopParams, method,
};
use vssd_protocol::control::ErrorCode;

/// Long enough for the command to look how far it is.
const LONG_WORK: Duration = Duration::from_millis(1700);

/// Plays the daemon.
struct Words {
    feed: Feed,
    log_dir: PathBuf,
    /// What `vm.show` says of work under way.
    work: Mutex<Option<Value>>,
    /// What was asked, in its own words.
    heard: Mutex<Vec<String>>,
}

fn status(name: &str, work: Option<Value>) -> Value {
    let mut status = json!({
        "name": name, "state": "running", "wanted": "running", "why": "booted", "memory_bytes": 1u64 << 30,
        "cpus": 2, "nvram": "nv0", "priority": 5, "vssds": ["data"], "pid": 42,
        "last_save": {
            "unix_ms": 0, "state_bytes": 65536, "stop_us": 1000, "save_us": 2000, "commit_us": 300, "flush_us": 40
        },
        "from_a_newer_daemon": true,
    });
    if let Some(work) = work {
        status["work"] = work;
    }
    status
}

impl Service for Words {
    fn access(&self, method: &str) -> Option<Access> {
        method::access(method)
    }

    fn call(&self, door: Door, _: Peer, method: &str, params: Map<String, Value>) -> Result<Value, Fault> {
        let hear = |word: String| self.heard.lock().unwrap().push(word);
        match method {
            method::HELLO => Ok(json!({
                "server": "vm-host", "version": "9.9.9", "schema": wire::SCHEMA, "pid": 1, "uptime_ms": 5,
                "socket": door.name(), "max_line_bytes": door.max_line(), "log_dir": self.log_dir,
            })),
            method::VM_LIST => {
                rpc::nothing(params)?;
                let error = json!({ "code": "E_MEDIA", "message": "it is no record" });
                let unreadable = json!([{ "name": "old", "error": error }]);
                Ok(json!({ "vms": [status("db", None)], "unreadable": unreadable }))
            }
            method::VM_SHOW => {
                let NameParams { name } = rpc::read(params)?;
                if name == "nobody" {
                    return Err(
                        Fault::new(ErrorCode::NotFound, "there is no VM \"nobody\"").hint("look again")
                    );
                }
                Ok(status(&name, self.work.lock().unwrap().clone()))
            }
            method::VM_DEFINE => {
                let DefineParams { definition, replace } = rpc::read(params)?;
                hear(format!("define {replace} {definition}"));
                Ok(status("db", None))
            }
            method::VM_STOP => {
                let params: StopParams = rpc::read(params)?;
                hear(format!("stop {} {}", params.name, params.grace_ms()));
                Ok(status(&params.name, None))
            }
            method::VM_SWAP_OUT => {
                let NameParams { name } = rpc::read(params)?;
                let work = json!({ "doing": "swapping out", "done_bytes": 1 << 20, "total_bytes": 1 << 30 });
                *self.work.lock().unwrap() = Some(work);
                thread::sleep(LONG_WORK);
                *self.work.lock().unwrap() = None;
                Ok(status(&name, None))
            }
            method::VM_START => Err(Fault::new(ErrorCode::Budget, "it would not be saved in time")),
            method::VM_UNDEFINE | method::VM_SAVE => {
                let NameParams { name } = rpc::read(params)?;
                hear(format!("{method} {name}"));
                Ok(if method == method::VM_SAVE { status(&name, None) } else { json!({}) })
            }
            method::NVRAM_PROBE => {
                let ProbeParams { path, declared_persistent } = rpc::read(params)?;
                hear(format!("probe {} {declared_persistent}", path.display()));
                Ok(json!({
                    "keeps": false, "why": "it is a disk", "advice": "use DAX",
                    "capabilities": { "kind": "directory", "is_dax": false, "alignment_bytes": 2 << 20 },
                }))
            }
            method::NVRAM_LIST => Ok(json!({ "media": [
                { "name": "nv0", "path": "/mnt/pmem0", "usage": { "used_bytes": 0, "free_bytes": 9, "available_bytes": 4096 },
                  "found": { "keeps": true, "notes": ["DAX"], "capabilities": { "kind": "directory" } }, "regions": [] },
                { "name": "nv1", "path": "/dev/x", "error": { "code": "E_MEDIA", "message": "it is gone" } },
            ] })),
            method::POWER_STATUS => Ok(json!({
                "state": "on_battery", "since_ms": 1, "for_ms": 90_000, "reason": { "reason": "on-battery", "source": 0 },
                "on_battery_since_ms": 1, "shutdown_planned": false, "testing": true, "needed_ms": 3,
                "delays_shutdown": true, "last_save_us": null,
                "sources": [{ "name": "ups", "kind": "nut", "state": { "kind": "on-battery", "left_ms": 7 }, "error": "silent" }],
                "plan": { "vms": [{
                    "name": "db", "priority": 5, "measured": true, "steps": {}, "begins_us": 2000, "ends_us": 5340,
                    "fits": false
                }], "total_us": 5340, "usable_us": 5000, "window_us": 6000, "lanes": 1 },
            })),
            method::POWER_TEST => {
                let PowerTestParams { stage } = rpc::read(params)?;
                assert_eq!(stage, Stage::OnBattery);
                Ok(json!({}))
            }
            other => Err(rpc::unknown_method(other)),
        }
    }

    fn feed(&self) -> &Feed {
        &self.feed
    }
}

struct Daemon {
    dir: TempDir,
    words: Arc<Words>,
    shutdown: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let words = Arc::new(Words {
            feed: Feed::new(Clock::start()),
            log_dir: dir.path().to_owned(),
            work: Mutex::default(),
            heard: Mutex::default(),
        });
        let shutdown = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let open = |name: &str| Some(bind(&dir.path().join(name), 0o600, None).unwrap());
        let listeners = Listeners { control: open("control.sock"), monitor: open("monitor.sock") };
        let (service, end): (Arc<dyn Service>, _) = (words.clone(), shutdown.try_clone().unwrap());
        let body = move || serve(listeners, service, end, Duration::from_secs(5)).unwrap();
        Self { dir, words, shutdown, thread: Some(thread::spawn(body)) }
    }

    fn run(&self, args: &[&str]) -> Ended {
        run(&self.dir.path().join("control.sock"), args, "")
    }

    fn heard(&self) -> Vec<String> {
        std::mem::take(&mut *self.words.heard.lock().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        rustix::io::write(&self.shutdown, &1u64.to_ne_bytes()).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

#[derive(Debug)]
struct Ended {
    code: i32,
    out: String,
    err: String,
}

fn run(socket: &Path, args: &[&str], input: &str) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vm-host"));
    command.args(args).env("VM_HOST_SOCKET", socket).env_remove("XDG_RUNTIME_DIR");
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended { code: status.code().unwrap(), out: text(stdout), err: text(stderr) }
}

fn alone(args: &[&str], input: &str) -> Ended {
    run(Path::new("/nonexistent/control.sock"), args, input)
}

const PERSISTENT: &str = "name = 'db'\nmemory = '1GiB'\nnvram = 'nv0'\n";

#[test]
fn list_shows_vms_and_those_that_cannot_be_read() {
    let daemon = Daemon::start();
    let ended = daemon.run(&["list"]);
    let lines: Vec<Vec<&str>> = ended.out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "STATE", "MEMORY", "CPUS", "NVRAM", "PRIORITY", "LAST", "SAVE", "WHY"]);
    assert_eq!(lines[1], ["db", "running", "1", "GiB", "2", "nv0", "5", "3.3", "ms", "booted"]);
    assert_eq!(lines[2][..2], ["old", "unreadable"]);
    let json: Value = serde_json::from_str(&daemon.run(&["list", "--json"]).out).unwrap();
    assert_eq!((&json["schema"], &json["unreadable"][0]["name"]), (&json!("vm-host.v1"), &json!("old")));
    assert_eq!(json["vms"][0]["from_a_newer_daemon"], true, "programs get all there is");
}

#[test]
fn show_is_about_one_vm_and_an_unknown_one_has_its_exit_code() {
    let daemon = Daemon::start();
    let ended = daemon.run(&["show", "db"]);
    assert_eq!(ended.code, 0);
    assert!(
        ended.out.contains("3.3 ms (stop 1.0 ms, state of 64 KiB 2.0 ms, commit 0.3 ms, flush 0.0 ms)"),
        "{ended:?}"
    );
    let ended = daemon.run(&["show", "nobody"]);
    assert_eq!((ended.code, ended.out.as_str()), (3, ""));
    assert_eq!(ended.err, "error[E_NOT_FOUND]: there is no VM \"nobody\"\nhint: look again\n");
    assert_eq!(daemon.run(&["start", "db"]).code, 4, "E_BUDGET is a refusal");
}

#[test]
fn definition_is_sent_as_it_is_written_and_linted_on_the_way() {
    let daemon = Daemon::start();
    let file = daemon.dir.path().join("db.toml");
    let text = format!("{PERSISTENT}[[disk]]\npath = '/d'\ncache = 'unsafe'\n");
    fs::write(&file, &text).unwrap();
    let ended = daemon.run(&["define", file.to_str().unwrap(), "--replace"]);
    assert_eq!((ended.code, ended.out.as_str()), (0, "db is defined: 1 GiB, 2 CPUs, persistent on nv0\n"));
    assert!(ended.err.starts_with("error[disk-cache]: /d: "), "{ended:?}");
    assert_eq!(daemon.heard(), [format!("define true {text}")]);
    let socket = daemon.dir.path().join("control.sock");
    assert_eq!(run(&socket, &["define", "-", "-q"], "x").out, "");
    assert_eq!(daemon.heard(), ["define false x"]);
}

#[test]
fn what_cannot_be_undone_is_asked_for() {
    let daemon = Daemon::start();
    for args in [&["undefine", "db"][..], &["discard", "db"], &["stop", "db", "--kill"]] {
        let ended = daemon.run(args);
        assert_eq!(ended.code, 2, "{ended:?}");
        assert!(ended.err.contains("--yes"), "{ended:?}");
    }
    assert!(daemon.heard().is_empty());
    assert_eq!(daemon.run(&["undefine", "db", "--yes"]).out, "db is removed\n");
    assert_eq!(daemon.run(&["stop", "db", "--kill", "-y"]).code, 0);
    assert_eq!(daemon.run(&["stop", "db", "--grace", "5s"]).code, 0);
    assert_eq!(daemon.run(&["stop", "db"]).code, 0);
    assert_eq!(daemon.run(&["save", "db"]).code, 0);
    assert_eq!(
        daemon.heard(),
        ["vm.undefine db", "stop db 0", "stop db 5000", "stop db 60000", "vm.save db"]
    );
}

#[test]
fn long_work_is_waited_for_and_shown() {
    let daemon = Daemon::start();
    let ended = daemon.run(&["swap-out", "db"]);
    assert_eq!(ended.code, 0);
    assert!(ended.out.starts_with("db is swapped out after 1."), "{ended:?}");
    assert_eq!(ended.err, "db: swapping out, 1 MiB of 1 GiB\n");
    let ended = daemon.run(&["swap-out", "db", "--json"]);
    assert_eq!((ended.err.as_str(), &ended.out[..22]), ("", r#"{"schema":"vm-host.v1""#));
    let begun = Instant::now();
    let ended = daemon.run(&["swap-out", "db", "--timeout", "200ms"]);
    assert_eq!(ended.code, 5, "{ended:?}");
    assert!(begun.elapsed() < LONG_WORK, "it was not waited for");
}

#[test]
fn media_and_power_are_shown() {
    let daemon = Daemon::start();
    let ended = daemon.run(&["nvram", "list"]);
    let lines: Vec<Vec<&str>> = ended.out.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[1], ["nv0", "/mnt/pmem0", "directory", "0", "B", "4", "KiB", "0", "keeps", "DAX"]);
    assert_eq!(lines[2], ["nv1", "/dev/x", "-", "-", "-", "0", "unusable", "it", "is", "gone"]);
    let ended = daemon.run(&["nvram", "probe", "/x", "--declared-persistent"]);
    assert!(ended.out.contains("would be lost") && ended.out.contains("use DAX"), "{ended:?}");
    assert_eq!(daemon.heard(), ["probe /x true"]);
    let ended = daemon.run(&["power", "status"]);
    for words in [
        "on battery for 90 s",
        "NOT ALL IN TIME: after 5.3 ms of 5.0 ms",
        "on-battery, left_ms=7",
        "silent",
        "NO",
    ] {
        assert!(ended.out.contains(words), "{words}: {ended:?}");
    }
    assert_eq!(daemon.run(&["power", "test", "on-battery"]).code, 0);
}

#[test]
fn events_are_printed_with_their_vm() {
    let daemon = Daemon::start();
    daemon.words.feed.tell("vm.state", About::object(wire::EVENT_OBJECT, "db"), json!({ "to": "saved" }));
    daemon.words.feed.tell("power.state", About::NOTHING, json!({ "to": "online" }));
    let ended = daemon.run(&["events", "--type", "vm."]);
    let words: Vec<&str> = ended.out.split_whitespace().skip(1).collect();
    assert_eq!(words, ["1", "vm.state", "db", "to=saved"]);
    assert_eq!(daemon.run(&["events"]).out.lines().count(), 2);
}

#[test]
fn logs_are_found_where_the_daemon_says_and_cannot_command_the_terminal() {
    let daemon = Daemon::start();
    fs::write(daemon.dir.path().join("db.log"), "one\ntwo\nthree\x1b[2J\n").unwrap();
    fs::write(daemon.dir.path().join("db.console"), "login:").unwrap();
    assert_eq!(daemon.run(&["logs", "db", "-n", "2"]).out, "two\nthree\u{fffd}[2J\n");
    assert_eq!(daemon.run(&["logs", "db", "--console"]).out, "login:\n");
    assert_eq!(daemon.run(&["logs", "../db"]).code, 2);
    assert_eq!(daemon.run(&["logs", "other"]).code, 1);
}

#[test]
fn monitor_socket_is_for_reading() {
    let daemon = Daemon::start();
    let monitor = daemon.dir.path().join("monitor.sock");
    assert_eq!(run(&monitor, &["list"], "").code, 0);
    let ended = run(&monitor, &["save", "db"], "");
    assert_eq!((ended.code, &ended.err[..19]), (8, "error[E_PERMISSION]"));
    assert_eq!(run(&monitor, &["rpc", "vm.show", r#"{"name":"db"}"#], "").code, 0);
    assert_eq!(run(&monitor, &["rpc", "vm.show", "{"], "").code, 2);
}

#[test]
fn lint_needs_no_daemon() {
    let good = alone(&["lint", "-"], PERSISTENT);
    assert_eq!((good.code, good.out.as_str()), (0, "db survives power cuts\n"));
    let bad = format!("{PERSISTENT}machine = 'q35'\n");
    let ended = alone(&["lint", "-"], &bad);
    assert_eq!(ended.code, 4);
    assert!(
        ended.out.starts_with("error[machine-unversioned]: ") && ended.err.starts_with("error[E_LINT]"),
        "{ended:?}"
    );
    let ended = alone(&["lint", "-"], &format!("{bad}allow = ['machine-unversioned']\n"));
    assert!(ended.code == 0 && ended.out.contains("(allowed)"), "{ended:?}");
    let json: Value = serde_json::from_str(&alone(&["lint", "-", "--json"], &bad).out).unwrap();
    assert_eq!(json["findings"][0]["name"], "machine-unversioned");
    assert_eq!(alone(&["lint", "-"], "name = 3").code, 2);
    assert_eq!(alone(&["lint", "/nonexistent"], "").code, 1);
}

#[test]
fn program_speaks_of_itself_without_a_daemon() {
    let ended = alone(&["version"], "");
    assert!(
        ended.code == 0 && ended.out.starts_with("vm-host ") && ended.err.starts_with("no daemon: "),
        "{ended:?}"
    );
    assert!(alone(&["completion", "bash"], "").out.contains("swap-out"));
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(alone(&["man", dir.path().to_str().unwrap()], "").code, 0);
    assert!(dir.path().join("vm-host-swap-out.1").exists());
    let ended = alone(&["list"], "");
    assert_eq!(ended.code, 7);
    assert!(ended.err.contains("VM_HOST_SOCKET"), "{ended:?}");
}
