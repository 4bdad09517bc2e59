// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small blocking client of QEMU's machine protocol: one JSON object a line, events between replies.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::wait::Deadline;

/// How long QEMU may take for any command; emulation on a busy machine can hold its main loop for a while.
const REPLY: Duration = Duration::from_secs(30);

/// A negotiated connection.
#[derive(Debug)]
pub struct Qmp {
    input: BufReader<UnixStream>,
    output: UnixStream,
    line: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Takes the greeting and leaves negotiation mode.
    pub fn new(stream: UnixStream) -> Result<Self> {
        let mut qmp = Self {
            output: stream.try_clone()?,
            input: BufReader::new(stream),
            line: Vec::new(),
            events: VecDeque::new(),
        };
        let deadline = Deadline::after(REPLY);
        match qmp.message(&deadline)? {
            Some(greeting) if greeting.get("QMP").is_some() => {}
            other => bail!("expected QEMU's greeting, got {other:?}"),
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives its return value.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut order = json!({ "execute": command });
        order["arguments"] = arguments;
        let mut line = order.to_string();
        line.push('\n');
        self.output.write_all(line.as_bytes()).with_context(|| format!("send {command} to QEMU"))?;
        let deadline = Deadline::after(REPLY);
        loop {
            let Some(mut message) = self.message(&deadline)? else {
                bail!("QEMU did not answer {command} in {} s", REPLY.as_secs());
            };
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                bail!("QEMU refused {command}: {error}");
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Waits for an event by name; events before it are dropped, those already received count.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Result<Value> {
        let deadline = Deadline::after(limit);
        loop {
            let message = match self.events.pop_front() {
                Some(event) => event,
                None => match self.message(&deadline)? {
                    Some(message) => message,
                    None => bail!("no {name} event from QEMU in {:.1} s", limit.as_secs_f64()),
                },
            };
            if message.get("event").and_then(Value::as_str) == Some(name) {
                return Ok(message);
            }
        }
    }

    /// The next message, or `None` when the deadline passes first. A line read in part is kept for the next call.
    fn message(&mut self, deadline: &Deadline) -> Result<Option<Value>> {
        loop {
            let left = deadline.left();
            if left.is_zero() {
                return Ok(None);
            }
            self.input.get_ref().set_read_timeout(Some(left))?;
            match self.input.read_until(b'\n', &mut self.line) {
                Ok(0) => bail!("QEMU closed its control connection"),
                Ok(_) if self.line.ends_with(b"\n") => {
                    let message = serde_json::from_slice(&self.line).context("QEMU sent what is not JSON")?;
                    self.line.clear();
                    return Ok(Some(message));
                }
                Ok(_) => {}
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(error).context("read from QEMU"),
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn events_between_a_command_and_its_reply_are_kept() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut orders = BufReader::new(theirs.try_clone().unwrap());
            let mut line = String::new();
            theirs.write_all(b"{\"QMP\":{}}\n").unwrap();
            orders.read_line(&mut line).unwrap();
            theirs.write_all(b"{\"return\":{}}\n").unwrap();
            orders.read_line(&mut line).unwrap();
            theirs.write_all(b"{\"event\":\"RESET\"}\n{\"return\":{\"status\":\"running\"}}\n").unwrap();
            orders.read_line(&mut line).unwrap();
            theirs.write_all(b"{\"error\":{\"desc\":\"no\"}}\n").unwrap();
        });
        let mut qmp = Qmp::new(ours).unwrap();
        assert_eq!(qmp.execute("query-status", json!({})).unwrap()["status"], "running");
        assert_eq!(qmp.wait_event("RESET", Duration::from_secs(1)).unwrap()["event"], "RESET");
        assert!(qmp.execute("odd", json!({})).unwrap_err().to_string().contains("refused odd"));
        server.join().unwrap();
    }
}
