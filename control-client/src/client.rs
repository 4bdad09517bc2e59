// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One connection to the daemon: calls with a time limit, and the events that follow a subscription.
//!
//! Everything that arrives is distrusted: lines have a greatest length, an answer must carry the number of
//! its question, and no peer can make a call last longer than its limit by sending a little now and then.
//! Knows no method but those that every daemon has.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use vssd_protocol::control::{HelloParams, MAX_LINE, RpcRequest, method};

use crate::error::{Error, Refusal, Result};
use crate::program::Program;
use crate::time::Millis;

const HINT_ENDED: &str = "it ended or was restarted; what was asked may or may not have happened";

/// An answer as it came, and as the type it must be. Programs get the former, so that fields that a newer
/// daemon adds reach them.
#[derive(Debug)]
pub struct Answer<T> {
    pub raw: Value,
    pub typed: T,
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    program: &'static Program,
    path: PathBuf,
    stream: UnixStream,
    /// Of a call.
    limit: Duration,
    last_id: u64,
    /// Received and not yet used: the head of an incomplete line, or more.
    received: Vec<u8>,
    /// How much of `received` is known to hold no end of line.
    searched: usize,
    /// Events that came while an answer was awaited.
    events: VecDeque<Value>,
}

impl Client {
    /// Connects to the daemon of `program` at `path`; `limit` is that of connecting, and of each call.
    pub fn connect(program: &'static Program, path: &Path, limit: Duration) -> Result<Self> {
        let stream = connect_within(program, path, limit)?;
        Ok(Self {
            program,
            path: path.to_owned(),
            stream,
            limit,
            last_id: 0,
            received: Vec::new(),
            searched: 0,
            events: VecDeque::new(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says which program this is, and asks the daemon the same.
    pub fn hello<T: DeserializeOwned>(&mut self) -> Result<Answer<T>> {
        self.call(method::HELLO, &HelloParams { client: self.program.title() })
    }

    /// Calls `method` and takes its answer for a `T`.
    pub fn call<T: DeserializeOwned>(&mut self, method: &str, params: &impl Serialize) -> Result<Answer<T>> {
        self.call_for(method, params, Duration::ZERO)
    }

    /// Calls a method that may take `patience` before it answers, and the usual time on top.
    pub fn call_for<T: DeserializeOwned>(
        &mut self,
        method: &str,
        params: &impl Serialize,
        patience: Duration,
    ) -> Result<Answer<T>> {
        let params = serde_json::to_value(params).map_err(|err| Error::usage(err.to_string()))?;
        let raw = self.call_raw(method, params, patience)?;
        let typed = T::deserialize(&raw).map_err(|err| Error::Protocol(format!("{method}: {err}")))?;
        Ok(Answer { raw, typed })
    }

    /// As [`Self::call_for`], with an answer of any type.
    pub fn call_raw(&mut self, method: &str, params: Value, patience: Duration) -> Result<Value> {
        let limit = self.limit.saturating_add(patience);
        let deadline = deadline_in(limit);
        self.last_id += 1;
        let id = self.last_id;
        let request = RpcRequest {
            jsonrpc: "2.0".to_owned(),
            id: Some(id.into()),
            method: method.to_owned(),
            params: Some(params),
        };
        let mut line = serde_json::to_vec(&request).map_err(|err| Error::usage(err.to_string()))?;
        line.push(b'\n');
        if line.len() > MAX_LINE {
            return Err(Error::usage(format!(
                "the request is {} bytes long, and a line has {MAX_LINE} at most",
                line.len()
            )));
        }
        self.send(&line, deadline).and_then(|()| self.receive_answer(id, deadline)).map_err(|err| match err {
            Interrupted::Error(err) => err,
            Interrupted::TimedOut => Error::TimedOut {
                message: format!(
                    "the daemon did not answer {method} within {}",
                    Millis(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX))
                ),
                hint: "it may be busy or stuck, and what was asked may still happen; --timeout sets how long to wait"
                    .to_owned(),
            },
        })
    }

    /// The next event; `None` when none comes before `deadline`.
    pub fn next_event(&mut self, deadline: Option<Instant>) -> Result<Option<Value>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.receive_object(deadline) {
                Ok(object) => self.keep_event(object)?,
                Err(Interrupted::TimedOut) => return Ok(None),
                Err(Interrupted::Error(err)) => return Err(err),
            }
        }
    }

    /// Writes all of `line`. A daemon that answers and closes before it has read everything (too many
    /// connections) is no failure yet: what it said decides.
    fn send(&mut self, line: &[u8], deadline: Option<Instant>) -> std::result::Result<(), Interrupted> {
        let mut rest = line;
        while !rest.is_empty() {
            let wait = remaining(deadline)?;
            self.stream.set_write_timeout(wait).map_err(|err| self.lost(&err.to_string()))?;
            match self.stream.write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(err) => match err.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => return Err(Interrupted::TimedOut),
                    ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => return Ok(()),
                    _ => return Err(self.lost(&err.to_string())),
                },
            }
        }
        Ok(())
    }

    fn receive_answer(
        &mut self,
        id: u64,
        deadline: Option<Instant>,
    ) -> std::result::Result<Value, Interrupted> {
        loop {
            let mut object = self.receive_object(deadline)?;
            if object.contains_key("method") {
                self.keep_event(object)?;
                continue;
            }
            let answered = object.remove("id").unwrap_or(Value::Null);
            // Of a call that was given up; its answer comes late.
            if answered.as_u64().is_some_and(|answered| (1..id).contains(&answered)) {
                continue;
            }
            if let Some(error) = object.remove("error") {
                // The daemon has no number to give back when it could not read the request.
                if answered != id && !answered.is_null() {
                    return Err(protocol(format!("it answers call {answered} instead of {id}")));
                }
                let refusal: Refusal =
                    serde_json::from_value(error).map_err(|err| protocol(format!("error: {err}")))?;
                return Err(Error::Refused(Box::new(refusal)).into());
            }
            if answered != id {
                return Err(protocol(format!("it answers call {answered} instead of {id}")));
            }
            return object.remove("result").ok_or_else(|| protocol("neither result nor error".to_owned()));
        }
    }

    /// Keeps a notification for [`Self::next_event`]; those that are no events are none of our business.
    fn keep_event(&mut self, mut object: Map<String, Value>) -> Result<()> {
        if object.get("method").and_then(Value::as_str) == Some(method::EVENT) {
            match object.remove("params") {
                Some(params) => self.events.push_back(params),
                None => return Err(Error::Protocol("an event without params".to_owned())),
            }
        }
        Ok(())
    }

    fn receive_object(
        &mut self,
        deadline: Option<Instant>,
    ) -> std::result::Result<Map<String, Value>, Interrupted> {
        let line = self.receive_line(deadline)?;
        match serde_json::from_slice(&line) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) | Err(_) => {
                let mut shown: String = String::from_utf8_lossy(&line).chars().take(60).collect();
                if shown.len() < line.len() {
                    shown.push('…');
                }
                Err(protocol(format!("no JSON object: {shown:?}")))
            }
        }
    }

    fn receive_line(&mut self, deadline: Option<Instant>) -> std::result::Result<Vec<u8>, Interrupted> {
        loop {
            if let Some(at) = self.received[self.searched..].iter().position(|&byte| byte == b'\n') {
                let end = self.searched + at + 1;
                if end > MAX_LINE {
                    return Err(too_long());
                }
                let rest = self.received.split_off(end);
                let mut line = std::mem::replace(&mut self.received, rest);
                self.searched = 0;
                line.pop();
                return Ok(line);
            }
            self.searched = self.received.len();
            if self.received.len() >= MAX_LINE {
                return Err(too_long());
            }
            let wait = remaining(deadline)?;
            self.stream.set_read_timeout(wait).map_err(|err| self.lost(&err.to_string()))?;
            let mut chunk = [0; 16 << 10];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(self.lost("it closed the connection")),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(err) => match err.kind() {
                    ErrorKind::Interrupted => {}
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => return Err(Interrupted::TimedOut),
                    _ => return Err(self.lost(&err.to_string())),
                },
            }
        }
    }

    fn lost(&self, reason: &str) -> Interrupted {
        Error::Unreachable { path: self.path.clone(), reason: reason.to_owned(), hint: HINT_ENDED.to_owned() }
            .into()
    }
}

