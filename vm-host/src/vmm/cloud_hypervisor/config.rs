// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What cloud-hypervisor is told to make for a definition: its `VmConfig` (`vmm/src/api/openapi/cloud-hypervisor.yaml` in its source,
//! API 0.3.0), and what of a definition it cannot make.
//!
//! It is made once, when a VM starts, and kept, but for the memory: that is one zone in a named file, which a snapshot leaves out where
//! it is shared (`vmm/src/memory_manager.rs`), and whose file may be another one the next time.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};

use crate::definition::{Accel, Definition, DefinitionError, DiskCache, DiskDefinition, Hypervisor};
use crate::vmm::{Memory, Places};

/// Of the zone that is a guest's memory.
const ZONE: &str = "ram";
/// The field was one byte before it was more; a guest must not depend on which.
const MOST_CPUS: u16 = 254;
/// Options that change how the program reports and confines itself, and not what it makes.
const FLAGS: [&str; 3] = ["-v", "-vv", "-vvv"];
const OPTIONS: [&str; 2] = ["--seccomp", "--log-file"];

/// A guest's whole machine, without its memory.
#[derive(Debug, Serialize)]
struct VmConfig<'a> {
    cpus: Cpus,
    payload: Payload<'a>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disks: Vec<Disk<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    net: Vec<Net<'a>>,
    serial: Port<'a>,
    console: Port<'a>,
    /// Tells when the guest's kernel panics.
    pvpanic: bool,
}

#[derive(Debug, Serialize)]
struct Cpus {
    boot_vcpus: u16,
    max_vcpus: u16,
}

#[derive(Debug, Serialize)]
struct Payload<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    firmware: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    initramfs: Option<&'a Path>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cmdline: Option<&'a str>,
}

/// Either an image, or a vhost-user backend.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Disk<'a> {
    Image {
        id: String,
        path: &'a Path,
        readonly: bool,
        /// O_DIRECT.
        direct: bool,
        /// Said, for what is found out from an image's content, a guest can change.
        image_type: &'static str,
    },
    Backend {
        id: String,
        vhost_user: bool,
        vhost_socket: PathBuf,
        num_queues: u16,
    },
}

#[derive(Debug, Serialize)]
struct Net<'a> {
    id: String,
    tap: &'a str,
    mac: String,
}

#[derive(Debug, Serialize)]
struct Port<'a> {
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<&'a Path>,
}

/// What the definition becomes, which [`check`] has let pass.
pub(super) fn plan(definition: &Definition, places: &Places) -> Result<Value, serde_json::Error> {
    let images = definition.disk.iter().enumerate().map(|(at, disk)| Disk::Image {
        id: format!("disk{at}"),
        path: &disk.path,
        readonly: disk.readonly,
        direct: disk.cache == DiskCache::None,
        image_type: image_type(disk).unwrap_or("Raw"),
    });
    let backends = definition.vssd.iter().enumerate().map(|(at, vssd)| Disk::Backend {
        id: format!("vssd{at}"),
        vhost_user: true,
        vhost_socket: vssd.socket.clone().unwrap_or_else(|| places.vssds.join(format!("{}.sock", vssd.name))),
        // It asks for as many as it is told, and for one otherwise.
        num_queues: vssd.queues.unwrap_or(definition.cpus),
    });
    let cards = definition.network.iter().enumerate().map(|(at, network)| Net {
        id: format!("net{at}"),
        tap: network.tap.as_deref().unwrap_or_default(),
        mac: network.mac_in(&definition.name, at),
    });
    let has_kernel = definition.kernel.is_some();
    serde_json::to_value(VmConfig {
        cpus: Cpus { boot_vcpus: definition.cpus, max_vcpus: definition.cpus },
        payload: Payload {
            firmware: definition.firmware.as_deref(),
            kernel: definition.kernel.as_deref(),
            initramfs: definition.initrd.as_deref(),
            cmdline: has_kernel.then_some(definition.cmdline.as_str()),
        },
        disks: images.chain(backends).collect(),
        net: cards.collect(),
        serial: Port { mode: "Socket", socket: Some(&places.console) },
        console: Port { mode: "Off", socket: None },
        pvpanic: true,
    })
}

