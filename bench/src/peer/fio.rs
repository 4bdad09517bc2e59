// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Raw `fio` on the same file: what the medium gives without any backend in between.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use vssd_tests::paths;

use crate::client::{Kind, Load};
use crate::meter::Meter;
use crate::placement::{Cpu, pin_command};
use crate::sample::Sample;

#[derive(Debug, Deserialize)]
struct Report {
    jobs: Vec<Job>,
}

#[derive(Debug, Deserialize)]
struct Job {
    error: i32,
    /// Per cent of one processor.
    usr_cpu: f64,
    sys_cpu: f64,
    read: Direction,
    write: Direction,
}

#[derive(Debug, Deserialize)]
struct Direction {
    iops: f64,
    bw_bytes: f64,
    clat_ns: Latency,
}

#[derive(Debug, Deserialize)]
struct Latency {
    #[serde(default)]
    percentile: std::collections::BTreeMap<String, f64>,
}

impl Latency {
    fn percentile(&self, which: &str) -> f64 {
        self.percentile.iter().find(|(name, _)| name.starts_with(which)).map_or(0.0, |(_, ns)| ns / 1e3)
    }
}

/// Runs a load on `file`, bound to one processor with its kernel helpers.
pub fn run(file: &Path, load: &Load, warm_up: Duration, measured: Duration, cpu: Cpu) -> Result<Sample> {
    let rw = match load.kind {
        Kind::Read => "randread",
        Kind::Write => "randwrite",
        Kind::Mixed(_) | Kind::DurableWrite => bail!("fio is not asked for {:?}", load.kind),
    };
    let mut fio = Command::new(paths::tool("fio")?);
    fio.args(["--name=raw", "--ioengine=io_uring", "--direct=1", "--norandommap=1", "--randrepeat=0"]);
    fio.args(["--time_based=1", "--output-format=json", "--percentile_list=50:99"]);
    fio.arg(format!("--filename={}", file.display()));
    fio.arg(format!("--rw={rw}"))
        .arg(format!("--bs={}", load.block))
        .arg(format!("--iodepth={}", load.depth));
    fio.arg(format!("--size={}", load.span));
    fio.arg(format!("--ramp_time={}ms", warm_up.as_millis()));
    fio.arg(format!("--runtime={}ms", measured.as_millis()));
    pin_command(&mut fio, cpu);
    // As nobody else reaps children meanwhile, this sees what fio used in all, warm-up included.
    let mut meter = Meter::of_children();
    meter.begin()?;
    let output = fio.stdin(Stdio::null()).output().context("start fio")?;
    ensure!(output.status.success(), "fio failed: {}", String::from_utf8_lossy(&output.stderr));
    meter.end()?;
    // Warnings may stand before the object.
    let begin = output.stdout.iter().position(|byte| *byte == b'{').context("fio printed no result")?;
    let report: Report = serde_json::from_slice(&output.stdout[begin..]).context("read fio's result")?;
    let job = report.jobs.first().context("fio ran no job")?;
    ensure!(job.error == 0, "fio met error {}", job.error);
    let way = if load.kind == Kind::Read { &job.read } else { &job.write };
    Ok(Sample {
        iops: way.iops,
        bytes_per_second: way.bw_bytes,
        p50_us: way.clat_ns.percentile("50."),
        p99_us: way.clat_ns.percentile("99."),
        backend_cores: (job.usr_cpu + job.sys_cpu) / 100.0,
        foreign_cores: meter.usage().foreign_cores,
        media_flushes: 0.0,
    })
}
