// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The dm-cache source: blocks at the end of a vSSD that a live dm-cache has been made to do without.
//!
//! ```text
//!   application ──► cache ──► origin
//!                     └─────► FAST (linear) ──► the vSSD │ in use ………………│ held │ evicted │
//!                                                         offset          └ the end of FAST
//!   dmsetup (runs it) ──► text (parses) ──► plan (lengths ◄──► blocks, pure)       note (how the cache works)   pull (when to ask)
//! ```
//!
//! dm-cache cannot be kept from single blocks; what it can is to become smaller from its end, when what it has there is clean. So FAST is as
//! long as the blocks in front of the first evicted one allow: after a reboot its length follows from what the driver says, and
//! nothing has to be remembered.
//!
//! ```text
//!   shrink:  the cache's table ► writethrough, policy cleaner ► nothing is dirty, and nothing becomes it
//!            a second, shorter FAST beside the first ► the cache's table as it was, over the second ► the first is removed
//!   grow:    the same with a longer one, without cleaning
//! ```
//!
//! The order makes it safe. Each change is one table for another, within one system call of the kernel ([`dmsetup::resume`]), and every state in
//! between is a cache that works. A second FAST, instead of the same one made shorter, because a cache counts its blocks when its table
//! is loaded: a table over a device that is shortened afterwards would use blocks that are not there. Blocks are held only when the metadata
//! that does not know them any more is durable.
//!
//! What it does not know: which of a cache's blocks are worth keeping. What goes is what lies at the end; the kernel does not
//! say what that is.

mod dmsetup;
pub(crate) mod error;
mod note;
mod plan;
mod pull;
mod text;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{info, warn};
use vssd_protocol::units::{BlockRange, ByteCount};

use self::error::CacheError;
use self::note::Note;
use self::plan::{Place, SECTOR};
use self::pull::Pull;
use self::text::{CacheStatus, CacheTable, Device, Mode, View};
use super::Source;
use crate::blocks::BlockSet;
use crate::config::{DiskConfig, Share};
use crate::disk::{LOCKS, Status};
use crate::error::{AgentError, Result};
use crate::estimate::Estimate;

/// Follows the name of FAST while there are two of them.
const SECOND: &str = "-vssd";
/// One step of waiting for a cache to become clean: then the host may want something else.
const SLICE: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(50);
/// Mappings and hints of so many cache blocks fit into a block of metadata. Some are in use twice until they are committed.
const PER_METADATA_BLOCK: u64 = 250;
const SPARE_METADATA: u64 = 32;

/// What a cache on a disk can do without.
#[derive(Debug)]
pub(crate) struct DmCache {
    disk: String,
    cache: String,
    least: Share,
    /// In this time at least a hundredth of what was dirty at first must be written back.
    stall: Duration,
    note: Note,
    pull: Pull,
    cleaning: Option<Progress>,
    /// Evicted blocks that the cache could not be made to leave.
    hopeless: Option<BlockSet>,
}

/// Of writing back.
#[derive(Clone, Copy, Debug)]
struct Progress {
    step: u64,
    mark: u64,
    since: Instant,
}

/// What is the case.
#[derive(Debug)]
struct State {
    view: View,
    cache: Device,
    table: CacheTable,
    fast: Device,
    place: Place,
    /// The disk's, as tables name it.
    number: String,
}

impl State {
    /// The other one of the two names that FAST has.
    fn second_name(&self) -> String {
        match self.fast.name.strip_suffix(SECOND) {
            Some(first) => first.to_owned(),
            None => format!("{}{SECOND}", self.fast.name),
        }
    }

    /// The FAST that is not in use.
    fn second(&self) -> Option<&Device> {
        self.view.named(&self.second_name())
    }

    fn is_suspended(&self) -> bool {
        self.cache.is_suspended || self.fast.is_suspended
    }

