// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What all experiments need: a guest image with tools, machines to boot it on, and the versions of everything.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use vssd_tests::guest::Guest;
use vssd_tests::image::{GuestImage, ImageBuilder};
use vssd_tests::kernel::Kernel;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk, probed_accel};
use vssd_tests::scenario::{self, Disk};
use vssd_tests::scratch::Scratch;
use vssd_tests::{paths, process};

use crate::report::machine::Host as Computer;

#[derive(Debug)]
pub(super) struct Lab {
    qemu: QemuBinary,
    image: GuestImage,
    /// Release of the guests' kernel and version of the driver, once a guest has run.
    guests: RefCell<Option<(String, String)>>,
}

impl Lab {
    pub(super) fn open() -> Result<Self> {
        let tool = |name| paths::artifact("vssd-tests", name);
        let image = ImageBuilder::new(&Kernel::debian()?)
            .driver()?
            .file("/tools/guest_blocks", &tool("guest_blocks")?)
            .file("/tools/guest_reads", &tool("guest_reads")?)
            .build()?;
        Ok(Self { qemu: QemuBinary::debian()?, image, guests: RefCell::default() })
    }

    /// A folder in memory.
    pub(super) fn scratch(&self) -> Result<Scratch> {
        Scratch::new()
    }

    /// A guest with our driver on each of these vSSDs.
    pub(super) fn boot(&self, sockets: &[&Path]) -> Result<(Guest, Vec<Disk>)> {
        let machine = Qemu::new(self.qemu.clone(), &self.image);
        let machine =
            sockets.iter().fold(machine, |machine, socket| machine.disk(VhostUserDisk::new(*socket)));
        let mut guest = machine.boot()?;
        let disks =
            (0..sockets.len()).map(|index| scenario::bind(&mut guest, index)).collect::<Result<_>>()?;
        let version = guest.ok("cat /proc/vssd/version")?.replace('\n', ", ");
        *self.guests.borrow_mut() = Some((guest.release(), version));
        Ok((guest, disks))
    }

    /// What was measured with what, as lines of a list.
    pub(super) fn about(&self, quick: bool) -> Result<Vec<String>> {
        let computer = Computer::look();
        let (release, driver) = self.guests.borrow().clone().context("no guest has run")?;
        let (major, minor) = self.qemu.version();
        let backend = paths::artifact("vssd-backend", "vssd-backend")?;
        let backend = process::run(Command::new(backend).arg("--version"))?;
        let mut lines = vec![
            format!(
                "Machine: {} × {}, {} GiB, Linux {}",
                computer.processors, computer.processor, computer.memory_gib, computer.kernel
            ),
            format!(
                "Guests: Linux {release} with `vssd.ko` ({driver}), 2 processors, 512 MiB; QEMU {major}.{minor}, {}",
                probed_accel()
            ),
            format!("Host: {}{}; files on tmpfs stand for NV-RAM", backend.trim(), commit()),
        ];
        if quick {
            lines.push(
                "**Quick form**: small disks and few repetitions. It shows that the experiments work, its figures are not \
                 to be quoted."
                    .to_owned(),
            );
        }
        Ok(lines)
    }
}

/// Which sources this was built from, if they are a checkout.
fn commit() -> String {
    let mut git = Command::new("git");
    git.arg("-C").arg(paths::repo_root()).args(["describe", "--always", "--dirty", "--tags"]);
    process::run(&mut git).map(|said| format!(", sources {}", said.trim())).unwrap_or_default()
}
