// SPDX-License-Identifier: Apache-2.0 OR MIT

//! SIGPWR, by which daemons of UPSes have told init of power for decades, heard through a signalfd.
//!
//! The signal says that something changed, a file says what, as sysvinit has it: `/run/powerstatus` (or `/etc/powerstatus`)
//! begins with `F` (failed), `L` (low battery) or `O` (OK). Where there is no file, the signal means a failure: on battery. So it does
//! where the file is older than a minute: nothing but init removes it, and what is left from last year says nothing about
//! now. Init, not this daemon, owns the file: it is only read.
//!
//! A signal is sent to a process, not to a thread: [`block`] must be called before the first thread starts, since one thread that
//! does not block the signal is killed by it, and the process with it.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::{Reporter, Woken};
use crate::power::observation::Kind;

/// The content of an older file is not believed.
const FRESH: Duration = Duration::from_secs(60);

/// Blocks SIGPWR in this thread and in all that it starts from now on. For `main`, before any thread.
pub fn block() -> io::Result<()> {
    let set = sigpwr();
    // SAFETY: the set is initialised and outlives the call; the former mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// A set with nothing but SIGPWR.
fn sigpwr() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, so sigaddset gets one that is; neither fails for a signal that there is.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGPWR);
        set.assume_init()
    }
}

/// A signalfd for SIGPWR.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Fails where SIGPWR is not blocked: it would end the process.
    pub fn open() -> io::Result<Self> {
        let set = sigpwr();
        if !is_blocked()? {
            return Err(io::Error::other("SIGPWR is not blocked: it would end the process"));
        }
        // SAFETY: the set is initialised and outlives the call.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor, which nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes all signals that have come.
    fn drain(&self) -> io::Result<()> {
        let mut buffer = [0; size_of::<libc::signalfd_siginfo>()];
        loop {
            match rustix::io::read(&self.0, &mut buffer) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn is_blocked() -> io::Result<bool> {
    let mut mask = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: without a new set, the call only writes the mask of this thread.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), mask.as_mut_ptr()) } {
        0 => {}
        errno => return Err(io::Error::from_raw_os_error(errno)),
    }
    // SAFETY: the call above succeeded, so it wrote the mask.
    Ok(unsafe { libc::sigismember(mask.as_ptr(), libc::SIGPWR) } == 1)
}

/// Says what signals say, until told to stop.
pub fn run(reporter: &Reporter, signals: &Signals, files: &[PathBuf]) {
    loop {
        let outcome = match reporter.stop().wait(&[(signals.0.as_fd(), PollFlags::IN)], None) {
            Ok(Woken::Stopped) => return,
            Ok(_) => signals.drain(),
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => reporter.say(meaning(files, SystemTime::now())),
            Err(error) => {
                reporter.lost(format!("signals cannot be read any more: {error}"));
                return;
            }
        }
    }
}

/// What a signal that came now is about.
fn meaning(files: &[PathBuf], now: SystemTime) -> Kind {
    const FAILED: Kind = Kind::OnBattery { runtime_left_ms: None };
    let Some(mut file) = files.iter().find_map(|path| File::open(path).ok()) else { return FAILED };
    // A file of the future is as good as a new one: the clock was set.
    let changed = file.metadata().and_then(|metadata| metadata.modified());
    let fresh = changed
        .is_ok_and(|changed| now.duration_since(changed).is_ok_and(|age| age <= FRESH) || changed > now);
    let mut byte = [0];
    match file.read(&mut byte) {
        Ok(1) if fresh => match byte[0] {
            b'O' | b'o' => Kind::Online,
            b'L' | b'l' => Kind::LowBattery,
            _ => FAILED,
        },
        _ => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use super::*;
    use crate::power::sources::spawn;
    use crate::power::sources::testkit::{end, median, next, reporter};

    const BATTERY: Kind = Kind::OnBattery { runtime_left_ms: None };

    #[test]
    fn file_says_what_the_signal_is_about_unless_it_is_old() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("powerstatus");
        let files = [dir.path().join("absent"), path.clone()];
        assert_eq!(meaning(&files, SystemTime::now()), BATTERY);
        for (content, kind) in [
            ("OK\n", Kind::Online),
            ("LOW\n", Kind::LowBattery),
            ("FAIL\n", BATTERY),
            ("", BATTERY),
            ("?", BATTERY),
        ] {
            fs::write(&path, content).unwrap();
            assert_eq!(meaning(&files, SystemTime::now()), kind, "{content:?}");
        }
        fs::write(&path, "OK").unwrap();
        assert_eq!(meaning(&files, SystemTime::now() + FRESH + Duration::from_secs(2)), BATTERY);
    }

    /// One test, since the signal is the whole process's. It is sent to the thread that waits, for the test runner's other threads
    /// do not block it.
    #[test]
    fn signal_is_heard_within_microseconds_and_needs_to_be_blocked() {
        assert!(Signals::open().unwrap_err().to_string().contains("not blocked"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("powerstatus");
        let files = [path.clone()];
        let (reporter, receiver) = reporter("signal");
        let (tell, told) = std::sync::mpsc::channel();
        let thread = spawn(&reporter, move |reporter| {
            block().unwrap();
            let signals = Signals::open().unwrap();
            tell.send(rustix::thread::gettid()).unwrap();
            run(reporter, &signals, &files);
        })
        .unwrap();
        let tid = told.recv().unwrap().as_raw_nonzero().get();
        let signal = || {
            // SAFETY: tgkill takes plain numbers and touches no memory.
            let done = unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, libc::SIGPWR) };
            assert_eq!(done, 0);
        };
        signal();
        assert_eq!(next(&receiver), BATTERY);
        let mut times = Vec::new();
        for round in 0..200 {
            let (content, kind) = if round % 2 == 0 { ("O", Kind::Online) } else { ("L", Kind::LowBattery) };
            fs::write(&path, content).unwrap();
            std::thread::sleep(Duration::from_millis(2));
            let start = Instant::now();
            signal();
            assert_eq!(next(&receiver), kind);
            times.push(start.elapsed());
        }
        let median = median(times);
        println!("signal: {median:?} from the signal to the observation, median of 200");
        assert!(median < Duration::from_millis(5), "{median:?}");
        end(&reporter, thread);
    }
}
