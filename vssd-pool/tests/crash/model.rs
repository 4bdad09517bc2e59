// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a guest and an operator may rely on, said as simply as possible.
//!
//! The model knows no physical blocks and no journal: for each sector of each disk it holds the values that a reader may
//! meet after a crash, for each block whether it may be plugged, for each disk whether it may be there.

use std::collections::BTreeMap;
use std::sync::Arc;

use vssd_pool::{BlockIndex, BlockRange, Pool, Vssd};

use crate::common::Io;

pub(crate) const BLOCK: u64 = 4096;
pub(crate) const SECTORS: usize = 8;
/// How long a disk is at first, and how long it can become.
pub(crate) const BLOCKS: u32 = 20;
pub(crate) const MAX_BLOCKS: u32 = 26;
pub(crate) const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// What every word of a sector holds: zero, or a number that no other write uses, with its disk in the upper half.
pub(crate) type Tag = u64;

/// The values a sector may hold after a crash: what was certainly written last, and what came after.
#[derive(Clone, Debug)]
struct Sector {
    /// (tag, whether the write succeeded); the first is what a flush made certain.
    values: Vec<(Tag, bool)>,
}

impl Sector {
    fn zero() -> Self {
        Self { values: vec![(0, true)] }
    }

    fn settle(&mut self) {
        let last = self.values.iter().rposition(|(_, certain)| *certain).unwrap_or(0);
        self.values.drain(..last);
    }

    fn allows(&self, tag: Tag) -> bool {
        self.values.iter().any(|(value, _)| *value == tag)
    }
}

#[derive(Clone, Debug)]
struct Block {
    /// Which of (unplugged, plugged) it may be.
    may_be: (bool, bool),
    sectors: Vec<Sector>,
}

impl Block {
    fn new(plugged: bool) -> Self {
        Self { may_be: (!plugged, plugged), sectors: vec![Sector::zero(); SECTORS] }
    }
}

#[derive(Clone, Debug)]
struct Disk {
    /// Which of (absent, present) it may be.
    may_be: (bool, bool),
    /// Its two possible lengths.
    len: (u32, u32),
    blocks: Vec<Block>,
}

impl Disk {
    fn settle(&mut self) {
        self.blocks.iter_mut().flat_map(|block| &mut block.sectors).for_each(Sector::settle);
    }
}

/// One thing the guest or the operator did.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    Create {
        name: &'static str,
        initial: u32,
    },
    Delete {
        name: &'static str,
    },
    Extend {
        name: &'static str,
        len: u32,
    },
    /// Sectors from..to get a tag, or zero.
    Write {
        name: &'static str,
        from: usize,
        to: usize,
        tag: Tag,
    },
    Flush {
        name: &'static str,
    },
    Plug {
        name: &'static str,
        range: BlockRange,
    },
    Unplug {
        name: &'static str,
        range: BlockRange,
    },
    /// An operator had everything made durable.
    Sync,
    /// The pool was closed in order, which makes everything durable, too.
    Close,
    /// Nothing a guest could see: checkpoints, scrubbing, attributes, the end of the process.
    Other,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    disks: BTreeMap<&'static str, Disk>,
}

impl Model {
    /// `certain`: the action was acknowledged. Otherwise it may have happened or not.
    pub(crate) fn apply(&mut self, action: &Action, certain: bool) {
        match *action {
            Action::Create { name, initial } => {
                let blocks = (0..MAX_BLOCKS).map(|block| Block::new(block < initial)).collect();
                self.disks.insert(name, Disk { may_be: (!certain, true), len: (BLOCKS, BLOCKS), blocks });
            }
            Action::Delete { name } => {
                if certain {
                    self.disks.remove(name);
                } else if let Some(disk) = self.disks.get_mut(name) {
                    disk.may_be.0 = true;
                }
            }
            Action::Extend { name, len } => {
                let disk = self.disk(name);
                disk.len = if certain { (len, len) } else { (disk.len.0, len) };
            }
            Action::Write { name, from, to, tag } => {
                for sector in from..to {
                    let block = &mut self.disk(name).blocks[sector / SECTORS];
                    block.sectors[sector % SECTORS].values.push((tag, certain));
                }
            }
            Action::Flush { name } if certain => self.disk(name).settle(),
            Action::Sync | Action::Close if certain => self.settle(),
            Action::Plug { name, range } => self.resize(name, range, true, certain),
            Action::Unplug { name, range } => self.resize(name, range, false, certain),
            Action::Flush { .. } | Action::Sync | Action::Close | Action::Other => {}
        }
    }

