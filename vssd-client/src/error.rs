// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong, with a stable code and what to do next.

use std::io;
use std::path::{Path, PathBuf};

/// What the functions of this library give.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No driver, no such disk, or it has gone. `E_NO_DISK`.
    #[error("{disk} is no vSSD here")]
    NoDisk {
        /// As the caller named it.
        disk: String,
        /// Why.
        source: io::Error,
    },
    /// The name cannot be that of a hint file. `E_NAME`.
    #[error("{name:?} cannot name a hint file")]
    Name {
        /// As the caller chose it.
        name: String,
    },
    /// The agent would not read a file of this size. `E_TOO_LARGE`.
    #[error("hints take {len} bytes, and no more than {most} are read")]
    TooLarge {
        /// Bytes of the file.
        len: usize,
        /// Bytes that are read.
        most: usize,
    },
    /// There is no directory for hints. `E_NO_AGENT`.
    #[error("{dir} is not there", dir = dir.display())]
    NoDirectory {
        /// Where it would be.
        dir: PathBuf,
    },
    /// Anything else that the kernel refused. `E_IO`.
    #[error("cannot {what} {path}", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(what: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::Io { what, path: path.to_owned(), source: source.into() }
    }

    /// The stable code, `E_…`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoDisk { .. } => "E_NO_DISK",
            Self::Name { .. } => "E_NAME",
            Self::TooLarge { .. } => "E_TOO_LARGE",
            Self::NoDirectory { .. } => "E_NO_AGENT",
            Self::Io { .. } => "E_IO",
        }
    }

    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NoDisk { .. } => "ls /proc/vssd shows the vSSDs of this guest; vssd-bind binds the driver",
            Self::Name { .. } => {
                "use up to 100 letters, digits, '-', '_' and '.', and no '.' at the beginning"
            }
            Self::TooLarge { .. } => {
                "hint fewer blocks, or neighbouring ones as one range: more can follow when these are gone"
            }
            Self::NoDirectory { .. } => "start vssd-agent with source = \"hint-files\" for this disk",
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "the administrator decides who may write in the directory for hints: chgrp and chmod g+w"
            }
            Self::Io { .. } => "the kernel's log may say more",
        }
    }
}
