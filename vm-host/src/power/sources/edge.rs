// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A line that tells of power: a GPIO in sysfs, a FIFO or a character device that somebody writes to, or an inherited descriptor.
//! The fastest source there is, and the one for what nothing else knows. The operator's test trigger is one, too.
//!
//! ```text
//!   FIFO, pipe, socket, character device:   0 and 1 count at once; words end with a line feed
//!   sysfs file:                             read at the start, and again after each edge (POLLPRI)
//! ```
//!
//! | said | means |
//! |---|---|
//! | `1`, `online` | online |
//! | `battery` | on battery |
//! | `critical` | power failing |
//! | `0` | power failing, or on battery: what the configuration says of a low line |
//!
//! A FIFO outlives its writers; a pipe or socket whose other end has gone is lost. Of many words that come at once, the last one
//! counts. What is not understood is passed over, up to the next line feed.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::fs::OFlags;
use tracing::debug;

use super::{Backoff, Reporter, Woken};
use crate::power::config::{EdgeConfig, Low};
use crate::power::observation::Kind;

/// The longest word is shorter.
const LONGEST: usize = 16;
const RETRY: Duration = Duration::from_secs(1);
const RETRY_LIMIT: Duration = Duration::from_secs(30);

/// Where the words come from.
#[derive(Debug)]
pub enum Line {
    /// Opened anew when it is lost.
    Path(std::path::PathBuf),
    Descriptor(OwnedFd),
}

impl Line {
    /// Takes over what the configuration names.
    pub fn of(config: &EdgeConfig) -> io::Result<Self> {
        match (&config.path, config.fd) {
            (Some(path), _) => Ok(Self::Path(path.clone())),
            (None, Some(fd)) => inherit(fd).map(Self::Descriptor),
            (None, None) => Err(io::Error::new(ErrorKind::InvalidInput, "neither a path nor a descriptor")),
        }
    }
}

/// Takes over an inherited descriptor, which must be open.
fn inherit(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the operator names a descriptor that was inherited for this, so nobody else in this process owns it; it is borrowed only
    // for this call, which fails where it is not open.
    let copy = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
    // SAFETY: it is open, as the copy shows, and nobody else in this process owns it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(copy)
}

/// Says what the line says, until told to stop.
pub fn run(reporter: &Reporter, line: Line, low: Low) {
    let path = match line {
        Line::Path(path) => path,
        Line::Descriptor(fd) => {
            let ended = follow(reporter, File::from(fd), low);
            if let Err(error) = ended {
                reporter.lost(format!("the descriptor cannot be read any more: {error}"));
            }
            return;
        }
    };
    let mut backoff = Backoff::new(RETRY);
    loop {
        let outcome = open(&path).and_then(|file| {
            backoff.reset();
            follow(reporter, file, low)
        });
        match outcome {
            Ok(()) => return,
            Err(error) => reporter.lost(format!("{} cannot be read: {error}", path.display())),
        }
        if !matches!(reporter.stop().wait(&[], Some(backoff.step(RETRY_LIMIT))), Ok(Woken::TimedOut)) {
            return;
        }
    }
}

/// Opens it so that it cannot block. A FIFO is opened for writing, too: it then never ends, however its writers come and go.
fn open(path: &Path) -> io::Result<File> {
    let nonblock = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let fifo = std::fs::metadata(path)?.file_type().is_fifo();
    OpenOptions::new().read(true).write(fifo).custom_flags(nonblock).open(path)
}

/// Says what `file` says. Ends well only when it is told to stop.
fn follow(reporter: &Reporter, file: File, low: Low) -> io::Result<()> {
    if file.metadata()?.is_file() {
        follow_edges(reporter, &file, low)
    } else {
        follow_words(reporter, file, low)
    }
}

/// A file of sysfs: its content is what counts, an edge says that it changed.
fn follow_edges(reporter: &Reporter, file: &File, low: Low) -> io::Result<()> {
    loop {
        // Reading also takes note of all edges so far: one that comes later ends the wait.
        let mut content = [0; LONGEST];
        let length = file.read_at(&mut content, 0)?;
        let word = content[..length].trim_ascii();
        match understand(word, low) {
            Some(kind) => reporter.say(kind),
            None => reporter.complain(format!("says \"{}\"", word.escape_ascii())),
        }
        if reporter.stop().wait(&[(file.as_fd(), PollFlags::PRI)], None)? == Woken::Stopped {
            return Ok(());
        }
    }
}

