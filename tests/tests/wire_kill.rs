// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kill -9` of the daemon at random moments under verified I/O: every request in flight is carried out once, no answer is an
//! error, no read is wrong, and the guest's I/O stands still for a short time only.
//!
//! The load is 32 requests deep on each queue, half of them aimed at a few sectors that are written again and again, also by
//! requests in flight together, so that a request carried out again too late or not at all leaves a version behind that no
//! order of the answers allows.
//!
//! Some 1,500 kills: `cargo test --release -p vssd-tests --test wire_kill -- --ignored --nocapture`

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::{Value, json};
use vssd_protocol::control::{JobInfo, method};
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::follower::Follower;
use vssd_tests::mock::load::{Counts, Load, Profile};
use vssd_tests::mock::machine::{F_EVENT_IDX, Machine, Options};
use vssd_tests::mock::media::Slots;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::scenario::Medium;

const SIZE: u64 = 64 * MIB;
/// A disk whose metadata change so fast that the pool is often at a checkpoint.
const SMALL: u64 = 24 * MIB;
const SMALL_BLOCK: u64 = 4096;

/// From this many kills on, their 99th percentile says something.
const ENOUGH: usize = 100;

/// What the load meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disk {
    /// Every block is there, and nothing is discarded: requests change data only.
    Full,
    /// Blocks come and go with writes and discards. What was answered and not yet flushed must outlive the daemon too: its
    /// guest goes on and will not write it again.
    Thin,
    /// As thin, and killed while the pool writes a checkpoint, if one begins soon enough.
    Checkpoint,
}

/// How long I/O stood still, one entry a kill.
#[derive(Debug, Default)]
struct Stalls(Vec<Duration>);

impl Stalls {
    /// Prints percentiles and holds them to what is promised.
    fn judge(mut self, what: &str) -> Result<()> {
        self.0.sort_unstable();
        let at = |percent: usize| self.0[(self.0.len() - 1) * percent / 100];
        let (p50, p99, max) = (at(50), at(99), at(100));
        println!("{what}: stall of {} kills: p50 {p50:.1?}, p99 {p99:.1?}, max {max:.1?}", self.0.len());
        let bound = if self.0.len() >= ENOUGH { p99 } else { p50 };
        ensure!(bound <= Duration::from_secs(1), "{what}: I/O stood still for {bound:?}");
        // The kernel lets go of a dead daemon's files only when the disk has done what it was doing for it.
        ensure!(max <= Duration::from_secs(15), "{what}: I/O stood still for {max:?} once");
        Ok(())
    }
}

fn load(site: &mut Site, disk: Disk, options: Options, seed: u64) -> Result<(Machine, Load)> {
    let (size, block) = if disk == Disk::Checkpoint { (SMALL, SMALL_BLOCK) } else { (SIZE, BLOCK) };
    let mut machine = site.machine("vm1", size, options)?;
    let queues = (0..options.queues).map(|index| machine.take_queue(index)).collect::<Result<_>>()?;
    let unit = machine.logical_block()?.into();
    let zeroing = disk != Disk::Full;
    let profile = Profile { bytes: 0..size, unit, block, depth: 32, zeroing, tables: true };
    let mut load = Load::new(queues, profile, seed)?.overlapping();
    if disk == Disk::Full {
        load.touch_all()?;
    }
    Ok((machine, load))
}

/// Waits for less time than a sleep takes.
fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// Runs I/O until a checkpoint is being written, for a while.
fn run_to_checkpoint(load: &mut Load, slots: &Slots) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(500) && !slots.one_is_being_written()? {
        load.fill()?;
        load.collect_ready()?;
    }
    Ok(())
}

