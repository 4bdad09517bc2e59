// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A vSSD in a real guest with our driver: the blocks that the guest nominates go, and no others.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vssd_tests::guest::Guest;
use vssd_tests::kernel::Kernel;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::report::Report;
use vssd_tests::scenario::{self, Disk, ENODATA, Medium, PoolHost, Range, blocks, normal};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;
use vssd_tests::wait::Deadline;

const SEED: u64 = 0x7357;
const NAME: &str = "vm1";

fn boot(qemu: QemuBinary, kernel: &Kernel, sockets: &[&std::path::Path]) -> Result<Guest> {
    let image = scenario::image(kernel)?;
    let qemu = sockets.iter().fold(Qemu::new(qemu, &image), |qemu, s| qemu.disk(VhostUserDisk::new(*s)));
    qemu.boot()
}

/// `count` blocks in runs of 1, 5 and 32, from `from` on, with gaps between them.
fn scattered(from: u64, count: u64) -> Vec<Range> {
    let (mut left, mut at, mut ranges) = (count, from, Vec::new());
    for length in [1, 5, 32].iter().cycle() {
        if left == 0 {
            break;
        }
        let run = left.min(*length);
        ranges.push((at, run));
        left -= run;
        at += run + 2;
    }
    ranges
}

/// The first experiment of the original work: after each of a series of shrinks and grows the whole disk is read with
/// direct I/O; the failing blocks are exactly the evicted ones, and those exactly the nominated ones.
#[test]
fn failing_blocks_are_exactly_those_the_guest_nominated_at_every_step() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "1200M")?;
    let socket = host.create(NAME, &["--size", "1G"])?;
    let mut guest = boot(QemuBinary::debian()?, &Kernel::debian()?, &[&socket])?;
    let disk = scenario::bind(&mut guest, 0)?;
    let mut report = Report::new("correctness, 1 GiB, sequential direct read after each step");
    disk.fill(&mut guest, SEED, &[(0, disk.total_blocks)])?;

    let mut nominated: Vec<Range> = Vec::new();
    let mut zeroed: Vec<Range> = Vec::new();
    // Blocks to give up at each step; a negative number is a grow by so many.
    let steps: [i64; 8] = [16, 256, 1024, -500, 2048, 4000, -6000, -844];
    let mut from = 7;
    for step in steps {
        let bytes = (step.unsigned_abs() * disk.block_size).to_string();
        if step > 0 {
            let hints = scattered(from, step.unsigned_abs());
            from = hints.last().map_or(from, |(start, count)| start + count + 3);
            disk.hint(&mut guest, &hints)?;
            host.ctl.ok(&["shrink", NAME, &bytes, "--wait"])?;
            nominated = normal([nominated, hints].concat());
            ensure!(normal(host.evicted(NAME)?) == nominated, "others went than were nominated");
        } else {
            host.ctl.ok(&["grow", NAME, &bytes, "--wait"])?;
            let evicted = normal(host.evicted(NAME)?);
            // What came back was nominated once, holds nothing now, and the rest is still away.
            let back = minus(&nominated, &evicted);
            ensure!(blocks(&back) == step.unsigned_abs(), "{} blocks came back", blocks(&back));
            ensure!(minus(&evicted, &nominated).is_empty());
            zeroed = normal([zeroed, back].concat());
            nominated = evicted;
        }
        let scan = disk.agree(&mut guest, &host, NAME, SEED)?;
        let failing = scan.blocks(ENODATA);
        ensure!(failing == blocks(&nominated));
        ensure!(normal(scan.ranges("zero").to_vec()) == zeroed, "zero blocks are not those that came back");
        ensure!(scan.blocks("intact") == disk.total_blocks - failing - blocks(&zeroed));
        report.pass(
            &format!("{step:+} blocks"),
            format!(
                "{failing} evicted = {failing} failing reads, {} intact, {} zero",
                scan.blocks("intact"),
                scan.blocks("zero")
            ),
        );
    }
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()?;
    report.finish()
}

