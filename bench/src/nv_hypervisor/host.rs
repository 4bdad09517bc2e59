// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A host with one VM and its vSSD: switched on, cut off, switched on again.
//!
//! ```text
//!   vm-host ── QEMU ── guest: ext4 on /dev/vda, port `news` ──► file that `news` reads
//!                └── vhost-user ── vssd-backend ── pool on tmpfs
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vssd_tests::backend::{Backend, control_socket, device_socket, pool_command};
use vssd_tests::ctl::Ctl;
use vssd_tests::image::GuestImage;
use vssd_tests::process;
use vssd_tests::qemu::{Accel, CMDLINE, probed_accel};
use vssd_tests::vm_host::{VmHost, agent_port};

use super::database::SCRIPT;
use super::news::News;
use crate::meter::Bystanders;
use crate::peer::Media;

/// The VM, and its vSSD.
const VM: &str = "db";
const DISK: &str = "data";
const DISK_BYTES: u64 = 2 << 30;
/// Of the guest.
pub(super) const MEMORY: &str = "1GiB";
pub(super) const PROCESSORS: u32 = 2;

/// Where the guest's memory lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    Ordinary,
    Nvram,
}

#[derive(Debug)]
pub(super) struct Host {
    vm_host: VmHost,
    backend: Backend,
    pool: PathBuf,
    pub(super) news: News,
}

impl Host {
    /// Switched off, with a copy of the pool `from`, or with a new one.
    pub(super) fn new(from: Option<&Path>) -> Result<Self> {
        let vm_host = VmHost::new()?;
        let live = vm_host.live();
        let pool = live.join("pool");
        match from {
            Some(from) => copy(from, &pool)?,
            None => {
                let medium = format!("--nvram={}:{}", pool.display(), Media::pool_bytes(DISK_BYTES));
                pool_command(&["create", &medium])?;
            }
        }
        let backend = Backend::pool(&[&pool], &live.join("vssd"), &live.join("backend.log"))?;
        let news = News::open(&live.join("news"))?;
        Ok(Self { vm_host, backend, pool, news })
    }

    /// Starts both daemons. When this returns, what was saved runs.
    pub(super) fn switch_on(&mut self) -> Result<()> {
        self.backend.start()?;
        self.vm_host.start()
    }

    /// Makes the vSSD; once for a pool.
    pub(super) fn create_disk(&self) -> Result<()> {
        let ctl = Ctl::new(&control_socket(&self.vm_host.live().join("vssd")))?;
        ctl.ok(&["create", DISK, "--size", &DISK_BYTES.to_string()]).map(drop)
    }

    /// The two VMs that are compared differ in one line.
    pub(super) fn define(&self, image: &GuestImage, memory: Memory) -> Result<()> {
        let nvram = if memory == Memory::Nvram { "nvram = 'nv0'\n" } else { "" };
        let processors = match probed_accel() {
            Accel::Kvm => "accel = 'kvm'\n",
            Accel::Tcg => "accel = 'tcg'\ncpu = 'max,cx16=off'\n",
        };
        self.vm_host.define(&format!(
            "name = '{VM}'\nmemory = '{MEMORY}'\ncpus = {PROCESSORS}\n{nvram}{processors}\
             kernel = '{}'\ninitrd = '{}'\ncmdline = '{CMDLINE}'\n\
             extra = [{}, \
             '-chardev', 'file,id=news0,path={},append=on', '-device', 'virtserialport,bus=vser.0,chardev=news0,name=news']\n\
             [[vssd]]\nname = '{DISK}'\nsocket = '{}'\n",
            image.kernel().image().display(),
            image.initramfs().display(),
            agent_port(self.vm_host.agent(VM).display()),
            self.news.path().display(),
            device_socket(&self.vm_host.live().join("vssd"), DISK).display(),
        ))
    }

    /// Starts the VM; how long it took until its processors ran.
    pub(super) fn start_vm(&self) -> Result<Duration> {
        let begun = Instant::now();
        self.vm_host.ok(&["start", VM])?;
        Ok(begun.elapsed())
    }

    /// Waits until the guest can be spoken to.
    pub(super) fn wait_guest(&self) -> Result<()> {
        self.vm_host.run(VM, "true").map(drop)
    }

    /// Has the guest's script work in the background.
    pub(super) fn script(&self, words: &str) -> Result<()> {
        self.vm_host.run(VM, &format!("{SCRIPT} {words} </dev/null >/tmp/database.log 2>&1 &")).map(drop)
    }

    /// `show` of the VM.
    pub(super) fn show(&self) -> Result<Value> {
        self.vm_host.show(VM)
    }

    /// The power fails; when this returns all is saved.
    pub(super) fn fail_power(&self) -> Result<()> {
        self.vm_host.ok(&["power", "test", "critical"])?;
        self.vm_host.wait_state(VM, "saved")
    }

    /// `kill -9` of the VM and of both daemons.
    pub(super) fn cut_power(&mut self) -> Result<()> {
        let machines = self.vm_host.power_cut()?;
        ensure!(machines <= 1, "{machines} machines of one VM");
        self.backend.kill()?;
        // What the machine had written is in the file.
        self.news.look()
    }

    /// Ends everything in order and keeps the pool at `to`.
    pub(super) fn keep_pool(mut self, to: &Path) -> Result<()> {
        self.vm_host.power_cut()?;
        let status = self.backend.terminate()?;
        ensure!(status.success(), "vssd-backend ended with {status}: {}", self.backend.log());
        let partial = to.with_extension("partial");
        copy(&self.pool, &partial)?;
        std::fs::rename(&partial, to).with_context(|| format!("make {}", to.display()))
    }

    /// Watches programs that have no part in it, as long as these processes live.
    pub(super) fn bystanders(&mut self) -> Result<Bystanders> {
        let mut ours = vec![self.backend.pid()?];
        for machine in self.vm_host.machines()? {
            ours.push(u32::try_from(machine)?);
        }
        Bystanders::watch(ours)
    }

    /// An error if a daemon has complained.
    pub(super) fn finish(mut self) -> Result<()> {
        self.vm_host.power_cut()?;
        self.backend.expect_clean_log()
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    process::run(Command::new("cp").arg("--sparse=always").arg(from).arg(to)).map(drop)
}
