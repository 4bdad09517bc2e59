// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that goes away: a front-end shortens the files that it shares, an operator shortens the pool's. Class 13 of
//! `wire_hostile.rs`, whose text says how they are judged.
//!
//! Long form: `cargo xtask long hostile`; this file alone:
//! `VSSD_HOSTILE_ROUNDS=10000 cargo test -p vssd-tests --release --test wire_hostile_memory -- --test-threads=1`

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use serde_json::json;
use vssd_tests::backend::pool_command;
use vssd_tests::mock::arena::{Arena, Verdict, rounds};
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::queue::{Queue, S_IOERR, S_OK, T_FLUSH, T_IN, T_OUT};
use vssd_tests::mock::ring::Segment;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::scenario::Medium;
use vssd_tests::wait::Deadline;

const SIZE: u64 = 32 * MIB;
const DEPTH: usize = 32;
const LEN: u32 = 16384;

/// Sends requests until `depth` are in flight; their data lies anywhere in the region behind the seam, and whatever it is.
fn fill(queue: &mut Queue, seam: u64, depth: usize, rng: &mut StdRng) -> Result<()> {
    while queue.in_flight() < depth {
        let at = seam + rng.random_range(0..(16 << 20) - u64::from(LEN));
        let sector = rng.random_range(0..SIZE / 512 - 64);
        match rng.random_range(0..8) {
            0 => queue.prepare(T_FLUSH, 0, &[])?,
            1..5 => queue.prepare(T_IN, sector, &[Segment::into(at, LEN)])?,
            _ => queue.prepare(T_OUT, sector, &[Segment::out(at, LEN)])?,
        };
    }
    queue.ring.publish()
}

/// Takes answers until none is due or the daemon has ended the connection, which is a REJECT.
fn outcome(machine: &mut Machine) -> Result<Verdict> {
    let deadline = Deadline::after(PATIENCE);
    loop {
        while let Some(answer) = machine.queue(0)?.try_next()? {
            ensure!([S_OK, S_IOERR].contains(&answer.status), "{answer:?}");
        }
        if machine.queue(0)?.in_flight() == 0 {
            return Ok(Verdict::Pass);
        }
        if machine.link()?.has_ended() {
            return Ok(Verdict::Reject);
        }
        ensure!(!deadline.passed(), "nothing was used, and the connection goes on");
        thread::sleep(Duration::from_micros(200));
    }
}

/// The file behind the guest's buffers is shortened while they are in use.
fn buffers_go(arena: &Arena, rng: &mut StdRng) -> Result<Verdict> {
    let mut machine = arena.machine(Options::default())?;
    let seam = machine.ram.seam();
    fill(machine.queue(0)?, seam, DEPTH / 2, rng)?;
    let left = rng.random_range(0..16 << 20);
    ftruncate(machine.ram.regions()[1].file(), left)?;
    fill(machine.queue(0)?, seam, DEPTH, rng)?;
    outcome(&mut machine)
}

/// All memory of the guest goes, its rings among it.
fn rings_go(arena: &Arena, rng: &mut StdRng) -> Result<Verdict> {
    let mut machine = arena.machine(Options::default())?;
    let seam = machine.ram.seam();
    let shape = machine.shape(0);
    fill(machine.queue(0)?, seam, DEPTH, rng)?;
    // From here on the test itself must not look at the rings.
    ftruncate(machine.ram.regions()[0].file(), 0)?;
    rustix::io::write(&shape.kick, &1u64.to_ne_bytes())?;
    if machine.link()?.ends() { Ok(Verdict::Reject) } else { bail!("nothing was used: the session goes on") }
}

/// The inflight region is a file of the front-end's own, which it shortens under load.
fn inflight_region_goes(arena: &Arena, rng: &mut StdRng) -> Result<Verdict> {
    let mut machine = arena.machine(Options::default())?;
    let len = fstat(machine.inflight_file()?)?.st_size;
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, u64::try_from(len)?)?;
    let ours: OwnedFd = file.try_clone()?;
    machine.replace_inflight_file(file)?;
    machine.reconnect()?;
    let seam = machine.ram.seam();
    fill(machine.queue(0)?, seam, DEPTH / 2, rng)?;
    ftruncate(&ours, 0)?;
    fill(machine.queue(0)?, seam, DEPTH, rng)?;
    outcome(&mut machine)
}

type Attack = fn(&Arena, &mut StdRng) -> Result<Verdict>;

const ATTACKS: [(&str, Attack); 3] = [
    ("the file behind buffers is shortened", buffers_go),
    ("the file behind the rings is shortened", rings_go),
    ("the inflight region is shortened", inflight_region_goes),
];

