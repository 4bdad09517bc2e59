// SPDX-License-Identifier: Apache-2.0 OR MIT
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
//! Grace periods and the map's fence bit (`vssd-pool/src/{grace,map}.rs`) in every schedule and every order in which memory may
//! answer, by loom; and the same without one of the things they rest on, which loom must notice.
//!
//! ```text
//!   lane:   enter ─ look up ─ use the block ─ leave
//!   keeper:      fence ─ synchronize ─ unplug ─ the block is another's
//! ```
//!
//! `cargo xtask schedules` runs it. The search is exhaustive within the bound on preemptions that each scene names, and knows no
//! seed. Loom gives `SeqCst` to fences alone, which is what the reasoning in `grace.rs` asks for.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::expect_failure;
use loom::cell::UnsafeCell;
use loom::sync::Mutex;
use loom::thread;
use vssd_protocol::units::{BlockIndex, PhysicalBlock};

/// What the sources take from `vssd-pool/src/sync.rs`.
mod sync {
    pub(crate) use std::sync::{OnceLock, PoisonError};

    pub(crate) use loom::sync::Mutex;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

    pub(crate) fn zeroed(len: usize) -> Box<[AtomicU32]> {
        (0..len).map(|_| AtomicU32::new(0)).collect()
    }

    pub(crate) fn pause(_turns: u32) {
        loom::thread::yield_now();
    }
}

/// Nothing is sabotaged: what is broken here is broken in the source.
mod sabotage {
    pub(crate) enum Sabotage {
        FreeBeforeFence,
    }

    pub(crate) fn active(_: Sabotage) -> bool {
        false
    }
}

include!(concat!(env!("OUT_DIR"), "/grace.rs"));
include!(concat!(env!("OUT_DIR"), "/map.rs"));

const LANES: usize = 2;
const BLOCK: BlockIndex = BlockIndex(0);

/// `grace.rs`, as it is or broken.
trait Graces: Send + Sync + 'static {
    type Parity: Copy;
    fn new() -> Self;
    fn enter(&self, slot: usize) -> Self::Parity;
    fn hold(&self, slot: usize, parity: Self::Parity);
    fn leave(&self, slot: usize, parity: Self::Parity);
    fn synchronize(&self);
}

macro_rules! graces {
    ($($module:ident)*) => {$(
        impl Graces for $module::Grace<LANES> {
            type Parity = $module::Parity;
            fn new() -> Self { Self::new() }
            fn enter(&self, slot: usize) -> Self::Parity { self.enter(slot) }
            fn hold(&self, slot: usize, parity: Self::Parity) { self.hold(slot, parity); }
            fn leave(&self, slot: usize, parity: Self::Parity) { self.leave(slot, parity); }
            fn synchronize(&self) {
                assert!(self.synchronize(&loom::sync::atomic::AtomicBool::new(false)));
            }
        }
    )*};
}
graces!(grace one_round reader_without_fence owner_without_fence leave_relaxed wait_relaxed);

/// What a map says about the block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Fenced,
    Unplugged,
    Empty,
    At(u32),
}

/// `map.rs`, as it is or broken; about [`BLOCK`].
trait Maps: Send + Sync + 'static {
    fn new(state: State) -> Self;
    fn get(&self) -> State;
    /// Fence aside.
    fn physical(&self) -> Option<u32>;
    fn exchange(&self, from: State, to: State) -> bool;
    fn fence(&self);
    fn unfence(&self);
    fn unplug(&self);
}

macro_rules! maps {
    ($($module:ident)*) => {$(
        impl From<State> for $module::Entry {
            fn from(state: State) -> Self {
                match state {
                    State::Fenced => unreachable!("only fence() fences"),
                    State::Unplugged => Self::UNPLUGGED,
                    State::Empty => Self::EMPTY,
                    State::At(physical) => Self::mapped(PhysicalBlock(physical)),
                }
            }
        }

        impl Maps for $module::Map {
            fn new(state: State) -> Self {
                let map = Self::new(1);
                map.set(BLOCK, state.into());
                map
            }
            fn get(&self) -> State {
                let entry = self.get(BLOCK);
                match entry.physical() {
                    _ if entry.is_fenced() => State::Fenced,
                    _ if !entry.is_plugged() => State::Unplugged,
                    None => State::Empty,
                    Some(physical) => State::At(physical.0),
                }
            }
            fn physical(&self) -> Option<u32> { self.get(BLOCK).physical().map(|physical| physical.0) }
            fn exchange(&self, from: State, to: State) -> bool { self.exchange(BLOCK, from.into(), to.into()).is_ok() }
            fn fence(&self) { self.fence(BLOCK); }
            fn unfence(&self) { self.unfence(BLOCK); }
            fn unplug(&self) { self.set(BLOCK, $module::Entry::UNPLUGGED); }
        }
    )*};
}
maps!(map exchange_in_two_steps);

/// The bytes of a physical block. Loom ends the run where two threads touch them and nothing orders the touches.
struct Block(UnsafeCell<()>);

