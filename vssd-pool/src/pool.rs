// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A pool: making, opening and closing it, and the way in to everything else. The work is done by the
//! keeper, the scrubber and the lanes; this module starts them, asks them and stops them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use vssd_protocol::units::{BlockRange, BlockSize};

use crate::bell::Bell;
use crate::bitmap::Bitmap;
use crate::blocks::Blocks;
use crate::check::{self, CheckOptions, CheckReport};
use crate::checkpoint::{self, Contents, Slot};
use crate::command::{Command, Reply, Resize, ResizeDone};
use crate::core::{Core, LaneSlot};
use crate::durability::run_syncer;
use crate::error::{Error, Result};
use crate::grace::Grace;
use crate::journal::Journal;
use crate::keeper::Keeper;
use crate::lane::Lane;
use crate::lock;
use crate::record::MAX_NAME;
use crate::recovery::{self, Media};
use crate::sabotage::{Sabotage, active};
use crate::scrub::{self, Round};
use crate::store::{self, Store};
use crate::superblock::{self, COPIES, HEADER, SIZE, Superblock};
use crate::syncs::{SyncDone, Syncs};
use crate::types::{
    CreateOptions, MediumInfo, MediumKind, MediumPath, OpenOptions, PoolInfo, PoolThread, RangeStatus,
    ThreadStart, VssdAttrs, VssdId, VssdSpec,
};
use crate::vssd::Vssd;

/// An open pool. Dropping the last handle closes it in order.
#[derive(Debug)]
pub struct Pool {
    core: Arc<Core>,
    background: Mutex<Background>,
}

/// Who does the work behind the lanes' backs.
#[derive(Debug)]
enum Background {
    Threads {
        keeper: JoinHandle<Result<()>>,
        others: Vec<JoinHandle<()>>,
        /// Tells the keeper that the others have ended: the final checkpoint can be taken.
        last: SyncSender<()>,
    },
    /// Whoever calls [`Pool::run_background`], and the waiting methods for themselves.
    Caller(Box<Keeper>),
    Closed,
}

/// Distinguishes openings within the process.
static INSTANCES: AtomicU64 = AtomicU64::new(1);

/// How long the scrubber leaves things alone when it got nowhere; a checkpoint that makes room rings it earlier.
const SCRUB_PAUSE: Duration = Duration::from_secs(1);

impl Pool {
    /// Makes a pool on media that hold nothing (or anything, with `force`).
    pub fn create(options: &CreateOptions) -> Result<()> {
        check_create(options)?;
        if options.media.is_empty() {
            return Err(Error::invalid("a pool needs an NV-RAM medium, an SSD medium, or one of each"));
        }
        let new: Vec<_> =
            options.media.iter().filter(|spec| !spec.path.exists()).map(|spec| &spec.path).collect();
        let made = options
            .media
            .iter()
            .map(|spec| store::create(spec, options.force))
            .collect::<Result<Vec<_>>>()
            .and_then(|stores| Self::create_on(options, &stores));
        if made.is_err() {
            // Files that would only be in the way of the next attempt. That there are none is as good.
            new.into_iter().for_each(|path| drop(std::fs::remove_file(path)));
        }
        made
    }

