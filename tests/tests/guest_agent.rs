// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The agent in real guests: file systems that give blocks back and take them again while they are used.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use serde_json::Value;
use vssd_tests::agent::Job;
use vssd_tests::guest::Guest;
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::mock;
use vssd_tests::paths;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::scenario::{self, Disk, Medium, PoolHost, blocks, normal};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;
use vssd_tests::wait::Deadline;

const NAME: &str = "vm1";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Ext4,
    Xfs,
}

impl Kind {
    fn make(self, device: &str) -> String {
        match self {
            // All of it at once: nothing is to go on in the background that the test did not start.
            Self::Ext4 => format!("mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 {device}"),
            Self::Xfs => format!("mkfs.xfs -q {device}"),
        }
    }

    fn check(self, device: &str) -> String {
        match self {
            Self::Ext4 => format!("e2fsck -fn {device}"),
            Self::Xfs => format!("xfs_repair -n {device}"),
        }
    }
}

fn boot(socket: &Path) -> Result<Guest> {
    boot_with(QemuBinary::debian()?, socket)
}

fn boot_with(qemu: QemuBinary, socket: &Path) -> Result<Guest> {
    let kernel = Kernel::debian()?;
    let blocks = paths::artifact("vssd-tests", "guest_blocks")?;
    let files = paths::artifact("vssd-tests", "guest_files")?;
    let agent = paths::artifact("vssd-agent", "vssd-agent")?;
    let image = ImageBuilder::new(&kernel)
        .file("/tools/guest_blocks", &blocks)
        .file("/tools/guest_files", &files)
        .file("/tools/vssd-agent", &agent)
        .tool("fio")
        .tool("chattr")
        .tool("sfdisk")
        .driver()?
        .build()?;
    Qemu::new(qemu, &image).memory_mib(1024).disk(VhostUserDisk::new(socket)).boot()
}

/// A file system on a vSSD, mounted at /mnt.
fn mounted(guest: &mut Guest, kind: Kind) -> Result<Disk> {
    let disk = scenario::bind(guest, 0)?;
    let device = format!("/dev/{}", disk.name);
    guest.ok(&format!("modprobe -a ext4 xfs; {} && mount {device} /mnt", kind.make(&device)))?;
    Ok(disk)
}

/// The agent, with a reserve of `reserve`.
fn start_agent(guest: &mut Guest, reserve: &str) -> Result<Job> {
    guest.write_file("/etc/vssd-agent.toml", format!("[[disk]]\nreserve = \"{reserve}\"\n").as_bytes())?;
    let agent = guest.spawn("exec vssd-agent 2>&1")?;
    guest.ok("until grep -q '^agents 1' /proc/vssd/*/status; do sleep 0.1; done")?;
    Ok(agent)
}

/// Sends a signal to the agent; waits for its end if that ends it.
fn stop_agent(guest: &mut Guest, agent: &Job, signal: &str) -> Result<()> {
    guest.ok(&format!("killall -{signal} vssd-agent"))?;
    if signal == "KILL" {
        guest.wait(agent, Duration::from_secs(10))?;
    }
    Ok(())
}

/// Free bytes of the file system at /mnt.
fn free(guest: &mut Guest) -> Result<u64> {
    Ok(guest.ok("stat -f -c '%a %S' /mnt | { read n s; echo $((n * s)); }")?.parse()?)
}

/// What becomes of a shrink or grow that may be partial.
fn try_resize(host: &PoolHost, verb: &str, bytes: u64) -> Result<String> {
    host.try_resize(verb, NAME, bytes)
}

/// Waits until the balloon file holds the blocks that the host has, and no others.
fn settled(guest: &mut Guest, agent: &Job) -> Result<()> {
    let mut said = Value::Null;
    let waited = Deadline::secs(20).until("the agent to let go of what the host does not have", || {
        said = serde_json::from_str(&guest.ok("vssd-agent status --json")?)?;
        Ok(["to_give_blocks", "uncovered_blocks"].iter().all(|key| said[key] == 0)
            && said["plugged_blocks"] == said["requested_blocks"]
            && said["could_give"]["held_blocks"] == 0)
    });
    waited.with_context(|| format!("{said}\n{}", String::from_utf8_lossy(&agent.stdout())))
}

