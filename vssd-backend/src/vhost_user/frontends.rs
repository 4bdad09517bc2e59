// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Opens and closes the sockets of vSSDs: one listening socket and one thread for each. A vSSD has one front-end at a
//! time; the next waits in the listen queue until the one before has gone.

use std::collections::HashMap;
use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use tracing::{error, info, warn};
use vssd_pool::{Vssd, VssdId};
use vssd_protocol::units::ByteOffset;

use super::queue::DeviceContext;
use super::session::{self, SessionContext, Shared};
use super::worker::WorkerHandle;
use crate::device::config_space::Geometry;
use crate::device::{FrontendError, FrontendStatus, Frontends, OwnerHandle, serial};

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

/// How a socket's thread is told to end.
#[derive(Debug)]
struct Stop {
    event: OwnedFd,
    connection: Mutex<Connection>,
}

#[derive(Debug)]
enum Connection {
    None,
    Open(UnixStream),
    Closed,
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
    ) -> Self {
        Self {
            options,
            workers: workers.into(),
            owner,
            next_key: Arc::new(AtomicU32::new(0)),
            servers: HashMap::new(),
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

/// Listens on `path`. A socket that nobody listens on any more is replaced; anything else in its place is not.
pub fn bind(path: &Path, mode: u32, group: Option<u32>) -> io::Result<UnixListener> {
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a file that is no socket is in the way",
            ));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there"));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    if group.is_some() {
        std::os::unix::fs::chown(path, None, group)?;
    }
    std::fs::set_permissions(path, Permissions::from_mode(mode))?;
    Ok(listener)
}

impl Frontends for VhostUserFrontends {
    fn open(&mut self, vssd: &Arc<Vssd>, capacity: ByteOffset) -> Result<(), FrontendError> {
        let (endpoint, path) = self.endpoint(vssd.name())?;
        let shared = Arc::new(Shared::default());
        shared.capacity.store(capacity.0, Ordering::Release);
        shared.status.lock().unwrap_or_else(PoisonError::into_inner).socket_path.clone_from(&path);
        let mut id = [0; 20];
        let text = serial(vssd.name());
        id[..text.len()].copy_from_slice(text.as_bytes());
        let context = SessionContext {
            device: Arc::new(DeviceContext {
                id: vssd.id(),
                vssd: Arc::clone(vssd),
                serial: id,
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
        let stop = Arc::new(Stop { event, connection: Mutex::new(Connection::None) });
        let finished = match &endpoint {
            Endpoint::Connection(_) => self.finished.take(),
            Endpoint::Listener(_) => None,
        };
        let device = Arc::clone(&context.device);
        let body = {
            let stop = Arc::clone(&stop);
            move || {
                serve(endpoint, &context, &stop);
                if let Some(finished) = finished {
                    let _ = rustix::io::write(&finished, &1u64.to_ne_bytes());
                }
            }
        };
        let thread = thread::Builder::new()
            .name(format!("vssd-{}", vssd.name()))
            .spawn(body)
            .map_err(FrontendError::Thread)?;
        info!(device = vssd.name(), socket = %path.display(), "serving");
        self.servers.insert(vssd.id(), SocketServer { thread: Some(thread), stop, shared, device, path });
        Ok(())
    }

    fn close(&mut self, device: VssdId) -> Result<(), FrontendError> {
        self.servers.remove(&device).map(drop).ok_or(FrontendError::NotOpen(device.0))
    }

    fn set_capacity(&mut self, device: VssdId, capacity: ByteOffset) {
        if let Some(server) = self.servers.get(&device)
            && server.shared.capacity.swap(capacity.0, Ordering::AcqRel) != capacity.0
        {
            server.shared.notify_config_change();
        }
    }

    fn status(&self, device: VssdId) -> FrontendStatus {
        self.servers.get(&device).map_or_else(FrontendStatus::default, |server| {
            let mut status = server.shared.status.lock().unwrap_or_else(PoisonError::into_inner).clone();
            status.errors = server.device.errors.load(Ordering::Relaxed);
            status
        })
    }
}

impl Drop for SocketServer {
    /// Ends the connection, waits for its queues to stop, and removes the socket.
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.stop.event, &1u64.to_ne_bytes());
        let connection = {
            let mut state = self.stop.connection.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *state, Connection::Closed)
        };
        if let Connection::Open(socket) = connection {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            error!(socket = %self.path.display(), "a front-end thread panicked");
        }
        if !self.path.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn serve(endpoint: Endpoint, context: &SessionContext, stop: &Stop) {
    match endpoint {
        Endpoint::Connection(socket) => serve_connection(context, stop, socket),
        Endpoint::Listener(listener) => {
            while let Some(socket) = accept(&listener, stop) {
                serve_connection(context, stop, socket);
            }
        }
    }
}

fn serve_connection(context: &SessionContext, stop: &Stop, socket: UnixStream) {
    match socket.try_clone() {
        Ok(copy) => {
            let mut state = stop.connection.lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(*state, Connection::Closed) {
                return;
            }
            *state = Connection::Open(copy);
        }
        Err(error) => {
            warn!(%error, "cannot serve a connection");
            return;
        }
    }
    session::serve(context.clone(), socket);
    let mut state = stop.connection.lock().unwrap_or_else(PoisonError::into_inner);
    if !matches!(*state, Connection::Closed) {
        *state = Connection::None;
    }
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
                thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }
}