    /// Makes a pool on stores; `options.media` is ignored.
    pub fn create_on(options: &CreateOptions, stores: &[Arc<dyn Store>]) -> Result<()> {
        check_create(options)?;
        let mut by_kind: [Option<&Arc<dyn Store>>; 2] = [None; 2];
        for store in stores {
            if by_kind[store.kind().index()].replace(store).is_some() {
                return Err(Error::invalid(format!("a pool has at most one {} medium", store.kind())));
            }
        }
        if stores.is_empty() {
            return Err(Error::invalid("a pool needs an NV-RAM medium, an SSD medium, or one of each"));
        }
        for store in stores {
            if !options.force {
                refuse_if_used(&**store)?;
            }
        }
        let sizes = by_kind.map(|store| store.map(|store| store.size()));
        let (layout, data_offsets) =
            superblock::plan(&options.name, sizes, options.block_size, options.overcommit_percent)?;
        let io_error = |source| Error::io("cannot write the new pool", source);
        let store_of =
            |kind: MediumKind| by_kind[kind.index()].ok_or_else(|| Error::invalid("a medium is missing"));

        let mut clean = Bitmap::new(layout.total_blocks());
        let mut first = 0;
        for kind in MediumKind::ALL {
            let count = layout.blocks[kind.index()];
            if by_kind[kind.index()].is_some_and(|store| store.is_fresh()) {
                for block in first..first + count {
                    clean.insert(block);
                }
            }
            first += count;
        }
        // Nothing must look like a pool until everything is there.
        for store in stores {
            store.reserve(0, data_offsets[store.kind().index()]).map_err(io_error)?;
            for at in COPIES {
                store.write_at(at, &[0; SIZE]).map_err(io_error)?;
            }
            store.sync().map_err(io_error)?;
        }
        let slots_on = store_of(layout.slots_on)?;
        let slot = |i: usize| Slot { offset: layout.slots[i], len: layout.slot_len };
        slots_on.write_at(slot(1).offset, &[0; SIZE]).map_err(io_error)?;
        let contents = Contents { next_id: 1, vssds: &mut std::iter::empty(), clean: &clean };
        checkpoint::write(&**slots_on, slot(0), layout.pool, (1, 1), contents, || Ok(()))?;
        let mut order = MediumKind::ALL;
        order.sort_by_key(|&kind| kind == layout.journal_on);
        for kind in order {
            let Some(store) = by_kind[kind.index()] else { continue };
            let superblock =
                Superblock { layout: layout.clone(), kind, data_offset: data_offsets[kind.index()] };
            superblock.write(&**store).map_err(io_error)?;
        }
        Ok(())
    }

    /// Locks the media, recovers, and starts the background threads.
    pub fn open(options: &OpenOptions) -> Result<Arc<Self>> {
        let stores = open_stores(&options.media, options.read_only)?;
        Self::open_on(options, stores)
    }

    /// Opens a pool on stores; `options.media` is ignored.
    pub fn open_on(options: &OpenOptions, stores: Vec<Arc<dyn Store>>) -> Result<Arc<Self>> {
        let media = recovery::assemble(stores)?;
        let recovered = recovery::recover(&media)?;
        if let Some(first) = recovered.contradictions.first() {
            let more = recovered.contradictions.len() - 1;
            return Err(Error::damaged(format!(
                "{first}{}",
                if more > 0 { format!(", and {more} more") } else { String::new() }
            )));
        }
        for finding in media.findings.iter().chain(&recovered.findings) {
            tracing::warn!(pool = media.layout.name, finding, "recovered from the other copy");
        }
        if !options.read_only && !media.findings.is_empty() {
            media.repair_superblocks()?;
        }
        let Media { layout, media, .. } = media;
        let state = recovered.state;
        let blocks = Blocks::new(layout.block_size, layout.blocks, state.clean, &recovered.leased);
        let journal_store = media[layout.journal_on.index()]
            .as_ref()
            .map(|medium| Arc::clone(&medium.store))
            .ok_or_else(|| Error::damaged("the journal's medium is missing"))?;
        let (next, needed) = (recovered.next_page.max(1), recovered.needed_from);
        let journal =
            Journal::new(journal_store, layout.journal, layout.pool, next, needed.min(next), blocks);
        let instance = INSTANCES.fetch_add(1, Ordering::Relaxed);
        let vssds = state
            .vssds
            .into_iter()
            .map(|(id, (meta, map))| (id, Arc::new(Vssd::new(meta, map, layout.block_size, instance))));
        let core = Arc::new(Core {
            instance,
            vssds: RwLock::new(vssds.collect()),
            layout,
            media,
            journal,
            grace: Grace::new(),
            lanes: std::array::from_fn(|_| LaneSlot::default()),
            synced: [const { AtomicU64::new(0) }; 2],
            commands: Mutex::default(),
            keeper_bell: Bell::default(),
            scrub_bell: Bell::default(),
            commit_bell: Bell::default(),
            syncs: Syncs::default(),
            checkpoint_at: AtomicU64::new(u64::MAX),
            checkpoints: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            read_only: options.read_only,
            has_threads: options.threads,
            space_wait: options.space_wait,
        });
        let (number, slot) = recovered.checkpoint;
        let mut keeper = Keeper::new(Arc::clone(&core), state.next_id, (number, slot, needed));
        if !options.read_only {
            // A guest may count on a flush for what an earlier process answered, and may still have to: from here on
            // nothing on the media is unflushed but what this process writes.
            if !active(Sabotage::SkipOpeningFlush) {
                core.sync_all()?;
            }
            core.reserve_metadata()?;
            keeper.take_checkpoint()?;
            keeper.refresh_promises();
            // So that the first writes need not wait for a commit.
            let position = {
                let mut ledger = core.journal.ledger();
                core.refill(&mut ledger);
                ledger.buffer.position()
            };
            core.journal.commit(position)?;
            core.scrub_bell.ring();
        }
        let background = if options.threads && !options.read_only {
            start(&core, keeper, options.thread_start.as_ref())?
        } else {
            Background::Caller(Box::new(keeper))
        };
        Ok(Arc::new(Self { core, background: Mutex::new(background) }))
    }