// SAFETY: nobody follows the cell's pointer; the cell only notes who touches it when.
unsafe impl Sync for Block {}

impl Block {
    fn new() -> Self {
        Self(UnsafeCell::new(()))
    }

    /// By a guest that owns it; guests order their own requests.
    fn used_by_guest(&self) {
        self.0.with(|_| ());
    }

    /// By whoever gets it next.
    fn changes_hands(&self) {
        self.0.with_mut(|_| ());
    }
}

/// Runs a scene in every schedule with at most `preemptions`, and counts them.
fn explore(
    preemptions: Option<usize>,
    executions: &Arc<AtomicU64>,
    scene: impl Fn() + Send + Sync + 'static,
) {
    let executions = Arc::clone(executions);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    (builder.max_permutations, builder.max_duration, builder.checkpoint_file) = (None, None, None);
    builder.check(move || {
        executions.fetch_add(1, Ordering::Relaxed);
        scene();
    });
}

fn passes(name: &str, preemptions: Option<usize>, scene: impl Fn() + Send + Sync + 'static) {
    let executions = Arc::default();
    explore(preemptions, &executions, scene);
    let executions = executions.load(Ordering::Relaxed);
    let bound = preemptions.map_or("any number of".to_owned(), |bound| format!("at most {bound}"));
    println!("{name}: {executions} executions, {bound} preemptions");
    assert!(executions > 100, "threads met in {executions} executions only");
}

fn caught(name: &str, preemptions: Option<usize>, scene: impl Fn() + Send + Sync + 'static) {
    let executions = Arc::default();
    let message = expect_failure(|| explore(preemptions, &executions, scene));
    println!("{name}: caught in execution {}: {message}", executions.load(Ordering::Relaxed));
}

/// Readers use the block that the map names; after one grace period that has nothing to do with it, its owner unplugs it.
/// With `outlives`, the use is a request of its own that goes on when the section has ended.
fn retire<G: Graces, M: Maps>(readers: usize, outlives: bool) {
    let shared = Arc::new((G::new(), M::new(State::At(0)), Block::new()));
    let threads: Vec<_> = (0..readers)
        .map(|slot| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || {
                let (grace, map, block) = &*shared;
                let section = grace.enter(slot);
                let seen = map.get();
                if outlives {
                    grace.hold(slot, section);
                    grace.leave(slot, section);
                }
                if seen == State::At(0) {
                    block.used_by_guest();
                }
                grace.leave(slot, section);
            })
        })
        .collect();
    let (grace, map, block) = &*shared;
    grace.synchronize();
    map.fence();
    grace.synchronize();
    map.unplug();
    block.changes_hands();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn no_reader_uses_a_block_after_its_grace_period() {
    passes("one reader", None, || retire::<grace::Grace<LANES>, map::Map>(1, false));
    passes("one reader, request outlives its section", None, || {
        retire::<grace::Grace<LANES>, map::Map>(1, true);
    });
    passes("two readers", Some(3), || retire::<grace::Grace<LANES>, map::Map>(2, false));
}

#[test]
fn grace_period_without_what_it_rests_on_is_caught() {
    caught("one round", None, || retire::<one_round::Grace<LANES>, map::Map>(1, false));
    caught("no fence in enter", None, || retire::<reader_without_fence::Grace<LANES>, map::Map>(1, false));
    caught("no fence in synchronize", None, || {
        retire::<owner_without_fence::Grace<LANES>, map::Map>(1, false);
    });
    caught("leave without release", None, || retire::<leave_relaxed::Grace<LANES>, map::Map>(1, false));
    caught("wait without acquire", None, || retire::<wait_relaxed::Grace<LANES>, map::Map>(1, false));
}

/// What a journal would be told, in its order.
#[derive(Clone, Copy, Debug)]
enum Record {
    Map(u32),
    Empty,
    Unplug,
}

/// Where the physical blocks are that no map names, and the journal's tail; under one lock, as in the pool.
#[derive(Default)]
struct Ledger {
    free: Vec<u32>,
    dirty: Vec<u32>,
    journal: Vec<Record>,
}

const PHYSICAL: u32 = 2;

/// One vSSD of one block in a pool of [`PHYSICAL`].
struct Pool<M> {
    grace: grace::Grace<LANES>,
    map: M,
    ledger: Mutex<Ledger>,
    blocks: Vec<Block>,
    start: State,
}

impl<M: Maps> Pool<M> {
    fn new(start: State) -> Arc<Self> {
        let free = (0..PHYSICAL).filter(|&physical| start != State::At(physical)).collect();
        Arc::new(Self {
            grace: grace::Grace::new(),
            map: M::new(start),
            ledger: Mutex::new(Ledger { free, ..Ledger::default() }),
            blocks: (0..PHYSICAL).map(|_| Block::new()).collect(),
            start,
        })
    }

    fn section(&self, slot: usize, batch: impl FnOnce()) {
        let section = self.grace.enter(slot);
        batch();
        self.grace.leave(slot, section);
    }

