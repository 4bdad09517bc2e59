// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong, with a stable code and what to do next.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use vssd_protocol::units::ByteCount;

use crate::source::dm_cache::error::CacheError;
use crate::why::Why;

pub(crate) type Result<T> = std::result::Result<T, AgentError>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("{path}: {what}", path = path.display())]
    Config { path: PathBuf, what: String },
    /// No driver, no such disk, or it has gone.
    #[error("{disk} is no vSSD here: {source}")]
    NoDisk { disk: String, source: io::Error },
    #[error("another agent serves {disk}")]
    Locked { disk: String },
    #[error("{disk} has no file system that is mounted for writing: {what}")]
    NotMounted { disk: String, what: String },
    #[error("{path}: {what}", path = path.display())]
    Unsuitable { path: PathBuf, what: String },
    /// Blocks that the host has taken lie in no balloon file.
    #[error("{blocks} evicted blocks are not in {path}", path = path.display())]
    Uncovered { path: PathBuf, blocks: u32 },
    #[error("{path}: {free} are free and {reserve} stay free", path = path.display())]
    Full { path: PathBuf, free: ByteCount, reserve: ByteCount },
    /// What is free lies in pieces that are smaller than blocks.
    #[error("{path}: {asked} of free space hold {whole} of whole blocks", path = path.display())]
    Fragmented { path: PathBuf, asked: ByteCount, whole: ByteCount },
    /// A hint file, or the directory of them, that is not as it should be.
    #[error("{path}: {what}", path = path.display())]
    Hints { path: PathBuf, what: String },
    #[error("no program names more blocks in {path} that could go", path = path.display())]
    NoHints { path: PathBuf },
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// Letters are not answered.
    #[error("the host behind {disk} does not answer an agent")]
    Unheard { disk: String },
    #[error("cannot {what} {path}", path = path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

impl From<vssd_client::Error> for AgentError {
    fn from(error: vssd_client::Error) -> Self {
        match error {
            vssd_client::Error::NoDisk { disk, source } => Self::NoDisk { disk, source },
            vssd_client::Error::Io { what, path, source } => Self::Io { what, path, source },
            // Of hint files, which the agent only reads.
            other => Self::io("use", Path::new(vssd_client::PROC), io::Error::other(other)),
        }
    }
}

impl AgentError {
    pub(crate) fn no_disk(disk: &str, source: io::Error) -> Self {
        Self::NoDisk { disk: disk.to_owned(), source }
    }

    pub(crate) fn io(what: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { what, path: path.to_owned(), source: source.into() }
    }

    /// What happened, with its causes.
    pub(crate) fn message(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    }

    /// What the host is told when this keeps blocks from going.
    pub(crate) fn why(&self) -> Why {
        match self {
            Self::Full { .. } | Self::Fragmented { .. } | Self::NoHints { .. } => Why::Nothing,
            Self::Unsuitable { .. } | Self::NotMounted { .. } | Self::Hints { .. } => Why::Policy,
            Self::Cache(error) => error.why(),
            error if error.is_read_only() => Why::Policy,
            _ => Why::Error,
        }
    }

    pub(crate) fn is_read_only(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::ReadOnlyFilesystem)
    }

    pub(crate) fn is_forbidden(&self) -> bool {
        use io::ErrorKind::{PermissionDenied, ResourceBusy};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), PermissionDenied | ResourceBusy))
    }

    /// The stable code, `E_…`.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Config { .. } => "E_CONFIG",
            Self::NoDisk { .. } => "E_NO_DISK",
            Self::Locked { .. } => "E_LOCKED",
            Self::NotMounted { .. } => "E_NOT_MOUNTED",
            Self::Unsuitable { .. } => "E_UNSUITABLE",
            Self::Uncovered { .. } => "E_UNCOVERED",
            Self::Full { .. } => "E_FULL",
            Self::Fragmented { .. } => "E_FRAGMENTED",
            Self::Cache(error) => error.code(),
            Self::Unheard { .. } => "E_UNHEARD",
            Self::Hints { .. } => "E_HINTS",
            Self::NoHints { .. } => "E_NO_HINTS",
            Self::Io { .. } if self.is_read_only() => "E_READ_ONLY",
            Self::Io { .. } => "E_IO",
        }
    }

    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::Config { .. } => "vssd-agent --help shows the settings and where the file is looked for",
            Self::NoDisk { .. } => "vssd-bind binds the driver; ls /proc/vssd shows the vSSDs of this guest",
            Self::Locked { .. } => "stop it first: systemctl stop vssd-agent",
            Self::NotMounted { .. } => "mount it, or name the mount point in the configuration",
            Self::Unsuitable { .. } => "ext4 and XFS can be used, on the whole disk or on a partition of it",
            Self::Uncovered { .. } => {
                "grow the vSSD back; files that lie on these blocks must be restored from a backup"
            }
            Self::Fragmented { .. } => "a pool with smaller blocks could take it",
            Self::Cache(error) => error.hint(),
            Self::Unheard { .. } => "its vssd-backend may be older than this agent; or load the vSSD driver",
            Self::Full { .. } => "delete files, or allow a smaller reserve in the configuration",
            Self::Hints { .. } => {
                "the program that writes there must be corrected; vssd-client's documentation says what may be there"
            }
            Self::NoHints { .. } => {
                "start a program that names some, or shrink the vSSD by no more than it names"
            }
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => "the agent needs CAP_SYS_ADMIN: run it as root",
                io::ErrorKind::ReadOnlyFilesystem => "mount the file system for writing",
                _ => "the kernel's log may say more",
            },
        }
    }

    /// Exit codes are those of balloon-ctl where they mean the same.
    pub(crate) fn exit(&self) -> u8 {
        match self {
            Self::Config { .. } => 2,
            Self::Cache(error) => error.exit(),
            Self::NoDisk { .. } | Self::NotMounted { .. } => 3,
            Self::Locked { .. } | Self::Unsuitable { .. } | Self::Full { .. } | Self::Fragmented { .. } => 4,
            Self::Hints { .. } | Self::NoHints { .. } => 4,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => 8,
            Self::Uncovered { .. } | Self::Unheard { .. } | Self::Io { .. } => 1,
        }
    }
}