fn aged_file_system_gives_and_takes(kind: Kind) -> Result<()> {
    const SEED: u64 = 41;
    const CYCLES: u32 = 20;
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "900M")?;
    let socket = host.create(NAME, &["--size", "800M"])?;
    let mut guest = boot(&socket)?;
    let disk = mounted(&mut guest, kind)?;
    // Full, half of it gone, full again, half of it gone: what is free lies everywhere.
    for salt in 0..2 {
        let command =
            format!("guest_files fill /mnt/tree {SEED} && guest_files thin /mnt/tree {salt} && sync");
        guest.sh_within(&command, Duration::from_secs(300))?.check()?;
    }
    let tree = guest.ok(&format!("guest_files check /mnt/tree {SEED}"))?;
    let agent = start_agent(&mut guest, "1%")?;
    let load = guest.spawn(
        "guest_files churn /mnt/churn 7 /tmp/stop & \
         while ! test -e /tmp/stop; do \
           fio --name=verify --directory=/mnt --size=8M --io_size=16M --rw=randwrite --bsrange=4k-64k --direct=1 \
             --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=64 \
             --randrepeat=0 --thread --minimal > /tmp/fio.out 2>&1 || exit 1; \
         done; wait $! || exit 2",
    )?;
    guest.ok("until test -e /mnt/verify.0.0 -a -d /mnt/churn; do sleep 0.1; done; sleep 1")?;
    let (mut worst, mut slowest) = (f64::MAX, Duration::ZERO);
    for cycle in 0..CYCLES {
        let before = free(&mut guest)?;
        let started = Instant::now();
        let state = try_resize(&host, "shrink", before / disk.block_size * disk.block_size)?;
        slowest = slowest.max(started.elapsed());
        ensure!(state == "partial", "cycle {cycle}: the shrink ended {state}");
        // What was on its way when the guest declined comes back, for nobody asks for it any more.
        settled(&mut guest, &agent)?;
        let given = blocks(&host.evicted(NAME)?) * disk.block_size;
        worst = worst.min(given as f64 / before as f64);
        let state = try_resize(&host, "grow", given)?;
        ensure!(state == "done", "cycle {cycle}: the grow ended {state}");
        ensure!(!load.ended(), "cycle {cycle}: the load has ended");
        settled(&mut guest, &agent)?;
    }
    guest.ok("touch /tmp/stop")?;
    let said = guest.wait(&load, Duration::from_secs(60))?;
    ensure!(said.success(), "verified I/O failed: {said:?}\n{}", guest.ok("cat /tmp/fio.out")?);
    guest.ok("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(guest.ok(&format!("guest_files check /mnt/tree {SEED}"))? == tree, "the tree has changed");
    ensure!(!agent.ended(), "the agent has ended: {}", String::from_utf8_lossy(&agent.stdout()));
    guest.ok("umount /mnt")?;
    guest.ok(&kind.check(&format!("/dev/{}", disk.name)))?;
    println!(
        "PASS {kind:?}, aged ({tree}), {CYCLES} cycles under verified I/O … at least {:.1} % of what was free went, in at most \
         {} ms; churn: {}; no error, no difference, check clean",
        worst * 100.0,
        slowest.as_millis(),
        said.text(),
    );
    ensure!(worst >= 0.9, "only {:.1} % of the free space was given", worst * 100.0);
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

#[test]
fn aged_ext4_gives_nine_tenths_of_its_free_space_20_times_under_verified_io() -> Result<()> {
    aged_file_system_gives_and_takes(Kind::Ext4)
}

#[test]
fn aged_xfs_gives_nine_tenths_of_its_free_space_20_times_under_verified_io() -> Result<()> {
    aged_file_system_gives_and_takes(Kind::Xfs)
}

/// Everything that goes wrong around the agent: it says so, and nothing is lost.
#[test]
fn whatever_is_wrong_the_agent_says_so_and_nothing_is_lost() -> Result<()> {
    const SEED: u64 = 43;
    const WANTED: u64 = 128 << 20;
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "600M")?;
    let socket = host.create(NAME, &["--size", "512M"])?;
    let mut guest = boot(&socket)?;
    let disk = mounted(&mut guest, Kind::Ext4)?;
    let device = format!("/dev/{}", disk.name);
    let refused = |host: &PoolHost, why: &str| -> Result<()> {
        let run = host.ctl.refused(&["shrink", NAME, &WANTED.to_string(), "--wait"])?;
        ensure!(run.code == 4 && run.stderr.contains(why), "not {why:?}: {} {}", run.code, run.stderr);
        ensure!(blocks(&host.evicted(NAME)?) == 0);
        Ok(())
    };

    // No agent: a mounted file system gives nothing by itself.
    refused(&host, "its own rules forbid it")?;

    let agent = start_agent(&mut guest, "4M")?;
    Deadline::secs(20).until("the operator to be told what could go", || {
        let Ok(said) = host.ctl.ok(&["estimate", NAME]) else { return Ok(false) };
        let told = scenario::find(&said, "free_bytes").and_then(Value::as_u64).unwrap_or_default();
        Ok(told.abs_diff(free(&mut guest)?) < 8 << 20)
    })?;
    let second = guest.sh("vssd-agent")?;
    ensure!(second.code == 4 && second.errors().contains("E_LOCKED"), "{second:?}");

    // The balloon file is not anybody's to change.
    try_resize(&host, "shrink", WANTED)?;
    for command in ["rm -f /mnt/.vssd-balloon", "echo x > /mnt/.vssd-balloon", "mv /mnt/.vssd-balloon /mnt/x"]
    {
        ensure!(!guest.sh(command)?.success(), "{command}");
    }

    // Its being there does not keep anybody from unmounting. On an unmounted disk nothing is given.
    guest.ok("umount /mnt")?;
    try_resize(&host, "grow", WANTED)?;
    refused(&host, "its own rules forbid it")?;
    guest.ok(&format!("mount {device} /mnt"))?;
    settled(&mut guest, &agent)?;

    // Read-only.
    guest.ok("mount -o remount,ro /mnt")?;
    refused(&host, "its own rules forbid it")?;
    guest.ok("mount -o remount,rw /mnt")?;

    // Full.
    guest.ok(&format!("guest_files fill /mnt/tree {SEED}"))?;
    refused(&host, "nothing can be given up")?;
    guest.ok("guest_files thin /mnt/tree 1; sync")?;
    let tree = guest.ok(&format!("guest_files check /mnt/tree {SEED}"))?;

    // It is slow: the driver waits longer than its 3 s as long as it is asked to. Then it dies in the middle of the request: the
    // driver waits for it no longer.
    stop_agent(&mut guest, &agent, "STOP")?;
    host.ctl.ok(&["shrink", NAME, &WANTED.to_string(), "--no-wait"])?;
    for second in 0..5 {
        guest.ok(&format!("echo wait > /proc/vssd/{}/hints && sleep 1", disk.name))?;
        ensure!(disk.status(&mut guest)?["state"] != "idle", "the driver gave up after {second} s");
    }
    stop_agent(&mut guest, &agent, "KILL")?;
    Deadline::secs(10).until("the driver to decline", || Ok(disk.status(&mut guest)?["state"] == "idle"))?;
    ensure!(blocks(&host.evicted(NAME)?) == 0);

    // Started again it goes on as if nothing had been.
    let agent = start_agent(&mut guest, "4M")?;
    ensure!(try_resize(&host, "shrink", WANTED)? == "done");
    settled(&mut guest, &agent)?;

    // Short of space it asks for blocks back. A host that only takes note does nothing; one that may grant does.
    guest.ok("guest_files fill /mnt/short 9 && rm -rf /mnt/short")?;
    ensure!(blocks(&host.evicted(NAME)?) == WANTED / disk.block_size);
    host.ctl.ok(&["limits", NAME, "--pull", "grant"])?;
    guest.ok("guest_files fill /mnt/short 9")?;
    Deadline::secs(90).until("the host to grant what the agent asks for", || {
        Ok(blocks(&host.evicted(NAME)?) < WANTED / disk.block_size)
    })?;
    settled(&mut guest, &agent)?;
    guest.ok("guest_files check /mnt/short 9 && rm -rf /mnt/short")?;
    host.ctl.ok(&["limits", NAME, "--pull", "notify"])?;
    let rest = WANTED - blocks(&host.evicted(NAME)?) * disk.block_size;
    ensure!(try_resize(&host, "shrink", rest)? == "done");
    settled(&mut guest, &agent)?;

    // Somebody gets rid of the balloon file while no agent is there: the agent asks for the blocks before the file system
    // uses them, and this host grants it.
    host.ctl.ok(&["limits", NAME, "--pull", "grant"])?;
    stop_agent(&mut guest, &agent, "KILL")?;
    guest.ok("chattr -i /mnt/.vssd-balloon && rm -f /mnt/.vssd-balloon && sync")?;
    ensure!(guest.ok("vssd-agent status")?.contains("gone and may be used"));
    let agent = start_agent(&mut guest, "4M")?;
    settled(&mut guest, &agent)?;
    guest.ok("guest_files fill /mnt/more 5 && guest_files check /mnt/more 5")?;
    ensure!(blocks(&host.evicted(NAME)?) == 0);

    guest.ok("echo 3 > /proc/sys/vm/drop_caches; guest_files check /mnt/more 5")?;
    ensure!(guest.ok(&format!("guest_files check /mnt/tree {SEED}"))? == tree, "the tree has changed");
    ensure!(!agent.ended(), "the agent has ended: {}", String::from_utf8_lossy(&agent.stdout()));
    guest.ok("umount /mnt")?;
    guest.ok(&Kind::Ext4.check(&device))?;
    println!(
        "PASS no agent, two agents, balloon file protected, unmounted, read-only, full, killed, short of space, balloon file \
         deleted"
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

/// Power cuts of the guest, and kills of the daemon, while blocks go and come.
fn kills(kind: Kind) -> Result<()> {
    const SEED: u64 = 47;
    const KILLS: u64 = 10;
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    // A block a message: what takes 50 ms otherwise takes long enough to be cut off in the middle.
    let mut host = PoolHost::with(&scratch, Medium::Nvram, "400M", &["--max-ranges=1"])?;
    let socket = host.create(NAME, &["--size", "320M"])?;
    let mut guest = boot_with(QemuBinary::backports()?, &socket)?;
    let mut rng = mock::rng(mock::seed("power cuts of a guest that gives blocks"));
    let disk = mounted(&mut guest, kind)?;
    let device = format!("/dev/{}", disk.name);
    guest.ok(&format!("guest_files fill /mnt/tree {SEED} && guest_files thin /mnt/tree 0 && sync"))?;
    let tree = guest.ok(&format!("guest_files check /mnt/tree {SEED}"))?;
    let mut middle = 0;
    for kill in 0..KILLS {
        let agent = start_agent(&mut guest, "2%")?;
        let _churn = guest.spawn("guest_files churn /mnt/churn 7 /tmp/stop")?;
        // Whatever was under way when the power went ends now.
        settled(&mut guest, &agent)?;
        let gone = blocks(&host.evicted(NAME)?);
        let (verb, bytes) = if gone == 0 { ("shrink", 100 << 20) } else { ("grow", gone * disk.block_size) };
        host.ctl.ok(&[verb, NAME, &bytes.to_string(), "--no-wait"])?;
        // At a random place on the way.
        let enough = rng.random_range(0..bytes / disk.block_size);
        Deadline::secs(20)
            .until("blocks to move", || Ok(blocks(&host.evicted(NAME)?).abs_diff(gone) >= enough))?;
        if kill % 3 == 2 {
            host.daemon.kill()?;
            host.daemon.start()?;
            std::thread::sleep(Duration::from_millis(rng.random_range(0..60)));
        }
        let now = blocks(&host.evicted(NAME)?);
        middle += u64::from(now.abs_diff(gone) > 0 && now.abs_diff(gone) < bytes / disk.block_size);
        guest.reset()?;
        scenario::bind(&mut guest, 0)?;
        guest.ok(&format!("modprobe -a ext4 xfs; mount {device} /mnt && rm -rf /mnt/churn"))?;
        ensure!(
            normal(disk.evicted(&mut guest)?) == normal(host.evicted(NAME)?),
            "kill {kill}: the two sides differ"
        );
        let said: Value = serde_json::from_str(&guest.ok("vssd-agent status --json")?)?;
        ensure!(
            said["uncovered_blocks"] == 0,
            "kill {kill}: the file system has blocks that the host has: {said}"
        );
        ensure!(
            guest.ok(&format!("guest_files check /mnt/tree {SEED}"))? == tree,
            "kill {kill}: the tree has changed"
        );
    }
    // A file system can be checked and mounted while most of its free space is gone.
    let agent = start_agent(&mut guest, "2%")?;
    settled(&mut guest, &agent)?;
    let _ = try_resize(&host, "shrink", free(&mut guest)?)?;
    settled(&mut guest, &agent)?;
    ensure!(blocks(&host.evicted(NAME)?) > 0);
    guest.ok("umount /mnt")?;
    guest.ok(&kind.check(&device))?;
    guest.ok(&format!("mount {device} /mnt"))?;
    ensure!(guest.ok(&format!("guest_files check /mnt/tree {SEED}"))? == tree, "the tree has changed");
    ensure!(middle * 4 >= KILLS, "only {middle} of {KILLS} power cuts came in the middle");
    println!(
        "PASS {kind:?}: {KILLS} power cuts of the guest beside resizes, {middle} of them in the middle … tree intact ({tree}), \
              balloon file and plugged set agree, check clean"
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

#[test]
fn power_cuts_while_ext4_gives_and_takes_lose_nothing() -> Result<()> {
    kills(Kind::Ext4)
}

#[test]
fn power_cuts_while_xfs_gives_and_takes_lose_nothing() -> Result<()> {
    kills(Kind::Xfs)
}

/// The partition of an old disk begins at sector 63: no block of the file system lies on a block of the vSSD.
#[test]
fn a_partition_that_is_aligned_to_nothing_gives_its_free_space_and_no_other_block() -> Result<()> {
    const SEED: u64 = 53;
    const START: u64 = 63 * 512;
    const LEN: u64 = 200 << 20;
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "300M")?;
    let socket = host.create(NAME, &["--size", "256M"])?;
    let mut guest = boot(&socket)?;
    let disk = scenario::bind(&mut guest, 0)?;
    let part = format!("/dev/{}1", disk.name);
    guest.ok(&format!(
        "echo '63,{},83' | sfdisk -q --no-reread /dev/{name} && blockdev --rereadpt /dev/{name} && modprobe ext4 && \
         {} && mount {part} /mnt && mkdir /mnt/some && guest_files few /mnt/some {SEED} && sync",
        LEN / 512,
        Kind::Ext4.make(&part),
        name = disk.name,
    ))?;
    let tree = guest.ok(&format!("guest_files check /mnt/some {SEED}"))?;
    let agent = start_agent(&mut guest, "1%")?;
    let before = free(&mut guest)?;
    ensure!(try_resize(&host, "shrink", before / disk.block_size * disk.block_size)? == "partial");
    settled(&mut guest, &agent)?;
    let evicted = host.evicted(NAME)?;
    let given = blocks(&evicted) * disk.block_size;
    ensure!(given * 10 >= before * 9, "{given} of {before} bytes went");
    let (first, end) = (START.div_ceil(disk.block_size), (START + LEN) / disk.block_size);
    ensure!(evicted.iter().all(|(start, count)| *start >= first && start + count <= end), "{evicted:?}");
    guest.ok("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(guest.ok(&format!("guest_files check /mnt/some {SEED}"))? == tree, "the tree has changed");
    ensure!(try_resize(&host, "grow", given)? == "done");
    settled(&mut guest, &agent)?;
    let after = free(&mut guest)?;
    ensure!(after + (1 << 20) >= before, "{after} of {before} bytes are free again");
    guest.ok("guest_files fill /mnt/more 5 && guest_files check /mnt/more 5 && umount /mnt")?;
    guest.ok(&Kind::Ext4.check(&part))?;
    println!(
        "PASS a partition from sector 63 on … {} of {} MiB that were free went and came back",
        given >> 20,
        before >> 20
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}
