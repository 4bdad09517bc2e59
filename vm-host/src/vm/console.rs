// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a guest says on its serial port, kept in a file of bounded size: a guest may say as much as it likes.
//!
//! The hypervisor serves the port on a socket. While nobody is connected, as when the daemon is restarted, what is said is lost.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, BorrowedFd};

/// What is kept is at most twice this: the file, and the one before it, `….old`.
const FILE: u64 = 1 << 20;
/// Read at a time, so that a guest that does nothing but speak does not keep its VM from hearing orders.
const CHUNK: usize = 64 << 10;

/// The console of a running machine.
#[derive(Debug)]
pub(super) struct Console {
    stream: UnixStream,
    path: PathBuf,
    file: File,
    length: u64,
    has_spoken: bool,
}

impl Console {
    /// Connects to a machine's serial port and appends to the log.
    pub(super) fn open(socket: &Path, log: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_nonblocking(true)?;
        let file = File::options().create(true).append(true).open(log)?;
        let length = file.metadata()?.len();
        Ok(Self { stream, path: log.to_owned(), file, length, has_spoken: false })
    }

    /// Readable when the guest has said something.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether anything was said since it was opened.
    pub(super) fn has_spoken(&self) -> bool {
        self.has_spoken
    }

    /// Writes down what has been said; never waits. False once there is nothing more to come.
    pub(super) fn write_down(&mut self) -> io::Result<bool> {
        let mut chunk = [0; CHUNK];
        let said = match self.stream.read(&mut chunk) {
            Ok(0) => return Ok(false),
            Ok(count) => &chunk[..count],
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(true);
            }
            Err(error) => return Err(error),
        };
        self.has_spoken = true;
        if self.length >= FILE {
            fs::rename(&self.path, self.path.with_extension("console.old"))?;
            self.file = File::options().create(true).append(true).open(&self.path)?;
            self.length = 0;
        }
        self.file.write_all(said)?;
        self.length += said.len() as u64;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    #[test]
    fn what_is_said_is_kept_up_to_a_limit_and_the_last_of_it_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let (socket, log) = (dir.path().join("s"), dir.path().join("vm.console"));
        let listener = UnixListener::bind(&socket).unwrap();
        let guest = thread::spawn(move || {
            let mut port = listener.accept().unwrap().0;
            (0..500_000).for_each(|line| writeln!(port, "line {line}").unwrap());
        });
        let mut console = Console::open(&socket, &log).unwrap();
        while console.write_down().unwrap() {
            thread::yield_now();
        }
        guest.join().unwrap();
        let old = fs::read_to_string(log.with_extension("console.old")).unwrap();
        let new = fs::read_to_string(&log).unwrap();
        assert!(old.len() as u64 <= FILE + CHUNK as u64 && new.len() as u64 <= FILE + CHUNK as u64);
        let all = old + &new;
        let kept: Vec<u32> =
            all.lines().skip(1).map(|line| line.strip_prefix("line ").unwrap().parse().unwrap()).collect();
        assert!(kept.windows(2).all(|pair| pair[0] + 1 == pair[1]));
        assert_eq!(kept.last(), Some(&499_999));
    }
}