/// `a` without `b`; both normal.
fn minus(a: &[Range], b: &[Range]) -> Vec<Range> {
    let gone: std::collections::BTreeSet<u64> = b.iter().flat_map(|(s, c)| *s..s + c).collect();
    normal(a.iter().flat_map(|(s, c)| *s..s + c).filter(|x| !gone.contains(x)).map(|x| (x, 1)).collect())
}

#[test]
fn the_same_scenario_runs_on_both_kernels_and_both_qemus() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("kernels and QEMUs");
    for qemu in [QemuBinary::debian()?, QemuBinary::backports()?] {
        for kernel in Kernel::all()? {
            let name = format!("Linux {} on QEMU {}.{}", kernel.series(), qemu.version().0, qemu.version().1);
            report.outcome(
                &name,
                matrix_scenario(qemu.clone(), &kernel).map(|()| "shrink, read, grow, unbind, rebind"),
            );
        }
    }
    report.finish()
}

fn matrix_scenario(qemu: QemuBinary, kernel: &Kernel) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "400M")?;
    let socket = host.create(NAME, &["--size", "256M"])?;
    let mut guest = boot(qemu, kernel, &[&socket])?;
    let disk = scenario::bind(&mut guest, 0)?;
    disk.fill(&mut guest, SEED, &[(0, disk.total_blocks)])?;
    let hints = scattered(11, 1024);
    disk.hint(&mut guest, &hints)?;
    host.ctl.ok(&["shrink", NAME, "64M", "--wait"])?;
    let scan = disk.agree(&mut guest, &host, NAME, SEED)?;
    ensure!(normal(host.evicted(NAME)?) == normal(hints.clone()));
    ensure!(scan.blocks("intact") == disk.total_blocks - 1024);

    // The disk goes back to the stock driver and comes again; evicted blocks stay evicted.
    guest.ok(&format!("vssd-bind --unbind {}", disk.name))?;
    let stock = guest.disk(0)?;
    ensure!(stock.starts_with("vd"), "{stock} is not the stock driver's");
    let theirs = segment_size(&mut guest, &stock)?;
    guest.ok(&format!("dd if=/dev/{stock} of=/dev/null bs=64k count=4 iflag=direct"))?;
    let disk = scenario::bind(&mut guest, 0)?;
    let ours = segment_size(&mut guest, &disk.name)?;
    ensure!(ours == theirs, "segments have up to {ours} bytes, with the stock driver {theirs}");
    disk.agree(&mut guest, &host, NAME, SEED)?;

    host.ctl.ok(&["grow", NAME, "64M", "--wait"])?;
    let scan = disk.agree(&mut guest, &host, NAME, SEED)?;
    ensure!(scan.blocks("zero") == 1024 && scan.blocks(ENODATA) == 0);
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

/// What one segment of a request may have: `size_max` of the device (V-49).
fn segment_size(guest: &mut Guest, disk: &str) -> Result<u64> {
    Ok(guest.ok(&format!("cat /sys/block/{disk}/queue/max_segment_size"))?.trim().parse()?)
}

