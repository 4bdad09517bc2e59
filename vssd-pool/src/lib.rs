// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The pool: physical blocks on NV-RAM and SSD media, lent to vSSDs one by one.
//!
//! Skeleton of the interface; the bodies follow.

mod check;
mod error;
mod lane;
mod pool;
mod types;
mod vssd;

pub use check::{CheckOptions, CheckReport, Finding, Severity};
pub use error::{Error, Result};
pub use lane::Lane;
pub use pool::{Pool, ResizeDone};
pub use types::{
    Cache, Class, CreateOptions, IoError, MediumInfo, MediumKind, MediumPath, MediumSpec, OpenOptions,
    Persistence, PoolInfo, RangeStatus, Submitted, Uuid, VssdAttrs, VssdId, VssdSpec, VssdStats,
};
pub use vssd::Vssd;
pub use vssd_protocol::units::{BlockIndex, BlockRange, BlockSize, PhysicalBlock};
