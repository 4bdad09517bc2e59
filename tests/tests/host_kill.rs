// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kill -9` of vm-host, and power cuts, before and after each durable step of what it does with a VM.
//!
//! `strace` is attached to the thread of the VM and kills the daemon at one system call, before it is made: one that writes, syncs,
//! renames, removes, sends to QEMU or starts it. A first run without a kill gives the list; each of them has its trials. *Daemon*: QEMU
//! lives on. *Power*: every QEMU is killed, too, and NV-RAM and records stay. Then the daemon is started again, recovers, and the VM is
//! in one of these states; along the list of calls they only go to the right:
//!
//! ```text
//! verb         daemon                      power
//! start        stopped → running           stopped → lost
//! save         running → saved             lost → running → saved     (running: saved, and resumed, for that is wanted)
//! hold         running                     lost → running
//! resume       running                     running → lost             (lost: it may have run, unsaved)
//! restore      saved → running             saved → lost
//! swap-out     saved → swapped-out         the same: there is no QEMU
//! swap-in      swapped-out → saved         the same
//! ```
//!
//! Wherever the guest is not lost it goes on: its memory is what it was and its counter never goes backwards. Wherever it has run since
//! it was saved, a power cut leaves it lost and not resurrected from that save.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::paths;
use vssd_tests::process::Daemon;
use vssd_tests::serial::guest_slot;
use vssd_tests::vm_host::{Mark, VmHost};
use vssd_tests::wait::Deadline;

/// What is durable, what QEMU is told, and QEMU's beginning and end.
const CALLS: &str = "fsync,fdatasync,msync,rename,renameat,renameat2,unlink,unlinkat,ftruncate,fallocate,pwrite64,write,\
                     sendto,sendmsg,pidfd_send_signal,vfork,clone,clone3";
/// Of calls of one name in a row, as of pieces of memory, the first two and the last are hit.
const ROW: usize = 3;
const LIMIT: Duration = Duration::from_secs(60);
const MEMORY: &str = "96MiB";

/// A host with the copies `stopped`, `saved` and `swapped-out`: of `a`, which counts and holds data, and of `b`, beside it.
struct Site {
    host: VmHost,
    guest: Mark,
}

impl Site {
    fn new() -> Result<Self> {
        let image = ImageBuilder::small(&Kernel::debian()?).build()?;
        let mut host = VmHost::new()?;
        host.start()?;
        for vm in ["a", "b"] {
            host.define(&host.definition(vm, &image, MEMORY))?;
        }
        host.kill()?;
        host.keep("stopped")?;
        host.start()?;
        host.ok(&["start", "b"])?;
        host.ok(&["save", "b"])?;
        host.ok(&["start", "a"])?;
        let guest = Mark::make(&host, "a")?;
        host.ok(&["save", "a"])?;
        ensure!(host.machines()?.is_empty(), "a machine is left after a save");
        host.kill()?;
        host.keep("saved")?;
        host.start()?;
        host.ok(&["swap-out", "a"])?;
        host.kill()?;
        host.keep("swapped-out")?;
        host.put_back("saved")?;
        Ok(Self { host, guest })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cut {
    Daemon,
    Power,
}

/// What is tried.
struct Verb {
    name: &'static str,
    /// The copy it begins with, and what is done before.
    from: &'static str,
    before: &'static [&'static [&'static str]],
    words: &'static [&'static str],
    /// It is over in this state.
    until: &'static str,
    after_daemon: &'static [&'static str],
    /// Empty where there is no machine that could be killed, too.
    after_power: &'static [&'static str],
}