    /// What lies on the disk, in use or not: `(offset, len)` in bytes.
    fn pieces(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let segments = self.view.devices.iter().flat_map(|device| &device.segments);
        segments.filter_map(|segment| Some((segment.offset_on(&self.number)? * SECTOR, segment.len * SECTOR)))
    }

    /// The blocks behind everything, the last first.
    fn held(&self, status: &Status) -> Vec<BlockRange> {
        let end = self.pieces().map(|(offset, len)| offset + len).max().unwrap_or(u64::MAX);
        let first = plan::behind(end, self.place.block);
        plan::from_the_end(first, self.place.total, status.requested_blocks)
    }
}

impl DmCache {
    pub(crate) fn new(disk: &str, config: &DiskConfig) -> Self {
        let cache = config.cache.clone().unwrap_or_default();
        Self {
            disk: disk.to_owned(),
            least: config.min_cache,
            stall: Duration::from_secs(config.stall_s),
            note: Note::new(Path::new(LOCKS), disk, &cache),
            pull: Pull::new(config.pull_misses, config.pull_misses_until),
            cleaning: None,
            hopeless: None,
            cache,
        }
    }

    /// What is the case now. An error says what it should be.
    fn look(&self, status: &Status) -> Result<State> {
        let path = Path::new("/sys/block").join(&self.disk).join("dev");
        let number = fs::read_to_string(&path).map_err(|source| AgentError::io("read", &path, source))?;
        let view = dmsetup::view()?;
        let geometry = (u64::from(status.block_size), status.total_blocks);
        Ok(examine(view, number.trim(), geometry, &self.disk, &self.cache)?)
    }

    /// What the cache says of itself, with its metadata durable.
    fn committed(&self) -> Result<CacheStatus> {
        let status = dmsetup::committed_status(&self.cache)?;
        self.sound(status)
    }

    fn sound(&self, status: CacheStatus) -> Result<CacheStatus> {
        match status.fault {
            Some(what) => Err(CacheError::Metadata { cache: self.cache.clone(), what }.into()),
            None => Ok(status),
        }
    }

    /// Ends what was begun and not ended, by this process or another: afterwards there is one FAST, with its own name, and nothing is suspended.
    fn tidy(&self, status: &Status) -> Result<State> {
        let mut state = self.look(status)?;
        if state.is_suspended() {
            if state.second().is_none() && self.note.read()?.is_none() {
                // Not by an agent.
                let device = if state.cache.is_suspended { &state.cache } else { &state.fast };
                return Err(CacheError::Suspended { device: device.name.clone() }.into());
            }
            self.undo(&state)?;
            state = self.look(status)?;
        }
        if let Some(second) = state.second() {
            if state.cache.has_inactive {
                // It may hold the second one open.
                dmsetup::clear(&self.cache)?;
            }
            info!(disk = self.disk, device = second.name, "removes what is not in use any more");
            dmsetup::remove(&second.name)?;
            state = self.look(status)?;
        }
        if state.fast.name.ends_with(SECOND) {
            dmsetup::rename(&state.fast.name, &state.second_name())?;
            state = self.look(status)?;
        }
        Ok(state)
    }

    /// The kernel has refused a table, and the device waits for one that it does not refuse: the size it had before.
    fn undo(&self, state: &State) -> Result<()> {
        warn!(disk = self.disk, cache = self.cache, "was left suspended; goes on with the size it had");
        if state.fast.is_suspended {
            dmsetup::resume(&state.fast.name)?;
        }
        // Until the change was made, the one with the name of its own is the one from before.
        let before = state.second().filter(|second| !second.name.ends_with(SECOND)).unwrap_or(&state.fast);
        let mode = self.note.read()?.unwrap_or_else(|| state.table.mode.clone());
        if state.cache.is_suspended {
            let loaded = dmsetup::load(&self.cache, &state.table.line(&before.number, &mode));
            if loaded.is_err() {
                // The kernel has given up on the metadata: then that is what is to be said.
                self.sound(dmsetup::quick_status(&self.cache)?)?;
            }
            loaded?;
            dmsetup::resume(&self.cache)?;
        }
        Ok(())
    }

