// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One request of a lane: what it is, and how far it came.

use std::sync::Arc;

use crate::types::IoError;
use crate::vssd::Vssd;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Read,
    Write,
    Discard,
    WriteZeroes { unmap: bool },
}

/// A request as handed in.
#[derive(Clone, Copy)]
pub(super) struct Job<'a> {
    pub(super) vssd: &'a Arc<Vssd>,
    pub(super) op: Op,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) iov: &'a [libc::iovec],
    pub(super) token: u64,
}

/// How one request ended.
pub(super) type Outcome = Result<(), IoError>;

/// What a parked request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    Fence,
    Space,
    Journal,
}

/// Why a request goes no further now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Failed(IoError),
    Wait(Why),
}

impl From<IoError> for Stop {
    fn from(error: IoError) -> Self {
        Self::Failed(error)
    }
}

pub(super) enum Step {
    Done(Outcome),
    Pending,
    Wait(Why),
}

pub(super) fn errno(error: &std::io::Error) -> IoError {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => IoError::NoSpace,
        Some(errno) => IoError::Io(errno),
        None => IoError::Io(libc::EIO),
    }
}
