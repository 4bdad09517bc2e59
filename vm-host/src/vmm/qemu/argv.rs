// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What QEMU's command line is for a definition.
//!
//! It is made once, when a VM starts, and kept: a state fits only a machine with the same devices in the same places.

use std::fs::File;
use std::path::{Path, PathBuf};

use vssd_protocol::units::ByteCount;

use crate::definition::{
    Accel, Definition, DiskCache, DiskDefinition, Hypervisor, NetworkDefinition, VssdDefinition,
};
use crate::vmm::program::run;
use crate::vmm::{Launch, Memory, Places, VmmError};

/// An option was renamed; each version refuses the other's.
const HAS_RECONNECT_MS: (u32, u32) = (9, 2);
/// `offset` of memory-backend-file.
const HAS_OFFSET: (u32, u32) = (8, 1);
/// A guest's disk comes back soon after its backend does.
const RECONNECT_MS: u32 = 200;

/// A QEMU program, asked what it is.
#[derive(Clone, Debug)]
pub struct Emulator {
    program: PathBuf,
    version: String,
    number: (u32, u32),
    /// The newest q35, with its version.
    q35: String,
}

impl Emulator {
    /// Runs the program twice.
    pub fn probe(program: &Path) -> Result<Self, VmmError> {
        let said = run(program, &["--version"])?;
        let banner = said.lines().next().unwrap_or_default();
        let version = banner.split_once("version ").and_then(|(_, rest)| rest.split_whitespace().next());
        let number = version.and_then(number_of);
        let (Some(version), Some(number)) = (version, number) else {
            return Err(VmmError::Protocol(format!("{} is not QEMU: it says {banner:?}", program.display())));
        };
        let machines = run(program, &["-machine", "help"])?;
        let q35 = newest_q35(&machines)
            .ok_or_else(|| VmmError::Protocol(format!("{} knows no q35 machine", program.display())))?;
        Ok(Self { program: program.to_owned(), version: version.to_owned(), number, q35 })
    }

    /// What the definition becomes.
    pub fn plan(&self, definition: &Definition, places: &Places) -> Launch {
        let machine = definition.machine.clone().unwrap_or_else(|| self.q35.clone());
        let mut args = Args::default();
        args.pair("-name", format!("guest={0},process=vm-{0}", definition.name));
        args.many(&["-nodefaults", "-no-user-config", "-display", "none"]);
        args.pair("-machine", format!("{machine},memory-backend=ram"));
        let accel = accel(definition.accel);
        args.pair("-accel", accel);
        let cpu = definition.cpu.as_deref().unwrap_or(if accel == "kvm" { "host" } else { "max" });
        args.pair("-cpu", cpu);
        // The defaults, said because a guest relies on them: its hardware clock goes on with the host's while the guest stands still and
        // after it is restored, so that one without an agent can read the time there. With `clock=vm` it would stand still, too.
        args.pair("-rtc", "base=utc,clock=host");
        args.pair("-smp", definition.cpus.to_string());
        args.pair("-m", format!("{}M", definition.memory.0 >> 20));
        self.boot(definition, &mut args);
        for (at, disk) in definition.disk.iter().enumerate() {
            add_disk(&mut args, at, disk);
        }
        for (at, vssd) in definition.vssd.iter().enumerate() {
            self.add_vssd(&mut args, at, vssd, places);
        }
        for (at, network) in definition.network.iter().enumerate() {
            add_network(&mut args, at, network, &definition.name);
        }
        let console = quoted(&places.console);
        args.pair("-chardev", format!("socket,id=console,path={console},server=on,wait=off"));
        args.pair("-serial", "chardev:console");
        if definition.guest_agent {
            let path = quoted(&places.guest_agent);
            args.pair("-chardev", format!("socket,id=agent,path={path},server=on,wait=off"));
            args.many(&["-device", "virtio-serial-pci"]);
            args.pair("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0");
        }
        args.many(&definition.extra);
        Launch {
            hypervisor: Hypervisor::Qemu,
            program: self.program.clone(),
            args: args.0,
            config: None,
            machine,
            version: self.version.clone(),
        }
    }

    fn boot(&self, definition: &Definition, args: &mut Args) {
        if let Some(firmware) = &definition.firmware {
            args.pair("-bios", firmware.to_string_lossy());
        }
        if let Some(kernel) = &definition.kernel {
            args.pair("-kernel", kernel.to_string_lossy());
            if let Some(initrd) = &definition.initrd {
                args.pair("-initrd", initrd.to_string_lossy());
            }
            args.pair("-append", definition.cmdline.as_str());
        }
    }

    fn add_vssd(&self, args: &mut Args, at: usize, vssd: &VssdDefinition, places: &Places) {
        let path = vssd.socket.clone().unwrap_or_else(|| places.vssds.join(format!("{}.sock", vssd.name)));
        let reconnect = if self.number >= HAS_RECONNECT_MS {
            format!("reconnect-ms={RECONNECT_MS}")
        } else {
            "reconnect=1".to_owned()
        };
        args.pair("-chardev", format!("socket,id=vssd{at},path={},{reconnect}", quoted(&path)));
        let queues = vssd.queues.map(|queues| format!(",num-queues={queues}")).unwrap_or_default();
        args.pair("-device", format!("vhost-user-blk-pci,id=disk-vssd{at},chardev=vssd{at}{queues}"));
    }
}