    /// Looks for contradictions on the media of a closed pool. Changes nothing.
    pub fn check(options: &CheckOptions) -> Result<CheckReport> {
        check::check(open_stores(&options.media, true)?, options.verify_zero)
    }

    /// [`Pool::check`] on stores.
    pub fn check_on(stores: Vec<Arc<dyn Store>>, verify_zero: bool) -> Result<CheckReport> {
        check::check(stores, verify_zero)
    }

    /// Ends background work and writes a final checkpoint. Lanes can read, and write what is allocated, until
    /// they are dropped; the media are unlocked when the last lane and the last handle of the pool are gone.
    /// Dropping the pool does the same but cannot report what went wrong.
    pub fn close(&self) -> Result<()> {
        let mut background = lock(&self.background);
        match std::mem::replace(&mut *background, Background::Closed) {
            Background::Closed => Ok(()),
            Background::Caller(keeper) => {
                self.refuse_commands();
                self.core.stop.store(true, Ordering::Release);
                finish(&self.core, *keeper)
            }
            Background::Threads { keeper, others, last } => {
                self.refuse_commands();
                self.core.stop.store(true, Ordering::Release);
                self.core.keeper_bell.ring();
                self.core.scrub_bell.ring();
                self.core.commit_bell.ring();
                self.core.syncs.bell.ring();
                let dead = || Error::Busy { what: "a background thread died; the pool".to_owned() };
                let results: Vec<_> = others.into_iter().map(JoinHandle::join).collect();
                let are_well = results.iter().all(std::result::Result::is_ok);
                if are_well {
                    let _ = last.send(());
                }
                drop(last);
                let result = keeper.join().map_err(|_| dead())?;
                if are_well { result } else { Err(dead()) }
            }
        }
    }

    fn refuse_commands(&self) {
        let _commands = lock(&self.core.commands);
        let _ledger = self.core.journal.ledger();
        self.core.closing.store(true, Ordering::Release);
    }

