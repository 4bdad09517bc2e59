// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Goes through every moment of a run and every way in which the power can go there.
//!
//! A *moment* lies after each write and barrier. At each of them:
//!
//! * *killed*: the process ends, the media keep all they were given; then everything that was answered must be there;
//! * *torn*: unflushed writes arrive in pieces, coarse and fine, by a coin whose bias varies.
//!
//! And before each barrier, for what could be lost a moment earlier can still be lost there:
//!
//! * *dropped*: nothing unflushed arrives;
//! * *reordered*: any subset of the unflushed writes arrives: all subsets of up to twelve, above that a sample.
//!
//! Each state is opened twice, and some openings are cut short in turn (*recovery*).

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vssd_pool::store::fault::{Replay, Sim, Tear};
use vssd_pool::{MediumKind, Pool};

use crate::common::*;
use crate::model::{BLOCK, Model, Seen, compare, read_block};
use crate::workload::{Kind, Step};

/// Up to this many unflushed writes every subset is tried.
const EXHAUSTIVE: usize = 12;
/// Above, so many.
const SAMPLES: usize = 96;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    Killed,
    Dropped,
    Torn,
    Reordered,
    Recovery,
}

/// What was looked at.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) states: usize,
    pub(crate) seeds: usize,
    pub(crate) moments: usize,
    pub(crate) classes: BTreeMap<Class, usize>,
    pub(crate) kinds: BTreeMap<Kind, usize>,
    /// Barriers before which every subset was tried, and those where only a sample.
    pub(crate) exhaustive: usize,
    pub(crate) sampled: usize,
}

impl Tally {
    fn count(&mut self, class: Class, kind: Option<Kind>) {
        self.states += 1;
        *self.classes.entry(class).or_default() += 1;
        if let Some(kind) = kind {
            *self.kinds.entry(kind).or_default() += 1;
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.states += other.states;
        self.seeds += other.seeds;
        self.moments += other.moments;
        self.exhaustive += other.exhaustive;
        self.sampled += other.sampled;
        for (class, count) in &other.classes {
            *self.classes.entry(*class).or_default() += count;
        }
        for (kind, count) in &other.kinds {
            *self.kinds.entry(*kind).or_default() += count;
        }
    }
}

/// A run being cut at one moment after the other.
struct Cutter<'a> {
    replay: Replay,
    /// Where crash states are made.
    scratch: Arc<Sim>,
    rng: StdRng,
    steps: &'a [Step],
    /// How many steps are over.
    done: usize,
    /// After those.
    model: Model,
    tally: Tally,
}

/// Cuts the power everywhere along a run's timeline; what is wrong names the seed and the state.
pub(crate) fn explore(sim: &Arc<Sim>, steps: &[Step], seed: u64) -> Result<Tally, String> {
    let replay = sim.replay();
    let scratch = Sim::with_images(replay.crash(Tear::Whole, || false));
    let rng = StdRng::seed_from_u64(seed ^ 0x00c0_ffee);
    let tally = Tally { seeds: 1, ..Tally::default() };
    let mut cutter = Cutter { replay, scratch, rng, steps, done: 0, model: Model::default(), tally };
    for moment in 1..=sim.now() {
        cutter.at(moment).map_err(|what| {
            let action = steps.get(cutter.done).map(|step| (step.kind, &step.action));
            format!("CRASH_SEED={seed}: after {moment} of {} events, during {action:?}: {what}", sim.now())
        })?;
    }
    Ok(cutter.tally)
}

impl Cutter<'_> {
    fn at(&mut self, moment: usize) -> Result<(), String> {
        self.replay.advance(moment);
        self.tally.moments += 1;
        while self.done < self.steps.len() && self.steps[self.done].end <= moment {
            self.model.apply(&self.steps[self.done].action, self.steps[self.done].certain);
            self.done += 1;
        }
        let mut lossy = self.model.clone();
        let mut strict = self.model.clone();
        strict.settle();
        if let Some(step) = self.steps.get(self.done).filter(|step| step.begin < moment) {
            lossy.apply(&step.action, false);
            strict.apply(&step.action, false);
        }
        // The action whose event was the last.
        let kind = self.steps[self.done.saturating_sub(1)..]
            .iter()
            .find(|step| step.begin < moment && moment <= step.end)
            .map(|step| step.kind);
        self.state(Class::Killed, kind, &strict, Tear::Whole, |_| true)?;
        for tear in [Tear::Coarse, Tear::Fine] {
            let bias = [0.5, 0.1, 0.9][self.tally.moments % 3];
            self.state(Class::Torn, kind, &lossy, tear, |rng| rng.random_bool(bias))?;
        }
        if self.replay.is_before_barrier() {
            self.subsets(kind, &lossy)?;
        }
        Ok(())
    }

    fn subsets(&mut self, kind: Option<Kind>, model: &Model) -> Result<(), String> {
        let pending = self.replay.pending();
        self.state(Class::Dropped, kind, model, Tear::Whole, |_| false)?;
        if pending > EXHAUSTIVE {
            self.tally.sampled += 1;
            for i in 0..SAMPLES {
                let bias = [0.5, 0.1, 0.9][i % 3];
                self.state(Class::Reordered, kind, model, Tear::Whole, |rng| rng.random_bool(bias))?;
            }
            return Ok(());
        }
        self.tally.exhaustive += 1;
        // Neither none, which is above, nor all, which is what a kill leaves.
        for subset in 1..(1u32 << pending) - 1 {
            let mut left = subset;
            self.state(Class::Reordered, kind, model, Tear::Whole, move |_| {
                let arrives = left & 1 != 0;
                left >>= 1;
                arrives
            })?;
        }
        Ok(())
    }

    fn state(
        &mut self,
        class: Class,
        kind: Option<Kind>,
        model: &Model,
        tear: Tear,
        mut arrives: impl FnMut(&mut StdRng) -> bool,
    ) -> Result<(), String> {
        let rng = &mut self.rng;
        self.replay.crash_into(&self.scratch, tear, || arrives(rng));
        self.tally.count(class, kind);
        let cuts_recovery = self.tally.states.is_multiple_of(16);
        if cuts_recovery {
            self.scratch.record();
        }
        let thoroughly = self.tally.states % 8 == 1;
        let opened = verify(&self.scratch, model, thoroughly)
            .map_err(|what| format!("state {} ({class:?}, {tear:?}): {what}", self.tally.states))?;
        if !cuts_recovery {
            return Ok(());
        }
        let mut again = self.scratch.replay();
        let mut moments = [0; 4].map(|_| self.rng.random_range(1..=opened.max(1)));
        moments.sort_unstable();
        for moment in moments {
            again.advance(moment);
            let (tear, bias) =
                [(Tear::Whole, 1.0), (Tear::Whole, 0.5), (Tear::Fine, 0.5), (Tear::Coarse, 0.2)]
                    [self.rng.random_range(0..4)];
            let images = again.crash(tear, || self.rng.random_bool(bias));
            self.tally.count(Class::Recovery, Some(Kind::Recovery));
            verify(&Sim::with_images(images), model, false).map_err(|what| {
                format!(
                    "state {} ({class:?}, {tear:?}), then cut after {moment} of {opened} events of its recovery: {what}",
                    self.tally.states
                )
            })?;
        }
        Ok(())
    }
}