    /// Nothing that was answered can be lost: the pool was synced or closed, or only the process ends and not the power.
    pub(crate) fn settle(&mut self) {
        self.disks.values_mut().for_each(Disk::settle);
    }

    fn disk(&mut self, name: &str) -> &mut Disk {
        self.disks.get_mut(name).expect("the workload uses disks that exist")
    }

    fn resize(&mut self, name: &str, range: BlockRange, plugged: bool, certain: bool) {
        for block in &mut self.disk(name).blocks[range.start as usize..(range.start + range.count) as usize] {
            if block.may_be == (!plugged, plugged) {
                continue;
            }
            if certain && plugged && block.may_be.1 {
                // Whether it had been unplugged was left open: then it kept what it held.
                block.may_be = (false, true);
                block.sectors.iter_mut().for_each(|sector| sector.values.push((0, false)));
            } else if certain {
                *block = Block::new(plugged);
            } else {
                block.may_be = (true, true);
            }
        }
    }
}

/// All that can be seen of a pool: which disks there are, which blocks are plugged, and what those hold.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) disks: Vec<(&'static str, u32)>,
    pub(crate) blocks: Vec<(usize, u32)>,
    bytes: Vec<u8>,
}

/// Looks at everything in the pool and sees whether the model allows it.
pub(crate) fn compare(pool: &Arc<Pool>, io: &mut Io, model: &Model) -> Result<Seen, String> {
    let mut seen = Seen::default();
    for (which, name) in NAMES.into_iter().enumerate() {
        let disk = match (model.disks.get(name), pool.vssd_by_name(name)) {
            (None, None) => continue,
            (None, Some(_)) => return Err(format!("{name} is there, but was never created or was deleted")),
            (Some(disk), None) if disk.may_be.0 => continue,
            (Some(_), None) => return Err(format!("{name} is gone")),
            (Some(disk), Some(vssd)) => (disk, vssd),
        };
        let (disk, vssd) = disk;
        let len = vssd.total_blocks();
        if len != disk.len.0 && len != disk.len.1 {
            return Err(format!("{name} has {len} blocks, allowed are {:?}", disk.len));
        }
        seen.disks.push((name, len));
        for (i, block) in (0u32..).zip(&disk.blocks) {
            let plugged = vssd.is_plugged(BlockIndex(i));
            if !(if plugged { block.may_be.1 } else { block.may_be.0 }) {
                return Err(format!("block {i} of {name} is {}plugged", if plugged { "" } else { "not " }));
            }
            if plugged {
                let start = seen.bytes.len();
                read_block(io, &vssd, i, &mut seen.bytes).map_err(|what| format!("{name}: {what}"))?;
                seen.blocks.push((which, i));
                check_block(block, &seen.bytes[start..])
                    .map_err(|what| format!("block {i} of {name}: {what}"))?;
            }
        }
    }
    Ok(seen)
}

pub(crate) fn read_block(io: &mut Io, vssd: &Arc<Vssd>, block: u32, out: &mut Vec<u8>) -> Result<(), String> {
    let start = out.len();
    out.resize(start + BLOCK as usize, 0xee);
    io.read(vssd, u64::from(block) * BLOCK, &mut out[start..])
        .map_err(|error| format!("block {block}: {error}"))
}

/// NV-RAM tears sectors where they were not flushed, so each word stands for itself.
fn check_block(block: &Block, bytes: &[u8]) -> Result<(), String> {
    for (i, (sector, bytes)) in block.sectors.iter().zip(bytes.chunks(512)).enumerate() {
        let mut last = None;
        for word in bytes.chunks(8) {
            let tag = Tag::from_le_bytes(word.try_into().expect("eight bytes"));
            if last != Some(tag) && !sector.allows(tag) {
                return Err(format!("sector {i} holds {tag:#x}, allowed are {:x?}", sector.values));
            }
            last = Some(tag);
        }
    }
    Ok(())
}
