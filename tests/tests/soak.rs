// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Everything at once, for long: four clients with verified I/O and trims, resizes, a daemon killed again and again beside one
//! that lives through all of it; memory, descriptors, journal and latencies must not drift.
//!
//! One hour: `cargo test --release -p vssd-tests --test soak -- --ignored --nocapture`, or as many minutes as
//! `VSSD_SOAK_MINUTES` says. It prints a line a minute.

use std::env;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use serde_json::json;
use vssd_protocol::control::JobState;
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::follower::Follower;
use vssd_tests::mock::latency::Latency;
use vssd_tests::mock::load::{Load, Profile};
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::media::Slots;
use vssd_tests::mock::operator::KEPT_EVENTS;
use vssd_tests::mock::site::{MIB, Site};
use vssd_tests::mock::{rng, seed};
use vssd_tests::scenario::Medium;

const MINUTES_ENV: &str = "VSSD_SOAK_MINUTES";
const SIZE: u64 = 32 * MIB;
const BLOCK: u64 = 16 << 10;
const MINUTE: Duration = Duration::from_secs(60);
/// Resizes, one after the other, have this much between them.
const BETWEEN_RESIZES: Duration = Duration::from_millis(700);
/// How much more memory of its own a daemon may have at its end than when it had warmed up, beside buffers that it keeps.
const MAX_GROWTH_KIB: u64 = 4096;
/// And how fast that may go on growing, from a run that is long enough to tell.
const MAX_SLOPE_KIB_PER_HOUR: f64 = 1024.0;
const TELLING: Duration = Duration::from_secs(20 * 60);

/// What a client's threads share with the test.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    requests: AtomicU64,
    /// Of this minute.
    latency: Mutex<Latency>,
}

/// One guest: verified I/O and trims on the lower half of its disk, resizes of the upper.
struct Client {
    name: String,
    machine: Machine,
    shared: Arc<Shared>,
    load: JoinHandle<Result<()>>,
    follower: Follower,
    blocks: u64,
}

fn run_load(mut load: Load, shared: &Shared) -> Result<()> {
    while !shared.stop.load(Ordering::Relaxed) {
        load.run(32)?;
        let latency = std::mem::take(&mut load.latency);
        shared.requests.fetch_add(latency.count(), Ordering::Relaxed);
        shared.latency.lock().unwrap_or_else(PoisonError::into_inner).merge(&latency);
        thread::sleep(Duration::from_millis(2));
    }
    load.verify()
}

impl Client {
    fn start(site: &mut Site, name: &str, seed: u64) -> Result<Self> {
        let mut machine = site.machine(name, SIZE, Options::default())?;
        let driver = Driver::start(machine.take_queue(0)?)?;
        let blocks = driver.hello.total_blocks.into();
        let unit = machine.logical_block()?.into();
        let profile =
            Profile { bytes: 0..SIZE / 2, unit, block: BLOCK, depth: 16, zeroing: true, tables: true };
        let load = Load::new(vec![machine.take_queue(1)?], profile, seed)?.overlapping();
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let load = thread::spawn(move || run_load(load, &theirs));
        Ok(Self { name: name.to_owned(), machine, shared, load, follower: Follower::start(driver), blocks })
    }

    /// An error as soon as anything was wrong.
    fn check(&self) -> Result<()> {
        ensure!(!self.load.is_finished() && self.follower.is_well(), "{} has stopped", self.name);
        Ok(())
    }

    fn end(self, site: &mut Site) -> Result<u64> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.load.join().map_err(|_| anyhow!("the load panicked"))?.context(self.name.clone())?;
        let mut driver = self.follower.end().context(self.name.clone())?;
        driver.agree(&mut site.operator, &self.name)?;
        Ok(self.shared.requests.load(Ordering::Relaxed))
    }
}

/// What a daemon was seen to use.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    /// Memory of its own, in KiB: not the guests', not the medium's.
    memory: u64,
    descriptors: usize,
}

/// A daemon and its two clients.
struct Host {
    medium: Medium,
    site: Site,
    clients: Vec<Client>,
    slots: Slots,
    /// Since it was started last.
    life: Vec<Sample>,
    /// Last samples of the lives before.
    ends: Vec<Sample>,
    journal: u64,
}