/// Whether media are what the model allows; how many events their recovery took.
pub(crate) fn verify(sim: &Arc<Sim>, model: &Model, thoroughly: bool) -> Result<usize, String> {
    let report = Pool::check_on(sim.stores(), true).map_err(|error| format!("check: {error}"))?;
    if !report.is_clean() {
        return Err(format!("check: {:?}", report.findings));
    }
    let before = sim.now();
    let (seen, ()) = opened(sim, model, |_| Ok(()))?;
    let events = sim.now() - before;
    let (again, ()) = opened(sim, model, |pool| if thoroughly { audit(pool) } else { Ok(()) })?;
    if again != seen {
        return Err(format!(
            "a second recovery changed something: {:?} became {:?}",
            seen.disks, again.disks
        ));
    }
    Ok(events)
}

/// Opens the pool, looks at it, and lets it vanish.
fn opened<T>(
    sim: &Arc<Sim>,
    model: &Model,
    look: impl FnOnce(&Arc<Pool>) -> Result<T, String>,
) -> Result<(Seen, T), String> {
    let pool = Pool::open_on(&open_options(false), sim.stores()).map_err(|error| format!("open: {error}"))?;
    let mut io = Io::new(&pool);
    let looked = compare(&pool, &mut io, model).and_then(|seen| {
        sums(&pool)?;
        Ok((seen, look(&pool)?))
    });
    sim.set_power(false);
    drop((io, pool));
    sim.set_power(true);
    looked
}

/// Whether every physical block is in one place.
fn sums(pool: &Arc<Pool>) -> Result<(), String> {
    let info = pool.info();
    let sum = info.free_blocks + info.scrubbing_blocks + info.leased_blocks + info.reserved_blocks;
    let allocated: u32 = pool.vssds().iter().map(|vssd| vssd.allocated_blocks()).sum();
    let promised: u64 = pool
        .vssds()
        .iter()
        .map(|vssd| u64::from(vssd.plugged_blocks().max(vssd.attrs().requested_blocks)))
        .sum();
    if sum != info.total_blocks || info.leased_blocks != allocated || info.promised_blocks != promised {
        return Err(format!("{info:?} does not add up, {allocated} allocated, {promised} promised"));
    }
    Ok(())
}

/// Whether all free space can be lent, and shows nothing but zeroes.
fn audit(pool: &Arc<Pool>) -> Result<(), String> {
    pool.run_background();
    let info = pool.info();
    if info.scrubbing_blocks > 0 {
        return Err(format!("{} blocks are never scrubbed", info.scrubbing_blocks));
    }
    for kind in [MediumKind::Nvram, MediumKind::Ssd] {
        let Some(medium) = info.media.iter().find(|medium| medium.kind == kind) else { continue };
        let leased = medium.leased_blocks;
        if leased > medium.blocks {
            return Err(format!("{leased} of {} blocks of {kind} are lent", medium.blocks));
        }
    }
    let free = u32::try_from(info.promisable_blocks - info.promised_blocks).expect("small");
    if free == 0 {
        return sums(pool);
    }
    let vssd = pool.create_vssd(&spec("probe", free, free)).map_err(|error| format!("probe: {error}"))?;
    let mut io = Io::new(pool);
    let mut bytes = Vec::new();
    for block in 0..free {
        io.fill(&vssd, u64::from(block) * BLOCK, 512, 0xff)
            .map_err(|error| format!("probe block {block}: {error}"))?;
        bytes.clear();
        read_block(&mut io, &vssd, block, &mut bytes)?;
        if let Some(at) = bytes[512..].iter().position(|&byte| byte != 0) {
            return Err(format!("a block that is lent anew shows {:#x} at {at}", bytes[512 + at]));
        }
    }
    sums(pool)
}
