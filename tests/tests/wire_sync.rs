// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `device.sync` over real sockets: what it covers, which system calls it costs, and that nobody waits for it.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use serde_json::json;
use vssd_protocol::control::{ErrorCode, SyncAnswer, method};
use vssd_tests::backend::{Backend, control_socket, device_socket, pool_command};
use vssd_tests::mock::load::{Load, Profile};
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::operator::Operator;
use vssd_tests::mock::queue::{Queue, S_OK};
use vssd_tests::mock::seed;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::pattern;
use vssd_tests::scenario::Medium;
use vssd_tests::scratch::Scratch;

const SIZE: u64 = 64 * MIB;
/// How long it is synced beside I/O.
const LOAD: Duration = Duration::from_secs(2);

fn sync(operator: &mut Operator, names: &[&str]) -> Result<SyncAnswer> {
    operator.call(method::DEVICE_SYNC, &json!({ "names": names }))
}

fn content(offset: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    pattern::fill(&mut bytes, seed, offset);
    bytes
}

/// First writes, one a block, of which none is flushed.
fn write(queue: &mut Queue, blocks: Range<u64>, seed: u64) -> Result<()> {
    for offset in blocks.map(|block| block * BLOCK) {
        ensure!(queue.write(offset, &content(offset, seed))? == S_OK);
    }
    Ok(())
}

fn check(queue: &mut Queue, blocks: Range<u64>, seed: u64) -> Result<()> {
    for offset in blocks.map(|block| block * BLOCK) {
        let read = queue.read(offset, 4096)?.map_err(|status| anyhow!("status {status:#x}"))?;
        ensure!(read == content(offset, seed), "block at {offset:#x} is not what was written");
    }
    Ok(())
}

/// C-12: what was written and discarded without a FLUSH is there with the next daemon, and the pool is sound.
#[test]
fn what_was_acknowledged_before_a_sync_is_there_after_a_kill() -> Result<()> {
    for medium in [Medium::Nvram, Medium::Ssd] {
        let mut site = Site::new(medium, 100)?;
        let mut machine = site.machine("vm1", SIZE, Options::default())?;
        site.operator.create("vm2", MIB, &json!({}))?;
        let unknown = json!({ "names": ["vm1", "vm3"] });
        site.operator.refused(ErrorCode::NotFound, method::DEVICE_SYNC, &unknown)?;
        let mut took = Vec::new();
        for round in 0..10 {
            let blocks = round * 20..round * 20 + 20;
            write(machine.queue(0)?, blocks.clone(), round)?;
            let gone = blocks.end - 1;
            ensure!(machine.queue(1)?.discard(gone * BLOCK, BLOCK)? == S_OK);
            let answer = sync(&mut site.operator, &["vm1"])?;
            ensure!(answer.devices == 1);
            took.push(answer.took_us);
            site.kill_and_restart()?;
            machine.reconnect()?;
            check(machine.queue(0)?, blocks.start..gone, round)?;
            let hole = machine.queue(0)?.read(gone * BLOCK, 4096)?;
            ensure!(hole == Ok(vec![0; 4096]), "a discarded block came back");
        }
        ensure!(sync(&mut site.operator, &[])?.devices == 2);
        took.sort_unstable();
        println!("{medium:?}: syncs of 20 first writes took {took:?} us");
        site.finish()?;
    }
    Ok(())
}

/// A daemon whose system calls are noted.
struct Traced {
    daemon: Backend,
    operator: Operator,
    queue: Queue,
    /// Keeps the guest's memory.
    _machine: Machine,
    trace: PathBuf,
    _scratch: Scratch,
}

impl Traced {
    fn start(option: &str, on_disk: bool) -> Result<Self> {
        let scratch = if on_disk { Scratch::on_disk()? } else { Scratch::new()? };
        let (pool, runtime, trace) = (scratch.join("pool"), scratch.join("run"), scratch.join("trace"));
        pool_command(&["create", option, &format!("{}:100M", pool.display())])?;
        let daemon = Backend::pool(&[&pool], &runtime, &scratch.join("log"))?.traced(&trace)?.started()?;
        let mut operator = Operator::connect(&control_socket(&runtime))?;
        operator.create("vm1", SIZE, &json!({}))?;
        let mut machine = Machine::start(&device_socket(&runtime, "vm1"), Options::default())?;
        let queue = machine.take_queue(0)?;
        Ok(Self { daemon, operator, queue, _machine: machine, trace, _scratch: scratch })
    }

    /// What the daemon calls while `act` runs, and a moment longer.
    fn calls(&mut self, act: impl FnOnce(&mut Self) -> Result<()>) -> Result<Vec<String>> {
        let so_far = |trace: &Path| fs::read_to_string(trace).map(|text| text.len());
        let before = so_far(&self.trace)?;
        act(self)?;
        thread::sleep(Duration::from_millis(50));
        Ok(fs::read_to_string(&self.trace)?[before..].lines().map(str::to_owned).collect())
    }

