// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host's end of the guest agent: jobs by number, what they printed, how they ended.
//!
//! Knows the frames and nothing of QEMU. A reader thread sorts incoming frames into jobs; callers wait on them.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::process::tail;
use crate::wait::Deadline;
use crate::wire::{Frame, FrameReader, Kind, MAX_PAYLOAD};

/// How long the guest may leave the port unread.
const WRITE: Duration = Duration::from_secs(60);

/// What a command left behind.
#[derive(Clone, PartialEq, Eq)]
pub struct Output {
    /// The command, for messages.
    pub command: String,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// Its exit code; 128 + n for signal n.
    pub code: i32,
}

impl Output {
    /// Whether the exit code is 0.
    pub fn success(&self) -> bool {
        self.code == 0
    }

    /// Standard output without the white space around it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Standard error without the white space around it.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }

    /// An error unless the exit code is 0.
    pub fn check(self) -> Result<Self> {
        if self.success() { Ok(self) } else { bail!("{self:?}") }
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest: `{}` ended with {}", self.command, self.code)?;
        for (name, text) in [("stdout", self.text()), ("stderr", self.errors())] {
            if !text.is_empty() {
                write!(f, "\n  {name}: {}", tail(&text, 20))?;
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Exit(i32),
    /// The job can give no answer any more.
    Lost(&'static str),
}

#[derive(Debug, Default)]
struct Slot {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Option<End>,
}

#[derive(Debug, Default)]
struct State {
    /// How many boots have said hello.
    boots: u32,
    release: String,
    next_job: u32,
    jobs: HashMap<u32, Slot>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    news: Condvar,
    /// Where the guest's bytes go on when the connection at hand ends.
    next: Mutex<Option<UnixStream>>,
}

/// The guest's bytes: from one connection after the other, when the guest is moved.
#[derive(Debug)]
struct Port {
    stream: UnixStream,
    shared: Arc<Shared>,
}

impl Read for Port {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(buf) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => {
                    let next = self.shared.next.lock().unwrap_or_else(PoisonError::into_inner).take();
                    let Some(next) = next else { return Ok(0) };
                    self.stream = next;
                }
                other => return other,
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn receive(&self, frame: &Frame) {
        let mut state = self.lock();
        match frame.kind {
            Kind::Hello => {
                state.boots += 1;
                state.release = String::from_utf8_lossy(&frame.payload).into_owned();
                state.lose_all("the guest rebooted");
            }
            Kind::Stdout | Kind::Stderr | Kind::Exit => {
                if let Some(slot) = state.jobs.get_mut(&frame.job) {
                    match frame.kind {
                        Kind::Stdout => slot.stdout.extend_from_slice(&frame.payload),
                        Kind::Stderr => slot.stderr.extend_from_slice(&frame.payload),
                        _ => {
                            let code = frame.payload.as_slice().try_into().map_or(-1, i32::from_le_bytes);
                            slot.end.get_or_insert(End::Exit(code));
                        }
                    }
                }
            }
            Kind::Run | Kind::Stdin | Kind::StdinEnd | Kind::Kill => {}
        }
        self.news.notify_all();
    }
}

impl State {
    fn lose_all(&mut self, why: &'static str) {
        for slot in self.jobs.values_mut() {
            slot.end.get_or_insert(End::Lost(why));
        }
    }
}

/// A connection to the agent; clones speak to the same one.
#[derive(Debug, Clone)]
pub struct Agent {
    shared: Arc<Shared>,
    port: Arc<Mutex<UnixStream>>,
}

impl Agent {
    /// Takes over the connected port.
    pub fn new(port: UnixStream) -> Result<Self> {
        // A guest that hangs stops reading; then a write must fail, not hang with it.
        port.set_write_timeout(Some(WRITE))?;
        // What a job of an earlier connection to the same guest still says must not be taken for the word of one of ours.
        let state = State { next_job: process::id().wrapping_shl(10), ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), ..Shared::default() });
        let stream = port.try_clone().context("share the agent's port")?;
        let mut frames = FrameReader::new(Port { stream, shared: Arc::clone(&shared) });
        let theirs = Arc::clone(&shared);
        thread::spawn(move || {
            // Ends with the connection: QEMU's end, or ours being shut down.
            while let Ok(Some(frame)) = frames.read() {
                theirs.receive(&frame);
            }
            let mut state = theirs.lock();
            state.closed = true;
            state.lose_all("the guest is gone");
            theirs.news.notify_all();
        });
        Ok(Self { shared, port: Arc::new(Mutex::new(port)) })
    }

    /// The guest has been moved to a machine with another connection: it is written to from now on, and read once the one
    /// before has ended.
    pub fn move_to(&self, port: UnixStream) -> Result<()> {
        port.set_write_timeout(Some(WRITE))?;
        let reader = port.try_clone().context("share the agent's port")?;
        *self.shared.next.lock().unwrap_or_else(PoisonError::into_inner) = Some(reader);
        *self.port.lock().unwrap_or_else(PoisonError::into_inner) = port;
        Ok(())
    }

    /// How many boots have reported ready.
    pub fn boots(&self) -> u32 {
        self.shared.lock().boots
    }

    /// The kernel release that the last boot reported.
    pub fn release(&self) -> String {
        self.shared.lock().release.clone()
    }

    /// Whether the connection has ended.
    pub fn closed(&self) -> bool {
        self.shared.lock().closed
    }

    fn send(&self, frame: &Frame) -> Result<()> {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        frame.write_to(&mut *port).context("send to the guest agent")
    }

    /// Waits until the guest answers, whether this connection has seen it boot or an earlier one has.
    pub fn wait_answer(&self, limit: Duration) -> Result<()> {
        // The guest may boot only now; then the job is lost to its greeting, which says as much as an answer.
        let answer = self.spawn("true")?.wait(limit);
        match answer {
            Err(error) if self.boots() == 0 || self.closed() => Err(error),
            _ => Ok(()),
        }
    }

    /// Starts a command; its standard input stays open until [`Job::close_stdin`].
    pub fn spawn(&self, command: &str) -> Result<Job> {
        let id = {
            let mut state = self.shared.lock();
            if state.closed {
                bail!("cannot run `{command}`: the guest is gone");
            }
            let id = state.next_job;
            state.next_job = id.wrapping_add(1);
            state.jobs.insert(id, Slot::default());
            id
        };
        let job = Job { agent: self.clone(), id, command: command.to_owned() };
        if command.len() > MAX_PAYLOAD {
            bail!("a command of {} bytes; at most {MAX_PAYLOAD}", command.len());
        }
        self.send(&Frame::new(Kind::Run, id, command))?;
        Ok(job)
    }
}

/// A command running in the guest. Dropping it leaves the command alone and forgets its output.
#[derive(Debug)]
pub struct Job {
    agent: Agent,
    id: u32,
    command: String,
}

impl Job {
    /// Whether it has ended, one way or another.
    pub fn ended(&self) -> bool {
        self.slot(|slot| slot.end.is_some())
    }

    /// Standard output so far.
    pub fn stdout(&self) -> Vec<u8> {
        self.slot(|slot| slot.stdout.clone())
    }

    fn slot<T>(&self, read: impl FnOnce(&Slot) -> T) -> T {
        let mut state = self.agent.shared.lock();
        read(state.jobs.entry(self.id).or_default())
    }

    /// Sends bytes to its standard input.
    pub fn write_stdin(&self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(MAX_PAYLOAD / 2) {
            self.agent.send(&Frame::new(Kind::Stdin, self.id, chunk))?;
        }
        Ok(())
    }

    /// Ends its standard input.
    pub fn close_stdin(&self) -> Result<()> {
        self.agent.send(&Frame::new(Kind::StdinEnd, self.id, []))
    }

    /// Kills it and its children.
    pub fn kill(&self) -> Result<()> {
        self.agent.send(&Frame::new(Kind::Kill, self.id, []))
    }

    /// Waits for its end; the exit code is the caller's to judge.
    pub fn wait(&self, limit: Duration) -> Result<Output> {
        self.wait_watching(limit, || Ok(()))
    }

    /// As [`Job::wait`]; `watch` is called now and then and ends the wait with its error.
    pub fn wait_watching(&self, limit: Duration, mut watch: impl FnMut() -> Result<()>) -> Result<Output> {
        let deadline = Deadline::after(limit);
        let shared = &self.agent.shared;
        let mut state = shared.lock();
        loop {
            let slot = state.jobs.entry(self.id).or_default();
            match slot.end {
                Some(End::Exit(code)) => {
                    return Ok(Output {
                        command: self.command.clone(),
                        stdout: slot.stdout.clone(),
                        stderr: slot.stderr.clone(),
                        code,
                    });
                }
                Some(End::Lost(why)) => return Err(anyhow!("guest: `{}` was lost: {why}", self.command)),
                None => {}
            }
            if deadline.passed() {
                let said = String::from_utf8_lossy(&slot.stdout).into_owned();
                let complained = String::from_utf8_lossy(&slot.stderr).into_owned();
                bail!(
                    "guest: `{}` has not ended after {:.1} s; it said: {}\n{}",
                    self.command,
                    limit.as_secs_f64(),
                    tail(&said, 10),
                    tail(&complained, 10)
                );
            }
            let pause = deadline.left().min(Duration::from_millis(500));
            state = shared.news.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
            drop(state);
            watch()?;
            state = shared.lock();
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.agent.shared.lock().jobs.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An agent whose guest is the other end of a socket pair.
    fn pair() -> (Agent, UnixStream) {
        let (ours, guest) = UnixStream::pair().unwrap();
        (Agent::new(ours).unwrap(), guest)
    }

    #[test]
    fn output_of_two_jobs_is_kept_apart() {
        let (agent, mut guest) = pair();
        let one = agent.spawn("one").unwrap();
        let two = agent.spawn("two").unwrap();
        for frame in [
            Frame::new(Kind::Stdout, two.id, *b"2a"),
            Frame::new(Kind::Stdout, one.id, *b"1"),
            Frame::new(Kind::Stdout, two.id, *b"2b"),
            Frame::new(Kind::Exit, two.id, 3i32.to_le_bytes()),
            Frame::new(Kind::Exit, one.id, 0i32.to_le_bytes()),
        ] {
            frame.write_to(&mut guest).unwrap();
        }
        let limit = Duration::from_secs(5);
        let (first, second) = (one.wait(limit).unwrap(), two.wait(limit).unwrap());
        assert_eq!((first.text().as_str(), first.code), ("1", 0));
        assert_eq!((second.text().as_str(), second.code), ("2a2b", 3));
    }

    #[test]
    fn a_job_is_lost_when_the_guest_boots_again_or_goes_away() {
        let (agent, mut guest) = pair();
        let limit = Duration::from_secs(5);
        let first = agent.spawn("sleep").unwrap();
        Frame::new(Kind::Hello, 0, *b"6.1").write_to(&mut guest).unwrap();
        assert!(first.wait(limit).unwrap_err().to_string().contains("rebooted"));
        let second = agent.spawn("sleep").unwrap();
        drop(guest);
        assert!(second.wait(limit).unwrap_err().to_string().contains("gone"));
        assert!(agent.spawn("more").is_err());
    }

    #[test]
    fn a_command_that_does_not_end_is_given_up() {
        let (agent, _guest) = pair();
        let job = agent.spawn("sleep").unwrap();
        let error = job.wait(Duration::from_millis(20)).unwrap_err().to_string();
        assert!(error.contains("has not ended"), "{error}");
    }
}
