// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a resize under way does to the latency of reads of blocks that stay.
//!
//! Here the client is the test harness's own driver, since requests and the guest channel must share a connection. Its resizing
//! half runs at idle priority beside the reading half: as on a second processor of a guest, it takes no time from the reads.
//!
//! Resizes also keep both processors from halting, which makes every wake-up several times faster. So that this cannot hide what
//! resizes cost, there are two things to compare with: a machine that is idle but for the reads, and one whose processors are
//! kept from halting by loops at idle priority.
//!
//! A driver that does nothing but resize moves far more than a guest can part with. So there is a second pace, of what a busy host
//! may see.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use serde_json::json;
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::operator::Operator;
use vssd_tests::mock::queue::{Queue, S_OK, SECTOR, T_IN};
use vssd_tests::mock::ring::Segment;
use vssd_tests::process::idle_priority;

use crate::client::Timing::ToEnd;
use crate::client::{Load, Session, Tally, Waiting, drive};
use crate::meter::Meter;
use crate::peer::server::{VssdBuild, VssdOptions};
use crate::peer::{Media, Medium, Server};
use crate::placement::{Placement, pin_thread};
use crate::report::figures::{self, times};
use crate::report::{CaseReport, Row, Verdict};
use crate::run::{Bench, VSSD, on_cpu};
use crate::sample::{Sample, Series};
use vssd_protocol::units::BlockRange;

/// Bytes of the vSSD. The upper half holds the blocks that come and go, a quarter of all at a time.
const BYTES: u64 = 1 << 30;
const READ: u32 = 4 << 10;
/// Blocks that one message moves.
const BATCH: usize = 256;
/// What the p99 during a resize may be, as a multiple.
const REQUIRED: f64 = 1.2;
const HANG: Duration = Duration::from_secs(20);

pub fn run(bench: &mut Bench, depth: usize) -> Result<CaseReport> {
    let client = bench.cpus.client(Placement::Split);
    let runtime = bench.media.runtime().join("l");
    std::fs::create_dir_all(&runtime)?;
    let file = bench.media.zeroed(Medium::Nvram, "latency", Media::pool_bytes(BYTES))?;
    let options = VssdOptions { build: VssdBuild::Product, workers: 1, queues: 2, poll_us: 0 };
    let cpu = Some(bench.cpus.backend());
    let server = Server::new_vssd(&file, Medium::Nvram, &[VSSD], BYTES, options, cpu, &runtime)?;
    on_cpu(client, || {
        let load = Load::fill(256 << 10, 8, BYTES / 2);
        drive(&mut [Session::connect(&server.disk(VSSD), &load, 0)?], Waiting::Sleeping, ToEnd, &mut ())
    })?;

    let mut machine = Machine::start(&server.disk(VSSD), Options::default())?;
    let mut reads = machine.take_queue(0)?;
    let mut driver = Driver::start(machine.take_queue(1)?)?;
    driver.batch = BATCH;
    let counts = Counts::default();
    let mut series: [Series; BESIDE.len()] = Default::default();
    for round in 0..bench.effort.rounds {
        for (beside, series) in BESIDE.into_iter().zip(&mut series) {
            series.add(|| {
                let end = AtomicBool::new(false);
                std::thread::scope(|scope| {
                    let (driver, control, end, counts) = (&mut driver, server.control(), &end, &counts);
                    let backend = bench.cpus.backend();
                    let on_client = scope.spawn(move || -> Result<()> {
                        pin_thread(client)?;
                        idle_priority()?;
                        match beside {
                            Beside::Nothing => {}
                            Beside::Loops => spin_until(end),
                            Beside::Resizes(pace) => {
                                resize_until(end, driver, control, round as u64, pace, counts)?;
                            }
                        }
                        Ok(())
                    });
                    let on_backend = scope.spawn(move || -> Result<()> {
                        pin_thread(backend)?;
                        idle_priority()?;
                        if beside != Beside::Nothing {
                            spin_until(end);
                        }
                        Ok(())
                    });
                    let mut meter = Meter::new(server.pid());
                    let tally = on_cpu(client, || {
                        let effort = bench.effort;
                        read(&mut reads, depth, effort.warm_up, &mut Meter::new(server.pid()))?;
                        // Shares of a percent need samples.
                        read(&mut reads, depth, effort.measured * 2, &mut meter)
                    });
                    end.store(true, Ordering::Relaxed);
                    for helper in [on_client, on_backend] {
                        let ended = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                        ended.context("beside the reads")?;
                    }
                    Ok(Sample::of(&tally?).with(meter.usage()))
                })
            })?;
        }
    }
    drop((reads, driver, machine));
    server.stop()?;
    std::fs::remove_file(file)?;

    let p99 = |at: usize| series[at].median().p99_us;
    let mut verdicts = Vec::new();
    for (beside, what) in BESIDE.iter().enumerate().filter(|(_, what)| matches!(what, Beside::Resizes(_))) {
        // Paced ones leave processors time to halt, but for the loops: only those compare with like.
        let bases: &[usize] = if *what == PACED { &[1] } else { &[0, 1] };
        for &base in bases {
            let ratio = p99(beside) / p99(base);
            verdicts.push(Verdict::of(
                format!("p99 during {}: against {}", what.name(), BESIDE[base].name()),
                times(ratio),
                format!("≤ {}", times(REQUIRED)),
                ratio <= REQUIRED,
            ));
        }
    }
    let shown = format!("{} of 256 MiB, {} blocks", counts.resizes(), figures::count(counts.blocks()));
    verdicts.push(Verdict::info("resizes that reads were measured under", shown));
    let names = BESIDE.map(Beside::name);
    let rows = names.iter().zip(series).map(|(name, series)| Row::new(*name, series, None)).collect();
    Ok(CaseReport {
        about: format!(
            "NV-RAM, random read of 4 KiB, {depth} in flight, sleeping client, split placement; a second queue gives and takes \
             scattered blocks, {BATCH} in a message"
        ),
        rows,
        verdicts,
        ..CaseReport::default()
    })
}