/// Why a call ended without an answer; the caller knows what it waited for.
#[derive(Debug)]
enum Interrupted {
    TimedOut,
    Error(Error),
}

impl From<Error> for Interrupted {
    fn from(err: Error) -> Self {
        Self::Error(err)
    }
}

fn protocol(message: String) -> Interrupted {
    Error::Protocol(message).into()
}

fn too_long() -> Interrupted {
    protocol(format!("a line longer than {MAX_LINE} bytes"))
}

/// `None` for a limit beyond what the clock can count to: that is none.
fn deadline_in(limit: Duration) -> Option<Instant> {
    Instant::now().checked_add(limit)
}

/// Time until `deadline`, never zero, as the socket options want it.
fn remaining(deadline: Option<Instant>) -> std::result::Result<Option<Duration>, Interrupted> {
    let Some(deadline) = deadline else { return Ok(None) };
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(Interrupted::TimedOut),
        left => Ok(Some(left)),
    }
}

/// Connecting blocks without limit while the daemon's queue of connections is full, and the standard library
/// offers no limit for Unix sockets: a thread takes the blocking.
fn connect_within(program: &Program, path: &Path, limit: Duration) -> Result<UnixStream> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let target = path.to_owned();
    thread::spawn(move || sender.send(UnixStream::connect(target)));
    match receiver.recv_timeout(limit) {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(err)) => Err(Error::of_connect(program, path, &err)),
        Err(_) => Err(Error::TimedOut {
            message: format!("{} takes no connection", path.display()),
            hint: "the daemon is stuck or has too many clients".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use serde_json::json;
    use tempfile::TempDir;

    use super::*;
    use crate::error::{Exit, Failure};
    use crate::program::LAMPCTL;

    const LIMIT: Duration = Duration::from_secs(10);

    fn socket(dir: &TempDir) -> PathBuf {
        dir.path().join("lamp.sock")
    }

    /// A daemon that answers the n-th request of its one client with the n-th lines, which may be none.
    fn daemon(dir: &TempDir, answers: Vec<Vec<Value>>) -> JoinHandle<Vec<Value>> {
        let listener = UnixListener::bind(socket(dir)).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
            let mut heard = Vec::new();
            for lines in answers {
                heard.push(serde_json::from_str(&requests.next().unwrap().unwrap()).unwrap());
                for line in lines {
                    stream.write_all(format!("{line}\n").as_bytes()).unwrap();
                }
            }
            heard
        })
    }

    fn answer(id: u64, result: &Value) -> Value {
        json!({"jsonrpc": "2.0", "id": id, "result": result})
    }

    #[test]
    fn daemon_hears_which_program_asks_and_events_wait_for_their_turn() {
        let dir = tempfile::tempdir().unwrap();
        let event = json!({"jsonrpc": "2.0", "method": "event", "params": {"seq": 7}});
        let other = json!({"jsonrpc": "2.0", "method": "weather", "params": {}});
        let daemon =
            daemon(&dir, vec![vec![other, event, answer(1, &json!({"server": "lampd", "later": 1}))]]);
        let mut client = Client::connect(&LAMPCTL, &socket(&dir), LIMIT).unwrap();
        #[derive(serde::Deserialize)]
        struct Info {
            server: String,
        }
        let info: Answer<Info> = client.hello().unwrap();
        assert_eq!(info.typed.server, "lampd");
        assert_eq!(info.raw["later"], 1);
        assert_eq!(client.next_event(deadline_in(LIMIT)).unwrap(), Some(json!({"seq": 7})));
        assert_eq!(
            daemon.join().unwrap(),
            [
                json!({"jsonrpc": "2.0", "id": 1, "method": "server.hello", "params": {"client": "lampctl 3.2.1"}})
            ]
        );
    }

    #[test]
    fn answer_to_a_call_that_was_given_up_is_not_taken_for_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let late = vec![answer(1, &json!("late")), answer(2, &json!("in time"))];
        let daemon = daemon(&dir, vec![Vec::new(), late]);
        let mut client = Client::connect(&LAMPCTL, &socket(&dir), Duration::from_millis(100)).unwrap();
        let err = client.call::<Value>("lamp.show", &json!({})).unwrap_err();
        assert_eq!((err.code(), err.exit()), ("E_TIMED_OUT", Exit::TimedOut));
        assert_eq!(err.to_string(), "the daemon did not answer lamp.show within 100 ms");
        assert_eq!(client.call_for::<String>("lamp.show", &json!({}), LIMIT).unwrap().typed, "in time");
        daemon.join().unwrap();
    }

    #[test]
    fn daemon_that_does_not_run_is_named_in_the_hint() {
        let dir = tempfile::tempdir().unwrap();
        let absent = Client::connect(&LAMPCTL, &socket(&dir), LIMIT).unwrap_err();
        assert_eq!(absent.exit(), Exit::Unreachable);
        assert!(absent.hint(&LAMPCTL).unwrap().starts_with("start the lamp daemon, "));
        drop(UnixListener::bind(socket(&dir)).unwrap());
        let deaf = Client::connect(&LAMPCTL, &socket(&dir), LIMIT).unwrap_err();
        assert!(deaf.hint(&LAMPCTL).unwrap().contains("lampd has ended"));
    }

    #[test]
    fn daemon_that_hangs_up_is_unreachable_and_its_answer_of_another_type_makes_no_sense() {
        let dir = tempfile::tempdir().unwrap();
        let daemon = daemon(&dir, vec![vec![answer(1, &json!(3))]]);
        let mut client = Client::connect(&LAMPCTL, &socket(&dir), LIMIT).unwrap();
        let wrong = client.call::<String>("lamp.show", &json!({})).unwrap_err();
        assert_eq!((wrong.code(), wrong.exit()), ("E_PROTOCOL", Exit::Failed));
        daemon.join().unwrap();
        let gone = client.call::<String>("lamp.show", &json!({})).unwrap_err();
        assert_eq!((gone.code(), gone.exit()), ("E_UNREACHABLE", Exit::Unreachable));
    }
}
