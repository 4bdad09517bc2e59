// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The agent in guests with a stock kernel and none of our modules: free space goes back to the pool, and stays there for as long
//! as the host wishes it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vssd_tests::agent::Job;
use vssd_tests::ctl::CtlOutput;
use vssd_tests::guest::Guest;
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::paths;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::scenario::{self, Medium, PoolHost};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;
use vssd_tests::wait::Deadline;

const NAME: &str = "vm1";
const SIZE: u64 = 320 << 20;
const BLOCK: u64 = 64 << 10;
const SEED: u64 = 61;
const MIB: u64 = 1 << 20;

fn boot(qemu: QemuBinary, kernel: &Kernel, socket: &std::path::Path) -> Result<Guest> {
    let files = paths::artifact("vssd-tests", "guest_files")?;
    let agent = paths::artifact("vssd-agent", "vssd-agent")?;
    let image = ImageBuilder::new(kernel)
        .file("/tools/guest_files", &files)
        .file("/tools/vssd-agent", &agent)
        .build()?;
    Qemu::new(qemu, &image).vcpus(2).memory_mib(768).disk(VhostUserDisk::new(socket).queues(2)).boot()
}

fn start_agent(guest: &mut Guest, host: &PoolHost) -> Result<Job> {
    guest.write_file("/etc/vssd-agent.toml", b"[[disk]]\nreserve = \"1%\"\n")?;
    let agent = guest.spawn("exec vssd-agent 2>&1")?;
    // Heard just now, not before it was killed.
    Deadline::secs(20).until("the host to hear the agent", || {
        let heard = host.show(NAME)?.pointer("/agent/heard_ms").and_then(Value::as_u64);
        Ok(heard.is_some_and(|ms| ms < 1000))
    })?;
    Ok(agent)
}

fn number(host: &PoolHost, pointer: &str) -> Result<u64> {
    let shown = host.show(NAME)?;
    shown.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("no {pointer} in {shown}"))
}

fn allocated(host: &PoolHost) -> Result<u64> {
    number(host, "/allocated_bytes")
}

/// Free bytes of the file system at /mnt.
fn free(guest: &mut Guest) -> Result<u64> {
    Ok(guest.ok("stat -f -c '%a %S' /mnt | { read n s; echo $((n * s)); }")?.parse()?)
}

fn reclaim(host: &PoolHost, size: &str, deadline: &str) -> Result<CtlOutput> {
    host.ctl.run(&["reclaim", NAME, size, "--deadline", deadline])
}

fn state(run: &CtlOutput) -> Result<String> {
    let job = run.documents.iter().find_map(|said| scenario::find(said, "job"));
    let state = job.and_then(|job| job["state"].as_str()).map(str::to_owned);
    state.with_context(|| format!("no job: {} {}", run.code, run.stderr))
}

