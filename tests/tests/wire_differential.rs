// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same random requests to a vSSD on NV-RAM, a vSSD on an SSD and QEMU's storage daemon on a plain file: the same data,
//! and no difference in an answer that the specification does not allow.
//!
//! Compared are every read byte for byte with a model of the disk, the whole disk at checkpoints, every status byte, every
//! `used.len`, and the memory around all buffers. [`DIFFERENCES`] lists what may differ, with the clause; whatever else differs
//! fails. Not in the trace: chains of which the storage daemon lets go without an answer, or which make it end the connection
//! (no status byte, a short header, a descriptor of no bytes); `wire_hostile` and `wire_io` have them.
//!
//! Ten million requests: `cargo test --release -p vssd-tests --test wire_differential -- --ignored --nocapture`, or as many as
//! `VSSD_REQUESTS` says.

use std::collections::{BTreeMap, VecDeque};
use std::env;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use vssd_tests::backend::Backend;
use vssd_tests::mock::frontend::protocol;
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::probe::{Outcome, Probe, TOGETHER};
use vssd_tests::mock::queue::{S_IOERR, S_OK, S_UNSUPP};
use vssd_tests::mock::site::{BLOCK, Site};
use vssd_tests::mock::trace::{DISK, Kind, Step, Trace};
use vssd_tests::mock::{rng, seed};
use vssd_tests::scenario::Medium;
use vssd_tests::scratch::Scratch;

/// Overrides how many requests the long form sends.
const REQUESTS_ENV: &str = "VSSD_REQUESTS";

/// How often the whole disk is compared.
const CHECKPOINT: u64 = 10_000;

/// What may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Field {
    /// The status bytes of ours and of the peer.
    Status(u8, u8),
    /// `used.len`.
    Used,
    /// What sectors hold.
    Data,
}

const DISCARDED: &str = "§5.2.6.1: a driver may assume nothing about sectors that it has discarded; ours gives back whole \
     blocks, the peer pages";
const COUNTED: &str = "§2.7.8.2: `len` must not be more than what was written from the first writable byte on, and the status byte \
     is the last; ours counts that, the peer the memory that it might have written";
const DIRECTION: &str = "§5.2.6: IOERR stands for a driver's error too, and a read has nothing for the device to read, a write \
     nothing to write";
const ID_LENGTH: &str = "§5.2.6.1: the data of GET_ID must be 20 bytes; the peer cuts its answer";
const FLAGS: &str = "§5.2.6.2: an unknown flag must be answered UNSUPP; the peer looks at the range first";
const SEGMENTS: &str = "§5.2.6.1: the data must be whole segments, not more than max_discard_seg or max_write_zeroes_seg, which \
     are 1; both refuse, and no clause says with what";
const BARRIERS: &str = "§5.2.3.1: barriers are a feature of the legacy interface, which neither device offers, and §5.2.6: UNSUPP \
     is for what a device does not support";

/// Every difference that is allowed, and why (clauses of virtio 1.3).
const DIFFERENCES: &[(Kind, Field, &str)] = &[
    (Kind::ReadDiscarded, Field::Data, DISCARDED),
    (Kind::ReadPastEnd, Field::Used, COUNTED),
    (Kind::ReadOdd, Field::Used, COUNTED),
    (Kind::ReadWithInput, Field::Used, COUNTED),
    (Kind::ReadWithInput, Field::Status(S_IOERR, S_OK), DIRECTION),
    (Kind::WriteWithOutput, Field::Used, COUNTED),
    (Kind::WriteWithOutput, Field::Status(S_IOERR, S_OK), DIRECTION),
    (Kind::GetIdShort, Field::Used, COUNTED),
    (Kind::GetIdShort, Field::Status(S_IOERR, S_OK), ID_LENGTH),
    (Kind::GetIdLong, Field::Used, COUNTED),
    (Kind::FlagsPastEnd, Field::Status(S_UNSUPP, S_IOERR), FLAGS),
    (Kind::SegmentOdd, Field::Status(S_IOERR, S_UNSUPP), SEGMENTS),
    (Kind::SegmentTwice, Field::Status(S_IOERR, S_UNSUPP), SEGMENTS),
    (Kind::Unknown, Field::Used, COUNTED),
    (Kind::BarrierRead, Field::Used, COUNTED),
    (Kind::BarrierRead, Field::Status(S_UNSUPP, S_OK), BARRIERS),
    (Kind::BarrierWrite, Field::Status(S_UNSUPP, S_OK), BARRIERS),
];

/// How a vSSD answers.
fn answer(kind: Kind) -> u8 {
    match kind {
        _ if kind.is_valid() => S_OK,
        // What a driver must not add to them does no harm.
        Kind::FlushWithSector | Kind::FlushWithData | Kind::GetIdLong => S_OK,
        Kind::DiscardUnmap | Kind::DiscardFlags | Kind::ZeroFlags | Kind::FlagsPastEnd => S_UNSUPP,
        Kind::Unknown | Kind::BarrierRead | Kind::BarrierWrite => S_UNSUPP,
        _ => S_IOERR,
    }
}

