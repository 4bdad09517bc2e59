// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Carries out a parsed operation on a pool lane and says which status byte answers it.
//!
//! Knows the pool and plain memory segments; not where they came from nor how the answer travels.

use std::sync::Arc;

use vssd_pool::{IoError, Lane, Submitted, Vssd};
use vssd_protocol::guest;

use super::request::{Extent, Reject};

/// Status bytes of virtio 1.3, §5.2.6.
pub const S_OK: u8 = 0;
pub const S_IOERR: u8 = 1;
pub const S_UNSUPP: u8 = 2;

/// An operation with everything it needs but memory.
#[derive(Clone, Copy, Debug)]
pub enum Io {
    Read(Extent),
    Write(Extent),
    Flush,
    Discard(Extent),
    WriteZeroes(Extent, bool),
}

impl Io {
    /// How much memory it may have to read or write at once, or what takes as long: a block of 64 KiB to discard counts as 1 KiB.
    pub fn bytes_moved(self) -> u64 {
        match self {
            Self::Read(extent) | Self::Write(extent) | Self::WriteZeroes(extent, _) => extent.len,
            Self::Discard(extent) => extent.len / 64,
            Self::Flush => 0,
        }
    }
}

/// Starts `io`; `segments` is the memory that a read fills or a write takes. `Done` comes with the result; a pending one
/// is reported by the lane under `token`.
///
/// # Safety
/// `segments` must stay mapped until the operation has ended.
pub unsafe fn start(
    lane: &mut Lane,
    vssd: &Arc<Vssd>,
    io: Io,
    segments: &[libc::iovec],
    token: u64,
) -> Submitted {
    match io {
        // SAFETY: the caller keeps the segments mapped until the end.
        Io::Read(extent) => unsafe { lane.read(vssd, extent.offset.0, segments, token) },
        // SAFETY: as above.
        Io::Write(extent) => unsafe { lane.write(vssd, extent.offset.0, segments, token) },
        Io::Flush => lane.flush(vssd, token),
        Io::Discard(extent) => lane.discard(vssd, extent.offset.0, extent.len, token),
        Io::WriteZeroes(extent, unmap) => lane.write_zeroes(vssd, extent.offset.0, extent.len, unmap, token),
    }
}

/// The status byte for a result. The one place where errors become what a guest sees.
pub fn status(result: Result<(), IoError>) -> u8 {
    match result {
        Ok(()) => S_OK,
        Err(IoError::Evicted) => guest::STATUS_EVICTED,
        Err(IoError::NoSpace) => guest::STATUS_NOSPACE,
        Err(IoError::OutOfRange | IoError::ReadOnly | IoError::Io(_)) => S_IOERR,
    }
}

/// The status byte for a request that was not even started.
pub fn status_of_reject(reject: Reject) -> u8 {
    match reject {
        Reject::Unsupported(_) => S_UNSUPP,
        Reject::Malformed(_) | Reject::OutOfRange { .. } | Reject::ReadOnly => S_IOERR,
    }
}