#[test]
fn what_one_vm_gives_up_another_gets_zeroed() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    // Room for two vSSDs of 256 MiB and hardly more.
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "540M")?;
    let first = host.create("vm1", &["--size", "256M"])?;
    let second = host.create("vm2", &["--size", "128M", "--max", "384M"])?;
    let (qemu, kernel) = (QemuBinary::debian()?, Kernel::debian()?);
    let mut guest1 = boot(qemu.clone(), &kernel, &[&first])?;
    let mut guest2 = boot(qemu, &kernel, &[&second])?;
    let disk1 = scenario::bind(&mut guest1, 0)?;
    let disk2 = scenario::bind(&mut guest2, 0)?;
    disk1.fill(&mut guest1, SEED, &[(0, disk1.total_blocks)])?;
    disk2.fill(&mut guest2, SEED + 1, &[(0, 2048)])?;

    let full = host.ctl.refused(&["create", "vm3", "--size", "256M"])?;
    ensure!(full.code == 6 && full.stderr.contains("E_POOL_FULL"), "{full:?}");
    println!("PASS third vSSD refused … {}", full.stderr.lines().next().unwrap_or_default());
    let full = host.ctl.refused(&["grow", "vm2", "256M"])?;
    ensure!(full.code == 6, "{full:?}");

    let hints = scattered(5, 2048);
    disk1.hint(&mut guest1, &hints)?;
    host.ctl.ok(&["shrink", "vm1", "128M", "--wait"])?;
    host.ctl.ok(&["grow", "vm2", "192M", "--wait"])?;

    // All that vm2 got reads zero, however it is looked at: a byte of vm1's would be `wrong`.
    let scan2 = disk2.agree(&mut guest2, &host, "vm2", SEED + 1)?;
    ensure!(scan2.blocks("intact") == 2048 && scan2.blocks("zero") == 3072, "{scan2:?}");
    // And vm2 can fill it, which takes the very blocks that vm1 gave up.
    disk2.fill(&mut guest2, SEED + 1, &[(2048, 3072)])?;
    let scan2 = disk2.agree(&mut guest2, &host, "vm2", SEED + 1)?;
    ensure!(scan2.blocks("intact") == 5120, "{scan2:?}");
    let scan1 = disk1.agree(&mut guest1, &host, "vm1", SEED)?;
    ensure!(scan1.blocks("intact") == 2048 && scan1.blocks(ENODATA) == 2048, "{scan1:?}");
    println!("PASS two VMs, one pool … vm1 4096 -> 2048 blocks, vm2 2048 -> 5120 of its 6144");

    for guest in [&mut guest1, &mut guest2] {
        guest.expect_quiet_kernel()?;
        guest.power_off()?;
    }
    host.finish()
}

#[test]
fn blocks_on_an_ssd_pool_go_and_come_back_too() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::on_disk()?;
    let mut host = PoolHost::new(&scratch, Medium::Ssd, "400M")?;
    let socket = host.create(NAME, &["--size", "256M"])?;
    let mut guest = boot(QemuBinary::debian()?, &Kernel::debian()?, &[&socket])?;
    let disk = scenario::bind(&mut guest, 0)?;
    disk.fill(&mut guest, SEED, &[(0, disk.total_blocks)])?;
    for round in 0..3 {
        let hints = scattered(round * 17, 512);
        disk.hint(&mut guest, &hints)?;
        host.ctl.ok(&["shrink", NAME, "32M", "--wait"])?;
        ensure!(normal(host.evicted(NAME)?) == normal(hints.clone()), "round {round}");
        disk.agree(&mut guest, &host, NAME, SEED)?;
        host.ctl.ok(&["grow", NAME, "32M", "--wait"])?;
        let scan = disk.agree(&mut guest, &host, NAME, SEED)?;
        ensure!(scan.blocks("zero") == 512, "round {round}: {scan:?}");
        disk.fill(&mut guest, SEED, &hints)?;
    }
    let scan = disk.agree(&mut guest, &host, NAME, SEED)?;
    ensure!(scan.blocks("intact") == disk.total_blocks);
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

