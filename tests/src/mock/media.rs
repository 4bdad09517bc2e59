// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A look at a pool's medium from outside, while a daemon works on it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Result;

/// Where the superblock says where the two checkpoints are (layout: `vssd-pool/src/superblock.rs`), and how many pages the
/// journal has.
const CHECKPOINTS_AT: u64 = 104;
const JOURNAL_PAGES_AT: u64 = 136;

/// The two places of a pool's checkpoints on its medium. Opened anew for each look: a daemon does not start while somebody who
/// lives has its medium open and a lock of the dead one is still there.
#[derive(Debug)]
pub struct Slots {
    medium: PathBuf,
    offsets: [u64; 2],
    /// Pages of the journal.
    pub journal: u64,
}

impl Slots {
    /// Reads from the superblock where they are.
    pub fn of(medium: &Path) -> Result<Self> {
        let file = File::open(medium)?;
        let long = |at: u64| -> Result<u64> {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at)?;
            Ok(u64::from_le_bytes(bytes))
        };
        let offsets = [long(CHECKPOINTS_AT)?, long(CHECKPOINTS_AT + 8)?];
        Ok(Self { medium: medium.to_path_buf(), offsets, journal: long(JOURNAL_PAGES_AT)? })
    }

    /// Number of the checkpoint in either place and the journal's page that it begins with; zeroes where one is being written,
    /// or never was.
    fn headers(&self) -> Result<[(u64, u64); 2]> {
        let medium = File::open(&self.medium)?;
        let mut headers = [(0, 0); 2];
        for (header, offset) in headers.iter_mut().zip(self.offsets) {
            let mut bytes = [0; 16];
            medium.read_exact_at(&mut bytes, offset + 32)?;
            let (number, begin) = bytes.split_at(8);
            *header = (u64::from_le_bytes(number.try_into()?), u64::from_le_bytes(begin.try_into()?));
        }
        Ok(headers)
    }

    /// How many checkpoints there were.
    pub fn newest(&self) -> Result<u64> {
        Ok(self.headers()?.into_iter().map(|(number, _)| number).max().unwrap_or(0))
    }

    pub fn one_is_being_written(&self) -> Result<bool> {
        Ok(self.headers()?.iter().any(|(number, _)| *number == 0))
    }

    /// Pages of the journal between the last two checkpoints, which it must hold; `None` while one is being written.
    pub fn journal_held(&self) -> Result<Option<u64>> {
        let [(one, first), (other, second)] = self.headers()?;
        Ok((one > 0 && other > 0).then(|| first.abs_diff(second)))
    }
}
