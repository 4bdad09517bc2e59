// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The daemon as it runs: every thread is confined, in a full run it makes no call that its lists refuse, and what a thread
//! tries nevertheless fails, is counted and is logged. (What else fails inside the lists is tested beside the library, in
//! `vssd-backend/tests/sandbox.rs`; all other scenarios run confined too and end with a look for refusals in the log.)

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vssd_tests::backend::{Backend, REFUSED, control_socket, device_socket, pool_command};
use vssd_tests::mock::driver::{Driver, highest};
use vssd_tests::mock::load::{Load, Profile};
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::operator::Operator;
use vssd_tests::mock::queue::S_OK;
use vssd_tests::mock::seed;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::scenario::Medium;
use vssd_tests::scratch::Scratch;
use vssd_tests::wait::Deadline;

const SIZE: u64 = 32 * MIB;
const SIGSYS: i32 = 31;

/// What the kernel says of each thread of a process: its name, and the wanted lines of its status.
fn threads(pid: u32) -> Result<Vec<(String, BTreeMap<String, String>)>> {
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        let name = fs::read_to_string(task.join("comm"))?.trim().to_owned();
        let status = fs::read_to_string(task.join("status"))?;
        let pairs = status.lines().filter_map(|line| line.split_once(':'));
        threads.push((name, pairs.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()));
    }
    Ok(threads)
}

#[test]
fn every_thread_of_the_daemon_is_confined() -> Result<()> {
    let mut site = Site::new(Medium::Ssd, 100)?;
    let _machine = site.machine("vm1", SIZE, Options::default())?;
    let _other = site.machine("vm2", SIZE, Options::default())?;
    let (mut workers, mut others) = (0, 0);
    for (name, status) in threads(site.daemon.pid()?)? {
        let number = |key: &str| status.get(key).cloned().with_context(|| format!("{name}: no {key}"));
        ensure!(number("Seccomp")? == "2", "{name}: {status:?}");
        ensure!(number("NoNewPrivs")? == "1", "{name}: {status:?}");
        // Nothing but what sockets and media may need: no administration, no networks, no raw access, no tracing.
        let capabilities = u64::from_str_radix(&number("CapEff")?, 16)?;
        ensure!(capabilities & !0x400b == 0, "{name} has capabilities {capabilities:#x}");
        let filters: u32 = number("Seccomp_filters")?.parse()?;
        // What ends the process, how threads are started, and the list.
        ensure!(filters >= 3, "{name} has {filters} filters");
        if name.starts_with("worker-") { workers += 1 } else { others += 1 }
    }
    ensure!(workers > 0 && others > 4, "{workers} workers, {others} other threads");
    println!("{workers} workers and {others} other threads are confined");
    site.finish()
}

#[test]
fn sandbox_can_be_turned_off() -> Result<()> {
    let mut site = Site::with(Medium::Nvram, 100, &[], &["--sandbox=off"])?;
    for (name, status) in threads(site.daemon.pid()?)? {
        ensure!(status.get("Seccomp").is_some_and(|mode| mode == "0"), "{name}: {status:?}");
    }
    site.finish()
}

/// Everything a daemon does in its life, under `strace`.
fn life(medium: Medium, seed: u64, trace: &Path) -> Result<()> {
    let scratch = if matches!(medium, Medium::Ssd) { Scratch::on_disk()? } else { Scratch::new()? };
    let (pool, runtime) = (scratch.join("pool"), scratch.join("run"));
    pool_command(&["create", medium.option(), &format!("{}:200M", pool.display())])?;
    let mut daemon = Backend::pool(&[&pool], &runtime, &scratch.join("log"))?.traced(trace)?.started()?;
    let mut operator = Operator::connect(&control_socket(&runtime))?;
    operator.create("vm1", SIZE, &json!({}))?;
    operator.create("vm2", SIZE, &json!({}))?;
    let mut machine = Machine::start(&device_socket(&runtime, "vm1"), Options::default())?;
    let unit = machine.logical_block()?.into();
    let queues = vec![machine.take_queue(1)?];
    let profile = Profile { bytes: 0..SIZE, unit, block: BLOCK, depth: 16, zeroing: true, tables: true };
    let mut load = Load::new(queues, profile, seed)?;
    load.run(400)?;
    machine.reconnect()?;
    load.run(100)?;
    load.verify()?;
    let mut driver = Driver::start(machine.take_queue(0)?)?;
    for size in [SIZE / 2, SIZE] {
        let job = operator.resize("vm1", size, &json!({}))?;
        driver.attend(&mut highest)?;
        operator.finish(job.id)?;
    }
    operator.call::<serde_json::Value>("device.delete", &json!({ "name": "vm2" }))?;
    ensure!(operator.pool()?.refused_calls == 0, "calls were refused: {}", daemon.log());
    let status = daemon.terminate()?;
    ensure!(status.success(), "the daemon ended with {status}");
    daemon.expect_clean_log()
}

#[test]
fn a_full_life_of_the_daemon_stays_within_its_lists() -> Result<()> {
    let seed = seed("sandbox/life");
    for medium in [Medium::Nvram, Medium::Ssd] {
        let scratch = Scratch::new()?;
        let trace = scratch.join("trace");
        life(medium, seed, &trace)?;
        let text = fs::read_to_string(&trace)?;
        let confined = text.find("SECCOMP_SET_MODE_FILTER").context("no filter was installed")?;
        let calls: Vec<&str> = text[confined..].lines().collect();
        let refused: Vec<_> =
            calls.iter().filter(|line| line.contains("EPERM") || line.contains("SIGSYS")).collect();
        ensure!(refused.is_empty(), "refused on {medium:?}: {refused:#?}");
        println!("{medium:?}: {} calls after the filters, none refused", calls.len());
        ensure!(calls.len() > 1000, "the trace has {} lines", calls.len());
    }
    Ok(())
}

