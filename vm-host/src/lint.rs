// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What in a definition would not survive a power cut, and what to do about it. Pure.
//!
//! A persistent guest never learns that the power was gone. Whatever it was told is durable must be, and its machine must be the same one
//! afterwards.

use serde::{Deserialize, Serialize};

use crate::definition::{Definition, DiskCache, Hypervisor};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Something would be lost: such a VM is not started unless its definition says that it is meant to be so.
    Error,
    /// Worth knowing.
    Warning,
}

/// One thing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// A stable name, for `allow` in the definition.
    pub name: String,
    pub level: Level,
    pub message: String,
    pub hint: String,
    /// The definition allows it.
    pub allowed: bool,
}

/// Options that the host sets itself, and that would work against it.
const OURS: [&str; 8] =
    ["-incoming", "-daemonize", "-S", "-no-shutdown", "-qmp", "-loadvm", "-preconfig", "-name"];

/// All findings, errors first. An ordinary VM has none: it does not survive anyway.
pub fn lint(definition: &Definition) -> Vec<Finding> {
    if !definition.is_persistent() {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut add = |name: &str, level, message: String, hint: &str| {
        let allowed = definition.allow.iter().any(|allowed| allowed == name);
        found.push(Finding { name: name.to_owned(), level, message, hint: hint.to_owned(), allowed });
    };
    // What QEMU can do for a disk, cloud-hypervisor cannot: its disks always have a write cache.
    let (past_caches, past_page_cache) = match definition.hypervisor {
        Hypervisor::Qemu => (
            "cache = \"directsync\", or allow it where the disk has power-loss protection",
            "cache = \"directsync\"",
        ),
        Hypervisor::CloudHypervisor => (
            "use a vSSD or QEMU, or allow it where the disk has power-loss protection",
            "cache = \"none\", or a vSSD",
        ),
    };
    for disk in &definition.disk {
        let path = disk.path.display();
        match disk.cache {
            DiskCache::Directsync | DiskCache::Writethrough => {}
            _ if disk.readonly => {}
            DiskCache::None => add(
                "disk-write-cache",
                Level::Error,
                format!(
                    "{path}: the guest is told that a write is done while it may be in the disk's own cache"
                ),
                past_caches,
            ),
            DiskCache::Writeback | DiskCache::Unsafe => add(
                "disk-cache",
                Level::Error,
                format!(
                    "{path}: what the guest wrote may be in this host's page cache, which does not survive"
                ),
                past_page_cache,
            ),
        }
    }
    if let Some(machine) = &definition.machine
        && !is_versioned(machine)
    {
        add(
            "machine-unversioned",
            Level::Error,
            format!(
                "machine {machine:?} is another one after an update of the hypervisor, and a saved state fits only the same"
            ),
            "name it with its version (`qemu-system-x86_64 -machine help`), or leave it out",
        );
    }
    let extra = || definition.extra.iter().map(String::as_str);
    if let Some(arg) = extra().find(|arg| arg.contains("vfio")) {
        add(
            "vfio",
            Level::Error,
            format!("{arg}: the state of a passed-through device is lost with the power"),
            "use a virtio device",
        );
    }
    if let Some(arg) = extra().find(|arg| {
        arg.starts_with("memory-backend")
            || arg.contains("memory-backend=")
            || ["-m", "-mem-path"].contains(arg)
    }) {
        add(
            "memory",
            Level::Error,
            format!("{arg}: only memory in a named file of NV-RAM survives, and the host places it there"),
            "say how much with `memory`, and where with `nvram`",
        );
    }
    if let Some(arg) = extra().find(|arg| OURS.contains(arg)) {
        add("reserved-option", Level::Error, format!("{arg} is set by the host itself"), "leave it out");
    }
    if let Some(arg) = extra().find(|arg| arg.contains("snapshot=on") || *arg == "-snapshot") {
        add(
            "disk-snapshot",
            Level::Error,
            format!("{arg}: writes go to a file that is gone with the hypervisor"),
            "leave it out",
        );
    }
    let netdevs = || definition.network.iter().filter_map(|network| network.netdev.as_deref());
    if let Some(netdev) = netdevs().find(|netdev| netdev.split(',').next() == Some("user")) {
        add(
            "user-network",
            Level::Warning,
            format!("{netdev}: connections to the outside end with the hypervisor's process"),
            "use tap or dgram where connections are to survive",
        );
    }
    found.sort_by_key(|finding| finding.level == Level::Warning);
    found
}

/// `pc-q35-7.2`, and not `q35`.
fn is_versioned(machine: &str) -> bool {
    let name = machine.split(',').next().unwrap_or_default();
    name.rsplit_once('-').is_some_and(|(_, version)| {
        version.contains('.')
            && version.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(more: &str) -> Vec<String> {
        let text = format!("name = 'a'\nmemory = '64MiB'\nnvram = 'nv0'\n{more}");
        lint(&Definition::parse(&text).unwrap()).into_iter().map(|finding| finding.name).collect()
    }

    #[test]
    fn what_would_be_lost_is_named() {
        assert!(names("").is_empty());
        for (more, name) in [
            ("machine = 'q35'", "machine-unversioned"),
            ("machine = 'pc-q35-x'", "machine-unversioned"),
            ("extra = ['-device', 'vfio-pci,host=00:01.0']", "vfio"),
            ("extra = ['-m', '1G']", "memory"),
            ("extra = ['-object', 'memory-backend-ram,id=x']", "memory"),
            ("extra = ['-daemonize']", "reserved-option"),
            ("extra = ['-drive', 'file=x,snapshot=on']", "disk-snapshot"),
            ("[[disk]]\npath = '/d'\ncache = 'none'", "disk-write-cache"),
            ("[[disk]]\npath = '/d'\ncache = 'writeback'", "disk-cache"),
            ("[[disk]]\npath = '/d'\ncache = 'unsafe'", "disk-cache"),
            ("[[network]]\nnetdev = 'user'", "user-network"),
        ] {
            assert_eq!(names(more), [name], "{more}");
        }
        for more in [
            "machine = 'pc-q35-10.0'",
            "machine = 'pc-q35-7.2,smm=off'",
            "[[disk]]\npath = '/d'",
            "[[disk]]\npath = '/d'\ncache = 'none'\nreadonly = true",
            "[[network]]\nnetdev = 'tap,ifname=user'",
        ] {
            assert!(names(more).is_empty(), "{more}");
        }
    }

    #[test]
    fn what_is_advised_is_what_the_hypervisor_can() {
        let hints = |hypervisor: &str, cache: &str| {
            let text = format!(
                "name = 'a'\nmemory = '64MiB'\nnvram = 'nv0'\nhypervisor = '{hypervisor}'\n[[disk]]\npath = '/d'\ncache = '{cache}'\n"
            );
            lint(&Definition::parse(&text).unwrap())
                .into_iter()
                .map(|finding| finding.hint)
                .collect::<String>()
        };
        for cache in ["none", "writeback"] {
            assert!(hints("qemu", cache).contains("directsync"));
            let hint = hints("cloud-hypervisor", cache);
            assert!(hint.contains("vSSD") && !hint.contains("directsync"), "{hint}");
        }
    }

    #[test]
    fn an_ordinary_vm_has_nothing_to_lose_and_what_is_meant_is_allowed() {
        let text = "name = 'a'\nmemory = '64MiB'\nmachine = 'q35'\n";
        assert!(lint(&Definition::parse(text).unwrap()).is_empty());
        let text = format!("{text}nvram = 'nv0'\nallow = ['machine-unversioned']\n");
        assert!(lint(&Definition::parse(&text).unwrap())[0].allowed);
    }
}
