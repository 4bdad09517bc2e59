// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A connection to a NUT server: lines there and back, in bounded time and space, and given up at once when told to stop.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFlags, eventfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use super::{NutError, shorten};
use crate::power::sources::{Stop, Woken};

/// No line of the protocol is longer; servers build them in buffers of 512 or 1024 bytes.
const LONGEST_LINE: usize = 2048;

/// By when something has to be done, and what else ends it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit<'a> {
    pub(super) stop: &'a Stop,
    pub(super) until: Instant,
}

impl<'a> Limit<'a> {
    pub(super) fn new(stop: &'a Stop, timeout: Duration) -> Self {
        let now = Instant::now();
        Self { stop, until: now.checked_add(timeout).unwrap_or(now) }
    }

    /// Waits for `fd`.
    fn wait(&self, fd: impl AsFd, flags: PollFlags) -> Result<(), NutError> {
        let left = self.until.saturating_duration_since(Instant::now());
        match self.stop.wait(&[(fd.as_fd(), flags)], Some(left))? {
            Woken::Ready(_) => Ok(()),
            Woken::Stopped => Err(NutError::Stopped),
            Woken::TimedOut => Err(NutError::TimedOut),
        }
    }
}

/// The addresses of a host. Resolving a name can take long and cannot be stopped, so a thread does it that nobody waits for
/// longer than the limit.
#[derive(Debug, Default)]
pub(super) struct Resolver {
    /// One that was not waited for to the end: there is never a second one.
    pending: Option<Pending>,
}

/// A thread that resolves a name.
#[derive(Debug)]
struct Pending {
    found: Receiver<io::Result<Vec<SocketAddr>>>,
    /// An eventfd: it has been found.
    done: Arc<OwnedFd>,
}

impl Pending {
    fn start(host: &str, port: u16) -> Result<Self, NutError> {
        let (sender, found) = sync_channel(1);
        let done = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (tell, host) = (Arc::clone(&done), host.to_owned());
        thread::Builder::new().name("power-resolve".into()).spawn(move || {
            let _ = sender.send((host.as_str(), port).to_socket_addrs().map(Iterator::collect));
            let _ = rustix::io::write(&*tell, &1u64.to_ne_bytes());
        })?;
        Ok(Self { found, done })
    }
}

impl Resolver {
    pub(super) fn resolve(
        &mut self,
        host: &str,
        port: u16,
        limit: &Limit<'_>,
    ) -> Result<Vec<SocketAddr>, NutError> {
        if let Ok(address) = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let pending = match self.pending.take() {
            Some(pending) => pending,
            None => Pending::start(host, port)?,
        };
        if let Err(error) = limit.wait(&*pending.done, PollFlags::IN) {
            self.pending = Some(pending);
            return Err(error);
        }
        let found = pending.found.try_recv().map_err(|_| NutError::NoAddress)??;
        if found.is_empty() { Err(NutError::NoAddress) } else { Ok(found) }
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Wire {
    socket: TcpStream,
    /// What came after the last line.
    buffer: Vec<u8>,
}

impl Wire {
    /// Connects to the first of `addresses` that answers.
    pub(super) fn connect(addresses: &[SocketAddr], limit: &Limit<'_>) -> Result<Self, NutError> {
        let mut last = NutError::NoAddress;
        for (place, address) in addresses.iter().enumerate() {
            // One that does not answer leaves time for the others.
            let left = limit.until.saturating_duration_since(Instant::now());
            let parts = u32::try_from(addresses.len() - place).unwrap_or(u32::MAX);
            match Self::connect_to(address, &Limit::new(limit.stop, left / parts)) {
                Ok(wire) => return Ok(wire),
                Err(NutError::Stopped) => return Err(NutError::Stopped),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn connect_to(address: &SocketAddr, limit: &Limit<'_>) -> Result<Self, NutError> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        match connect(&socket, address) {
            Ok(()) => {}
            Err(rustix::io::Errno::INPROGRESS) => {
                limit.wait(&socket, PollFlags::OUT)?;
                sockopt::socket_error(&socket)??;
            }
            Err(errno) => return Err(errno.into()),
        }
        let socket = TcpStream::from(socket);
        // Each command is a round trip.
        socket.set_nodelay(true)?;
        Ok(Self { socket, buffer: Vec::new() })
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Sends a line, to which "\n" is added.
    pub(super) fn send(&mut self, line: &str, limit: &Limit<'_>) -> Result<(), NutError> {
        if !self.buffer.is_empty() {
            // It would be taken for the answer.
            let line = String::from_utf8_lossy(&self.buffer);
            return Err(NutError::Unasked { line: shorten(&line) });
        }
        let line = format!("{line}\n");
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match self.socket.write(rest) {
                Ok(0) => return Err(NutError::Closed),
                Ok(length) => rest = rest.get(length..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    limit.wait(&self.socket, PollFlags::OUT)?;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next line, without its end. However slowly it comes, it has to be there in time.
    pub(super) fn receive(&mut self, limit: &Limit<'_>) -> Result<String, NutError> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.buffer.iter().skip(searched).position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=searched + end).collect();
                while line.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
                    line.pop();
                }
                return String::from_utf8(line).map_err(|_| NutError::NoProtocol { line: "no text".into() });
            }
            searched = self.buffer.len();
            if searched > LONGEST_LINE {
                return Err(NutError::TooLong { max: LONGEST_LINE });
            }
            limit.wait(&self.socket, PollFlags::IN)?;
            let mut piece = [0; 512];
            match self.socket.read(&mut piece) {
                Ok(0) => return Err(NutError::Closed),
                Ok(length) => self.buffer.extend_from_slice(&piece[..length]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
