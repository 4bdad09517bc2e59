// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A process that outlives this daemon, and that the next daemon must recognise.
//!
//! A number is not enough: after a while it is another process's. With the time at which the process began, as the
//! kernel counts it (`/proc/PID/stat`, field 22, proc(5)), and the boot in which that was, it is.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use serde::{Deserialize, Serialize};

/// What tells one process from all others, ever.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessId {
    pub pid: u32,
    /// Clock ticks between the boot and its beginning.
    pub began: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
}

/// A process, alive when this was made.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    fd: OwnedFd,
}

impl Process {
    /// The process that has this number now.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        let fd = pidfd_open(raw, PidfdFlags::empty())?;
        // What is read now is about the process of the descriptor: its number is not given away before it is reaped.
        let began = began(pid)?;
        Ok(Self { id: ProcessId { pid, began, boot: boot_id()? }, fd })
    }

    /// The process that was noted, if it is still there.
    pub fn find(noted: &ProcessId) -> io::Result<Option<Self>> {
        match Self::of_pid(noted.pid) {
            Ok(process) => Ok((process.id == *noted && !process.has_ended()).then_some(process)),
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Readable once the process has ended.
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub fn has_ended(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits for its end. False if it still runs after `limit`.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return false,
                Ok(_) => {
                    // Of a child of ours something is left to take away; of another's child it is not ours.
                    let _ =
                        waitid(WaitId::PidFd(self.fd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
                    return true;
                }
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    /// Kills it and waits for its end.
    pub fn kill(&self, limit: Duration) -> io::Result<bool> {
        match pidfd_send_signal(&self.fd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(self.wait(limit)),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Kills the process that was noted, if it is still there. True once it is not.
pub fn end(noted: &ProcessId, limit: Duration) -> io::Result<bool> {
    Process::find(noted)?.map_or(Ok(true), |process| process.kill(limit))
}

/// The boot that this is.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn began(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"))?;
    began_of(&stat)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a stat file without its fields"))
}

/// The name in parentheses may itself have spaces and parentheses: fields are counted from its end, where the third begins.
fn began_of(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(22 - 3)?.parse().ok()
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b) c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 2";
        assert_eq!(began_of(stat), Some(4711));
        assert_eq!(began_of("7 (a) S 1"), None);
    }

    #[test]
    fn a_process_is_found_until_it_ends_and_another_of_its_number_is_not_it() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of_pid(child.id()).unwrap();
        let id = process.id().clone();
        assert!(!process.has_ended());
        assert!(Process::find(&id).unwrap().is_some());
        let other = ProcessId { began: id.began + 1, ..id.clone() };
        assert!(Process::find(&other).unwrap().is_none());
        let earlier = ProcessId { boot: "another".to_owned(), ..id.clone() };
        assert!(Process::find(&earlier).unwrap().is_none());
        assert!(process.kill(Duration::from_secs(5)).unwrap());
        assert!(process.has_ended());
        assert!(Process::find(&id).unwrap().is_none());
        let _ = child.wait();
    }
}