    /// Lets the cache run over another FAST, or in another way, and gives what it says then.
    fn switch(&self, status: &Status, state: &State, fast: &str, mode: &Mode) -> Result<CacheStatus> {
        let changed = dmsetup::load(&self.cache, &state.table.line(fast, mode))
            .and_then(|()| dmsetup::resume(&self.cache));
        if let Err(error) = changed {
            // Dropped if it is still there, so that nobody resumes into it.
            let _ = dmsetup::clear(&self.cache);
            let now = self.look(status)?;
            if now.is_suspended() {
                self.undo(&now)?;
            }
            return Err(error.into());
        }
        self.committed()
    }

    /// Gives FAST another length and the cache the mode that is its own.
    fn resize(&mut self, status: &Status, state: &State, len: u64, mode: &Mode) -> Result<State> {
        let begun = Instant::now();
        let (first, second) = (&state.fast.name, state.second_name());
        let is_changed = len != state.place.len;
        let fast = if is_changed {
            let table = format!("0 {} linear {} {}", len / SECTOR, state.number, state.place.offset / SECTOR);
            dmsetup::create(&second, &table)?;
            dmsetup::number(&second)?
        } else {
            state.fast.number.clone()
        };
        let now = self.switch(status, state, &fast, mode)?;
        self.note.remove()?;
        self.cleaning = None;
        if is_changed {
            dmsetup::remove(first)?;
            dmsetup::rename(&second, first)?;
        }
        let (took_ms, dirty) = (begun.elapsed().as_millis(), now.dirty);
        info!(disk = self.disk, cache = self.cache, size = %ByteCount(len), used = now.used, dirty, took_ms, "the cache runs");
        self.look(status)
    }

    /// How the cache works when it is not being cleaned.
    fn mode(&self, state: &State, cache: &CacheStatus) -> Result<Mode> {
        let own = || state.table.mode.clone().with_threshold(cache.threshold.as_deref());
        Ok(self.note.read()?.unwrap_or_else(own))
    }

    /// Sees to it that nothing is dirty and nothing becomes it. `false`: there is something left after a while of waiting.
    fn clean(&mut self, status: &Status, state: &State, cache: &CacheStatus) -> Result<bool> {
        if state.table.mode.keeps_clean() && cache.dirty == 0 {
            return Ok(true);
        }
        if !(state.table.mode.keeps_clean() && state.table.mode.is_cleaner()) {
            let mode = self.mode(state, cache)?;
            self.note.write(&mode)?;
            let size = ByteCount(cache.dirty * state.place.cache_block);
            info!(disk = self.disk, cache = self.cache, dirty = %size, "the cache is written back");
            self.switch(status, state, &state.fast.number, &mode.cleaning())?;
        }
        let end = Instant::now() + SLICE;
        loop {
            let dirty = self.sound(dmsetup::quick_status(&self.cache)?)?.dirty;
            let now = Instant::now();
            let progress =
                self.cleaning.get_or_insert(Progress { step: (dirty / 100).max(1), mark: dirty, since: now });
            if dirty == 0 {
                return Ok(true);
            }
            if dirty + progress.step <= progress.mark {
                (progress.mark, progress.since) = (dirty, now);
            } else if now.duration_since(progress.since) >= self.stall {
                let dirty = ByteCount(dirty * state.place.cache_block);
                return Err(CacheError::Dirty {
                    cache: self.cache.clone(),
                    dirty,
                    seconds: self.stall.as_secs(),
                }
                .into());
            }
            if now >= end {
                return Ok(false);
            }
            thread::sleep(LOOK);
        }
    }

