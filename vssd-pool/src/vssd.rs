// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One vSSD.

use vssd_protocol::units::{BlockIndex, BlockRange, BlockSize};

use crate::types::{Uuid, VssdAttrs, VssdId, VssdStats};

/// One resizable disk of the pool. Every method is cheap, takes no lock and may be called from any thread,
/// except [`Vssd::attrs`], which takes a short lock of its own.
#[derive(Debug)]
pub struct Vssd {}

impl Vssd {
    pub fn id(&self) -> VssdId {
        unimplemented!()
    }

    pub fn uuid(&self) -> Uuid {
        unimplemented!()
    }

    pub fn name(&self) -> &str {
        unimplemented!()
    }

    pub fn block_size(&self) -> BlockSize {
        unimplemented!()
    }

    /// How many blocks it can hold: its maximum.
    pub fn total_blocks(&self) -> u32 {
        unimplemented!()
    }

    /// How many blocks are plugged.
    pub fn plugged_blocks(&self) -> u32 {
        unimplemented!()
    }

    /// How many blocks hold data.
    pub fn allocated_blocks(&self) -> u32 {
        unimplemented!()
    }

    pub fn attrs(&self) -> VssdAttrs {
        unimplemented!()
    }

    pub fn is_plugged(&self, _block: BlockIndex) -> bool {
        unimplemented!()
    }

    /// Appends at most `max` maximal runs of plugged blocks from `start` on, with `empty_only` only of
    /// those without data, and returns where to go on, or `None` at the end. A resize that runs meanwhile
    /// may or may not be seen.
    pub fn plugged_ranges(
        &self,
        _start: BlockIndex,
        _empty_only: bool,
        _max: usize,
        _out: &mut Vec<BlockRange>,
    ) -> Option<BlockIndex> {
        unimplemented!()
    }

    /// The highest block that holds data: a disk cut above it loses nothing.
    pub fn last_allocated_block(&self) -> Option<BlockIndex> {
        unimplemented!()
    }

    /// Whether it was deleted; every block answers `Evicted` from then on.
    pub fn is_deleted(&self) -> bool {
        unimplemented!()
    }

    pub fn stats(&self) -> VssdStats {
        unimplemented!()
    }
}
