// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is left after a power cut: a whole host with KVM and NV-RAM is emulated, and killed in the middle of its work.

use std::time::Instant;

use anyhow::Result;
use vssd_tests::emulated_host::{EmulatedHost, InnerGuest, NVRAM};
use vssd_tests::report::Report;
use vssd_tests::serial::guest_slot;

const BYTES: u64 = 4 << 20;

/// Serves the pool in the background, once it can.
fn serve(host: &mut EmulatedHost) -> Result<()> {
    host.ok(&format!(
        "vssd-backend --pool {NVRAM}/pool --runtime-dir /run/vssd < /dev/null > /run/backend.log 2>&1 &"
    ))?;
    let control = "for i in $(seq 300); do test -S /run/vssd/control.sock && exit 0; sleep 0.1; done; cat /run/backend.log; exit 1";
    host.ok(control).map(drop)
}

/// A sum of what the inner guest reads from its vSSD, past its page cache.
fn sum(host: &mut EmulatedHost, inner: &InnerGuest) -> Result<String> {
    sum_from(host, inner, 0)
}

/// As [`sum`], from that piece of 4 MiB on.
fn sum_from(host: &mut EmulatedHost, inner: &InnerGuest, piece: u64) -> Result<String> {
    let (count, skip) = (BYTES >> 16, (piece * BYTES) >> 16);
    let read =
        format!("dd if=/dev/vda bs=64k count={count} skip={skip} iflag=direct 2>/dev/null | sha256sum");
    host.ok(&inner.run(&read))
}

/// One power cut for all of it: booting takes most of the time.
#[test]
fn power_cut_keeps_nvram_and_inner_kvm_works() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("power cut of an emulated host");
    let image = EmulatedHost::image()?
        .artifact("vssd-backend", "vssd-backend")?
        .artifact("balloon-ctl", "balloon-ctl")?
        .build()?;
    let mut host = EmulatedHost::new(&image, 256)?;
    let boot = host.boot()?.boot_time();
    report.pass("the host boots", format!("{:.1} s", boot.as_secs_f64()));

    host.ok(&format!("vssd-backend pool create --nvram {NVRAM}/pool:64M"))?;
    serve(&mut host)?;
    host.ok("balloon-ctl --socket /run/vssd/control.sock create disk --size 16M")?;
    let inner = InnerGuest::new("inner").disk("/run/vssd/dev/disk.sock");
    let started = Instant::now();
    host.ok(&inner.start())?;
    let release = host.ok(&inner.run("uname -r"))?;
    report.pass(
        "an inner guest boots with KVM",
        format!("{release}, {:.1} s", started.elapsed().as_secs_f64()),
    );
    // No other accelerator offers that clock.
    let clock = host.ok(&inner.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"))?;
    report.check("its clock is KVM's", clock == "kvm-clock", clock);
    host.ok(&inner.run(&format!(
        "dd if=/dev/urandom of=/dev/vda bs=64k count={} conv=fsync 2>/dev/null",
        BYTES >> 16
    )))?;
    let written = sum(&mut host, &inner)?;

    // With a timer's commit so far away, metadata is durable only where somebody asked for it.
    host.ok(&format!("mount -o remount,commit=10000 {NVRAM}; sync"))?;
    host.ok(&format!("echo synced > {NVRAM}/written && xfs_io -c fsync {NVRAM}/written"))?;
    host.ok(&format!(
        "xfs_io -f -c 'falloc 0 2m' -c 'mmap -S 0 2m' -c 'mwrite -S 0x5a 0 2m' {NVRAM}/stored"
    ))?;
    host.ok(&format!(
        "xfs_io -f -c 'truncate 2m' -c fsync -c 'mmap 0 2m' -c 'mwrite -S 0x5a 0 2m' {NVRAM}/unsynced"
    ))?;
    host.power_cut()?;

    host.boot()?;
    report.check(
        "a file that was synced is there",
        host.ok(&format!("cat {NVRAM}/written"))? == "synced",
        "",
    );
    let stored = |host: &mut EmulatedHost, name: &str| -> Result<String> {
        host.ok(&format!("tr -d Z < {NVRAM}/{name} | wc -c"))
    };
    report.check("stores through a mapping with MAP_SYNC are there", stored(&mut host, "stored")? == "0", "");
    let lost = stored(&mut host, "unsynced")?;
    report.check(
        "stores through one without are not",
        lost == (2 << 20).to_string(),
        format!("{lost} bytes of 2 MiB lost"),
    );

    serve(&mut host)?;
    host.ok(&inner.start())?;
    report.check(
        "a vSSD holds what was flushed",
        sum(&mut host, &inner)? == written,
        format!("{} MiB", BYTES >> 20),
    );
    host.ok(&inner.kill())?;
    host.ok(&format!("killall vssd-backend; while pidof vssd-backend > /dev/null; do sleep 0.1; done; vssd-backend pool check {NVRAM}/pool"))?;
    report.pass("the pool is sound", "");
    host.running()?.expect_quiet_kernel()?;
    report.finish()
}

/// C-12: a guest never flushes, and what it was told is written before a sync is there after a power cut. The pool is on a file
/// whose blocks the file system has yet to take, which it forgets unless somebody syncs: what is written behind the sync is lost.
#[test]
fn power_cut_keeps_what_was_synced_and_never_flushed() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("power cut behind a sync of what no guest flushed");
    let image = EmulatedHost::image()?
        .artifact("vssd-backend", "vssd-backend")?
        .artifact("balloon-ctl", "balloon-ctl")?
        .build()?;
    let mut host = EmulatedHost::new(&image, 256)?;
    host.boot()?;
    host.ok(&format!("vssd-backend pool create --ssd {NVRAM}/pool:64M"))?;
    serve(&mut host)?;
    host.ok("balloon-ctl --socket /run/vssd/control.sock create disk --size 16M")?;
    let inner = InnerGuest::new("inner").disk("/run/vssd/dev/disk.sock");
    host.ok(&inner.start())?;
    host.ok(&inner.run("true"))?;
    host.ok(&format!("mount -o remount,commit=10000 {NVRAM}; sync"))?;
    let write = |piece: u64| {
        let (count, seek) = (BYTES >> 16, (piece * BYTES) >> 16);
        inner.run(&format!(
            "dd if=/dev/urandom of=/dev/vda bs=64k count={count} seek={seek} oflag=direct 2>/dev/null"
        ))
    };
    host.ok(&write(0))?;
    let covered = sum_from(&mut host, &inner, 0)?;
    let said = host.ok("balloon-ctl --socket /run/vssd/control.sock sync disk")?;
    host.ok(&write(1))?;
    let late = sum_from(&mut host, &inner, 1)?;
    host.power_cut()?;

    host.boot()?;
    serve(&mut host)?;
    host.ok(&inner.start())?;
    report.check(
        "what was written before the sync is there",
        sum_from(&mut host, &inner, 0)? == covered,
        said,
    );
    report.check("what was written behind it is not", sum_from(&mut host, &inner, 1)? != late, "");
    host.ok(&inner.kill())?;
    host.ok(&format!("killall vssd-backend; while pidof vssd-backend > /dev/null; do sleep 0.1; done; vssd-backend pool check {NVRAM}/pool"))?;
    report.pass("the pool is sound", "");
    host.running()?.expect_quiet_kernel()?;
    report.finish()
}
