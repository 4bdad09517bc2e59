// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What an operator writes about a VM, in TOML.
//!
//! ```toml
//! name = "db"
//! memory = "4GiB"
//! cpus = 2
//! nvram = "nv0"              # a medium of the daemon's; without it the VM is an ordinary one
//! hypervisor = "qemu"        # or "cloud-hypervisor"; `emulator` names its program
//! priority = 10              # saved before those with less
//! kernel = "/boot/vmlinuz"   # or [[disk]] and firmware
//! cmdline = "console=ttyS0 root=/dev/vda"
//!
//! [[vssd]]
//! name = "db-data"
//!
//! [[network]]
//! tap = "db0"
//! ```
//!
//! Looks at each value by itself. What a hypervisor makes of it, and what it cannot, [`crate::vmm`] says.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use vssd_protocol::control::{MAX_NAME, is_valid_name};
use vssd_protocol::units::ByteCount;

/// A power of two that every kind of memory divides by.
const MEMORY_UNIT: u64 = 2 << 20;
const SMALLEST_MEMORY: u64 = 16 << 20;
const LARGEST_MEMORY: u64 = 16 << 40;
const MOST_CPUS: u16 = 1024;

/// Why a definition cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    #[error("it is no definition of a VM")]
    Syntax(#[from] toml::de::Error),
    #[error("{key}: {problem}")]
    Value { key: String, problem: String },
    #[error("{key}: {hypervisor} {problem}")]
    Unsupported { hypervisor: Hypervisor, key: String, problem: String, hint: String },
}

/// Which hypervisor runs a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hypervisor {
    #[default]
    Qemu,
    CloudHypervisor,
}

impl Hypervisor {
    /// What it is started as where a definition names no program.
    pub fn program(self) -> &'static str {
        match self {
            Self::Qemu => "qemu-system-x86_64",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }
}

impl fmt::Display for Hypervisor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "QEMU",
            Self::CloudHypervisor => "cloud-hypervisor",
        })
    }
}

/// A size as people write it, `4GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Size(pub u64);

impl TryFrom<String> for Size {
    type Error = vssd_protocol::units::ParseByteCountError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse::<ByteCount>().map(|count| Self(count.0))
    }
}

impl From<Size> for String {
    /// In bytes: a shorter form could round.
    fn from(size: Size) -> Self {
        size.0.to_string()
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ByteCount(self.0).fmt(f)
    }
}

/// How the guest's processors run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// In hardware where this host can, found out when the VM starts.
    #[default]
    Auto,
    Kvm,
    Tcg,
}

/// A disk image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskDefinition {
    pub path: PathBuf,
    #[serde(default = "raw")]
    pub format: String,
    #[serde(default)]
    pub readonly: bool,
    #[serde(default)]
    pub cache: DiskCache,
}

/// What lies between a guest's write and the medium, QEMU's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskCache {
    /// The disk says that a write is done when it is durable: nothing a guest was told is lost.
    #[default]
    Directsync,
    /// Past the host's page cache, but not past the device's own.
    None,
    Writethrough,
    Writeback,
    Unsafe,
}

/// A vSSD of a vssd-backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VssdDefinition {
    pub name: String,
    /// Its vhost-user socket; the daemon's `vssd.runtime_dir` has one of its name otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Queues; as many as processors otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkDefinition {
    /// The tap device that it is plugged into. This or `netdev`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// QEMU's description of something else that it is plugged into, without an id: `user`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netdev: Option<String>,
    /// Made from the VM's name and the card's place otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

impl NetworkDefinition {
    /// Its address; the same for the same card, the `at`-th, of the same VM.
    pub fn mac_in(&self, vm: &str, at: usize) -> String {
        self.mac.clone().unwrap_or_else(|| made_mac(vm, at))
    }
}

