// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Reads the hint files of one disk. They are other programs', so nothing is believed of them: what cannot be a hint file is not
//! opened or not read, and costs its writer a complaint and nobody else anything.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Dir, FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use vssd_client::Cost;
use vssd_client::format::{self, MOST_BYTES};
use vssd_protocol::units::BlockRange;

use super::wish::Want;
use crate::error::{AgentError, Result};

/// So many programs may have hints for a disk, in the order of their files' names.
const MOST_FILES: usize = 32;
/// So many names are looked at.
const MOST_NAMES: usize = 1024;
/// All files together: what is read of them is in memory at once.
const MOST_TOGETHER: usize = 8 * MOST_BYTES;

/// What is in a directory of hint files.
#[derive(Debug, Default)]
pub(super) struct Folder {
    /// In the order of their names.
    pub(super) files: Vec<HintFile>,
    /// Of files that are left out, or read in part.
    pub(super) complaints: Vec<AgentError>,
}

/// What one program says.
#[derive(Debug)]
pub(super) struct HintFile {
    /// Most expendable first.
    pub(super) ranges: Vec<(Cost, BlockRange)>,
    pub(super) want: Option<Want>,
}

/// Reads all files of a directory, which need not be there.
pub(super) fn read(dir: &Path, total: u32) -> Result<Folder> {
    read_bounded(dir, total, MOST_TOGETHER)
}

fn read_bounded(dir: &Path, total: u32, most: usize) -> Result<Folder> {
    let mut folder = Folder::default();
    let Some(fd) = open_dir(dir)? else { return Ok(folder) };
    let mut names = names(dir, &fd)?;
    for name in names.split_off(names.len().min(MOST_FILES)) {
        folder.complain(&dir.join(name), format!("there are more than {MOST_FILES} files"));
    }
    let mut left = most;
    for name in names {
        let path = dir.join(&name);
        match read_file(&fd, &path, &name, total, &mut left) {
            Ok((file, fault)) => {
                folder.files.push(file);
                if let Some(fault) = fault {
                    folder.complain(&path, format!("{fault}; what follows is passed over"));
                }
            }
            // Replaced or removed just now.
            Err(Fault::Gone) => {}
            Err(Fault::Wrong(what)) => folder.complain(&path, what),
            Err(Fault::Io(errno)) => folder.complaints.push(AgentError::io("read", &path, errno)),
        }
    }
    Ok(folder)
}

impl Folder {
    fn complain(&mut self, path: &Path, what: String) {
        self.complaints.push(AgentError::Hints { path: path.to_owned(), what });
    }
}

/// `None`: there is none.
fn open_dir(dir: &Path) -> Result<Option<OwnedFd>> {
    let wrong = |what: &str| AgentError::Hints { path: dir.to_owned(), what: what.to_owned() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match openat(CWD, dir, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::NOTDIR | Errno::LOOP) => return Err(wrong("this is no directory")),
        Err(errno) => return Err(AgentError::io("open", dir, errno)),
    };
    let stat = fstat(&fd).map_err(|errno| AgentError::io("look at", dir, errno))?;
    // Who may write here can give any block of the disk away, so that must be somebody's decision.
    if stat.st_mode & 0o002 != 0 {
        return Err(wrong("everybody may write in this directory"));
    }
    if stat.st_uid != 0 && stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(wrong("this directory is not root's"));
    }
    Ok(Some(fd))
}

/// The names of what may be hint files, in order.
fn names(dir: &Path, fd: &OwnedFd) -> Result<Vec<PathBuf>> {
    let failed = |errno| AgentError::io("list", dir, errno);
    let mut names = Vec::new();
    for entry in Dir::read_from(fd).map_err(failed)?.take(MOST_NAMES) {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_bytes();
        if !name.starts_with(b".") {
            names.push(PathBuf::from(OsStr::from_bytes(name)));
        }
    }
    names.sort();
    Ok(names)
}

/// Why a file is not read.
enum Fault {
    Gone,
    Wrong(String),
    Io(Errno),
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT => Self::Gone,
            Errno::LOOP => Self::Wrong("it is a symbolic link".to_owned()),
            // A socket.
            Errno::NXIO => Self::Wrong("it is no regular file".to_owned()),
            other => Self::Io(other),
        }
    }
}