/// The whole of it. What is wrong with the memory is the error.
pub(super) fn with_memory(config: &Value, memory: &Memory) -> Result<Value, String> {
    let memory = match memory {
        // Shared, for a backend of a disk maps it, too.
        Memory::Ordinary { bytes } => json!({ "size": bytes, "shared": true }),
        Memory::Named { bytes, .. } => {
            let file = whole_file(memory)?;
            // Zones take the place of a size.
            json!({ "size": 0, "zones": [{ "id": ZONE, "size": bytes, "file": file, "shared": true }] })
        }
    };
    let mut whole = config.clone();
    whole["memory"] = memory;
    Ok(whole)
}

/// The images that a machine of this configuration writes to.
pub(super) fn written_images(config: &Value) -> Vec<PathBuf> {
    let disks = config["disks"].as_array().into_iter().flatten();
    disks
        .filter(|disk| disk["readonly"] != true)
        .filter_map(|disk| disk["path"].as_str())
        .map(PathBuf::from)
        .collect()
}

/// The same saved configuration, with the memory where it is now.
pub(super) fn moved(saved: &[u8], memory: &Memory) -> Result<Vec<u8>, String> {
    let mut config = parse(saved)?;
    let (bytes, zone) = (size(memory), zone_mut(&mut config)?);
    if zone["size"].as_u64() != Some(bytes) {
        return Err(format!("it is of {} bytes of memory, and there are {bytes}", zone["size"]));
    }
    zone["file"] = json!(whole_file(memory)?);
    serde_json::to_vec(&config).map_err(|error| error.to_string())
}

/// Whether a snapshot of this configuration has left the memory out.
pub(super) fn leaves_memory_out(saved: &[u8]) -> Result<(), String> {
    let mut config = parse(saved)?;
    let zone = zone_mut(&mut config)?;
    if zone["shared"] == true && zone["file"].is_string() {
        Ok(())
    } else {
        Err("its memory is not in a shared, named file".to_owned())
    }
}

fn parse(saved: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(saved).map_err(|error| format!("config.json is no configuration: {error}"))
}

fn zone_mut(config: &mut Value) -> Result<&mut Value, String> {
    match config.pointer_mut("/memory/zones").and_then(Value::as_array_mut).map(Vec::as_mut_slice) {
        Some([zone]) if zone.is_object() => Ok(zone),
        _ => Err("config.json does not have one zone of memory".to_owned()),
    }
}

fn size(memory: &Memory) -> u64 {
    let (Memory::Ordinary { bytes } | Memory::Named { bytes, .. }) = memory;
    *bytes
}

/// A zone's file has no offset. That mappings are synchronous is not needed where a region's extents are written already.
fn whole_file(memory: &Memory) -> Result<&Path, String> {
    match memory {
        Memory::Named { path, offset: 0, .. } => Ok(path),
        Memory::Named { path, offset, .. } => Err(format!(
            "cloud-hypervisor cannot use memory that begins {offset} bytes into {}; any can use a directory for NV-RAM",
            path.display()
        )),
        Memory::Ordinary { .. } => Err("only memory in a named file stays when its machine ends".to_owned()),
    }
}

/// As cloud-hypervisor names an image's format; the definition has QEMU's words.
fn image_type(disk: &DiskDefinition) -> Option<&'static str> {
    match disk.format.as_str() {
        "raw" => Some("Raw"),
        "qcow2" => Some("Qcow2"),
        "vhdx" => Some("Vhdx"),
        "vpc" => Some("FixedVhd"),
        _ => None,
    }
}

