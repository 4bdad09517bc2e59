// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An emulated host with `vssd-backend` and `vm-host`, and guests under its KVM whose memory lies in its NV-RAM. Its power can be cut.
//!
//! ```no_run
//! use vssd_tests::persistent::PersistentHost;
//! # fn main() -> anyhow::Result<()> {
//! let mut host = PersistentHost::new(1)?;
//! host.boot()?;
//! host.start_guests()?;
//! let before = host.begin_work()?;
//! host.fail_power()?;                 // the power-good line falls; all is saved
//! host.cut_power()?;                  // kill -9 of the whole host
//! host.boot()?;                       // guests run on
//! host.check_work(&before, |what, holds, detail| println!("{what}: {holds} {detail}"))?;
//! # Ok(())
//! # }
//! ```

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::emulated_host::{EmulatedHost, NVRAM};
use crate::image::ImageBuilder;
use crate::kernel::Kernel;
use crate::qemu::{CMDLINE, QemuBinary};
use crate::scenario::find;
use crate::vm_host::{COUNT, agent_port};

/// Of each guest.
const MEMORY_MIB: u32 = 256;
/// Of each vSSD.
const DISK: &str = "32M";
/// What a guest keeps in memory.
const KEPT: u64 = 64 << 20;
/// From a falling line to the end of the last save, emulated twice on a busy machine.
const SAVE: Duration = Duration::from_secs(60);

/// What is written to a vSSD, read past the guest's page cache.
const READ_DISK: &str = "dd if=/dev/vda bs=64k count=128 iflag=direct 2>/dev/null | sha256sum";

/// The host, switched off at first.
#[derive(Debug)]
pub struct PersistentHost {
    host: EmulatedHost,
    guests: Vec<String>,
    is_new: bool,
}

/// How the guests were when the power went.
#[derive(Debug)]
pub struct Work {
    /// Sums of what each keeps in memory and on its vSSD.
    sums: Vec<(String, String)>,
    counts: Vec<u64>,
    /// The last that the first guest has heard from the second.
    heard: Option<u64>,
}

impl PersistentHost {
    /// With `guests` guests of 256 MiB, each with a vSSD. Two can hear each other.
    pub fn new(guests: usize) -> Result<Self> {
        let kernel = Kernel::debian()?;
        let guest =
            ImageBuilder::small(&kernel).kernel_module("virtio_net").kernel_module("virtio_blk").build()?;
        let image = EmulatedHost::image_with(&kernel, &QemuBinary::debian()?, &guest)?
            .artifact("vssd-backend", "vssd-backend")?
            .artifact("balloon-ctl", "balloon-ctl")?
            .artifact("vm-host", "vm-host")?
            .build()?;
        let nvram = u32::try_from(guests)? * (MEMORY_MIB + 80) + 96;
        let host = EmulatedHost::new(&image, nvram)?;
        Ok(Self { host, guests: (0..guests).map(|at| format!("guest{at}")).collect(), is_new: true })
    }

    pub fn guests(&self) -> &[String] {
        &self.guests
    }

    /// The host underneath.
    pub fn host(&mut self) -> &mut EmulatedHost {
        &mut self.host
    }

    /// Switches the host on and waits until both daemons serve: guests that were saved run again then.
    pub fn boot(&mut self) -> Result<()> {
        self.host.boot()?;
        if self.is_new {
            let pool = self.guests.len() * 48;
            self.host.ok(&format!(
                "mkdir -p {NVRAM}/memory && vssd-backend pool create --nvram {NVRAM}/pool:{pool}M"
            ))?;
            self.is_new = false;
        }
        let config = format!(
            "state_dir = '{NVRAM}/vm-host'\nlog_dir = '{NVRAM}/log'\n\
             [[nvram]]\nname = 'nv0'\npath = '{NVRAM}/memory'\n\
             [[power.source]]\nkind = 'edge'\nname = 'power-good'\npath = '/run/power-good'\nlow = 'critical'\n"
        );
        self.host.running()?.write_file("/run/vm-host.toml", config.as_bytes())?;
        let served = |socket: &str| {
            format!("for i in $(seq 600); do test -S {socket} && break; sleep 0.1; done; test -S {socket}")
        };
        self.host.ok(&format!(
            "mkfifo /run/power-good; \
             vssd-backend --pool {NVRAM}/pool --runtime-dir /run/vssd </dev/null >/run/backend.log 2>&1 & \
             {} || {{ cat /run/backend.log; exit 1; }}; \
             vm-host serve --config /run/vm-host.toml </dev/null >/run/vm-host.log 2>&1 & \
             {} || {{ cat /run/vm-host.log; exit 1; }}",
            served("/run/vssd/control.sock"),
            served("/run/vm-host/control.sock"),
        ))?;
        Ok(())
    }

    /// Defines all guests and boots them.
    pub fn start_guests(&mut self) -> Result<()> {
        for (at, name) in self.guests.clone().iter().enumerate() {
            let other = self.guests.get(at ^ 1).unwrap_or(name).clone();
            self.host
                .ok(&format!("balloon-ctl --socket /run/vssd/control.sock create {name} --size {DISK}"))?;
            let definition = format!(
                "name = '{name}'\nmemory = '{MEMORY_MIB}MiB'\nnvram = 'nv0'\naccel = 'kvm'\nmachine = 'pc-i440fx-7.2'\n\
                 kernel = '/guests/small/kernel'\ninitrd = '/guests/small/initramfs'\ncmdline = '{CMDLINE} nokaslr'\n\
                 extra = [{}]\n\
                 [[vssd]]\nname = '{name}'\nsocket = '/run/vssd/dev/{name}.sock'\nqueues = 1\n\
                 [[network]]\nnetdev = 'dgram,local.type=unix,local.path=/run/{name}.net,remote.type=unix,remote.path=/run/{other}.net'\n",
                agent_port(format_args!("/run/{name}.agent")),
            );
            self.host.running()?.write_file(&format!("/run/{name}.toml"), definition.as_bytes())?;
            self.order(&format!("define /run/{name}.toml"))?;
            self.order(&format!("start {name}"))?;
        }
        Ok(())
    }

