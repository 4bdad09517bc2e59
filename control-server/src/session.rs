// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One client's connection: lines in, lines out, never more than a bounded amount kept of either.
//!
//! ```text
//!   socket ─► input (bounded) ─► next_line()
//!   send(answer) ─► output ─┐
//!   offer(event) ─► events (bounded; the oldest is lost first) ─┴─► socket, as fast as the client reads
//! ```
//!
//! While [`ENOUGH_OUTPUT`] bytes of answers wait, no more requests are read: a client that does not read cannot make
//! the daemon keep its answers. This module knows no JSON.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::events::{self, Entry};
use crate::peer::Peer;
use crate::rpc::Door;

/// Answers are held back above this.
const ENOUGH_OUTPUT: usize = 256 << 10;
/// Events that wait for a slow reader: as many as are kept, so that all of the past can be sent.
const MAX_EVENTS: usize = events::KEPT;
const READ_CHUNK: usize = 16 << 10;

#[derive(Debug)]
struct Subscription {
    filter: Vec<String>,
    queue: VecDeque<Arc<Entry>>,
    lost: u64,
    /// Number of the newest event that was lost.
    lost_seq: u64,
}

/// How the input stands.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    Line(Vec<u8>),
    /// No whole line yet, or no room for its answer.
    None,
    TooLong,
}

/// One client's connection.
#[derive(Debug)]
pub struct Session {
    stream: UnixStream,
    pub door: Door,
    pub peer: Peer,
    input: Vec<u8>,
    /// Up to here there is no newline in `input`.
    scanned: usize,
    output: Vec<u8>,
    written: usize,
    subscription: Option<Subscription>,
    /// The client sends nothing more.
    pub ended: bool,
}

