// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The dirty log: a copy of guest memory that takes over only what the driver writes and the pages that the daemon marked is
//! the memory, whatever the I/O and whenever the marks are taken.
//!
//! `VSSD_DIRTY_REQUESTS=1000000 cargo test -p vssd-tests --test wire_dirty -- --nocapture` is the long form.

use std::env;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::frontend::{Frontend, request, words};
use vssd_tests::mock::load::{Load, Profile};
use vssd_tests::mock::machine::{F_EVENT_IDX, F_LOG_ALL, Machine, Options, describe, state};
use vssd_tests::mock::queue::T_IN;
use vssd_tests::mock::ram::GuestRam;
use vssd_tests::mock::ring::Segment;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::mock::{rng, seed};
use vssd_tests::scenario::Medium;

const SIZE: u64 = 64 * MIB;
const PAGE: u64 = 4096;
/// Requests of the short form, for each medium.
const REQUESTS: usize = 10_000;
const REQUESTS_ENV: &str = "VSSD_DIRTY_REQUESTS";

/// A log as a machine monitor keeps it: one bit a page, taken out in words of 64.
struct Log {
    fd: OwnedFd,
    words: *mut u64,
    bytes: u64,
}

impl Log {
    /// For the guest addresses below `end`.
    fn new(end: u64) -> Result<Self> {
        let bytes = end.div_ceil(8 * PAGE).next_multiple_of(PAGE);
        let fd = memfd_create("log", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, bytes)?;
        let len = usize::try_from(bytes)?;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let at = unsafe {
            mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0)
        };
        Ok(Self { fd, words: at?.cast(), bytes })
    }

    /// Takes the marks out; gives the guest addresses of the pages.
    fn harvest(&self) -> Vec<u64> {
        let count = usize::try_from(self.bytes / 8).unwrap_or(0);
        let word = |at: usize| {
            // SAFETY: `at` is below the number of mapped words; all who share them use atomics.
            unsafe { AtomicU64::from_ptr(self.words.add(at)) }
        };
        let mut pages = Vec::new();
        for at in (0..count).filter(|at| word(*at).load(Ordering::Relaxed) != 0) {
            let bits = word(at).swap(0, Ordering::AcqRel);
            pages.extend((0..64).filter(|bit| bits >> bit & 1 != 0).map(|bit| (64 * at as u64 + bit) * PAGE));
        }
        pages
    }

    /// Tells the daemon about it.
    fn install(&self, machine: &Machine) -> Result<()> {
        let answer =
            machine.link()?.get(request::SET_LOG_BASE, &words(&[self.bytes, 0]), &[self.fd.as_fd()])?;
        ensure!(answer.payload.len() == 16, "answer to SET_LOG_BASE: {answer:?}");
        Ok(())
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        // SAFETY: the mapping is this log's own and nobody keeps a pointer into it.
        let _ = unsafe { munmap(self.words.cast(), usize::try_from(self.bytes).unwrap_or(0)) };
    }
}

/// Turns logging on or off, as QEMU does: features first, then each ring's address with its flag.
fn set_logging(machine: &Machine, on: bool) -> Result<()> {
    let link = machine.link()?;
    let features = machine.features() | if on { F_LOG_ALL } else { 0 };
    link.set(request::SET_FEATURES, &words(&[features]), &[])?;
    for index in 0..machine.options.queues {
        let (shape, ram) = (machine.shape(index), &machine.ram);
        let mut payload = state(index.into(), u32::from(on));
        payload.extend(words(&[
            ram.user(shape.desc),
            ram.user(shape.used),
            ram.user(shape.avail),
            shape.used,
        ]));
        link.set(request::SET_VRING_ADDR, &payload, &[])?;
    }
    Ok(())
}

/// One past the last byte of memory.
fn end_of(ram: &GuestRam) -> u64 {
    ram.regions().last().map_or(0, |region| region.guest + region.len)
}

/// Brings the copy up to date as far as the log says; gives the number of pages.
fn copy_marked(ram: &GuestRam, log: &Log) -> usize {
    let pages = log.harvest();
    for page in &pages {
        ram.copy_range(*page, PAGE);
    }
    pages.len()
}

