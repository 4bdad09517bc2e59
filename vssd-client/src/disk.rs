// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The driver's files of one vSSD that anybody may read, `/proc/vssd/<disk>/`.
//!
//! Described in `guest-driver/Documentation/ABI/testing/procfs-vssd`. Writing to the driver is the agent's part.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::{Error, Result};
use crate::hints::HintFile;
use crate::{BlockRange, HINTS};

/// Where the driver's files are.
pub const PROC: &str = "/proc/vssd";
/// Longer than `request` is.
const REQUEST: usize = 512;

/// What the driver knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The host's name for the vSSD.
    pub name: String,
    /// Of the driver's session with the host.
    pub epoch: String,
    /// What the driver is doing: `idle`, `shrinking`, …
    pub state: String,
    /// Number of the host's newest news, in this session.
    pub seq: u64,
    /// Why the host asks: `none`, `operator`, …
    pub reason: String,
    /// Time that is left for it. 0: no limit.
    pub deadline_ms: u32,
    /// Bytes of a block: a power of two.
    pub block_size: u32,
    /// Blocks of the vSSD at its largest.
    pub total_blocks: u32,
    /// Blocks that the host would like the guest to hold.
    pub requested_blocks: u32,
    /// Blocks that the guest holds.
    pub plugged_blocks: u32,
    /// Blocks that are gone.
    pub evicted_blocks: u32,
}

impl Status {
    /// How many blocks the host still wants back.
    pub fn to_give(&self) -> u32 {
        self.plugged_blocks.saturating_sub(self.requested_blocks)
    }

    /// Reads the text of `/proc/vssd/<disk>/status`; keys that are not known are passed over. `None`: something is missing.
    pub fn parse(text: &str) -> Option<Self> {
        let fields = Fields::of(text);
        Some(Self {
            name: fields.get("name").unwrap_or_default(),
            epoch: fields.get("epoch")?,
            state: fields.get("state")?,
            seq: fields.get("seq")?,
            reason: fields.get("reason")?,
            deadline_ms: fields.get("deadline_ms")?,
            block_size: fields.get("block_size").filter(|size: &u32| size.is_power_of_two())?,
            total_blocks: fields.get("total_blocks")?,
            requested_blocks: fields.get("requested_blocks")?,
            plugged_blocks: fields.get("plugged_blocks")?,
            evicted_blocks: fields.get("evicted_blocks")?,
        })
    }
}

/// What the host asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Number of the host's newest news, in the driver's session with it.
    pub seq: u64,
    /// Blocks that the host would like the guest to hold.
    pub requested_blocks: u32,
    /// Blocks that the guest holds.
    pub plugged_blocks: u32,
    /// Blocks that are still to go. 0: the host asks for nothing, or has what it wanted.
    pub to_give_blocks: u32,
    /// The time that is left, if the host has set a limit.
    pub deadline: Option<Duration>,
    /// Why the host asks.
    pub reason: String,
}

impl Request {
    fn parse(text: &str) -> Option<Self> {
        let fields = Fields::of(text);
        let deadline_ms: u64 = fields.get("deadline_ms")?;
        Some(Self {
            seq: fields.get("seq")?,
            requested_blocks: fields.get("requested_blocks")?,
            plugged_blocks: fields.get("plugged_blocks")?,
            to_give_blocks: fields.get("to_give_blocks")?,
            deadline: (deadline_ms > 0).then(|| Duration::from_millis(deadline_ms)),
            reason: fields.get("reason")?,
        })
    }
}

/// Lines of a key and a value.
struct Fields<'a>(HashMap<&'a str, &'a str>);

impl<'a> Fields<'a> {
    fn of(text: &'a str) -> Self {
        Self(text.lines().filter_map(|line| line.split_once(' ')).collect())
    }

    fn get<T: FromStr>(&self, key: &str) -> Option<T> {
        self.0.get(key)?.parse().ok()
    }
}

