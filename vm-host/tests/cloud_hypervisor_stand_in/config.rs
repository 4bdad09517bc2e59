// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Bodies of requests, as the API document has them: other fields are errors. What no test uses is taken and not looked at.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    #[serde(default)]
    pub cpus: Cpus,
    #[serde(default)]
    pub memory: MemoryConfig,
    pub payload: Option<Payload>,
    pub rate_limit_groups: Option<Value>,
    pub disks: Option<Vec<Disk>>,
    pub net: Option<Vec<Net>>,
    pub rng: Option<Value>,
    pub balloon: Option<Value>,
    pub fs: Option<Value>,
    pub generic_vhost_user: Option<Value>,
    pub pmem: Option<Value>,
    pub serial: Option<Port>,
    pub console: Option<Port>,
    pub debug_console: Option<Value>,
    pub devices: Option<Value>,
    pub user_devices: Option<Value>,
    pub vdpa: Option<Value>,
    pub vsock: Option<Value>,
    pub numa: Option<Value>,
    #[serde(default)]
    pub iommu: bool,
    #[serde(default)]
    pub watchdog: bool,
    pub rtc: Option<Value>,
    #[serde(default)]
    pub pvpanic: bool,
    pub pci_segments: Option<Value>,
    pub platform: Option<Value>,
    pub tpm: Option<Value>,
    #[serde(default)]
    pub landlock_enable: bool,
    pub landlock_rules: Option<Value>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Cpus {
    pub boot_vcpus: u8,
    pub max_vcpus: u8,
}

impl Default for Cpus {
    fn default() -> Self {
        Self { boot_vcpus: 1, max_vcpus: 1 }
    }
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    pub size: u64,
    #[serde(default)]
    pub shared: bool,
    #[serde(default)]
    pub hugepages: bool,
    pub zones: Option<Vec<Zone>>,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self { size: 512 << 20, shared: false, hugepages: false, zones: None }
    }
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Zone {
    pub id: String,
    pub size: u64,
    pub file: Option<PathBuf>,
    #[serde(default)]
    pub shared: bool,
    #[serde(default)]
    pub prefault: bool,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Payload {
    pub firmware: Option<PathBuf>,
    pub kernel: Option<PathBuf>,
    pub cmdline: Option<String>,
    pub initramfs: Option<PathBuf>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    pub id: Option<String>,
    pub path: Option<PathBuf>,
    #[serde(default)]
    pub readonly: bool,
    #[serde(default)]
    pub direct: bool,
    pub image_type: Option<ImageType>,
    #[serde(default)]
    pub vhost_user: bool,
    pub vhost_socket: Option<PathBuf>,
    #[serde(default = "one")]
    pub num_queues: u16,
    #[serde(default = "queue_size")]
    pub queue_size: u16,
}

fn one() -> u16 {
    1
}

fn queue_size() -> u16 {
    128
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub enum ImageType {
    FlatVmdk,
    FixedVhd,
    Qcow2,
    Raw,
    Vhdx,
    Unknown,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    pub id: Option<String>,
    pub tap: Option<String>,
    pub mac: Option<String>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    pub mode: Mode,
    pub file: Option<PathBuf>,
    pub socket: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Mode {
    Off,
    Pty,
    Tty,
    File,
    Socket,
    Null,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSnapshotConfig {
    pub destination_url: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    pub source_url: String,
    #[serde(default)]
    pub prefault: bool,
    #[serde(default)]
    pub memory_restore_mode: MemoryRestoreMode,
    #[serde(default)]
    pub resume: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum MemoryRestoreMode {
    #[default]
    Copy,
    OnDemand,
    CopyOnWrite,
}

impl VmConfig {
    /// `VmConfig::validate` and `MemoryManager::validate_memory_config`, as far as they concern what is used here.
    pub fn validate(&self) -> Result<(), String> {
        let payload = self.payload.as_ref().ok_or("No bootitem provided: neither firmware nor kernel")?;
        match (&payload.firmware, &payload.kernel) {
            (Some(_), Some(_)) => {
                return Err("Specifying a kernel is not supported when a firmware is provided".to_owned());
            }
            (None, None) => return Err("No bootitem provided: neither firmware nor kernel".to_owned()),
            (Some(file), None) | (None, Some(file)) => exists(file)?,
        }
        let zones = self.memory.zones.as_deref().unwrap_or_default();
        if (self.memory.size == 0) == zones.is_empty() || zones.len() > 1 {
            return Err("Memory is given as a size or as zones, and here as one zone".to_owned());
        }
        let shared = self.memory.shared || zones.iter().all(|zone| zone.shared) && !zones.is_empty();
        for disk in self.disks.iter().flatten() {
            match (&disk.path, &disk.vhost_socket) {
                (Some(_), Some(_)) => return Err("Disk path and vhost socket both provided".to_owned()),
                (Some(path), None) => exists(path)?,
                (None, Some(socket)) if disk.vhost_user => {
                    if !shared {
                        return Err("Using vhost-user requires using shared memory or huge pages".to_owned());
                    }
                    exists(socket)?;
                }
                _ => return Err("No socket provided when using vhost-user".to_owned()),
            }
        }
        let mut ids: Vec<&String> = self.disks.iter().flatten().filter_map(|disk| disk.id.as_ref()).collect();
        ids.extend(self.net.iter().flatten().filter_map(|net| net.id.as_ref()));
        ids.extend(zones.iter().map(|zone| &zone.id));
        ids.sort();
        if ids.windows(2).any(|two| two[0] == two[1]) || ids.iter().any(|id| id.starts_with("__")) {
            return Err("An identifier is not unique or not valid".to_owned());
        }
        Ok(())
    }
}

fn exists(path: &Path) -> Result<(), String> {
    if path.exists() { Ok(()) } else { Err(format!("No such file or directory: {}", path.display())) }
}