/// Reads a file of at most `left` bytes, and takes off what it read.
fn read_file(
    dir: &OwnedFd,
    path: &Path,
    name: &Path,
    total: u32,
    left: &mut usize,
) -> std::result::Result<(HintFile, Option<format::Fault>), Fault> {
    // A pipe or a device must not keep the agent waiting, nor become its terminal.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = openat(dir, name, flags, Mode::empty())?;
    let stat = fstat(&fd)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Fault::Wrong("it is no regular file".to_owned()));
    }
    // A second name for somebody else's file would put lines of it into the log.
    if stat.st_nlink > 1 {
        return Err(Fault::Wrong("it has other names".to_owned()));
    }
    let most = MOST_BYTES.min(*left);
    let mut text = Vec::new();
    // It may grow while it is read.
    let read = File::from(fd).take(most as u64 + 1).read_to_end(&mut text);
    read.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    if text.len() > most {
        let what = match most {
            MOST_BYTES => format!("it has more than {MOST_BYTES} bytes"),
            _ => format!("with it all files have more than {MOST_TOGETHER} bytes"),
        };
        return Err(Fault::Wrong(what));
    }
    *left -= text.len();
    let list = format::parse(&text, total);
    let want = (list.wanted_blocks > 0).then(|| Want {
        path: path.to_owned(),
        version: (stat.st_ino, stat.st_ctime, stat.st_ctime_nsec),
        blocks: list.wanted_blocks,
    });
    let ranges =
        list.ranges.iter().map(|(cost, range)| (*cost, BlockRange::new(range.start, range.count))).collect();
    Ok((HintFile { ranges, want }, list.fault))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    fn said(folder: &Folder) -> Vec<String> {
        folder.complaints.iter().map(AgentError::message).collect()
    }

    fn starts(folder: &Folder) -> Vec<Vec<u32>> {
        folder.files.iter().map(|file| file.ranges.iter().map(|(_, range)| range.start).collect()).collect()
    }

    #[test]
    fn what_is_no_hint_file_is_left_out_and_the_others_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), "1 1\n").unwrap();
        fs::write(path("b"), "2 1\n3 1").unwrap();
        fs::write(path(".c"), "4 1\n").unwrap();
        symlink(path("a"), path("d")).unwrap();
        fs::create_dir(path("e")).unwrap();
        fs::write(path("f"), "5 1\n").unwrap();
        fs::hard_link(path("f"), path(".f")).unwrap();
        rustix::fs::mknodat(CWD, path("g"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        let _socket = UnixListener::bind(path("h")).unwrap();
        fs::write(path("i"), "#".repeat(MOST_BYTES + 1)).unwrap();
        fs::write(path("j"), format!("6 1\n{}\n", "#".repeat(MOST_BYTES - 5))).unwrap();
        let folder = read(dir.path(), 100).unwrap();
        assert_eq!(starts(&folder), [vec![1], vec![2], vec![6]]);
        let words = [
            "b: line 2",
            "d: it is a symbolic",
            "e: it is no",
            "f: it has other",
            "g: it is no",
            "h: it is no",
            "i: it has more",
        ];
        let complaints = said(&folder);
        assert_eq!(complaints.len(), words.len(), "{complaints:?}");
        for (complaint, word) in complaints.iter().zip(words) {
            assert!(complaint.contains(word), "{complaint}: {word}");
        }
    }

    #[test]
    fn more_files_or_bytes_than_are_read_are_named() {
        let dir = tempfile::tempdir().unwrap();
        for index in 0..MOST_FILES + 2 {
            fs::write(dir.path().join(format!("{index:03}")), format!("{index} 1\n")).unwrap();
        }
        let folder = read(dir.path(), 100).unwrap();
        assert_eq!(folder.files.len(), MOST_FILES);
        let complaints = said(&folder);
        assert!(complaints.len() == 2 && complaints[1].contains("033: there are more than 32 files"));
        let folder = read_bounded(dir.path(), 100, 11).unwrap();
        assert_eq!(starts(&folder), [vec![0], vec![1]]);
        assert!(said(&folder).iter().any(|complaint| complaint.contains("002: with it all files")));
    }

    #[test]
    fn a_directory_that_everybody_may_write_in_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("vssda");
        assert_eq!(read(&inner, 100).unwrap().files.len(), 0, "it need not be there");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("a"), "1 1\n").unwrap();
        for (mode, good) in [(0o755, true), (0o775, true), (0o757, false), (0o1777, false)] {
            fs::set_permissions(&inner, Permissions::from_mode(mode)).unwrap();
            let outcome = read(&inner, 100);
            assert_eq!(outcome.is_ok(), good, "{mode:o}: {outcome:?}");
            assert!(good || outcome.unwrap_err().code() == "E_HINTS");
        }
        fs::set_permissions(&inner, Permissions::from_mode(0o755)).unwrap();
        symlink(&inner, dir.path().join("vssdb")).unwrap();
        assert_eq!(read(&dir.path().join("vssdb"), 100).unwrap_err().code(), "E_HINTS");
    }

    #[test]
    fn a_wish_is_known_by_the_version_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let wish = || read(dir.path(), 100).unwrap().files.remove(0).want;
        fs::write(&path, "1 1\n").unwrap();
        assert_eq!(wish(), None);
        fs::write(&path, "want 5\n").unwrap();
        let first = wish().unwrap();
        assert_eq!((first.blocks, Some(&first)), (5, wish().as_ref()));
        fs::write(dir.path().join(".a"), "want 5\n").unwrap();
        fs::rename(dir.path().join(".a"), &path).unwrap();
        assert_ne!(wish().unwrap(), first);
    }
}
