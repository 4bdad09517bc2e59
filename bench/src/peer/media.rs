// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files that backends serve: in memory for NV-RAM, on a disk with direct I/O for an SSD.
//!
//! Real NV-RAM is mapped by DAX in pages of 2 MiB. So that what stands for it is, too, a tmpfs of such pages is mounted where
//! that is allowed.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde::Serialize;
use tempfile::TempDir;

/// Room for a pool's own data beside what its vSSD holds.
const POOL_OVERHEAD: u64 = 192 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Medium {
    /// A file on tmpfs stands for NV-RAM.
    Nvram,
    /// A file on a disk, only ever used with `O_DIRECT`.
    Ssd,
}

impl Medium {
    pub fn name(self) -> &'static str {
        match self {
            Self::Nvram => "NV-RAM",
            Self::Ssd => "SSD",
        }
    }
}

/// In what pieces the memory that stands for NV-RAM can be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pages {
    /// 2 MiB.
    Huge,
    /// 4 KiB.
    Small,
}

impl Pages {
    pub fn name(self) -> &'static str {
        match self {
            Self::Huge => "2 MiB",
            Self::Small => "4 KiB",
        }
    }
}

/// A tmpfs of huge pages, unmounted when dropped.
#[derive(Debug)]
struct HugeTmpfs(PathBuf);

/// Where it is within a run's folder.
const HUGE: &str = "h";

impl HugeTmpfs {
    fn mount(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path)?;
        mount("vssd-bench", &path, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"huge=always,size=80%")?;
        Ok(Self(path))
    }
}

impl Drop for HugeTmpfs {
    fn drop(&mut self) {
        // Should it fail, the next run sweeps it away.
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Folders are named after this and the process that made them.
const PREFIX: &str = "vb-";

/// Removes what runs left behind that were killed: gigabytes, in memory.
fn sweep(base: &Path) -> Result<()> {
    for entry in fs::read_dir(base)? {
        let entry = entry?;
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok());
        if owner.is_some_and(|owner: u32| !Path::new(&format!("/proc/{owner}")).exists()) {
            // Another run may be sweeping too.
            let _ = unmount(entry.path().join(HUGE), UnmountFlags::DETACH);
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Where files are made. Everything in it goes with this value.
#[derive(Debug)]
pub struct Media {
    /// Before the folder that it lies in.
    huge: Option<HugeTmpfs>,
    nvram: TempDir,
    ssd: TempDir,
}

impl Media {
    /// `ssd_dir` is made if it does not exist. Where no file system can be mounted, pages are small whatever is wanted.
    pub fn new(ssd_dir: &Path, pages: Pages) -> Result<Self> {
        let make = |base: &Path| {
            fs::create_dir_all(base).with_context(|| format!("make {}", base.display()))?;
            sweep(base)?;
            // Sockets lie in it too, and their paths may have 107 bytes.
            let prefix = format!("{PREFIX}{}-", process::id());
            let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(base);
            dir.with_context(|| format!("make a folder in {}", base.display()))
        };
        let nvram = make(Path::new("/dev/shm"))?;
        let huge = match pages {
            Pages::Huge => HugeTmpfs::mount(nvram.path().join(HUGE)).ok(),
            Pages::Small => None,
        };
        let media = Self { huge, nvram, ssd: make(ssd_dir)? };
        media.check_direct()?;
        Ok(media)
    }

    fn check_direct(&self) -> Result<()> {
        let path = self.ssd.path().join("probe");
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        let opened = File::options().write(true).create(true).truncate(true).custom_flags(flags).open(&path);
        opened.with_context(|| {
            format!("{} does not take O_DIRECT: choose another with --ssd-dir", self.ssd.path().display())
        })?;
        Ok(fs::remove_file(path)?)
    }

    /// What NV-RAM is mapped in.
    pub fn pages(&self) -> Pages {
        if self.huge.is_some() { Pages::Huge } else { Pages::Small }
    }

    pub fn dir(&self, medium: Medium) -> &Path {
        match medium {
            Medium::Nvram => self.huge.as_ref().map_or(self.nvram.path(), |huge| &huge.0),
            Medium::Ssd => self.ssd.path(),
        }
    }

    /// Where sysfs has the counters of the disk below, if it is one.
    pub fn disk(&self, medium: Medium) -> Option<PathBuf> {
        let device = fs::metadata(self.dir(medium)).ok()?.dev();
        let node = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
        let node = fs::canonicalize(node).ok()?;
        // Only whole disks count flushes.
        let disk = if node.join("partition").exists() { node.parent()?.to_owned() } else { node };
        Some(disk.join("stat")).filter(|stat| stat.exists())
    }

    /// Sockets and logs.
    pub fn runtime(&self) -> &Path {
        self.nvram.path()
    }

    /// A file of zeroes, every byte of it written, so that no file system allocates while something is measured.
    pub fn zeroed(&self, medium: Medium, name: &str, bytes: u64) -> Result<PathBuf> {
        let path = self.dir(medium).join(name);
        let mut file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
        let zeroes = vec![0; 4 << 20];
        let mut left = bytes;
        while left > 0 {
            let n = left.min(zeroes.len() as u64);
            file.write_all(&zeroes[..usize::try_from(n)?])
                .with_context(|| format!("write {bytes} bytes to {}", path.display()))?;
            left -= n;
        }
        file.sync_all()?;
        ensure!(file.metadata()?.len() == bytes);
        if medium == Medium::Ssd {
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
        Ok(path)
    }

    /// The size of a pool's file for vSSDs of `span` bytes in all.
    pub fn pool_bytes(span: u64) -> u64 {
        span + span / 32 + POOL_OVERHEAD
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_run_left_behind_is_swept() {
        let base = tempfile::tempdir().unwrap();
        let mine = format!("{PREFIX}{}-a", process::id());
        // Beyond the largest process id of Linux.
        let dead = format!("{PREFIX}{}-b", 1 << 23);
        for name in [mine.as_str(), dead.as_str(), "other-1-c", "vb-x"] {
            fs::create_dir(base.path().join(name)).unwrap();
        }
        sweep(base.path()).unwrap();
        let left = |name: &str| base.path().join(name).exists();
        assert!(left(&mine) && left("other-1-c") && left("vb-x"));
        assert!(!left(&dead));
    }
}