/// A locally administered address.
fn made_mac(vm: &str, at: usize) -> String {
    // FNV-1a: any hash that stays the same from one version of this program to the next.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in vm.bytes().chain([0]).chain(at.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let [a, b, c, ..] = hash.to_be_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

/// A VM as its operator wants it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    pub name: String,
    pub memory: Size,
    #[serde(default = "one")]
    pub cpus: u16,
    /// The medium that its memory lies on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<String>,
    /// Who has more is saved first.
    #[serde(default)]
    pub priority: u8,
    /// Start it with the daemon, if it does not come back from NV-RAM anyway.
    #[serde(default)]
    pub autostart: bool,
    #[serde(default)]
    pub hypervisor: Hypervisor,
    /// The hypervisor's program; found in the daemon's `PATH` otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub emulator: Option<PathBuf>,
    /// Machine type; the emulator's newest otherwise, with its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    #[serde(default)]
    pub accel: Accel,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    #[serde(default)]
    pub cmdline: String,
    /// A channel to the QEMU guest agent: the guest's clock is set whenever it goes on after it stood still.
    #[serde(default)]
    pub guest_agent: bool,
    #[serde(default)]
    pub disk: Vec<DiskDefinition>,
    #[serde(default)]
    pub vssd: Vec<VssdDefinition>,
    #[serde(default)]
    pub network: Vec<NetworkDefinition>,
    /// Arguments for the emulator as they are.
    #[serde(default)]
    pub extra: Vec<String>,
    /// Names of lint findings that are meant to be so.
    #[serde(default)]
    pub allow: Vec<String>,
}

fn one() -> u16 {
    1
}

fn raw() -> String {
    "raw".to_owned()
}

impl Definition {
    /// Reads a definition and looks at each value by itself.
    pub fn parse(text: &str) -> Result<Self, DefinitionError> {
        let definition: Self = toml::from_str(text)?;
        definition.check()?;
        Ok(definition)
    }

    /// The hypervisor's program.
    pub fn emulator(&self) -> &Path {
        self.emulator.as_deref().unwrap_or_else(|| Path::new(self.hypervisor.program()))
    }

    pub fn is_persistent(&self) -> bool {
        self.nvram.is_some()
    }

    fn check(&self) -> Result<(), DefinitionError> {
        let wrong = |key: &str, problem: String| Err(DefinitionError::Value { key: key.to_owned(), problem });
        if !is_valid_name(&self.name) {
            let problem = format!(
                "{:?} is not 1 to {MAX_NAME} of a-z A-Z 0-9 . _ -, beginning with none of . -",
                self.name
            );
            return wrong("name", problem);
        }
        let bytes = self.memory.0;
        if !bytes.is_multiple_of(MEMORY_UNIT) || !(SMALLEST_MEMORY..=LARGEST_MEMORY).contains(&bytes) {
            let problem = format!("{} is no multiple of 2 MiB from 16 MiB to 16 TiB", self.memory);
            return wrong("memory", problem);
        }
        if !(1..=MOST_CPUS).contains(&self.cpus) {
            return wrong("cpus", format!("{} is not from 1 to {MOST_CPUS}", self.cpus));
        }
        if self.kernel.is_none() && (self.initrd.is_some() || !self.cmdline.is_empty()) {
            return wrong("kernel", "initrd and cmdline are for a kernel, and none is named".to_owned());
        }
        let paths = [("firmware", &self.firmware), ("kernel", &self.kernel), ("initrd", &self.initrd)];
        let named = paths.into_iter().filter_map(|(key, path)| Some((key.to_owned(), path.as_deref()?)));
        let disks =
            self.disk.iter().enumerate().map(|(at, disk)| (format!("disk.{at}.path"), disk.path.as_path()));
        for (key, path) in named.chain(disks) {
            absolute(&key, path)?;
        }
        for (at, vssd) in self.vssd.iter().enumerate() {
            if !is_valid_name(&vssd.name) {
                return wrong(&format!("vssd.{at}.name"), format!("{:?} is no name of a vSSD", vssd.name));
            }
            if let Some(socket) = &vssd.socket {
                absolute(&format!("vssd.{at}.socket"), socket)?;
            }
        }
        for (at, network) in self.network.iter().enumerate() {
            match (&network.tap, &network.netdev) {
                (Some(tap), None) if !is_interface(tap) => {
                    return wrong(
                        &format!("network.{at}.tap"),
                        format!("{tap:?} is no name of a network device"),
                    );
                }
                (Some(_), None) | (None, Some(_)) => {}
                (Some(_), Some(_)) | (None, None) => {
                    return wrong(&format!("network.{at}"), "it has either a tap or a netdev".to_owned());
                }
            }
            if network.mac.as_deref().is_some_and(|mac| !is_mac(mac)) {
                let problem = "not six pairs of hexadecimal digits with colons between them".to_owned();
                return wrong(&format!("network.{at}.mac"), problem);
            }
        }
        Ok(())
    }
}

