// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A whole host, emulated: processors that run guests in hardware, as far as it knows (`/dev/kvm` works), and NV-RAM that
//! outlives the machine. A test may cut its power.
//!
//! ```no_run
//! use vssd_tests::emulated_host::{EmulatedHost, InnerGuest, NVRAM};
//! # fn main() -> anyhow::Result<()> {
//! let image = EmulatedHost::image()?.artifact("vssd-backend", "vssd-backend")?.build()?;
//! let mut host = EmulatedHost::new(&image, 512)?;
//! host.boot()?;                                             // NV-RAM is mounted at /nvram, ext4 with DAX
//! host.ok(&format!("echo kept > {NVRAM}/file; sync"))?;
//! let inner = InnerGuest::new("vm");
//! host.ok(&inner.start())?;                                 // a QEMU with KVM, in the emulated host
//! host.ok(&inner.run("uname -r"))?;                         // waits until that guest is up
//! host.power_cut()?;                                        // kill -9 of the machine
//! host.boot()?;                                             // the same NV-RAM
//! # Ok(())
//! # }
//! ```
//!
//! Everything is translated, and what runs in an inner guest is translated with nested page tables. On an otherwise idle machine
//! the host boots in about 4 s; an inner guest's first line comes after 8 s (11 s on a q35 board), 1.8 s of it QEMU's own start. First touches of a
//! sparse file on DAX take long: with memory in one, a guest takes half as long again as with the same file written once.
//!
//! What this does not show: stores that were still in a processor's cache when the power went. The emulated NV-RAM keeps each
//! store as soon as it is made, as with caches that are flushed when power fails (eADR). What the *kernel* holds back is lost as
//! it would be: the page cache, and a file system's metadata that no sync has committed — for a file on DAX that includes
//! which of its blocks have ever been written.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::agent::Output;
use crate::guest::Guest;
use crate::image::{GuestImage, ImageBuilder};
use crate::kernel::Kernel;
use crate::qemu::{Accel, CMDLINE, Qemu, QemuBinary};
use crate::scratch::Scratch;
use crate::wire::PORT_NAME;

/// Where the host's NV-RAM is mounted.
pub const NVRAM: &str = "/nvram";

/// An AMD processor with what KVM needs. Nested paging spares the inner guest's page faults, which dominate otherwise.
const CPU: &str = "EPYC,+svm,+npt";

/// Room for the image, an inner QEMU, and daemons; inner guests' memory is expected in NV-RAM.
const MEMORY_MIB: u32 = 1536;

/// An inner guest's memory.
const INNER_MIB: u32 = 192;

/// The name of the one inner guest image.
const GUEST: &str = "small";

/// How long an inner guest may take to boot and to end a command.
const PATIENCE: Duration = Duration::from_secs(100);

/// Loads what the host needs and mounts the NV-RAM. At the first boot it is prepared: a namespace in `fsdax` mode, which `ndctl`
/// would make (a raw one has no DAX), and a file system whose extents begin where a huge page may.
const MOUNT: &str = r#"
set -e
modprobe -a kvm_amd nfit nd_pmem ext4
for try in $(seq 100); do test -b /dev/pmem0 && break; sleep 0.1; done
test -b /dev/pmem0 || { echo "no NV-RAM was found"; exit 1; }
if test "$(cat /sys/block/pmem0/queue/dax)" = 0; then
    cd /sys/bus/nd/devices
    seed=$(cat region0/pfn_seed)
    echo namespace0.0 > ../drivers/nd_pmem/unbind
    cat /proc/sys/kernel/random/uuid > $seed/uuid
    echo ram > $seed/mode
    echo 2097152 > $seed/align
    echo namespace0.0 > $seed/namespace
    echo $seed > ../drivers/nd_pmem/bind
    mkfs.ext4 -q -b 4096 -E lazy_itable_init=0,nodiscard,stride=512,stripe_width=512 /dev/pmem0
fi
mkdir -p /nvram
mount -t ext4 -o dax=always /dev/pmem0 /nvram
"#;

/// A host as a machine under emulation, switched off at first.
#[derive(Debug)]
pub struct EmulatedHost {
    machine: Qemu,
    running: Option<Guest>,
    /// Holds the NV-RAM's contents.
    _scratch: Scratch,
}

impl EmulatedHost {
    /// The usual contents of a host's image, to be completed: Debian's QEMU, KVM, drivers for NV-RAM, the image of an inner
    /// guest and the tool to speak to it.
    pub fn image() -> Result<ImageBuilder> {
        Self::image_with(
            &Kernel::debian()?,
            &QemuBinary::debian()?,
            &ImageBuilder::small(&Kernel::debian()?).build()?,
        )
    }

    /// As [`EmulatedHost::image`], with that kernel, that QEMU and that inner guest.
    pub fn image_with(kernel: &Kernel, qemu: &QemuBinary, guest: &GuestImage) -> Result<ImageBuilder> {
        let mut image = ImageBuilder::new(kernel).qemu(qemu)?.guest(GUEST, guest);
        for module in ["kvm_amd", "nfit", "nd_pmem"] {
            image = image.kernel_module(module);
        }
        image.artifact("vssd-tests", "guest_run")
    }

