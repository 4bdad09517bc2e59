// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The channel on which the back-end speaks first: the config-change message, without which a live resize never reaches
//! a stock guest.
//!
//! `vhost` 0.18 parses `SET_BACKEND_REQ_FD` but keeps the descriptor to itself and has no way to send this message. So
//! the request that carries the descriptor is looked at (`MSG_PEEK`) before `vhost` receives it: Linux duplicates the
//! attached descriptors on a peek. Everything that rests on this is in this file.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// `VHOST_USER_SET_BACKEND_REQ_FD`.
const SET_BACKEND_REQ_FD: u32 = 21;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, version 1, no payload, no reply wanted.
const CONFIG_CHANGE: [u32; 3] = [2, 0x1, 0];
const HEADER_LEN: usize = 12;

/// Waits for the next message on `socket` and returns the descriptor that it carries, if it is the one that sets up the
/// back-end's channel. Takes nothing off the socket. `Ok(None)` also at its end.
pub fn peek(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    // Without room for ancillary data no descriptor is duplicated: most messages need none.
    match peek_request(socket, &mut [])? {
        Some(SET_BACKEND_REQ_FD) => {}
        _ => return Ok(None),
    }
    let mut control = [0u64; 8];
    peek_request(socket, &mut control)?;
    Ok(first_descriptor(&control))
}

/// Peeks at the request code of the next message; ancillary data goes to `control`.
fn peek_request(socket: &UnixStream, control: &mut [u64]) -> io::Result<Option<u32>> {
    let mut header = [0u8; HEADER_LEN];
    let mut iov = libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: HEADER_LEN };
    // SAFETY: msghdr is plain data for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    if !control.is_empty() {
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = mem::size_of_val(control);
    }
    loop {
        // SAFETY: `message` refers to `header` and `control`, which outlive the call.
        let n = unsafe {
            libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_PEEK | libc::MSG_CMSG_CLOEXEC)
        };
        if n < 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        // Fewer than four bytes: the end, or a header in pieces, which `vhost` then refuses.
        let code = (n >= 4).then(|| u32::from_ne_bytes([header[0], header[1], header[2], header[3]]));
        return Ok(code);
    }
}

/// The first descriptor in the ancillary data of a peek. All others are closed.
fn first_descriptor(control: &[u64]) -> Option<OwnedFd> {
    // SAFETY: msghdr is plain data for which zeroes are valid.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_control = control.as_ptr().cast_mut().cast();
    message.msg_controllen = mem::size_of_val(control);
    let mut found = None;
    // SAFETY: `message` describes `control`, which the kernel filled with whole cmsgs; unused room is zero, and a cmsg of
    // length zero ends the iteration.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&raw const message);
        while !cmsg.is_null() && (*cmsg).cmsg_len >= libc::CMSG_LEN(0) as usize {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let count = ((*cmsg).cmsg_len - libc::CMSG_LEN(0) as usize) / mem::size_of::<libc::c_int>();
                for i in 0..count {
                    let fd = libc::CMSG_DATA(cmsg).cast::<libc::c_int>().add(i).read_unaligned();
                    // Ours alone: the kernel has just made it for this process.
                    let fd = OwnedFd::from_raw_fd(fd);
                    found.get_or_insert(fd);
                }
            }
            cmsg = libc::CMSG_NXTHDR(&raw const message, cmsg);
        }
    }
    found
}

/// Tells the front-end that the configuration space changed. Never blocks; a front-end that does not read its channel
/// misses the message.
pub fn send_config_change(channel: &OwnedFd) -> io::Result<()> {
    let mut bytes = [0u8; HEADER_LEN];
    for (at, word) in CONFIG_CHANGE.iter().enumerate() {
        bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
    rustix::net::send(channel, &bytes, flags)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    fn message(code: u32) -> Vec<u8> {
        [code, 1, 0].iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    #[test]
    fn the_descriptor_is_found_by_peeking_and_the_message_stays() {
        let (front, back) = UnixStream::pair().unwrap();
        let (mut channel, given) = UnixStream::pair().unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [given.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = message(SET_BACKEND_REQ_FD);
        sendmsg(&front, &[io::IoSlice::new(&bytes)], &mut ancillary, SendFlags::empty()).unwrap();

        let found = peek(&back).unwrap().expect("a descriptor");
        send_config_change(&found).unwrap();

        let mut got = [0; HEADER_LEN];
        channel.read_exact(&mut got).unwrap();
        assert_eq!(got, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let mut left = vec![0; bytes.len()];
        (&back).read_exact(&mut left).unwrap();
        assert_eq!(left, bytes, "vhost still receives the whole message");
    }

    #[test]
    fn other_messages_and_the_end_of_the_stream_carry_none() {
        let (mut front, back) = UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut front, &message(1)).unwrap();
        assert!(peek(&back).unwrap().is_none());
        drop(front);
        (&back).read_exact(&mut [0; 12]).unwrap();
        assert!(peek(&back).unwrap().is_none());
    }
}
