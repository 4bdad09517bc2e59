// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A guest's wall clock stands still while the guest does. Its QEMU guest agent sets it afterwards; who has none asks a time server. (Of
//! cloud-hypervisor, where a clock that is kvm-clock does not stand still and an agent has no port, its own part tells.)
//!
//! ```text
//! daemon                                        agent, behind a socket of the hypervisor
//!   0xff guest-sync-delimited {id}  ─────────►    forgets half a request of before
//!        …, 0xff {"return": id}     ◄─────────    answers to what others asked come first, and are dropped
//!   guest-set-time {now}            ─────────►    the time of this moment: the agent listens
//!        {"return": {}}             ◄─────────
//! ```
//!
//! The answer is waited for, because QEMU may drop what a connection that ends has left unread. Nothing waits for this in turn: a guest
//! runs whether its agent answers or not. Knows no VM. (QEMU, docs/interop/qemu-ga-ref.)

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::unix::connect_within;

/// Before the answer to a delimited sync; no byte of UTF-8, and so none of JSON.
const DELIMITER: u8 = 0xff;
/// No answer that is waited for is longer.
const LONGEST_LINE: usize = 64 << 10;
const CHUNK: usize = 4096;

/// Why a guest's clock was not set.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClockError {
    #[error("cannot {doing} the guest agent's channel")]
    Channel { doing: &'static str, source: io::Error },
    #[error("the guest's agent has not answered {command} within {limit:?}")]
    Silent { command: &'static str, limit: Duration },
    #[error("the guest's agent answered {command} with {said}")]
    Refused { command: &'static str, said: String },
}

/// Tells the agent behind `socket` the time. Takes at most `limit`.
pub(super) fn set(socket: &Path, limit: Duration) -> Result<(), ClockError> {
    let until = Instant::now() + limit;
    // QEMU serves one connection at a time.
    let stream = connect_within(socket, limit).map_err(channel("connect to"))?;
    // Another than that of a daemon before this one.
    tell(stream, limit, until, nanos())
}

/// `id` is what the agent has to answer to.
pub(super) fn tell(stream: UnixStream, limit: Duration, until: Instant, id: i64) -> Result<(), ClockError> {
    let mut agent = Agent { stream, received: Vec::new(), limit, until };
    agent.sync(id)?;
    agent.call("guest-set-time", &json!({ "time": nanos() }))
}

/// Since the epoch.
fn nanos() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

fn channel(doing: &'static str) -> impl Fn(io::Error) -> ClockError {
    move |source| ClockError::Channel { doing, source }
}

/// A connection to an agent.
#[derive(Debug)]
struct Agent {
    stream: UnixStream,
    received: Vec<u8>,
    limit: Duration,
    until: Instant,
}

impl Agent {
    /// From here on, answers are to what this connection asks.
    fn sync(&mut self, id: i64) -> Result<(), ClockError> {
        const SYNC: &str = "guest-sync-delimited";
        self.send(SYNC, &[DELIMITER], &json!({ "id": id }))?;
        loop {
            self.skip_past(SYNC, DELIMITER)?;
            let line = self.line(SYNC)?;
            // An answer to others may have come to its end without its line: another delimiter has begun anew.
            let line = line.rsplit(|&byte| byte == DELIMITER).next().unwrap_or(&line);
            if serde_json::from_slice::<Value>(line).is_ok_and(|answer| answer["return"] == id) {
                return Ok(());
            }
        }
    }

    fn call(&mut self, command: &'static str, arguments: &Value) -> Result<(), ClockError> {
        self.send(command, &[], arguments)?;
        let line = self.line(command)?;
        let answer = serde_json::from_slice::<Value>(&line).unwrap_or_default();
        if answer.get("return").is_some() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&line).trim().chars().take(200).collect();
        Err(ClockError::Refused { command, said })
    }

    fn send(&mut self, command: &'static str, before: &[u8], arguments: &Value) -> Result<(), ClockError> {
        let mut request = before.to_vec();
        request.extend(json!({ "execute": command, "arguments": arguments }).to_string().bytes());
        request.push(b'\n');
        self.stream.set_write_timeout(Some(self.left(command)?)).map_err(channel("set a limit for"))?;
        self.stream.write_all(&request).map_err(|error| self.silent_or(command, "write to", error))
    }

    /// Drops all up to that byte.
    fn skip_past(&mut self, command: &'static str, byte: u8) -> Result<(), ClockError> {
        loop {
            if let Some(at) = self.received.iter().position(|&received| received == byte) {
                self.received.drain(..=at);
                return Ok(());
            }
            self.received.clear();
            self.fill(command)?;
        }
    }

    fn line(&mut self, command: &'static str) -> Result<Vec<u8>, ClockError> {
        loop {
            if let Some(at) = self.received.iter().position(|&byte| byte == b'\n') {
                return Ok(self.received.drain(..=at).collect());
            }
            if self.received.len() > LONGEST_LINE {
                return Err(ClockError::Refused { command, said: "a line without an end".to_owned() });
            }
            self.fill(command)?;
        }
    }

    /// Reads what there is, once.
    fn fill(&mut self, command: &'static str) -> Result<(), ClockError> {
        let mut chunk = [0; CHUNK];
        self.stream.set_read_timeout(Some(self.left(command)?)).map_err(channel("set a limit for"))?;
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(channel("read from")(io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => {
                self.received.extend_from_slice(&chunk[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(self.silent_or(command, "read from", error)),
        }
    }

    fn left(&self, command: &'static str) -> Result<Duration, ClockError> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(self.silent(command)) } else { Ok(left) }
    }

    fn silent(&self, command: &'static str) -> ClockError {
        ClockError::Silent { command, limit: self.limit }
    }

    fn silent_or(&self, command: &'static str, doing: &'static str, error: io::Error) -> ClockError {
        if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
            self.silent(command)
        } else {
            channel(doing)(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::thread;

    const LIMIT: Duration = Duration::from_secs(20);

    /// Serves one connection: to each request, what `answer` makes of it.
    fn serve(
        answer: impl Fn(&str, &Value) -> Vec<u8> + Send + 'static,
    ) -> (tempfile::TempDir, thread::JoinHandle<Vec<Value>>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("agent")).unwrap();
        let served = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut asked = Vec::new();
            loop {
                let mut line = Vec::new();
                if lines.read_until(b'\n', &mut line).unwrap() == 0 {
                    return asked;
                }
                let json = line.strip_prefix(&[DELIMITER]).unwrap_or(&line);
                let request: Value = serde_json::from_slice(json).unwrap();
                let reply = answer(request["execute"].as_str().unwrap(), &request["arguments"]);
                // Who asked may have given up.
                let _ = stream.write_all(&reply);
                asked.push(request);
            }
        });
        (dir, served)
    }

    fn synced(arguments: &Value) -> Vec<u8> {
        [&[DELIMITER], format!("{}\n", json!({ "return": arguments["id"] })).as_bytes()].concat()
    }

    #[test]
    fn answers_to_others_are_not_taken_for_ones_own() {
        let (dir, served) = serve(|command, arguments| match command {
            "guest-sync-delimited" => {
                let stale = b"\": 1}\n{\"return\": {}}\n\xff{\"return\": 7}\n{\"error\": {}}\n";
                [stale.as_slice(), &synced(arguments)].concat()
            }
            _ => b"{\"return\": {}}\n".to_vec(),
        });
        let before = nanos();
        set(&dir.path().join("agent"), LIMIT).unwrap();
        let asked = served.join().unwrap();
        let [_, told] = asked.as_slice() else { panic!("{asked:?}") };
        assert_eq!(told["execute"], "guest-set-time");
        let time = told["arguments"]["time"].as_i64().unwrap();
        assert!(before <= time && time <= nanos());
    }

    #[test]
    fn an_answer_that_was_broken_off_hides_none() {
        let (dir, served) = serve(|command, arguments| match command {
            "guest-sync-delimited" => [b"\xff{\"retu".as_slice(), &synced(arguments)].concat(),
            _ => b"{\"return\": {}}\n".to_vec(),
        });
        set(&dir.path().join("agent"), LIMIT).unwrap();
        assert_eq!(served.join().unwrap().len(), 2);
    }

    #[test]
    fn the_time_is_that_of_when_the_agent_listens() {
        let pause = Duration::from_millis(300);
        let (dir, served) = serve(move |command, arguments| match command {
            "guest-sync-delimited" => {
                thread::sleep(pause);
                synced(arguments)
            }
            _ => b"{\"return\": {}}\n".to_vec(),
        });
        let before = nanos();
        set(&dir.path().join("agent"), LIMIT).unwrap();
        let asked = served.join().unwrap();
        let time = asked[1]["arguments"]["time"].as_i64().unwrap();
        assert!(u128::from(time.abs_diff(before)) >= pause.as_nanos());
    }

    #[test]
    fn an_agent_that_refuses_is_quoted() {
        let (dir, served) = serve(|command, arguments| match command {
            "guest-sync-delimited" => synced(arguments),
            _ => b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"hwclock failed\"}}\n".to_vec(),
        });
        let error = set(&dir.path().join("agent"), LIMIT).unwrap_err();
        assert!(
            matches!(&error, ClockError::Refused { said, .. } if said.contains("hwclock failed")),
            "{error}"
        );
        served.join().unwrap();
    }

    #[test]
    fn an_agent_that_is_not_there_is_waited_for_no_longer_than_the_limit() {
        let limit = Duration::from_millis(200);
        // It never answers, or speaks for ever and says nothing.
        for reply in [Vec::new(), vec![b' '; 3 * CHUNK]] {
            let (dir, served) = serve(move |_, _| reply.clone());
            let begun = Instant::now();
            let error = set(&dir.path().join("agent"), limit).unwrap_err();
            assert!(matches!(error, ClockError::Silent { .. }), "{error}");
            assert!(begun.elapsed() < LIMIT);
            served.join().unwrap();
        }
        // Nobody accepts, and the queue is full.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::bind(&fd, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&fd, 0).unwrap();
        let _first = UnixStream::connect(&path).unwrap();
        let begun = Instant::now();
        assert!(set(&path, limit).is_err());
        assert!(begun.elapsed() < LIMIT);
        // Nobody is there.
        assert!(matches!(set(&dir.path().join("none"), limit), Err(ClockError::Channel { .. })));
    }

    #[test]
    fn a_machine_that_ends_ends_the_wait() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("agent")).unwrap();
        let served = thread::spawn(move || drop(listener.accept()));
        assert!(matches!(set(&dir.path().join("agent"), LIMIT), Err(ClockError::Channel { .. })));
        served.join().unwrap();
    }
}
