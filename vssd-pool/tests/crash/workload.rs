// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A random workload on simulated media, and the record of what was acknowledged when.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vssd_pool::store::fault::Sim;
use vssd_pool::{
    BlockIndex, BlockRange, Class, Error, IoError, MediumKind, Pool, RangeStatus, Vssd, VssdAttrs,
};

use crate::common::*;
use crate::model::{Action, BLOCK, BLOCKS, MAX_BLOCKS, Model, NAMES, SECTORS, Tag};

/// What was done, as far as the media can tell the difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Create,
    Delete,
    Extend,
    Allocate,
    Write,
    Flush,
    Sync,
    Discard,
    WriteZeroes,
    Plug,
    Unplug,
    Attributes,
    Checkpoint,
    Scrub,
    Close,
    Recovery,
}

impl Kind {
    pub(crate) const ALL: [Self; 16] = [
        Self::Create,
        Self::Delete,
        Self::Extend,
        Self::Allocate,
        Self::Write,
        Self::Flush,
        Self::Sync,
        Self::Discard,
        Self::WriteZeroes,
        Self::Plug,
        Self::Unplug,
        Self::Attributes,
        Self::Checkpoint,
        Self::Scrub,
        Self::Close,
        Self::Recovery,
    ];
}

/// An action and when it began and ended on the media's timeline.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) kind: Kind,
    pub(crate) action: Action,
    pub(crate) begin: usize,
    pub(crate) end: usize,
    pub(crate) certain: bool,
}

fn media(seed: u64) -> Vec<(MediumKind, usize)> {
    use MediumKind::{Nvram, Ssd};
    // Superblocks, two checkpoints and the smallest journal take a good 1.3 MiB; some 30 blocks are left, so that
    // blocks go round soon.
    let (main, smaller, rest) = (1_590_000 & !4095, 1_500_000 & !4095, (1 << 20) + 24 * 4096);
    match seed % 3 {
        0 => vec![(Nvram, main)],
        1 => vec![(Ssd, main)],
        _ => vec![(Nvram, smaller), (Ssd, rest)],
    }
}

pub(crate) struct Run {
    pub(crate) sim: Arc<Sim>,
    /// `None` after an opening that failed.
    pub(crate) pool: Option<Arc<Pool>>,
    io: Option<Io>,
    rng: StdRng,
    next_tag: Tag,
    /// A guest that meets a new daemon often flushes first.
    flushes_next: bool,
    pub(crate) steps: Vec<Step>,
}

impl Run {
    pub(crate) fn new(seed: u64) -> Self {
        let sim = Sim::new(&media(seed));
        Pool::create_on(&create_options(), &sim.stores()).expect("create");
        sim.record();
        let mut run = Self {
            sim,
            pool: None,
            io: None,
            rng: StdRng::seed_from_u64(seed),
            next_tag: 1,
            flushes_next: false,
            steps: Vec::new(),
        };
        assert!(run.open(), "the new pool opens");
        run
    }

    fn open(&mut self) -> bool {
        self.pool = Pool::open_on(&open_options(false), self.sim.stores()).ok();
        self.io = self.pool.as_ref().map(Io::new);
        self.pool.is_some()
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.pool.as_ref().is_none_or(|pool| pool.info().failed)
    }

    pub(crate) fn actions(&mut self, count: usize) {
        for _ in 0..count {
            self.action();
        }
    }

    pub(crate) fn action(&mut self) {
        let begin = self.sim.now();
        let had_failed = self.has_failed();
        let (kind, mut action, certain) = self.act();
        let end = self.sim.now();
        if had_failed && kind != Kind::Recovery {
            // A pool that failed acknowledges nothing, and what it refuses leaves no trace.
            let changes = !matches!(action, Action::Other | Action::Plug { .. } | Action::Unplug { .. });
            assert!(!(certain && changes), "{action:?} was acknowledged after a failure");
            action = Action::Other;
        }
        self.steps.push(Step { kind, action, begin, end, certain });
    }

    fn act(&mut self) -> (Kind, Action, bool) {
        let Some(pool) = self.pool.clone() else {
            // What failed was remembered by nobody: the next attempt finds media that are in order.
            let may_fail = self.sim.will_fail();
            assert!(self.open() || may_fail, "opening again works");
            return (Kind::Recovery, Action::Other, true);
        };
        let disk = NAMES.into_iter().rev().find_map(|name| Some((name, pool.vssd_by_name(name)?)));
        if std::mem::take(&mut self.flushes_next)
            && let Some((name, vssd)) = disk
        {
            return (Kind::Flush, Action::Flush { name }, self.io().flush(&vssd).is_ok());
        }
        match self.rng.random_range(0..100) {
            0..3 => {
                let certain = pool.checkpoint().is_ok();
                return (Kind::Checkpoint, Action::Other, certain);
            }
            3..8 => {
                pool.run_background();
                return (Kind::Scrub, Action::Other, true);
            }
            11..15 => return (Kind::Sync, Action::Sync, pool.sync_wait().is_ok()),
            8 => {
                let certain = pool.close().is_ok();
                drop(pool);
                self.vanish();
                return (Kind::Close, Action::Close, certain);
            }
            9 | 10 => {
                // As kill -9 does it.
                drop(pool);
                self.vanish();
                self.open();
                self.flushes_next = true;
                return (Kind::Recovery, Action::Other, true);
            }
            _ => {}
        }
        let name = NAMES[self.rng.random_range(0..NAMES.len())];
        match pool.vssd_by_name(name) {
            None => self.create(&pool, name),
            Some(vssd) => self.use_disk(&pool, name, &vssd),
        }
    }