impl Session {
    /// `stream` does not block.
    pub fn new(stream: UnixStream, door: Door, peer: Peer) -> Self {
        Self {
            stream,
            door,
            peer,
            input: Vec::new(),
            scanned: 0,
            output: Vec::new(),
            written: 0,
            subscription: None,
            ended: false,
        }
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Reads what there is, once. Errors end the connection.
    pub fn fill(&mut self) -> io::Result<()> {
        let mut chunk = [0; READ_CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => self.ended = true,
            Ok(n) => self.input.extend_from_slice(&chunk[..n]),
            Err(error) if is_retry(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Whether more input may be read now: not before what is here was looked at.
    pub fn wants_input(&self) -> bool {
        !self.ended && self.has_room() && self.scanned == self.input.len()
    }

    /// Whether something waits to be written.
    pub fn wants_output(&self) -> bool {
        self.written < self.output.len()
            || self.subscription.as_ref().is_some_and(|s| s.lost > 0 || !s.queue.is_empty())
    }

    /// Whether there is input that [`Session::next_line`] was not asked for, and room for its answer.
    pub fn has_line_at_hand(&self) -> bool {
        self.has_room() && self.scanned < self.input.len()
    }

    /// Nothing will ever be said here again, unless an answer is owed that was not given to [`Session::send`] yet.
    pub fn is_over(&self) -> bool {
        self.ended && !self.wants_output() && !self.has_line_at_hand() && self.subscription.is_none()
    }

    fn has_room(&self) -> bool {
        self.output.len() - self.written < ENOUGH_OUTPUT
    }

    /// The next request, without its newline.
    pub fn next_line(&mut self) -> Input {
        if !self.has_room() {
            return Input::None;
        }
        match self.input[self.scanned..].iter().position(|byte| *byte == b'\n') {
            Some(at) => {
                let end = self.scanned + at;
                self.scanned = 0;
                if end + 1 > self.door.max_line() {
                    return Input::TooLong;
                }
                let mut line: Vec<u8> = self.input.drain(..=end).collect();
                line.pop();
                Input::Line(line)
            }
            None if self.input.len() >= self.door.max_line() => Input::TooLong,
            None => {
                self.scanned = self.input.len();
                Input::None
            }
        }
    }

    /// Queues an answer.
    pub fn send(&mut self, line: &str) {
        self.compact();
        self.output.extend_from_slice(line.as_bytes());
    }

    /// Begins to take events; of those before, `lost` up to number `lost_seq` are not kept any more.
    pub fn subscribe(&mut self, filter: Vec<String>, lost: u64, lost_seq: u64) {
        self.subscription = Some(Subscription { filter, queue: VecDeque::new(), lost, lost_seq });
    }

    /// Tells a subscriber of `n` more events that it does not get, up to number `seq`.
    pub fn lose(&mut self, n: u64, seq: u64) {
        if n > 0
            && let Some(subscription) = &mut self.subscription
        {
            subscription.lost = subscription.lost.saturating_add(n);
            subscription.lost_seq = seq;
        }
    }

    /// Queues an event if it was subscribed to; the oldest waiting one makes room. Returns whether it was.
    pub fn offer(&mut self, entry: &Arc<Entry>) -> bool {
        let Some(subscription) = &mut self.subscription else { return false };
        let wanted = subscription.filter.is_empty()
            || subscription.filter.iter().any(|prefix| entry.name.starts_with(prefix.as_str()));
        if !wanted {
            return false;
        }
        if subscription.queue.len() == MAX_EVENTS
            && let Some(oldest) = subscription.queue.pop_front()
        {
            subscription.lost += 1;
            subscription.lost_seq = oldest.seq;
        }
        subscription.queue.push_back(Arc::clone(entry));
        true
    }

    /// Writes as much as the client takes. Errors end the connection.
    pub fn flush(&mut self, unix_ms: u64) -> io::Result<()> {
        loop {
            if self.written == self.output.len() {
                self.output.clear();
                self.written = 0;
                if !self.take_events(unix_ms) {
                    return Ok(());
                }
            }
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.written += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Moves waiting events to the empty output. Returns whether there were any.
    fn take_events(&mut self, unix_ms: u64) -> bool {
        const BATCH: usize = 64;
        let Some(subscription) = &mut self.subscription else { return false };
        if subscription.lost > 0 {
            let lost = std::mem::take(&mut subscription.lost);
            let line = events::lost(lost, subscription.lost_seq, unix_ms);
            self.output.extend_from_slice(line.as_bytes());
        }
        let take = subscription.queue.len().min(BATCH);
        for entry in subscription.queue.drain(..take) {
            self.output.extend_from_slice(entry.line.as_bytes());
        }
        !self.output.is_empty()
    }

    fn compact(&mut self) {
        if self.written > 0 {
            self.output.drain(..self.written);
            self.written = 0;
        }
    }
}

fn is_retry(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use vssd_protocol::control::MAX_LINE;

    use super::*;
    use crate::events::{About, EventLog};

    fn pair() -> (Session, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Session::new(ours, Door::Control, Peer { uid: 0, pid: 1 }), theirs)
    }

    fn feed(session: &mut Session, peer: &mut UnixStream, bytes: &[u8]) {
        for chunk in bytes.chunks(READ_CHUNK) {
            peer.write_all(chunk).unwrap();
            session.fill().unwrap();
        }
    }

    #[test]
    fn lines_may_come_in_any_pieces() {
        let (mut session, mut peer) = pair();
        feed(&mut session, &mut peer, b"on");
        assert_eq!(session.next_line(), Input::None);
        feed(&mut session, &mut peer, b"e\ntwo\nthr");
        assert_eq!(session.next_line(), Input::Line(b"one".to_vec()));
        assert_eq!(session.next_line(), Input::Line(b"two".to_vec()));
        assert_eq!(session.next_line(), Input::None);
        feed(&mut session, &mut peer, b"ee\n");
        assert_eq!(session.next_line(), Input::Line(b"three".to_vec()));
    }

    #[test]
    fn line_of_exactly_the_limit_passes_one_byte_more_does_not() {
        for (extra, expected) in [(0, true), (1, false)] {
            let (mut session, mut peer) = pair();
            let mut line = vec![b'x'; MAX_LINE - 1 + extra];
            line.push(b'\n');
            feed(&mut session, &mut peer, &line);
            assert_eq!(matches!(session.next_line(), Input::Line(_)), expected, "{extra}");
        }
        let (mut session, mut peer) = pair();
        feed(&mut session, &mut peer, &vec![b'x'; MAX_LINE]);
        assert_eq!(session.next_line(), Input::TooLong, "no need to wait for its end");
    }

    #[test]
    fn unread_answers_stop_the_reading_of_requests() {
        let (mut session, mut peer) = pair();
        feed(&mut session, &mut peer, b"again\n");
        session.send(&"x".repeat(ENOUGH_OUTPUT));
        assert_eq!(session.next_line(), Input::None);
        assert!(!session.wants_input());
        while session.wants_output() {
            session.flush(0).unwrap();
            let mut sink = vec![0; 1 << 20];
            let _ = peer.read(&mut sink).unwrap();
        }
        assert_eq!(session.next_line(), Input::Line(b"again".to_vec()));
    }

    #[test]
    fn slow_reader_loses_the_oldest_events_and_is_told_how_many() {
        let (mut session, mut peer) = pair();
        session.subscribe(vec!["shrink.".into()], 0, 0);
        let mut log = EventLog::default();
        for _ in 0..MAX_EVENTS + 5 {
            for name in ["shrink.done", "grow.done"] {
                let told = log.newest();
                log.push(0, name, About::NOTHING, json!(null));
                log.after(told).for_each(|entry| assert_eq!(session.offer(entry), name == "shrink.done"));
            }
        }
        drop(session.flush(0));
        let mut text = vec![0; 400];
        peer.read_exact(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(
            (&first["params"]["event"], &first["params"]["data"]["n"]),
            (&json!("events.lost"), &json!(5))
        );
        let second: Value = serde_json::from_str(text.lines().nth(1).unwrap()).unwrap();
        assert_eq!(
            (&second["params"]["event"], &second["params"]["seq"]),
            (&json!("shrink.done"), &json!(11))
        );
    }

    #[test]
    fn half_closed_client_gets_its_answer_before_the_end() {
        let (mut session, mut peer) = pair();
        feed(&mut session, &mut peer, b"x\n");
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        session.fill().unwrap();
        assert!(session.ended && matches!(session.next_line(), Input::Line(_)));
        session.send("answer\n");
        assert!(!session.is_over());
        session.flush(0).unwrap();
        assert!(session.is_over());
    }
}