    /// Lets the cache work as it did before it was cleaned, in the size it has.
    fn restore(&mut self, status: &Status) -> Result<()> {
        if let Some(mode) = self.note.read()? {
            let state = self.tidy(status)?;
            self.resize(status, &state, state.place.len, &mode)?;
        }
        self.cleaning = None;
        Ok(())
    }

    /// The least that the cache is left with.
    fn shortest(&self, place: &Place) -> u64 {
        place.shortest(self.least.bytes(u64::from(place.total) * place.block))
    }

    fn shrink(&mut self, status: &Status, want: u32) -> Result<Vec<BlockRange>> {
        let state = self.tidy(status)?;
        let cache = self.committed()?;
        let (size, shortest) = (state.place.len, self.shortest(&state.place));
        let len = state.place.shorter(want, shortest);
        if len >= size {
            let (cache, size, least) = (self.cache.clone(), ByteCount(size), ByteCount(shortest));
            return Err(CacheError::Floor { cache, size, least }.into());
        }
        if !self.clean(status, &state, &cache)? {
            return Ok(state.held(status));
        }
        let mode = self.mode(&state, &cache)?;
        Ok(self.resize(status, &state, len, &mode)?.held(status))
    }

    /// Whether the metadata has room for a cache of `len` bytes; the kernel finds that out too late.
    fn has_metadata_for(&self, place: &Place, cache: &CacheStatus, len: u64) -> Result<()> {
        let more = (len / place.cache_block).saturating_sub(cache.total);
        let need = more / PER_METADATA_BLOCK + SPARE_METADATA;
        if need <= cache.free_metadata {
            return Ok(());
        }
        let (size, free) = (ByteCount(len), cache.free_metadata);
        let what = format!("{size} need {need} blocks of metadata, and {free} are free");
        Err(CacheError::Metadata { cache: self.cache.clone(), what }.into())
    }

    /// Leaves the blocks from the lowest of `gone` on.
    fn leave(&mut self, status: &Status, gone: &BlockSet) -> Result<()> {
        loop {
            let state = self.tidy(status)?;
            let len = state.place.longest(gone);
            if len >= state.place.len {
                return Ok(());
            }
            if len == 0 {
                let what = "its first block has gone".to_owned();
                return Err(CacheError::Layout { cache: self.cache.clone(), what }.into());
            }
            let cache = self.committed()?;
            if self.clean(status, &state, &cache)? {
                let mode = self.mode(&state, &cache)?;
                return self.resize(status, &state, len, &mode).map(drop);
            }
        }
    }
}

/// Finds the cache and what it lies on, and checks both. `geometry`: the vSSD's block size and number of blocks.
fn examine(
    view: View,
    number: &str,
    (block, total): (u64, u32),
    disk: &str,
    name: &str,
) -> std::result::Result<State, CacheError> {
    let absent = |what: &str| CacheError::Absent {
        cache: name.to_owned(),
        disk: disk.to_owned(),
        what: what.to_owned(),
    };
    let layout = |what: String| CacheError::Layout { cache: name.to_owned(), what };
    let cache = view.named(name).ok_or_else(|| absent("there is no device of that name"))?.clone();
    if cache.segments.is_empty() {
        return Err(absent("it has no table yet"));
    }
    if cache.uuid.starts_with("LVM-") {
        return Err(layout("it is LVM's, which would not know of its new size".to_owned()));
    }
    let table = CacheTable::parse(&cache.segments)
        .ok_or_else(|| layout("it is not one segment `cache`".to_owned()))?;
    let fast = view.numbered(&table.fast).ok_or_else(|| {
        layout(format!("it lies on the device {}, with no linear device over {disk} in between", table.fast))
    })?;
    let fast = fast.clone();
    let [segment] = fast.segments.as_slice() else {
        return Err(layout(format!("{} has {} segments instead of one", fast.name, fast.segments.len())));
    };
    let Some(offset) = segment.offset_on(number) else {
        return Err(layout(format!("{} is not a linear device over {disk}", fast.name)));
    };
    let place = Place {
        offset: offset * SECTOR,
        len: segment.len * SECTOR,
        cache_block: table.block_sectors * SECTOR,
        block,
        total,
    };
    let state = State { cache, table, fast, place, number: number.to_owned(), view };
    let second = state.second_name();
    for device in &state.view.devices {
        if device.name == state.fast.name || device.name == second {
            continue;
        }
        for segment in device.segments.iter().filter(|segment| segment.uses(number)) {
            let is_in_front = segment.offset_on(number).is_some_and(|at| at + segment.len <= offset);
            if !is_in_front {
                let (other, fast) = (&device.name, &state.fast.name);
                return Err(layout(format!("{other} uses {disk}, too, and not only in front of {fast}")));
            }
        }
    }
    Ok(state)
}

