// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask demo`: a guest gives up blocks of its own choice and gets them back.

use anyhow::{Result, ensure};
use vssd_protocol::units::ByteCount;

use super::Steps;
use crate::kernel::Kernel;
use crate::qemu::{Qemu, QemuBinary, VhostUserDisk};
use crate::scenario::{self, Disk, ENODATA, Medium, PoolHost, Range, blocks, normal};
use crate::scratch::Scratch;

const NAME: &str = "demo";
const SEED: u64 = 0x5eed;
const DISK: u64 = 1 << 30;
const SHRINK: u64 = 256 << 20;

/// Runs the demonstration. Fails where something shown does not hold.
pub fn run() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut steps = Steps::new();

    let mut host = PoolHost::new(&scratch, Medium::Nvram, "1200M")?;
    let socket = host.create(NAME, &["--size", "1G"])?;
    steps.done(format!("vSSD created: {NAME}, {}, on a pool in memory", ByteCount(DISK)));

    let kernel = Kernel::debian()?;
    let image = scenario::image(&kernel)?;
    let mut guest = Qemu::new(QemuBinary::debian()?, &image).disk(VhostUserDisk::new(&socket)).boot()?;
    steps.done(format!("guest booted: Linux {} ({:?})", guest.release(), guest.accel()));

    let disk = scenario::bind(&mut guest, 0)?;
    steps.done(format!(
        "driver bound: /dev/{}, {} blocks of {}",
        disk.name,
        disk.total_blocks,
        ByteCount(disk.block_size)
    ));

    disk.fill(&mut guest, SEED, &[(0, disk.total_blocks)])?;
    steps.done(format!("data written: every block of {} holds its own pattern", ByteCount(DISK)));
    let scan = disk.agree(&mut guest, &host, NAME, SEED)?;
    ensure!(scan.blocks("intact") == disk.total_blocks, "not every block is intact");
    steps.done("data checked: every block intact");

    let nominated = choose(&disk);
    disk.hint(&mut guest, &nominated)?;
    steps.done(format!(
        "hints written: {} ranges, {} blocks, from all over the disk",
        nominated.len(),
        blocks(&nominated)
    ));

    let said = host.ctl.ok(&["shrink", NAME, "256M", "--wait"])?;
    steps.done(format!(
        "shrunk by {}: job {}",
        ByteCount(SHRINK),
        scenario::find(&said, "state").map(ToString::to_string).unwrap_or_default()
    ));
    let gone = host.evicted(NAME)?;
    println!("{:>8}  gave up {}", "", listing(&gone));
    ensure!(normal(gone) == normal(nominated.clone()), "other blocks went than were nominated");

    let scan = disk.agree(&mut guest, &host, NAME, SEED)?;
    ensure!(scan.blocks(ENODATA) == blocks(&nominated), "not exactly the nominated blocks answer ENODATA");
    ensure!(
        scan.blocks("intact") == disk.total_blocks - blocks(&nominated),
        "a block that stayed is not intact"
    );
    steps.done(format!(
        "read back: {} evicted blocks answer ENODATA, {} others intact",
        scan.blocks(ENODATA),
        scan.blocks("intact")
    ));

    host.ctl.ok(&["grow", NAME, "256M", "--wait"])?;
    steps.done(format!("grown back by {}", ByteCount(SHRINK)));

    let scan = disk.agree(&mut guest, &host, NAME, SEED)?;
    ensure!(
        normal(scan.ranges("zero").to_vec()) == normal(nominated.clone()),
        "a returned block is not zero"
    );
    ensure!(
        scan.blocks("intact") == disk.total_blocks - blocks(&nominated),
        "a block that stayed is not intact"
    );
    steps.done(format!(
        "read back: {} returned blocks read zero, {} others intact",
        scan.blocks("zero"),
        scan.blocks("intact")
    ));

    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()?;
    steps.done("ended: the guest's kernel never complained, the pool is sound");
    steps.end();
    Ok(())
}

/// 256 MiB in runs of different length, spread over the disk, no two adjacent.
fn choose(disk: &Disk) -> Vec<Range> {
    let mut left = SHRINK / disk.block_size;
    let mut ranges = Vec::new();
    let mut at = 3;
    for length in [1, 7, 64, 200].iter().cycle() {
        let count = left.min(*length);
        ranges.push((at, count));
        left -= count;
        at += length * 4 - 1;
        if left == 0 {
            break;
        }
    }
    ranges
}

/// The first few ranges, for people.
fn listing(ranges: &[Range]) -> String {
    let shown: Vec<String> = ranges.iter().take(6).map(|(start, count)| format!("{start}+{count}")).collect();
    let more = if ranges.len() > shown.len() { ", …" } else { "" };
    format!("{} blocks in {} ranges: {}{more}", blocks(ranges), ranges.len(), shown.join(", "))
}
