// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One client and the thread that serves it: a line, its call, its answer, and the events that were subscribed to in between.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::json;
use tracing::debug;
use vssd_protocol::control::{ErrorCode, SubscribeParams, method};

use super::feed::Reader;
use super::{Access, Service};
use crate::fault::Fault;
use crate::rpc::{self, Call, Door};
use crate::session::{Input, Session};

const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// Batches of events that are written before it is the next request's turn.
const BATCHES: usize = 16;
const TOO_LARGE_HINT: &str = "ask for less";

pub(super) struct Connection {
    session: Session,
    service: Arc<dyn Service>,
    shutdown: Arc<OwnedFd>,
    /// Once events were subscribed to.
    reader: Option<Reader>,
}

/// What to do after a step.
enum Next {
    GoOn,
    End,
}

impl Connection {
    pub(super) fn new(session: Session, service: Arc<dyn Service>, shutdown: Arc<OwnedFd>) -> Self {
        Self { session, service, shutdown, reader: None }
    }

    /// Serves the client until it has gone or the daemon ends.
    pub(super) fn run(mut self) {
        loop {
            match self.step() {
                Ok(Next::GoOn) => {}
                Ok(Next::End) => return,
                Err(error) => {
                    debug!(%error, "client is gone");
                    return;
                }
            }
        }
    }

    fn step(&mut self) -> io::Result<Next> {
        self.write()?;
        if self.session.is_over() {
            return Ok(Next::End);
        }
        if let Next::End = self.wait()? {
            self.write()?;
            return Ok(Next::End);
        }
        match self.session.next_line() {
            Input::None => Ok(Next::GoOn),
            Input::Line(line) => {
                self.serve(&line);
                Ok(Next::GoOn)
            }
            Input::TooLong => {
                self.session.send(&rpc::line_too_long(self.session.door));
                self.write()?;
                Ok(Next::End)
            }
        }
    }

    /// Writes what waits, then events, as far as the client reads.
    fn write(&mut self) -> io::Result<()> {
        let feed = self.service.feed();
        for _ in 0..BATCHES {
            self.session.flush(feed.unix_ms())?;
            let Some(reader) = &mut self.reader else { return Ok(()) };
            if self.session.wants_output() {
                return Ok(());
            }
            let batch = reader.take(feed);
            if batch.is_empty() {
                return Ok(());
            }
            let (lost, seq) = batch.lost;
            self.session.lose(lost, seq);
            for entry in &batch.entries {
                self.session.offer(entry);
            }
        }
        if let Some(reader) = &self.reader {
            reader.come_back();
        }
        Ok(())
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self) -> io::Result<Next> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, self.session.wants_input());
        flags.set(PollFlags::OUT, self.session.wants_output());
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.shutdown.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.session.stream().as_fd(), flags),
        ];
        // While older output waits, the next events are not of interest.
        if let Some(reader) = self.reader.as_ref().filter(|_| !self.session.wants_output()) {
            fds.push(PollFd::from_borrowed_fd(reader.bell().as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, self.session.has_line_at_hand().then_some(&AT_ONCE)) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Next::GoOn),
            Err(errno) => return Err(errno.into()),
        }
        let revents: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        if !revents[0].is_empty() {
            return Ok(Next::End);
        }
        if revents.get(2).is_some_and(|bell| !bell.is_empty())
            && let Some(reader) = &self.reader
        {
            reader.hush();
        }
        if revents[1].contains(PollFlags::IN) {
            self.session.fill()?;
        } else if revents[1].intersects(PollFlags::ERR | PollFlags::HUP) && !self.session.has_line_at_hand() {
            // It has closed both directions, and what it sent before is done.
            return Ok(Next::End);
        }
        Ok(Next::GoOn)
    }

    fn serve(&mut self, line: &[u8]) {
        let answer = match rpc::parse(line) {
            Ok(call) => {
                let id = call.id.clone();
                self.carry_out(call).unwrap_or_else(|fault| rpc::failure(&id, fault))
            }
            Err((id, fault)) => rpc::failure(&id, fault),
        };
        self.session.send(&answer);
    }

    fn carry_out(&mut self, call: Call) -> Result<String, Fault> {
        let Call { id, method, params } = call;
        if method == method::EVENTS_SUBSCRIBE {
            let seq = self.subscribe(rpc::subscription(params)?)?;
            return Ok(rpc::success(&id, &json!({ "seq": seq }), TOO_LARGE_HINT));
        }
        let door = self.session.door;
        match self.service.access(&method) {
            None => return Err(rpc::unknown_method(&method)),
            Some(Access::Change) if door == Door::Monitor => return Err(rpc::not_on_monitor(&method)),
            Some(_) => {}
        }
        let answer = self.service.call(door, self.session.peer, &method, params)?;
        Ok(rpc::success(&id, &answer, TOO_LARGE_HINT))
    }

    /// Begins to send events; the answer has the number of the newest.
    fn subscribe(&mut self, params: SubscribeParams) -> Result<u64, Fault> {
        let (mut reader, newest) =
            self.service.feed().reader().map_err(|error| {
                Fault::new(ErrorCode::Internal, format!("cannot make an eventfd: {error}"))
            })?;
        reader.seek(params.since_seq.unwrap_or(newest), newest);
        self.session.subscribe(params.filter, 0, 0);
        self.reader = Some(reader);
        Ok(newest)
    }
}
