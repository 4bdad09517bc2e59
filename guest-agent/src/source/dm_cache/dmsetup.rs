// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Running `dmsetup`, each time for a bounded time. It knows commands and what they print, and no caches' sizes.
//!
//! No call leaves a device suspended while this process works: a table is loaded beside the live one, and one `dmsetup resume`
//! then lets the kernel drain the I/O in flight, change the tables and go on, all within one system call. So nothing of this process has
//! to be in memory while I/O waits (`mlockall` would be of no use), and it can be killed between any two calls.

use std::io::{self, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tracing::debug;

use super::error::CacheError;
use super::text::{CacheStatus, INFO_FIELDS, View};

const PROGRAM: &str = "dmsetup";
/// For what only asks or prepares.
const SHORT: Duration = Duration::from_secs(15);
/// For what waits for I/O in flight, or for others to let go of a device.
const LONG: Duration = Duration::from_secs(60);

type Result<T> = std::result::Result<T, CacheError>;

/// Every device, with its live table. Asked again when one has gone between being listed and being looked at.
pub(super) fn view() -> Result<View> {
    const TRIES: u32 = 4;
    let mut tries = 1;
    loop {
        match try_view() {
            Err(CacheError::Refused { .. }) if tries < TRIES => tries += 1,
            other => return other,
        }
    }
}

fn try_view() -> Result<View> {
    let info = run(&["info", "-c", "--noheadings", "--separator", "/", "-o", INFO_FIELDS], SHORT)?;
    let table = run(&["table"], SHORT)?;
    View::parse(&info, &table).ok_or_else(|| odd("table", &format!("{info}{table}")))
}

/// The number of a device, `254:3`.
pub(super) fn number(device: &str) -> Result<String> {
    let said = run(&["info", "-c", "--noheadings", "-o", "devno", device], SHORT)?;
    Ok(said.trim().to_owned())
}

/// What a cache says of itself, when its metadata as of now is durable: asking commits it.
pub(super) fn committed_status(cache: &str) -> Result<CacheStatus> {
    status(&["status", cache])
}

/// The same, without waiting for its metadata.
pub(super) fn quick_status(cache: &str) -> Result<CacheStatus> {
    status(&["status", "--noflush", cache])
}

fn status(args: &[&str]) -> Result<CacheStatus> {
    let said = run(args, SHORT)?;
    CacheStatus::parse(&said).ok_or_else(|| odd("status", &said))
}

/// Puts a table beside the live one.
pub(super) fn load(device: &str, table: &str) -> Result<()> {
    run(&["load", device, "--table", table], SHORT).map(drop)
}

/// Drops a table that was put beside the live one.
pub(super) fn clear(device: &str) -> Result<()> {
    run(&["clear", device], SHORT).map(drop)
}

/// Waits for the I/O in flight, lets the loaded table take the place of the live one, and goes on. A file system is not frozen for it:
/// what it sees of the device does not change.
pub(super) fn resume(device: &str) -> Result<()> {
    run(&["resume", "--nolockfs", "--noudevsync", device], LONG).map(drop)
}

pub(super) fn create(device: &str, table: &str) -> Result<()> {
    run(&["create", device, "--noudevsync", "--table", table], SHORT).map(drop)
}

/// Removes a device. udev looks at new ones for a moment.
pub(super) fn remove(device: &str) -> Result<()> {
    run(&["remove", "--retry", "--noudevsync", device], LONG).map(drop)
}

pub(super) fn rename(device: &str, name: &str) -> Result<()> {
    run(&["rename", "--noudevsync", device, name], SHORT).map(drop)
}

fn odd(command: &str, said: &str) -> CacheError {
    CacheError::Refused {
        command: command.to_owned(),
        said: format!("it says what is not understood: {said}"),
    }
}

fn run(args: &[&str], limit: Duration) -> Result<String> {
    let command = || args.join(" ");
    debug!(command = command(), "dmsetup");
    let mut child = Command::new(PROGRAM)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| CacheError::NoProgram { source })?;
    match collect(&mut child, limit) {
        Ok(Some(said)) if said.success => Ok(said.out),
        Ok(Some(said)) => {
            // Its last line only says that it failed.
            let lines: Vec<_> =
                said.err.lines().map(str::trim).filter(|line| *line != "Command failed.").collect();
            Err(CacheError::Refused { command: command(), said: lines.join("; ") })
        }
        Ok(None) => Err(CacheError::Slow { command: command(), seconds: limit.as_secs() }),
        Err(error) => Err(CacheError::Refused { command: command(), said: error.to_string() }),
    }
}