const VERBS: [Verb; 7] = [
    Verb {
        name: "start",
        from: "stopped",
        before: &[],
        words: &["start", "a"],
        until: "running",
        after_daemon: &["stopped", "running"],
        after_power: &["stopped", "lost"],
    },
    Verb {
        name: "save",
        from: "saved",
        before: &[&["restore", "a"]],
        words: &["save", "a"],
        until: "saved",
        after_daemon: &["running", "saved"],
        after_power: &["lost", "running", "saved"],
    },
    Verb {
        name: "hold",
        from: "saved",
        before: &[&["restore", "a"]],
        words: &["power", "test", "critical"],
        until: "saved",
        after_daemon: &["running"],
        after_power: &["lost", "running"],
    },
    Verb {
        name: "resume",
        from: "saved",
        before: &[&["restore", "a"], &["power", "test", "critical"]],
        words: &["power", "test", "online"],
        until: "running",
        after_daemon: &["running"],
        after_power: &["running", "lost"],
    },
    Verb {
        name: "restore",
        from: "saved",
        before: &[],
        words: &["restore", "a"],
        until: "running",
        after_daemon: &["saved", "running"],
        after_power: &["saved", "lost"],
    },
    Verb {
        name: "swap-out",
        from: "saved",
        before: &[],
        words: &["swap-out", "a"],
        until: "swapped-out",
        after_daemon: &["saved", "swapped-out"],
        after_power: &[],
    },
    Verb {
        name: "swap-in",
        from: "swapped-out",
        before: &[],
        words: &["swap-in", "a"],
        until: "saved",
        after_daemon: &["swapped-out", "saved"],
        after_power: &[],
    },
];

/// A system call of a verb: the so many-th of its name.
#[derive(Clone, Debug)]
struct Point {
    call: String,
    nth: usize,
    line: String,
}

