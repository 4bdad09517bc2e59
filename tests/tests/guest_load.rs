// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Verified I/O in a guest while its disk shrinks and grows and while its daemon is killed; and how long it takes a guest to
//! give up and take back a large disk. And how long it takes to stop a guest and make durable what it was told is written.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use vssd_protocol::control::{SyncAnswer, method};
use vssd_tests::agent::Job;
use vssd_tests::backend::{Backend, control_socket, device_socket, pool_command};
use vssd_tests::guest::Guest;
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::mock::operator::Operator;
use vssd_tests::paths;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::scenario::{self, Disk, Medium, PoolHost, blocks};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;

const NAME: &str = "vm1";
const SEED: u64 = 0x10ad;
/// How often the daemon is killed.
const KILLS: u64 = 10;
/// How long verified I/O runs beside the resizes.
const LOAD: Duration = Duration::from_secs(15);

fn boot(qemu: QemuBinary, socket: &Path) -> Result<Guest> {
    let kernel = Kernel::debian()?;
    let tool = paths::artifact("vssd-tests", "guest_blocks")?;
    let image =
        ImageBuilder::new(&kernel).file("/tools/guest_blocks", &tool).tool("fio").driver()?.build()?;
    Qemu::new(qemu, &image).memory_mib(768).disk(VhostUserDisk::new(socket)).boot()
}

/// Starts fio on the first half of the disk, which stays plugged: random writes and reads of mixed sizes, each read checked
/// against the checksum in it. Runs until told to stop; its exit code says whether anything was wrong.
fn start_load(guest: &mut Guest, disk: &Disk) -> Result<Job> {
    let half = disk.total_blocks / 2 * disk.block_size;
    guest.ok("rm -f /tmp/stop")?;
    guest.spawn(&format!(
        "while ! test -e /tmp/stop; do \
           fio --name=verify --filename=/dev/{} --size={half} --io_size=16M --rw=randwrite --bsrange=4k-64k \
             --direct=1 --ioengine=libaio --iodepth=32 --verify=crc32c --verify_fatal=1 --do_verify=1 \
             --verify_backlog=64 --randrepeat=0 --norandommap=0 --thread --minimal || exit 1; \
           rounds=$((rounds + 1)); \
         done; echo rounds $rounds",
        disk.name
    ))
}

fn end_load(guest: &mut Guest, load: &Job) -> Result<u64> {
    guest.ok("touch /tmp/stop")?;
    let out = guest.wait(load, Duration::from_secs(120))?;
    ensure!(out.success(), "verified I/O failed: {}\n{}", out.text(), out.errors());
    let text = out.text();
    let rounds = text.lines().rev().find_map(|line| line.strip_prefix("rounds ")).unwrap_or("0");
    let rounds = rounds.parse()?;
    ensure!(rounds > 0, "the load did not run a single round");
    Ok(rounds)
}

