// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Opens and closes the sockets of vSSDs: one listening socket and one thread for each, and a thread for each connection.
//!
//! A vSSD has few front-ends at a time, of which one runs its rings ([`super::seat`]). One that connects is served once every
//! connection that was cut before has ended: its peer then knows that nobody touches the rings any more.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use control_server::bind;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use tracing::{error, info, warn};
use vssd_pool::{Vssd, VssdId};
use vssd_protocol::letter::Notice;
use vssd_protocol::units::ByteOffset;

use super::queue::{DeviceContext, NoticeCell};
use super::seat::Shared;
use super::session::{self, SessionContext};
use super::worker::WorkerHandle;
use crate::device::config_space::Geometry;
use crate::device::{FrontendError, FrontendStatus, Frontends, OwnerHandle, serial};
use crate::nursery::Nursery;
use crate::sandbox::Thread;

/// Where a vSSD's socket comes from.
#[derive(Debug)]
pub enum SocketSource {
    /// `<directory>/<name>.sock` for every vSSD.
    Directory(PathBuf),
    /// One path for the one vSSD.
    Path(PathBuf),
    /// A descriptor inherited from whoever started the daemon: a listening socket or a connection.
    Inherited(OwnedFd),
    /// The inherited descriptor is in use.
    Taken,
}

/// How sockets are made.
#[derive(Debug)]
pub struct FrontendOptions {
    pub source: SocketSource,
    pub mode: u32,
    /// Who may connect besides the owner; the process's own group if not given.
    pub group: Option<u32>,
    pub queues: u16,
    pub read_only: bool,
    pub logical_block_size: u32,
}

/// The sockets of the daemon.
#[derive(Debug)]
pub struct VhostUserFrontends {
    options: FrontendOptions,
    workers: Arc<[WorkerHandle]>,
    owner: OwnerHandle,
    next_key: Arc<AtomicU32>,
    servers: HashMap<VssdId, SocketServer>,
    nursery: Nursery,
    /// Written to when a connection on an inherited descriptor ends: there will be no other.
    finished: Option<OwnedFd>,
}

#[derive(Debug)]
struct SocketServer {
    thread: Option<JoinHandle<()>>,
    stop: Arc<Stop>,
    shared: Arc<Shared>,
    device: Arc<DeviceContext>,
    path: PathBuf,
}

/// Connections to one vSSD at a time. Two are enough to move a guest; the rest is for peers that are slow to end.
const MAX_CONNECTIONS: usize = 8;

/// How a socket's threads are told to end.
#[derive(Debug)]
struct Stop {
    event: OwnedFd,
    connections: Mutex<Connections>,
}

#[derive(Debug, Default)]
struct Connections {
    /// By number, in the order in which they came.
    open: Vec<(u64, UnixStream)>,
    closed: bool,
}

impl Stop {
    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Endpoint {
    Listener(UnixListener),
    Connection(UnixStream),
}

impl VhostUserFrontends {
    pub fn new(
        options: FrontendOptions,
        workers: &[WorkerHandle],
        owner: OwnerHandle,
        finished: Option<OwnedFd>,
        nursery: Nursery,
    ) -> Self {
        Self {
            options,
            workers: workers.into(),
            owner,
            next_key: Arc::new(AtomicU32::new(0)),
            servers: HashMap::new(),
            nursery,
            finished,
        }
    }

    fn endpoint(&mut self, name: &str) -> Result<(Endpoint, PathBuf), FrontendError> {
        let path = match &self.options.source {
            SocketSource::Directory(directory) => directory.join(format!("{name}.sock")),
            SocketSource::Path(path) => path.clone(),
            SocketSource::Inherited(_) | SocketSource::Taken => return self.inherited(),
        };
        let listen = |source| FrontendError::Listen { path: path.clone(), source };
        let listener = bind(&path, self.options.mode, self.options.group).map_err(listen)?;
        Ok((Endpoint::Listener(listener), path))
    }

