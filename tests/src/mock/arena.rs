// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where attackers are let loose: a daemon, a tenant who must not notice, and the judgement on what became of both.
//!
//! ```text
//!   quiet window ► rounds of the attack, each judged ► a good request on the same device ► quiet window ► verdicts
//!                        the neighbour's verified I/O runs all the time
//! ```
//!
//! Verdicts: PASS, carried out as it should be; REJECT, refused or cut off; WEDGED, neither answered nor refused in time;
//! FAIL, anything else. The last two fail the test at once.
//!
//! Latency is the 99th percentile of the neighbour's single requests in windows of a tenth of a second, and of those
//! windows the median: one hiccup of the machine spoils one window. Attacker, neighbour and daemon share the machine's
//! processors, so a request may wait for another thread's time slice whatever the daemon does; up to `SLICES` that is not
//! held against it. Memory is what the daemon has for itself (`RssAnon`); pages of the pool and of guests are not its own,
//! and the list of events, which is bounded, may fill.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::PATIENCE;
use super::frontend::{Frontend, request};
use super::load::{Load, Profile};
use super::machine::{Machine, Options};
use super::neighbour::Neighbour;
use super::queue::S_OK;
use super::site::{BLOCK, Site};
use crate::scenario::Medium;
use crate::wait::Deadline;

/// Overrides how many rounds each class runs; the long form is 10000.
const ROUNDS_ENV: &str = "VSSD_HOSTILE_ROUNDS";
/// How much the daemon's own memory may have grown. On an SSD each request of odd alignment in flight has a buffer, and
/// how far that went depends on the disk.
const GROWTH_KIB: u64 = 1024;
const GROWTH_SSD_KIB: u64 = 4096;
/// A few time slices of a busy machine. On an SSD the attacker may fill the queue of the disk like anybody else, and single
/// requests of others have been seen to wait for most of a second: there only the printed figure tells more.
const SLICES: Duration = Duration::from_millis(12);
const SLICES_SSD: Duration = Duration::from_secs(1);
/// The daemon keeps the newest events, so many and each about so large; a connection makes two.
const EVENTS: u64 = 4096;
const EVENT_BYTES: u64 = 512;
const QUIET: Duration = Duration::from_millis(500);
pub const ATTACKER: &str = "attacker";

/// One arena at a time in a test program: they measure.
static ONE: Mutex<()> = Mutex::new(());

/// How many rounds a class runs: `usual`, or what the environment says.
pub fn rounds(usual: u64) -> u64 {
    env::var(ROUNDS_ENV).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(usual)
}

/// What became of one round that did no harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Pass,
    Reject,
}

/// See the module's text.
#[derive(Debug)]
pub struct Arena {
    pub site: Site,
    class: &'static str,
    /// Growth of memory, and latency that is not held against the daemon.
    tolerance: (u64, Duration),
    neighbour: Neighbour,
    begin: Instant,
    quiet: Vec<(Instant, Instant)>,
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
        let mut site = Site::new(medium, 100)?;
        let neighbour = Neighbour::start(&mut site)?;
        site.operator.create(ATTACKER, size, &json!({}))?;
        let mut arena = Self {
            site,
            class,
            tolerance: match medium {
                Medium::Nvram => (GROWTH_KIB, SLICES),
                Medium::Ssd => (GROWTH_SSD_KIB, SLICES_SSD),
            },
            neighbour,
            begin: Instant::now(),
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
        arena.rest();
        arena.descriptors = arena.site.descriptors()?;
        arena.memory_kib = arena.own_memory_kib()?;
        arena.connections = arena.site.operator.show(ATTACKER)?.frontend.connections;
        arena.begin = Instant::now();
        Ok(arena)
    }

    fn rest(&mut self) {
        let begin = Instant::now();
        thread::sleep(QUIET);
        self.quiet.push((begin, Instant::now()));
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
        let end = Instant::now();
        self.good_session("the attack")?;
        self.expect_nothing_leaked()?;
        self.rest();
        let during = self.neighbour.p99(self.begin, end);
        let mut quiet: Vec<_> =
            self.quiet.iter().filter_map(|(from, to)| self.neighbour.p99(*from, *to)).collect();
        quiet.sort_unstable();
        let quiet = *quiet.last().context("the neighbour did nothing while it was quiet")?;
        self.print();
        let sum: u64 = self.verdicts.values().flatten().sum();
        println!("{}: {sum} rounds in {:.1} s", self.class, (end - self.begin).as_secs_f64());
        // An attack shorter than a window has no percentile; that the neighbour went on is checked below.
        if let Some(during) = during {
            println!("{}: the neighbour's p99 was {during:?}, {quiet:?} when quiet", self.class);
            ensure!(
                during <= (2 * quiet).max(self.tolerance.1),
                "the neighbour's p99 was {during:?}, not {quiet:?}"
            );
        }
        self.neighbour.end()?;
        self.site.finish()
    }

    fn expect_nothing_leaked(&mut self) -> Result<()> {
        let descriptors = self.descriptors;
        Deadline::after(PATIENCE)
            .until("descriptors to be given back", || Ok(self.site.descriptors()? <= descriptors))?;
        let connections = self.site.operator.show(ATTACKER)?.frontend.connections - self.connections;
        let events = (2 * connections).min(EVENTS) * EVENT_BYTES / 1024;
        let limit = self.memory_kib + events + self.tolerance.0;
        let mut now = 0;
        let settled = Deadline::secs(2).until("memory to be given back", || {
            now = self.own_memory_kib()?;
            Ok(now <= limit)
        });
        println!("{}: the daemon's own memory is {now} KiB, was {} KiB", self.class, self.memory_kib);
        settled
    }
}
