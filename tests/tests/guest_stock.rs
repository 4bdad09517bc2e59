// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest without our driver: an ordinary disk that grows, returns what is trimmed, and is not shrunk below its data.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vssd_tests::guest::Guest;
use vssd_tests::kernel::Kernel;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::report::Report;
use vssd_tests::scenario::{self, Medium, PoolHost};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;
use vssd_tests::wait::Deadline;

const NAME: &str = "stock";

fn number(host: &PoolHost, key: &str) -> Result<u64> {
    let shown = host.show(NAME)?;
    shown.get(key).and_then(Value::as_u64).with_context(|| format!("no {key} in {shown}"))
}

fn wait_size(guest: &mut Guest, disk: &str, bytes: u64) -> Result<()> {
    let want = bytes.to_string();
    Deadline::after(Duration::from_secs(10)).until(&format!("{disk} to have {want} bytes"), || {
        Ok(guest.ok(&format!("blockdev --getsize64 /dev/{disk}"))? == want)
    })
}

fn scenario_on(qemu: QemuBinary, kernel: &Kernel, report: &mut Report) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "1100M")?;
    let socket = host.create(NAME, &["--size", "256M", "--max", "1G"])?;
    let version = qemu.version().0;
    let image = scenario::stock_image(kernel)?;
    let mut guest = Qemu::new(qemu, &image).disk(VhostUserDisk::new(&socket)).boot()?;
    let disk = guest.disk(0)?;
    ensure!(guest.ok(&format!("cat /sys/block/{disk}/serial"))? == "vssd-stock");
    wait_size(&mut guest, &disk, 256 << 20)?;

    guest.ok(&format!("mkfs.ext4 -q -F /dev/{disk} && mount /dev/{disk} /mnt"))?;
    guest.ok(
        "dd if=/dev/urandom of=/mnt/big bs=1M count=100 2>/dev/null; sync; sha256sum /mnt/big > /tmp/sum",
    )?;
    let full = number(&host, "allocated_bytes")?;
    ensure!(full >= 100 << 20, "only {full} bytes are allocated");
    report.pass(&format!("QEMU {version}: mkfs, mount, write"), format!("{} MiB allocated", full >> 20));

    host.ctl.ok(&["grow", NAME, "256M", "--wait"])?;
    wait_size(&mut guest, &disk, 512 << 20)?;
    guest.ok(&format!("resize2fs /dev/{disk} 2>/dev/null && sha256sum -c /tmp/sum"))?;
    report.pass(&format!("QEMU {version}: live grow while mounted"), "256 -> 512 MiB, file system grown");

    guest.ok("cp /tmp/sum /mnt/; dd if=/dev/zero of=/mnt/junk bs=1M count=200 2>/dev/null; sync; rm /mnt/junk; sync")?;
    let before = number(&host, "allocated_bytes")?;
    guest.ok("fstrim /mnt")?;
    let after = number(&host, "allocated_bytes")?;
    ensure!(after + (150 << 20) < before, "fstrim returned too little: {before} -> {after}");
    guest.ok("sha256sum -c /tmp/sum")?;
    report.pass(
        &format!("QEMU {version}: fstrim"),
        format!("{} -> {} MiB allocated", before >> 20, after >> 20),
    );

    let refused = host.ctl.refused(&["resize", NAME, "64M"])?;
    ensure!(refused.code == 4 && refused.stderr.contains("E_IN_USE"), "{refused:?}");
    ensure!(number(&host, "plugged_bytes")? == 512 << 20, "a refused shrink took something");
    report.pass(
        &format!("QEMU {version}: shrink below its data"),
        refused.stderr.lines().next().unwrap_or_default(),
    );

    // After a restart of the daemon the resize still reaches the guest: QEMU does not read the configuration again by
    // itself.
    host.daemon.kill()?;
    host.daemon.start()?;
    guest.ok("dd if=/mnt/big of=/dev/null bs=1M iflag=direct 2>/dev/null")?;
    host.ctl.ok(&["grow", NAME, "128M", "--wait"])?;
    wait_size(&mut guest, &disk, 640 << 20)?;
    report.pass(&format!("QEMU {version}: live grow after a reconnect"), "512 -> 640 MiB");
    host.daemon.kill()?;
    host.daemon.start()?;
    guest.ok(&format!("umount /mnt && e2fsck -f -n /dev/{disk}"))?;

    // With nothing in the tail it can go, and with --force data too.
    guest.ok(&format!(
        "blkdiscard /dev/{disk} && dd if=/dev/urandom of=/dev/{disk} bs=1M count=10 oflag=direct 2>/dev/null"
    ))?;
    host.ctl.ok(&["resize", NAME, "128M", "--wait"])?;
    wait_size(&mut guest, &disk, 128 << 20)?;
    host.ctl.ok(&["resize", NAME, "4M", "--force", "--yes", "--wait"])?;
    wait_size(&mut guest, &disk, 4 << 20)?;
    report.pass(&format!("QEMU {version}: empty tail, then by force"), "640 -> 128 -> 4 MiB");
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}

