// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong, with a stable code and what to do next.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use vssd_protocol::units::ByteCount;

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
    #[error("cannot {what} {path}", path = path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

impl AgentError {
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

    pub(crate) fn is_read_only(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::ReadOnlyFilesystem)
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
            Self::Full { .. } => "delete files, or allow a smaller reserve in the configuration",
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
            Self::NoDisk { .. } | Self::NotMounted { .. } => 3,
            Self::Locked { .. } | Self::Unsuitable { .. } | Self::Full { .. } | Self::Fragmented { .. } => 4,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => 8,
            Self::Uncovered { .. } | Self::Io { .. } => 1,
        }
    }
}