#[test]
fn bad_hints_are_refused_by_name_and_change_nothing() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "100M")?;
    let socket = host.create(NAME, &["--size", "64M"])?;
    let mut guest = boot(QemuBinary::debian()?, &Kernel::debian()?, &[&socket])?;
    let disk = scenario::bind(&mut guest, 0)?;
    disk.fill(&mut guest, SEED, &[(0, disk.total_blocks)])?;
    let file = format!("/proc/vssd/{}/hints", disk.name);
    for (bad, error) in [
        ("1024 1", "range"),
        ("1000 100", "range"),
        ("0 4294967295", "range"),
        ("18446744073709551615 1", "range"),
        ("x y", "nvalid"),
        ("1", "nvalid"),
        ("1 2 3", "nvalid"),
        ("-1 2", "nvalid"),
        ("1 0", "range"),
        ("\\0\\0\\0", "nvalid"),
    ] {
        // busybox's own printf does not say why a write failed; dd does.
        let out = guest.sh(&format!("printf '{bad}\\n' | dd of={file} conv=notrunc status=none"))?;
        ensure!(!out.success(), "{bad:?} was accepted");
        ensure!(out.errors().contains(error), "{bad:?}: {}", out.errors());
    }
    // A megabyte of garbage without a line end, and a writer that goes away in mid-line.
    let out = guest.sh(&format!("dd if=/dev/zero bs=1M count=1 2>/dev/null | tr '\\0' '7' > {file}"))?;
    ensure!(!out.success(), "an endless line was accepted");
    guest.sh(&format!("printf '5' > {file}"))?;
    // Nobody but the administrator may choose.
    let out = guest.sh(&format!("su nobody -s /bin/sh -c 'echo 1 1 > {file}'"))?;
    ensure!(!out.success() && out.errors().contains("ermission"), "{out:?}");
    ensure!(scenario::number(&disk.status(&mut guest)?, "hinted_blocks")? == 0);

    // Overlapping and repeated hints are no error: each block counts once.
    disk.hint(&mut guest, &[(10, 20), (15, 30), (10, 1)])?;
    ensure!(scenario::number(&disk.status(&mut guest)?, "hinted_blocks")? == 35);
    host.ctl.ok(&["shrink", NAME, &(35 * disk.block_size).to_string(), "--wait"])?;
    ensure!(normal(host.evicted(NAME)?) == [(10, 35)]);
    disk.agree(&mut guest, &host, NAME, SEED)?;
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

/// D-16, V-51.
#[test]
fn what_could_go_is_told_to_the_operator_in_each_session_and_nonsense_is_refused() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "100M")?;
    let socket = host.create(NAME, &["--size", "64M"])?;
    let mut guest = boot(QemuBinary::debian()?, &Kernel::debian()?, &[&socket])?;
    let disk = scenario::bind(&mut guest, 0)?;
    let file = format!("/proc/vssd/{}/estimate", disk.name);
    for (bad, error) in [
        ("1 2 3", "nvalid"),
        ("1 2 3 4 5", "nvalid"),
        ("1 2 3 x", "nvalid"),
        ("-1 0 0 0", "nvalid"),
        ("4294967296 0 0 0", "range"),
        ("1000 20 4 1", "range"),
    ] {
        let out = guest.sh(&format!("printf '{bad}\\n' | dd of={file} status=none"))?;
        ensure!(!out.success() && out.errors().contains(error), "{bad:?}: {out:?}");
    }
    let out = guest.sh(&format!("su nobody -s /bin/sh -c 'echo 1 1 1 1 > {file}'"))?;
    ensure!(!out.success() && out.errors().contains("ermission"), "{out:?}");
    ensure!(host.ctl.refused(&["estimate", NAME])?.stderr.contains("E_NO_DRIVER"));

    let told = |host: &PoolHost| -> Result<bool> {
        let Ok(said) = host.ctl.ok(&["estimate", NAME]) else { return Ok(false) };
        let blocks =
            |key: &str| scenario::find(&said, key).and_then(Value::as_u64).map(|n| n / disk.block_size);
        let keys = ["free_bytes", "clean_cold_bytes", "clean_hot_bytes", "dirty_bytes"];
        Ok(keys.map(blocks) == [Some(1000), Some(20), Some(3), Some(1)])
    };
    guest.ok(&format!("echo '1000 20 3 1' > {file}"))?;
    Deadline::secs(10).until("the operator to be told", || told(&host))?;
    // Another daemon knows nothing of it; the driver begins another session with it, and tells again.
    host.daemon.kill()?;
    host.daemon.start()?;
    Deadline::secs(20).until("the operator to be told again", || told(&host))?;
    ensure!(host.evicted(NAME)?.is_empty(), "something followed from it");
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