impl Source for DmCache {
    fn place(&self) -> Result<PathBuf> {
        Ok(Path::new("/dev/mapper").join(&self.cache))
    }

    /// The blocks behind all that lies on the disk.
    fn held(&self, status: &Status) -> Result<Vec<BlockRange>> {
        let state = self.look(status)?;
        if state.is_suspended() {
            // [`Self::take`] sees to it.
            return Ok(Vec::new());
        }
        // A cache that became smaller a moment ago may still remember its old size on its metadata device. Should these blocks go, come
        // back empty, and the power fail, it would read them.
        self.committed()?;
        Ok(state.held(status))
    }

    /// Makes the cache smaller, or cleaner: that takes some steps.
    fn take(&mut self, status: &Status, _evicted: &BlockSet, want: u32) -> Result<Vec<BlockRange>> {
        let taken = self.shrink(status, want);
        if taken.is_err()
            && let Err(error) = self.restore(status)
        {
            warn!(disk = self.disk, cache = self.cache, %error, "cannot go on as before");
        }
        taken
    }

    /// Makes the cache as large as the evicted blocks allow.
    fn keep(&mut self, status: &Status, evicted: &BlockSet) -> Result<()> {
        let state = self.tidy(status)?;
        let len = state.place.len;
        // In one step, when all have come.
        let longest = if status.state == "growing" { len } else { state.place.longest(evicted).max(len) };
        if longest == len {
            return self.restore(status);
        }
        let cache = self.committed()?;
        if let Err(error) = self.has_metadata_for(&state.place, &cache, longest) {
            self.restore(status)?;
            return Err(error);
        }
        let mode = self.mode(&state, &cache)?;
        self.resize(status, &state, longest, &mode).map(drop)
    }

    /// Evicted blocks on which something lies.
    fn uncovered(&self, status: &Status, evicted: &BlockSet) -> Result<BlockSet> {
        let state = self.look(status)?;
        let used = plan::touched(state.pieces(), state.place.block, state.place.total);
        Ok(evicted.without(&evicted.without(&used)))
    }

    /// Makes the cache end in front of such blocks, whatever it keeps then; what is dirty there is lost already, and keeps it from that.
    fn cover(&mut self, status: &Status, evicted: &BlockSet) -> Result<BlockSet> {
        let missing = self.uncovered(status, evicted)?;
        if missing.is_empty() || self.hopeless.as_ref() == Some(&missing) {
            return Ok(missing);
        }
        if let Err(error) = self.leave(status, evicted) {
            warn!(
                disk = self.disk,
                cache = self.cache,
                error = error.message(),
                "cannot leave blocks that have gone"
            );
            self.restore(status)?;
        }
        let missing = self.uncovered(status, evicted)?;
        self.hopeless = Some(missing.clone()).filter(|missing| !missing.is_empty());
        Ok(missing)
    }