#[derive(Debug, Default)]
struct Report {
    kinds: BTreeMap<Kind, u64>,
    differences: BTreeMap<(Kind, Field), u64>,
}

impl Report {
    fn differ(&mut self, kind: Kind, field: Field) {
        *self.differences.entry((kind, field)).or_default() += 1;
    }
}

/// The last steps, for messages.
#[derive(Debug, Default)]
struct History(VecDeque<(Kind, Range<u64>)>);

impl History {
    fn add(&mut self, step: &Step) {
        self.0.push_back((step.kind, step.bytes.clone()));
        if self.0.len() > 1000 {
            self.0.pop_front();
        }
    }

    /// Those that named any of `bytes`.
    fn of(&self, bytes: &Range<u64>) -> String {
        let meet = |other: &Range<u64>| other.start < bytes.end && bytes.start < other.end;
        let mut text = String::new();
        for (kind, bytes) in self.0.iter().filter(|(_, other)| meet(other)) {
            let _ = write!(text, "{kind:?} {:#x}..{:#x}, ", bytes.start, bytes.end);
        }
        text
    }
}

/// The devices under comparison and what keeps them alive.
struct Bench {
    sites: Vec<(Site, Machine)>,
    peer: Backend,
    image: PathBuf,
    _machine: Machine,
    _scratch: Scratch,
    probes: Vec<Probe>,
}

const OURS: usize = 2;
const NAMES: [&str; 3] = ["the vSSD on NV-RAM", "the vSSD on an SSD", "the storage daemon"];

fn storage_daemon(scratch: &Scratch) -> Result<(Backend, Machine, PathBuf)> {
    let (image, socket) = (scratch.join("image"), scratch.join("peer.sock"));
    File::create(&image)?.set_len(DISK)?;
    let peer = Backend::storage_daemon(&socket, &image, 1, &scratch.join("peer.log"))?.started()?;
    let without_protocol = protocol::INFLIGHT_SHMFD | protocol::RESET_DEVICE;
    let options = Options { queues: 1, without_protocol, ..Options::default() };
    let machine = Machine::start(&socket, options).context("the storage daemon")?;
    Ok((peer, machine, image))
}

impl Bench {
    fn new() -> Result<Self> {
        let (mut sites, mut probes) = (Vec::new(), Vec::new());
        for medium in [Medium::Nvram, Medium::Ssd] {
            let mut site = Site::new(medium, 64)?;
            let mut machine = site.machine("vm1", DISK, Options { queues: 1, ..Options::default() })?;
            probes.push(Probe::new(machine.take_queue(0)?.ring));
            sites.push((site, machine));
        }
        let scratch = Scratch::new()?;
        let (peer, mut machine, image) = storage_daemon(&scratch)?;
        probes.push(Probe::new(machine.take_queue(0)?.ring));
        Ok(Self { sites, peer, image, _machine: machine, _scratch: scratch, probes })
    }

    /// Carries steps out on every device; outcomes by device.
    fn run(&mut self, steps: &[Step]) -> Result<Vec<Vec<Outcome>>> {
        for (probe, name) in self.probes.iter_mut().zip(NAMES) {
            probe.send(steps).context(name)?;
        }
        let received =
            self.probes.iter_mut().zip(NAMES).map(|(probe, name)| {
                probe.receive(steps).with_context(|| format!("{name}: {:?}", kinds(steps)))
            });
        received.collect()
    }

    fn finish(mut self) -> Result<()> {
        for (site, machine) in self.sites {
            drop(machine);
            site.finish()?;
        }
        self.peer.expect_running()
    }
}

fn kinds(steps: &[Step]) -> Vec<Kind> {
    steps.iter().map(|step| step.kind).collect()
}

/// Reads the whole disk from every device, and the peer's file.
fn checkpoint(bench: &mut Bench, trace: &mut Trace) -> Result<()> {
    for steps in trace.scan(TOGETHER) {
        let outcomes = bench.run(&steps)?;
        for (outcomes, name) in outcomes.iter().zip(NAMES) {
            for (step, outcome) in steps.iter().zip(outcomes) {
                judge_data(step, outcome, trace.expected(&step.bytes)).context(name)?;
            }
        }
    }
    ensure!(fs::read(&bench.image)? == trace.disk(), "the storage daemon's file is another than its disk");
    Ok(())
}