/// V-38, V-46: `kills` times the daemon is killed at a moment of chance with up to 64 requests on their way.
fn kills(medium: Medium, kills: u32, options: Options, disk: Disk, seed: u64) -> Result<()> {
    let mut site = match disk {
        Disk::Checkpoint => Site::with(medium, 48, &["--block-size", "4K"], &[])?,
        _ => Site::new(medium, 100)?,
    };
    let (mut machine, mut load) = load(&mut site, disk, options, seed)?;
    let slots = Slots::of(&site.media)?;
    // Microseconds in which a full queue is answered.
    let window = if matches!(medium, Medium::Nvram) { 150 } else { 1500 };
    let mut rng = rng(!seed);
    let mut stalls = Stalls::default();
    let (mut caught, mut twice, mut mid_checkpoint) = (0, 0, 0);
    for kill in 0..kills {
        load.run(rng.random_range(100..600)).with_context(|| format!("before kill {kill}"))?;
        load.fill()?;
        if disk == Disk::Checkpoint {
            run_to_checkpoint(&mut load, &slots)?;
        } else {
            spin(Duration::from_micros(rng.random_range(0..window)));
        }
        let mut killed = Instant::now();
        site.daemon.kill()?;
        mid_checkpoint += u32::from(slots.one_is_being_written()?);
        load.collect_ready().with_context(|| format!("at kill {kill}"))?;
        caught += load.in_flight();
        site.revive()?;
        machine.reconnect()?;
        ensure!(machine.channel()?.config_changed(PATIENCE)?, "V-8: no message after reconnect {kill}");
        // Now and then the next one dies before it has caught up.
        if rng.random_ratio(1, 4) {
            thread::sleep(Duration::from_micros(rng.random_range(0..3000)));
            twice += 1;
            killed = Instant::now();
            site.kill_and_restart()?;
            machine.reconnect()?;
        }
        load.drain().with_context(|| format!("after kill {kill}"))?;
        stalls.0.push(killed.elapsed());
        if kill % 5 == 4 {
            load.verify().with_context(|| format!("after kill {kill}"))?;
        }
    }
    load.verify()?;
    let Counts { reads, writes, zeroings, overtaken, overlaps, mixtures, .. } = load.counts;
    println!(
        "{medium:?}, {disk:?}: {} kills ({twice} before the last was over) met {caught} requests without an answer; {reads} \
         reads, {writes} writes, {zeroings} zeroings; {overtaken} answers overtook, {overlaps} writes overlapped, {mixtures} \
         sectors mixed; \
         {mid_checkpoint} kills in mid-checkpoint, {} checkpoints",
        kills + twice,
        slots.newest()?
    );
    ensure!(caught > 0, "no kill met a request in flight");
    ensure!(overlaps > 0, "no writes overlapped");
    let in_order = matches!(medium, Medium::Nvram);
    ensure!(in_order || overtaken > 0, "no request overtook another");
    ensure!(disk != Disk::Checkpoint || mid_checkpoint > 0, "no kill met a checkpoint");
    stalls.judge(&format!("{medium:?}, {disk:?}"))?;
    site.finish()
}

#[test]
fn twenty_kills_under_load_lose_no_request_on_an_ssd() -> Result<()> {
    kills(Medium::Ssd, 20, Options::default(), Disk::Full, seed("wire_kill/ssd"))
}

#[test]
fn twenty_kills_under_load_lose_no_request_on_nvram() -> Result<()> {
    kills(Medium::Nvram, 20, Options::default(), Disk::Full, seed("wire_kill/nvram"))
}

#[test]
fn twenty_kills_lose_no_first_write_and_no_discard_on_an_ssd() -> Result<()> {
    kills(Medium::Ssd, 20, Options::default(), Disk::Thin, seed("wire_kill/thin-ssd"))
}

#[test]
fn twenty_kills_lose_no_first_write_and_no_discard_on_nvram() -> Result<()> {
    kills(Medium::Nvram, 20, Options::default(), Disk::Thin, seed("wire_kill/thin-nvram"))
}

#[test]
fn twenty_kills_aimed_at_checkpoints_lose_nothing_on_an_ssd() -> Result<()> {
    kills(Medium::Ssd, 20, Options::default(), Disk::Checkpoint, seed("wire_kill/checkpoint-ssd"))
}

#[test]
fn twenty_kills_aimed_at_checkpoints_lose_nothing_on_nvram() -> Result<()> {
    kills(Medium::Nvram, 20, Options::default(), Disk::Checkpoint, seed("wire_kill/checkpoint-nvram"))
}

#[test]
fn ten_kills_of_a_ring_without_event_index_whose_indices_wrap_lose_no_request() -> Result<()> {
    let options = Options { without: F_EVENT_IDX, before_wrap: 700, ..Options::default() };
    kills(Medium::Ssd, 10, options, Disk::Full, seed("wire_kill/wrap"))
}

fn unfinished(site: &mut Site) -> Result<Option<JobInfo>> {
    let list: Value = site.operator.call(method::JOB_LIST, &json!({}))?;
    let jobs: Vec<JobInfo> = serde_json::from_value(list["jobs"].clone())?;
    Ok(jobs.into_iter().find(|job| !job.state.is_final()))
}

