// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The daemon as it runs: every thread is confined, and in a full run it makes no call that its lists refuse. (What fails
//! inside the lists is tested beside the library, in `vssd-backend/tests/sandbox.rs`; all other scenarios run confined too.)

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vssd_tests::backend::{Backend, control_socket, device_socket, pool_command};
use vssd_tests::mock::driver::{Driver, highest};
use vssd_tests::mock::load::{Load, Profile};
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::operator::Operator;
use vssd_tests::mock::seed;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::scenario::Medium;
use vssd_tests::scratch::Scratch;

const SIZE: u64 = 32 * MIB;

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
        if name.starts_with("worker-") {
            ensure!(filters >= 4, "{name} has {filters} filters");
            workers += 1;
        } else {
            ensure!(filters >= 3, "{name} has {filters} filters");
            others += 1;
        }
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
    let status = daemon.terminate()?;
    ensure!(status.success(), "the daemon ended with {status}");
    daemon.expect_no_panic()
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
