// SPDX-License-Identifier: Apache-2.0 OR MIT

//! QEMU's machine protocol (docs/interop/qmp-spec.rst in QEMU): one JSON object a line, events between answers, descriptors
//! beside a line.
//!
//! Every wait has an end: a QEMU whose main loop hangs (a disk that does not answer, memory that is not there) must cost its own
//! guest, not the daemon. Knows no command.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::fd::{AsFd, BorrowedFd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::vmm::VmmError;
use crate::vmm::program::connection;

/// No answer that is of use here comes near.
const LONGEST_LINE: usize = 4 << 20;
const CHUNK: usize = 16 << 10;
/// A guest can cause events at will; those that nobody took are dropped, the oldest first.
const KEPT_EVENTS: usize = 1024;

/// A connection that has been greeted and has left negotiation.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    received: Vec<u8>,
    /// How much of `received` is known to hold no end of line.
    searched: usize,
    events: VecDeque<Value>,
    /// `7.2.22`, from the greeting.
    version: String,
}

impl Qmp {
    /// Takes the greeting. QEMU sends it when its machine is there.
    pub fn new(stream: UnixStream, limit: Duration) -> Result<Self, VmmError> {
        let mut qmp = Self {
            stream,
            received: Vec::new(),
            searched: 0,
            events: VecDeque::new(),
            version: String::new(),
        };
        let greeting = qmp.message("its greeting", limit, Instant::now() + limit)?;
        let number = &greeting["QMP"]["version"]["qemu"];
        let Some([major, minor, micro]) = ["major", "minor", "micro"]
            .map(|part| number[part].as_u64())
            .into_iter()
            .collect::<Option<Vec<_>>>()
            .and_then(|parts| <[u64; 3]>::try_from(parts).ok())
        else {
            return Err(VmmError::Protocol(format!("not QEMU's greeting: {}", shown(&greeting))));
        };
        qmp.version = format!("{major}.{minor}.{micro}");
        qmp.call("qmp_capabilities", json!({}), limit)?;
        Ok(qmp)
    }

    pub fn version(&self) -> &str {
        &self.version
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Runs a command and gives what it returns.
    pub fn call(
        &mut self,
        command: &'static str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, VmmError> {
        self.send(command, arguments, None, limit)?;
        self.answer(command, limit)
    }

    /// The same, with a descriptor.
    pub fn call_with(
        &mut self,
        command: &'static str,
        arguments: Value,
        fd: BorrowedFd<'_>,
        limit: Duration,
    ) -> Result<Value, VmmError> {
        self.send(command, arguments, Some(fd), limit)?;
        self.answer(command, limit)
    }

    /// The events that have come; never waits.
    pub fn take_events(&mut self) -> Result<Vec<Value>, VmmError> {
        self.stream.set_nonblocking(true).map_err(|source| connection("read events", source))?;
        let read = self.fill();
        self.stream.set_nonblocking(false).map_err(|source| connection("read events", source))?;
        match read {
            Ok(()) => {}
            Err(error) if is_timeout(&error) => {}
            Err(source) => return Err(connection("read events", source)),
        }
        while let Some(message) = self.line()? {
            self.keep(message);
        }
        Ok(self.events.drain(..).collect())
    }

    /// Waits for the first event for which `wanted` gives something; others are kept.
    pub fn wait_event<T>(
        &mut self,
        doing: &'static str,
        limit: Duration,
        mut wanted: impl FnMut(&str, &Value) -> Option<T>,
    ) -> Result<T, VmmError> {
        let until = Instant::now() + limit;
        let mut looked_at = 0;
        loop {
            while let Some(event) = self.events.get(looked_at) {
                if let Some(found) = wanted(event["event"].as_str().unwrap_or_default(), &event["data"]) {
                    self.events.remove(looked_at);
                    return Ok(found);
                }
                looked_at += 1;
            }
            let message = self.message(doing, limit, until)?;
            if self.keep(message) {
                looked_at = looked_at.saturating_sub(1);
            }
        }
    }

    fn send(
        &mut self,
        command: &'static str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<(), VmmError> {
        let mut order = json!({ "execute": command });
        order["arguments"] = arguments;
        let line = format!("{order}\n");
        self.stream.set_write_timeout(Some(limit)).map_err(|source| connection("set a limit", source))?;
        let mut sent = 0;
        if let Some(fd) = fd {
            let fds = [fd];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
            sent =
                sendmsg(&self.stream, &[IoSlice::new(line.as_bytes())], &mut ancillary, SendFlags::NOSIGNAL)
                    .map_err(|errno| connection("send", errno.into()))?;
        }
        match self.stream.write_all(&line.as_bytes()[sent..]) {
            Ok(()) => Ok(()),
            Err(error) if is_timeout(&error) => Err(VmmError::Silent { command, limit }),
            Err(source) => Err(connection("send", source)),
        }
    }

    fn answer(&mut self, command: &'static str, limit: Duration) -> Result<Value, VmmError> {
        let until = Instant::now() + limit;
        loop {
            let mut message = self.message(command, limit, until)?;
            if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = message.get("error") {
                let reason = error["desc"].as_str().unwrap_or("it does not say why").to_owned();
                return Err(VmmError::Refused { command, reason });
            }
            self.keep(message);
        }
    }

    /// Keeps an event, and nothing else. True if an older one had to go.
    fn keep(&mut self, message: Value) -> bool {
        if message.get("event").is_none() {
            return false;
        }
        let full = self.events.len() == KEPT_EVENTS;
        if full {
            self.events.pop_front();
        }
        self.events.push_back(message);
        full
    }

    fn message(&mut self, command: &'static str, limit: Duration, until: Instant) -> Result<Value, VmmError> {
        loop {
            if let Some(message) = self.line()? {
                return Ok(message);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(VmmError::Silent { command, limit });
            }
            self.stream.set_read_timeout(Some(left)).map_err(|source| connection("set a limit", source))?;
            match self.fill() {
                Ok(()) => {}
                Err(error) if is_timeout(&error) => {}
                Err(source) => return Err(connection("read", source)),
            }
        }
    }

    /// Reads what there is, once.
    fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        match self.stream.read(&mut chunk)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                self.received.extend_from_slice(&chunk[..count]);
                Ok(())
            }
        }
    }

    /// The next whole line, if there is one.
    fn line(&mut self) -> Result<Option<Value>, VmmError> {
        let Some(at) = self.received[self.searched..].iter().position(|&byte| byte == b'\n') else {
            self.searched = self.received.len();
            return if self.searched < LONGEST_LINE {
                Ok(None)
            } else {
                Err(VmmError::Protocol(format!("a line longer than {LONGEST_LINE} bytes")))
            };
        };
        let end = self.searched + at + 1;
        let message = serde_json::from_slice(&self.received[..end])
            .map_err(|error| VmmError::Protocol(format!("no JSON: {error}")));
        self.received.drain(..end);
        self.searched = 0;
        message.map(Some)
    }
}

