// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The harness itself, shown on both kernels and both QEMUs with a disk served by QEMU's storage daemon.

use std::fs::File;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use vssd_tests::backend::Backend;
use vssd_tests::image::GuestImage;
use vssd_tests::kernel::Kernel;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;
use vssd_tests::wait::Deadline;

const DISK_BYTES: u64 = 64 << 20;

#[test]
fn linux_6_1_on_qemu_7_2() -> Result<()> {
    exercise(&QemuBinary::debian()?, (7, 2), &Kernel::debian()?, "6.1")
}

#[test]
fn linux_6_12_on_qemu_10_0() -> Result<()> {
    exercise(&QemuBinary::backports()?, (10, 0), &Kernel::backports()?, "6.12")
}

fn exercise(qemu: &QemuBinary, version: (u32, u32), kernel: &Kernel, series: &str) -> Result<()> {
    let _slot = guest_slot()?;
    ensure!(qemu.version() == version, "QEMU {:?} instead of {version:?}", qemu.version());
    ensure!(kernel.series() == series, "Linux {} instead of {series}", kernel.release());

    let scratch = Scratch::new()?;
    let image = scratch.join("disk.raw");
    File::create(&image)?.set_len(DISK_BYTES)?;
    let socket = scratch.join("disk.sock");
    let _daemon = Backend::storage_daemon(&socket, &image, 2, &scratch.join("qsd.log"))?.started()?;

    let mut guest =
        Qemu::new(qemu.clone(), &GuestImage::stock(kernel)?).disk(VhostUserDisk::new(&socket)).boot()?;
    println!("booted {} in {:.1} s ({:?})", guest.release(), guest.boot_time().as_secs_f64(), guest.accel());
    ensure!(guest.release() == kernel.release());

    // Exit codes and the two streams arrive apart.
    let out = guest.sh("echo good; echo bad >&2; exit 3")?;
    ensure!((out.text(), out.errors(), out.code) == ("good".into(), "bad".into(), 3), "{out:?}");

    // A big binary output arrives whole: four megabytes of counted bytes, hashed on both sides.
    let out = guest.sh("dd if=/dev/urandom of=/tmp/big bs=1M count=4 2>/dev/null; cat /tmp/big")?.check()?;
    ensure!(out.stdout.len() == 4 << 20, "{} bytes", out.stdout.len());
    guest.write_file("/tmp/again", &out.stdout)?;
    guest.ok("cmp /tmp/big /tmp/again")?;

    // Two commands at once: the second releases the first.
    let waiting = guest.spawn("while ! test -e /tmp/go; do sleep 0.1; done; echo released")?;
    guest.ok("test ! -e /tmp/go && touch /tmp/go")?;
    ensure!(guest.wait(&waiting, Duration::from_secs(20))?.text() == "released");

    // A job can be killed, with its children.
    let endless = guest.spawn("echo started; sleep 1000")?;
    endless.kill()?;
    ensure!(guest.wait(&endless, Duration::from_secs(20))?.code == 128 + 9);

    // The disk: what the guest writes is in the host's file, and a file system works on it.
    let disk = guest.disk(0)?;
    ensure!(guest.ok(&format!("cat /sys/block/{disk}/size"))? == (DISK_BYTES / 512).to_string());
    ensure!(guest.ok(&format!("ls /sys/block/{disk}/mq"))?.lines().count() == 2, "one queue per processor");
    guest.ok(&format!(
        "printf 'written by the guest' | dd of=/dev/{disk} bs=512 conv=sync,fsync oflag=direct"
    ))?;
    let bytes = std::fs::read(&image)?;
    ensure!(bytes.starts_with(b"written by the guest"));
    guest.ok(&format!(
        "mkfs.ext4 -q -F /dev/{disk} && mount /dev/{disk} /mnt && cp /tmp/big /mnt/ && umount /mnt"
    ))?;
    let fsck = guest.sh(&format!("e2fsck -f -n /dev/{disk}"))?;
    ensure!(fsck.success(), "{fsck:?}");

    // Rebooting from inside and by the reset button: memory is new, the disk is not.
    guest.reboot()?;
    ensure!(!guest.sh("test -e /tmp/big")?.success());
    let disk = guest.disk(0)?;
    guest.ok(&format!("mount /dev/{disk} /mnt && test -s /mnt/big && umount /mnt"))?;
    // A job whose output the reset cuts off is lost, and the channel goes on.
    let noisy = guest.spawn("while :; do dd if=/dev/urandom bs=64k count=16 2>/dev/null; done")?;
    Deadline::secs(20).until("some output", || Ok(noisy.stdout().len() > 1 << 20))?;
    guest.reset()?;
    let Err(lost) = guest.wait(&noisy, Duration::from_secs(5)) else {
        bail!("a job of the boot before gave an answer");
    };
    ensure!(lost.to_string().contains("rebooted"), "{lost}");
    println!("reset in {:.1} s", guest.boot_time().as_secs_f64());
    guest.ok("true")?;

    guest.expect_quiet_kernel()?;
    guest.power_off()
}
