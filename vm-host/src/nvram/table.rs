// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which regions there are and where a new one goes: values in, decisions out. No I/O, no clock, no lock.
//!
//! ```text
//!   begin ► Making ── made ──► Ready ── release ──► Dropping ── dropped ──► gone
//! ```
//!
//! Both middle states are for a crash: what is *making* has never been given to anybody, what is *dropping* was given back.
//! Whoever finds one after a crash takes its bytes away and forgets it; so nothing is ever removed because the registry
//! does not know it.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

/// The longest owner, in bytes.
pub const MAX_OWNER: usize = 64;
/// The most regions on one medium.
pub const MAX_REGIONS: usize = 4064;

/// Names a region within its medium; never used twice in the medium's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RegionId(pub u64);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}", self.0)
    }
}

/// What a region is for. An owner has at most one of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// The guest's memory.
    Memory,
    /// A [`Slot`](super::Slot) for the saved state of processors and devices.
    State,
}

impl Purpose {
    pub const ALL: [Self; 2] = [Self::Memory, Self::State];

    /// `memory` or `state`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::State => "state",
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How far a region is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Making,
    Ready,
    Dropping,
}

/// A region as the registry has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) id: RegionId,
    pub(super) owner: String,
    pub(super) purpose: Purpose,
    pub(super) phase: Phase,
    /// A multiple of `alignment`.
    pub(super) bytes: u64,
    /// A power of two.
    pub(super) alignment: u64,
    /// The first byte on the medium; 0 in a directory, where each region is a file.
    pub(super) offset: u64,
}

impl Entry {
    /// The name of its file in a directory: of the owner's characters, so it needs no quoting anywhere.
    pub(super) fn file_name(&self) -> String {
        format!("{}.{}.{:08x}", self.owner, self.purpose, self.id.0)
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

/// Whether a file of that name can only be a region's.
pub(super) fn is_region_file(name: &str) -> bool {
    let mut parts = name.rsplitn(3, '.');
    let (Some(id), Some(purpose), Some(owner)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    id.len() >= 8
        && id.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
        && Purpose::ALL.iter().any(|p| p.name() == purpose)
        && check_owner(owner).is_ok()
}

pub(super) fn check_owner(owner: &str) -> Result<()> {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if owner.is_empty()
        || owner.len() > MAX_OWNER
        || owner.starts_with(['.', '-'])
        || !owner.bytes().all(is_plain)
    {
        return Err(Error::invalid(format!(
            "owner {owner:?} is not 1 to {MAX_OWNER} letters, digits, '-', '_' or '.', beginning with none of '-' and '.'"
        )));
    }
    Ok(())
}

/// Where extents may lie on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) start: u64,
    pub(super) end: u64,
}

/// How much room there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Regions are files; the file system says how many bytes are left, and unfinished regions are not in it yet.
    Files { free: u64 },
    /// Regions are extents of a device.
    Extents(Span),
}

/// What the operator allows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// Bytes that stay free on the medium.
    pub(super) reserve: u64,
    /// The bytes of all regions of an owner; of one that is not listed, `default_quota`.
    pub(super) quotas: BTreeMap<String, u64>,
    pub(super) default_quota: Option<u64>,
}

impl Limits {
    fn quota(&self, owner: &str) -> Option<u64> {
        self.quotas.get(owner).copied().or(self.default_quota)
    }
}

/// All regions of a medium.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) next_id: u64,
    /// By ascending id.
    pub(super) entries: Vec<Entry>,
}

impl Default for Table {
    fn default() -> Self {
        Self { next_id: 1, entries: Vec::new() }
    }
}

