// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Temporary folders: in memory where there is room, gone when dropped.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// Set to keep scratch folders for a look afterwards.
pub const KEEP_ENV: &str = "VSSD_KEEP_SCRATCH";

/// A folder of its own for one test.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
}

impl Scratch {
    /// On tmpfs if there is one: tests write gigabytes and sync often.
    pub fn new() -> Result<Self> {
        let shm = Path::new("/dev/shm");
        if shm.is_dir() { Self::below(shm) } else { Self::below(&env::temp_dir()) }
    }

    /// On a disk file system, for what tmpfs does not do (direct I/O).
    pub fn on_disk() -> Result<Self> {
        Self::below(&env::temp_dir())
    }

    fn below(base: &Path) -> Result<Self> {
        // A socket's path may have 107 bytes: keep the prefix short.
        let mut dir = tempfile::Builder::new()
            .prefix("vssd-")
            .tempdir_in(base)
            .with_context(|| format!("make a scratch folder in {}", base.display()))?;
        if env::var_os(KEEP_ENV).is_some() {
            dir.disable_cleanup(true);
        }
        Ok(Self { dir })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path inside it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }
}