fn scenario_on(qemu: QemuBinary, kernel: &Kernel, make: &str, check: &str) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "400M")?;
    let socket = host.create(NAME, &["--size", &SIZE.to_string()])?;
    let mut guest = boot(qemu, kernel, &socket)?;
    let disk = guest.disk(0)?;
    let device = format!("/dev/{disk}");
    let serial = format!("cat /sys/block/{disk}/serial");
    guest.ok(&format!("modprobe -a ext4 xfs; {make} {device} && mount {device} /mnt"))?;
    for salt in 0..2 {
        let command =
            format!("guest_files fill /mnt/tree {SEED} && guest_files thin /mnt/tree {salt} && sync");
        guest.sh_within(&command, Duration::from_secs(200))?.check()?;
    }
    let tree = guest.ok(&format!("guest_files check /mnt/tree {SEED}"))?;

    // Nobody there: the operator hears it, and the wish stands.
    let run = reclaim(&host, &(SIZE / 2).to_string(), "2s")?;
    ensure!(run.code == 5 && state(&run)? == "expired" && run.stderr.contains("no agent"), "{run:?}");
    host.ctl.ok(&["reclaim", NAME, "off"])?;
    let nobody = host.ctl.refused(&["estimate", NAME])?;
    ensure!(nobody.stderr.contains("E_NO_DRIVER"), "{nobody:?}");

    // With an agent: what is free, and was written once, goes.
    let agent = start_agent(&mut guest, &host)?;
    // Whoever else reads the serial number meanwhile, such as udev, reads the serial number.
    let reader = guest.spawn(&format!("while ! test -e /tmp/stop; do {serial}; echo; sleep 0.05; done"))?;
    let (before, spare) = (allocated(&host)?, free(&mut guest)?);
    let said = host.ctl.ok(&["estimate", NAME])?;
    let estimated = scenario::find(&said, "free_bytes").and_then(Value::as_u64).unwrap_or_default();
    ensure!(estimated.abs_diff(spare) < spare / 10, "{estimated} estimated, {spare} are free");
    let soft = (SIZE - spare * 9 / 10) / BLOCK * BLOCK;
    let run = reclaim(&host, &soft.to_string(), "60s")?;
    let after = allocated(&host)?;
    ensure!(
        state(&run)? == "done",
        "{run:?}: {before} -> {after}, {soft} wished\n{}",
        String::from_utf8_lossy(&agent.stdout())
    );
    // By nine tenths of what is free, less what of that was never written.
    ensure!(after <= soft && after < before, "{before} -> {after} bytes in use, {soft} wished");
    guest.ok("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(guest.ok(&format!("guest_files check /mnt/tree {SEED}"))? == tree, "the tree has changed");

    let said: Value = serde_json::from_str(&guest.ok("vssd-agent status --json")?)?;
    ensure!(said["state"] == "agent-only" && said["requested_blocks"] == soft / BLOCK, "{said}");

    // For as long as the wish stands the guest does not use it, whatever it does; also after a power cut, a crash of the daemon
    // and without an agent.
    guest.sh_within("guest_files fill /mnt/more 7 && sync", Duration::from_secs(100))?.check()?;
    ensure!(allocated(&host)? <= soft, "{} in use, {soft} wished", allocated(&host)?);
    guest.ok("rm -rf /mnt/more; touch /tmp/stop")?;
    let read = guest.wait(&reader, Duration::from_secs(10))?.text();
    let (right, wrong): (Vec<&str>, Vec<&str>) = read.lines().partition(|line| *line == "vssd-vm1");
    ensure!(right.len() > 50 && wrong.len() * 50 < right.len(), "{} right, wrong: {wrong:?}", right.len());
    guest.ok("killall -KILL vssd-agent")?;
    guest.wait(&agent, Duration::from_secs(10))?;
    guest.reset()?;
    host.daemon.kill()?;
    host.daemon.start()?;
    guest.ok(&format!("modprobe -a ext4 xfs; mount {device} /mnt"))?;
    ensure!(guest.ok(&format!("guest_files check /mnt/tree {SEED}"))? == tree, "the tree has changed");
    guest.sh_within("guest_files fill /mnt/more 8 && sync", Duration::from_secs(100))?.check()?;
    ensure!(allocated(&host)? <= soft, "{} in use, {soft} wished", allocated(&host)?);

    // There is nothing more to give.
    let agent = start_agent(&mut guest, &host)?;
    ensure!(number(&host, "/soft_bytes")? == soft, "the wish was forgotten");
    let run = reclaim(&host, &(soft / 2).to_string(), "60s")?;
    ensure!(run.code == 4 && ["refused", "partial"].contains(&state(&run)?.as_str()), "{run:?}");
    ensure!(run.stderr.contains("nothing more can be given up"), "{run:?}");
    guest.ok("rm -rf /mnt/more; sync; mount -o remount,ro /mnt")?;
    let run = reclaim(&host, &(soft / 2 + BLOCK).to_string(), "60s")?;
    ensure!(run.code == 4 && run.stderr.contains("its own rules forbid it"), "{run:?}");
    guest.ok("mount -o remount,rw /mnt")?;

    // Taken back: all of it can be used again.
    host.ctl.ok(&["reclaim", NAME, "off"])?;
    Deadline::secs(20)
        .until("the file system to have its space again", || Ok(free(&mut guest)? + 8 * MIB >= spare))?;
    guest
        .sh_within(
            "guest_files fill /mnt/more 9 && sync && guest_files check /mnt/more 9",
            Duration::from_secs(100),
        )?
        .check()?;
    ensure!(allocated(&host)? > soft, "it was not used again");
    ensure!(guest.ok(&format!("guest_files check /mnt/tree {SEED}"))? == tree, "the tree has changed");
    ensure!(!agent.ended(), "the agent has ended: {}", String::from_utf8_lossy(&agent.stdout()));
    ensure!(guest.ok(&serial)? == "vssd-vm1");
    guest.ok("killall vssd-agent; umount /mnt")?;
    guest.ok(&format!("{check} {device}"))?;
    println!(
        "PASS {make} on a stock {}: with {} of {} MiB free, {} -> {} MiB in use on the host, through a power cut too, and all \
         of it usable again at the end; {} reads of the serial number by others, {} of them met the agent's",
        guest.release(),
        spare / MIB,
        SIZE / MIB,
        before / MIB,
        after / MIB,
        right.len(),
        wrong.len()
    );
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

#[test]
fn ext4_on_a_stock_kernel_gives_its_free_space_back() -> Result<()> {
    let _slot = guest_slot()?;
    let make = "mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0";
    scenario_on(QemuBinary::debian()?, &Kernel::debian()?, make, "e2fsck -fn")
}

#[test]
fn xfs_on_a_newer_stock_kernel_gives_its_free_space_back() -> Result<()> {
    let _slot = guest_slot()?;
    scenario_on(QemuBinary::backports()?, &Kernel::backports()?, "mkfs.xfs -q", "xfs_repair -n")
}
