// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where attackers are let loose: a daemon, a tenant who must not notice, and the judgement on what became of both.
//!
//! ```text
//!   attack ► honest tenant ► attack ► quiet ► attack ► honest tenant ► …   ► a fresh session ► verdicts
//!                        the neighbour's verified I/O runs all the time
//! ```
//!
//! Verdicts: PASS, carried out as it should be; REJECT, refused or cut off; WEDGED, neither answered nor refused in time;
//! FAIL, anything else. The last two fail the test at once.
//!
//! Latency is the 99th percentile of the neighbour's single requests in windows of a tenth of a second, and of those
//! windows the median: one hiccup of the machine spoils one window. While the attack pauses, the same is measured with nobody
//! else at work, and with an honest tenant as busy as it can be. Attacker, neighbour and daemon share the machine's processors
//! and disk, as honest tenants do; so an attack may cost the neighbour twice what it has when it is alone, or, where that
//! is more, twice what it has beside the honest tenant. What is judged is the daemon: the attacker's own threads run in the idle
//! class (`sched(7)`), as a virtual machine's processors would be bounded by its host. Memory is what the daemon has for itself (`RssAnon`); pages of the
//! pool and of guests are not its own, and the list of events, which is bounded, may fill.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::PATIENCE;
use super::frontend::{Frontend, request};
use super::honest::{Honest, Order};
use super::load::{Load, Profile};
use super::machine::{Machine, Options};
use super::neighbour::{Neighbour, Span, WINDOW};
use super::operator::KEPT_EVENTS;
use super::queue::S_OK;
use super::site::{BLOCK, Site};
use crate::process::idle_priority;
use crate::scenario::Medium;
use crate::wait::Deadline;

/// Overrides how many rounds each class runs; the long form is 10000.
const ROUNDS_ENV: &str = "VSSD_HOSTILE_ROUNDS";
/// How much the daemon's own memory may have grown, beside buffers that it keeps.
const GROWTH_KIB: u64 = 2048;
/// About what an event takes of the daemon's memory; a connection makes two.
const EVENT_BYTES: u64 = 512;
/// What an attack does in one go before it pauses.
const SPELL: Duration = WINDOW;
/// Pauses of each kind: as many make a median. Where that is too high more are made, for a disk may have a bad second; at most so
/// many, so that long forms attack most of the time.
const FEWEST: usize = 5;
const MOST: usize = 15;
/// The neighbour's p99 may be twice what it has alone, or twice what it has beside the honest tenant: what so few windows differ by on
/// two processors, and far below what a queue without bounds costs (17 to 170 times).
const MOST_QUIET: f64 = 2.0;
const MOST_SHARED: f64 = 2.0;
pub const ATTACKER: &str = "attacker";

/// One arena at a time in a test program: they measure.
static ONE: Mutex<()> = Mutex::new(());

/// How many rounds a class runs: `usual`, or what the environment says.
pub fn rounds(usual: u64) -> u64 {
    env::var(ROUNDS_ENV).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(usual)
}

/// The rounds of an attack: as many as asked for, and as many as it takes to judge what it costs others.
#[derive(Debug)]
pub struct Rounds {
    next: usize,
    count: usize,
    enough: Arc<AtomicBool>,
}

impl Iterator for Rounds {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        if self.next >= self.count && self.enough.load(Ordering::Relaxed) {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }
}

/// What became of one round that did no harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    Reject,
}

/// Whether an attack may cost so much: against quiet, against an honest tenant.
fn is_low([quiet, shared]: [f64; 2]) -> bool {
    quiet <= MOST_QUIET || shared <= MOST_SHARED
}

/// The calling thread, and all that it starts, have a processor only while nobody else wants it.
fn yield_to_others() -> Result<()> {
    // SAFETY: a call without pointers.
    let policy = unsafe { libc::sched_getscheduler(0) };
    ensure!(
        policy != libc::SCHED_IDLE,
        "a thread attacks once: the neighbour and the daemon are its children"
    );
    idle_priority()
}

/// See the module's text.
#[derive(Debug)]
pub struct Arena {
    pub site: Site,
    class: &'static str,
    /// How much memory may grow.
    growth_kib: u64,
    neighbour: Neighbour,
    honest: Honest,
    begin: Instant,
    /// When the spell of the attack that is under way began, and the spells before it.
    spell: Instant,
    attacked: Vec<Span>,
    /// With the honest tenant at work, and without: each pause behind its spell.
    shared: Vec<[Span; 2]>,
    quiet: Vec<[Span; 2]>,
    /// There were enough pauses to judge by.
    enough: Arc<AtomicBool>,
    descriptors: usize,
    memory_kib: u64,
    /// To the attacker's device, so far.
    connections: u64,
    /// Of each case: PASS, REJECT.
    verdicts: BTreeMap<String, [u64; 2]>,
    _one: MutexGuard<'static, ()>,
}