    /// The process ends without another word to the media.
    pub(crate) fn vanish(&mut self) {
        self.sim.set_power(false);
        self.io = None;
        self.pool = None;
        self.sim.set_power(true);
    }

    fn io(&mut self) -> &mut Io {
        self.io.as_mut().expect("there is one with the pool")
    }

    fn create(&mut self, pool: &Arc<Pool>, name: &'static str) -> (Kind, Action, bool) {
        let initial = self.rng.random_range(0..12);
        let mut spec = spec(name, BLOCKS, initial);
        if pool.info().media.len() == 2 && name != "a" {
            // Otherwise the SSD would hardly be used.
            spec.attrs.class = if name == "b" { Class::Nvram } else { Class::Ssd };
        }
        match pool.create_vssd(&spec) {
            Ok(_) => (Kind::Create, Action::Create { name, initial }, true),
            // Refused is certain, too: then nothing may appear.
            Err(Error::PoolFull { .. } | Error::Invalid { .. }) => (Kind::Create, Action::Other, true),
            Err(_) => (Kind::Create, Action::Create { name, initial }, false),
        }
    }

    fn use_disk(&mut self, pool: &Arc<Pool>, name: &'static str, vssd: &Arc<Vssd>) -> (Kind, Action, bool) {
        let total = vssd.total_blocks();
        let start = self.rng.random_range(0..total);
        let range = BlockRange::new(start, self.rng.random_range(1..=(total - start).min(6)));
        match self.rng.random_range(0..150) {
            0..110 => self.write(name, vssd),
            110..118 => (Kind::Flush, Action::Flush { name }, self.io().flush(vssd).is_ok()),
            118..127 => {
                let result = pool.plug_wait(vssd.id(), vec![range], MAX_BLOCKS);
                let refused = matches!(result.as_deref(), Ok([RangeStatus::NoSpace | RangeStatus::Limit]));
                let action = if refused { Action::Other } else { Action::Plug { name, range } };
                (Kind::Plug, action, result.is_ok())
            }
            127..136 => {
                let result = pool.unplug_wait(vssd.id(), vec![range]);
                (Kind::Unplug, Action::Unplug { name, range }, result.is_ok())
            }
            136..138 => (Kind::Delete, Action::Delete { name }, pool.delete_vssd(vssd.id()).is_ok()),
            138..142 => {
                let len = self.rng.random_range(total..=MAX_BLOCKS);
                let certain = pool.extend_vssd(vssd.id(), len).is_ok();
                (Kind::Extend, Action::Extend { name, len }, certain)
            }
            _ => {
                let requested_blocks = self.rng.random_range(0..BLOCKS);
                let attrs = VssdAttrs { requested_blocks, ..vssd.attrs() };
                drop(pool.set_attrs(vssd.id(), &attrs));
                (Kind::Attributes, Action::Other, true)
            }
        }
    }

    /// Writes, discards or zeroes some sectors of a plugged stretch.
    fn write(&mut self, name: &'static str, vssd: &Arc<Vssd>) -> (Kind, Action, bool) {
        let total = vssd.total_blocks();
        let mut block = self.rng.random_range(0..total);
        if self.rng.random_range(0..20) > 0 {
            // Mostly one that is there, where there is one.
            block = (block..total)
                .chain(0..block)
                .find(|&block| vssd.is_plugged(BlockIndex(block)))
                .unwrap_or(block);
        }
        let plugged = (block..total).take_while(|&block| vssd.is_plugged(BlockIndex(block))).count();
        if plugged == 0 {
            let result = self.io().fill(vssd, u64::from(block) * BLOCK, 512, 1);
            assert!(result == Err(IoError::Evicted) || self.has_failed(), "{result:?}");
            return (Kind::Write, Action::Other, true);
        }
        let first = block as usize * SECTORS;
        let end = first + plugged.min(3) * SECTORS;
        let mut from = self.rng.random_range(first..end);
        let mut to = self.rng.random_range(from + 1..=end);
        let what = self.rng.random_range(0..10);
        if what < 2 {
            (from, to) = (from / SECTORS * SECTORS, to.next_multiple_of(SECTORS));
        }
        let (offset, len) = (from as u64 * 512, (to - from) as u64 * 512);
        match what {
            0 | 1 => {
                let result = self.io().discard(vssd, offset, len);
                // Only whole blocks are discarded.
                let (from, to) = (from.next_multiple_of(SECTORS), to / SECTORS * SECTORS);
                let action = if from < to { Action::Write { name, from, to, tag: 0 } } else { Action::Other };
                (Kind::Discard, action, result.is_ok())
            }
            2 | 3 => {
                let unmap = self.rng.random();
                let result = self.io().write_zeroes(vssd, offset, len, unmap);
                (Kind::WriteZeroes, Action::Write { name, from, to, tag: 0 }, result.is_ok())
            }
            _ => {
                let tag = (u64::from(name.as_bytes()[0]) << 32) | self.next_tag;
                self.next_tag += 1;
                let before = vssd.allocated_blocks();
                let result = self.io().write(vssd, offset, &tag.to_le_bytes().repeat((to - from) * 64));
                if result == Err(IoError::Evicted) {
                    panic!("a plugged block was said to be evicted");
                }
                let kind = if vssd.allocated_blocks() > before { Kind::Allocate } else { Kind::Write };
                (kind, Action::Write { name, from, to, tag }, result.is_ok())
            }
        }
    }

    /// What a guest and an operator may rely on now.
    pub(crate) fn model(&self) -> Model {
        let mut model = Model::default();
        self.steps.iter().for_each(|step| model.apply(&step.action, step.certain));
        model
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.vanish();
    }
}