#[test]
fn verified_io_runs_through_50_shrinks_and_grows_without_an_error() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "300M")?;
    let socket = host.create(NAME, &["--size", "256M"])?;
    let mut guest = boot(QemuBinary::debian()?, &socket)?;
    let disk = scenario::bind(&mut guest, 0)?;
    let load = start_load(&mut guest, &disk)?;
    let half = disk.total_blocks / 2;
    let started = Instant::now();
    let mut cycles = 0;
    // At least 50, and long enough for fio to come round several times.
    while cycles < 50 || started.elapsed() < LOAD {
        let cycle = cycles;
        let start = half + (cycle * 37) % (half / 2);
        disk.hint(&mut guest, &[(start, half / 4)])?;
        let bytes = (half / 4 * disk.block_size).to_string();
        host.ctl.ok(&["shrink", NAME, &bytes, "--wait"])?;
        ensure!(blocks(&host.evicted(NAME)?) == half / 4, "cycle {cycle}");
        host.ctl.ok(&["grow", NAME, &bytes, "--wait"])?;
        // Hints for blocks that the driver does not know it has are ignored.
        disk.wait_plugged(&mut guest, disk.total_blocks)?;
        cycles += 1;
    }
    let took = started.elapsed();
    let rounds = end_load(&mut guest, &load)?;
    println!(
        "PASS {cycles} cycles under load … {:.1} s, {rounds} rounds of fio, no error",
        took.as_secs_f64()
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

#[test]
fn killing_the_daemon_under_load_costs_no_request_and_no_byte() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "300M")?;
    let socket = host.create(NAME, &["--size", "256M"])?;
    let mut guest = boot(QemuBinary::backports()?, &socket)?;
    let disk = scenario::bind(&mut guest, 0)?;
    let half = disk.total_blocks / 2;
    disk.fill(&mut guest, SEED, &[(half, half)])?;
    // Only hinted blocks may go: fio has not yet written to all of its half, and empty blocks would go next.
    guest.ok(&format!("echo hints > /sys/block/{}/vssd/nominate", disk.name))?;
    let load = start_load(&mut guest, &disk)?;
    let mut evicted = 0;
    let mut stall = Duration::ZERO;
    for kill in 0..KILLS {
        // Every kill hits a shrink in progress: only part of what is asked for is hinted at first.
        let start = half + kill * 160;
        disk.hint(&mut guest, &[(start, 64)])?;
        let bytes = (128 * disk.block_size).to_string();
        host.ctl.ok(&["shrink", NAME, &bytes, "--no-wait", "--deadline", "300s"])?;
        host.daemon.kill()?;
        std::thread::sleep(Duration::from_millis(100 * kill));
        let restarted = Instant::now();
        host.daemon.start()?;
        let read = format!("dd if=/dev/{} of=/dev/null bs=4k count=1 iflag=direct status=none", disk.name);
        guest.ok(&read)?;
        stall = stall.max(restarted.elapsed());
        disk.hint(&mut guest, &[(start, 64), (start + 64, 64)])?;
        evicted += 128;
        disk.wait_plugged(&mut guest, disk.total_blocks - evicted)?;
        ensure!(blocks(&host.evicted(NAME)?) == evicted, "kill {kill}");
    }
    let rounds = end_load(&mut guest, &load)?;
    let guests = scenario::normal(disk.evicted(&mut guest)?);
    ensure!(guests == scenario::normal(host.evicted(NAME)?), "the two sides disagree");
    println!(
        "PASS {KILLS} kills under load and in mid-shrink … {rounds} rounds of fio, no error; at most {} ms from a restart \
         to the first read",
        stall.as_millis()
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

/// Nine tenths of a disk go and come back, by messages of many ranges.
#[test]
fn a_guest_gives_32_gib_up_and_takes_them_back_in_less_than_a_second_each() -> Result<()> {
    const GIB: u64 = 1 << 30;
    const ROUNDS: usize = 5;
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let (pool, runtime) = (scratch.join("pool"), scratch.join("run"));
    // Made beforehand, so that it takes no more memory than what is written to it.
    File::create(&pool)?.set_len(35 * GIB)?;
    pool_command(&["create", "--nvram", &pool.to_string_lossy()])?;
    let mut daemon = Backend::pool(&[&pool], &runtime, &scratch.join("log"))?.started()?;
    let mut operator = Operator::connect(&control_socket(&runtime))?;
    operator.create(NAME, 33 * GIB, &json!({}))?;
    let image = scenario::image(&Kernel::debian()?)?;
    let socket = device_socket(&runtime, NAME);
    let mut guest = Qemu::new(QemuBinary::debian()?, &image).disk(VhostUserDisk::new(&socket)).boot()?;
    let disk = scenario::bind(&mut guest, 0)?;
    let sent = |guest: &mut Guest| scenario::number(&disk.status(guest)?, "messages");
    let (mut times, mut messages) = ([vec![], vec![]], [0, 0]);
    for _ in 0..ROUNDS {
        for (way, size) in [GIB, 33 * GIB].into_iter().enumerate() {
            let before = sent(&mut guest)?;
            let started = Instant::now();
            let job = operator.resize(NAME, size, &json!({}))?;
            let job = operator.finish(job.id)?;
            times[way].push(started.elapsed());
            ensure!(job.error.is_none() && job.plugged_bytes == size, "{job:?}");
            messages[way] = sent(&mut guest)? - before;
        }
    }
    for (times, (way, messages)) in times.iter_mut().zip([("shrink", messages[0]), ("grow", messages[1])]) {
        times.sort_unstable();
        let median = times[ROUNDS / 2];
        println!(
            "PASS {way} by 32 GiB … {median:.1?} in {messages} messages, median of {ROUNDS}: {times:.1?}"
        );
        ensure!(median < Duration::from_secs(1), "{way} took {median:?}");
    }
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    ensure!(daemon.terminate()?.success());
    daemon.expect_clean_log()
}

/// How often the guest is stopped.
const STOPS: usize = 20;

/// What whoever saves a VM does first: the processors stop, which drains the queues, and then everything that was acknowledged is
/// made durable. The guest's I/O goes on afterwards as if nothing had happened.
fn stop_and_sync(medium: Medium) -> Result<()> {
    let scratch = if matches!(medium, Medium::Ssd) { Scratch::on_disk()? } else { Scratch::new()? };
    let mut host = PoolHost::new(&scratch, medium, "300M")?;
    let socket = host.create(NAME, &["--size", "256M"])?;
    let mut guest = boot(QemuBinary::debian()?, &socket)?;
    let disk = scenario::bind(&mut guest, 0)?;
    let mut operator = host.operator()?;
    let load = start_load(&mut guest, &disk)?;
    std::thread::sleep(Duration::from_secs(1));
    let (mut stops, mut syncs, mut again) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..STOPS {
        std::thread::sleep(Duration::from_millis(150));
        let asked = Instant::now();
        guest.qmp().execute("stop", json!({}))?;
        stops.push(asked.elapsed());
        let mut sync = || -> Result<Duration> {
            let asked = Instant::now();
            operator.call::<SyncAnswer>(method::DEVICE_SYNC, &json!({ "names": [NAME] }))?;
            Ok(asked.elapsed())
        };
        syncs.push(sync()?);
        again.push(sync()?);
        guest.qmp().execute("cont", json!({}))?;
    }
    let rounds = end_load(&mut guest, &load)?;
    for (what, times) in [("stop", &mut stops), ("sync", &mut syncs), ("sync again", &mut again)] {
        times.sort_unstable();
        println!(
            "{medium:?}: {what} under load … median {:.2?}, longest {:.2?}",
            times[STOPS / 2],
            times[STOPS - 1]
        );
    }
    println!(
        "PASS {STOPS} stops under load on {medium:?} … {rounds} rounds of fio, no error, {:?}",
        guest.accel()
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

#[test]
fn a_guest_stopped_and_synced_under_load_never_notices_on_nvram() -> Result<()> {
    let _slot = guest_slot()?;
    stop_and_sync(Medium::Nvram)
}

#[test]
fn a_guest_stopped_and_synced_under_load_never_notices_on_an_ssd() -> Result<()> {
    let _slot = guest_slot()?;
    stop_and_sync(Medium::Ssd)
}