/// Attaches `strace` to the thread of a VM.
fn trace(host: &mut VmHost, vm: &str, more: &[&str]) -> Result<Daemon> {
    let thread = host.thread_of(vm)?;
    let mut strace = Command::new(paths::tool("strace")?);
    strace.args(["-qq", "-e", &format!("trace={CALLS}"), "-p", &thread.to_string()]).args(more);
    strace.stdin(Stdio::null()).stderr(Stdio::null());
    let mut strace = Daemon::spawn("strace", strace)?;
    let status = format!("/proc/{thread}/status");
    Deadline::after(LIMIT).until("strace to attach", || {
        strace.expect_running()?;
        let status = fs::read_to_string(&status)?;
        Ok(status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0")))
    })?;
    Ok(strace)
}

impl Site {
    fn prepare(&mut self, verb: &Verb) -> Result<()> {
        self.host.put_back(verb.from)?;
        self.host.start()?;
        for words in verb.before {
            self.host.ok(words)?;
        }
        if verb.name == "resume" {
            self.host.wait_state("a", "saved")?;
        }
        Ok(())
    }

    /// Does it; false if the daemon is killed over it.
    fn carry_out(&mut self, verb: &Verb) -> Result<bool> {
        let said = self.host.call(verb.words)?;
        Deadline::after(LIMIT).poll(&format!("{} to end, which said {}", verb.name, said.json), || {
            if !self.host.runs()? {
                return Ok(Some(false));
            }
            if verb.words[0] != "power" {
                // An error is that of a connection that ended, a moment before the daemon is seen to have.
                return Ok((said.code == 0).then_some(true));
            }
            let said = self.host.call(&["show", "a"])?;
            Ok((said.json["vm"]["state"] == verb.until).then_some(true))
        })
    }

    fn points(&mut self, verb: &Verb) -> Result<Vec<Point>> {
        self.prepare(verb)?;
        let file = self.host.live().join("trace");
        let mut strace = trace(&mut self.host, "a", &["-o", &file.to_string_lossy()])?;
        ensure!(self.carry_out(verb)?, "the daemon has ended");
        strace.terminate(LIMIT)?;
        let mut points: Vec<Point> = Vec::new();
        let mut counts = std::collections::BTreeMap::new();
        for line in fs::read_to_string(&file)?.lines() {
            let Some((call, rest)) = line.split_once('(') else { continue };
            let nth = counts.entry(call.to_owned()).or_insert(0);
            *nth += 1;
            // The log.
            if call == "write" && rest.starts_with("2,") {
                continue;
            }
            let point = Point { call: call.to_owned(), nth: *nth, line: line.chars().take(100).collect() };
            let row = points.iter().rev().take_while(|before| before.call == call).count();
            if row >= ROW {
                points.pop();
            }
            points.push(point);
        }
        // What a guest does once it runs is not undone: its record comes first.
        if let Some(cont) = points.iter().position(|point| point.line.contains(r#"\"cont\""#)) {
            ensure!(
                points[cont..]
                    .iter()
                    .all(|point| !point.call.contains("sync") && !point.call.contains("rename")),
                "durable too late: {points:?}"
            );
        } else {
            ensure!(verb.until != "running", "no guest was continued: {points:?}");
        }
        ensure!(points.iter().any(|point| point.call.contains("sync")), "{}: {points:?}", verb.name);
        Ok(points)
    }

    /// Kills the daemon at a point, and what else there is to kill; starts it again, and gives the state that it finds.
    fn trial(&mut self, verb: &Verb, point: &Point, cut: Cut) -> Result<Option<String>> {
        self.prepare(verb)?;
        let inject = format!("inject={}:signal=KILL:when={}", point.call, point.nth);
        let mut strace = trace(&mut self.host, "a", &["-o", "/dev/null", "-e", &inject])?;
        let survived = self.carry_out(verb)?;
        strace.terminate(LIMIT)?;
        ensure!(!survived, "the daemon was not killed");
        self.host.kill()?;
        if cut == Cut::Power && self.host.power_cut()? == 0 {
            // The same as without.
            return Ok(None);
        }
        self.host.start()?;
        let shown = self.host.show("a")?;
        let state = shown["state"].as_str().unwrap_or_default().to_owned();
        let machines = self.host.machines()?.len();
        let expected = usize::from(state == "running");
        // Saved with its machine: the daemon was killed before it could end it, and a restore uses it.
        ensure!(
            machines == expected || state == "saved" && machines == 1,
            "{machines} machines of a VM that is {state}"
        );
        self.verify(verb, &state, &shown, cut).with_context(|| format!("it is {state}"))?;
        Ok(Some(state))
    }

    /// That a VM in this state is whole, and in no other.
    fn verify(&mut self, verb: &Verb, state: &str, shown: &serde_json::Value, cut: Cut) -> Result<()> {
        let host = &mut self.host;
        let memory = |host: &VmHost| -> Result<usize> {
            let names = fs::read_dir(host.live().join("nv"))?.map(|entry| Ok(entry?.file_name()));
            let names: Vec<_> = names.collect::<Result<_>>()?;
            Ok(names.iter().filter(|name| name.to_string_lossy().starts_with("a.memory.")).count())
        };
        ensure!(memory(host)? <= 1, "two memories");
        ensure!(
            host.state("b")? == if verb.from == "stopped" { "stopped" } else { "saved" },
            "b has changed"
        );
        match state {
            "lost" => {
                ensure!(memory(host)? == 1, "the memory is gone");
                ensure!(shown["error"] == "E_STATE" && shown["hint"].is_string(), "{shown}");
                let said = host.call(&["restore", "a"])?;
                ensure!(said.error() == "E_WRONG_STATE", "{said:?}");
                host.ok(&["discard", "a", "--yes"])?;
                return Ok(());
            }
            "stopped" => {
                host.ok(&["start", "a"])?;
            }
            "swapped-out" => {
                ensure!(memory(host)? == 0, "there is memory of what is swapped out");
                host.ok(&["swap-in", "a"])?;
                host.ok(&["restore", "a"])?;
            }
            "saved" => {
                ensure!(memory(host)? == 1, "the memory is gone");
                if verb.name == "swap-in" {
                    host.ok(&["swap-out", "a"])?;
                    host.ok(&["swap-in", "a"])?;
                }
                host.ok(&["restore", "a"])?;
            }
            _ => {}
        }
        ensure!(host.state("a")? == "running" && host.machines()?.len() == 1);
        if verb.from != "stopped" {
            self.guest.check(host, "a")?;
        }
        if cut == Cut::Power {
            // It has run since it was saved: that state must not come back.
            host.power_cut()?;
            host.start()?;
            ensure!(host.state("a")? == "lost", "resurrected: {}", host.show("a")?);
        } else {
            host.ok(&["stop", "a", "--kill", "--yes"])?;
            ensure!(host.state("a")? == "stopped");
        }
        ensure!(host.machines()?.is_empty(), "a machine is left");
        Ok(())
    }
}

fn try_all(verbs: &[Verb]) -> Result<()> {
    let _slot = guest_slot()?;
    let begun = Instant::now();
    let mut site = Site::new()?;
    println!("a site in {:.1} s", begun.elapsed().as_secs_f64());
    let mut wrong = Vec::new();
    for verb in verbs {
        let begun = Instant::now();
        let points = site.points(verb)?;
        let mut trials = 0;
        for (cut, allowed) in [(Cut::Daemon, verb.after_daemon), (Cut::Power, verb.after_power)] {
            if allowed.is_empty() {
                continue;
            }
            let (mut at, mut seen) = (0, Vec::new());
            for point in &points {
                let what = format!("{} killed with {cut:?} before {} ({})", verb.name, point.nth, point.line);
                match site.trial(verb, point, cut) {
                    Ok(None) => continue,
                    Ok(Some(state)) => match allowed.iter().skip(at).position(|allowed| *allowed == state) {
                        Some(further) => {
                            at += further;
                            seen.push(state);
                        }
                        None => wrong.push(format!("{what}: it is {state}, after {seen:?}")),
                    },
                    Err(error) => wrong.push(format!("{what}: {error:#}\n{}", site.host.log())),
                }
                trials += 1;
            }
            seen.dedup();
            println!("{}, {cut:?}: {}", verb.name, seen.join(" → "));
        }
        println!(
            "{}: {} points, {trials} trials, {:.1} s",
            verb.name,
            points.len(),
            begun.elapsed().as_secs_f64()
        );
    }
    if wrong.is_empty() { Ok(()) } else { bail!("{} trials failed:\n{}", wrong.len(), wrong.join("\n")) }
}

#[test]
fn killed_at_each_step_a_vm_is_as_before_or_as_after() -> Result<()> {
    try_all(&VERBS)
}

/// A damage, what a start of the daemon makes of it, and what whoever then wants to go on is told.
struct Damage {
    name: &'static str,
    from: &'static str,
    harm: fn(&VmHost) -> Result<()>,
    /// None where the record cannot be read.
    state: Option<&'static str>,
    error: &'static str,
    words: &'static [&'static str],
    refusal: &'static str,
}

const RESTORE: &[&str] = &["restore", "a"];
const SWAP_IN: &[&str] = &["swap-in", "a"];

const fn broken(name: &'static str, harm: fn(&VmHost) -> Result<()>, error: &'static str) -> Damage {
    Damage {
        name,
        from: "saved",
        harm,
        state: Some("broken"),
        error,
        words: RESTORE,
        refusal: "E_WRONG_STATE",
    }
}

const fn lost(name: &'static str, harm: fn(&VmHost) -> Result<()>) -> Damage {
    Damage { state: Some("lost"), ..broken(name, harm, "E_STATE") }
}

const fn unreadable(name: &'static str, harm: fn(&VmHost) -> Result<()>) -> Damage {
    Damage { state: None, refusal: "E_MEDIA", ..broken(name, harm, "E_MEDIA") }
}

const fn image(name: &'static str, harm: fn(&VmHost) -> Result<()>) -> Damage {
    Damage {
        from: "swapped-out",
        state: Some("swapped-out"),
        words: SWAP_IN,
        refusal: "E_STATE",
        ..broken(name, harm, "")
    }
}

const DAMAGES: [Damage; 15] = [
    lost("a state's payload is flipped", |host| flip(&nv(host, "a.state.")?, (32 << 10) + 5000)),
    lost("a state's head is flipped", |host| flip(&nv(host, "a.state.")?, 30)),
    broken("a state is truncated", |host| cut(&nv(host, "a.state.")?), "E_MEDIA"),
    broken("a state is missing", |host| Ok(fs::remove_file(nv(host, "a.state.")?)?), "E_MEDIA"),
    broken("a memory is truncated", |host| cut(&nv(host, "a.memory.")?), "E_STATE"),
    broken("a memory is missing", |host| Ok(fs::remove_file(nv(host, "a.memory.")?)?), "E_STATE"),
    broken(
        "saved by another version",
        |host| edit(host, "/life/live/launch/version", "6.6.6".into()),
        "E_STATE",
    ),
    broken(
        "saved on another machine",
        |host| edit(host, "/life/live/launch/machine", "pc-q35-6.2".into()),
        "E_STATE",
    ),
    unreadable("a record of a later release", |host| edit(host, "/version", 2.into())),
    unreadable("a digit of a record is another", flip_digit),
    unreadable("a record is cut", |host| cut(&record(host))),
    unreadable("a record is empty", |host| Ok(fs::write(record(host), "")?)),
    image("an image is flipped", |host| flip(&swapped(host), 20 << 20)),
    image("an image is truncated", |host| cut(&swapped(host))),
    image("an image is missing", |host| Ok(fs::remove_file(swapped(host))?)),
];

/// The file of a region.
fn nv(host: &VmHost, prefix: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(host.live().join("nv"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("there is no {prefix}")
}

fn record(host: &VmHost) -> PathBuf {
    host.live().join("state/vms/a.json")
}

fn swapped(host: &VmHost) -> PathBuf {
    host.live().join("state/swap/a.vmswap")
}

fn flip(path: &Path, at: u64) -> Result<()> {
    let file = fs::File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[!byte[0]], at)?)
}

fn cut(path: &Path) -> Result<()> {
    let file = fs::File::options().write(true).open(path)?;
    Ok(file.set_len(file.metadata()?.len() / 2)?)
}

/// As another program could have written it.
fn edit(host: &VmHost, pointer: &str, to: serde_json::Value) -> Result<()> {
    let json: serde_json::Value = serde_json::from_slice(&fs::read(record(host))?)?;
    let mut json = json["record"].clone();
    *json.pointer_mut(pointer).with_context(|| format!("the record has no {pointer}"))? = to;
    let text = json.to_string();
    let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, text.as_bytes());
    Ok(fs::write(record(host), format!("{{\"crc64\":\"{sum:016x}\",\"record\":{text}}}"))?)
}