/// What runs beside the reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    Nothing,
    Loops,
    /// A resize of a quarter of the disk begins this long after the one before, or at once if that took longer.
    Resizes(Duration),
}

/// 16 GiB/s of blocks change hands.
const PACED: Beside = Beside::Resizes(Duration::from_micros(15_625));
const BESIDE: [Beside; 4] = [Beside::Nothing, Beside::Loops, PACED, Beside::Resizes(Duration::ZERO)];

impl Beside {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "no resize",
            Self::Loops => "no resize, no halt",
            Self::Resizes(Duration::ZERO) => "resizes without pause",
            Self::Resizes(_) => "resizes of 16 GiB/s",
        }
    }
}

/// What was resized meanwhile.
#[derive(Debug, Default)]
struct Counts {
    resizes: AtomicU64,
    blocks: AtomicU64,
}

impl Counts {
    fn resizes(&self) -> u64 {
        self.resizes.load(Ordering::Relaxed)
    }

    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    fn blocks(&self) -> f64 {
        self.blocks.load(Ordering::Relaxed) as f64
    }
}

/// Keeps a processor from halting.
fn spin_until(end: &AtomicBool) {
    while !end.load(Ordering::Relaxed) {
        std::hint::spin_loop();
    }
}

/// Shrinks and grows the vSSD until told to end, at its full size.
fn resize_until(
    end: &AtomicBool,
    driver: &mut Driver,
    control: &Path,
    seed: u64,
    pace: Duration,
    counts: &Counts,
) -> Result<()> {
    let mut operator = Operator::connect(control)?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut choose = |driver: &Driver, wanted: u32| -> Vec<BlockRange> {
        let upper = driver.hello.total_blocks / 2;
        let mut blocks: Vec<u32> = driver.present().filter(|block| *block >= upper).collect();
        blocks.shuffle(&mut rng);
        blocks.into_iter().take(wanted as usize).map(|block| BlockRange::new(block, 1)).collect()
    };
    while !end.load(Ordering::Relaxed) {
        for bytes in [BYTES - BYTES / 4, BYTES] {
            let start = Instant::now();
            let before = driver.count();
            let job = operator.resize(VSSD, bytes, &json!({}))?;
            ensure!(driver.attend(&mut choose)?, "the target was not reached");
            operator.finish(job.id)?;
            counts.resizes.fetch_add(1, Ordering::Relaxed);
            counts.blocks.fetch_add(driver.count().abs_diff(before).into(), Ordering::Relaxed);
            while start.elapsed() < pace && !end.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        }
    }
    Ok(())
}

/// Random reads of the lower half.
fn read(queue: &mut Queue, depth: usize, duration: Duration, meter: &mut Meter) -> Result<Tally> {
    let mut rng = StdRng::seed_from_u64(depth as u64);
    let mut latencies = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
    let mut waiting: VecDeque<(u16, u64, Instant)> = VecDeque::with_capacity(depth);
    let mut submit = |queue: &mut Queue, slot: u64, waiting: &mut VecDeque<_>| -> Result<()> {
        let sector = rng.random_range(0..BYTES / 2 / u64::from(READ)) * u64::from(READ) / SECTOR;
        let buffer = Segment::into(queue.bounce() + slot * u64::from(READ), READ);
        let since = Instant::now();
        waiting.push_back((queue.submit(T_IN, sector, &[buffer])?, slot, since));
        Ok(())
    };
    meter.begin()?;
    let start = Instant::now();
    for slot in 0..depth as u64 {
        submit(queue, slot, &mut waiting)?;
    }
    let mut elapsed = Duration::ZERO;
    while !waiting.is_empty() {
        let answer = queue.next(HANG)?;
        let now = Instant::now();
        ensure!(answer.status == S_OK, "a read ended with {answer:?}");
        let at =
            waiting.iter().position(|(head, ..)| *head == answer.head).context("an answer to nothing")?;
        let Some((_, slot, since)) = waiting.remove(at) else { continue };
        if elapsed.is_zero() {
            latencies.saturating_record(u64::try_from(now.duration_since(since).as_nanos())?.max(1));
            if now.duration_since(start) < duration {
                submit(queue, slot, &mut waiting)?;
            } else {
                elapsed = now.duration_since(start);
                meter.end()?;
            }
        }
    }
    let bytes = latencies.len() * u64::from(READ);
    Ok(Tally { latencies, bytes, elapsed })
}
