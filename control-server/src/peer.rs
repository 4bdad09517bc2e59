// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Who is at the other end of a Unix socket.

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

/// A peer as the kernel noted it when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    /// 0 for a process that this one cannot see (another PID namespace), which is why the raw structure is read: a
    /// typed one would have no value for it.
    pub pid: i32,
}

/// Asks the kernel.
#[allow(unsafe_code)]
pub fn peer_of(stream: &UnixStream) -> io::Result<Peer> {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    // SAFETY: `peer` and `len` outlive the call, and `len` is the size of `peer`, of which every bit pattern is valid.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Peer { uid: peer.uid, pid: peer.pid })
}
