// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The agent as what it is on most guests: a unit of systemd, confined by its unit file, with its words in the journal.

use std::time::Duration;

use anyhow::{Result, ensure};
use vssd_tests::guest::Guest;
use vssd_tests::image::{ImageBuilder, SYSTEMD};
use vssd_tests::kernel::Kernel;
use vssd_tests::paths;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::scenario::{self, Medium, PoolHost, blocks};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;
use vssd_tests::wait::Deadline;

const NAME: &str = "vm1";
const WANTED: u64 = 64 << 20;

fn journal(guest: &mut Guest) -> Result<String> {
    guest.ok("journalctl --no-pager -u vssd-agent -o cat")
}

fn main_pid(guest: &mut Guest) -> Result<u32> {
    Ok(guest.ok("systemctl show -P MainPID vssd-agent")?.parse()?)
}

#[test]
fn the_agent_serves_under_systemd_and_comes_back_when_it_is_killed() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "300M")?;
    let socket = host.create(NAME, &["--size", "256M"])?;
    let unit = paths::repo_root().join("guest-agent/vssd-agent.service");
    let image = ImageBuilder::new(&Kernel::debian()?)
        .file("/usr/bin/vssd-agent", &paths::artifact("vssd-agent", "vssd-agent")?)
        .file("/etc/systemd/system/vssd-agent.service", &unit)
        .systemd()?
        .driver()?
        .build()?;
    let mut guest = Qemu::new(QemuBinary::debian()?, &image)
        .memory_mib(768)
        .cmdline(SYSTEMD)
        .boot_limit(Duration::from_secs(120))
        .disk(VhostUserDisk::new(&socket))
        .boot()?;
    ensure!(guest.ok("cat /proc/1/comm")? == "systemd");

    // Before there is anything to serve it waits.
    guest.ok("systemctl enable --now vssd-agent")?;
    let disk = scenario::bind(&mut guest, 0)?;
    let device = format!("/dev/{}", disk.name);
    guest.ok(&format!("modprobe ext4; mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 {device} && mount {device} /mnt"))?;
    guest.ok("echo kept > /mnt/file; sync")?;
    Deadline::secs(30).until("the driver to have an agent", || {
        Ok(disk.status(&mut guest)?.get("agents").is_some_and(|agents| agents == "1"))
    })?;
    host.ctl.ok(&["shrink", NAME, &WANTED.to_string(), "--wait"])?;
    ensure!(blocks(&host.evicted(NAME)?) == WANTED / disk.block_size);
    let said = journal(&mut guest)?;
    ensure!(said.contains("the host asks for blocks back"), "{said}");

    // Killed, it is started again, and goes on.
    let first = main_pid(&mut guest)?;
    guest.ok(&format!("kill -KILL {first}"))?;
    Deadline::secs(30).until("systemd to start it again", || {
        let now = main_pid(&mut guest)?;
        let agents = disk.status(&mut guest)?.get("agents").cloned();
        Ok(now != 0 && now != first && agents.is_some_and(|agents| agents == "1"))
    })?;
    host.ctl.ok(&["shrink", NAME, &WANTED.to_string(), "--wait"])?;
    host.ctl.ok(&["grow", NAME, &(2 * WANTED).to_string(), "--wait"])?;
    ensure!(guest.ok("cat /mnt/file")? == "kept");

    // Its unit keeps it from what it does not need: it has no network of the guest's, and gains no privileges.
    let pid = main_pid(&mut guest)?;
    let status = guest.ok(&format!("cat /proc/{pid}/status"))?;
    ensure!(status.lines().any(|line| line.split_whitespace().eq(["NoNewPrivs:", "1"])), "{status}");
    guest.ok("systemctl stop vssd-agent")?;
    ensure!(guest.ok("systemctl is-failed vssd-agent || true")? == "inactive");
    let said = journal(&mut guest)?;
    ensure!(!said.contains("E_"), "{said}");
    println!(
        "PASS a unit of systemd … enabled, asked, killed, started again, stopped; {} lines in the journal",
        said.lines().count()
    );
    guest.ok("umount /mnt")?;
    guest.ok(&format!("e2fsck -fn {device}"))?;
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}