    pub fn info(&self) -> PoolInfo {
        let core = &self.core;
        let layout = &core.layout;
        let (counts, by_kind, room) = {
            let ledger = core.journal.ledger();
            (
                ledger.blocks.counts(),
                MediumKind::ALL.map(|kind| ledger.blocks.counts_of(kind)),
                core.journal.room(&ledger),
            )
        };
        let media = MediumKind::ALL.into_iter().filter_map(|kind| {
            let medium = core.media[kind.index()].as_ref()?;
            let by_lanes: u64 = core
                .lanes
                .iter()
                .map(|lane| lane.data_bytes_written[kind.index()].load(Ordering::Relaxed))
                .sum();
            Some(MediumInfo {
                kind,
                path: medium.store.path().to_owned(),
                uuid: layout.media[kind.index()],
                size_bytes: medium.store.size(),
                blocks: layout.blocks[kind.index()],
                leased_blocks: by_kind[kind.index()].leased,
                persistence: medium.store.persistence(),
                cache: medium.store.cache(),
                bytes_written: medium.store.bytes_written() + by_lanes,
                is_lost: is_lost(&medium.store),
            })
        });
        let pages = core.journal.pages();
        let offset_align = |store: &Arc<dyn Store>| store.ring().map(|ring| ring.offset_align);
        PoolInfo {
            name: layout.name.clone(),
            uuid: layout.pool,
            block_size: layout.block_size,
            media: media.collect(),
            read_only: core.read_only,
            total_blocks: layout.total_blocks(),
            free_blocks: counts.clean,
            scrubbing_blocks: counts.dirty,
            leased_blocks: counts.leased,
            reserved_blocks: counts.reserved,
            promised_blocks: core.vssds().iter().map(|vssd| u64::from(vssd.promise().blocks)).sum(),
            promisable_blocks: core.capacity().promisable(),
            overcommit_percent: layout.overcommit_percent,
            journal_used_bytes: (pages - room.min(pages)) * crate::journal::PAGE as u64,
            journal_bytes: pages * crate::journal::PAGE as u64,
            checkpoints: core.checkpoints.load(Ordering::Relaxed),
            logical_block_bytes: core.stores().filter_map(offset_align).max().unwrap_or(512).max(512),
            failed: core.journal.has_failed() || core.stores().any(is_lost),
        }
    }

    pub fn block_size(&self) -> BlockSize {
        self.core.layout.block_size
    }

    /// Durable on return.
    pub fn create_vssd(&self, spec: &VssdSpec) -> Result<Arc<Vssd>> {
        self.ask(|reply| Command::Create(Box::new(spec.clone()), reply))
    }

    /// Its requests in flight finish, later ones get `Evicted`. Durable on return.
    pub fn delete_vssd(&self, id: VssdId) -> Result<()> {
        self.ask(|reply| Command::Delete(id, reply))
    }

    /// All vSSDs, by id.
    pub fn vssds(&self) -> Vec<Arc<Vssd>> {
        self.core.vssds()
    }

    pub fn vssd(&self, id: VssdId) -> Option<Arc<Vssd>> {
        self.core.vssd(id)
    }

    pub fn vssd_by_name(&self, name: &str) -> Option<Arc<Vssd>> {
        self.core.vssds().into_iter().find(|vssd| vssd.name() == name)
    }

    /// Durable on return. Raising `requested_blocks` takes the promise at once or fails with `PoolFull`;
    /// lowering it frees promise only as far as `plugged_blocks` goes down.
    pub fn set_attrs(&self, id: VssdId, attrs: &VssdAttrs) -> Result<()> {
        self.ask(|reply| Command::SetAttrs(id, Box::new(attrs.clone()), reply))
    }

    /// Raises a vSSD's maximum. Durable on return.
    pub fn extend_vssd(&self, id: VssdId, new_max_blocks: u32) -> Result<()> {
        self.ask(|reply| Command::Extend(id, new_max_blocks, reply))
    }

    /// Takes a checkpoint now.
    pub fn checkpoint(&self) -> Result<()> {
        self.ask(Command::Checkpoint)
    }

    /// Takes ranges from a vSSD: fences new I/O, waits for what is in flight, makes it durable, then calls
    /// `done`; the blocks are zeroed afterwards and only then lent again.
    pub fn unplug(&self, id: VssdId, ranges: Vec<BlockRange>, done: ResizeDone) {
        self.post(Command::Unplug(Resize { id, ranges, done }, false));
    }

    /// [`Pool::unplug`] of ranges in which no block holds data; one in which a block does is
    /// [`RangeStatus::Busy`] and unchanged, even if it got the data just before.
    pub fn unplug_empty(&self, id: VssdId, ranges: Vec<BlockRange>, done: ResizeDone) {
        self.post(Command::Unplug(Resize { id, ranges, done }, true));
    }

    /// Gives ranges to a vSSD, never so that it holds more than `limit_blocks`; they read as zeroes. Durable
    /// before `done` is called.
    pub fn plug(&self, id: VssdId, ranges: Vec<BlockRange>, limit_blocks: u32, done: ResizeDone) {
        self.post(Command::Plug(Resize { id, ranges, done }, limit_blocks));
    }

