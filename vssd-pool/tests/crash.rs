// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Power cuts and failing media.
//!
//! A random workload runs on simulated media beside a naive model of what a guest may rely on. Then the power is
//! cut at many moments of its timeline, each time with another selection of what had not been flushed; the pool is
//! opened on what is left and compared with the model as of that moment. Failures name a seed; `CRASH_SEED=n`
//! runs that one alone.

// A panic is how a test reports; sizes are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vssd_pool::store::fault::Sim;
use vssd_pool::{BlockIndex, BlockRange, Class, IoError, MediumKind, Pool, RangeStatus, VssdAttrs};

const B: u64 = 4096;
const SECTORS: usize = 8;
const MAX_BLOCKS: u32 = 24;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// A sector's content: zero, or 64 times the same number, which no other write uses.
type Tag = u64;

/// What a sector may hold after a crash: what was certainly written last, and what came after.
#[derive(Clone, Debug)]
struct Sector {
    /// (tag, whether the write succeeded); the first is what a flush made certain.
    values: Vec<(Tag, bool)>,
}

impl Sector {
    fn zero() -> Self {
        Self { values: vec![(0, true)] }
    }

    fn flush(&mut self) {
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
    blocks: Vec<Block>,
}

/// One thing the guest or the operator did.
#[derive(Clone, Debug)]
enum Action {
    Create {
        name: &'static str,
        initial: u32,
    },
    Delete {
        name: &'static str,
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
    /// Nothing a guest could see: checkpoints, scrubbing, attributes.
    Other,
}

#[derive(Clone, Debug, Default)]
struct Model {
    disks: BTreeMap<&'static str, Disk>,
}

impl Model {
    /// `certain`: the action was acknowledged. Otherwise it may have happened or not.
    fn apply(&mut self, action: &Action, certain: bool) {
        match *action {
            Action::Create { name, initial } => {
                let blocks = (0..MAX_BLOCKS).map(|block| Block::new(block < initial)).collect();
                self.disks.insert(name, Disk { may_be: (!certain, true), blocks });
            }
            Action::Delete { name } => {
                if certain {
                    self.disks.remove(name);
                } else if let Some(disk) = self.disks.get_mut(name) {
                    disk.may_be.0 = true;
                }
            }
            Action::Write { name, from, to, tag } => {
                for sector in from..to {
                    let block = &mut self.disk(name).blocks[sector / SECTORS];
                    block.sectors[sector % SECTORS].values.push((tag, certain));
                }
            }
            Action::Flush { name } if certain => {
                let sectors = self.disk(name).blocks.iter_mut().flat_map(|block| &mut block.sectors);
                sectors.for_each(Sector::flush);
            }
            Action::Plug { name, range } => self.resize(name, range, true, certain),
            Action::Unplug { name, range } => self.resize(name, range, false, certain),
            Action::Flush { .. } | Action::Other => {}
        }
    }

    fn disk(&mut self, name: &str) -> &mut Disk {
        self.disks.get_mut(name).expect("the workload uses disks that exist")
    }

    fn resize(&mut self, name: &str, range: BlockRange, plugged: bool, certain: bool) {
        for block in &mut self.disk(name).blocks[range.start as usize..(range.start + range.count) as usize] {
            if block.may_be == (!plugged, plugged) {
                continue;
            }
            if certain {
                *block = Block::new(plugged);
            } else {
                block.may_be = (true, true);
            }
        }
    }
}

/// An action and when it began and ended on the media's timeline.
struct Step {
    action: Action,
    begin: usize,
    end: usize,
    certain: bool,
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

struct Run {
    sim: Arc<Sim>,
    pool: Arc<Pool>,
    io: Io,
    rng: StdRng,
    next_tag: Tag,
    steps: Vec<Step>,
    /// For choosing actions: what exists and is plugged for certain.
    model: Model,
}

impl Run {
    fn new(seed: u64) -> Self {
        let sim = Sim::new(&media(seed));
        Pool::create_on(&create_options(), &sim.stores()).expect("create");
        sim.record();
        let pool = Pool::open_on(&open_options(false), sim.stores()).expect("open");
        let io = Io::new(&pool);
        Self {
            sim,
            pool,
            io,
            rng: StdRng::seed_from_u64(seed),
            next_tag: 1,
            steps: Vec::new(),
            model: Model::default(),
        }
    }