impl Arena {
    /// A pool with the neighbour at work and a vSSD of `size` bytes for the attacker.
    pub fn new(class: &'static str, medium: Medium, size: u64) -> Result<Self> {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let mut site = Site::new(medium, 140)?;
        let neighbour = Neighbour::start(&mut site)?;
        let honest = Honest::start(&mut site)?;
        site.operator.create(ATTACKER, size, &json!({}))?;
        let mut arena = Self {
            site,
            class,
            growth_kib: GROWTH_KIB + medium.kept_buffers_kib(),
            neighbour,
            honest,
            begin: Instant::now(),
            spell: Instant::now(),
            attacked: Vec::new(),
            enough: Arc::default(),
            shared: Vec::new(),
            quiet: Vec::new(),
            descriptors: 0,
            memory_kib: 0,
            connections: 0,
            verdicts: BTreeMap::new(),
            _one: one,
        };
        // Warm: every way that an honest guest goes has been gone.
        arena.busy_session(size)?;
        for _ in 0..8 {
            arena.good_session("before the attack")?;
        }
        arena.pause(arena.begin)?;
        arena.shared.clear();
        arena.descriptors = arena.site.descriptors()?;
        arena.memory_kib = arena.own_memory_kib()?;
        arena.connections = arena.site.operator.show(ATTACKER)?.frontend.connections;
        yield_to_others()?;
        arena.begin = Instant::now();
        arena.spell = arena.begin;
        Ok(arena)
    }

    /// The rounds of a class that usually runs so many.
    pub fn rounds(&self, usual: u64) -> Rounds {
        Rounds {
            next: 0,
            count: usize::try_from(rounds(usual)).unwrap_or(usize::MAX),
            enough: Arc::clone(&self.enough),
        }
    }

    /// Lets the daemon keep this much more memory than usual.
    pub fn allow_growth(&mut self, kib: u64) {
        self.growth_kib += kib;
    }

    /// The attack, which has gone on since `spell`, pauses: a window with the honest tenant at work, or one without.
    fn pause(&mut self, spell: Instant) -> Result<()> {
        let spell = (spell, Instant::now());
        let (pauses, order) = if self.shared.len() <= self.quiet.len() {
            (&mut self.shared, Order::Work)
        } else {
            (&mut self.quiet, Order::Rest)
        };
        pauses.push([spell, self.honest.obey(order)?]);
        let is_good = self.costs().is_some_and(is_low);
        self.enough.store(is_good || self.quiet.len() >= MOST, Ordering::Relaxed);
        Ok(())
    }

    /// Ends a spell of the attack.
    fn end_spell(&mut self) {
        self.attacked.push((self.spell, Instant::now()));
    }

