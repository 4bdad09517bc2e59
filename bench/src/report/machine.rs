// SPDX-License-Identifier: Apache-2.0 OR MIT
//! On what was measured, and with which versions.

use std::fs;
use std::process::Command;

use serde::Serialize;

use crate::peer::Pages;
use crate::placement::Cpus;

/// The computer itself.
#[derive(Clone, Debug, Serialize)]
pub struct Host {
    pub processor: String,
    pub processors: usize,
    pub memory_gib: u64,
    pub kernel: String,
}

impl Host {
    pub fn look() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpu_info = read("/proc/cpuinfo");
        let model = cpu_info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = read("/proc/meminfo");
        let kib = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok());
        let hypervisor = if cpu_info.contains(" hypervisor") { " (virtual)" } else { "" };
        Self {
            processor: format!("{}{hypervisor}", model.map_or("unknown", |(_, name)| name)),
            processors: cpu_info.lines().filter(|line| line.starts_with("processor")).count(),
            memory_gib: (kib.unwrap_or(0) + (1 << 19)) >> 20,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
    }
}

/// It, and what the data path was measured with.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    #[serde(flatten)]
    pub host: Host,
    /// Those that were used.
    pub cpus: Cpus,
    pub nvram_pages: Pages,
    pub versions: Vec<String>,
}

impl Machine {
    /// `storage_daemons`: their versions.
    pub fn look(cpus: Cpus, nvram_pages: Pages, storage_daemons: &[&str]) -> Self {
        Self {
            host: Host::look(),
            cpus,
            nvram_pages,
            versions: [format!("qemu-storage-daemon {}", storage_daemons.join(" and "))]
                .into_iter()
                .chain(version("fio", "--version"))
                .collect(),
        }
    }
}

fn version(program: &str, arg: &str) -> Option<String> {
    let output = Command::new(vssd_tests::paths::find_tool(program)?).arg(arg).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().next().map(str::to_owned)
}
