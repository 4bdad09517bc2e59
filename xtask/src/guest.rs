// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask guest`: a guest with given disks, for a look by hand.

use std::io::{Write, stderr, stdout};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::ValueEnum;
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
use vssd_tests::setup;

use crate::stages::show;

/// Which of the tested pairs of kernel and QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Vintage {
    /// Debian 12's own.
    Debian,
    /// Debian 12's backports.
    Backports,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A vhost-user disk to attach; may be repeated.
    #[arg(long, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// Linux 6.1 (debian) or 6.12 (backports).
    #[arg(long, value_enum, default_value = "debian")]
    kernel: Vintage,
    /// QEMU 7.2 (debian) or 10.0 (backports).
    #[arg(long, value_enum, default_value = "debian")]
    qemu: Vintage,
    /// Without our driver.
    #[arg(long)]
    stock: bool,
    /// A further program of the host to take along, with its libraries; may be repeated.
    #[arg(long, value_name = "NAME")]
    tool: Vec<String>,
    /// Guest memory.
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    memory: u32,
    /// Run this instead of a shell; may be repeated. Ends at the first that fails.
    #[arg(short, long, value_name = "COMMAND")]
    command: Vec<String>,
    /// Further arguments for QEMU.
    #[arg(last = true)]
    args: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    setup::ensure()?;
    let kernel = match args.kernel {
        Vintage::Debian => Kernel::debian()?,
        Vintage::Backports => Kernel::backports()?,
    };
    let binary = match args.qemu {
        Vintage::Debian => QemuBinary::debian()?,
        Vintage::Backports => QemuBinary::backports()?,
    };
    let mut image = ImageBuilder::new(&kernel);
    for tool in &args.tool {
        image = image.tool(tool);
    }
    if !args.stock {
        image = image.driver()?;
    }
    let mut machine = Qemu::new(binary, &image.build()?).memory_mib(args.memory).args(args.args.clone());
    for socket in &args.socket {
        machine = machine.disk(VhostUserDisk::new(socket));
    }
    if args.command.is_empty() {
        eprintln!("a shell follows; `poweroff -f` or Ctrl-A X ends the guest");
        return show(machine.interactive());
    }
    let mut guest = machine.boot()?;
    eprintln!("booted {} in {:.1} s", guest.release(), guest.boot_time().as_secs_f64());
    for command in &args.command {
        eprintln!("guest# {command}");
        let output = guest.sh_within(command, Duration::from_secs(600))?;
        stdout().write_all(&output.stdout)?;
        stderr().write_all(&output.stderr)?;
        if !output.success() {
            eprintln!("{}", guest.console());
            bail!("`{command}` ended with {}", output.code);
        }
    }
    for complaint in guest.kernel_complaints() {
        eprintln!("the kernel complained: {complaint}");
    }
    guest.expect_quiet_kernel()
}