    fn wanted(&mut self, status: &Status, now: Instant) -> Result<Option<u32>> {
        let state = self.look(status)?;
        if state.is_suspended() || state.second().is_some() {
            self.tidy(status)?;
        }
        let cache = self.sound(dmsetup::quick_status(&self.cache)?)?;
        let Place { block, cache_block, .. } = state.place;
        let room = u64::from(status.evicted_blocks) * block / cache_block;
        Ok(self.pull.want(&cache, room, now).map(|more| {
            let blocks = u32::try_from((more * cache_block).div_ceil(block)).unwrap_or(u32::MAX);
            info!(disk = self.disk, cache = self.cache, more = %ByteCount(more * cache_block), "a larger cache would be used");
            blocks.min(status.evicted_blocks)
        }))
    }

    /// What the cache could become smaller by, as if what is free went first and what is dirty last. dm-cache does not tell which blocks
    /// are cold. But each hit is one of one block: no more blocks than there were hits lately can be hot. Where nobody has
    /// looked for long enough (the `status` command), all are taken for hot.
    fn estimate(&self, status: &Status, evicted: &BlockSet) -> Result<Estimate> {
        let state = self.look(status)?;
        let cache = self.sound(dmsetup::quick_status(&self.cache)?)?;
        let held = BlockSet::of(status.total_blocks, state.held(status)).without(evicted).len();
        let removable = state.place.len.saturating_sub(self.shortest(&state.place));
        Ok(estimate(&cache, &state.place, removable, held, self.pull.recent_hits()))
    }
}