fn expect_same(ram: &GuestRam) -> Result<()> {
    match ram.differs_from_copy() {
        None => Ok(()),
        Some((at, count)) => {
            anyhow::bail!("{count} bytes changed outside marked pages, the first at {at:#x}")
        }
    }
}

fn requests() -> usize {
    env::var(REQUESTS_ENV).ok().and_then(|text| text.parse().ok()).unwrap_or(REQUESTS)
}

fn copy_follows(medium: Medium, options: Options, requests: usize, seed: u64) -> Result<()> {
    let mut site = Site::new(medium, 100)?;
    let mut machine = site.machine("vm1", SIZE, options)?;
    let queues = (0..options.queues).map(|index| machine.take_queue(index)).collect::<Result<_>>()?;
    let unit = machine.logical_block()?.into();
    let profile = Profile { bytes: 0..SIZE, unit, block: BLOCK, depth: 32, zeroing: true, tables: true };
    let mut load = Load::new(queues, profile, seed)?;
    let ram = Arc::clone(&machine.ram);
    let mut rng = rng(!seed);
    load.touch_all()?;
    ram.keep_copy();
    let mut log = Log::new(end_of(&ram))?;
    let (mut done, mut checks, mut pages, mut toggles, mut busy) = (0, 0, 0, 0, 0);
    while done < requests {
        // On, with requests in flight; only then all of memory is copied, and after that what is marked.
        load.fill()?;
        busy += load.in_flight();
        log.install(&machine)?;
        set_logging(&machine, true)?;
        for region in ram.regions() {
            ram.copy_range(region.guest, region.len);
        }
        for _ in 0..rng.random_range(1..4) {
            let part = rng.random_range(requests / 64..requests / 8);
            for _ in 0..4 {
                load.run(part / 4 + 1)?;
                pages += copy_marked(&ram, &log);
            }
            done += part;
            if rng.random_ratio(1, 3) {
                // Another log takes over, as when memory is added; the old one is read for the last time.
                let next = Log::new(end_of(&ram) + (1 << 30))?;
                load.fill()?;
                next.install(&machine)?;
                pages += copy_marked(&ram, &log);
                log = next;
            }
            load.drain()?;
            // A queue that stops has said all, also about its ring.
            for index in 0..options.queues {
                machine.stop_queue(index)?;
            }
            pages += copy_marked(&ram, &log);
            expect_same(&ram).with_context(|| format!("after {done} requests"))?;
            checks += 1;
            for index in 0..options.queues {
                machine.start_queue(index)?;
            }
            // `start_queue` gives the rings without the flag, so it is given again.
            set_logging(&machine, true)?;
            pages += copy_marked(&ram, &log);
            for index in 0..options.queues {
                ram.copy_range(machine.shape(index).used, 4096);
            }
        }
        load.fill()?;
        set_logging(&machine, false)?;
        toggles += 1;
        log.harvest();
        load.run(100)?;
        load.drain()?;
        ensure!(log.harvest().is_empty(), "pages are marked although logging is off");
        ensure!(ram.differs_from_copy().is_some(), "nothing changed: the copy would follow without a log");
    }
    load.verify()?;
    println!(
        "{:?}: {} requests, {checks} comparisons, {pages} pages marked, {toggles} times off and on with {busy} requests in flight",
        medium,
        load.counts.reads + load.counts.writes + load.counts.flushes + load.counts.zeroings
    );
    ensure!(busy > 0, "logging never began with a request in flight");
    site.finish()
}

#[test]
fn a_copy_that_takes_over_marked_pages_only_is_guest_memory_on_nvram() -> Result<()> {
    copy_follows(Medium::Nvram, Options::default(), requests(), seed("wire_dirty/nvram"))
}

#[test]
fn a_copy_that_takes_over_marked_pages_only_is_guest_memory_on_an_ssd() -> Result<()> {
    copy_follows(Medium::Ssd, Options::default(), requests(), seed("wire_dirty/ssd"))
}