    /// A host that boots `image`, with new NV-RAM, on Debian's QEMU.
    pub fn new(image: &GuestImage, nvram_mib: u32) -> Result<Self> {
        let scratch = Scratch::new()?;
        let machine = Qemu::new(QemuBinary::debian()?, image)
            .accel(Accel::Tcg)
            .cpu(CPU)
            // With two, QEMU 7.2 once made the host's kernel fault without end while both ran a guest.
            .vcpus(1)
            // QEMU's VMRUN and #VMEXIT change the word of pending interrupts without the lock under which a device sets a bit in it, and the
            // bit is lost now and then. A host that waits for a one-shot timer then sleeps on; a periodic one comes again.
            .cmdline("nohz=off highres=off")
            .memory_mib(MEMORY_MIB)
            .nvdimm(&scratch.join("nvram"), nvram_mib);
        Ok(Self { machine, running: None, _scratch: scratch })
    }

    /// Switches the host on and waits until its NV-RAM is mounted.
    pub fn boot(&mut self) -> Result<&mut Guest> {
        self.running = None;
        let mut guest = self.machine.boot()?;
        guest.sh(MOUNT)?.check().context("the host cannot use its NV-RAM")?;
        Ok(self.running.insert(guest))
    }

    /// The running host as the guest that it is to this one.
    pub fn running(&mut self) -> Result<&mut Guest> {
        self.running.as_mut().context("the host is switched off")
    }

    /// Runs a shell command on the host and waits for its end; the exit code is the caller's to judge.
    pub fn sh(&mut self, command: &str) -> Result<Output> {
        self.running()?.sh(command)
    }

    /// Runs a shell command on the host that must succeed and gives its trimmed output.
    pub fn ok(&mut self, command: &str) -> Result<String> {
        self.running()?.ok(command)
    }

    /// Cuts the power: `kill -9` of the machine in the middle of whatever it does.
    pub fn power_cut(&mut self) -> Result<()> {
        self.running()?.kill()?;
        self.running = None;
        Ok(())
    }
}

/// A guest of an emulated host: shell commands that start it and that run commands in it.
#[derive(Debug, Clone)]
pub struct InnerGuest {
    name: String,
    args: Vec<String>,
}

impl InnerGuest {
    /// A guest with one processor and 192 MiB of memory, and no disk.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), args: Vec::new() }
    }

    /// Adds a disk that is served on a vhost-user socket of the host.
    #[must_use]
    pub fn disk(self, socket: &str) -> Self {
        self.args([
            "-chardev",
            &format!("socket,id=disk,path={socket}"),
            "-device",
            "vhost-user-blk-pci,chardev=disk,num-queues=1",
        ])
    }

    /// Adds arguments to QEMU's.
    #[must_use]
    fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    fn file(&self, what: &str) -> String {
        format!("/run/{}.{what}", self.name)
    }

    /// Its QEMU, as words of a command line. The console goes to a file, [`InnerGuest::console`]; QMP is served on
    /// [`InnerGuest::qmp`].
    fn words(&self) -> Vec<String> {
        let memory = format!("memory-backend-memfd,id=mem,size={INNER_MIB}M,share=on");
        let (image, agent) = (format!("/guests/{GUEST}"), self.file("agent"));
        // The older board has fewer devices for firmware and kernel to find: 3 s of 11.
        let mut words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
            .map(str::to_owned)
            .to_vec();
        words.extend(
            [
                ("-machine", "pc,memory-backend=mem".to_owned()),
                ("-accel", "kvm".to_owned()),
                ("-cpu", "host".to_owned()),
                ("-m", format!("{INNER_MIB}M")),
                ("-object", memory),
                ("-kernel", format!("{image}/kernel")),
                ("-initrd", format!("{image}/initramfs")),
                ("-append", format!("{CMDLINE} nokaslr")),
                ("-serial", format!("file:{}", self.console())),
                ("-qmp", format!("unix:{},server=on,wait=off", self.qmp())),
                ("-chardev", format!("socket,id=agent,path={agent},server=on,wait=off")),
                ("-device", "virtio-serial-pci,id=vser".to_owned()),
                ("-device", format!("virtserialport,bus=vser.0,chardev=agent,name={PORT_NAME}")),
            ]
            .into_iter()
            .flat_map(|(option, value)| [option.to_owned(), value]),
        );
        words.extend(self.args.iter().cloned());
        words
    }

    /// A command that starts it in the background and waits until QEMU has made the machine.
    pub fn start(&self) -> String {
        let line: Vec<String> = self.words().iter().map(|word| format!("'{word}'")).collect();
        let (line, log) = (line.join(" "), self.file("log"));
        // In the background, with no pipe to the agent that would wait for it.
        format!("{line} -daemonize -pidfile {} 2> {log} || {{ cat {log}; exit 1; }}", self.file("pid"))
    }

    /// A command that runs `command` in it, once it is up, and ends as that does.
    pub fn run(&self, command: &str) -> String {
        let command = command.replace('\'', r"'\''");
        format!("guest_run {} {} '{command}'", self.file("agent"), PATIENCE.as_secs())
    }

    /// A command that kills its QEMU.
    pub fn kill(&self) -> String {
        format!("kill -9 $(cat {})", self.file("pid"))
    }

    /// The file with what it has printed on its serial port.
    fn console(&self) -> String {
        self.file("console")
    }

    /// The socket of its QEMU's control connection.
    fn qmp(&self) -> String {
        self.file("qmp")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_quotes_reaches_the_inner_guest_whole() {
        let said = InnerGuest::new("a").run("echo 'b c'");
        assert!(said.ends_with(r"'echo '\''b c'\'''"), "{said}");
    }
}