/// A digit of the name of the guest's run.
fn flip_digit(host: &VmHost) -> Result<()> {
    let text = fs::read_to_string(record(host))?;
    let name = "\"incarnation\": \"";
    let at = text.find(name).context("it has none")? + name.len();
    let digit = if text[at..].starts_with('0') { "1" } else { "0" };
    Ok(fs::write(record(host), format!("{}{digit}{}", &text[..at], &text[at + 1..]))?)
}

fn suffer(host: &mut VmHost, damage: &Damage) -> Result<()> {
    host.put_back(damage.from)?;
    (damage.harm)(host)?;
    host.keep("damaged")?;
    host.start()?;
    let said = host.call(&["show", "a"])?;
    match damage.state {
        Some(state) => {
            let vm = &said.json["vm"];
            ensure!(vm["state"] == state && vm["error"].as_str().unwrap_or_default() == damage.error, "{vm}");
        }
        None => ensure!(said.code == 1 && said.error() == damage.error, "{said:?}"),
    }
    let refused = host.call(damage.words)?;
    ensure!(refused.code != 0 && refused.error() == damage.refusal, "{refused:?}");
    let message = &refused.json["error"];
    ensure!(message["message"].is_string() && message["hint"].is_string(), "no help: {message}");
    let again = host.call(&["show", "a"])?;
    ensure!(again.json["vm"]["state"] == said.json["vm"]["state"], "{again:?}");
    ensure!(host.machines()?.is_empty(), "a machine was started for it");
    host.kill()?;
    let differs = host.differences("damaged")?;
    // What a swap-in made for it and gave back is in the registry.
    let differs: Vec<&str> = differs
        .lines()
        .filter(|line| damage.words != SWAP_IN || !line.contains("vm-nvram.registry"))
        .collect();
    ensure!(differs.is_empty(), "changed: {differs:?}");
    host.start()?;
    host.ok(&["restore", "b"])?;
    ensure!(host.state("b")? == "running");
    println!("{}: {}", damage.name, message["message"]);
    Ok(())
}

