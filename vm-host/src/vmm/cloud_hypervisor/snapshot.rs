// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The folder through which cloud-hypervisor gives a state and takes it: `config.json`, `state.json`, and no memory. It is made for
//! one state, in memory, and is gone when that has passed.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;

use super::config;
use super::container::Snapshot;
use crate::vmm::Memory;

const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
/// More than any state that is reasonable; what a broken hypervisor could write has no end.
const LARGEST: u64 = 64 << 20;

/// The folder.
#[derive(Debug)]
pub(super) struct Folder(PathBuf);

impl Folder {
    /// An empty one; what an earlier daemon left there is gone.
    pub(super) fn make(path: &Path) -> Result<Self, String> {
        clear(path)
            .and_then(|()| DirBuilder::new().mode(0o700).create(path))
            .map_err(|error| format!("cannot make {}: {error}", path.display()))?;
        Ok(Self(path.to_owned()))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// What has been put there. A copy of the memory beside it is an error: it would not be kept, and took time that there is not.
    pub(super) fn take(&self) -> Result<Snapshot, String> {
        self.expect_no_memory()?;
        let snapshot = Snapshot { config: self.read(CONFIG)?, state: self.read(STATE)? };
        config::leaves_memory_out(&snapshot.config)?;
        // A half-written one must not be found out only when it is needed.
        serde_json::from_slice::<IgnoredAny>(&snapshot.state)
            .map_err(|error| format!("{STATE} is not whole: {error}"))?;
        Ok(snapshot)
    }

    /// Puts a state there, with the memory where it is now.
    pub(super) fn put(&self, snapshot: &Snapshot, memory: &Memory) -> Result<(), String> {
        self.write(CONFIG, &config::moved(&snapshot.config, memory)?)?;
        self.write(STATE, &snapshot.state)
    }

    fn expect_no_memory(&self) -> Result<(), String> {
        let list = |error: io::Error| format!("cannot list {}: {error}", self.0.display());
        for entry in fs::read_dir(&self.0).map_err(list)? {
            let entry = entry.map_err(list)?;
            let name = entry.file_name();
            let length = entry.metadata().map_err(list)?.len();
            if ![CONFIG, STATE].iter().any(|known| name == *known) && length > 0 {
                return Err(format!(
                    "its memory was copied: the hypervisor wrote {length} bytes to {}",
                    name.display()
                ));
            }
        }
        Ok(())
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, String> {
        let failed = |error: io::Error| format!("cannot read {name}: {error}");
        let path = self.0.join(name);
        let metadata = fs::symlink_metadata(&path).map_err(failed)?;
        if !metadata.is_file() || metadata.len() > LARGEST {
            return Err(format!("{name} is no file of at most {LARGEST} bytes"));
        }
        let mut bytes = Vec::new();
        File::open(&path).and_then(|file| file.take(LARGEST + 1).read_to_end(&mut bytes)).map_err(failed)?;
        Ok(bytes)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), String> {
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.0.join(name))
            .and_then(|mut file| file.write_all(bytes))
            .map_err(|error| format!("cannot write {name}: {error}"))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = clear(&self.0);
    }
}

/// Removes a folder and what is in it, if it is there.
pub(super) fn clear(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIGURED: &str =
        r#"{"memory":{"size":0,"zones":[{"id":"ram","size":4096,"file":"/a","shared":true}]}}"#;

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::make(&dir.path().join("snapshot")).unwrap();
        (dir, folder)
    }

    #[test]
    fn a_state_passes_and_nothing_of_it_stays() {
        let (dir, folder) = folder();
        fs::write(folder.path().join(CONFIG), CONFIGURED).unwrap();
        fs::write(folder.path().join(STATE), "{\"a\":1}").unwrap();
        fs::write(folder.path().join("memory-ranges"), "").unwrap();
        let snapshot = folder.take().unwrap();
        drop(folder);
        assert!(fs::read_dir(dir.path()).unwrap().next().is_none());

        let folder = Folder::make(&dir.path().join("snapshot")).unwrap();
        let memory = Memory::Named { path: "/b".into(), offset: 0, bytes: 4096, align: None, pmem: false };
        folder.put(&snapshot, &memory).unwrap();
        assert!(fs::read_to_string(folder.path().join(CONFIG)).unwrap().contains("\"file\":\"/b\""));
        assert_eq!(folder.take().unwrap().state, snapshot.state);
    }

    #[test]
    fn what_a_killed_daemon_left_is_in_no_state_s_way() {
        let (dir, folder) = folder();
        fs::write(folder.path().join(STATE), "{}").unwrap();
        std::mem::forget(folder);
        let folder = Folder::make(&dir.path().join("snapshot")).unwrap();
        assert!(fs::read_dir(folder.path()).unwrap().next().is_none());
    }

    #[test]
    fn what_is_not_a_whole_state_without_memory_is_refused() {
        type Spoil = fn(&Path);
        let cases: [(Spoil, &str); 7] = [
            (|dir| fs::write(dir.join("memory-ranges"), "x").unwrap(), "its memory was copied"),
            (|dir| fs::write(dir.join(STATE), "{\"a\":").unwrap(), "not whole"),
            (|dir| fs::remove_file(dir.join(STATE)).unwrap(), "state.json"),
            (|dir| fs::remove_file(dir.join(CONFIG)).unwrap(), "config.json"),
            (|dir| fs::write(dir.join(CONFIG), "{}").unwrap(), "one zone"),
            (|dir| fs::write(dir.join(CONFIG), CONFIGURED.replace("true", "false")).unwrap(), "shared"),
            (|dir| File::create(dir.join(STATE)).unwrap().set_len(LARGEST + 1).unwrap(), "at most"),
        ];
        for (spoil, why) in cases {
            let (_dir, folder) = folder();
            fs::write(folder.path().join(CONFIG), CONFIGURED).unwrap();
            fs::write(folder.path().join(STATE), "{}").unwrap();
            spoil(folder.path());
            let said = folder.take().unwrap_err();
            assert!(said.contains(why), "{why}: {said}");
        }
    }
}