#[test]
fn a_ring_that_wraps_without_event_index_is_marked_too() -> Result<()> {
    let options =
        Options { queues: 1, queue_size: 1024, without: F_EVENT_IDX, before_wrap: 700, ..Options::default() };
    copy_follows(Medium::Nvram, options, 3000, seed("wire_dirty/wrap"))
}

/// The guest channel's answers, also those that were parked when logging began.
#[test]
fn answers_of_the_guest_channel_are_marked() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    let (machine, mut driver): (Machine, Driver) = site.driver("vm1", SIZE)?;
    let ram = Arc::clone(&machine.ram);
    ram.keep_copy();
    let log = Log::new(end_of(&ram))?;
    driver.park(driver.sizes.seq)?;
    log.install(&machine)?;
    set_logging(&machine, true)?;
    for region in ram.regions() {
        ram.copy_range(region.guest, region.len);
    }
    driver.refresh()?;
    let mut pages = copy_marked(&ram, &log);
    ensure!(pages > 0);
    expect_same(&ram)?;
    site.operator.resize("vm1", SIZE / 2, &serde_json::json!({}))?;
    driver.wait_answer(vssd_tests::mock::PATIENCE)?.context("no news")?;
    let marked = copy_marked(&ram, &log);
    ensure!(marked > 0, "the answer to WAIT is not marked");
    pages += marked;
    // The index is marked after it was published: a mark may be on its way still.
    driver.refresh()?;
    pages += copy_marked(&ram, &log);
    expect_same(&ram)?;
    println!("{pages} pages marked");
    site.finish()
}

/// Class 11: sizes and offsets of the log that lie.
#[test]
fn logs_that_lie_are_refused_and_the_next_front_end_is_served() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    let mut machine = site.machine("vm1", SIZE, Options::default())?;
    let end = end_of(&machine.ram);
    let good = Log::new(end)?;
    let cases: [(&str, u64, u64); 7] = [
        ("no bytes", 0, 0),
        ("smaller than memory", end / PAGE / 8 / 2, 0),
        ("one page longer than its file", good.bytes + PAGE, 0),
        ("beyond its file", good.bytes, PAGE),
        ("offset at the end of everything", good.bytes, !(PAGE - 1)),
        ("size and offset that wrap to a small sum", u64::MAX - PAGE + 1, 2 * PAGE),
        ("everything there is", u64::MAX, 0),
    ];
    for (case, size, offset) in cases {
        let link: &Frontend = machine.link()?;
        let refused = link.get(request::SET_LOG_BASE, &words(&[size, offset]), &[good.fd.as_fd()]);
        ensure!(refused.is_err(), "{case}: accepted");
        machine.reconnect()?;
        let queue = machine.queue(0)?;
        ensure!(queue.write(0, &[7; 4096])? == 0 && queue.read(0, 4096)? == Ok(vec![7; 4096]), "{case}");
    }
    println!("{} lies refused", cases.len());

    // Memory that is added while the log is in use must be covered by it.
    let more = GuestRam::new(&[(64 << 30, MIB)])?;
    let ram = Arc::clone(&machine.ram);
    let regions: Vec<_> = ram.regions().iter().chain(more.regions()).collect();
    let mut table = words(&[regions.len() as u64]);
    table.extend(regions.iter().flat_map(|region| describe(region)));
    let files: Vec<_> = regions.iter().map(|region| region.file()).collect();
    good.install(&machine)?;
    set_logging(&machine, true)?;
    let refused = machine.link()?.set(request::SET_MEM_TABLE, &table, &files);
    ensure!(refused.is_err(), "memory beyond the log was accepted");
    machine.reconnect()?;
    let large = Log::new(65 << 30)?;
    large.install(&machine)?;
    set_logging(&machine, true)?;
    machine.link()?.set(request::SET_MEM_TABLE, &table, &files)?;
    large.harvest();
    // What is read to memory that was added later is marked too.
    let there = more.regions()[0].guest + 8 * PAGE;
    let queue = machine.queue(0)?;
    let answer = queue.call(T_IN, 0, &[Segment::into(there, 4096)])?;
    ensure!(answer.status == 0 && more.read(there, 4096) == vec![7; 4096]);
    ensure!(large.harvest().contains(&there), "the new memory is not logged");
    site.finish()
}