    fn own_memory_kib(&mut self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.site.daemon.pid()?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// A machine with the attacker's device.
    pub fn machine(&self, options: Options) -> Result<Machine> {
        self.patiently(|| Machine::start(&self.site.socket(ATTACKER), options))
    }

    /// A connection to the attacker's device, already served.
    pub fn connect(&self) -> Result<Frontend> {
        self.patiently(|| {
            let link = Frontend::connect(&self.site.socket(ATTACKER))?;
            link.get(request::GET_FEATURES, &[], &[])?;
            Ok(link)
        })
    }

    /// While earlier connections still end, the daemon may turn another away.
    fn patiently<T>(&self, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        let deadline = Deadline::after(PATIENCE);
        loop {
            match attempt() {
                Err(error) if !deadline.passed() => {
                    let text = format!("{error:#}");
                    if !["reset by peer", "Broken pipe", "closed the connection"]
                        .iter()
                        .any(|s| text.contains(s))
                    {
                        return Err(error);
                    }
                    thread::sleep(Duration::from_millis(2));
                }
                result => return result,
            }
        }
    }

    /// An honest front-end that uses the device as hard as it can.
    fn busy_session(&self, size: u64) -> Result<()> {
        let mut machine = self.machine(Options::default())?;
        let unit = machine.logical_block()?.into();
        let profile = Profile { bytes: 0..size, unit, block: BLOCK, depth: 32, zeroing: true, tables: true };
        let queues = vec![machine.take_queue(0)?, machine.take_queue(1)?];
        let mut load = Load::new(queues, profile, super::seed("before the attack"))?;
        load.run(1000)?;
        load.drain()
    }

    /// An honest front-end on the attacker's device: connects, writes, reads back, leaves.
    pub fn good_session(&self, after: &str) -> Result<()> {
        let what = || format!("a fresh session after: {after}");
        let mut machine =
            Machine::start(&self.site.socket(ATTACKER), Options::default()).with_context(what)?;
        let queue = machine.queue(0)?;
        let bytes: Vec<u8> = after.bytes().cycle().take(8192).collect();
        ensure!(queue.write(8192, &bytes).with_context(what)? == S_OK, "{}: write", what());
        ensure!(queue.read(8192, 8192).with_context(what)? == Ok(bytes), "{}: read", what());
        Ok(())
    }

    /// Counts a round. One that went wrong is a failure of the test: WEDGED if nothing came in time, else FAIL.
    pub fn judge(&mut self, case: &str, result: Result<Verdict>) -> Result<()> {
        match result {
            Ok(verdict) => {
                self.verdicts.entry(case.to_owned()).or_default()[verdict as usize] += 1;
                if self.quiet.len() < MOST && self.spell.elapsed() >= SPELL {
                    self.end_spell();
                    self.pause(self.spell)?;
                    self.spell = Instant::now();
                }
                Ok(())
            }
            Err(error) => {
                let text = format!("{error:#}");
                let wedged = ["nothing was used", "was lost", "Resource temporarily unavailable", "waited"];
                let verdict = if wedged.iter().any(|sign| text.contains(sign)) { "WEDGED" } else { "FAIL" };
                println!("{:>8}  {}: {case}", verdict, self.class);
                self.print();
                Err(error.context(format!("{verdict}: {}: {case}", self.class)))
            }
        }
    }

    fn print(&self) {
        println!("{:>8} {:>8}  {}", "PASS", "REJECT", self.class);
        for (case, [pass, reject]) in &self.verdicts {
            println!("{pass:>8} {reject:>8}    {case}");
        }
    }

    /// The attack is over and the attacker has left: the daemon serves the device, the neighbour noticed nothing, nothing
    /// leaked, the pool is sound.
    pub fn end(mut self) -> Result<()> {
        self.end_spell();
        let lasted = self.begin.elapsed();
        self.good_session("the attack")?;
        self.expect_nothing_leaked()?;
        self.print();
        let sum: u64 = self.verdicts.values().flatten().sum();
        println!("{}: {sum} rounds in {:.1} s", self.class, lasted.as_secs_f64());
        self.expect_low_latency()?;
        self.neighbour.end()?;
        self.honest.end()?;
        self.site.finish()
    }

    fn expect_low_latency(&self) -> Result<()> {
        let costs = self.costs().context("the attack was too short to judge what it cost")?;
        let during = self.neighbour.p99(&self.attacked).unwrap_or_default();
        let [quiet, shared] = costs;
        let found = format!(
            "the neighbour's p99 was {during:?}, {quiet:.2} x that of quiet, {shared:.2} x that beside an honest tenant"
        );
        println!("{}: {found}", self.class);
        ensure!(is_low(costs), found);
        Ok(())
    }

    /// By how much the neighbour's p99 was higher while the attack went on than in the quiet, and than beside the honest tenant.
    /// Each spell of the attack is compared with the pause right behind it, so that what else the machine does concerns both;
    /// the medians. `None` if there are too few.
    fn costs(&self) -> Option<[f64; 2]> {
        let median = |pauses: &[[Span; 2]]| {
            let mut costs = Vec::new();
            for spans in pauses {
                let [during, without] = spans.map(|span| self.neighbour.p99(&[span]));
                costs.push(during?.as_secs_f64() / without?.as_secs_f64());
            }
            costs.sort_unstable_by(f64::total_cmp);
            (costs.len() >= FEWEST).then(|| costs[costs.len() / 2])
        };
        Some([median(&self.quiet)?, median(&self.shared)?])
    }

    fn expect_nothing_leaked(&mut self) -> Result<()> {
        let descriptors = self.descriptors;
        Deadline::after(PATIENCE)
            .until("descriptors to be given back", || Ok(self.site.descriptors()? <= descriptors))?;
        let connections = self.site.operator.show(ATTACKER)?.frontend.connections - self.connections;
        let events = (2 * connections).min(KEPT_EVENTS) * EVENT_BYTES / 1024;
        let limit = self.memory_kib + events + self.growth_kib;
        let mut now = 0;
        let settled = Deadline::secs(2).until("memory to be given back", || {
            now = self.own_memory_kib()?;
            Ok(now <= limit)
        });
        println!("{}: the daemon's own memory is {now} KiB, was {} KiB", self.class, self.memory_kib);
        settled
    }
}