#[test]
fn load_resizes_and_reconnects_meet_no_refusal() -> Result<()> {
    let seed = seed("sandbox/load");
    let operations = 30_000;
    for medium in [Medium::Nvram, Medium::Ssd] {
        let mut site = Site::new(medium, 200)?;
        let mut machine = site.machine("vm1", SIZE, Options::default())?;
        let unit = machine.logical_block()?.into();
        let queues = vec![machine.take_queue(1)?];
        let profile = Profile { bytes: 0..SIZE, unit, block: BLOCK, depth: 32, zeroing: true, tables: true };
        let mut load = Load::new(queues, profile, seed)?;
        for round in 0..10 {
            load.run(operations / 10)?;
            machine.reconnect()?;
            let name = format!("other{round}");
            site.machine(&name, BLOCK, Options::default())?.disconnect();
            site.operator
                .call::<serde_json::Value>("device.delete", &json!({ "name": name, "force": true }))?;
        }
        load.verify()?;
        ensure!(site.operator.pool()?.refused_calls == 0, "calls were refused: {}", site.daemon.log());
        site.finish()?;
    }
    println!("{operations} operations on each medium, no call refused");
    Ok(())
}

/// The kinds of threads, as the daemon calls them.
const KINDS: [&str; 10] = [
    "control",
    "signals",
    "nursery",
    "acceptor",
    "session",
    "worker",
    "keeper",
    "committer",
    "scrubber",
    "syncer",
];

/// A daemon in which every thread of a kind tries something once it is confined. (Only a debug build can be told to.)
fn probed(kind: &str, what: &str, scratch: &Scratch) -> Result<Backend> {
    let (pool, runtime) = (scratch.join("pool"), scratch.join("run"));
    pool_command(&["create", Medium::Ssd.option(), &format!("{}:100M", pool.display())])?;
    let daemon = Backend::pool(&[&pool], &runtime, &scratch.join("log"))?;
    Ok(daemon.env("VSSD_SANDBOX_PROBE", &format!("{kind}:{what}")))
}

#[test]
fn open_and_socket_fail_in_every_kind_of_thread_are_counted_and_logged() -> Result<()> {
    for kind in KINDS {
        for (what, call) in [("open", "openat"), ("socket", "socket")] {
            let scratch = Scratch::on_disk()?;
            let mut daemon = probed(kind, what, &scratch)?.started()?;
            let runtime = scratch.join("run");
            let mut operator = Operator::connect(&control_socket(&runtime))?;
            operator.create("vm1", SIZE, &json!({}))?;
            let mut machine = Machine::start(&device_socket(&runtime, "vm1"), Options::default())?;
            // It goes on all the same.
            let mut queue = machine.take_queue(0)?;
            ensure!(queue.write(0, &[7; 4096])? == S_OK, "{kind}: {what}: a write failed");
            let status = daemon.log();
            let tries = status.lines().filter(|line| line.contains("tried what is not allowed")).count();
            ensure!(tries > 0, "{kind}: {what}: nothing was tried: {status}");
            ensure!(!status.contains("succeeded=true"), "{kind}: {what}: {status}");
            let counted = operator.pool()?.refused_calls;
            ensure!(counted == u64::try_from(tries)?, "{kind}: {what}: {counted} refusals of {tries}");
            let logged = daemon.log().lines().any(|line| {
                let told = [REFUSED, &format!("call=\"{call}\""), &format!("thread=\"{kind}\"")];
                told.iter().all(|words| line.contains(words))
            });
            ensure!(logged, "{kind}: {what}: {}", daemon.log());
            daemon.terminate()?;
        }
    }
    println!("{} kinds of threads: open and socket fail and are told", KINDS.len());
    Ok(())
}

#[test]
fn exec_and_ptrace_in_any_kind_of_thread_end_the_daemon() -> Result<()> {
    for kind in KINDS {
        for what in ["exec", "ptrace"] {
            let scratch = Scratch::on_disk()?;
            let mut daemon = probed(kind, what, &scratch)?;
            daemon.launch()?;
            // Acceptors and sessions begin later.
            if ["acceptor", "session"].contains(&kind) {
                let runtime = scratch.join("run");
                let control = control_socket(&runtime);
                Deadline::after(Duration::from_secs(20))
                    .until("the control socket", || Ok(control.exists()))?;
                // Whatever meets the end of the daemon first fails.
                let _ = Operator::connect(&control).and_then(|mut operator| {
                    operator.create("vm1", SIZE, &json!({}))?;
                    Machine::start(&device_socket(&runtime, "vm1"), Options::default()).map(drop)
                });
            }
            let status = daemon.wait(Duration::from_secs(20)).with_context(|| format!("{kind}: {what}"))?;
            ensure!(status.signal() == Some(SIGSYS), "{kind}: {what}: the daemon ended with {status}");
        }
    }
    println!("{} kinds of threads: exec and ptrace end the daemon", KINDS.len());
    Ok(())
}