struct Said {
    success: bool,
    out: String,
    err: String,
}

/// All that it prints, and how it ends. `None`: it was stopped because the time was up. One that waits in the kernel for I/O stops
/// waiting then, and leaves its device as it was; one that cannot even be stopped is left behind.
fn collect(child: &mut Child, limit: Duration) -> io::Result<Option<Said>> {
    let deadline = Instant::now() + limit;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let (mut said_out, mut said_err) = (Vec::new(), Vec::new());
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            child.kill()?;
            // Reaped if it ends at once; else it is init's some day.
            let mut fds = [PollFd::new(&ended, PollFlags::IN)];
            if poll(&mut fds, Some(&timespec(Duration::from_secs(1))))? > 0 {
                child.wait()?;
            }
            return Ok(None);
        }
        let (out_open, err_open) = (out.is_some(), err.is_some());
        let mut fds = Vec::with_capacity(2);
        fds.extend(out.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        fds.extend(err.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        if fds.is_empty() {
            fds.push(PollFd::new(&ended, PollFlags::IN));
        }
        match poll(&mut fds, Some(&timespec(left))) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let is_ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        match (out_open, err_open) {
            (false, false) if is_ready[0] => {
                let success = child.wait()?.success();
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                return Ok(Some(Said { success, out: text(&said_out), err: text(&said_err) }));
            }
            (false, false) => {}
            (true, _) if is_ready[0] => read_some(&mut out, &mut said_out)?,
            (true, true) if is_ready[1] => read_some(&mut err, &mut said_err)?,
            (false, true) if is_ready[0] => read_some(&mut err, &mut said_err)?,
            _ => {}
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}

/// Reads what is there; at its end the pipe is dropped.
fn read_some<P: Read>(pipe: &mut Option<P>, said: &mut Vec<u8>) -> io::Result<()> {
    let mut bytes = [0; 4096];
    let count = match pipe {
        Some(pipe) => pipe.read(&mut bytes)?,
        None => 0,
    };
    said.extend_from_slice(&bytes[..count]);
    if count == 0 {
        *pipe = None;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Option<Said> {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        collect(&mut command.spawn().unwrap(), limit).unwrap()
    }

    #[test]
    fn both_of_its_pipes_are_read_to_the_end() {
        // More than a pipe holds, of both, in turn.
        let script = "i=0; while [ $i -lt 3000 ]; do echo 0123456789012345678901234567890123456789; \
            echo 01234567890123456789 >&2; i=$((i+1)); done; exit 3";
        let said = shell(script, Duration::from_secs(30)).unwrap();
        assert!(!said.success);
        assert_eq!((said.out.len(), said.err.len()), (3000 * 41, 3000 * 21));
        assert!(shell("exec >&- 2>&-; sleep 0.05; exit 0", Duration::from_secs(30)).unwrap().success);
    }

    #[test]
    fn what_does_not_end_is_stopped() {
        let start = Instant::now();
        assert!(shell("exec sleep 60", Duration::from_millis(50)).is_none());
        assert!(shell("exec >&- 2>&-; exec sleep 60", Duration::from_millis(50)).is_none());
        assert!(start.elapsed() < Duration::from_secs(20));
    }
}