#[test]
fn damage_is_named_and_left_as_it_is_and_no_other_vm_suffers() -> Result<()> {
    let _slot = guest_slot()?;
    let mut site = Site::new()?;
    let mut wrong = Vec::new();
    for damage in &DAMAGES {
        if let Err(error) = suffer(&mut site.host, damage) {
            wrong.push(format!("{}: {error:#}", damage.name));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn a_machine_that_ends_by_itself_is_told_from_a_guest_that_does() -> Result<()> {
    let _slot = guest_slot()?;
    let Site { mut host, guest } = Site::new()?;
    host.start()?;
    host.ok(RESTORE)?;
    // Held when its machine crashes: what counts is saved.
    host.ok(&["power", "test", "critical"])?;
    host.wait_state("a", "saved")?;
    ensure!(host.machines()?.len() == 1, "it is not held");
    host.kill_machines()?;
    Deadline::after(LIMIT).until("the machine to be missed", || Ok(host.show("a")?["pid"].is_null()))?;
    ensure!(host.state("a")? == "saved", "{}", host.show("a")?);
    host.ok(&["power", "test", "online"])?;
    host.wait_state("a", "running")?;
    guest.check(&host, "a")?;

    // Its machine ends with the guest running.
    host.kill_machines()?;
    host.wait_state("a", "lost")?;
    let shown = host.show("a")?;
    ensure!(shown["error"] == "E_STATE" && shown["hint"].is_string(), "{shown}");
    ensure!(nv(&host, "a.memory.")?.exists());

    // The guest restarts, and then turns itself off.
    host.put_back("saved")?;
    host.start()?;
    host.ok(RESTORE)?;
    let pid = host.machines()?;
    // A guest can make its hypervisor complain as often as it likes.
    let log = host.live().join("log/a.log");
    fs::File::options().append(true).open(&log)?.write_all(&vec![b'x'; 3 << 20])?;
    Deadline::after(LIMIT)
        .until("what the machine says to be bounded", || Ok(fs::metadata(&log)?.len() <= 1 << 20))?;
    ensure!(fs::metadata(log.with_extension("log.old"))?.len() == 1 << 20);
    host.run("a", "(sleep 0.2; reboot -f) > /dev/null 2>&1 &")?;
    Deadline::after(LIMIT).until("the guest to restart", || {
        Ok(host.run("a", "test -e /tmp/data || echo new").is_ok_and(|said| said == "new"))
    })?;
    ensure!(host.state("a")? == "running" && host.machines()? == pid, "{}", host.show("a")?);
    host.run("a", "(sleep 0.2; poweroff -f) > /dev/null 2>&1 &")?;
    host.wait_state("a", "stopped")?;
    ensure!(host.machines()?.is_empty(), "the machine of a stopped VM is left");
    Ok(())
}
