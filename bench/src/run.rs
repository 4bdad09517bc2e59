// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs the contenders of a case in turn, round by round, so that what the machine does meanwhile meets all of them.
//!
//! A run during which other programs used more than [`FOREIGN_LIMIT`] of a processor is repeated, at most [`REPEATS`] times; if
//! none was quiet the quietest counts, and the result says so.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::client::{Load, Session, Tally, Timing, Waiting, drive};
use crate::meter::{Meter, Usage};
use crate::peer::qsd::{self, Polling, Way};
use crate::peer::server::{VssdBuild, VssdOptions};
use crate::peer::{Contender, Media, Medium, Server, fio};
use crate::placement::{Cpu, Cpus};
use crate::stats::{median, spread};

/// Processors that others may use during a run.
pub const FOREIGN_LIMIT: f64 = 0.15;
/// How often a disturbed run is made again.
pub const REPEATS: usize = 3;
/// What the `polling` contender allows a worker.
pub const POLL_US: u16 = 200;

/// The vSSD of cases that need only one.
pub const VSSD: &str = "vssd";

/// What one run gave.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sample {
    pub iops: f64,
    pub bytes_per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// Processors that the backend kept busy.
    pub backend_cores: f64,
    /// Processors that other programs kept busy.
    pub foreign_cores: f64,
    /// Flushes of the disk a second.
    pub media_flushes: f64,
}

impl Sample {
    /// The figures of one session.
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    pub fn of(tally: &Tally) -> Self {
        let us = |quantile| tally.latencies.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            iops: tally.iops(),
            bytes_per_second: tally.bytes_per_second(),
            p50_us: us(0.5),
            p99_us: us(0.99),
            ..Self::default()
        }
    }

    /// All sessions together; no latencies.
    pub fn sum(tallies: &[Tally]) -> Self {
        let mut sum = tallies.first().map(Self::of).unwrap_or_default();
        sum.iops = tallies.iter().map(Tally::iops).sum();
        sum.bytes_per_second = tallies.iter().map(Tally::bytes_per_second).sum();
        sum
    }

    /// Adds what it cost.
    #[must_use]
    pub fn with(self, usage: Usage) -> Self {
        Self {
            backend_cores: usage.backend_cores,
            foreign_cores: usage.foreign_cores,
            media_flushes: usage.media_flushes,
            ..self
        }
    }

    pub fn iops_per_core(&self) -> f64 {
        if self.backend_cores > 0.0 { self.iops / self.backend_cores } else { 0.0 }
    }
}

/// All runs of one contender in one case.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Series {
    pub samples: Vec<Sample>,
    /// Runs made again because others used the machine.
    pub repeated: usize,
}

impl Series {
    pub fn median(&self) -> Sample {
        let of = |figure: fn(&Sample) -> f64| median(&self.samples.iter().map(figure).collect::<Vec<_>>());
        Sample {
            iops: of(|s| s.iops),
            bytes_per_second: of(|s| s.bytes_per_second),
            p50_us: of(|s| s.p50_us),
            p99_us: of(|s| s.p99_us),
            backend_cores: of(|s| s.backend_cores),
            foreign_cores: of(|s| s.foreign_cores),
            media_flushes: of(|s| s.media_flushes),
        }
    }

    /// Runs that count although others used the machine.
    pub fn disturbed(&self) -> usize {
        self.samples.iter().filter(|sample| sample.foreign_cores > FOREIGN_LIMIT).count()
    }

    pub fn spread(&self) -> f64 {
        spread(&self.samples.iter().map(|s| s.iops).collect::<Vec<_>>())
    }

    /// Makes a run, again if it was disturbed, and keeps the best.
    pub fn add(&mut self, mut run: impl FnMut() -> Result<Sample>) -> Result<()> {
        let mut best: Option<Sample> = None;
        for attempt in 0..=REPEATS {
            let sample = run()?;
            self.repeated += usize::from(attempt > 0);
            if best.is_none_or(|best| sample.foreign_cores < best.foreign_cores) {
                best = Some(sample);
            }
            if sample.foreign_cores <= FOREIGN_LIMIT {
                break;
            }
        }
        self.samples.push(best.context("no run was made")?);
        Ok(())
    }
}

