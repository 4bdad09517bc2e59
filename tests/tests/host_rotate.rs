// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Three persistent VMs on NV-RAM that holds two: they take turns, and none loses anything.

use std::collections::VecDeque;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::report::Report;
use vssd_tests::serial::guest_slot;
use vssd_tests::vm_host::{Mark, VmHost};
use vssd_tests::{paths, process};

const VMS: [&str; 3] = ["a", "b", "c"];
const MEMORY_MIB: u64 = 96;
/// Beside each memory lies a slot of 16 MiB; and there is the registry.
const NVRAM_MIB: u64 = 2 * (MEMORY_MIB + 16) + 8;
const ROUNDS: usize = 6;

/// A file system of its own as NV-RAM. Unmounted when dropped.
struct Mounted(String);

impl Mounted {
    fn new(host: &VmHost) -> Result<Self> {
        let dir = host.live().join("nv").to_string_lossy().into_owned();
        let mut mount = Command::new(paths::tool("mount")?);
        mount.args(["-t", "tmpfs", "-o", &format!("size={NVRAM_MIB}M"), "tmpfs", &dir]);
        process::run(&mut mount)?;
        Ok(Self(dir))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Machines that are still ending have it open.
        if let Ok(umount) = paths::tool("umount") {
            let _ = Command::new(umount).args(["-l", &self.0]).status();
        }
    }
}

#[test]
fn three_vms_take_turns_on_nvram_for_two() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("three VMs on NV-RAM for two");
    let mut host = VmHost::new()?;
    let _nvram = Mounted::new(&host)?;
    host.start()?;
    let image = ImageBuilder::small(&Kernel::debian()?).build()?;
    for vm in VMS {
        host.define(&host.definition(vm, &image, &format!("{MEMORY_MIB}MiB")))?;
    }
    let begin = |host: &VmHost, vm: &str| -> Result<Mark> {
        host.ok(&["start", vm])?;
        Mark::make(host, vm)
    };
    let mut known = vec![("a", begin(&host, "a")?), ("b", begin(&host, "b")?)];
    let refused = host.call(&["start", "c"])?;
    report.check(
        "a third finds no room",
        refused.code == 6 && refused.error() == "E_POOL_FULL",
        &refused.json,
    );

    host.ok(&["save", "a"])?;
    host.ok(&["swap-out", "a"])?;
    known.push(("c", begin(&host, "c")?));
    let (mut inside, mut outside) = (VecDeque::from(["b", "c"]), "a");
    for round in 0..ROUNDS {
        let leaves = inside.pop_front().context("nobody is inside")?;
        host.ok(&["save", leaves])?;
        let early = host.call(&["swap-in", outside])?;
        ensure!(early.code == 6, "there was room before somebody left: {}", early.json);
        host.ok(&["swap-out", leaves])?;
        host.ok(&["swap-in", outside])?;
        host.ok(&["restore", outside])?;
        let (_, mark) = known.iter_mut().find(|(vm, _)| *vm == outside).context("unknown")?;
        *mark = mark.check(&host, outside).with_context(|| format!("round {round}"))?;
        inside.push_back(outside);
        outside = leaves;
    }
    report.pass("they take turns", format!("{ROUNDS} changes, {NVRAM_MIB} MiB of NV-RAM"));
    host.power_cut()?;
    report.finish()
}