/// So much of a message as an error should carry.
fn shown(message: &Value) -> String {
    message.to_string().chars().take(80).collect()
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::thread;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);
    const GREETING: &[u8] = b"{\"QMP\":{\"version\":{\"qemu\":{\"major\":7,\"minor\":2,\"micro\":22}}}}\r\n";

    /// A server that sends `answers`, each after a line of the client's.
    fn connect(
        answers: &'static [&'static [u8]],
    ) -> (Result<Qmp, VmmError>, thread::JoinHandle<Vec<String>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut orders = BufReader::new(theirs.try_clone().unwrap());
            let mut heard = Vec::new();
            theirs.write_all(GREETING).unwrap();
            for answer in [b"{\"return\":{}}\r\n".as_slice()].iter().chain(answers) {
                let mut line = String::new();
                orders.read_line(&mut line).unwrap();
                heard.push(line);
                theirs.write_all(answer).unwrap();
            }
            heard
        });
        (Qmp::new(ours, LIMIT), server)
    }

    #[test]
    fn events_between_a_command_and_its_answer_are_kept_in_their_order() {
        let (qmp, server) = connect(&[
            b"{\"event\":\"STOP\"}\n{\"event\":\"RESET\",\"data\":{\"guest\":true}}\n{\"return\":{\"status\":\"running\"}}\n",
            b"{\"error\":{\"class\":\"GenericError\",\"desc\":\"no such thing\"}}\n",
        ]);
        let mut qmp = qmp.unwrap();
        assert_eq!(qmp.version(), "7.2.22");
        assert_eq!(qmp.call("query-status", json!({}), LIMIT).unwrap()["status"], "running");
        let found =
            qmp.wait_event("a reset", LIMIT, |name, data| (name == "RESET").then(|| data["guest"].clone()));
        assert_eq!(found.unwrap(), true);
        let refused = qmp.call("odd", json!({}), LIMIT).unwrap_err();
        assert_eq!(refused.to_string(), "the hypervisor refuses odd: no such thing");
        let left = qmp.take_events();
        // The server has gone: what was kept is lost with it, and that is said.
        assert!(matches!(left, Err(VmmError::Connection { .. })) || left.unwrap()[0]["event"] == "STOP");
        assert_eq!(server.join().unwrap()[1], "{\"arguments\":{},\"execute\":\"query-status\"}\n");
    }

    #[test]
    fn silence_garbage_and_an_end_are_told_apart() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let silent = Qmp::new(ours, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(silent, VmmError::Silent { .. }), "{silent}");

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"SSH-2.0\n").unwrap();
        assert!(matches!(Qmp::new(ours, LIMIT).unwrap_err(), VmmError::Protocol(_)));

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"{\"QMP\":{}}\n").unwrap();
        assert!(matches!(Qmp::new(ours, LIMIT).unwrap_err(), VmmError::Protocol(_)));

        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert!(matches!(Qmp::new(ours, LIMIT).unwrap_err(), VmmError::Connection { .. }));
    }

    #[test]
    fn a_line_has_an_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let writer = thread::spawn(move || while theirs.write_all(&[b'x'; CHUNK]).is_ok() {});
        assert!(matches!(Qmp::new(ours, LIMIT).unwrap_err(), VmmError::Protocol(_)));
        writer.join().unwrap();
    }
}
