// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `events` and `logs`: what has happened, and what is said meanwhile.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use control_client::{Error, NOTHING, Output, Result, Session, event_details, print_events};
use serde::Deserialize;
use serde_json::Value;
use vm_host::wire::{Event, ServerInfo};
use vssd_protocol::control::is_valid_name;

/// Where logs are when there is no daemon to ask.
const USUAL_LOG_DIR: &str = "/var/log/vm-host";
/// How much of the end of a log is looked at for its last lines.
const TAIL: u64 = 1 << 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(250);

pub(super) fn run(session: &Session, follow: bool, since: Option<u64>, types: &[String]) -> Result<()> {
    print_events(session, follow, since, types, line)
}

/// Streams have no table: the columns are as wide as what usually stands in them.
fn line(out: &Output, raw: &Value) -> Result<String> {
    let event = Event::deserialize(raw).map_err(|err| Error::Protocol(format!("event: {err}")))?;
    let vm = event.vm.as_deref().unwrap_or(NOTHING);
    let details = event_details(out, &event.data);
    let text = format!("{}  {:>6}  {:<20}  {vm:<16}  {details}", event.time, event.seq, event.event);
    Ok(text.trim_end().to_owned())
}

pub(super) struct LogOptions {
    pub(super) console: bool,
    pub(super) lines: usize,
    pub(super) follow: bool,
}

pub(super) fn logs(session: &Session, name: &str, options: &LogOptions) -> Result<()> {
    // It becomes part of a path.
    if !is_valid_name(name) {
        return Err(Error::usage(format!("{name:?} is no name of a VM")));
    }
    let dir = match session.connect().and_then(|mut client| client.hello::<ServerInfo>()) {
        Ok(answer) => answer.typed.log_dir,
        Err(err) => {
            session.out.note(&format!("{err}; looking in {USUAL_LOG_DIR}"));
            PathBuf::from(USUAL_LOG_DIR)
        }
    };
    let path = dir.join(format!("{name}.{}", if options.console { "console" } else { "log" }));
    let cannot = |source| Error::Local { what: format!("cannot read {}", path.display()), source };
    let mut file = File::open(&path).map_err(cannot)?;
    let out = &session.out;
    let mut rest = tail(&mut file, options.lines).map_err(cannot)?;
    loop {
        // A guest may write what it likes: each line is cleaned for the terminal.
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            out.line(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']))?;
        }
        if !options.follow {
            if !rest.is_empty() {
                out.line(&String::from_utf8_lossy(&rest))?;
            }
            return Ok(());
        }
        if out.is_closed() {
            return Ok(());
        }
        thread::sleep(BETWEEN_LOOKS);
        more(&path, &mut file, &mut rest).map_err(cannot)?;
    }
}

/// The last lines of a file; leaves it at its end.
fn tail(file: &mut File, lines: usize) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let body = text.strip_suffix(b"\n").unwrap_or(&text);
    let begin = if lines == 0 {
        text.len()
    } else {
        let ends = body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
        ends.map(|(at, _)| at + 1).nth(lines - 1).unwrap_or(0)
    };
    Ok(text.split_off(begin))
}

/// What was written since. A file that has become shorter, or another, is read from its beginning.
fn more(path: &Path, file: &mut File, rest: &mut Vec<u8>) -> io::Result<()> {
    file.take(TAIL).read_to_end(rest)?;
    if let Ok(length) = path.metadata().map(|metadata| metadata.len())
        && length < file.stream_position()?
    {
        *file = File::open(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn last_lines_are_counted_from_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for (text, lines, expected) in [
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 2, "b\nc"),
            ("a\nb\n", 9, "a\nb\n"),
            ("a\nb\n", 0, ""),
            ("", 5, ""),
            ("\n\n", 1, "\n"),
        ] {
            std::fs::write(&path, text).unwrap();
            let found = tail(&mut File::open(&path).unwrap(), lines).unwrap();
            assert_eq!(String::from_utf8(found).unwrap(), expected, "{text:?} {lines}");
        }
    }

    #[test]
    fn what_follows_is_read_and_a_log_that_was_begun_anew_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "one\n").unwrap();
        let mut file = File::open(&path).unwrap();
        let mut rest = tail(&mut file, 5).unwrap();
        let mut writer = File::options().append(true).open(&path).unwrap();
        writer.write_all(b"two\n").unwrap();
        more(&path, &mut file, &mut rest).unwrap();
        assert_eq!(rest, b"one\ntwo\n");
        std::fs::write(&path, "3\n").unwrap();
        more(&path, &mut file, &mut rest).unwrap();
        more(&path, &mut file, &mut rest).unwrap();
        assert_eq!(rest, b"one\ntwo\n3\n");
    }
}
