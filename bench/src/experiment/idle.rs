// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What connected vSSDs cost while nobody uses them: wake-ups, processor time, memory.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::client::Timing::ToEnd;
use crate::client::{Kind, Load, Session, Waiting, drive};
use crate::meter::process_time;
use crate::peer::server::{VssdBuild, VssdOptions};
use crate::peer::{Media, Medium, Server};
use crate::placement::Placement;
use crate::report::figures::share;
use crate::report::{CaseReport, Verdict};
use crate::run::{Bench, POLL_US, on_cpu};

const COUNT: u32 = 64;
const BYTES: u64 = 16 << 20;

/// Times that threads of a process went to sleep, so far: each is woken once.
fn sleeps(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may have ended meanwhile.
        let status = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
        sum += field(&status, "voluntary_ctxt_switches:").unwrap_or(0);
    }
    Ok(sum)
}

fn field(status: &str, name: &str) -> Option<u64> {
    status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
}

/// Bytes of memory that are the process's own, and threads.
fn memory(pid: u32) -> Result<(f64, u64)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = field(&status, "RssAnon:").context("no RssAnon")?;
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    Ok((kib as f64 * 1024.0, field(&status, "Threads:").unwrap_or(0)))
}

pub fn run(bench: &mut Bench) -> Result<CaseReport> {
    let quick = bench.effort.rounds <= 2;
    let watched = Duration::from_secs(if quick { 1 } else { 10 });
    let client = bench.cpus.client(Placement::Split);
    let runtime = bench.media.runtime().join("i");
    fs::create_dir_all(&runtime)?;
    let names: Vec<String> = (0..COUNT).map(|index| format!("idle{index}")).collect();
    let mut report = CaseReport {
        about: format!("{COUNT} connected vSSDs that were used once, watched for {} s", watched.as_secs()),
        ..CaseReport::default()
    };
    for (poll_us, what) in [(0, "idle"), (POLL_US, "idle, polling allowed")] {
        let file = bench.media.zeroed(Medium::Nvram, "idle", Media::pool_bytes(BYTES * u64::from(COUNT)))?;
        let options = VssdOptions { build: VssdBuild::Product, workers: 2, queues: 1, poll_us };
        let server = Server::new_vssd(&file, Medium::Nvram, &[], 0, options, None, &runtime)?;
        let (before, _) = memory(server.pid())?;
        server.create(names.iter().map(String::as_str), BYTES)?;
        let load = Load { kind: Kind::Write, ..Load::fill(64 << 10, 4, 1 << 20) };
        let held = on_cpu(client, || {
            let connect = |name| Session::connect(&server.disk(name), &load, 0);
            let mut held = names.iter().map(|name| connect(name)).collect::<Result<Vec<_>>>()?;
            drive(&mut held, Waiting::Sleeping, ToEnd, &mut ())?;
            Ok(held)
        })?;
        // What follows the last use (journal, reserve of zeroed blocks) is not idleness.
        // Some seconds after the last connection the daemon looks once more, for guests whose driver has not said who it is.
        thread::sleep(Duration::from_secs(5));
        let (sleeps_before, time_before) = (sleeps(server.pid())?, process_time(server.pid())?);
        thread::sleep(watched);
        let woken = sleeps(server.pid())? - sleeps_before;
        let time = process_time(server.pid())?.saturating_sub(time_before);
        let (after, threads) = memory(server.pid())?;
        drop(held);
        server.stop()?;
        fs::remove_file(file)?;

        #[allow(clippy::cast_precision_loss, reason = "figures for people")]
        let rate = woken as f64 / watched.as_secs_f64() / f64::from(COUNT);
        let cpu = time.as_secs_f64() / watched.as_secs_f64();
        report.verdicts.push(Verdict::of(
            format!("{what}: wake-ups/s of each vSSD"),
            format!("{rate:.3} ({woken} in all)"),
            "0",
            rate < 0.005,
        ));
        report.verdicts.push(Verdict::of(format!("{what}: processor"), share(cpu), "< 0.10 %", cpu < 0.001));
        let each = (after - before) / f64::from(COUNT) / 1024.0;
        report.verdicts.push(Verdict::info(format!("{what}: memory of each vSSD"), format!("{each:.0} KiB")));
        report.verdicts.push(Verdict::info(
            format!("{what}: memory before the first vSSD, threads at the end"),
            format!("{:.1} MiB, {threads}", before / 1_048_576.0),
        ));
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_sleeps_is_counted() {
        let before = sleeps(std::process::id()).unwrap();
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(sleeps(std::process::id()).unwrap() >= before + 5);
        assert!(memory(std::process::id()).unwrap().0 > 0.0);
    }
}