    fn inherited(&mut self) -> Result<(Endpoint, PathBuf), FrontendError> {
        let path = PathBuf::new();
        let SocketSource::Inherited(fd) = std::mem::replace(&mut self.options.source, SocketSource::Taken)
        else {
            let source = io::Error::other("the inherited descriptor serves another vSSD");
            return Err(FrontendError::Listen { path, source });
        };
        let listening = rustix::net::sockopt::socket_acceptconn(&fd)
            .map_err(|errno| FrontendError::Listen { path: path.clone(), source: errno.into() })?;
        let endpoint = if listening {
            Endpoint::Listener(UnixListener::from(fd))
        } else {
            Endpoint::Connection(UnixStream::from(fd))
        };
        Ok((endpoint, path))
    }
}

impl Frontends for VhostUserFrontends {
    fn open(&mut self, vssd: &Arc<Vssd>, capacity: ByteOffset) -> Result<(), FrontendError> {
        let (endpoint, path) = self.endpoint(vssd.name())?;
        let shared = Arc::new(Shared::default());
        shared.capacity.store(capacity.0, Ordering::Release);
        let mut id = [0; 20];
        let text = serial(vssd.name());
        id[..text.len()].copy_from_slice(text.as_bytes());
        let context = SessionContext {
            device: Arc::new(DeviceContext {
                id: vssd.id(),
                vssd: Arc::clone(vssd),
                serial: id,
                logical_block: self.options.logical_block_size.into(),
                notice: NoticeCell::default(),
                owner: self.owner.clone(),
                errors: AtomicU64::new(0),
            }),
            shared: Arc::clone(&shared),
            workers: Arc::clone(&self.workers),
            geometry: Geometry {
                block_size: vssd.block_size(),
                logical_block_size: self.options.logical_block_size,
                queues: self.options.queues,
                read_only: self.options.read_only,
            },
            next_key: Arc::clone(&self.next_key),
        };
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| FrontendError::Thread(errno.into()))?;
        let stop = Arc::new(Stop { event, connections: Mutex::default() });
        let finished = match &endpoint {
            Endpoint::Connection(_) => self.finished.take(),
            Endpoint::Listener(_) => None,
        };
        let device = Arc::clone(&context.device);
        let body = {
            let (stop, nursery) = (Arc::clone(&stop), self.nursery.clone());
            move || {
                serve(endpoint, &context, &stop, &nursery);
                if let Some(finished) = finished {
                    let _ = rustix::io::write(&finished, &1u64.to_ne_bytes());
                }
            }
        };
        let thread =
            self.nursery.spawn(format!("vssd-{}", vssd.name()), body).map_err(FrontendError::Thread)?;
        info!(device = vssd.name(), socket = %path.display(), "serving");
        self.servers.insert(vssd.id(), SocketServer { thread: Some(thread), stop, shared, device, path });
        Ok(())
    }

    fn close(&mut self, device: VssdId) -> Result<(), FrontendError> {
        self.servers.get(&device).map(SocketServer::end).ok_or(FrontendError::NotOpen(device.0))
    }

    fn is_closed(&mut self, device: VssdId) -> bool {
        let runs = |server: &SocketServer| server.thread.as_ref().is_some_and(|t| !t.is_finished());
        if self.servers.get(&device).is_some_and(runs) {
            return false;
        }
        self.servers.remove(&device);
        true
    }

    fn set_capacity(&mut self, device: VssdId, capacity: ByteOffset) {
        if let Some(server) = self.servers.get(&device)
            && server.shared.capacity.swap(capacity.0, Ordering::AcqRel) != capacity.0
        {
            server.shared.notify_config_change();
        }
    }

    fn set_notice(&mut self, device: VssdId, notice: Notice) {
        if let Some(server) = self.servers.get(&device) {
            server.device.notice.set(notice);
        }
    }

    fn status(&self, device: VssdId) -> FrontendStatus {
        self.servers.get(&device).map_or_else(FrontendStatus::default, |server| FrontendStatus {
            errors: server.device.errors.load(Ordering::Relaxed),
            socket_path: server.path.clone(),
            ..server.shared.status()
        })
    }
}