    fn actions(&mut self, count: usize) {
        for _ in 0..count {
            let begin = self.sim.now();
            let had_failed = self.pool.info().failed;
            let (mut action, certain) = self.act();
            let end = self.sim.now();
            if had_failed {
                // A pool that failed acknowledges nothing, and what it refuses leaves no trace.
                let is_refused = !certain
                    || !matches!(action, Action::Create { .. } | Action::Flush { .. } | Action::Write { .. });
                assert!(is_refused, "{action:?} was acknowledged after a failure");
                action = Action::Other;
            }
            self.model.apply(&action, certain);
            self.steps.push(Step { action, begin, end, certain });
        }
    }

    fn act(&mut self) -> (Action, bool) {
        let name = NAMES[self.rng.random_range(0..NAMES.len())];
        let Some(vssd) = self.pool.vssd_by_name(name) else {
            let initial = self.rng.random_range(0..8);
            let mut spec = spec(name, MAX_BLOCKS, initial);
            if self.pool.info().media.len() == 2 && name != "a" {
                // Otherwise the SSD would hardly be used.
                spec.attrs.class = if name == "b" { Class::Nvram } else { Class::Ssd };
            }
            let certain = self.pool.create_vssd(&spec).is_ok();
            // Refused for want of room is certain, too: then nothing may appear.
            let failed = self.pool.info().failed;
            return (
                if certain || failed { Action::Create { name, initial } } else { Action::Other },
                certain,
            );
        };
        let start = self.rng.random_range(0..MAX_BLOCKS);
        let range = BlockRange::new(start, self.rng.random_range(1..=(MAX_BLOCKS - start).min(6)));
        match self.rng.random_range(0..100) {
            0..45 => self.write(name, &vssd),
            45..60 => (Action::Flush { name }, self.io.flush(&vssd).is_ok()),
            60..70 => {
                let result = self.pool.plug_wait(vssd.id(), vec![range], MAX_BLOCKS);
                let refused = matches!(result.as_deref(), Ok([RangeStatus::NoSpace | RangeStatus::Limit]));
                (if refused { Action::Other } else { Action::Plug { name, range } }, result.is_ok())
            }
            70..80 => (Action::Unplug { name, range }, self.pool.unplug_wait(vssd.id(), vec![range]).is_ok()),
            80..83 => (Action::Delete { name }, self.pool.delete_vssd(vssd.id()).is_ok()),
            83..86 => {
                drop(self.pool.checkpoint());
                (Action::Other, true)
            }
            86..88 => {
                let attrs =
                    VssdAttrs { requested_blocks: self.rng.random_range(0..MAX_BLOCKS), ..vssd.attrs() };
                drop(self.pool.set_attrs(vssd.id(), &attrs));
                (Action::Other, true)
            }
            _ => {
                self.pool.run_background();
                (Action::Other, true)
            }
        }
    }

    /// Writes, discards or zeroes some sectors of a plugged stretch.
    fn write(&mut self, name: &'static str, vssd: &Arc<vssd_pool::Vssd>) -> (Action, bool) {
        let block = self.rng.random_range(0..MAX_BLOCKS);
        let plugged = (block..MAX_BLOCKS).take_while(|&block| vssd.is_plugged(BlockIndex(block))).count();
        if plugged == 0 {
            let result = self.io.fill(vssd, u64::from(block) * B, 512, 1);
            assert!(result == Err(IoError::Evicted) || self.pool.info().failed, "{result:?}");
            return (Action::Other, true);
        }
        let first = block as usize * SECTORS;
        let end = first + plugged.min(3) * SECTORS;
        let from = self.rng.random_range(first..end);
        let to = self.rng.random_range(from + 1..=end);
        let (offset, len) = (from as u64 * 512, (to - from) as u64 * 512);
        match self.rng.random_range(0..10) {
            0..2 => {
                // Only whole blocks are discarded.
                let (from, to) = (from.next_multiple_of(SECTORS), to / SECTORS * SECTORS);
                let result = self.io.discard(vssd, offset, len);
                (
                    if from < to { Action::Write { name, from, to, tag: 0 } } else { Action::Other },
                    result.is_ok(),
                )
            }
            2 | 3 => {
                let unmap = self.rng.random();
                let result = self.io.write_zeroes(vssd, offset, len, unmap);
                (Action::Write { name, from, to, tag: 0 }, result.is_ok())
            }
            _ => {
                let tag = self.next_tag;
                self.next_tag += 1;
                let result = self.io.write(vssd, offset, &tag.to_le_bytes().repeat((to - from) * 64));
                if result == Err(IoError::NoSpace) || result == Err(IoError::Evicted) {
                    panic!("a plugged block of a pool at 100 % can always be written: {result:?}");
                }
                (Action::Write { name, from, to, tag }, result.is_ok())
            }
        }
    }

