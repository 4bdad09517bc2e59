// SPDX-License-Identifier: Apache-2.0 OR MIT

//! For programs in a guest that keep something on a vSSD: a cache, a scratch space, a log of copies.
//!
//! When the host wants blocks back, such a program knows best which ones matter least. It writes them to a *hint file*, most
//! expendable first; `vssd-agent` (`source = "hint-files"`) nominates them, and the driver gives them to the host.
//!
//! ```text
//!   driver ──"give n blocks"──► Disk::wait_request ──► your program forgets its n least valuable blocks
//!   driver ◄── vssd-agent ◄── hint file ◄───── HintFile::publish ◄──┘
//!   driver ──────────────────► Disk::evicted ──► your program knows which blocks are gone, and which are back
//! ```
//!
//! # The contract
//!
//! What is in a hint file may go at any time from then on, without further notice. So a program *forgets* a block before it
//! hints it, or it copes with what evicted blocks answer:
//!
//! * a read gives ENODATA, a write ENOSPC, with `O_DIRECT`. (Through the page cache a read gives EIO, and a failed write shows
//!   at `fsync` only: use `O_DIRECT`.)
//! * a block that came back reads as zeroes, and nobody says which of its reads fell into the time between.
//!
//! A hint cannot be taken back for certain: the agent may have read it already. Replacing the file takes effect at the agent's
//! next look, and no hint outlives a wish of the host. Who cannot bear to lose a block must never hint it.
//!
//! # Example
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use vssd_client::{BlockRange, Cost, Disk, Hints};
//!
//! # fn forget_coldest(n: u32) -> Vec<u32> { Vec::new() }
//! # fn main() -> vssd_client::Result<()> {
//! let disk = Disk::open("vssda")?;
//! let mut file = disk.hint_file("mycache")?; // takes back what an earlier run of this program had hinted
//! let mut named: Vec<u32> = Vec::new();
//! while disk.wait(Duration::MAX)? {
//!     // In this order: the other way round, what goes in between would be made up for.
//!     let gone = disk.evicted()?;
//!     let request = disk.request()?;
//!     if request.to_give_blocks == 0 {
//!         file.withdraw()?;
//!         let gone = disk.evicted()?; // of what was named this has gone, and the rest may be used again
//!         println!("{} ranges are gone", gone.len());
//!         named.clear();
//!         continue;
//!     }
//!     named.retain(|block| !gone.iter().any(|range| range.contains(*block)));
//!     let missing = request.to_give_blocks.saturating_sub(named.len() as u32);
//!     if missing > 0 {
//!         named.extend(forget_coldest(missing)); // first forgotten, then named
//!         let mut hints = Hints::new();
//!         named.iter().for_each(|block| hints.push(Cost::CleanCold, BlockRange::new(*block, 1)));
//!         file.publish(&hints)?;
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! It knows nothing of the host, and needs no privileges beyond writing to the directory for hints. C programs have the same in
//! `include/vssd_hints.h`.

#![forbid(unsafe_code)]

/// The README's examples are compiled with the documentation's.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod disk;
mod error;
pub mod format;
mod hints;

pub use disk::{Disk, PROC, Request, Status, evicted, list, status};
pub use error::{Error, Result};
pub use format::Cost;
pub use hints::{HINTS, HintFile, Hints};

/// `count` consecutive blocks of a vSSD from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRange {
    /// The first block.
    pub start: u32,
    /// How many.
    pub count: u32,
}

impl BlockRange {
    /// `count` blocks from `start` on.
    pub fn new(start: u32, count: u32) -> Self {
        Self { start, count }
    }

    /// Whether `block` is one of them.
    pub fn contains(self, block: u32) -> bool {
        block >= self.start && u64::from(block) < self.end()
    }

    /// The block behind the last one; wider than a block's number, so that it always fits.
    pub fn end(self) -> u64 {
        u64::from(self.start) + u64::from(self.count)
    }
}
