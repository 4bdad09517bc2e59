// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A vSSD as a block device, in plain words: what it is asked, what happens to it, and who answers.
//!
//! This module knows neither vhost nor virtio queues, neither sockets nor files. Three kinds of value
//! cross its borders:
//!
//! * [`DeviceEvent`]: news from queues and front-ends to the one owner of all sizes ([`owner`]), in order.
//! * [`Reply`]: the right and the duty to answer one guest-channel request.
//! * [`Frontends`]: what the owner may ask of the side that holds the sockets.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};

use vssd_pool::{Vssd, VssdId};
use vssd_protocol::guest;
use vssd_protocol::letter::{Notice, Report};
use vssd_protocol::units::ByteOffset;

pub mod config_space;
pub mod execute;
pub mod owner;
pub mod request;

/// One guest-channel request, decoded, on its way to the owner.
#[derive(Debug)]
pub struct GuestCall {
    pub device: VssdId,
    pub request: guest::Request,
    /// Bytes the driver provided for the response, status byte not counted; at least
    /// [`guest::min_response_len`] of the request.
    pub response_room: usize,
    pub reply: Reply,
}

/// Carries a response back to the queue that the request came from.
pub trait ReplySink: Send + Sync {
    /// Completes `ticket` with `response` (status OK), or with status IOERR when it is empty.
    fn complete(&self, ticket: u64, response: Vec<u8>);
}

/// The answer owed to one request. Dropping it unsent answers IOERR, so that no chain is ever lost.
pub struct Reply {
    sink: Arc<dyn ReplySink>,
    ticket: u64,
    sent: bool,
}

impl Reply {
    pub fn new(sink: Arc<dyn ReplySink>, ticket: u64) -> Self {
        Self { sink, ticket, sent: false }
    }

    /// Sends the encoded response body ([`guest::Response::encode`]).
    pub fn send(mut self, response: Vec<u8>) {
        self.sent = true;
        self.sink.complete(self.ticket, response);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.sent {
            self.sink.complete(self.ticket, Vec::new());
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("ticket", &self.ticket)
            .field("sent", &self.sent)
            .finish_non_exhaustive()
    }
}

/// News for the owner. Events of one device arrive in the order in which they happened.
#[derive(Debug)]
pub enum DeviceEvent {
    Guest(GuestCall),
    /// A front-end opened the device's socket.
    Connected {
        device: VssdId,
        pid: Option<i32>,
    },
    /// The front-end is gone, and every session of its guest with it.
    Disconnected {
        device: VssdId,
        /// What the front-end did to be cut off, if that was it.
        reason: Option<&'static str>,
    },
    /// A request queue began to run. At ring index 0 a driver has just initialised the device, so the session of
    /// the driver before it is over; at any other index the same driver goes on.
    QueueStarted {
        device: VssdId,
        queue: u16,
        fresh: bool,
    },
    /// An agent wrote through a driver that knows nothing of vSSDs.
    Report {
        device: VssdId,
        report: Report,
    },
    /// A queue is about to stop and takes no new requests: parked WAITs are to be answered now. `done` is signalled
    /// once none of the device's requests is parked any more.
    Quiesce {
        device: VssdId,
        done: mpsc::Sender<()>,
    },
}

/// Where queues and front-ends send their news. Wakes the owner's event loop.
#[derive(Clone, Debug)]
pub struct OwnerHandle {
    events: mpsc::Sender<DeviceEvent>,
    wake: Arc<rustix::fd::OwnedFd>,
}

impl OwnerHandle {
    /// The handle and its two receiving ends: the events, and an eventfd that is readable while there are some.
    pub fn new() -> std::io::Result<(Self, mpsc::Receiver<DeviceEvent>, Arc<rustix::fd::OwnedFd>)> {
        use rustix::event::{EventfdFlags, eventfd};
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let (events, receiver) = mpsc::channel();
        Ok((Self { events, wake: Arc::clone(&wake) }, receiver, wake))
    }

    /// Hands over an event. When the owner is gone (the daemon is ending) the event is dropped, and with it a
    /// [`Reply`] answers itself.
    pub fn send(&self, event: DeviceEvent) {
        if self.events.send(event).is_ok() {
            // Fails only when the counter is at its limit, and then the owner is awake anyway.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// What is known of a device's front-end.
#[derive(Clone, Debug, Default)]
pub struct FrontendStatus {
    pub connected: bool,
    pub pid: Option<i32>,
    pub queues: u32,
    pub connections: u64,
    /// Requests that were refused or failed since the daemon started; those that met unplugged blocks are not among them.
    pub errors: u64,
    pub socket_path: PathBuf,
}

/// What the owner asks of the vhost-user side.
pub trait Frontends: Send {
    /// Opens the socket of a vSSD, now served. The path is `<runtime dir>/dev/<name>.sock` unless configured.
    fn open(&mut self, vssd: &Arc<Vssd>, capacity: ByteOffset) -> Result<(), FrontendError>;
    /// Begins to disconnect the front-end and to answer what is in flight.
    fn close(&mut self, device: VssdId) -> Result<(), FrontendError>;
    /// Whether what [`Frontends::close`] began is over: no queue of the device touches the vSSD any more, and the socket is
    /// removed.
    fn is_closed(&mut self, device: VssdId) -> bool;
    /// Publishes another capacity and tells the front-end (config-change message). Coalescing is the callee's work.
    fn set_capacity(&mut self, device: VssdId, capacity: ByteOffset);
    /// What an agent is told that asks through a driver that knows nothing of vSSDs.
    fn set_notice(&mut self, device: VssdId, notice: Notice);
    fn status(&self, device: VssdId) -> FrontendStatus;
}

/// Why a socket could not be opened or closed.
#[derive(Debug, thiserror::Error)]
pub enum FrontendError {
    #[error("cannot listen on {path:?}")]
    Listen {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("vSSD {0} has no socket")]
    NotOpen(u32),
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// The serial number that GET_ID answers and udev rules match: `vssd-` and the name; a name over 15 bytes is cut and
/// made distinct by a checksum, for the field has 20 bytes (virtio 1.3, §5.2.6).
pub fn serial(name: &str) -> String {
    const ROOM: usize = 15;
    if name.len() <= ROOM {
        return format!("vssd-{name}");
    }
    // FNV-1a: stable across versions, unlike the standard library's hasher.
    let hash = name.bytes().fold(0x811c_9dc5_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let head: String = name.chars().take(ROOM - 9).collect();
    format!("vssd-{head}~{hash:08x}")
}