fn estimate(
    cache: &CacheStatus,
    place: &Place,
    removable: u64,
    held_blocks: u32,
    recent_hits: Option<u64>,
) -> Estimate {
    let mut left = removable;
    let mut blocks = |count: u64| {
        let bytes = (count * place.cache_block).min(left);
        left -= bytes;
        u32::try_from(bytes / place.block).unwrap_or(u32::MAX)
    };
    let clean = cache.used.saturating_sub(cache.dirty);
    let hot = recent_hits.unwrap_or(u64::MAX).min(clean);
    Estimate {
        held_blocks,
        free_blocks: blocks(cache.total.saturating_sub(cache.used)),
        clean_cold_blocks: blocks(clean - hot),
        clean_hot_blocks: blocks(hot),
        dirty_blocks: blocks(cache.dirty),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "254:0/Active/Live/1//meta\n254:1/Active/Live/1//fast\n254:2/Active/Live/1//cached\n";
    const TABLE: &str = "cached: 0 8000000 cache 254:0 254:1 8:32 512 1 writeback smq 0\n\
        fast: 0 122880 linear 253:0 8192\nmeta: 0 8192 linear 253:0 0\n";

    fn look(info: &str, table: &str) -> std::result::Result<State, CacheError> {
        examine(View::parse(info, table).unwrap(), "253:0", (64 << 10, 1024), "vssda", "cached")
    }

    #[test]
    fn the_cache_of_a_disk_is_found() {
        let state = look(INFO, TABLE).unwrap();
        let place =
            Place { offset: 4 << 20, len: 60 << 20, cache_block: 256 << 10, block: 64 << 10, total: 1024 };
        assert_eq!((state.place, state.fast.name.as_str()), (place, "fast"));
        assert_eq!((state.second_name().as_str(), state.second()), ("fast-vssd", None));
        assert!(!state.is_suspended());

        // Interrupted between two tables, before or after the change.
        let (info, table) = (
            format!("{INFO}254:3/Active/Live/0//fast-vssd\n"),
            format!("{TABLE}fast-vssd: 0 61440 linear 253:0 8192\n"),
        );
        let state = look(&info, &table).unwrap();
        assert_eq!((state.fast.name.as_str(), state.second().unwrap().number.as_str()), ("fast", "254:3"));
        assert_eq!(
            plan::touched(state.pieces(), 64 << 10, 1024).len(),
            1024,
            "what either of them has is in use"
        );
        let state = look(&info, &table.replace("254:0 254:1", "254:0 254:3")).unwrap();
        assert_eq!((state.fast.name.as_str(), state.second_name().as_str()), ("fast-vssd", "fast"));
        assert_eq!(state.place.len, 30 << 20);
    }

    #[test]
    fn what_cannot_shrink_is_refused_with_the_reason() {
        for (from, to, code, word) in [
            ("cached", "other", "E_NO_CACHE", "no device of that name"),
            ("cached: 0 8000000 cache", "cached: 0 8000000 linear", "E_UNSUITABLE", "segment `cache`"),
            ("254:0 254:1 8:32", "254:0 253:0 8:32", "E_UNSUITABLE", "no linear device over vssda"),
            (
                "122880 linear 253:0 8192",
                "122880 linear 253:16 8192",
                "E_UNSUITABLE",
                "fast is not a linear device over vssda",
            ),
            (
                "fast: 0 122880 linear 253:0 8192",
                "fast: 0 80 linear 253:0 8192\nfast: 80 80 linear 253:0 9000",
                "E_UNSUITABLE",
                "2 segments",
            ),
            ("meta: 0 8192", "meta: 0 8193", "E_UNSUITABLE", "meta uses vssda"),
            ("8192 linear 253:0 0", "8192 crypt x 253:0 0", "E_UNSUITABLE", "meta uses vssda"),
            ("254:2/Active/Live/1//", "254:2/Active/Live/1/LVM-x/", "E_UNSUITABLE", "LVM"),
            (
                "cached: 0 8000000 cache 254:0 254:1 8:32 512 1 writeback smq 0",
                "cached: ",
                "E_NO_CACHE",
                "no table",
            ),
        ] {
            let error = look(&INFO.replace(from, to), &TABLE.replace(from, to)).unwrap_err();
            assert_eq!(error.code(), code, "{to}: {error}");
            assert!(error.to_string().contains(word), "{to}: {error}");
        }
    }

    #[test]
    fn held_are_the_blocks_behind_all_that_is_there() {
        let mut status = vssd_status();
        status.requested_blocks = 700;
        let table = TABLE.replace("122880", "81920");
        let held = look(INFO, &table).unwrap().held(&status);
        assert_eq!(held, [BlockRange::new(768, 256), BlockRange::new(704, 64)]);
        // Also of one that nobody uses, and that is not removed yet.
        let held = look(
            &format!("{INFO}254:3/Active/Live/0//fast-vssd\n"),
            &format!("{table}fast-vssd: 0 100000 linear 253:0 8192\n"),
        );
        assert_eq!(held.unwrap().held(&status), [BlockRange::new(846, 178)]);
    }

    fn vssd_status() -> Status {
        Status {
            name: "vm1".to_owned(),
            epoch: "1".to_owned(),
            state: "shrinking".to_owned(),
            seq: 1,
            reason: "operator".to_owned(),
            deadline_ms: 0,
            block_size: 64 << 10,
            total_blocks: 1024,
            requested_blocks: 1024,
            plugged_blocks: 1024,
            evicted_blocks: 0,
        }
    }

    #[test]
    fn the_cheapest_is_counted_first_and_the_least_is_left() {
        let place = Place { offset: 0, len: 60 << 20, cache_block: 256 << 10, block: 64 << 10, total: 1024 };
        let cache = CacheStatus { used: 200, total: 240, dirty: 50, ..CacheStatus::default() };
        let all = estimate(&cache, &place, 60 << 20, 3, None);
        assert_eq!((all.held_blocks, all.free_blocks, all.clean_cold_blocks), (3, 160, 0));
        assert_eq!((all.clean_hot_blocks, all.dirty_blocks), (600, 200));
        assert_eq!(estimate(&cache, &place, 60 << 20, 3, Some(10)).clean_cold_blocks, 560);
        let some = estimate(&cache, &place, 20 << 20, 0, Some(0));
        assert_eq!((some.free_blocks, some.clean_cold_blocks, some.dirty_blocks), (160, 160, 0));
    }
}
