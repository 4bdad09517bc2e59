// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Many active vSSDs against one. All share as much disk and as many buffers in all, so that caches are of no account.

use anyhow::Result;

use crate::client::Timing::ToEnd;
use crate::client::{Kind, Load, Session, Waiting, drive};
use crate::meter::Meter;
use crate::peer::server::{VssdBuild, VssdOptions};
use crate::peer::{Media, Medium, Server};
use crate::placement::Placement;
use crate::report::figures::{self, share};
use crate::report::{CaseReport, Row, Verdict};
use crate::run::{Bench, on_cpu};
use crate::sample::{Sample, Series};
use crate::stats::median;

const COUNTS: [usize; 4] = [1, 4, 16, 64];
const SPAN: u64 = 1 << 30;
const DEPTH: usize = 32;
const BUFFERS: usize = 64 * DEPTH;
/// Totals and shares may lie this far apart.
const WITHIN: f64 = 0.1;

/// The vSSDs of the group of `count`.
fn names(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("of{count}-{index}")).collect()
}

fn sessions(server: &Server, count: usize, load: &Load, seed: u64) -> Result<Vec<Session>> {
    (0u64..)
        .zip(names(count))
        .map(|(i, name)| Session::connect(&server.disk(&name), load, seed + i))
        .collect()
}

pub fn run(bench: &mut Bench) -> Result<CaseReport> {
    let client = bench.cpus.client(Placement::Split);
    let runtime = bench.media.runtime().join("s");
    std::fs::create_dir_all(&runtime)?;
    let total = SPAN * COUNTS.len() as u64;
    let file = bench.media.zeroed(Medium::Nvram, "scaling", Media::pool_bytes(total))?;
    let options = VssdOptions { build: VssdBuild::Product, workers: 1, queues: 1, poll_us: 0 };
    let server =
        Server::new_vssd(&file, Medium::Nvram, &[], 0, options, Some(bench.cpus.backend()), &runtime)?;
    for count in COUNTS {
        let span = SPAN / count as u64;
        server.create(names(count).iter().map(String::as_str), span)?;
        on_cpu(client, || {
            drive(
                &mut sessions(&server, count, &Load::fill(256 << 10, 8, span), 0)?,
                Waiting::Sleeping,
                ToEnd,
                &mut (),
            )
        })?;
    }

    let mut totals: Vec<Series> = COUNTS.iter().map(|_| Series::default()).collect();
    let mut fairness: Vec<Vec<f64>> = vec![Vec::new(); COUNTS.len()];
    for round in 0..bench.effort.rounds {
        for (at, count) in COUNTS.into_iter().enumerate() {
            let load = Load {
                buffers: BUFFERS / count,
                ..Load::random(Kind::Read, 4 << 10, DEPTH, SPAN / count as u64)
            };
            let mut shares = 0.0;
            totals[at].add(|| {
                let mut meter = Meter::new(server.pid());
                let tallies = on_cpu(client, || {
                    let mut sessions = sessions(&server, count, &load, (round * 64) as u64)?;
                    drive(&mut sessions, Waiting::Sleeping, bench.effort.timing(), &mut meter)
                })?;
                let each: Vec<f64> = tallies.iter().map(crate::client::Tally::iops).collect();
                let (low, high) =
                    each.iter().fold((f64::INFINITY, 0.0f64), |(l, h), v| (l.min(*v), h.max(*v)));
                shares = low / high;
                Ok(Sample::sum(&tallies).with(meter.usage()))
            })?;
            fairness[at].push(shares);
        }
    }
    server.stop()?;
    std::fs::remove_file(file)?;

    let one = totals[0].median().iops;
    let mut verdicts = Vec::new();
    for (at, count) in COUNTS.into_iter().enumerate().skip(1) {
        let ratio = totals[at].median().iops / one;
        let required = format!("≥ {}", share(1.0 - WITHIN));
        verdicts.push(Verdict::of(
            format!("{count} vSSDs: total against one"),
            share(ratio),
            &required,
            ratio >= 1.0 - WITHIN,
        ));
        let fair = median(&fairness[at]);
        verdicts.push(Verdict::of(
            format!("{count} vSSDs: slowest against fastest"),
            share(fair),
            &required,
            fair >= 1.0 - WITHIN,
        ));
        let each = totals[at].median().iops / count as f64;
        verdicts
            .push(Verdict::info(format!("{count} vSSDs: IOPS of each, on average"), figures::count(each)));
    }
    let rows = COUNTS
        .into_iter()
        .zip(totals)
        .map(|(count, series)| {
            let name = if count == 1 { "1 vSSD".to_owned() } else { format!("{count} vSSDs") };
            let ratio = series.median().iops / one;
            Row::new(name, series, Some(ratio))
        })
        .collect();
    Ok(CaseReport {
        about: "NV-RAM, random read of 4 KiB, 32 in flight on each vSSD, one sleeping client thread, one worker, split \
                placement; ratios against one vSSD"
            .into(),
        rows,
        verdicts,
        ..CaseReport::default()
    })
}
