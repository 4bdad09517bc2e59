// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One connection to a vhost-user socket: messages as QEMU sends them, or as it never would.

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recv, recvmsg, sendmsg,
};

use super::PATIENCE;

/// Front-end message types (vhost-user protocol, "Front-end message types").
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// Protocol feature bits.
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

const VERSION: u32 = 1;
const F_REPLY: u32 = 1 << 2;
/// The sender wants an acknowledgement.
pub const F_NEED_REPLY: u32 = 1 << 3;
/// `BACKEND_CONFIG_CHANGE_MSG`.
const CONFIG_CHANGE: u32 = 2;
const MAX_FDS: usize = 32;

/// A message from the daemon.
#[derive(Debug)]
pub struct Message {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    pub fn u64(&self) -> Result<u64> {
        let bytes = self.payload.get(..8).context("answer without a u64")?;
        Ok(u64::from_le_bytes(bytes.try_into()?))
    }
}

/// A connection.
#[derive(Debug)]
pub struct Frontend {
    socket: UnixStream,
    /// Every message asks for an acknowledgement.
    pub acknowledged: bool,
}

/// The 12 bytes before every payload.
pub fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Numbers as a payload.
pub fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

impl Frontend {
    pub fn connect(path: &Path) -> Result<Self> {
        let socket = UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket, acknowledged: false })
    }

    /// Bytes and descriptors as they are.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ensure!(control.push(SendAncillaryMessage::ScmRights(fds)), "too many descriptors");
        }
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        ensure!(sent == bytes.len(), "sent {sent} of {} bytes", bytes.len());
        Ok(())
    }

    /// A well-formed message; no answer is read.
    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut bytes = header(request, VERSION | flags, u32::try_from(payload.len())?);
        bytes.extend_from_slice(payload);
        self.send_raw(&bytes, fds).with_context(|| format!("send message {request}"))
    }

    /// The next message from the daemon. An error if it closed the connection.
    pub fn receive(&self) -> Result<Message> {
        let mut head = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut head)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL,
        )?;
        ensure!(got.bytes == head.len(), "the daemon closed the connection");
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let word = |at: usize| u32::from_ne_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let mut payload = vec![0; usize::try_from(word(8))?];
        (&self.socket).read_exact(&mut payload).context("read a payload")?;
        Ok(Message { request: word(0), flags: word(4), payload, fds })
    }

    /// A message that has an answer of its own.
    pub fn get(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        self.send(request, 0, payload, fds)?;
        let answer = self.receive().with_context(|| format!("answer to message {request}"))?;
        ensure!(answer.request == request, "message {request} was answered by {}", answer.request);
        ensure!(answer.flags & (F_REPLY | 3) == F_REPLY | VERSION, "flags {:#x}", answer.flags);
        Ok(answer)
    }

    /// A message without an answer of its own; waits for the acknowledgement if that was negotiated.
    pub fn set(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        if !self.acknowledged {
            return self.send(request, 0, payload, fds);
        }
        self.send(request, F_NEED_REPLY, payload, fds)?;
        let answer = self.receive().with_context(|| format!("acknowledgement of message {request}"))?;
        ensure!(answer.request == request, "message {request} was answered by {}", answer.request);
        match answer.u64()? {
            0 => Ok(()),
            error => bail!("message {request} was refused with {error}"),
        }
    }

    /// Whether the daemon has ended the connection. Does not wait; what it sent before is thrown away.
    pub fn has_ended(&self) -> bool {
        let mut bytes = [0u8; 256];
        loop {
            match recv(&self.socket, &mut bytes, RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return true,
                Ok(_) => {}
                Err(errno) => return errno != Errno::AGAIN,
            }
        }
    }

    /// Whether the daemon has ended the connection, or does so within [`PATIENCE`].
    pub fn ends(&self) -> bool {
        let mut byte = [0; 256];
        loop {
            match (&self.socket).read(&mut byte) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return true,
                Err(_) => return false,
            }
        }
    }
}

/// The channel on which the daemon speaks first.
#[derive(Debug)]
pub struct BackendChannel {
    ours: UnixStream,
}

impl BackendChannel {
    /// The channel and the end for the daemon.
    pub fn new() -> Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self { ours }, theirs))
    }

    /// Waits until the daemon says that the configuration space changed. `false` if it does not within `limit`.
    pub fn config_changed(&self, limit: std::time::Duration) -> Result<bool> {
        self.ours.set_read_timeout(Some(limit))?;
        let mut head = [0; 12];
        match (&self.ours).read_exact(&mut head) {
            Ok(()) => {
                ensure!(head == *header(CONFIG_CHANGE, VERSION, 0), "not a config-change message: {head:?}");
                Ok(true)
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::UnexpectedEof
                ) =>
            {
                Ok(false)
            }
            Err(error) => Err(error).context("read the back-end's channel"),
        }
    }
}