fn follow_words(reporter: &Reporter, mut file: File, low: Low) -> io::Result<()> {
    let mut words = Words { low, ..Words::default() };
    let mut buffer = [0; 4096];
    loop {
        if reporter.stop().wait(&[(file.as_fd(), PollFlags::IN)], None)? == Woken::Stopped {
            return Ok(());
        }
        match file.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                let heard = words.take(&buffer[..length]);
                if let Some(kind) = heard.kind {
                    reporter.say(kind);
                }
                if let Some(garbage) = heard.garbage {
                    reporter.complain(format!("said \"{}\"", garbage.escape_ascii()));
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                debug!("nothing to read after all");
            }
            Err(error) => return Err(error),
        }
    }
}

/// What a piece of the stream said.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Heard {
    /// The last word that was understood.
    pub(super) kind: Option<Kind>,
    /// The last one that was not.
    garbage: Option<Vec<u8>>,
}

/// Finds words in a stream, however it is cut.
#[derive(Debug, Default)]
pub(super) struct Words {
    pub(super) low: Low,
    word: Vec<u8>,
    /// The word is too long to be one, so no more of it is kept.
    too_long: bool,
}

impl Words {
    pub(super) fn take(&mut self, bytes: &[u8]) -> Heard {
        let mut heard = Heard::default();
        for &byte in bytes {
            if self.word.is_empty() && matches!(byte, b'0' | b'1') {
                heard.kind = understand(&[byte], self.low);
            } else if matches!(byte, b'\n' | b'\r' | b' ' | b'\t' | 0) {
                let word = std::mem::take(&mut self.word);
                let too_long = std::mem::take(&mut self.too_long);
                match understand(&word, self.low) {
                    Some(kind) if !too_long => heard.kind = Some(kind),
                    _ if word.is_empty() => {}
                    _ => heard.garbage = Some(word),
                }
            } else if self.word.len() < LONGEST {
                self.word.push(byte);
            } else {
                self.too_long = true;
            }
        }
        heard
    }
}