/// How much is measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Effort {
    pub rounds: usize,
    pub warm_up: Duration,
    pub measured: Duration,
}

impl Effort {
    pub const FULL: Self =
        Self { rounds: 5, warm_up: Duration::from_millis(200), measured: Duration::from_millis(500) };
    pub const QUICK: Self =
        Self { rounds: 2, warm_up: Duration::from_millis(50), measured: Duration::from_millis(200) };

    /// One of several runs that find out which way to run a peer is best.
    const CALIBRATION: Self =
        Self { rounds: 3, warm_up: Duration::from_millis(50), measured: Duration::from_millis(200) };

    pub fn timing(self) -> Timing {
        Timing::For { warm_up: self.warm_up, measured: self.measured }
    }
}

/// Where and how cases are run, and the media made so far.
#[derive(Debug)]
pub struct Bench {
    pub cpus: Cpus,
    pub media: Media,
    pub effort: Effort,
    /// The ways to run the storage daemon.
    qsd: Vec<Way>,
    filled: HashMap<(Medium, &'static str), PathBuf>,
}

/// A running backend of a steady case.
#[derive(Debug)]
pub enum Rival {
    Server(Server),
    /// `fio` needs no server.
    File(PathBuf),
}

impl Rival {
    /// Ends it in order.
    pub fn stop(self) -> Result<()> {
        match self {
            Self::Server(server) => server.stop(),
            Self::File(_) => Ok(()),
        }
    }
}

/// A steady case's parameters, as the contenders need them.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    pub medium: Medium,
    pub load: &'a Load,
    pub waiting: Waiting,
    pub client: Cpu,
}

impl Bench {
    pub fn new(cpus: Cpus, media: Media, effort: Effort) -> Result<Self> {
        let ways = |build: qsd::Build| {
            [Polling::Default, Polling::Never].map(|polling| Way { build: build.clone(), polling })
        };
        let qsd = qsd::builds()?.into_iter().flat_map(ways).collect();
        Ok(Self { cpus, media, effort, qsd, filled: HashMap::new() })
    }

    /// Versions of the storage daemons.
    pub fn storage_daemons(&self) -> Vec<&str> {
        let mut versions: Vec<&str> = self.qsd.iter().map(|way| way.build.version.as_str()).collect();
        versions.dedup();
        versions
    }

    /// A medium of `contender`'s own with every byte of its disk written, made at first need.
    fn filled(&mut self, contender: Contender, setting: &Setting<'_>) -> Result<PathBuf> {
        // The storage daemon and fio use the same file.
        let owner = match contender {
            Contender::Vssd => "vssd",
            Contender::VssdPolling => "vssd-polling",
            Contender::VssdIdentity => "vssd-identity",
            Contender::Qsd | Contender::Fio => "raw",
        };
        let key = (setting.medium, owner);
        if let Some(path) = self.filled.get(&key) {
            return Ok(path.clone());
        }
        let span = setting.load.span;
        let bytes = if owner == "raw" { span } else { Media::pool_bytes(span) };
        let path = self.media.zeroed(setting.medium, owner, bytes)?;
        let (cpu, runtime) = (Some(self.cpus.backend()), self.runtime(contender)?);
        let server = if owner == "raw" {
            Server::qsd(&path, &self.qsd[0], 1, cpu, &runtime)?
        } else {
            let options = vssd_options(contender, 1);
            Server::new_vssd(&path, setting.medium, &[VSSD], span, options, cpu, &runtime)?
        };
        let load = Load::fill(256 << 10, 8, span);
        on_cpu(setting.client, || {
            let mut sessions = [Session::connect(&server.disk(VSSD), &load, 0)?];
            drive(&mut sessions, Waiting::Sleeping, Timing::ToEnd, &mut ())
        })
        .context("fill the disk")?;
        server.stop()?;
        self.filled.insert(key, path.clone());
        Ok(path)
    }