impl Host {
    fn new(medium: Medium, seed: u64) -> Result<Self> {
        let mut site = Site::with(medium, 96, &["--block-size", "16K"], &[])?;
        let clients = (0..2).map(|i| Client::start(&mut site, &format!("vm{i}"), seed + i));
        let clients = clients.collect::<Result<_>>()?;
        let slots = Slots::of(&site.media)?;
        Ok(Self { medium, site, clients, slots, life: Vec::new(), ends: Vec::new(), journal: 0 })
    }

    /// Fills the list of the newest events: what it takes grows until it is full, and then no more.
    fn fill_events(&mut self) -> Result<()> {
        let name = &self.clients[0].name;
        (0..KEPT_EVENTS).try_for_each(|_| self.site.operator.limits(name, &json!({})).map(drop))
    }

    fn sample(&mut self) -> Result<()> {
        let pid = self.site.daemon.pid()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let anon = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("no RssAnon")?;
        let memory = anon.trim().trim_end_matches(" kB").trim().parse()?;
        let descriptors = self.site.descriptors()?;
        self.life.push(Sample { at: Instant::now(), memory, descriptors });
        self.journal = self.journal.max(self.slots.journal_held()?.unwrap_or(0));
        self.clients.iter().try_for_each(Client::check)
    }

    fn kill(&mut self) -> Result<()> {
        self.ends.extend(self.life.last());
        self.life.clear();
        self.site.kill_and_restart()?;
        self.clients.iter_mut().try_for_each(|client| client.machine.reconnect())
    }

    /// Another size for one of its vSSDs, until both sides have it.
    fn resize(&mut self, rng: &mut StdRng) -> Result<()> {
        let chosen = rng.random_range(0..self.clients.len());
        let client = &self.clients[chosen];
        let blocks = rng.random_range(client.blocks / 2 + 8..=client.blocks);
        let job = self.site.operator.resize(&client.name, blocks * BLOCK, &json!({}))?;
        let job = match self.site.operator.finish(job.id) {
            Ok(job) => job,
            // The driver may know why.
            Err(error) => {
                let driver = self.clients.swap_remove(chosen).follower.end();
                let driver = driver.map(|driver| (driver.sizes, driver.count()));
                return Err(error.context(format!("the driver: {driver:?}")));
            }
        };
        ensure!(job.state == JobState::Done, "{job:?}");
        Ok(())
    }

    /// Requests answered so far, and latencies since the last time.
    fn progress(&self) -> (u64, Latency) {
        let mut all = Latency::default();
        let mut requests = 0;
        for client in &self.clients {
            requests += client.shared.requests.load(Ordering::Relaxed);
            let mut latency = client.shared.latency.lock().unwrap_or_else(PoisonError::into_inner);
            all.merge(&std::mem::take(&mut *latency));
        }
        (requests, all)
    }

    /// Holds what was seen to the bounds.
    fn judge(&self, name: &str) -> Result<()> {
        let all = || self.ends.iter().chain(&self.life);
        let descriptors = all().map(|sample| sample.descriptors);
        let (least, most) = (descriptors.clone().min().unwrap_or(0), descriptors.max().unwrap_or(0));
        // An operator's connection or a lock's file may be open for a moment.
        ensure!(most - least <= 2, "{name}: between {least} and {most} descriptors");
        let most_growth = MAX_GROWTH_KIB + self.medium.kept_buffers_kib();
        let grown = |samples: &[Sample], name: &str| {
            let (Some(first), Some(last)) = (samples.get(samples.len() / 4), samples.last()) else {
                return Ok(());
            };
            let (from, to) = (first.memory, last.memory);
            ensure!(to <= from + most_growth, "{name}: memory went from {from} to {to} KiB");
            println!("{name}: memory went from {from} to {to} KiB, {least} to {most} descriptors");
            Ok(())
        };
        grown(&self.life, &format!("{name}, its last life"))?;
        grown(&self.ends, &format!("{name}, ends of {} lives", self.ends.len()))?;
        let held = self.journal;
        println!(
            "{name}: the journal held {held} of {} pages, {} checkpoints",
            self.slots.journal,
            self.slots.newest()?
        );
        ensure!(held < self.slots.journal, "{name}: the journal was full");
        let settled = &self.life[self.life.len() / 4..];
        if let (Some(first), Some(last)) = (settled.first(), settled.last())
            && last.at - first.at >= TELLING
        {
            let slope = slope(settled);
            println!("{name}: {slope:.0} KiB an hour");
            ensure!(slope <= MAX_SLOPE_KIB_PER_HOUR, "{name}: memory grows by {slope:.0} KiB an hour");
        }
        Ok(())
    }
}