    /// [`Pool::unplug`] that waits. Not for the threads that run lanes: it waits for their batches to end.
    pub fn unplug_wait(&self, id: VssdId, ranges: Vec<BlockRange>) -> Result<Vec<RangeStatus>> {
        self.ask(|reply| {
            let done = Box::new(move |result| drop(reply.send(result)));
            Command::Unplug(Resize { id, ranges, done }, false)
        })
    }

    /// [`Pool::plug`] that waits.
    pub fn plug_wait(
        &self,
        id: VssdId,
        ranges: Vec<BlockRange>,
        limit_blocks: u32,
    ) -> Result<Vec<RangeStatus>> {
        self.ask(|reply| {
            let done = Box::new(move |result| drop(reply.send(result)));
            Command::Plug(Resize { id, ranges, done }, limit_blocks)
        })
    }

    /// Makes everything durable that was acknowledged before this call, of every vSSD and whichever lane carried it, then
    /// calls `done`: a FLUSH for the whole pool. It returns at once, and requests go on meanwhile. What has nothing to be made
    /// durable costs no flush of a medium. After a failure nothing is acknowledged any more, nor is a flush.
    pub fn sync(&self, done: SyncDone) {
        let Err(done) = self.core.syncs.ask(done) else { return };
        let has_syncer = self.core.has_threads && !self.core.read_only;
        done(if has_syncer {
            Err(Error::Busy { what: "the pool".to_owned() })
        } else {
            self.core.make_durable()
        });
    }

    /// [`Pool::sync`] that waits.
    pub fn sync_wait(&self) -> Result<()> {
        let (reply, answer) = sync_channel(1);
        self.sync(Box::new(move |result| drop(reply.send(result))));
        answer.recv().unwrap_or_else(|_| Err(Error::Busy { what: "the pool".to_owned() }))
    }

    /// I/O for one worker thread. There may be 64 at a time.
    pub fn lane(&self) -> Result<Lane> {
        Lane::new(Arc::clone(&self.core))
    }

    /// Does what the background threads would have done by now. Only for a pool opened without threads.
    pub fn run_background(&self) {
        let mut background = lock(&self.background);
        let Background::Caller(keeper) = &mut *background else { return };
        loop {
            let worked = keeper.step();
            if self.core.read_only || (scrub::round(&self.core) != Round::Cleaned && !worked) {
                break;
            }
        }
        self.core.commit_soon();
        self.core.wake_lanes();
    }

    /// Asks the keeper and waits for its answer.
    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        self.post(command(reply));
        if let Background::Caller(keeper) = &mut *lock(&self.background) {
            keeper.step();
        }
        answer.recv().unwrap_or_else(|_| Err(Error::Busy { what: "the pool".to_owned() }))
    }

    fn post(&self, command: Command) {
        let refusal = || {
            if self.core.read_only { Error::ReadOnly } else { Error::Busy { what: "the pool".to_owned() } }
        };
        {
            let mut commands = lock(&self.core.commands);
            if !self.core.read_only && !self.core.closing.load(Ordering::Acquire) {
                commands.push_back(command);
                drop(commands);
                self.core.keeper_bell.ring();
                return;
            }
        }
        match command {
            Command::Create(_, reply) => drop(reply.send(Err(refusal()))),
            Command::Delete(_, reply)
            | Command::SetAttrs(_, _, reply)
            | Command::Extend(_, _, reply)
            | Command::Checkpoint(reply) => drop(reply.send(Err(refusal()))),
            Command::Unplug(resize, _) | Command::Plug(resize, _) => (resize.done)(Err(refusal())),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(%error, "the pool was not closed in order; the next open recovers it");
        }
    }
}

/// The end of a pool: nothing works in the background any more.
fn finish(core: &Core, mut keeper: Keeper) -> Result<()> {
    // What was asked too late finds the grace periods cut short and is told so; the map stays as it was.
    keeper.step();
    if core.read_only {
        return Ok(());
    }
    core.journal.health()?;
    core.sync_all()?;
    // Nothing was written to the blocks in reserve, and since `closing` nobody takes one. The checkpoint
    // says so; no record need, for without it they are merely zeroed again.
    core.journal.ledger().blocks.return_reserve();
    let result = keeper.take_checkpoint();
    // Whatever lanes wait for, it will not come, or it has come just now.
    core.wake_lanes();
    result
}