/// Waits until a shrink is under way: some blocks are gone and some are still to go.
fn wait_midway(disk: &Disk, guest: &mut Guest, below: u64) -> Result<u64> {
    let deadline = Deadline::after(Duration::from_secs(20));
    deadline
        .poll("the shrink to begin", || {
            let plugged = disk.plugged(guest)?;
            Ok((plugged < below).then_some(plugged))
        })
        .context("no block went")
}

#[test]
fn a_guest_that_reboots_reloads_or_unbinds_in_mid_shrink_goes_on_where_it_was() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "400M")?;
    let socket = host.create(NAME, &["--size", "256M"])?;
    let mut guest = boot(QemuBinary::debian()?, &Kernel::debian()?, &[&socket])?;
    let mut report = Report::new("interruptions in mid-shrink");
    let mut disk = scenario::bind(&mut guest, 0)?;
    let total = disk.total_blocks;
    disk.fill(&mut guest, SEED, &[(0, total)])?;
    for interruption in ["reboot", "reset", "reload", "unbind"] {
        // Half of what is asked for is hinted, so the shrink stands in the middle, with a deadline far away.
        let before = disk.plugged(&mut guest)?;
        let first = scattered(blocks(&host.evicted(NAME)?) + 10, 128);
        disk.hint(&mut guest, &first)?;
        host.ctl.ok(&["shrink", NAME, "16M", "--no-wait", "--deadline", "120s"])?;
        let midway = wait_midway(&disk, &mut guest, before)?;
        ensure!(midway > before - 256, "the shrink is over already");
        match interruption {
            "reboot" => guest.reboot()?,
            "reset" => guest.reset()?,
            "reload" => {
                guest.ok(&format!("vssd-bind --unbind {} && rmmod vssd", disk.name))?;
            }
            _ => {
                guest.ok(&format!("vssd-bind --unbind {}", disk.name))?;
            }
        }
        disk = scenario::bind(&mut guest, 0)?;
        let evicted = normal(host.evicted(NAME)?);
        disk.agree(&mut guest, &host, NAME, SEED)?;
        // The job is still there; new hints bring it to its end.
        let rest = minus(&normal(scattered(1500, 512)), &evicted);
        disk.hint(&mut guest, &rest)?;
        disk.wait_plugged(&mut guest, before - 256)?;
        disk.agree(&mut guest, &host, NAME, SEED)?;
        disk.clear_hints(&mut guest)?;
        let jobs = host.ctl.ok(&["jobs"])?;
        ensure!(!jobs.to_string().contains("\"evacuating\""), "a job hangs: {jobs}");
        host.ctl.ok(&["grow", NAME, "16M", "--wait"])?;
        disk.fill(&mut guest, SEED, &[(0, total)])?;
        let scan = disk.agree(&mut guest, &host, NAME, SEED)?;
        report.check(
            interruption,
            scan.blocks("intact") == total,
            "both sides agree, the job ended, all blocks back",
        );
    }
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()?;
    report.finish()
}

/// The state in which the newest job ended.
fn job_state(said: &Value) -> String {
    scenario::find(said, "state").and_then(|state| state.as_str()).unwrap_or("none").to_owned()
}