    /// A guest's write; with nowhere to write to, a first touch.
    fn write(&self) {
        let state = match self.map.get() {
            State::Empty => self.touch(),
            state => state,
        };
        // Fenced: it waits, which is to be tried again later. Unplugged: it is refused.
        if let State::At(physical) = state {
            self.blocks[physical as usize].used_by_guest();
        }
    }

    fn touch(&self) -> State {
        let mut ledger = self.ledger.lock().unwrap();
        let now = self.map.get();
        if now != State::Empty {
            return now;
        }
        let physical = ledger.free.pop().unwrap();
        let to = State::At(physical);
        if !self.map.exchange(now, to) {
            ledger.free.push(physical);
            return State::Fenced;
        }
        ledger.journal.push(Record::Map(physical));
        to
    }

    fn discard(&self) {
        let mut ledger = self.ledger.lock().unwrap();
        if let from @ State::At(physical) = self.map.get()
            && self.map.exchange(from, State::Empty)
        {
            ledger.dirty.push(physical);
            ledger.journal.push(Record::Empty);
        }
    }

    fn unplug(&self) {
        self.map.fence();
        Graces::synchronize(&self.grace);
        self.ledger.lock().unwrap().journal.push(Record::Unplug);
        let physical = self.map.physical();
        self.map.unplug();
        self.ledger.lock().unwrap().dirty.extend(physical);
    }

    /// An unplug that fails before it is recorded.
    fn unplug_in_vain(&self) {
        self.map.fence();
        Graces::synchronize(&self.grace);
        self.map.unfence();
    }

    fn scrub(&self) {
        let dirty = std::mem::take(&mut self.ledger.lock().unwrap().dirty);
        Graces::synchronize(&self.grace);
        for &physical in &dirty {
            self.blocks[physical as usize].changes_hands();
        }
        self.ledger.lock().unwrap().free.extend(dirty);
    }

    /// Every physical block is in one place, and a recovery would make the map that there is.
    fn check(&self) {
        let ledger = self.ledger.lock().unwrap();
        let now = self.map.get();
        for physical in 0..PHYSICAL {
            let places = ledger.free.iter().chain(&ledger.dirty).filter(|&&other| other == physical).count()
                + usize::from(now == State::At(physical));
            assert_eq!(places, 1, "block {physical} has {places} owners");
        }
        let recovered = ledger.journal.iter().fold(self.start, |state, record| match (state, record) {
            (State::Empty, &Record::Map(physical)) => State::At(physical),
            (State::At(_), Record::Empty) => State::Empty,
            (State::At(_) | State::Empty, Record::Unplug) => State::Unplugged,
            _ => panic!("{record:?} recorded of a block that is {state:?}"),
        });
        assert_eq!(recovered, now, "the journal and the map differ");
    }
}

/// What a thread does in a scene.
type Part<M> = fn(&Pool<M>);

/// Lanes and the keeper's thread do their parts.
fn play<M: Maps>(start: State, lanes: &[Part<M>], keeper: Part<M>) {
    let pool = Pool::<M>::new(start);
    let threads: Vec<_> = lanes
        .iter()
        .map(|&lane| {
            let pool = Arc::clone(&pool);
            thread::spawn(move || lane(&pool))
        })
        .collect();
    keeper(&pool);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    pool.check();
}

/// A lane writes twice, in two sections, while the block is unplugged.
fn first_touch_and_unplug<M: Maps>() {
    let lane: Part<M> = |pool| (0..2).for_each(|_| pool.section(0, || pool.write()));
    play::<M>(State::Empty, &[lane], |pool| {
        pool.unplug();
        pool.scrub();
    });
}

#[test]
fn fence_bit_holds_against_first_touch_and_discard() {
    passes("first touch, unplug", None, first_touch_and_unplug::<map::Map>);
    passes("first touch, unplug that fails", None, || {
        play::<map::Map>(State::Empty, &[|pool| pool.section(0, || pool.write())], Pool::unplug_in_vain);
    });
    passes("discard and first touch, unplug", None, || {
        let lane: Part<map::Map> = |pool| {
            pool.section(0, || {
                pool.discard();
                pool.write();
            });
        };
        play(State::At(0), &[lane], |pool| {
            pool.unplug();
            pool.scrub();
        });
    });
    passes("discard beside a write, scrub", Some(4), || {
        let writes: Part<map::Map> = |pool| pool.section(0, || pool.write());
        let discards: Part<map::Map> = |pool| pool.section(1, || pool.discard());
        play(State::At(0), &[writes, discards], Pool::scrub);
    });
    passes("discard beside a first touch, unplug", Some(3), || {
        let writes: Part<map::Map> = |pool| pool.section(0, || pool.write());
        let discards: Part<map::Map> = |pool| pool.section(1, || pool.discard());
        play(State::Empty, &[writes, discards], Pool::unplug);
    });
}

#[test]
fn fence_bit_that_an_exchange_overwrites_is_caught() {
    caught("exchange in two steps", Some(3), first_touch_and_unplug::<exchange_in_two_steps::Map>);
}