    /// Leaves everything as the power cut would: nothing is closed.
    fn abandon(self) -> (Arc<Sim>, Vec<Step>) {
        std::mem::forget((self.pool, self.io));
        (self.sim, self.steps)
    }
}

/// The numbers in a block; NV-RAM tears sectors where they were not flushed, so each word stands for itself.
fn read_tags(io: &mut Io, vssd: &Arc<vssd_pool::Vssd>, block: u32) -> Result<Vec<Tag>, String> {
    let bytes =
        io.read_vec(vssd, u64::from(block) * B, B).map_err(|error| format!("block {block}: {error}"))?;
    Ok(bytes.chunks(8).map(|word| Tag::from_le_bytes(word.try_into().expect("eight bytes"))).collect())
}

/// Whether the media are what the model allows; `Err` says what is wrong.
fn verify(images: Vec<(MediumKind, Vec<u8>)>, model: &Model, thoroughly: bool) -> Result<(), String> {
    let sim = Sim::with_images(images);
    let report = Pool::check_on(sim.stores(), true).map_err(|error| format!("check: {error}"))?;
    if !report.is_clean() {
        return Err(format!("check: {:?}", report.findings));
    }
    let open = || Pool::open_on(&open_options(false), sim.stores()).map_err(|error| format!("open: {error}"));
    let pool = open()?;
    let seen = compare(&pool, model)?;
    if thoroughly {
        pool.run_background();
        pool.close().map_err(|error| format!("close: {error}"))?;
        drop(pool);
        let pool = open()?;
        if compare(&pool, model)? != seen {
            return Err("a second recovery changed something".to_owned());
        }
        probe_free_space(&pool)?;
    }
    Ok(())
}

/// Every block of every vSSD as far as it can be read.
type Seen = BTreeMap<(&'static str, u32), Vec<Tag>>;

fn compare(pool: &Arc<Pool>, model: &Model) -> Result<Seen, String> {
    let mut io = Io::new(pool);
    let mut seen = Seen::new();
    for name in NAMES {
        let vssd = pool.vssd_by_name(name);
        let disk = match (model.disks.get(name), &vssd) {
            (None, None) => continue,
            (None, Some(_)) => return Err(format!("{name} is there, but was never created or was deleted")),
            (Some(disk), None) if disk.may_be.0 => continue,
            (Some(_), None) => return Err(format!("{name} is gone")),
            (Some(disk), Some(_)) => disk,
        };
        let Some(vssd) = vssd else { continue };
        for (i, block) in (0u32..).zip(&disk.blocks) {
            let plugged = vssd.is_plugged(BlockIndex(i));
            if !(if plugged { block.may_be.1 } else { block.may_be.0 }) {
                return Err(format!("block {i} of {name} is {}plugged", if plugged { "" } else { "not " }));
            }
            if !plugged {
                continue;
            }
            let tags = read_tags(&mut io, &vssd, i).map_err(|what| format!("{name}: {what}"))?;
            for (word, tag) in tags.iter().enumerate() {
                let sector = word / 64;
                if !block.sectors[sector].allows(*tag) {
                    let allowed = &block.sectors[sector].values;
                    return Err(format!(
                        "sector {sector} of block {i} of {name} is {tag}, allowed are {allowed:?}"
                    ));
                }
            }
            seen.insert((name, i), tags);
        }
    }
    Ok(seen)
}

/// Lends every block that can be lent to a new vSSD; none may show anything but zeroes.
fn probe_free_space(pool: &Arc<Pool>) -> Result<(), String> {
    let info = pool.info();
    let free = u32::try_from(info.promisable_blocks - info.promised_blocks).expect("small");
    if free == 0 {
        return Ok(());
    }
    let vssd = pool.create_vssd(&spec("probe", free, free)).map_err(|error| format!("probe: {error}"))?;
    let mut io = Io::new(pool);
    for block in 0..free {
        io.fill(&vssd, u64::from(block) * B, 512, 0xff)
            .map_err(|error| format!("probe block {block}: {error}"))?;
        let tags = read_tags(&mut io, &vssd, block)?;
        if tags[64..].iter().any(|&tag| tag != 0) {
            return Err(format!("a block that is lent anew shows {tags:?}"));
        }
    }
    Ok(())
}

/// Cuts the power `cuts` times along the run's timeline; how many states were looked at, or what is wrong.
fn cut_power(sim: &Arc<Sim>, steps: &[Step], seed: u64, cuts: usize) -> Result<usize, String> {
    let mut rng = StdRng::seed_from_u64(seed ^ 0xc0ffee);
    let total = sim.now();
    let mut moments: Vec<usize> = (0..cuts).map(|_| rng.random_range(0..=total)).collect();
    moments.sort_unstable();
    let mut replay = sim.replay();
    let mut model = Model::default();
    let mut done = 0;
    for (i, &moment) in moments.iter().enumerate() {
        replay.advance(moment);
        while done < steps.len() && steps[done].end <= moment {
            model.apply(&steps[done].action, steps[done].certain);
            done += 1;
        }
        let mut now = model.clone();
        if done < steps.len() && steps[done].begin < moment {
            now.apply(&steps[done].action, false);
        }
        // Nothing, everything, or each atom by a coin with a bias of its own.
        let bias = [0.0, 1.0, 0.5, 0.1, 0.9][i % 5];
        let images = replay.crash(|| rng.random_bool(bias));
        verify(images, &now, i % 6 == 0).map_err(|what| {
            let action = steps.get(done).map(|step| &step.action);
            format!("seed {seed}, cut {i} after {moment} of {total} events (bias {bias}, during {action:?}): {what}")
        })?;
    }
    Ok(moments.len())
}

fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("CRASH_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..count).collect(),
    }
}

fn state_count(default: usize) -> usize {
    std::env::var("CRASH_CUTS").ok().and_then(|cuts| cuts.parse().ok()).unwrap_or(default)
}

#[test]
fn power_cut_anywhere_loses_nothing_flushed_and_shows_nothing_foreign() {
    let mut states = 0;
    for seed in seeds(12) {
        let mut run = Run::new(seed);
        run.actions(700);
        let (sim, steps) = run.abandon();
        states += cut_power(&sim, &steps, seed, state_count(350)).unwrap_or_else(|what| panic!("{what}"));
    }
    println!("{states} crash states");
}

#[test]
fn drive_that_lies_about_flushes_is_noticed() {
    let noticed = (0..6).any(|seed| {
        let mut run = Run::new(seed);
        run.sim.ignore_syncs();
        run.actions(80);
        let (sim, steps) = run.abandon();
        cut_power(&sim, &steps, seed, 60).is_err()
    });
    assert!(noticed, "the comparison with the model would let anything pass");
}

#[test]
fn any_failing_operation_is_answered_and_what_was_acknowledged_stays() {
    for seed in seeds(3) {
        let operations = 600;
        for n in (0..operations).step_by(11) {
            let mut run = Run::new(seed);
            run.sim.fail_at(n, libc::EIO);
            run.actions(60);
            let failed = run.pool.info().failed;
            let (sim, steps) = run.abandon();
            let mut model = Model::default();
            for step in &steps {
                model.apply(&step.action, step.certain);
            }
            let mut rng = StdRng::seed_from_u64(n);
            let mut replay = sim.replay();
            replay.advance(sim.now());
            for bias in [0.0, 0.5, 1.0] {
                let images = replay.crash(|| rng.random_bool(bias));
                verify(images, &model, true).unwrap_or_else(|what| {
                    panic!("seed {seed}, failure at {n} (fatal: {failed}), bias {bias}: {what}")
                });
            }
        }
    }
}