/// The vSSDs of this guest.
pub fn list() -> Vec<String> {
    let entries = fs::read_dir(PROC).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// What the driver knows of the vSSD called `name`. Unlike [`Disk::open`] this is a look and nothing else.
///
/// # Errors
/// [`Error::NoDisk`] if there is none.
pub fn status(name: &str) -> Result<Status> {
    Files::of(Path::new(PROC), name)?.status()
}

/// The blocks of the vSSD called `name` that are gone, in ascending order.
///
/// # Errors
/// [`Error::NoDisk`] if there is none.
pub fn evicted(name: &str) -> Result<Vec<BlockRange>> {
    Files::of(Path::new(PROC), name)?.evicted()
}

/// Where the driver's files of a disk are.
#[derive(Debug)]
struct Files {
    name: String,
    dir: PathBuf,
}

impl Files {
    fn of(proc: &Path, name: &str) -> Result<Self> {
        let files = Self { name: name.to_owned(), dir: proc.join(name) };
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return Err(files.gone(io::ErrorKind::InvalidInput.into()));
        }
        Ok(files)
    }

    fn status(&self) -> Result<Status> {
        let text = fs::read_to_string(self.dir.join("status")).map_err(|error| self.gone(error))?;
        Status::parse(&text).ok_or_else(|| self.not_understood("status"))
    }

    fn evicted(&self) -> Result<Vec<BlockRange>> {
        let text = fs::read_to_string(self.dir.join("evicted")).map_err(|error| self.gone(error))?;
        parse_ranges(&text).ok_or_else(|| self.not_understood("evicted"))
    }

    fn gone(&self, source: io::Error) -> Error {
        Error::NoDisk { disk: self.name.clone(), source }
    }

    fn not_understood(&self, file: &str) -> Error {
        let what = format!("the driver's {file} is not understood");
        self.gone(io::Error::new(io::ErrorKind::InvalidData, what))
    }
}

/// A vSSD of this guest.
///
/// While a process with CAP_SYS_ADMIN has one open, the driver waits a moment for hints before it says to the host that there
/// are none.
#[derive(Debug)]
pub struct Disk {
    files: Files,
    request: File,
}

impl Disk {
    /// The vSSD called `name` in this guest (`vssda`).
    ///
    /// # Errors
    /// [`Error::NoDisk`] if there is none.
    pub fn open(name: &str) -> Result<Self> {
        Self::open_in(Path::new(PROC), name)
    }

    fn open_in(proc: &Path, name: &str) -> Result<Self> {
        let files = Files::of(proc, name)?;
        let request = File::open(files.dir.join("request")).map_err(|error| files.gone(error))?;
        Ok(Self { files, request })
    }

    /// Its name in this guest.
    pub fn name(&self) -> &str {
        &self.files.name
    }

    /// The driver's files of it.
    pub fn dir(&self) -> &Path {
        &self.files.dir
    }

    /// What the driver knows: also the size of a block and of the whole disk.
    ///
    /// # Errors
    /// [`Error::NoDisk`] if it has gone.
    pub fn status(&self) -> Result<Status> {
        self.files.status()
    }

    /// Bytes of a block. Constant.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn block_size(&self) -> Result<u32> {
        Ok(self.status()?.block_size)
    }

    /// Blocks of the vSSD at its largest; those of them that are gone are in [`Self::evicted`].
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn total_blocks(&self) -> Result<u32> {
        Ok(self.status()?.total_blocks)
    }

    /// What the host asks now. What changes from here on ends a wait.
    ///
    /// # Errors
    /// [`Error::NoDisk`] if the disk has gone.
    pub fn request(&self) -> Result<Request> {
        let mut buffer = [0; REQUEST];
        let len = self.request.read_at(&mut buffer, 0).map_err(|error| self.files.gone(error))?;
        let text = str::from_utf8(&buffer[..len]).ok();
        text.and_then(Request::parse).ok_or_else(|| self.files.not_understood("request"))
    }

    /// Waits for news: what the host asks, or that blocks have gone or come. Whether there are any; [`Self::request`] tells
    /// what, and until it is called there are.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn wait(&self, limit: Duration) -> Result<bool> {
        let begun = Instant::now();
        loop {
            // What is longer than can be said is for ever.
            let left = Timespec::try_from(limit.saturating_sub(begun.elapsed())).ok();
            match poll(&mut [PollFd::new(&self.request, PollFlags::PRI)], left.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Error::io("wait for", &self.files.dir.join("request"), errno)),
            }
        }
    }

    /// Waits for news and tells what the host asks then; `None` when none came in time. The first call returns at once.
    ///
    /// # Errors
    /// [`Error::NoDisk`] if the disk has gone, or [`Error::Io`].
    pub fn wait_request(&self, limit: Duration) -> Result<Option<Request>> {
        if self.wait(limit)? { self.request().map(Some) } else { Ok(None) }
    }

    /// The blocks that are gone, in ascending order.
    ///
    /// # Errors
    /// [`Error::NoDisk`] if the disk has gone.
    pub fn evicted(&self) -> Result<Vec<BlockRange>> {
        self.files.evicted()
    }

    /// This program's hint file for the disk, where the agent looks for it unless it is configured otherwise.
    ///
    /// # Errors
    /// Those of [`HintFile::open`].
    pub fn hint_file(&self, program: &str) -> Result<HintFile> {
        HintFile::open(&Path::new(HINTS).join(self.name()), program)
    }
}