fn judge_data(step: &Step, outcome: &Outcome, expected: &[u8]) -> Result<()> {
    let at = step.bytes.start;
    let wrong = |found: &(usize, (&u8, &u8))| found.1.0 != found.1.1;
    if let Some((byte, (found, expected))) = outcome.data.iter().zip(expected).enumerate().find(wrong) {
        let byte = at + byte as u64;
        bail!("{:?} from {at:#x}: byte {byte:#x} is {found:#x}, not {expected:#x}", step.kind);
    }
    ensure!(outcome.data.len() == expected.len(), "{:?} at {at:#x}: short", step.kind);
    Ok(())
}

/// Judges what the devices made of a step.
fn judge(step: &Step, outcomes: [&Outcome; 3], trace: &Trace, report: &mut Report) -> Result<()> {
    let kind = step.kind;
    let [nvram, ssd, peer] = outcomes;
    *report.kinds.entry(kind).or_default() += 1;
    let ours = answer(kind);
    for (outcome, name) in [nvram, ssd].into_iter().zip(NAMES) {
        ensure!(outcome.status == ours, "{name}: {kind:?} was answered {}, not {ours}", outcome.status);
    }
    if peer.status != ours {
        report.differ(kind, Field::Status(ours, peer.status));
    }
    for (outcome, name) in [nvram, ssd].into_iter().zip(NAMES) {
        ensure!(outcome.tail_is_untouched(), "{name}: {kind:?} wrote more than it says: {}", outcome.used);
        ensure!(ours == S_OK || outcome.is_untouched(), "{name}: {kind:?} failed and left bytes behind");
    }
    ensure!(nvram.used == ssd.used, "{kind:?}: used.len {} on NV-RAM, {} on an SSD", nvram.used, ssd.used);
    if nvram.used != peer.used {
        report.differ(kind, Field::Used);
    }
    let expected = trace.expected(&step.bytes);
    match kind {
        Kind::Read => {
            for (outcome, name) in outcomes.into_iter().zip(NAMES) {
                judge_data(step, outcome, expected).context(name)?;
            }
        }
        Kind::ReadDiscarded => {
            for (outcome, name) in [nvram, ssd].into_iter().zip(NAMES) {
                judge_data(step, outcome, expected).context(name)?;
            }
            let legal = peer.data.iter().zip(expected).all(|(found, old)| *found == 0 || found == old);
            ensure!(legal, "the storage daemon: a discarded sector holds neither zeroes nor what it held");
            if peer.data != nvram.data {
                report.differ(kind, Field::Data);
            }
        }
        _ => {}
    }
    Ok(())
}

fn compare(steps: u64, seed: u64) -> Result<()> {
    let started = Instant::now();
    let mut bench = Bench::new()?;
    let mut trace = Trace::new(rng(seed), BLOCK);
    let mut report = Report::default();
    let mut history = History::default();
    let (mut done, mut checkpoints) = (0, 0);
    while done < steps || !trace.is_settled() {
        let batch = trace.batch(TOGETHER);
        let outcomes = bench.run(&batch).with_context(|| format!("step {done}"))?;
        let (ours, peer) = outcomes.split_at(OURS);
        for (index, step) in batch.iter().enumerate() {
            let outcomes = [&ours[0][index], &ours[1][index], &peer[0][index]];
            let judged = judge(step, outcomes, &trace, &mut report);
            judged.with_context(|| format!("step {done}; before it: {}", history.of(&step.bytes)))?;
            trace.done(step);
            history.add(step);
            done += 1;
        }
        if done >= (checkpoints + 1) * CHECKPOINT && trace.is_settled() {
            checkpoint(&mut bench, &mut trace).with_context(|| format!("after step {done}"))?;
            checkpoints += 1;
        }
    }
    checkpoint(&mut bench, &mut trace)?;
    println!(
        "{done} requests to each of 3 devices in {:.1} s, {checkpoints} checkpoints",
        started.elapsed().as_secs_f64()
    );
    for (kind, count) in &report.kinds {
        println!("  {count:9} {kind:?}");
    }
    println!("differences:");
    for ((kind, field), count) in &report.differences {
        let row = DIFFERENCES.iter().find(|(k, f, _)| k == kind && f == field);
        let (.., clause) = row.with_context(|| format!("{kind:?}, {field:?}: no clause allows that"))?;
        println!("  {count:9} {kind:?}, {field:?}: {clause}");
    }
    // A table that allows what never happens would hide the day on which it does.
    for (kind, field, _) in DIFFERENCES {
        ensure!(report.differences.contains_key(&(*kind, *field)), "{kind:?}, {field:?} never differed");
    }
    bench.finish()
}

#[test]
fn a_hundred_thousand_requests_give_what_the_storage_daemon_gives() -> Result<()> {
    compare(100_000, seed("wire_differential"))
}

#[test]
#[ignore = "takes half an hour; the module says how to run it"]
fn ten_million_requests_give_what_the_storage_daemon_gives() -> Result<()> {
    let requests = env::var(REQUESTS_ENV).map_or(Ok(10_000_000), |text| text.trim().parse())?;
    compare(requests, seed("wire_differential/long"))
}
