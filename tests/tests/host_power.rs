// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is left after a power cut: a whole host with KVM and NV-RAM is emulated, and killed in the middle of its work.

use std::time::Instant;

use anyhow::{Context, Result};
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
    host.ok(&inner
        .run(&format!("dd if=/dev/vda bs=64k count={} iflag=direct 2>/dev/null | sha256sum", BYTES >> 16)))
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

/// A load for an inner guest that goes on over the cut: each round writes a block of its vSSD and reads it back. The rounds
/// are counted in `/tmp/rounds`; what went wrong is in `/tmp/wrong`.
const LOAD: &str = "(n=0; while :; do n=$((n+1)); at=$((n%64)); \
    yes $n | dd of=/dev/vda bs=64k count=1 seek=$at iflag=fullblock oflag=direct 2>/tmp/said || cat /tmp/said >> /tmp/wrong; \
    test \"$(dd if=/dev/vda bs=64k count=1 skip=$at iflag=direct 2>/dev/null | head -n 1)\" = $n || echo read $n >> /tmp/wrong; \
    echo $n > /tmp/rounds.new; mv /tmp/rounds.new /tmp/rounds; done) </dev/null >/dev/null 2>&1 &";

/// Guest memory stays where it is: in a file on the NV-RAM.
const IGNORE_SHARED: &str =
    r#"migrate-set-capabilities={"capabilities":[{"capability":"x-ignore-shared","state":true}]}"#;

fn rounds(host: &mut EmulatedHost, inner: &InnerGuest) -> Result<u64> {
    let said = host.ok(&inner.run("sleep 3; cat /tmp/rounds"))?;
    said.parse().with_context(|| format!("not a number of rounds: {said:?}"))
}

/// QEMU's part of a persistent VM, by hand: what is in memory, what the processors do and the vSSD go on where they were.
#[test]
fn a_guest_with_memory_in_nvram_goes_on_after_a_power_cut() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("a guest over a power cut");
    let image = EmulatedHost::image()?
        .artifact("vssd-backend", "vssd-backend")?
        .artifact("balloon-ctl", "balloon-ctl")?
        .artifact("vssd-tests", "qmp_run")?
        .build()?;
    let mut host = EmulatedHost::new(&image, 512)?;
    host.boot()?;
    host.ok(&format!("vssd-backend pool create --nvram {NVRAM}/pool:64M"))?;
    serve(&mut host)?;
    host.ok("balloon-ctl --socket /run/vssd/control.sock create disk --size 16M")?;
    // Written once, its blocks need no fault and no metadata at first touch any more.
    host.ok(&format!(
        "dd if=/dev/zero of={NVRAM}/ram bs=2M count={} conv=fsync",
        InnerGuest::MEMORY_MIB / 2
    ))?;
    let inner = InnerGuest::new("inner").disk("/run/vssd/dev/disk.sock").memory_file(&format!("{NVRAM}/ram"));
    host.ok(&inner.start())?;
    host.ok(&inner.run(LOAD))?;
    let before = rounds(&mut host, &inner)?;
    let started = Instant::now();
    let save = format!(r#"migrate={{"uri":"exec:cat > {NVRAM}/state"}}"#);
    host.ok(&format!("qmp_run {} stop '{IGNORE_SHARED}' '{save}' migrated", inner.qmp()))?;
    host.ok(&format!("xfs_io -c fsync {NVRAM}/state && xfs_io -c fsync {NVRAM}/ram"))?;
    report.pass("the guest is saved", format!("{:.1} s", started.elapsed().as_secs_f64()));
    host.power_cut()?;

    host.boot()?;
    serve(&mut host)?;
    let started = Instant::now();
    host.ok(&inner.clone().args(["-incoming", "defer"]).start())?;
    let load = format!(r#"migrate-incoming={{"uri":"exec:cat {NVRAM}/state"}}"#);
    host.ok(&format!("qmp_run {} '{IGNORE_SHARED}' '{load}' migrated cont", inner.qmp()))?;
    report.pass("the guest is restored", format!("{:.1} s", started.elapsed().as_secs_f64()));
    let after = rounds(&mut host, &inner)?;
    report.check("its load goes on where it was", after > before, format!("{before}, then {after} rounds"));
    let wrong = host.ok(&inner.run("cat /tmp/wrong 2>/dev/null; true"))?;
    report.check("all that it reads from its vSSD is right", wrong.is_empty(), wrong);
    host.running()?.expect_quiet_kernel()?;
    report.finish()
}
