// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Persistent VMs on this machine: saved, restored, adopted, swapped out and in, with real QEMUs.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vm_host::config::{Config, VssdConfig};
use vm_host::definition::Definition;
use vm_host::fault::Fault;
use vm_host::host::Host;
use vm_host::nvram::MediumConfig;
use vm_host::vm::{Order, Status, Tell, VmNews, VmState};
use vm_host::vmm::qemu::Qemu;
use vssd_tests::image::{GuestImage, ImageBuilder};
use vssd_tests::kernel::Kernel;
use vssd_tests::paths;
use vssd_tests::process;
use vssd_tests::scratch::Scratch;
use vssd_tests::serial::guest_slot;
use vssd_tests::wire::PORT_NAME;

#[derive(Debug)]
struct Quiet;

impl Tell for Quiet {
    fn tell(&self, vm: &str, news: VmNews) {
        println!("{vm}: {news:?}");
    }

    fn sync_vssds(&self, _: &Definition) -> Result<(), Fault> {
        Ok(())
    }
}

struct Site {
    scratch: Scratch,
    image: GuestImage,
}

impl Site {
    fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        std::fs::create_dir_all(scratch.join("nv"))?;
        Ok(Self { scratch, image: ImageBuilder::small(&Kernel::debian()?).build()? })
    }

    fn host(&self) -> Result<Host> {
        let config = Config {
            state_dir: self.scratch.join("state"),
            runtime_dir: self.scratch.join("run"),
            log_dir: self.scratch.join("log"),
            nvram: vec![MediumConfig {
                declared_persistent: true,
                ..MediumConfig::new("nv0", self.scratch.join("nv"))
            }],
            vssd: VssdConfig { runtime_dir: self.scratch.join("vssd") },
            ..Config::default()
        };
        std::fs::create_dir_all(&config.log_dir)?;
        Ok(Host::open(&config, Arc::new(Qemu), Arc::new(Quiet))?)
    }

    fn agent_socket(&self, name: &str) -> PathBuf {
        self.scratch.join(format!("{name}.agent"))
    }

    fn definition(&self, name: &str, more: &str) -> String {
        let socket = self.agent_socket(name);
        format!(
            "name = '{name}'\nmemory = '256MiB'\nnvram = 'nv0'\naccel = 'tcg'\ncpu = 'max,cx16=off'\n\
             kernel = '{}'\ninitrd = '{}'\ncmdline = '{}'\n\
             extra = ['-device', 'virtio-serial-pci,id=vser', '-chardev', 'socket,id=agent0,path={},server=on,wait=off', \
             '-device', 'virtserialport,bus=vser.0,chardev=agent0,name={PORT_NAME}']\n{more}",
            self.image.kernel().image().display(),
            self.image.initramfs().display(),
            vssd_tests::qemu::CMDLINE,
            socket.display(),
        )
    }

    /// Runs a command in a guest, once it is up. A process of its own, for the port of a guest serves one at a time.
    fn run(&self, name: &str, command: &str) -> Result<String> {
        let mut run = Command::new(paths::artifact("vssd-tests", "guest_run")?);
        run.arg(self.agent_socket(name)).arg("60").arg(command);
        Ok(process::run(&mut run)?.trim().to_owned())
    }
}

fn expect(status: &Status, state: VmState) -> Result<()> {
    ensure!(status.state == state, "{status:?}");
    Ok(())
}

#[test]
fn a_guest_goes_on_where_it_was_saved() -> Result<()> {
    let _slot = guest_slot()?;
    let site = Site::new()?;
    let host = site.host()?;
    host.define(&site.definition("a", ""), false)?;
    let begun = Instant::now();
    expect(&host.start("a")?, VmState::Running)?;
    site.run("a", "uname -r")?;
    println!("booted in {:?}", begun.elapsed());
    site.run("a", "(i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.1; done) >/dev/null 2>&1 &")?;
    let sum = site.run("a", "head -c 64M /dev/urandom > /tmp/data; sha256sum < /tmp/data")?;
    let count: u64 = site.run("a", "cat /tmp/count")?.parse()?;
    let saved = host.order("a", Order::Save)?;
    expect(&saved, VmState::Saved)?;
    println!("{:?}", saved.last_save.context("no save")?);
    drop(host);

    let host = site.host()?;
    host.recover();
    expect(&host.show("a")?, VmState::Saved)?;
    let resumed = host.order("a", Order::Resume)?;
    expect(&resumed, VmState::Running)?;
    println!("restored in {:?} us", resumed.last_restore_us);
    ensure!(site.run("a", "sha256sum < /tmp/data")? == sum);
    let later: u64 = site.run("a", "cat /tmp/count")?.parse()?;
    ensure!(later > count, "{later} after {count}");

    // Held, as when the power fails, and continued, as when it comes back.
    expect(&host.order("a", Order::Hold)?, VmState::Saved)?;
    expect(&host.order("a", Order::Resume)?, VmState::Running)?;
    drop(host);

    // The daemon restarts beside a guest that runs.
    let host = site.host()?;
    host.recover();
    expect(&host.show("a")?, VmState::Running)?;
    ensure!(site.run("a", "sha256sum < /tmp/data")? == sum);

    // To a file and back.
    host.order("a", Order::Save)?;
    expect(&host.order("a", Order::SwapOut)?, VmState::SwappedOut)?;
    expect(&host.order("a", Order::SwapIn)?, VmState::Saved)?;
    expect(&host.order("a", Order::Resume)?, VmState::Running)?;
    ensure!(site.run("a", "sha256sum < /tmp/data")? == sum);
    expect(&host.order("a", Order::Stop { grace: Duration::ZERO })?, VmState::Stopped)?;
    host.undefine("a")?;
    Ok(())
}