fn understand(word: &[u8], low: Low) -> Option<Kind> {
    const BATTERY: Kind = Kind::OnBattery { runtime_left_ms: None };
    match word {
        b"1" | b"online" => Some(Kind::Online),
        b"battery" => Some(BATTERY),
        b"critical" => Some(Kind::PowerFailing),
        b"0" => Some(if low == Low::Critical { Kind::PowerFailing } else { BATTERY }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::power::sources::spawn;
    use crate::power::sources::testkit::{end, median, next, reporter, silent, until};

    const BATTERY: Kind = Kind::OnBattery { runtime_left_ms: None };

    #[test]
    fn fifo_tells_bytes_and_words_and_outlives_its_writers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("power");
        let (reporter, receiver) = reporter("edge");
        let line = Line::Path(path.clone());
        let thread = spawn(&reporter, |reporter| run(reporter, line, Low::Critical)).unwrap();
        assert_eq!(next(&receiver), Kind::Lost, "it is not there yet");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let mut told = 0;
        for (word, kind) in [
            ("battery\n", BATTERY),
            ("0", Kind::PowerFailing),
            ("1", Kind::Online),
            ("criti", Kind::Online),
            ("cal\n", Kind::PowerFailing),
            ("nonsense\nonline\n", Kind::Online),
        ] {
            let mut writer = OpenOptions::new().write(true).open(&path).unwrap();
            writer.write_all(word.as_bytes()).unwrap();
            drop(writer);
            if word == "criti" {
                silent(&receiver);
            } else {
                assert_eq!(next(&receiver), kind, "after {word:?}");
                told += 1;
            }
        }
        assert_eq!(told, 5);
        until("the complaint", || reporter.health().error.as_deref() == Some("said \"nonsense\""));
        end(&reporter, thread);
    }

    /// No machine has a GPIO to play with; the host name's file tells of changes in the same way (POLLPRI).
    #[test]
    fn file_is_read_again_after_each_edge() {
        const NAME: &str = "/proc/sys/kernel/hostname";
        // In a name space of this thread and of those that it starts.
        // SAFETY: without CLONE_FILES or CLONE_FS, nothing that other threads share is changed.
        if unsafe { libc::unshare(libc::CLONE_NEWUTS) } != 0 {
            println!("no edges were seen: {}", io::Error::last_os_error());
            return;
        }
        std::fs::write(NAME, "1").unwrap();
        let (reporter, receiver) = reporter("edge");
        let line = Line::Path(NAME.into());
        let (tell, told) = std::sync::mpsc::channel();
        let thread = spawn(&reporter, move |reporter| {
            tell.send(rustix::thread::gettid()).unwrap();
            run(reporter, line, Low::Critical);
        })
        .unwrap();
        assert_eq!(next(&receiver), Kind::Online);
        let mut times = Vec::new();
        for round in 0..100 {
            std::thread::sleep(Duration::from_millis(2));
            let (word, kind) = if round % 2 == 0 { ("0", Kind::PowerFailing) } else { ("1", Kind::Online) };
            let start = Instant::now();
            std::fs::write(NAME, word).unwrap();
            assert_eq!(next(&receiver), kind);
            times.push(start.elapsed());
        }
        println!("edge: {:?} from the edge of a file to the observation, median of 100", median(times));
        std::fs::write(NAME, "humbug").unwrap();
        until("the complaint", || reporter.health().error.as_deref() == Some("says \"humbug\""));
        // Such a file is always readable: waiting for that would be no waiting.
        let task = format!("/proc/self/task/{}/status", told.recv().unwrap().as_raw_nonzero());
        let sleeps = || {
            let status = std::fs::read_to_string(&task).unwrap();
            let line =
                |name| status.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
            (line("State:"), line("voluntary"), line("nonvoluntary"))
        };
        until("the end of the work", || sleeps().0.contains("sleeping"));
        let before = sleeps();
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(sleeps(), before);
        end(&reporter, thread);
    }

    #[test]
    fn pipe_whose_writer_has_gone_is_lost() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (reporter, receiver) = reporter("edge");
        let thread =
            spawn(&reporter, |reporter| run(reporter, Line::Descriptor(reader), Low::Battery)).unwrap();
        rustix::io::write(&writer, b"0").unwrap();
        assert_eq!(next(&receiver), BATTERY);
        drop(writer);
        assert_eq!(next(&receiver), Kind::Lost);
        end(&reporter, thread);
    }

    #[test]
    fn descriptor_that_is_not_open_is_refused() {
        let config =
            EdgeConfig { name: "x".into(), window_ms: None, path: None, fd: Some(9999), low: Low::Critical };
        assert!(Line::of(&config).is_err());
    }

    #[test]
    fn reaction_takes_microseconds() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (reporter, receiver) = reporter("edge");
        let thread =
            spawn(&reporter, |reporter| run(reporter, Line::Descriptor(reader), Low::Critical)).unwrap();
        let mut times = Vec::new();
        for round in 0..300 {
            // Nobody waits for power with its processor awake.
            std::thread::sleep(Duration::from_millis(2));
            let (byte, kind) = if round % 2 == 0 { (b"0", Kind::PowerFailing) } else { (b"1", Kind::Online) };
            let start = Instant::now();
            rustix::io::write(&writer, byte).unwrap();
            assert_eq!(next(&receiver), kind);
            times.push(start.elapsed());
        }
        let median = median(times);
        println!("edge: {median:?} from the write to the observation, median of 300");
        assert!(median < Duration::from_millis(5), "{median:?}");
        end(&reporter, thread);
    }

    proptest! {
        /// However a stream is cut, its last word is the one that splitting it by hand gives.
        #[test]
        fn words_are_found_however_the_stream_is_cut(
            words in prop::collection::vec(
                prop::sample::select(vec!["0", "1", "online", "battery", "critical", "10x", "criticalx", "x",
                    "onlineonlineonlineonline", "\u{e9}"]),
                1..20,
            ),
            cuts in prop::collection::vec(1usize..9, 1..10),
        ) {
            let stream = words.join("\n") + "\n";
            let mut found = Words::default();
            let (mut rest, mut last) = (stream.as_bytes(), None);
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                rest = after;
                last = found.take(piece).kind.or(last);
                if rest.is_empty() {
                    break;
                }
            }
            let expected = words.iter().rev().find_map(|word| match *word {
                "0" => Some(Kind::PowerFailing),
                // Two bits, and then something else.
                "10x" => Some(Kind::PowerFailing),
                "1" | "online" => Some(Kind::Online),
                "battery" => Some(BATTERY),
                "critical" => Some(Kind::PowerFailing),
                _ => None,
            });
            prop_assert_eq!(last, expected);
        }

        #[test]
        fn no_stream_makes_it_grow(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            let mut words = Words::default();
            words.take(&bytes);
            prop_assert!(words.word.len() <= LONGEST);
        }
    }
}