    fn syncs(&mut self, act: impl FnOnce(&mut Self) -> Result<()>) -> Result<usize> {
        let calls = self.calls(act)?;
        // One that was interrupted by the note of another thread's call has two lines.
        Ok(calls.iter().filter(|line| line.contains("fdatasync(")).count())
    }
}

/// A sync without writes costs no flush of a medium, as a FLUSH does not; and where memory is what outlives the power, none ever.
#[test]
fn sync_flushes_a_medium_only_where_something_was_written() -> Result<()> {
    for (option, on_disk, flushes) in
        [("--nvram", false, false), ("--nvram", true, true), ("--ssd", true, true)]
    {
        let what = format!("{option}, {}", if on_disk { "a file on a disk" } else { "memory" });
        let mut traced = Traced::start(option, on_disk)?;
        // Until background work of the start has ended.
        thread::sleep(Duration::from_millis(300));
        sync(&mut traced.operator, &[])?;
        for round in 0..3 {
            let written = traced.syncs(|traced| {
                write(&mut traced.queue, round * 4..round * 4 + 4, 1)?;
                sync(&mut traced.operator, &["vm1"]).map(drop)
            })?;
            ensure!((written > 0) == flushes, "{what}: {written} flushes for a sync after writes");
            let idle = traced.syncs(|traced| sync(&mut traced.operator, &["vm1"]).map(drop))?;
            ensure!(idle == 0, "{what}: {idle} flushes for a sync without writes");
            let flushed = traced.syncs(|traced| {
                ensure!(traced.queue.flush()? == S_OK);
                Ok(())
            })?;
            ensure!(flushed == 0, "{what}: {flushed} flushes for a FLUSH behind a sync");
            println!("{what}: {written} flushes after writes, none after that");
        }
        check(&mut traced.queue, 0..12, 1)?;
        let status = traced.daemon.terminate()?;
        ensure!(status.success(), "the daemon ended with {status}");
        traced.daemon.expect_clean_log()?;
    }
    Ok(())
}

/// Syncs one after the other beside verified I/O: neither does the guest's I/O stop nor any other operator wait.
#[test]
fn syncs_under_load_hold_up_neither_guest_nor_operator() -> Result<()> {
    for medium in [Medium::Nvram, Medium::Ssd] {
        let mut site = Site::new(medium, 100)?;
        let mut machine = site.machine("vm1", SIZE, Options::default())?;
        let unit = machine.logical_block()?.into();
        let profile = Profile { bytes: 0..SIZE, unit, block: BLOCK, depth: 32, zeroing: true, tables: true };
        let mut load = Load::new(vec![machine.take_queue(0)?], profile, seed("wire_sync/load"))?;
        let (mut syncing, mut asking) = (site.another_operator()?, site.another_operator()?);
        let is_over = AtomicBool::new(false);
        let (mut took, worst) = thread::scope(|scope| -> Result<(Vec<u64>, Duration)> {
            let is_over = &is_over;
            let syncing = scope.spawn(move || {
                let mut took = Vec::new();
                while !is_over.load(Ordering::Relaxed) {
                    took.push(sync(&mut syncing, &["vm1"])?.took_us);
                    thread::sleep(Duration::from_millis(1));
                }
                Ok::<_, anyhow::Error>(took)
            });
            let asking = scope.spawn(move || {
                let mut worst = Duration::ZERO;
                while !is_over.load(Ordering::Relaxed) {
                    let asked = Instant::now();
                    asking.pool()?;
                    worst = worst.max(asked.elapsed());
                    thread::sleep(Duration::from_millis(1));
                }
                Ok::<_, anyhow::Error>(worst)
            });
            let started = Instant::now();
            let mut ran = Ok(());
            while ran.is_ok() && started.elapsed() < LOAD {
                ran = load.run(200);
            }
            is_over.store(true, Ordering::Relaxed);
            let worst = asking.join().map_err(|_| anyhow!("an operator panicked"))??;
            let took = syncing.join().map_err(|_| anyhow!("the one who syncs panicked"))??;
            ran.map(|()| (took, worst))
        })?;
        load.verify()?;
        took.sort_unstable();
        println!(
            "{medium:?}: {} syncs beside {:?}: median {} us, longest {} us; another operator waited for {worst:.1?} at most",
            took.len(),
            load.counts,
            took[took.len() / 2],
            took[took.len() - 1]
        );
        ensure!(took.len() >= 20, "only {} syncs", took.len());
        ensure!(worst < Duration::from_secs(2), "an operator waited for {worst:?}");
        site.finish()?;
    }
    Ok(())
}
