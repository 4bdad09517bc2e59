// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The test harness: boots real guests under QEMU against real daemons, with what Debian ships.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use vssd_tests::backend::Backend;
//! use vssd_tests::image::GuestImage;
//! use vssd_tests::kernel::Kernel;
//! use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk};
//! use vssd_tests::scratch::Scratch;
//!
//! let scratch = Scratch::new()?;
//! let socket = scratch.join("disk.sock");
//! let mut daemon = Backend::single(&socket, &scratch.join("pool"), "1G", &scratch.join("log"))?.started()?;
//! let image = GuestImage::with_driver(&Kernel::debian()?)?;
//! let mut guest = Qemu::new(QemuBinary::debian()?, &image).disk(VhostUserDisk::new(&socket)).boot()?;
//! let disk = guest.disk(0)?;                                  // "vda"
//! guest.ok("modprobe vssd")?;                                 // an error unless the exit code is 0
//! let fio = guest.spawn("fio …")?;                            // in the background
//! let out = guest.sh(&format!("cat /proc/vssd/{disk}/status"))?; // exit code and output to judge
//! daemon.kill()?;                                             // kill -9
//! daemon.start()?;
//! guest.wait(&fio, std::time::Duration::from_secs(60))?;
//! guest.expect_quiet_kernel()?;                               // no WARNING, Oops, BUG, hung task on the console
//! # Ok(())
//! # }
//! ```
//!
//! By hand: `cargo xtask guest --socket S` gives a shell in a guest with that disk, `-c CMD` runs commands in it,
//! `cargo xtask module` builds the driver for both kernels. `cargo xtask setup` says or installs what is missing.
//!
//! Kernels, their headers, busybox and the second QEMU are Debian packages unpacked into `target/guest-cache`
//! (elsewhere with `VSSD_GUEST_CACHE`), never installed. Remove that folder to fetch newer ones.
//!
//! Each guest takes two processors and half a gigabyte, so a test that boots one starts with
//! [`serial::guest_slot`]; they then run one at a time also within one test program. The consoles of the latest
//! guests stay in `target/guest-cache/consoles`; `VSSD_KEEP_SCRATCH=1` keeps the daemons' files and logs too.
//! What this does not know: what a vSSD is. Scenarios in `tests/` say that.

pub mod agent;
pub mod apt;
pub mod backend;
pub mod c_program;
pub mod cpio;
pub mod ctl;
pub mod demo;
pub mod draw;
pub mod emulated_host;
pub mod guest;
pub mod image;
pub mod kernel;
pub mod mock;
pub mod page_cache;
pub mod paths;
pub mod pattern;
pub mod persistent;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod report;
pub mod scenario;
pub mod scratch;
pub mod serial;
pub mod setup;
pub mod tool;
pub mod vm_host;
pub mod wait;
pub mod wire;

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