/// What the guest does with a shrink by 64 blocks: declines it, gives a part, says nothing at all.
#[test]
fn a_guest_that_declines_gives_a_part_or_is_silent_brings_each_job_to_a_named_end() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "100M")?;
    let socket = host.create(NAME, &["--size", "64M"])?;
    let mut guest = boot(QemuBinary::debian()?, &Kernel::debian()?, &[&socket])?;
    let mut report = Report::new("ends of a shrink");
    let disk = scenario::bind(&mut guest, 0)?;
    let total = disk.total_blocks;
    disk.fill(&mut guest, SEED, &[(0, total)])?;
    let settled = |guest: &mut Guest, host: &PoolHost, plugged: u64| -> Result<()> {
        disk.wait_plugged(guest, plugged)?;
        disk.agree(guest, host, NAME, SEED).map(drop)
    };

    let declined = host.ctl.refused(&["shrink", NAME, "4M", "--wait"])?;
    settled(&mut guest, &host, total)?;
    report.check(
        "declined",
        declined.code == 4 && declined.stdout.contains("refused"),
        declined.stdout.trim(),
    );

    disk.hint(&mut guest, &[(100, 10)])?;
    let partial = host.ctl.refused(&["shrink", NAME, "4M", "--wait"])?;
    settled(&mut guest, &host, total - 10)?;
    report.check(
        "gave a part",
        partial.code == 4 && partial.stdout.contains("partial"),
        partial.stdout.trim(),
    );
    host.ctl.ok(&["resize", NAME, "max", "--wait"])?;
    disk.fill(&mut guest, SEED, &[(0, total)])?;

    // The target is raised while the guest is at it: only what was given by then is gone.
    disk.hint(&mut guest, &[(200, 10)])?;
    host.ctl.ok(&["shrink", NAME, "4M", "--no-wait", "--deadline", "60s"])?;
    disk.wait_plugged(&mut guest, total - 10)?;
    host.ctl.ok(&["resize", NAME, &((total - 5) * disk.block_size).to_string(), "--wait"])?;
    settled(&mut guest, &host, total - 5)?;
    let jobs = host.ctl.ok(&["jobs"])?.to_string();
    report.check(
        "target raised in mid-shrink",
        jobs.contains("superseded"),
        "the first job is superseded, the second done",
    );
    host.ctl.ok(&["resize", NAME, "max", "--wait"])?;
    disk.fill(&mut guest, SEED, &[(0, total)])?;

    // A guest that is stopped says nothing.
    for (policy, state, left) in
        [("wait", "expired", total), ("fail", "expired", total), ("force", "done", total - 64)]
    {
        guest.qmp().execute("stop", serde_json::json!({}))?;
        let said =
            host.ctl.run(&["shrink", NAME, "4M", "--wait", "--deadline", "1s", "--on-timeout", policy])?;
        let ended = said.documents.last().map(job_state).unwrap_or_default();
        let plugged = host.show(NAME)?["plugged_bytes"].as_u64().unwrap_or(0) / disk.block_size;
        let requested = host.show(NAME)?["requested_bytes"].as_u64().unwrap_or(0) / disk.block_size;
        guest.qmp().execute("cont", serde_json::json!({}))?;
        ensure!(ended == state && plugged == left, "{policy}: {ended}, {plugged} plugged\n{said:?}");
        ensure!(
            requested == if policy == "fail" { total } else { total - 64 },
            "{policy}: {requested} requested"
        );
        if policy == "wait" {
            // The target stands: the guest, awake again and with something to give, reaches it after all.
            disk.hint(&mut guest, &[(300, 64)])?;
            settled(&mut guest, &host, total - 64)?;
            host.ctl.ok(&["resize", NAME, "max", "--wait"])?;
            disk.fill(&mut guest, SEED, &[(0, total)])?;
        }
        settled(&mut guest, &host, left)?;
        report.pass(&format!("silent, policy {policy}"), format!("job {ended}, {plugged} blocks plugged"));
    }
    // Forced blocks are answered like any other evicted one, and come back like any other.
    host.ctl.ok(&["resize", NAME, "max", "--wait"])?;
    settled(&mut guest, &host, total)?;

    // The first one is met at once; the second still speaks of the size before.
    disk.hint(&mut guest, &[(300, 64)])?;
    let first = host.ctl.run(&[
        "rpc",
        "device.resize",
        &format!(r#"{{"name":"{NAME}","size_bytes":{},"expected_bytes":{}}}"#, 60 << 20, 64 << 20),
    ])?;
    let second = host.ctl.refused(&[
        "rpc",
        "device.resize",
        &format!(r#"{{"name":"{NAME}","size_bytes":{},"expected_bytes":{}}}"#, 62 << 20, 64 << 20),
    ])?;
    report.check(
        "two operators at once",
        first.code == 0 && second.stderr.contains("E_CONFLICT"),
        "the second is told E_CONFLICT",
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()?;
    report.finish()
}