/// V-38, V-39: killed in the middle of shrinks and grows of the upper half, under verified I/O on the lower.
fn kills_in_resizes(medium: Medium, kills: u32, seed: u64) -> Result<()> {
    let mut site = Site::with(medium, 100, &["--block-size", "16K"], &[])?;
    let mut machine = site.machine("vm1", SIZE, Options::default())?;
    let driver = Driver::start(machine.take_queue(0)?)?;
    let (total, block) = (driver.hello.total_blocks, driver.block_size());
    let unit = machine.logical_block()?.into();
    let profile = Profile { bytes: 0..SIZE / 2, unit, block, depth: 32, zeroing: true, tables: true };
    let mut load = Load::new(vec![machine.take_queue(1)?], profile, seed)?.overlapping();
    let follower = Follower::start(driver);
    let mut rng: StdRng = rng(!seed);
    let mut stalls = Stalls::default();
    let (mut caught, mut mid_resize) = (0, 0);
    for kill in 0..kills {
        load.run(rng.random_range(20..200)).with_context(|| format!("before kill {kill}"))?;
        let target = u64::from(rng.random_range(total / 2 + 8..=total)) * block;
        site.operator.resize("vm1", target, &json!({}))?;
        let window = if matches!(medium, Medium::Nvram) { 4_000 } else { 20_000 };
        let limit = Duration::from_micros(rng.random_range(0..window));
        let asked = Instant::now();
        while asked.elapsed() < limit {
            load.fill()?;
            load.collect_ready()?;
        }
        load.fill()?;
        let killed = Instant::now();
        site.daemon.kill()?;
        load.collect_ready()?;
        caught += load.in_flight();
        site.revive()?;
        machine.reconnect()?;
        load.drain().with_context(|| format!("after kill {kill}"))?;
        stalls.0.push(killed.elapsed());
        ensure!(follower.is_well(), "after kill {kill}: {:?}", follower.end());
        if let Some(job) = unfinished(&mut site)? {
            mid_resize += 1;
            let job = match site.operator.finish(job.id) {
                Ok(job) => job,
                // The driver may know why.
                Err(error) => {
                    let driver = follower.end().map(|driver| (driver.sizes, driver.count()));
                    return Err(error.context(format!("after kill {kill}; the driver: {driver:?}")));
                }
            };
            ensure!(job.state == vssd_protocol::control::JobState::Done, "after kill {kill}: {job:?}");
        }
        let shown = site.operator.show("vm1")?;
        ensure!(
            shown.plugged_bytes == target,
            "after kill {kill}: {} plugged, not {target}",
            shown.plugged_bytes
        );
    }
    load.verify()?;
    let mut driver = follower.end()?;
    driver.agree(&mut site.operator, "vm1")?;
    println!(
        "{medium:?}: {kills} kills, {mid_resize} in mid-resize, met {caught} requests without an answer; {} messages of the \
         driver; {:?}",
        driver.messages, load.counts
    );
    ensure!(mid_resize > 0 && caught > 0, "no kill met a resize or a request");
    stalls.judge(&format!("{medium:?}, resizing"))?;
    site.finish()
}

#[test]
fn twenty_kills_in_mid_resize_leave_both_sides_agreed_on_nvram() -> Result<()> {
    kills_in_resizes(Medium::Nvram, 20, seed("wire_kill/resize-nvram"))
}

#[test]
fn twenty_kills_in_mid_resize_leave_both_sides_agreed_on_an_ssd() -> Result<()> {
    kills_in_resizes(Medium::Ssd, 20, seed("wire_kill/resize-ssd"))
}

fn many_kills(medium: Medium, seed: u64) -> Result<()> {
    for (run, disk) in (0..).zip([Disk::Full, Disk::Thin, Disk::Checkpoint]) {
        kills(medium, 200, Options::default(), disk, seed.wrapping_add(run))?;
    }
    kills_in_resizes(medium, 150, seed)
}

#[test]
#[ignore = "takes minutes; the module says how to run it"]
fn seven_hundred_and_fifty_kills_lose_nothing_on_an_ssd() -> Result<()> {
    many_kills(Medium::Ssd, seed("wire_kill/long-ssd"))
}

#[test]
#[ignore = "takes minutes; the module says how to run it"]
fn seven_hundred_and_fifty_kills_lose_nothing_on_nvram() -> Result<()> {
    many_kills(Medium::Nvram, seed("wire_kill/long-nvram"))
}