fn start(core: &Arc<Core>, keeper: Keeper, on_start: Option<&ThreadStart>) -> Result<Background> {
    let spawn_error = |source| Error::io("cannot start a thread", source);
    let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
    let begin = |kind| {
        let on_start = on_start.cloned();
        move || on_start.into_iter().for_each(|hook| hook.call(kind))
    };
    let mut others = Vec::new();
    let (scrub_core, begin_scrub) = (Arc::clone(core), begin(PoolThread::Scrubber));
    let scrub = move || {
        begin_scrub();
        run_scrubber(&scrub_core);
    };
    others.push(thread("vssd-scrub").spawn(scrub).map_err(spawn_error)?);
    if !core.journal.is_instant() {
        let (commit_core, begin_commit) = (Arc::clone(core), begin(PoolThread::Committer));
        let commit = move || {
            begin_commit();
            run_committer(&commit_core);
        };
        others.push(thread("vssd-journal").spawn(commit).map_err(spawn_error)?);
    }
    let (sync_core, begin_sync) = (Arc::clone(core), begin(PoolThread::Syncer));
    core.syncs.open();
    let sync = move || {
        begin_sync();
        run_syncer(&sync_core);
    };
    others.push(thread("vssd-sync").spawn(sync).map_err(spawn_error)?);
    let (last, others_ended) = sync_channel(1);
    let (keeper_core, begin_keeper) = (Arc::clone(core), begin(PoolThread::Keeper));
    let keep = move || {
        begin_keeper();
        let keeper = keeper.run();
        // Nobody says so when one of the others died.
        others_ended.recv().map_or(Ok(()), |()| finish(&keeper_core, keeper))
    };
    let keeper = thread("vssd-keeper").spawn(keep).map_err(spawn_error)?;
    Ok(Background::Threads { keeper, others, last })
}

fn run_scrubber(core: &Core) {
    while !core.stop.load(Ordering::Acquire) {
        match scrub::round(core) {
            Round::Cleaned => {}
            Round::Idle => core.scrub_bell.wait(None),
            Round::Stuck => core.scrub_bell.wait(Some(SCRUB_PAUSE)),
        }
    }
}

fn run_committer(core: &Core) {
    while !core.stop.load(Ordering::Acquire) {
        core.commit_bell.wait(None);
        let position = core.journal.ledger().buffer.position();
        // A failure is remembered by the journal; the lanes that wait are woken to meet it.
        let _ = core.journal.commit(position);
        core.wake_lanes();
    }
}

fn check_create(options: &CreateOptions) -> Result<()> {
    if options.name.is_empty() || options.name.len() > MAX_NAME || options.name.chars().any(char::is_control)
    {
        return Err(Error::invalid(format!(
            "a name has 1 to {MAX_NAME} bytes and no control characters, not {:?}",
            options.name
        )));
    }
    if !(100..=1000).contains(&options.overcommit_percent) {
        return Err(Error::invalid(format!(
            "overcommit is 100 to 1000 per cent, not {}",
            options.overcommit_percent
        )));
    }
    for kind in MediumKind::ALL {
        if options.media.iter().filter(|spec| spec.kind == kind).count() > 1 {
            return Err(Error::invalid(format!("a pool has at most one {kind} medium")));
        }
    }
    Ok(())
}

/// Whether a part of the medium is gone.
fn is_lost(store: &Arc<dyn Store>) -> bool {
    store.is_lost() || store.intact() < store.size()
}

/// Refuses a medium whose first MiB holds anything.
fn refuse_if_used(store: &dyn Store) -> Result<()> {
    if store.is_fresh() {
        return Ok(());
    }
    let path = store.path();
    let len = usize::try_from(HEADER.min(store.size())).unwrap_or(0);
    let mut head = vec![0; len];
    store
        .read_at(0, &mut head)
        .map_err(|source| Error::io(format!("cannot read {}", path.display()), source))?;
    if head.starts_with(b"vSSDpool") {
        return Err(Error::Exists { what: format!("a pool on {}", path.display()) });
    }
    if head.iter().any(|&byte| byte != 0) {
        return Err(Error::Exists { what: format!("data on {}", path.display()) });
    }
    Ok(())
}