    /// Takes every guest's plug out and boots it again, with nothing of before but its vSSD.
    pub fn restart_guests(&mut self) -> Result<()> {
        for name in self.guests.clone() {
            self.order(&format!("stop {name} --kill --yes"))?;
            self.order(&format!("start {name}"))?;
        }
        Ok(())
    }

    /// An order to `vm-host`, and its answer.
    pub fn order(&mut self, words: &str) -> Result<Value> {
        let said = self.host.ok(&format!("vm-host --timeout 100s --json {words}"))?;
        serde_json::from_str(&said).with_context(|| format!("{words}: {said:?}"))
    }

    /// Runs a shell command in a guest, once it is up.
    pub fn run(&mut self, guest: &str, command: &str) -> Result<String> {
        let command = command.replace('\'', r"'\''");
        self.host.ok(&format!("guest_run /run/{guest}.agent 100 '{command}'"))
    }

    /// Gives each guest something to lose: a process that counts, one that reads a file that has no name any more, 64 MiB in memory, blocks
    /// of its vSSD that were acknowledged and never flushed; and two guests a connection.
    pub fn begin_work(&mut self) -> Result<Work> {
        let mut sums = Vec::new();
        for (at, name) in self.guests.clone().iter().enumerate() {
            self.run(
                name,
                &format!(
                    "modprobe virtio_net; ip link set eth0 up; ip addr add 10.0.0.{}/24 dev eth0",
                    at + 1
                ),
            )?;
            self.run(name, COUNT)?;
            self.run(
                name,
                "echo secret > /tmp/open; \
                 (exec 3< /tmp/open; rm /tmp/open; while ! test -e /tmp/go; do sleep 0.1; done; cat <&3 > /tmp/read) \
                 </dev/null >/dev/null 2>&1 &",
            )?;
            let memory = self.run(
                name,
                &format!("head -c {KEPT} /dev/urandom > /tmp/kept && test $(stat -c %s /tmp/kept) = {KEPT} && sha256sum < /tmp/kept"),
            )?;
            self.run(name, "dd if=/dev/urandom of=/dev/vda bs=64k count=128 oflag=direct 2>/dev/null")?;
            sums.push((memory, self.run(name, READ_DISK)?));
        }
        let mut heard = None;
        if let [first, second, ..] = self.guests.clone().as_slice() {
            self.run(first, "(tail -f /dev/null | nc -l -p 7000 > /tmp/heard) >/dev/null 2>&1 &")?;
            self.run(
                second,
                "(i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done | nc 10.0.0.1 7000) </dev/null >/dev/null 2>&1 &",
            )?;
            heard = Some(self.heard_more(first, 4)?);
        }
        let counts = self.counts()?;
        Ok(Work { sums, counts, heard })
    }

    /// What of it is there, and whether it goes on: each with a few words.
    pub fn check_work(&mut self, work: &Work, mut report: impl FnMut(&str, bool, String)) -> Result<()> {
        let counts = self.counts()?;
        for (at, name) in self.guests.clone().iter().enumerate() {
            let (memory, disk) = &work.sums[at];
            let now = self.run(name, "sha256sum < /tmp/kept")?;
            report(&format!("{name}: 64 MiB of memory"), now == *memory, String::new());
            let now = self.run(name, READ_DISK)?;
            report(&format!("{name}: vSSD, acknowledged and never flushed"), now == *disk, String::new());
            let read = self
                .run(name, "touch /tmp/go; while ! test -s /tmp/read; do sleep 0.1; done; cat /tmp/read")?;
            report(&format!("{name}: open file without a name"), read == "secret", read);
            let (before, now) = (work.counts[at], counts[at]);
            report(&format!("{name}: counts on"), now >= before, format!("{before}, then {now}"));
        }
        if let (Some(before), Some(first)) = (work.heard, self.guests.first().cloned()) {
            let now = self.heard_more(&first, before + 4)?;
            report(
                "the connection between two guests",
                now > before,
                format!("line {before}, then line {now}"),
            );
        }
        Ok(())
    }

    /// How far each guest has counted.
    pub fn counts(&mut self) -> Result<Vec<u64>> {
        self.guests.clone().iter().map(|name| Ok(self.run(name, "cat /tmp/count")?.parse()?)).collect()
    }

    /// The power-good line falls; waits until every guest is saved. Gives the status of the power then.
    pub fn fail_power(&mut self) -> Result<Value> {
        self.host.ok("echo 0 > /run/power-good")?;
        let begun = Instant::now();
        loop {
            let status = self.order("power status")?;
            if find(&status, "state").is_some_and(|state| state == "saved") {
                return Ok(status);
            }
            ensure!(begun.elapsed() < SAVE, "{status}\n{}", self.host.ok("cat /run/vm-host.log")?);
        }
    }

    /// `kill -9` of the whole host.
    pub fn cut_power(&mut self) -> Result<()> {
        self.host.power_cut()
    }

    /// The last number that a guest has heard from the other, once it is larger than `than`.
    fn heard_more(&mut self, guest: &str, than: u64) -> Result<u64> {
        let said = self.run(
            guest,
            &format!(
                "for i in $(seq 300); do n=$(tail -n 1 /tmp/heard); test \"${{n:-0}}\" -gt {than} && break; sleep 0.2; done; echo $n"
            ),
        )?;
        said.parse().with_context(|| format!("not a number: {said:?}"))
    }
}
