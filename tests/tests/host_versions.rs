// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vm-host with QEMU 7.2 and with 10.0, and a guest that is saved with one and goes on with the other.

use std::fs;
use std::os::unix::fs::symlink;

use anyhow::{Context, Result, ensure};
use vssd_tests::image::{GuestImage, ImageBuilder};
use vssd_tests::kernel::Kernel;
use vssd_tests::qemu::QemuBinary;
use vssd_tests::report::Report;
use vssd_tests::scenario::{Medium, PoolHost};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;
use vssd_tests::vm_host::{Mark, VmHost};

const MEMORY: &str = "96MiB";
/// Beside the folder, NV-RAM in one file with an offset for each region.
const FILE_MEDIUM: &str = "[[nvram]]\nname = 'file'\npath = 'LIVE/nv/device'\ndeclared_persistent = true\n";

fn image() -> Result<GuestImage> {
    ImageBuilder::small(&Kernel::debian()?).kernel_module("virtio_blk").build()
}

/// A host whose VMs are started by `LIVE/qemu`, whichever program that is.
fn host_of(qemu: &QemuBinary) -> Result<VmHost> {
    let host = VmHost::with(FILE_MEDIUM)?;
    fs::File::create(host.live().join("nv/device"))?.set_len(160 << 20)?;
    use_qemu(&host, qemu)?;
    Ok(host)
}

/// As a package's update would.
fn use_qemu(host: &VmHost, qemu: &QemuBinary) -> Result<()> {
    qemu.write_starter(&host.live().join("qemu.new"))?;
    Ok(fs::rename(host.live().join("qemu.new"), host.live().join("qemu"))?)
}

/// The definition of a VM that this host's QEMU runs.
fn definition(host: &VmHost, name: &str, image: &GuestImage) -> String {
    format!("{}emulator = '{}'\n", host.definition(name, image, MEMORY), host.live().join("qemu").display())
}

/// Everything that a version has options of its own for, or may do in a way of its own.
fn life(qemu: &QemuBinary, report: &mut Report) -> Result<()> {
    const DATA: &str = "head -c 8388608 /dev/urandom > /tmp/disk && dd if=/tmp/disk of=/dev/vda bs=1M oflag=direct 2> /dev/null";
    const READ: &str = "echo 3 > /proc/sys/vm/drop_caches; head -c 8388608 /dev/vda | md5sum";
    let (major, minor) = qemu.version();
    let image = image()?;
    let mut host = host_of(qemu)?;
    let scratch = Scratch::new()?;
    let mut pool = PoolHost::new(&scratch, Medium::Nvram, "64M")?;
    pool.create("a", &["--size", "32M"])?;
    symlink(pool.runtime(), host.vssd_runtime())?;
    host.start()?;
    host.define(&(definition(&host, "a", &image) + "[[vssd]]\nname = 'a'\n"))?;
    host.ok(&["start", "a"])?;
    let mark = Mark::make(&host, "a")?;
    host.run("a", "modprobe virtio_blk; until test -b /dev/vda; do sleep 0.1; done")?;
    host.run("a", DATA)?;
    let disk = host.run("a", "md5sum < /tmp/disk")?;
    let goes_on = |host: &VmHost| -> Result<()> {
        host.wait_state("a", "running")?;
        mark.check(host, "a")?;
        ensure!(host.run("a", READ)? == disk, "the vSSD's data has changed");
        Ok(())
    };
    goes_on(&host).context("before anything")?;

    host.power(false)?;
    host.wait_state("a", "saved")?;
    host.power(true)?;
    goes_on(&host).context("held, and resumed")?;

    host.ok(&["save", "a"])?;
    host.ok(&["swap-out", "a"])?;
    host.ok(&["swap-in", "a"])?;
    host.ok(&["restore", "a"])?;
    goes_on(&host).context("swapped and restored")?;

    host.power(false)?;
    host.wait_state("a", "saved")?;
    host.power_cut()?;
    host.start()?;
    goes_on(&host).context("after darkness")?;

    host.kill()?;
    host.start()?;
    goes_on(&host).context("with another daemon")?;
    report.pass(&format!("QEMU {major}.{minor}: held, saved, swapped, restored, adopted, with its vSSD"), "");

    host.ok(&["stop", "a", "--kill", "--yes"])?;
    host.define(&definition(&host, "b", &image).replace("'nv0'", "'file'"))?;
    let said = host.call(&["start", "b"])?;
    if (major, minor) < (8, 1) {
        let message = said.json["error"]["message"].as_str().unwrap_or_default();
        report.check(
            "memory at an offset is refused where QEMU cannot",
            said.code != 0 && message.contains("8.1") && host.machines()?.is_empty(),
            message,
        );
    } else {
        ensure!(said.code == 0, "{}", said.json);
        let mark = Mark::make(&host, "b")?;
        host.power(false)?;
        host.wait_state("b", "saved")?;
        host.power_cut()?;
        host.start()?;
        host.wait_state("b", "running")?;
        mark.check(&host, "b")?;
        report.pass("memory at an offset in one file", "");
    }
    host.power_cut()?;
    pool.finish()
}

#[test]
fn each_version_of_qemu_keeps_guests() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("versions of QEMU");
    life(&QemuBinary::debian()?, &mut report)?;
    life(&QemuBinary::backports()?, &mut report)?;
    report.finish()
}

/// The state of a machine is only read by the same or a newer version.
#[test]
fn a_guest_goes_on_with_a_newer_qemu_and_is_kept_from_an_older_one() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("another version of QEMU after the outage");
    let (old, new) = (QemuBinary::debian()?, QemuBinary::backports()?);
    let image = image()?;
    let mut host = host_of(&old)?;
    host.start()?;
    host.define(&definition(&host, "a", &image))?;
    host.ok(&["start", "a"])?;
    let mark = Mark::make(&host, "a")?;
    darkness(&mut host, &new)?;
    host.wait_state("a", "running")?;
    mark.check(&host, "a")?;
    report.pass("saved with 7.2, it goes on with 10.0", host.show("a")?["machine"].to_string());

    // What it is saved by now is the newer one, on the older machine.
    darkness(&mut host, &old)?;
    let shown = host.show("a")?;
    ensure!(shown["state"] == "saved" && shown["error"] == "E_STATE", "{shown}");
    let said = host.call(&["restore", "a"])?;
    let message = said.json["error"]["message"].as_str().unwrap_or_default().to_owned();
    report.check("saved with 10.0, it is kept from 7.2", said.error() == "E_STATE", &message);
    ensure!(message.contains("10.0") && message.contains("7.2"), "{message}");
    ensure!(host.machines()?.is_empty(), "a machine is left");
    use_qemu(&host, &new)?;
    host.ok(&["restore", "a"])?;
    mark.check(&host, "a")?;
    report.pass("and goes on once that is there again", "");
    report.finish()
}

/// Power fails, and another QEMU is there when it is back.
fn darkness(host: &mut VmHost, qemu: &QemuBinary) -> Result<()> {
    host.power(false)?;
    host.wait_state("a", "saved")?;
    host.power_cut()?;
    use_qemu(host, qemu)?;
    host.start()
}
