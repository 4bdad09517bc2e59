// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the first write to a block costs: random writes over a vSSD that nothing was written to, against the same writes again.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use vssd_tests::mock::operator::Operator;

use crate::client::Timing::ToEnd;
use crate::client::{Addresses, Kind, Load, Session, Waiting, drive};
use crate::meter::Meter;
use crate::peer::server::{VssdBuild, VssdOptions};
use crate::peer::{Media, Medium, Server};
use crate::placement::Placement;
use crate::report::figures::share;
use crate::report::{CaseReport, Row, Verdict};
use crate::run::{Bench, VSSD, on_cpu};
use crate::sample::{Sample, Series};
use crate::stats::median;

const BLOCK: u64 = 64 << 10;
const WRITE: u64 = 4 << 10;
/// What must be reached, as a share of steady state.
const REQUIRED: f64 = 0.6;

/// One write to each block, in random order.
fn writes(span: u64, seed: u64) -> Arc<[u64]> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut offsets: Vec<u64> = (0..span)
        .step_by(usize::try_from(BLOCK).unwrap_or(usize::MAX))
        .map(|block| block + rng.random_range(0..BLOCK / WRITE) * WRITE)
        .collect();
    offsets.shuffle(&mut rng);
    offsets.into()
}

/// Waits until the pool has nothing left to zero.
fn settle(server: &Server) -> Result<()> {
    let mut operator = Operator::connect(server.control())?;
    let start = Instant::now();
    while operator.pool()?.scrubbing_bytes > 0 {
        ensure!(start.elapsed() < Duration::from_secs(60), "the pool does not come to rest");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

pub fn run(bench: &mut Bench, medium: Medium) -> Result<CaseReport> {
    let span: u64 = match medium {
        Medium::Nvram => 2 << 30,
        Medium::Ssd => 1 << 30,
    };
    let runtime = bench.media.runtime().join("t");
    std::fs::create_dir_all(&runtime)?;
    let client = bench.cpus.client(Placement::Split);
    let names = ["first writes", "the same again"];
    let mut series = [Series::default(), Series::default()];
    let mut ratios = Vec::new();
    for round in 0..bench.effort.rounds {
        let file = bench.media.zeroed(medium, "fresh", Media::pool_bytes(span))?;
        let options = VssdOptions { build: VssdBuild::Product, workers: 1, queues: 1, poll_us: 0 };
        let cpu = Some(bench.cpus.backend());
        let server = Server::new_vssd(&file, medium, &[VSSD], span, options, cpu, &runtime)?;
        settle(&server)?;
        let load = Load {
            kind: Kind::Write,
            addresses: Addresses::List(writes(span, round as u64)),
            ..Load::random(Kind::Write, usize::try_from(WRITE)?, 32, span)
        };
        let mut rates = [0.0; 2];
        for (rate, series) in rates.iter_mut().zip(&mut series) {
            let mut meter = Meter::new(server.pid());
            let tallies = on_cpu(client, || {
                let mut sessions = [Session::connect(&server.disk(VSSD), &load, 0)?];
                drive(&mut sessions, Waiting::Sleeping, ToEnd, &mut meter)
            })?;
            let usage = meter.usage();
            for tally in &tallies {
                let sample = Sample::of(tally).with(usage);
                *rate = sample.iops;
                series.samples.push(sample);
            }
        }
        ratios.push(rates[0] / rates[1]);
        server.stop()?;
        std::fs::remove_file(file)?;
    }
    let ratio = median(&ratios);
    let rows = names.iter().zip(series).map(|(name, series)| Row::new(*name, series, None)).collect();
    Ok(CaseReport {
        about: format!(
            "{}, random write of 4 KiB to each 64 KiB block of {} GiB, 32 in flight, sleeping client, split placement",
            medium.name(),
            span >> 30
        ),
        rows,
        verdicts: vec![Verdict::of(
            "first writes: share of steady state",
            share(ratio),
            format!("≥ {}", share(REQUIRED)),
            ratio >= REQUIRED,
        )],
        ..CaseReport::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_is_written_once() {
        let offsets = writes(1 << 24, 3);
        let mut blocks: Vec<u64> = offsets.iter().map(|offset| offset / BLOCK).collect();
        blocks.sort_unstable();
        assert_eq!(blocks, (0..256).collect::<Vec<_>>());
        assert!(offsets.iter().all(|offset| offset % WRITE == 0));
        assert!(!offsets.is_sorted());
    }
}