fn parse_ranges(text: &str) -> Option<Vec<BlockRange>> {
    text.lines()
        .map(|line| {
            let (start, count) = line.split_once(' ')?;
            Some(BlockRange::new(start.parse().ok()?, count.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "name vm1\nepoch 12ab\nstate shrinking\nseq 7\nreason operator\ndeadline_ms 250\n\
        block_size 65536\ntotal_blocks 512\nmin_blocks 0\nrequested_blocks 100\nplugged_blocks 400\n\
        evicted_blocks 112\nsomething new\n";
    const ASKS: &str = "seq 7\nrequested_blocks 100\nplugged_blocks 400\nto_give_blocks 300\ndeadline_ms 250\n\
        reason operator\n";

    #[test]
    fn status_is_read_whatever_else_it_says() {
        let status = Status::parse(STATUS).unwrap();
        assert_eq!((status.name.as_str(), status.seq, status.to_give()), ("vm1", 7, 300));
        for key in ["state", "seq", "block_size", "total_blocks", "plugged_blocks"] {
            let without: Vec<_> = STATUS.lines().filter(|line| !line.starts_with(key)).collect();
            assert_eq!(Status::parse(&without.join("\n")), None, "{key}");
        }
        assert_eq!(Status::parse(&STATUS.replace("65536", "65535")), None);
        assert_eq!(
            Status::parse(&STATUS.replace("requested_blocks 100", "requested_blocks 500")).unwrap().to_give(),
            0
        );
    }

    #[test]
    fn evicted_blocks_are_read() {
        assert_eq!(parse_ranges("3 2\n9 1\n").unwrap(), [BlockRange::new(3, 2), BlockRange::new(9, 1)]);
        assert_eq!(parse_ranges(""), Some(Vec::new()));
        for bad in ["3", "a 1", "1 -1", "1  2"] {
            assert_eq!(parse_ranges(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_disk_says_what_is_in_its_files() {
        let proc = tempfile::tempdir().unwrap();
        let dir = proc.path().join("vssda");
        fs::create_dir(&dir).unwrap();
        for (file, text) in [("status", STATUS), ("request", ASKS), ("evicted", "400 112\n")] {
            fs::write(dir.join(file), text).unwrap();
        }
        let disk = Disk::open_in(proc.path(), "vssda").unwrap();
        assert_eq!((disk.block_size().unwrap(), disk.total_blocks().unwrap()), (65536, 512));
        assert_eq!(disk.evicted().unwrap(), [BlockRange::new(400, 112)]);
        let asks = disk.request().unwrap();
        assert_eq!((asks.to_give_blocks, asks.deadline), (300, Some(Duration::from_millis(250))));
        fs::write(dir.join("request"), ASKS.replace("250", "0").replace("300", "0")).unwrap();
        let asks = disk.request().unwrap();
        assert_eq!((asks.to_give_blocks, asks.deadline), (0, None));
        // An ordinary file never has news.
        assert_eq!(disk.wait_request(Duration::from_millis(1)).unwrap(), None);

        fs::write(dir.join("status"), "state idle\n").unwrap();
        fs::write(dir.join("request"), "seq 1\n").unwrap();
        fs::remove_file(dir.join("evicted")).unwrap();
        for error in [disk.status().unwrap_err(), disk.request().unwrap_err(), disk.evicted().unwrap_err()] {
            assert_eq!(error.code(), "E_NO_DISK");
        }
    }

    #[test]
    fn a_name_leads_nowhere_else() {
        let proc = tempfile::tempdir().unwrap();
        fs::create_dir(proc.path().join("vssda")).unwrap();
        fs::write(proc.path().join("request"), ASKS).unwrap();
        for name in ["", ".", "..", "vssda/..", "nothing"] {
            assert_eq!(Disk::open_in(proc.path(), name).unwrap_err().code(), "E_NO_DISK", "{name}");
        }
    }
}