/// The daemon has a working directory of its own.
fn absolute(key: &str, path: &Path) -> Result<(), DefinitionError> {
    if path.is_absolute() {
        return Ok(());
    }
    let problem = format!("{} is no absolute path", path.display());
    Err(DefinitionError::Value { key: key.to_owned(), problem })
}

/// As Linux has it, but for a comma, which ends a value in QEMU's option syntax.
fn is_interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:,".contains(&byte))
        && ![".", ".."].contains(&name)
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    parts.len() == 6
        && parts.iter().all(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "name = 'a'\nmemory = '64MiB'\n";

    fn problem(text: &str) -> String {
        match Definition::parse(text).unwrap_err() {
            DefinitionError::Syntax(error) => error.message().to_owned(),
            error => error.to_string(),
        }
    }

    #[test]
    fn what_is_not_said_has_the_careful_value() {
        let definition = Definition::parse(&format!("{SMALL}[[disk]]\npath = '/d'\n")).unwrap();
        assert_eq!((definition.cpus, definition.memory.0), (1, 64 << 20));
        assert_eq!(definition.disk[0].cache, DiskCache::Directsync);
        assert!(!definition.is_persistent() && !definition.autostart);
        assert_eq!(definition.emulator(), Path::new("qemu-system-x86_64"));
    }

    #[test]
    fn each_hypervisor_has_its_program() {
        let other = format!("{SMALL}hypervisor = 'cloud-hypervisor'\n");
        assert_eq!(Definition::parse(&other).unwrap().emulator(), Path::new("cloud-hypervisor"));
        let named = Definition::parse(&format!("{other}emulator = '/opt/ch'\n")).unwrap();
        assert_eq!(named.emulator(), Path::new("/opt/ch"));
    }

    #[test]
    fn an_address_that_was_made_stays_and_differs_from_others() {
        let text = format!("{SMALL}[[network]]\ntap = 't0'\n");
        let card = &Definition::parse(&text).unwrap().network[0];
        assert_eq!(card.mac_in("a", 0), "52:54:00:65:d2:07");
        assert_ne!(card.mac_in("a", 0), card.mac_in("a", 1));
        assert_ne!(card.mac_in("a", 0), card.mac_in("b", 0));
    }

    #[test]
    fn a_definition_that_was_written_is_read_as_it_was() {
        let text = format!(
            "{SMALL}cpus = 3\nnvram = 'nv0'\nkernel = '/k'\ncmdline = 'quiet'\n[[vssd]]\nname = 'v'\nqueues = 2\n\
             [[network]]\nnetdev = 'user'\nmac = '52:54:00:00:00:01'\n"
        );
        let definition = Definition::parse(&text).unwrap();
        assert_eq!(Definition::parse(&toml::to_string(&definition).unwrap()).unwrap(), definition);
    }

    #[test]
    fn bad_values_are_named() {
        for (text, word) in [
            ("memory = '64MiB'", "name"),
            ("name = '../x'\nmemory = '64MiB'", "name"),
            ("name = 'a'\nmemory = '65MiB'", "memory"),
            ("name = 'a'\nmemory = '1MiB'", "memory"),
            ("name = 'a'\nmemory = 'much'", "much"),
            (&format!("{SMALL}cpus = 0"), "cpus"),
            (&format!("{SMALL}initrd = '/i'"), "kernel"),
            (&format!("{SMALL}kernel = 'k'"), "absolute"),
            (&format!("{SMALL}[[disk]]\npath = 'd'"), "disk.0.path"),
            (&format!("{SMALL}[[vssd]]\nname = ''"), "vssd.0.name"),
            (&format!("{SMALL}[[network]]\nnetdev = 'user'\nmac = '1:2'"), "network.0.mac"),
            (&format!("{SMALL}[[network]]\n"), "network.0"),
            (&format!("{SMALL}[[network]]\ntap = 'a'\nnetdev = 'user'"), "network.0"),
            (&format!("{SMALL}[[network]]\ntap = 'a,script=x'"), "network.0.tap"),
            (&format!("{SMALL}hypervisor = 'xen'"), "xen"),
            (&format!("{SMALL}colour = 'red'"), "colour"),
        ] {
            assert!(problem(text).contains(word), "{text}: {}", problem(text));
        }
    }
}