/// What of a definition cloud-hypervisor cannot make.
pub(super) fn check(definition: &Definition) -> Result<(), DefinitionError> {
    let cannot = |key: &str, problem: &str, hint: &str| {
        Err(DefinitionError::Unsupported {
            hypervisor: Hypervisor::CloudHypervisor,
            key: key.to_owned(),
            problem: problem.to_owned(),
            hint: hint.to_owned(),
        })
    };
    match (&definition.firmware, &definition.kernel) {
        (Some(_), Some(_)) => {
            return cannot("firmware", "boots firmware or a kernel, not both", "leave one out");
        }
        (None, None) => {
            return cannot(
                "kernel",
                "has no firmware of its own",
                "name a kernel, or as firmware its build of EDK II (CLOUDHV.fd) or rust-hypervisor-firmware",
            );
        }
        _ => {}
    }
    if definition.accel == Accel::Tcg {
        return cannot("accel", "runs guests in hardware only", "accel = \"kvm\", or use QEMU");
    }
    if definition.cpus > MOST_CPUS {
        return cannot("cpus", "has at most 254 processors", "name fewer, or use QEMU");
    }
    if definition.machine.is_some() {
        return cannot("machine", "has one kind of machine", "leave it out");
    }
    if definition.cpu.is_some() {
        return cannot("cpu", "gives guests the host's processor", "leave it out, or use QEMU");
    }
    if definition.guest_agent {
        return cannot(
            "guest_agent",
            "has no port for it, and no need where the guest's clock source is kvm-clock: it sets that clock itself",
            "leave it out; a guest with another clock source asks a time server",
        );
    }
    for (at, disk) in definition.disk.iter().enumerate() {
        if image_type(disk).is_none() {
            return cannot(
                &format!("disk.{at}.format"),
                &format!("does not know {:?}", disk.format),
                "raw, qcow2, vhdx and vpc (of fixed size) it knows; `qemu-img convert` makes one of another",
            );
        }
        // Its disks say that they have a write cache, and sync when the guest flushes it.
        if !matches!(disk.cache, DiskCache::None | DiskCache::Writeback) {
            return cannot(
                &format!("disk.{at}.cache"),
                "has disks with a write cache only",
                "cache = \"none\" bypasses the host's page cache; what must be durable when it is written belongs on a vSSD",
            );
        }
    }
    if let Some(at) = definition.network.iter().position(|network| network.netdev.is_some()) {
        return cannot(
            &format!("network.{at}.netdev"),
            "does not know QEMU's descriptions of networks",
            "tap = \"NAME\" plugs the card into a tap device",
        );
    }
    let mut extra = definition.extra.iter().map(String::as_str);
    while let Some(arg) = extra.next() {
        let name = arg.split_once('=').map_or(arg, |(name, _)| name);
        if FLAGS.contains(&arg) || (OPTIONS.contains(&name) && (name != arg || extra.next().is_some())) {
            continue;
        }
        return cannot(
            "extra",
            &format!("learns over its API what to make, and {arg} is no option beside that"),
            "-v, --seccomp and --log-file can be given",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "name = 'a'\nmemory = '64MiB'\nhypervisor = 'cloud-hypervisor'\nnvram = 'nv0'\n";

    fn places() -> Places {
        let at = |name: &str| PathBuf::from("/run/vm-host/vms/a").join(name);
        Places {
            control: at("control.sock"),
            work: at("work"),
            log: at("log"),
            console: at("console.sock"),
            guest_agent: at("agent.sock"),
            vssds: "/run/vssd/dev".into(),
        }
    }

    fn named(path: &str, offset: u64) -> Memory {
        Memory::Named { path: path.into(), offset, bytes: 64 << 20, align: Some(2 << 20), pmem: true }
    }

    #[test]
    fn configuration_says_all_that_the_definition_does() {
        let text = format!(
            "{SMALL}cpus = 2\nkernel = '/k'\ninitrd = '/i'\ncmdline = 'console=ttyS0'\nextra = ['-v', '--seccomp', 'log']\n\
             [[disk]]\npath = '/d'\nformat = 'qcow2'\ncache = 'none'\nreadonly = true\n\
             [[vssd]]\nname = 'data'\n[[vssd]]\nname = 'more'\nsocket = '/s'\nqueues = 1\n\
             [[network]]\ntap = 'tap0'\nmac = '52:54:00:00:00:01'\n"
        );
        let definition = Definition::parse(&text).unwrap();
        check(&definition).unwrap();
        let config = with_memory(&plan(&definition, &places()).unwrap(), &named("/nv/1", 0)).unwrap();
        assert_eq!(
            config,
            json!({
                "cpus": { "boot_vcpus": 2, "max_vcpus": 2 },
                "payload": { "kernel": "/k", "initramfs": "/i", "cmdline": "console=ttyS0" },
                "disks": [
                    { "id": "disk0", "path": "/d", "readonly": true, "direct": true, "image_type": "Qcow2" },
                    { "id": "vssd0", "vhost_user": true, "vhost_socket": "/run/vssd/dev/data.sock", "num_queues": 2 },
                    { "id": "vssd1", "vhost_user": true, "vhost_socket": "/s", "num_queues": 1 },
                ],
                "net": [{ "id": "net0", "tap": "tap0", "mac": "52:54:00:00:00:01" }],
                "serial": { "mode": "Socket", "socket": "/run/vm-host/vms/a/console.sock" },
                "console": { "mode": "Off" },
                "pvpanic": true,
                "memory": {
                    "size": 0,
                    "zones": [{ "id": "ram", "size": 64 << 20, "file": "/nv/1", "shared": true }],
                },
            })
        );
    }

    #[test]
    fn memory_that_has_moved_is_the_only_thing_that_changes() {
        let definition = Definition::parse(&format!("{SMALL}firmware = '/f'\n")).unwrap();
        let plan = plan(&definition, &places()).unwrap();
        let saved = with_memory(&plan, &named("/nv/1", 0)).unwrap();
        let text = serde_json::to_vec(&saved).unwrap();
        leaves_memory_out(&text).unwrap();
        let moved_to = |memory: &Memory| moved(&text, memory);
        let now: Value = serde_json::from_slice(&moved_to(&named("/nv/2", 0)).unwrap()).unwrap();
        assert_eq!(now, with_memory(&plan, &named("/nv/2", 0)).unwrap());
        assert!(moved_to(&named("/nv/2", 4096)).unwrap_err().contains("4096"));
        assert!(moved_to(&Memory::Ordinary { bytes: 64 << 20 }).is_err());
        let larger = Memory::Named { path: "/x".into(), offset: 0, bytes: 1 << 30, align: None, pmem: false };
        assert!(moved_to(&larger).unwrap_err().contains("67108864"));
    }

    #[test]
    fn a_snapshot_with_memory_of_its_own_or_none_is_refused() {
        let ordinary = json!({ "memory": { "size": 1, "shared": true } });
        let private = json!({ "memory": { "zones": [{ "file": "/a", "shared": false }] } });
        let two = json!({ "memory": { "zones": [{}, {}] } });
        for config in [ordinary, private, two, json!([])] {
            let text = serde_json::to_vec(&config).unwrap();
            assert!(leaves_memory_out(&text).is_err(), "{config}");
        }
        assert!(leaves_memory_out(b"{").is_err());
        let place = named("/nv/1", 0);
        for text in [&b"{"[..], b"{}", b"{\"memory\":{\"zones\":[7]}}", b"7"] {
            assert!(moved(text, &place).is_err());
        }
    }

    #[test]
    fn what_it_cannot_make_is_refused_by_name() {
        let kernel = "kernel = '/k'\n";
        for (more, key) in [
            ("", "kernel"),
            ("kernel = '/k'\nfirmware = '/f'\n", "firmware"),
            (&format!("{kernel}accel = 'tcg'"), "accel"),
            (&format!("{kernel}cpus = 255"), "cpus"),
            (&format!("{kernel}machine = 'q35'"), "machine"),
            (&format!("{kernel}cpu = 'max'"), "cpu"),
            (&format!("{kernel}guest_agent = true"), "guest_agent"),
            (&format!("{kernel}extra = ['--disk', 'path=/x']"), "extra"),
            (&format!("{kernel}extra = ['--seccomp']"), "extra"),
            (&format!("{kernel}extra = ['-v', '--api-socket=/x']"), "extra"),
            (&format!("{kernel}[[disk]]\npath = '/d'"), "disk.0.cache"),
            (&format!("{kernel}[[disk]]\npath = '/d'\ncache = 'unsafe'"), "disk.0.cache"),
            (&format!("{kernel}[[disk]]\npath = '/d'\ncache = 'none'\nformat = 'vdi'"), "disk.0.format"),
            (&format!("{kernel}[[network]]\nnetdev = 'user'"), "network.0.netdev"),
        ] {
            let definition = Definition::parse(&format!("{SMALL}{more}")).unwrap();
            match check(&definition).unwrap_err() {
                DefinitionError::Unsupported { key: named, hint, .. } => {
                    assert_eq!(named, key, "{more}");
                    assert!(!hint.is_empty());
                }
                other => panic!("{more}: {other}"),
            }
        }
        for more in ["accel = 'kvm'", "extra = ['-v', '--seccomp=log', '--log-file', '/l']"] {
            check(&Definition::parse(&format!("{SMALL}{kernel}{more}")).unwrap()).unwrap();
        }
    }
}