fn memory_goes(class: &'static str, medium: Medium) -> Result<()> {
    let mut arena = Arena::new(class, medium, SIZE)?;
    let mut rng = rng(seed(class));
    for round in arena.rounds(300) {
        let (case, attack) = ATTACKS[round % ATTACKS.len()];
        let verdict = attack(&arena, &mut rng);
        arena.judge(case, verdict)?;
        let served = arena.good_session(case).map(|()| Verdict::Pass);
        arena.judge("a fresh session afterwards", served)?;
    }
    let log = arena.site.daemon.log();
    ensure!(log.contains("memory that the front-end shares is gone"), "the log does not say what happened");
    arena.end()
}

#[test]
fn class_13_memory_that_is_truncated_under_io_ends_only_its_own_session_on_nvram() -> Result<()> {
    memory_goes("class_13 nvram", Medium::Nvram)
}

#[test]
fn class_13_memory_that_is_truncated_under_io_ends_only_its_own_session_on_an_ssd() -> Result<()> {
    memory_goes("class_13 ssd", Medium::Ssd)
}

/// The pool's own file is shortened under the I/O of two tenants: from then on all fails, nothing wrong is ever
/// acknowledged, and the operator is told.
#[test]
fn class_13_a_pool_file_that_is_truncated_fails_its_medium_and_never_lies() -> Result<()> {
    let mut rng = rng(seed("class_13 pool"));
    let total = rounds(60).min(1000) / 10;
    for round in 0..total {
        let mut site = Site::new(Medium::Nvram, 100)?;
        let pool = File::options().write(true).open(&site.media)?;
        let left = if round % 3 == 0 { 0 } else { rng.random_range(0..8 * MIB) };
        let answered = [(); 2].map(|()| Arc::new(AtomicU64::new(0)));
        let tenants: Vec<_> = ["one", "other"]
            .into_iter()
            .zip(&answered)
            .map(|(name, answered)| {
                let machine = site.machine(name, SIZE, Options::default())?;
                let counted = Arc::clone(answered);
                Ok(thread::spawn(move || until_it_fails(machine, &counted)))
            })
            .collect::<Result<_>>()?;
        // Of both: where nothing was written, a read asks no medium.
        let begun = || {
            let works = answered.iter().all(|answered| answered.load(Ordering::Relaxed) > 500);
            Ok(works || tenants.iter().any(JoinHandle::is_finished))
        };
        Deadline::after(PATIENCE).until("I/O to begin", begun)?;
        thread::sleep(Duration::from_micros(rng.random_range(0..20_000)));
        pool.set_len(left)?;
        for tenant in tenants {
            tenant.join().unwrap().with_context(|| format!("round {round}, {left} left"))?;
        }
        site.daemon.expect_running()?;
        site.daemon.expect_clean_log()?;
        let status = site.operator.pool()?;
        let problem = status.problem.unwrap_or_default();
        ensure!(status.health == "failed", "round {round}: the pool is {}", status.health);
        ensure!(problem.contains("was shortened") && problem.contains("restart"), "{problem}");
        // Every later request fails too, also of a new front-end.
        let mut machine = Machine::start(&site.socket("one"), Options::default())?;
        let queue = machine.queue(0)?;
        // Where both have written before.
        let written = DEPTH as u64 * u64::from(LEN);
        ensure!(queue.read(written, 4096)? == Err(S_IOERR) && queue.write(written, &[1; 4096])? == S_IOERR);
        ensure!(queue.flush()? == S_IOERR, "a flush is acknowledged");
        let params = json!({ "name": "late", "size_bytes": MIB });
        ensure!(site.operator.call::<serde_json::Value>("device.create", &params).is_err());
    }
    println!("class_13 pool: {total} rounds");
    Ok(())
}