impl Table {
    pub(super) fn get(&self, id: RegionId) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.id == id)
    }

    fn get_mut(&mut self, id: RegionId) -> Result<&mut Entry> {
        self.entries
            .iter_mut()
            .find(|entry| entry.id == id)
            .ok_or_else(|| Error::NotFound { what: id.to_string() })
    }

    /// Takes room for a new region; `bytes` are rounded up to `alignment`, a power of two.
    ///
    /// # Errors
    /// `Invalid`, `OverQuota`, `NoSpace`; nothing has changed then.
    pub(super) fn begin(
        &mut self,
        owner: &str,
        purpose: Purpose,
        bytes: u64,
        alignment: u64,
        room: Room,
        limits: &Limits,
    ) -> Result<Entry> {
        check_owner(owner)?;
        if !alignment.is_power_of_two() {
            return Err(Error::invalid(format!("an alignment of {alignment} bytes is no power of two")));
        }
        let bytes = match bytes.checked_next_multiple_of(alignment) {
            // Offsets are signed in system calls.
            Some(bytes) if bytes > 0 && i64::try_from(bytes).is_ok() => bytes,
            _ => return Err(Error::invalid(format!("a region cannot have {bytes} bytes"))),
        };
        if let Some(entry) = self.entries.iter().find(|e| e.owner == owner && e.purpose == purpose) {
            return Err(Error::invalid(format!("{owner} has a {purpose} region already: {}", entry.id)));
        }
        if self.entries.len() >= MAX_REGIONS {
            return Err(Error::invalid(format!("the medium has {MAX_REGIONS} regions, it cannot have more")));
        }
        if let Some(quota) = limits.quota(owner) {
            let used: u64 = self.entries.iter().filter(|e| e.owner == owner).map(|e| e.bytes).sum();
            let available = quota.saturating_sub(used);
            if bytes > available {
                return Err(Error::OverQuota {
                    owner: owner.to_owned(),
                    requested_bytes: bytes,
                    available_bytes: available,
                });
            }
        }
        let offset = self.place(bytes, alignment, room, limits.reserve)?;
        let id = RegionId(self.next_id);
        self.next_id = self
            .next_id
            .checked_add(1)
            .ok_or_else(|| Error::invalid("the medium has used up its region numbers"))?;
        let entry =
            Entry { id, owner: owner.to_owned(), purpose, phase: Phase::Making, bytes, alignment, offset };
        self.entries.push(entry.clone());
        Ok(entry)
    }

    fn place(&self, bytes: u64, alignment: u64, room: Room, reserve: u64) -> Result<u64> {
        let no_space = |available_bytes| Err(Error::NoSpace { requested_bytes: bytes, available_bytes });
        match room {
            Room::Files { free } => {
                let making: u64 =
                    self.entries.iter().filter(|e| e.phase == Phase::Making).map(|e| e.bytes).sum();
                let available = free.saturating_sub(making).saturating_sub(reserve);
                if bytes > available { no_space(available) } else { Ok(0) }
            }
            Room::Extents(span) => {
                let used: u64 = self.entries.iter().map(|e| e.bytes).sum();
                let free = (span.end - span.start).saturating_sub(used).saturating_sub(reserve);
                let gaps = self.gaps(span, alignment);
                match gaps.iter().find(|&&(_, len)| len >= bytes) {
                    Some(&(start, _)) if bytes <= free => Ok(start),
                    _ => no_space(gaps.iter().map(|&(_, len)| len).max().unwrap_or(0).min(free)),
                }
            }
        }
    }

    /// The free stretches from an aligned byte on, by ascending offset: (first byte, bytes).
    fn gaps(&self, span: Span, alignment: u64) -> Vec<(u64, u64)> {
        let mut taken: Vec<(u64, u64)> = self.entries.iter().map(|e| (e.offset, e.end())).collect();
        taken.push((span.end, span.end));
        taken.sort_unstable();
        let mut gaps = Vec::new();
        let mut free_from = span.start;
        for (start, end) in taken {
            if let Some(aligned) = free_from.checked_next_multiple_of(alignment)
                && aligned < start
            {
                gaps.push((aligned, start - aligned));
            }
            free_from = free_from.max(end);
        }
        gaps
    }

    /// Bytes that no region has, without regard to a reserve.
    pub(super) fn free(&self, room: Room) -> u64 {
        match room {
            Room::Files { free } => free,
            Room::Extents(span) => {
                (span.end - span.start).saturating_sub(self.entries.iter().map(|e| e.bytes).sum())
            }
        }
    }

    /// The region's bytes are there, zero and durable.
    pub(super) fn made(&mut self, id: RegionId) -> Result<()> {
        self.get_mut(id)?.phase = Phase::Ready;
        Ok(())
    }

    /// The region is given back. Again, if that was not finished.
    pub(super) fn release(&mut self, id: RegionId) -> Result<Entry> {
        let entry = self.get_mut(id)?;
        if entry.phase == Phase::Making {
            return Err(Error::NotFound { what: id.to_string() });
        }
        entry.phase = Phase::Dropping;
        Ok(entry.clone())
    }

    /// The region's bytes are gone.
    pub(super) fn dropped(&mut self, id: RegionId) {
        self.entries.retain(|entry| entry.id != id);
    }

    /// What contradicts itself, for a table that came from a medium: the checksum has vouched for its bytes, this
    /// guards against whoever computed it.
    pub(super) fn validate(&self, room: Option<Span>) -> std::result::Result<(), String> {
        let total = self.entries.iter().try_fold(0u64, |sum, entry| sum.checked_add(entry.bytes));
        if total.is_none_or(|total| i64::try_from(total).is_err()) {
            return Err("its regions are larger together than any medium".to_owned());
        }
        for (i, entry) in self.entries.iter().enumerate() {
            let id = entry.id;
            if id.0 >= self.next_id || self.entries[..i].last().is_some_and(|before| before.id >= id) {
                return Err(format!("{id} is out of order"));
            }
            if check_owner(&entry.owner).is_err() {
                return Err(format!("{id} has owner {:?}", entry.owner));
            }
            if !entry.alignment.is_power_of_two()
                || entry.bytes == 0
                || !entry.bytes.is_multiple_of(entry.alignment)
            {
                return Err(format!("{id} has {} bytes, aligned to {}", entry.bytes, entry.alignment));
            }
            let is_placed = match room {
                None => entry.offset == 0,
                Some(span) => {
                    entry.offset >= span.start
                        && entry.offset.is_multiple_of(entry.alignment)
                        && entry.offset.checked_add(entry.bytes).is_some_and(|end| end <= span.end)
                }
            };
            if !is_placed {
                return Err(format!("{id} lies at byte {}, outside of the medium", entry.offset));
            }
            for other in &self.entries[..i] {
                if room.is_some() && other.offset < entry.end() && entry.offset < other.end() {
                    return Err(format!("{id} and {} overlap", other.id));
                }
                if other.owner == entry.owner && other.purpose == entry.purpose {
                    return Err(format!(
                        "{id} and {} are both the {} of {}",
                        other.id, entry.purpose, entry.owner
                    ));
                }
            }
        }
        Ok(())
    }
}
