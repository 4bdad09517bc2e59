// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong with a pool. Every error has a stable code for programs and, where there is
//! something to do about it, a hint for people. What can go wrong with one I/O request is
//! [`IoError`](crate::IoError).

use std::io;
use std::path::PathBuf;

/// Why an operation on a pool was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pool cannot promise that many blocks.
    #[error("the pool can promise {available_blocks} more blocks, {requested_blocks} were asked for")]
    PoolFull { requested_blocks: u64, available_blocks: u64 },
    /// There is no such vSSD, pool or medium.
    #[error("{what} does not exist")]
    NotFound { what: String },
    /// The name is taken, or the medium already holds something.
    #[error("{what} exists already")]
    Exists { what: String },
    /// An argument is out of its bounds.
    #[error("{what}")]
    Invalid { what: String },
    /// Another process (or another part of this one) has the medium open.
    #[error("{} is in use{}", path.display(), holder.map(|pid| format!(" by process {pid}")).unwrap_or_default())]
    Locked { path: PathBuf, holder: Option<u32> },
    /// What is on the media contradicts itself, and no second copy settles it.
    #[error("the pool is damaged: {what}")]
    Damaged { what: String },
    /// The medium cannot carry the pool: missing, swapped, too small, of the wrong kind.
    #[error("medium {}: {what}", path.display())]
    Medium { path: PathBuf, what: String },
    /// The host's storage failed. After a failed journal write or flush every later change of the
    /// pool fails this way: what is durable is no longer known, so nothing is acknowledged.
    #[error("{what}")]
    Io { what: String, source: io::Error },
    /// The pool was opened read-only.
    #[error("the pool is open read-only")]
    ReadOnly,
    /// The pool is being closed, or the vSSD is being deleted.
    #[error("{what} is shutting down")]
    Busy { what: String },
}

impl Error {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::PoolFull { .. } => "E_POOL_FULL",
            Self::NotFound { .. } => "E_NOT_FOUND",
            Self::Exists { .. } => "E_EXISTS",
            Self::Invalid { .. } => "E_INVALID",
            Self::Locked { .. } => "E_LOCKED",
            Self::Damaged { .. } => "E_DAMAGED",
            Self::Medium { .. } => "E_MEDIUM",
            Self::Io { .. } => "E_IO",
            Self::ReadOnly => "E_READ_ONLY",
            Self::Busy { .. } => "E_BUSY",
        }
    }

    /// What a person can do about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::PoolFull { .. } => {
                Some("shrink or delete a vSSD, ask for less, or create the pool with more overcommit")
            }
            Self::Exists { .. } => Some("choose another name, or pass force to overwrite a medium"),
            Self::Locked { .. } => Some("stop the process that has the pool open"),
            Self::Damaged { .. } => {
                Some("run the offline check to see what is wrong, and restore from a copy")
            }
            Self::Medium { .. } => Some("name every medium the pool was created on, unchanged"),
            Self::Io { .. } => Some("look at the kernel log for the medium's errors, then restart"),
            Self::ReadOnly => Some("open the pool for writing"),
            Self::NotFound { .. } | Self::Invalid { .. } | Self::Busy { .. } => None,
        }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }

    pub(crate) fn medium(path: impl Into<PathBuf>, what: impl Into<String>) -> Self {
        Self::Medium { path: path.into(), what: what.into() }
    }

    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }
}

/// Shorthand used throughout the crate.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locked_names_the_holder_where_known() {
        let error = Error::Locked { path: "/p".into(), holder: Some(7) };
        assert_eq!(error.to_string(), "/p is in use by process 7");
        assert_eq!(Error::Locked { path: "/p".into(), holder: None }.to_string(), "/p is in use");
        assert_eq!(error.code(), "E_LOCKED");
    }
}