/// Writes and reads back at depth until a request fails, and counts those that were answered well. What is read must be
/// what was written, or an error.
fn until_it_fails(mut machine: Machine, answered: &AtomicU64) -> Result<()> {
    let deadline = Deadline::after(PATIENCE);
    let len = usize::try_from(LEN)?;
    let slots = SIZE / u64::from(LEN);
    let mut failed = false;
    let mut round = 0u8;
    while !failed {
        ensure!(!deadline.passed(), "nothing failed although the medium is gone");
        round = round.wrapping_add(1).max(1);
        let first = u64::from(round) * DEPTH as u64 % slots;
        for kind in [T_OUT, T_IN] {
            let queue = machine.queue(0)?;
            let bounce = queue.bounce();
            let mut heads = Vec::new();
            for i in 0..DEPTH as u64 {
                let at = bounce + i * u64::from(LEN);
                let byte = round.wrapping_mul(7).wrapping_add(u8::try_from(i)?);
                queue.ring.ram.fill(at, len, if kind == T_OUT { byte } else { 0xa5 });
                let segment = Segment { addr: at, len: LEN, write: kind == T_IN };
                let sector = (first + i) % slots * u64::from(LEN) / 512;
                heads.push((queue.prepare(kind, sector, &[segment])?, at, byte));
            }
            queue.ring.publish()?;
            for (head, at, byte) in heads {
                let answer = queue.wait(head, PATIENCE)?;
                match answer.status {
                    S_OK if kind == T_IN => {
                        let right = queue.ring.ram.read(at, len).iter().all(|found| *found == byte);
                        ensure!(right, "a read was acknowledged that did not give what was written");
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                    S_OK => drop(answered.fetch_add(1, Ordering::Relaxed)),
                    S_IOERR => failed = true,
                    other => bail!("status {other:#x}"),
                }
            }
            if failed {
                break;
            }
        }
    }
    Ok(())
}

/// An SSD pool's file is shortened, and lengthened again, between the requests of two tenants: what lay behind the end is an error
/// from then on, never zeroes, and what lies before it goes on.
#[test]
fn class_13_an_ssd_pool_file_that_is_truncated_fails_what_is_gone_and_serves_the_rest() -> Result<()> {
    const POOL: u64 = 100;
    const BLOCKS: u64 = SIZE / BLOCK;
    let mut rng = rng(seed("class_13 ssd pool"));
    let total = rounds(60).min(1000) / 10;
    let (mut served, mut failed) = (0u64, 0u64);
    for round in 0..total {
        let mut site = Site::new(Medium::Ssd, POOL)?;
        let pool = File::options().write(true).open(&site.media)?;
        let mut tenants = Vec::new();
        for (tenant, name) in [(1u64, "one"), (2, "other")] {
            let mut machine = site.machine(name, SIZE, Options::default())?;
            for block in 0..BLOCKS {
                ensure!(machine.queue(0)?.write(block * BLOCK, &filled(tenant, block))? == S_OK);
            }
            tenants.push((tenant, machine, vec![0u64; usize::try_from(BLOCKS)?]));
        }
        let left = rng.random_range(24 * MIB..48 * MIB) & !4095;
        pool.set_len(left)?;
        let (mut now_served, mut now_failed) = (0, 0);
        for pass in 0..3 {
            // Writes first: one behind the end would lengthen the file, and what lies between would read as zeroes.
            for (tenant, machine, versions) in &mut tenants {
                for _ in 0..64 {
                    let block = rng.random_range(0..BLOCKS);
                    let version = versions[usize::try_from(block)?] + 1;
                    match machine.queue(0)?.write(block * BLOCK, &filled(*tenant + 2 * version, block))? {
                        S_OK => versions[usize::try_from(block)?] = version,
                        S_IOERR => now_failed += 1,
                        other => bail!("round {round}: a write is answered {other:#x}"),
                    }
                }
                for block in 0..BLOCKS {
                    let right = filled(*tenant + 2 * versions[usize::try_from(block)?], block);
                    match machine.queue(0)?.read(block * BLOCK, right.len())? {
                        Ok(found) => {
                            ensure!(
                                found == right,
                                "round {round}, pass {pass}: block {block} of tenant {tenant} is wrong"
                            );
                            now_served += 1;
                        }
                        Err(S_IOERR) => now_failed += 1,
                        Err(other) => bail!("round {round}: a read is answered {other:#x}"),
                    }
                }
            }
            if pass == 1 {
                // Putting the length back does not bring the data back.
                pool.set_len(POOL * MIB)?;
            }
        }
        ensure!(now_served > 0 && now_failed > 0, "round {round}: {now_served} served, {now_failed} failed");
        let problem = site.operator.pool()?.problem.unwrap_or_default();
        ensure!(problem.contains("was shortened"), "round {round}: {problem:?}");
        ensure!(site.daemon.log().contains("E_MEDIUM"), "the log does not say what happened");
        drop(tenants);
        site.daemon.terminate()?;
        site.daemon.expect_clean_log()?;
        pool.set_len(left)?;
        let media = site.media.to_string_lossy().into_owned();
        let said = pool_command(&["check", &media]).unwrap_or_else(|error| format!("{error:#}"));
        ensure!(said.contains("truncated"), "round {round}: {said}");
        (served, failed) = (served + now_served, failed + now_failed);
    }
    println!("class_13 ssd pool: {total} rounds, {served} blocks read, {failed} requests refused");
    Ok(())
}

/// A block's worth of bytes that belong to nothing else.
fn filled(version: u64, block: u64) -> Vec<u8> {
    let word = (version << 32 | block | 1 << 63).to_le_bytes();
    word.repeat(usize::try_from(BLOCK).unwrap_or(0) / word.len())
}
