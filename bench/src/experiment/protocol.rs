// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How fast blocks change hands: a large vSSD shrinks and grows back over the guest channel, without a guest's own work.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde_json::json;
use vssd_protocol::units::BlockRange;
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::operator::Operator;

use crate::peer::server::{VssdBuild, VssdOptions};
use crate::peer::{Media, Medium, Server};
use crate::placement::Placement;
use crate::report::figures::{seconds, times};
use crate::report::{CaseReport, Verdict};
use crate::run::{Bench, VSSD, on_cpu};
use crate::stats::median;

const GIB: u64 = 1 << 30;
const FULL: u64 = 32 * GIB;
const SMALL: u64 = GIB;
/// GiB of blocks a second.
const REQUIRED: f64 = 100.0;
/// A ratio of two times that are equal but for what any two runs differ in.
const NO_SLOWER: f64 = 1.05;

/// One direction's runs.
#[derive(Default)]
struct Runs {
    /// While the driver's messages were answered.
    driver: Vec<f64>,
    /// From the operator's call until the job was done.
    operator: Vec<f64>,
    messages: u64,
}

impl Runs {
    fn rate(&self) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "figures for people")]
        let gib = ((FULL - SMALL) / GIB) as f64;
        gib / median(&self.driver)
    }
}

pub fn run(bench: &mut Bench) -> Result<CaseReport> {
    let client = bench.cpus.client(Placement::Split);
    let runtime = bench.media.runtime().join("r");
    std::fs::create_dir_all(&runtime)?;
    let file = bench.media.dir(Medium::Nvram).join("protocol");
    // Sparse. The daemon zeroes it in the background, and is gone long before that fills memory.
    File::create(&file)?.set_len(Media::pool_bytes(FULL))?;
    let options = VssdOptions { build: VssdBuild::Product, workers: 1, queues: 2, poll_us: 0 };
    let server =
        Server::new_vssd(&file, Medium::Nvram, &[VSSD], FULL, options, Some(bench.cpus.backend()), &runtime)?;
    let mut machine = Machine::start(&server.disk(VSSD), Options::default())?;
    let mut driver = Driver::start(machine.take_queue(0)?)?;
    let mut operator = Operator::connect(server.control())?;

    let mut report = CaseReport {
        about: format!(
            "a vSSD of {} GiB without data, {} KiB blocks, gives up {} GiB and gets them back; split placement",
            FULL / GIB,
            driver.block_size() >> 10,
            (FULL - SMALL) / GIB
        ),
        ..CaseReport::default()
    };
    for (name, scattered) in [("in one run", false), ("one by one in random order", true)] {
        let ranges = choice(&driver, scattered)?;
        let (mut shrink, mut grow) = (Runs::default(), Runs::default());
        for _ in 0..bench.effort.rounds {
            on_cpu(client, || {
                one_way(&mut driver, &mut operator, SMALL, &ranges, &mut shrink)?;
                one_way(&mut driver, &mut operator, FULL, &ranges, &mut grow)
            })?;
        }
        let required = format!("≥ {REQUIRED:.0} GiB/s");
        for (what, runs) in [("shrink", &shrink), ("grow", &grow)] {
            report.verdicts.push(Verdict::of(
                format!("{what}, blocks {name}"),
                format!(
                    "{:.0} GiB/s in {} messages; {} for the driver, {} for the operator",
                    runs.rate(),
                    runs.messages,
                    seconds(median(&runs.driver)),
                    seconds(median(&runs.operator))
                ),
                &required,
                runs.rate() >= REQUIRED,
            ));
        }
        let ratio = median(&grow.driver) / median(&shrink.driver);
        report.verdicts.push(Verdict::of(
            format!("grow: time against shrink, blocks {name}"),
            times(ratio),
            format!("≤ {}", times(1.0)),
            ratio <= NO_SLOWER,
        ));
    }
    drop((driver, machine));
    server.stop()?;
    std::fs::remove_file(file)?;
    Ok(report)
}

/// The blocks to give up.
fn choice(driver: &Driver, scattered: bool) -> Result<Vec<BlockRange>> {
    let blocks = u32::try_from((FULL - SMALL) / driver.block_size())?;
    let first = driver.hello.total_blocks - blocks;
    if !scattered {
        return Ok(vec![BlockRange::new(first, blocks)]);
    }
    let mut all: Vec<u32> = (0..driver.hello.total_blocks).collect();
    all.shuffle(&mut StdRng::seed_from_u64(1));
    Ok(all.into_iter().take(blocks as usize).map(|block| BlockRange::new(block, 1)).collect())
}

fn one_way(
    driver: &mut Driver,
    operator: &mut Operator,
    bytes: u64,
    ranges: &[BlockRange],
    runs: &mut Runs,
) -> Result<()> {
    let asked = Instant::now();
    let job = operator.resize(VSSD, bytes, &json!({}))?;
    while driver.sizes.requested_blocks == driver.count() {
        driver.expect_news()?;
    }
    let before = driver.messages;
    let start = Instant::now();
    let statuses = if bytes < FULL { driver.unplug(ranges)? } else { driver.plug(ranges)? };
    let took = start.elapsed();
    ensure!(statuses.is_some_and(|all| all.len() == ranges.len()), "the session ended");
    ensure!(u64::from(driver.count()) * driver.block_size() == bytes, "some blocks did not move");
    let job = operator.finish(job.id)?;
    ensure!(job.error.is_none(), "{job:?}");
    runs.driver.push(took.max(Duration::from_nanos(1)).as_secs_f64());
    runs.operator.push(asked.elapsed().as_secs_f64());
    runs.messages = driver.messages - before;
    Ok(())
}
