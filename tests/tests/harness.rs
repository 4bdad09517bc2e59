// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the other scenarios rely on to fail: compiler warnings, kernel warnings, panics and dead machines are seen.

use std::fs;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use vssd_tests::image::{GuestImage, ImageBuilder};
use vssd_tests::kernel::Kernel;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;

fn module(body: &str) -> Result<Scratch> {
    let source = Scratch::new()?;
    fs::write(source.join("Kbuild"), "obj-m := probe.o\n")?;
    fs::write(
        source.join("probe.c"),
        format!(
            "#include <linux/module.h>\n\
             static int __init probe_init(void)\n{{\n{body}\n\treturn 0;\n}}\n\
             module_init(probe_init);\n\
             MODULE_LICENSE(\"GPL\");\nMODULE_DESCRIPTION(\"probe\");\n"
        ),
    )?;
    Ok(source)
}

#[test]
fn a_module_with_a_compiler_warning_is_refused_for_every_kernel() -> Result<()> {
    let source = module("\tint unused;\n")?;
    for kernel in Kernel::all()? {
        let Err(refused) = kernel.build_module(source.path()) else {
            bail!("built with a warning for {}", kernel.release());
        };
        let text = format!("{refused:#}");
        ensure!(text.contains("unused variable"), "{text}");
    }
    Ok(())
}

#[test]
fn a_warning_of_the_kernel_is_a_complaint() -> Result<()> {
    let _slot = guest_slot()?;
    let source = module("\tWARN_ON(1);\n")?;
    let kernel = Kernel::debian()?;
    let image = ImageBuilder::new(&kernel).modules(&kernel.build_module(source.path())?).build()?;
    let mut guest = Qemu::new(QemuBinary::debian()?, &image).boot()?;
    guest.expect_quiet_kernel()?;
    guest.ok("modprobe probe")?;
    let found = guest.kernel_complaints();
    ensure!(found.iter().any(|line| line.contains("WARNING: CPU")), "{found:?}");
    ensure!(guest.expect_quiet_kernel().is_err());
    Ok(())
}

#[test]
fn a_panic_ends_the_wait_for_a_command_and_is_shown() -> Result<()> {
    let _slot = guest_slot()?;
    let mut guest = Qemu::new(QemuBinary::debian()?, &GuestImage::stock(&Kernel::debian()?)?).boot()?;
    let Err(error) = guest.sh("echo c > /proc/sysrq-trigger") else {
        bail!("a command in a dead guest gave an answer");
    };
    ensure!(format!("{error:#}").contains("Kernel panic"), "{error:#}");
    Ok(())
}

#[test]
fn a_command_that_hangs_is_given_up_with_what_the_kernel_knows() -> Result<()> {
    let _slot = guest_slot()?;
    let mut guest = Qemu::new(QemuBinary::debian()?, &GuestImage::stock(&Kernel::debian()?)?).boot()?;
    let Err(error) = guest.sh_within("echo started; sleep 1000", Duration::from_secs(1)) else {
        bail!("a command that sleeps gave an answer");
    };
    let text = format!("{error:#}");
    ensure!(text.contains("started") && text.contains("Show Blocked State"), "{text}");
    guest.ok("true").map(drop)
}

#[test]
fn a_machine_that_is_gone_ends_the_wait_for_a_command() -> Result<()> {
    let _slot = guest_slot()?;
    let mut guest = Qemu::new(QemuBinary::debian()?, &GuestImage::stock(&Kernel::debian()?)?).boot()?;
    let job = guest.spawn("sleep 1000")?;
    guest.kill()?;
    ensure!(guest.wait(&job, Duration::from_secs(10)).is_err());
    ensure!(guest.sh("true").is_err());
    Ok(())
}

#[test]
fn a_machine_without_its_disk_server_says_why_it_does_not_start() -> Result<()> {
    let scratch = Scratch::new()?;
    let machine = Qemu::new(QemuBinary::debian()?, &GuestImage::stock(&Kernel::debian()?)?);
    // With reconnection QEMU 7.2 waits for the server without end.
    let disk = VhostUserDisk::new(scratch.join("none.sock")).without_reconnect();
    let Err(error) = machine.disk(disk).boot() else {
        bail!("started without its disk");
    };
    ensure!(format!("{error:#}").contains("none.sock"), "{error:#}");
    Ok(())
}