#[test]
fn a_stock_guest_grows_live_trims_and_is_not_shrunk_below_its_data() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("stock guests");
    scenario_on(QemuBinary::debian()?, &Kernel::debian()?, &mut report)?;
    scenario_on(QemuBinary::backports()?, &Kernel::backports()?, &mut report)?;
    report.finish()
}

#[test]
fn loading_our_module_takes_no_disk_that_it_was_not_given() -> Result<()> {
    let _slot = guest_slot()?;
    let scratch = Scratch::new()?;
    let plain = scratch.join("plain.raw");
    std::fs::File::create(&plain)?.set_len(64 << 20)?;
    let plain_socket = scratch.join("plain.sock");
    let _peer =
        vssd_tests::backend::Backend::storage_daemon(&plain_socket, &plain, 2, &scratch.join("qsd.log"))?
            .started()?;
    let mut host = PoolHost::new(&scratch, Medium::Nvram, "100M")?;
    let socket = host.create(NAME, &["--size", "64M"])?;
    let image = scenario::image(&Kernel::debian()?)?;
    let mut guest = Qemu::new(QemuBinary::debian()?, &image)
        .disk(VhostUserDisk::new(&plain_socket))
        .disk(VhostUserDisk::new(&socket))
        .boot()?;
    guest.ok("modprobe vssd")?;
    for index in 0..2 {
        ensure!(guest.disk(index)?.starts_with("vd"), "disk {index} was taken");
    }
    // A disk that is no vSSD is refused and works on with the stock driver.
    let plain = guest.disk(0)?;
    let refused = guest.sh(&format!("vssd-bind {plain}"))?;
    ensure!(!refused.success(), "{refused:?}");
    guest.ok(&format!("dd if=/dev/zero of=/dev/{plain} bs=64k count=10 oflag=direct 2>/dev/null"))?;
    // Forced past the helper's look at the serial: the driver itself finds out, and lets go.
    let device = guest.virtio_device(0)?;
    guest
        .sh(&format!(
            "cd /sys/bus/virtio/drivers; echo {device} > virtio_blk/unbind; echo {device} > vssd/bind; \
         test -e vssd/{device} && exit 9; echo {device} > virtio_blk/bind"
        ))?
        .check()?;
    let plain = guest.disk(0)?;
    guest.ok(&format!("dd if=/dev/{plain} of=/dev/null bs=64k count=10 iflag=direct 2>/dev/null"))?;
    let disk = scenario::bind(&mut guest, 1)?;
    // A mounted disk is not handed over.
    guest.ok(&format!("vssd-bind --unbind {}", disk.name))?;
    let stock = guest.disk(1)?;
    guest.ok(&format!("mkfs.ext4 -q -F /dev/{stock} && mount /dev/{stock} /mnt"))?;
    ensure!(!guest.sh(&format!("vssd-bind {stock}"))?.success(), "a mounted disk was taken");
    guest.ok("umount /mnt")?;
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()
}