    /// A folder for a contender's sockets and log.
    fn runtime(&self, contender: Contender) -> Result<PathBuf> {
        let name = match contender {
            Contender::Vssd => "v",
            Contender::VssdPolling => "p",
            Contender::VssdIdentity => "m",
            Contender::Qsd | Contender::Fio => "q",
        };
        let dir = self.media.runtime().join(name);
        std::fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// Makes a contender ready for a case. For the storage daemon, finds out which way to run it serves the case best; the note
    /// says which.
    pub fn rival(&mut self, contender: Contender, setting: &Setting<'_>) -> Result<(Rival, Option<String>)> {
        let file = self.filled(contender, setting)?;
        let (cpu, runtime, queues) =
            (Some(self.cpus.backend()), self.runtime(contender)?, setting.load.queues);
        match contender {
            Contender::Vssd | Contender::VssdPolling | Contender::VssdIdentity => {
                let server = Server::vssd(&file, vssd_options(contender, queues), cpu, &runtime)?;
                self.touch(&server, setting)?;
                return Ok((Rival::Server(server), None));
            }
            Contender::Fio => return Ok((Rival::File(file), None)),
            Contender::Qsd => {}
        }
        let mut best: Option<(f64, &Way)> = None;
        for way in &self.qsd {
            let rival = Rival::Server(Server::qsd(&file, way, queues, cpu, &runtime)?);
            let mut rates = Vec::new();
            for round in 0..3 {
                rates.push(self.run_for(&rival, setting, Effort::CALIBRATION, 0xca11 + round)?.iops);
            }
            rival.stop()?;
            let rate = median(&rates);
            if best.is_none_or(|(other, _)| rate > other) {
                best = Some((rate, way));
            }
        }
        let (_, way) = best.context("there is no storage daemon")?;
        let note = format!("qsd is {}, the best of {} ways for this case", way.name(), self.qsd.len());
        Ok((Rival::Server(Server::qsd(&file, way, queues, cpu, &runtime)?), Some(note)))
    }

    /// Reads everything once, so that no page table is filled while something is measured.
    fn touch(&self, server: &Server, setting: &Setting<'_>) -> Result<()> {
        if setting.medium == Medium::Ssd {
            return Ok(());
        }
        let load = Load { kind: crate::client::Kind::Read, ..Load::fill(256 << 10, 8, setting.load.span) };
        on_cpu(setting.client, || {
            let mut sessions = [Session::connect(&server.disk(VSSD), &load, 0)?];
            drive(&mut sessions, Waiting::Sleeping, Timing::ToEnd, &mut ())
        })
        .context("read everything once")?;
        Ok(())
    }

    /// One run.
    pub fn run(&self, rival: &Rival, setting: &Setting<'_>, seed: u64) -> Result<Sample> {
        self.run_for(rival, setting, self.effort, seed)
    }

    fn run_for(&self, rival: &Rival, setting: &Setting<'_>, effort: Effort, seed: u64) -> Result<Sample> {
        let server = match rival {
            Rival::File(file) => {
                let Effort { warm_up, measured, .. } = effort;
                return fio::run(file, setting.load, warm_up, measured, self.cpus.backend());
            }
            Rival::Server(server) => server,
        };
        let (pid, timing) = (server.pid(), effort.timing());
        on_cpu(setting.client, || {
            let mut sessions = [Session::connect(&server.disk(VSSD), setting.load, seed)?];
            let mut meter = Meter::new(pid).on_disk(self.media.disk(setting.medium));
            let tallies = drive(&mut sessions, setting.waiting, timing, &mut meter)?;
            Ok(tallies.first().map(Sample::of).unwrap_or_default().with(meter.usage()))
        })
    }
}

fn vssd_options(contender: Contender, queues: usize) -> VssdOptions {
    let build = match contender {
        Contender::VssdIdentity => VssdBuild::IdentityMap,
        _ => VssdBuild::Product,
    };
    let poll_us = if contender == Contender::VssdPolling { POLL_US } else { 0 };
    VssdOptions { build, workers: 1, queues, poll_us }
}

/// Does something on a thread of its own that is bound to a processor.
pub fn on_cpu<T: Send>(cpu: Cpu, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            crate::placement::pin_thread(cpu)?;
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
