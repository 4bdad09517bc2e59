// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a hypervisor says, in a file of bounded size: a guest can make it complain as often as it likes.
//!
//! The hypervisor writes the file itself, since it goes on while no daemon is there. It appends, so what is in the file can be taken
//! away at any time. What it says between two looks is not bounded; the kernel tells of each change (inotify).

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

/// What is kept is about twice this: the file, and the end of the one before it, `….old`.
const FILE: u64 = 1 << 20;
/// For what the kernel tells, which is not looked at.
const ROOM: usize = 4096;

/// The log of a running hypervisor.
#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    changes: OwnedFd,
}

impl Log {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&changes, path, WatchFlags::MODIFY)?;
        let log = Self { path: path.to_owned(), changes };
        log.bound()?;
        Ok(log)
    }

    /// Readable when something was said.
    pub(super) fn changed(&self) -> BorrowedFd<'_> {
        self.changes.as_fd()
    }

    /// Takes away what is too much. What is said in this moment is lost.
    pub(super) fn bound(&self) -> io::Result<()> {
        match rustix::io::read(&self.changes, &mut [0; ROOM]) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let length = fs::metadata(&self.path)?.len();
        if length <= FILE {
            return Ok(());
        }
        let mut file = File::options().read(true).write(true).open(&self.path)?;
        file.seek(SeekFrom::Start(length - FILE))?;
        let mut last = Vec::new();
        (&mut file).take(FILE).read_to_end(&mut last)?;
        let kept = fs::write(self.path.with_extension("log.old"), last);
        // Above all where the disk is full.
        file.set_len(0)?;
        kept
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    #[test]
    fn what_is_said_is_kept_up_to_a_limit_and_the_last_of_it_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.b.log");
        let mut hypervisor = File::options().create(true).append(true).open(&path).unwrap();
        let log = Log::open(&path).unwrap();
        let is_told = |log: &Log| {
            let soon = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::from_borrowed_fd(log.changed(), PollFlags::IN)], Some(&soon)).unwrap() == 1
        };
        assert!(!is_told(&log));
        for line in 0..400_000 {
            writeln!(hypervisor, "line {line}").unwrap();
            if line % 1000 == 0 {
                assert!(is_told(&log));
                log.bound().unwrap();
            }
        }
        let old = fs::read_to_string(dir.path().join("a.b.log.old")).unwrap();
        let new = fs::read_to_string(&path).unwrap();
        assert!(old.len() as u64 == FILE && new.len() as u64 <= FILE + 20_000);
        let all = old + &new;
        let kept: Vec<u32> =
            all.lines().skip(1).map(|line| line.strip_prefix("line ").unwrap().parse().unwrap()).collect();
        assert!(kept.windows(2).all(|pair| pair[0] + 1 == pair[1]));
        assert_eq!(kept.last(), Some(&399_999));
        // What was said while nobody looked is found at the next opening.
        hypervisor.write_all(&vec![b'x'; 3 << 20]).unwrap();
        Log::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    }
}
