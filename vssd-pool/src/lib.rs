// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The pool: physical blocks on NV-RAM and SSD media, lent to vSSDs one by one.
//!
//! ```text
//!  caller's worker ──► lane ──► map (one load a block) ──► store: NV-RAM copied inline, SSD by io_uring
//!                        │ first write, discard
//!                        ▼
//!                      ledger = journal's tail + blocks' whereabouts, under one short lock
//!                        ▲                  ▲                     ▲
//!  caller's control ──► keeper            scrubber              committer, syncer
//!                      create, delete,    zero what was         journal writes that
//!                      plug, unplug,      given back            take a device; FLUSH
//!                      checkpoints                              for the whole pool
//! ```
//!
//! What is promised:
//!
//! * what was completed before a flush began is there after any crash once the flush is done;
//! * a block never shows what another vSSD wrote, in whatever state a crash leaves the media;
//! * a block that is unplugged, durably so when the keeper says so, answers [`IoError::Evicted`];
//! * a read takes no lock, and a request allocates nothing once its lane has warmed up.
//!
//! Only [`store`] knows files, mappings and system calls for storage, with [`sigbus`] below it. Nothing here knows vhost, virtio or the
//! control channel.

mod arbiter;
mod bell;
mod bitmap;
mod blocks;
mod check;
mod checkpoint;
mod command;
mod core;
mod crc;
mod durability;
mod error;
mod grace;
mod journal;
mod keeper;
mod lane;
mod map;
mod pool;
mod record;
mod recovery;
pub mod sabotage;
mod scrub;
pub mod sigbus;
mod state;
pub mod store;
mod superblock;
mod sync;
mod syncs;
pub mod turns;
mod types;
mod vssd;

pub use check::{CheckOptions, CheckReport, Finding, Severity};
pub use command::ResizeDone;
pub use error::{Error, Result};
pub use lane::Lane;
pub use pool::Pool;
pub use superblock::medium_bytes;
pub use syncs::SyncDone;
pub use types::{
    Cache, Class, CreateOptions, IoError, MediumInfo, MediumKind, MediumPath, MediumSpec, OpenOptions,
    Persistence, PoolInfo, PoolThread, RangeStatus, Submitted, ThreadStart, Uuid, VssdAttrs, VssdId,
    VssdSpec, VssdStats,
};
pub use vssd::Vssd;
pub use vssd_protocol::units::{BlockIndex, BlockRange, BlockSize, PhysicalBlock};

/// Locks, whether or not a holder panicked: what these locks protect is changed in steps that each leave it whole.
pub(crate) fn lock<T: ?Sized>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
