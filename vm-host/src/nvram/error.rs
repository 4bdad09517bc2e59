// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong with NV-RAM. Every error has a stable code for programs and, where there is something to do about it,
//! a hint for people.

use std::io;
use std::path::{Path, PathBuf};

/// Why an operation on a medium or a region was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The medium is blank: it has no registry yet.
    #[error("{} holds no NV-RAM registry", path.display())]
    Unformatted { path: PathBuf },
    /// Another process (or another part of this one) has the medium open.
    #[error("{} is in use by another process", path.display())]
    Locked { path: PathBuf },
    /// A later release wrote it. Nothing was changed.
    #[error("{} has version {found}, this program knows {known}", path.display())]
    NewerVersion { path: PathBuf, found: u32, known: u32 },
    /// What is on the medium contradicts itself, or a region's file is not what the registry says. Nothing was changed.
    #[error("{} is damaged: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    /// It cannot be this medium: of another name or size, holding something else, or no file, device or directory.
    #[error("medium {}: {what}", path.display())]
    Medium { path: PathBuf, what: String },
    /// The medium has no room for it. `available_bytes` is the largest region of that alignment which the reserve leaves.
    #[error("{requested_bytes} bytes were asked for, the medium has {available_bytes}")]
    NoSpace { requested_bytes: u64, available_bytes: u64 },
    /// The owner may not have that much.
    #[error("{requested_bytes} bytes were asked for, the quota of {owner} leaves {available_bytes}")]
    OverQuota { owner: String, requested_bytes: u64, available_bytes: u64 },
    /// There is no such region.
    #[error("{what} does not exist")]
    NotFound { what: String },
    /// An argument is out of its bounds, or the owner has such a region already.
    #[error("{what}")]
    Invalid { what: String },
    /// The medium or the kernel failed. After a failed write of the registry every later change fails this way: what is
    /// durable is no longer known until the medium is opened again.
    #[error("{what}")]
    Io { what: String, source: io::Error },
}

impl Error {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unformatted { .. } => "E_UNFORMATTED",
            Self::Locked { .. } => "E_LOCKED",
            Self::NewerVersion { .. } => "E_NEWER_VERSION",
            Self::Damaged { .. } => "E_DAMAGED",
            Self::Medium { .. } => "E_MEDIUM",
            Self::NoSpace { .. } => "E_NO_SPACE",
            Self::OverQuota { .. } => "E_OVER_QUOTA",
            Self::NotFound { .. } => "E_NOT_FOUND",
            Self::Invalid { .. } => "E_INVALID",
            Self::Io { .. } => "E_IO",
        }
    }

    /// What a person can do about it, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unformatted { .. } => Some("create the medium first"),
            Self::Locked { .. } => Some("stop the process that has the medium open"),
            Self::NewerVersion { .. } => Some("use the release that wrote it, or a later one"),
            Self::Damaged { .. } => Some("keep the medium as it is until its virtual machines are restored"),
            Self::Medium { .. } => Some("look at the medium's name and path in the configuration"),
            Self::NoSpace { .. } => Some("free a region, ask for less, or lower the medium's reserve"),
            Self::OverQuota { .. } => Some("free a region of this owner, or raise its quota"),
            Self::Io { .. } => Some("look at the kernel log for the medium's errors, then open it again"),
            Self::NotFound { .. } | Self::Invalid { .. } => None,
        }
    }

    pub(super) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }

    pub(super) fn medium(path: &Path, what: impl Into<String>) -> Self {
        Self::Medium { path: path.to_owned(), what: what.into() }
    }

    pub(super) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { what: what.into(), source: source.into() }
    }
}

/// Shorthand used throughout the module.
pub type Result<T> = std::result::Result<T, Error>;
