// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What can go wrong with a cache, with stable codes and what to do next.

use std::io;

use vssd_protocol::units::ByteCount;

use crate::why::Why;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    #[error("cannot start dmsetup: {source}")]
    NoProgram { source: io::Error },
    #[error("dmsetup {command} failed: {said}")]
    Refused { command: String, said: String },
    #[error("dmsetup {command} has not ended after {seconds} s")]
    Slow { command: String, seconds: u64 },
    /// Its device is not there, or not yet.
    #[error("{cache:?} is no cache on {disk}: {what}")]
    Absent { cache: String, disk: String, what: String },
    /// It is there, and made of other parts than it must be.
    #[error("the cache {cache:?} cannot shrink: {what}")]
    Layout { cache: String, what: String },
    /// By somebody else.
    #[error("the device {device:?} is suspended")]
    Suspended { device: String },
    #[error("the cache {cache:?} has {size}, and keeps {least}")]
    Floor { cache: String, size: ByteCount, least: ByteCount },
    #[error(
        "the cache {cache:?} has {dirty} that is not written back, and it has not become less for {seconds} s"
    )]
    Dirty { cache: String, dirty: ByteCount, seconds: u64 },
    #[error("the cache {cache:?} cannot be resized: {what}")]
    Metadata { cache: String, what: String },
}

impl CacheError {
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::NoProgram { .. } => "E_NO_DMSETUP",
            Self::Refused { .. } | Self::Slow { .. } => "E_DMSETUP",
            Self::Absent { .. } => "E_NO_CACHE",
            Self::Layout { .. } => "E_UNSUITABLE",
            Self::Suspended { .. } => "E_SUSPENDED",
            Self::Floor { .. } => "E_FLOOR",
            Self::Dirty { .. } => "E_DIRTY",
            Self::Metadata { .. } => "E_METADATA",
        }
    }

    pub(crate) fn hint(&self) -> &'static str {
        match self {
            Self::NoProgram { .. } => "install dmsetup, and have /usr/sbin in the PATH of the agent",
            Self::Refused { .. } | Self::Slow { .. } => {
                "the kernel's log may say more; the agent needs CAP_SYS_ADMIN: run it as root"
            }
            Self::Absent { .. } => {
                "assemble the cache, or correct its name in the configuration; dmsetup ls shows them"
            }
            Self::Layout { .. } => {
                "cache <metadata> <FAST> <origin> …, with FAST one segment `linear` to the end of the vSSD; README.md shows how"
            }
            Self::Suspended { .. } => "whoever did that resumes it, or: dmsetup resume",
            Self::Floor { .. } => "allow less with min_cache in the configuration",
            Self::Dirty { .. } => "look whether the origin is slow or fails; what was there goes on",
            Self::Metadata { .. } => {
                "stop the cache, cache_check and cache_repair its metadata, or give it a larger device"
            }
        }
    }

    /// As balloon-ctl's.
    pub(crate) fn exit(&self) -> u8 {
        match self {
            Self::NoProgram { .. } | Self::Absent { .. } => 3,
            Self::Layout { .. } | Self::Suspended { .. } | Self::Floor { .. } | Self::Dirty { .. } => 4,
            Self::Refused { .. } | Self::Slow { .. } | Self::Metadata { .. } => 1,
        }
    }

    /// What the host is told.
    pub(crate) fn why(&self) -> Why {
        match self {
            Self::Floor { .. } => Why::Nothing,
            Self::Dirty { .. } | Self::Suspended { .. } => Why::Busy,
            Self::Absent { .. } | Self::Layout { .. } => Why::Policy,
            Self::NoProgram { .. } | Self::Refused { .. } | Self::Slow { .. } | Self::Metadata { .. } => {
                Why::Error
            }
        }
    }
}