/// The object that is a machine's memory.
pub(super) fn memory(memory: &Memory, version: &str) -> Result<String, String> {
    let (path, offset, bytes, align, pmem) = match memory {
        Memory::Ordinary { bytes } => {
            return Ok(format!("memory-backend-memfd,id=ram,size={bytes},share=on"));
        }
        Memory::Named { path, offset, bytes, align, pmem } => (path, *offset, bytes, align, *pmem),
    };
    let path = quoted(path);
    let mut text = format!("memory-backend-file,id=ram,size={bytes},share=on,mem-path={path}");
    if offset > 0 {
        if number_of(version).is_none_or(|number| number < HAS_OFFSET) {
            let (major, minor) = HAS_OFFSET;
            return Err(format!(
                "QEMU {version} cannot use memory at an offset of {} in {path}; from {major}.{minor} on it can, and any can use a \
                 directory for NV-RAM",
                ByteCount(offset)
            ));
        }
        text.push_str(&format!(",offset={offset}"));
    }
    if let Some(align) = align {
        text.push_str(&format!(",align={align}"));
    }
    if pmem {
        text.push_str(",pmem=on");
    }
    Ok(text)
}

/// Major and minor number of `7.2.22`.
fn number_of(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

#[derive(Debug, Default)]
struct Args(Vec<String>);

impl Args {
    fn pair(&mut self, option: &str, value: impl AsRef<str>) {
        self.0.extend([option.to_owned(), value.as_ref().to_owned()]);
    }

    fn many(&mut self, args: &[impl AsRef<str>]) {
        self.0.extend(args.iter().map(|arg| arg.as_ref().to_owned()));
    }
}

fn add_disk(args: &mut Args, at: usize, disk: &DiskDefinition) {
    let direct = matches!(disk.cache, DiskCache::Directsync | DiskCache::None);
    let no_flush = disk.cache == DiskCache::Unsafe;
    let cache = format!("cache.direct={},cache.no-flush={}", on(direct), on(no_flush));
    let read_only = on(disk.readonly);
    let path = quoted(&disk.path);
    let file = format!("driver=file,node-name=file{at},filename={path},read-only={read_only},{cache}");
    args.pair("-blockdev", file);
    args.pair(
        "-blockdev",
        format!("driver={},node-name=disk{at},file=file{at},read-only={read_only},{cache}", disk.format),
    );
    let write_cache = on(!matches!(disk.cache, DiskCache::Directsync | DiskCache::Writethrough));
    args.pair("-device", format!("virtio-blk-pci,id=disk{at},drive=disk{at},write-cache={write_cache}"));
}

fn add_network(args: &mut Args, at: usize, network: &NetworkDefinition, vm: &str) {
    let mac = network.mac_in(vm, at);
    let backend = match (&network.netdev, &network.tap) {
        (Some(netdev), _) => netdev.clone(),
        (None, tap) => {
            format!("tap,ifname={},script=no,downscript=no", tap.as_deref().unwrap_or_default())
        }
    };
    args.pair("-netdev", format!("{backend},id=net{at}"));
    // Without a boot ROM there is no file to be the same at the next start.
    args.pair("-device", format!("virtio-net-pci,netdev=net{at},mac={mac},romfile="));
}

fn on(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// `auto` as this host can.
fn accel(wanted: Accel) -> &'static str {
    let usable = || File::options().read(true).write(true).open("/dev/kvm").is_ok();
    match wanted {
        Accel::Tcg => "tcg",
        Accel::Kvm => "kvm",
        Accel::Auto => {
            if usable() {
                "kvm"
            } else {
                "tcg"
            }
        }
    }
}

/// A comma ends a value in QEMU's option syntax, and two are one.
fn quoted(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// The line `q35  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)`.
fn newest_q35(machines: &str) -> Option<String> {
    let line = machines.lines().find(|line| line.split_whitespace().next() == Some("q35"))?;
    Some(line.rsplit_once("alias of ")?.1.split(')').next()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tap_is_one_that_is_there_and_stays() {
        let text = "name = 'a'\nmemory = '64MiB'\n[[network]]\ntap = 't0'\n[[network]]\nnetdev = 'user'\n";
        let definition = Definition::parse(text).unwrap();
        let mut args = Args::default();
        for (at, network) in definition.network.iter().enumerate() {
            add_network(&mut args, at, network, &definition.name);
        }
        let netdevs: Vec<&str> =
            args.0.chunks(2).filter(|pair| pair[0] == "-netdev").map(|pair| pair[1].as_str()).collect();
        assert_eq!(netdevs, ["tap,ifname=t0,script=no,downscript=no,id=net0", "user,id=net1"]);
    }
}
