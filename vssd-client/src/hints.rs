// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Hints of one program, and the file that makes them known.
//!
//! A file is written aside and then renamed, so that the agent sees the old hints or the new ones and never a part.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process;

use crate::BlockRange;
use crate::error::{Error, Result};
use crate::format::{self, Cost, MOST_BYTES};

/// Where the agent looks for hints unless it is configured otherwise: a directory a disk, a file a program.
pub const HINTS: &str = "/run/vssd-agent/hints";
const NAME_LEN: usize = 100;

/// Blocks that may go, most expendable first.
///
/// ```
/// use vssd_client::{BlockRange, Cost, Hints};
///
/// let mut hints = Hints::new();
/// hints.push(Cost::Free, BlockRange::new(12, 1));
/// hints.push(Cost::Free, BlockRange::new(13, 3)); // neighbours become one range
/// hints.push(Cost::CleanCold, BlockRange::new(2, 1));
/// assert_eq!(hints.text(), "cost free\n12 4\ncost clean-cold\n2 1\n");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    ranges: Vec<(Cost, BlockRange)>,
    wanted_blocks: u32,
}

impl Hints {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds blocks that are less expendable than all before. An empty range adds nothing; a block that is named twice keeps its
    /// first place.
    pub fn push(&mut self, cost: Cost, range: BlockRange) {
        match self.ranges.last_mut() {
            _ if range.count == 0 => {}
            Some((last_cost, last)) if *last_cost == cost && last.end() == u64::from(range.start) => {
                last.count = last.count.saturating_add(range.count);
            }
            _ => self.ranges.push((cost, range)),
        }
    }

    /// Says that so many blocks more than now would be of use: the agent asks the host for them, and does so again after a minute
    /// if they do not come. Leave it out of the next hints when they have.
    pub fn want(&mut self, blocks: u32) {
        self.wanted_blocks = blocks;
    }

    /// What was added, in order.
    pub fn ranges(&self) -> &[(Cost, BlockRange)] {
        &self.ranges
    }

    /// As the file will say it: see [`crate::format`].
    pub fn text(&self) -> String {
        format::text(&self.ranges, self.wanted_blocks)
    }
}

/// A program's hint file for one disk.
///
/// It stays when the program ends: nobody uses then what the program has forgotten. The next run of the program takes it back
/// when it opens it.
#[derive(Debug)]
pub struct HintFile {
    path: PathBuf,
    aside: PathBuf,
}

impl HintFile {
    /// The file of `program` in `dir`, which is the directory of one disk; [`crate::Disk::hint_file`] knows the usual one. Whatever
    /// the program had hinted before is taken back.
    ///
    /// # Errors
    /// [`Error::Name`] unless `program` can be a file's name here, [`Error::NoDirectory`] when no agent is there to look for hints,
    /// [`Error::Io`] when this program may not write there.
    pub fn open(dir: &Path, program: &str) -> Result<Self> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if program.is_empty()
            || program.len() > NAME_LEN
            || program.starts_with('.')
            || !program.bytes().all(is_plain)
        {
            return Err(Error::Name { name: program.to_owned() });
        }
        if !dir.is_dir() {
            return Err(Error::NoDirectory { dir: dir.to_owned() });
        }
        // The agent passes over names that begin with a dot.
        let aside = dir.join(format!(".{program}.{}", process::id()));
        let mut file = Self { path: dir.join(program), aside };
        file.withdraw()?;
        Ok(file)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Puts `hints` in the place of those before. From now on what they name may go.
    ///
    /// # Errors
    /// [`Error::TooLarge`], or [`Error::Io`]; the hints before stay then.
    pub fn publish(&mut self, hints: &Hints) -> Result<()> {
        let text = hints.text();
        if text.len() > MOST_BYTES {
            return Err(Error::TooLarge { len: text.len(), most: MOST_BYTES });
        }
        let written = self.make_aside().and_then(|mut file| file.write_all(text.as_bytes()));
        written.and_then(|()| fs::rename(&self.aside, &self.path)).map_err(|source| {
            let _ = fs::remove_file(&self.aside);
            Error::io("write", &self.path, source)
        })
    }

    /// Takes all hints back. The agent may have read them just before: see the contract at the top of [`crate`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn withdraw(&mut self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove", &self.path, error))
            }
            _ => Ok(()),
        }
    }

    /// A new file that is nobody else's: what has the name already is a left-over, or was put there to be written through.
    fn make_aside(&self) -> io::Result<File> {
        let make = || OpenOptions::new().write(true).create_new(true).mode(0o644).open(&self.aside);
        make().or_else(|error| {
            if error.kind() != io::ErrorKind::AlreadyExists {
                return Err(error);
            }
            fs::remove_file(&self.aside)?;
            make()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn some() -> Hints {
        let mut hints = Hints::new();
        hints.push(Cost::Free, BlockRange::new(9, 0));
        hints.push(Cost::Free, BlockRange::new(5, 2));
        hints.push(Cost::Free, BlockRange::new(7, 1));
        hints.push(Cost::CleanCold, BlockRange::new(8, 1));
        hints.want(3);
        hints
    }

    #[test]
    fn hints_are_published_whole_and_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cache"), "1 1\n").unwrap();
        let mut file = HintFile::open(dir.path(), "cache").unwrap();
        assert!(!file.path().exists(), "hints of an earlier run are taken back");
        file.withdraw().unwrap();
        file.publish(&some()).unwrap();
        assert_eq!(
            fs::read_to_string(file.path()).unwrap(),
            "want 3\ncost free\n5 3\ncost clean-cold\n8 1\n"
        );
        file.publish(&Hints::new()).unwrap();
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "");
        file.withdraw().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left aside");
    }

    #[test]
    fn what_lies_in_the_way_is_not_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        fs::write(&victim, "mine").unwrap();
        let mut file = HintFile::open(dir.path(), "cache").unwrap();
        symlink(&victim, &file.aside).unwrap();
        file.publish(&some()).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "mine");
        assert!(!fs::symlink_metadata(file.path()).unwrap().is_symlink());
    }

    #[test]
    fn what_cannot_be_published_leaves_the_hints_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = HintFile::open(dir.path(), "cache").unwrap();
        file.publish(&some()).unwrap();
        let mut many = Hints::new();
        for block in 0..500_000 {
            many.push(Cost::CleanCold, BlockRange::new(block * 2 + 1_000_000, 1));
        }
        assert_eq!(file.publish(&many).unwrap_err().code(), "E_TOO_LARGE");
        assert_eq!(fs::read_to_string(file.path()).unwrap(), some().text());
    }

    #[test]
    fn names_and_places_that_cannot_be_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let long = "x".repeat(NAME_LEN + 1);
        for name in ["", ".hidden", "a/b", "..", "a b", &long] {
            assert_eq!(HintFile::open(dir.path(), name).unwrap_err().code(), "E_NAME", "{name}");
        }
        let error = HintFile::open(&dir.path().join("none"), "cache").unwrap_err();
        assert_eq!(error.code(), "E_NO_AGENT");
        assert!(error.hint().contains("hint-files"));
    }
}