fn open_stores(media: &[MediumPath], read_only: bool) -> Result<Vec<Arc<dyn Store>>> {
    media
        .iter()
        .map(|medium| {
            let kind = recovery::kind_at(&medium.path)?;
            store::open(medium, kind, read_only)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{IoError, MediumSpec, Persistence, Submitted};

    /// A copy that a lane has put off is not on the medium yet, so no flush of another may take it for covered.
    #[test]
    fn flush_beside_an_open_batch_does_not_count_its_copies_as_durable() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = MediumSpec::new(MediumKind::Nvram, dir.path().join("nvram"), Some(8 << 20));
        spec.persistence = Persistence::Msync;
        let mut create = CreateOptions::new("pool", vec![spec]);
        create.block_size = BlockSize::new(4096).unwrap();
        Pool::create(&create).unwrap();
        let mut options = OpenOptions::new([&create.media[0].path]);
        options.media[0].persistence = Persistence::Msync;
        let pool = Pool::open(&options).unwrap();
        let attrs = VssdAttrs::default();
        let vssd = pool
            .create_vssd(&VssdSpec { name: "a".to_owned(), max_blocks: 8, initial_blocks: 8, attrs })
            .unwrap();
        let (mut lane, mut other) = (pool.lane().unwrap(), pool.lane().unwrap());
        let mut bytes = vec![1u8; 4096];
        let iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        for first in [true, false] {
            lane.begin_batch();
            // SAFETY: `bytes` outlives the batch.
            assert_eq!(unsafe { lane.write(&vssd, 0, &iov, 1) }, Submitted::Done(Ok(())));
            if other.flush(&vssd, 2) == Submitted::Pending {
                other.drain(&mut |_, result| assert_eq!(result, Ok(())));
            }
            pool.sync_wait().unwrap();
            assert!(lane.end_batch());
            assert!(pool.core.unsynced(MediumKind::Nvram).is_some(), "first: {first}");
            pool.sync_wait().unwrap();
            assert!(pool.core.unsynced(MediumKind::Nvram).is_none());
        }
    }

    /// The kernel reports a failed write-back to one of those who flush the same file at the same time.
    #[test]
    fn flush_under_way_when_another_fails_is_not_acknowledged() {
        let dir = tempfile::tempdir().unwrap();
        let spec = MediumSpec::new(MediumKind::Ssd, dir.path().join("ssd"), Some(8 << 20));
        let mut create = CreateOptions::new("pool", vec![spec]);
        create.block_size = BlockSize::new(4096).unwrap();
        Pool::create(&create).unwrap();
        let pool = Pool::open(&OpenOptions::new([&create.media[0].path])).unwrap();
        let attrs = VssdAttrs::default();
        let vssd = pool
            .create_vssd(&VssdSpec { name: "a".to_owned(), max_blocks: 8, initial_blocks: 8, attrs })
            .unwrap();
        let mut lane = pool.lane().unwrap();
        let mut results = Vec::new();
        for fails in [false, true] {
            let mut bytes = vec![1u8; 4096];
            let iov = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
            // SAFETY: `bytes` outlives the request, which is drained next.
            assert_eq!(unsafe { lane.write(&vssd, 0, &iov, 1) }, Submitted::Pending);
            lane.drain(&mut |_, result| assert_eq!(result, Ok(())));
            assert_eq!(lane.flush(&vssd, 2), Submitted::Pending);
            if fails {
                pool.core.journal.fail(&std::io::Error::from_raw_os_error(libc::EIO));
            }
            lane.drain(&mut |_, result| results.push(result));
        }
        assert_eq!(results, [Ok(()), Err(IoError::Io(libc::EIO))]);
        assert_eq!(lane.flush(&vssd, 3), Submitted::Done(Err(IoError::Io(libc::EIO))));
    }
}
