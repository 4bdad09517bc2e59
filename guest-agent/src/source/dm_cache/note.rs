// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How a cache works when nobody is cleaning it: kept beside the agent's locks while it is being cleaned, for its table does not say so then.
//!
//! A reboot forgets it, together with the table that it belongs to. A note that is there means: this agent, or one before it, has
//! begun something with the cache and not ended it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::text::Mode;
use crate::error::{AgentError, Result};

#[derive(Debug)]
pub(super) struct Note {
    path: PathBuf,
    cache: String,
}

impl Note {
    pub(super) fn new(dir: &Path, disk: &str, cache: &str) -> Self {
        Self { path: dir.join(format!("{disk}.cache-mode")), cache: cache.to_owned() }
    }

    /// One that names another cache, or cannot be understood, is none.
    pub(super) fn read(&self) -> Result<Option<Mode>> {
        match fs::read_to_string(&self.path) {
            Ok(text) => Ok(text
                .split_once('\n')
                .filter(|(cache, _)| *cache == self.cache)
                .and_then(|(_, mode)| Mode::parse(mode))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(AgentError::io("read", &self.path, source)),
        }
    }

    pub(super) fn write(&self, mode: &Mode) -> Result<()> {
        let partial = self.path.with_extension("partial");
        let written = fs::write(&partial, format!("{}\n{mode}\n", self.cache));
        written
            .and_then(|()| fs::rename(&partial, &self.path))
            .map_err(|source| AgentError::io("write", &self.path, source))
    }

    pub(super) fn remove(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(AgentError::io("remove", &self.path, error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_one_caches() {
        let dir = std::env::temp_dir().join(format!("vssd-note-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let note = Note::new(&dir, "vssda", "cached");
        assert_eq!(note.read().unwrap(), None);
        let mode = Mode::parse("2 metadata2 writeback smq 2 migration_threshold 100").unwrap();
        note.write(&mode).unwrap();
        assert_eq!(note.read().unwrap(), Some(mode));
        assert_eq!(Note::new(&dir, "vssda", "other").read().unwrap(), None);
        fs::write(dir.join("vssda.cache-mode"), "cached\n7").unwrap();
        assert_eq!(note.read().unwrap(), None);
        note.remove().unwrap();
        note.remove().unwrap();
        assert_eq!(note.read().unwrap(), None);
        fs::remove_dir_all(&dir).unwrap();
    }
}