/// KiB an hour, by least squares.
fn slope(samples: &[Sample]) -> f64 {
    let start = samples[0].at;
    let points = || {
        samples.iter().map(|s| {
            ((s.at - start).as_secs_f64() / 3600.0, f64::from(u32::try_from(s.memory).unwrap_or(u32::MAX)))
        })
    };
    let count = points().count() as f64;
    let (mean_x, mean_y) = points().fold((0.0, 0.0), |(x, y), p| (x + p.0 / count, y + p.1 / count));
    let (over, under) = points().fold((0.0, 0.0), |(over, under), (x, y)| {
        (over + (x - mean_x) * (y - mean_y), under + (x - mean_x).powi(2))
    });
    over / under
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn soak(minutes: u32, between_kills: Duration, seed: u64) -> Result<()> {
    let mut rng = rng(seed);
    // The first is killed; the second lives through it all.
    let mut hosts = [Host::new(Medium::Ssd, seed)?, Host::new(Medium::Nvram, seed + 10)?];
    hosts[1].fill_events()?;
    let started = Instant::now();
    let (mut kills, mut resizes, mut before) = (0, 0, 0);
    let (mut next_kill, mut next_resize) = (between_kills, BETWEEN_RESIZES);
    let mut p99s = Vec::new();
    for minute in 1..=minutes {
        while started.elapsed() < MINUTE * minute {
            thread::sleep(Duration::from_millis(250));
            if started.elapsed() >= next_resize {
                let host = &mut hosts[rng.random_range(0..2)];
                host.resize(&mut rng).with_context(|| format!("resize {resizes}"))?;
                resizes += 1;
                next_resize = started.elapsed() + BETWEEN_RESIZES;
            }
            for host in &mut hosts {
                host.sample()?;
            }
            if started.elapsed() >= next_kill {
                hosts[0].kill().with_context(|| format!("kill {kills}"))?;
                kills += 1;
                next_kill += between_kills;
            }
        }
        let [(on_ssd, ssd), (on_nvram, nvram)] = hosts.each_ref().map(Host::progress);
        let requests = on_ssd + on_nvram;
        let used = hosts.each_ref().map(|host| {
            let last = host.life.last().or(host.ends.last());
            last.map_or((0, 0), |sample| (sample.memory, sample.descriptors))
        });
        println!(
            "minute {minute}: {} requests, {kills} kills, {resizes} resizes; p50 {:.1?} p99 {:.1?} on the SSD, p50 {:.1?} p99 \
             {:.1?} on NV-RAM; (KiB, descriptors) {used:?}; journal {} and {} pages",
            requests - before,
            ssd.percentile(50),
            ssd.percentile(99),
            nvram.percentile(50),
            nvram.percentile(99),
            hosts[0].journal,
            hosts[1].journal
        );
        before = requests;
        p99s.push(nvram.percentile(99));
    }
    let mut requests = 0;
    for (mut host, name) in hosts.into_iter().zip(["the daemon that is killed", "the daemon that lives"]) {
        host.judge(name)?;
        for client in host.clients.drain(..) {
            requests += client.end(&mut host.site)?;
        }
        host.site.finish()?;
    }
    println!("{requests} verified requests, {kills} kills, {resizes} resizes in {minutes} minutes");
    if p99s.len() >= 8 {
        let quarter = p99s.len() / 4;
        let (first, last) = (median(&p99s[..quarter]), median(&p99s[p99s.len() - quarter..]));
        println!("p99 of the first quarter {first:.1?}, of the last {last:.1?}");
        ensure!(last <= first * 3 / 2, "p99 went from {first:?} to {last:?}");
    }
    Ok(())
}

#[test]
fn a_minute_of_everything_at_once_leaves_no_trace() -> Result<()> {
    soak(1, Duration::from_secs(10), seed("soak"))
}

#[test]
#[ignore = "takes an hour; the module says how to run it"]
fn an_hour_of_everything_at_once_leaves_no_trace() -> Result<()> {
    let minutes = env::var(MINUTES_ENV).map_or(Ok(60), |text| text.trim().parse())?;
    soak(minutes, Duration::from_secs(30), seed("soak/long"))
}
