// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest moves from one QEMU to another, and back and forth, while verified I/O runs on its vSSD: no byte is lost, no request
//! fails, and the session of our driver goes on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vssd_tests::agent::Job;
use vssd_tests::guest::Guest;
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::paths;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::report::Report;
use vssd_tests::scenario::{self, ENODATA, Medium, PoolHost};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;

const NAME: &str = "vm1";
const SEED: u64 = 0x6d6f_7665;
/// How often a guest moves.
const MOVES: u32 = 2;

/// fio on the first half of a disk: random writes of mixed sizes, each read back and checked against the checksum in it. Runs
/// until told to stop; its exit code says whether anything was wrong.
fn start_load(guest: &mut Guest, name: &str, bytes: u64) -> Result<Job> {
    guest.ok("rm -f /tmp/stop")?;
    guest.spawn(&format!(
        "while ! test -e /tmp/stop; do \
           fio --name=verify --filename=/dev/{name} --size={bytes} --io_size=2M --rw=randwrite --bsrange=4k-64k \
             --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1 \
             --verify_backlog=64 --randrepeat=0 --norandommap=0 --thread --minimal || exit 1; \
           echo round; \
         done"
    ))
}

/// Rounds of the load that have ended.
fn rounds(load: &Job) -> usize {
    String::from_utf8_lossy(&load.stdout()).lines().filter(|line| *line == "round").count()
}

fn end_load(guest: &mut Guest, load: &Job) -> Result<usize> {
    guest.ok("touch /tmp/stop")?;
    let out = guest.wait(load, Duration::from_secs(60))?;
    ensure!(out.success(), "verified I/O failed: {}\n{}", out.text(), out.errors());
    Ok(rounds(load))
}

/// Moves the guest a few times, with the load running before, during and after. Gives the longest stop in milliseconds.
fn moves(guest: &mut Guest, machine: &Qemu, load: &Job) -> Result<u64> {
    let mut longest = 0;
    for number in 0..MOVES {
        let said = guest.migrate(machine).with_context(|| format!("move {number}"))?;
        longest = longest.max(said["downtime"].as_u64().unwrap_or(0));
        let before = rounds(load);
        vssd_tests::wait::Deadline::secs(60).until("the load to go on after the move", || {
            ensure!(!load.ended(), "the load ended: {}", String::from_utf8_lossy(&load.stdout()));
            Ok(rounds(load) > before)
        })?;
    }
    Ok(longest)
}

fn our_driver(qemu: QemuBinary, medium: Medium) -> Result<String> {
    let scratch = if matches!(medium, Medium::Ssd) { Scratch::on_disk()? } else { Scratch::new()? };
    let mut host = PoolHost::new(&scratch, medium, "300M")?;
    let socket = host.create(NAME, &["--size", "128M"])?;
    let tool = paths::artifact("vssd-tests", "guest_blocks")?;
    let kernel = Kernel::debian()?;
    let image =
        ImageBuilder::new(&kernel).file("/tools/guest_blocks", &tool).tool("fio").driver()?.build()?;
    let machine = Qemu::new(qemu, &image).disk(VhostUserDisk::new(&socket));
    let mut guest = machine.boot()?;
    let disk = scenario::bind(&mut guest, 0)?;
    let half = disk.total_blocks / 2;
    disk.fill(&mut guest, SEED, &[(half, half)])?;
    disk.hint(&mut guest, &[(half, half / 2)])?;
    let eighth = (half / 4 * disk.block_size).to_string();
    host.ctl.ok(&["shrink", NAME, &eighth, "--wait"])?;
    let before = disk.status(&mut guest)?;

    let load = start_load(&mut guest, &disk.name, half * disk.block_size)?;
    let longest = moves(&mut guest, &machine, &load)?;
    let after = disk.status(&mut guest)?;
    for key in ["epoch", "hellos", "resyncs", "plugged_blocks"] {
        ensure!(before[key] == after[key], "{key} was {} and is {}", before[key], after[key]);
    }
    // The operator reaches the guest where it is now; what it gives up it says, and what it kept holds.
    host.ctl.ok(&["shrink", NAME, &eighth, "--wait"])?;
    let rounds = end_load(&mut guest, &load)?;
    let scan = disk.scan(&mut guest, SEED)?;
    ensure!(scan.blocks(ENODATA) == half / 2, "{scan:?}");
    ensure!(scan.blocks("intact") == half / 2, "{scan:?}");
    host.ctl.ok(&["grow", NAME, &eighth, "--wait"])?;
    disk.wait_plugged(&mut guest, disk.total_blocks - half / 4)?;
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    let moved = host.daemon.log().matches("guest is being moved").count();
    ensure!(moved >= usize::try_from(MOVES)?, "the daemon logged {moved} moves");
    host.finish()?;
    Ok(format!("{MOVES} moves, {rounds} rounds of fio, longest stop {longest} ms, one session"))
}

fn stock_driver(qemu: QemuBinary) -> Result<String> {
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "300M")?;
    let socket = host.create(NAME, &["--size", "128M", "--max", "192M"])?;
    let image = ImageBuilder::new(&Kernel::debian()?).tool("fio").build()?;
    let machine = Qemu::new(qemu, &image).disk(VhostUserDisk::new(&socket));
    let mut guest = machine.boot()?;
    let name = guest.disk(0)?;
    let load = start_load(&mut guest, &name, 64 << 20)?;
    let longest = moves(&mut guest, &machine, &load)?;
    let rounds = end_load(&mut guest, &load)?;
    // A stock guest hears of a new size where it is now.
    host.ctl.ok(&["grow", NAME, "64M", "--wait"])?;
    let size = format!("cat /sys/block/{name}/size");
    let sectors = (192u64 << 20) / 512;
    vssd_tests::wait::Deadline::secs(20)
        .until("the guest to see the new size", || Ok(guest.ok(&size)? == sectors.to_string()))?;
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()?;
    Ok(format!("{MOVES} moves, {rounds} rounds of fio, longest stop {longest} ms"))
}

#[test]
fn guest_moves_between_qemus_under_verified_io_and_loses_nothing() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("live migration");
    report.outcome("our driver, QEMU 7.2, NV-RAM", our_driver(QemuBinary::debian()?, Medium::Nvram));
    report.outcome("our driver, QEMU 10.0, SSD", our_driver(QemuBinary::backports()?, Medium::Ssd));
    report.outcome("stock driver, QEMU 7.2", stock_driver(QemuBinary::debian()?));
    report.finish()
}