impl SocketServer {
    /// Ends the connections, without waiting for it.
    fn end(&self) {
        self.shared.close();
        let _ = rustix::io::write(&self.stop.event, &1u64.to_ne_bytes());
        let mut connections = self.stop.connections();
        connections.closed = true;
        for (_, socket) in &connections.open {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for SocketServer {
    /// Ends the connections, waits for their queues to stop, and removes the socket.
    fn drop(&mut self) {
        self.end();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            error!(socket = %self.path.display(), "a front-end thread panicked");
        }
        if !self.path.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Serves all connections to their ends.
fn serve(endpoint: Endpoint, context: &SessionContext, stop: &Arc<Stop>, nursery: &Nursery) {
    let listener = match endpoint {
        Endpoint::Connection(socket) => {
            if admit(stop, 0, &socket, context) {
                serve_connection(context, stop, nursery, 0, socket);
            }
            return;
        }
        Endpoint::Listener(listener) => listener,
    };
    if let Err(error) = nursery.enter(Thread::Acceptor) {
        error!(device = context.device.vssd.name(), %error, "no front-end is served: its threads cannot be confined");
        return;
    }
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    let mut number = 0;
    while let Some(socket) = accept(&listener, stop) {
        let (ended, running) = threads.into_iter().partition(JoinHandle::is_finished);
        threads = running;
        join(ended);
        number += 1;
        if !admit(stop, number, &socket, context) {
            continue;
        }
        let body = {
            let (context, stop, nursery) = (context.clone(), Arc::clone(stop), nursery.clone());
            move || serve_connection(&context, &stop, &nursery, number, socket)
        };
        match nursery.spawn(format!("vssd-{}", context.device.vssd.name()), body) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                warn!(device = context.device.vssd.name(), %error, "cannot start a thread for a front-end");
                stop.connections().open.retain(|(other, _)| *other != number);
            }
        }
    }
    join(threads);
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        if thread.join().is_err() {
            error!("a front-end thread panicked");
        }
    }
}

/// Notes a connection, if it may be served.
fn admit(stop: &Stop, number: u64, socket: &UnixStream, context: &SessionContext) -> bool {
    let device = context.device.vssd.name();
    let copy = match socket.try_clone() {
        Ok(copy) => copy,
        Err(error) => {
            warn!(device, %error, "cannot serve a connection");
            return false;
        }
    };
    let mut connections = stop.connections();
    if connections.open.len() >= MAX_CONNECTIONS {
        warn!(device, "a front-end was turned away: {MAX_CONNECTIONS} others are connected");
        return false;
    }
    if !connections.closed {
        connections.open.push((number, copy));
    }
    !connections.closed
}

fn serve_connection(
    context: &SessionContext,
    stop: &Stop,
    nursery: &Nursery,
    number: u64,
    socket: UnixStream,
) {
    if let Err(error) = nursery.enter(Thread::Session) {
        error!(device = context.device.vssd.name(), %error, "a front-end is not served: its thread cannot be confined");
        stop.connections().open.retain(|(other, _)| *other != number);
        return;
    }
    while has_departing(&stop.connections(), number) {
        context.shared.wait_moved(Duration::from_millis(20));
    }
    session::serve(context.clone(), socket);
    stop.connections().open.retain(|(other, _)| *other != number);
}

/// Whether a connection older than `number` has lost its peer and not ended yet.
fn has_departing(connections: &Connections, number: u64) -> bool {
    let older = connections.open.iter().filter(|(other, _)| *other < number);
    let mut fds: Vec<_> = older.map(|(_, socket)| PollFd::new(socket, PollFlags::empty())).collect();
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    !fds.is_empty()
        && poll(&mut fds, Some(&now)).is_ok()
        && fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP))
}

/// The next connection; `None` once the socket is to be closed.
fn accept(listener: &UnixListener, stop: &Stop) -> Option<UnixStream> {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&stop.event, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                error!(%error, "cannot wait for connections");
                return None;
            }
        }
        if !fds[1].revents().is_empty() {
            return None;
        }
        if fds[0].revents().is_empty() {
            continue;
        }
        match listener.accept() {
            Ok((socket, _)) => return Some(socket),
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                // Out of descriptors, most likely: give others time to return some.
                let pause = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
                let _ = poll(&mut [PollFd::new(&stop.event, PollFlags::IN)], Some(&pause));
            }
        }
    }
}
