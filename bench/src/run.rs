// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs the contenders of a case in turn, round by round, so that what the machine does meanwhile meets all of them.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::client::{Load, Session, Timing, Waiting, drive};
use crate::meter::Meter;
use crate::peer::qsd::{self, Polling, Way};
use crate::peer::server::{VssdBuild, VssdOptions};
use crate::peer::{Contender, Media, Medium, Server, fio};
use crate::placement::{Cpu, Cpus};
use crate::sample::Sample;
use crate::stats::median;

/// What the `polling` contender allows a worker.
pub const POLL_US: u16 = 200;

/// The vSSD of cases that need only one.
pub const VSSD: &str = "vssd";

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

    /// Removes the disks of the steady cases, for cases that make their own: on NV-RAM, gigabytes of memory.
    pub fn make_room(&mut self) -> Result<()> {
        self.filled.drain().try_for_each(|(_, path)| Ok(std::fs::remove_file(path)?))
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
    /// says which, and in which it fails.
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
        let rate = |way: &Way| -> Result<f64> {
            let rival = Rival::Server(Server::qsd(&file, way, queues, cpu, &runtime)?);
            let mut rates = Vec::new();
            for round in 0..3 {
                rates.push(self.run_for(&rival, setting, Effort::CALIBRATION, 0xca11 + round)?.iops);
            }
            rival.stop()?;
            Ok(median(&rates))
        };
        let (mut best, mut crashed): (Option<(f64, &Way)>, Vec<String>) = (None, Vec::new());
        for way in &self.qsd {
            match rate(way) {
                Ok(rate) if best.is_none_or(|(other, _)| rate > other) => best = Some((rate, way)),
                Ok(_) => {}
                Err(error) => {
                    eprintln!("qsd, {}: {error:#}", way.name());
                    crashed.push(way.name());
                }
            }
        }
        let (_, way) = best.context("no storage daemon works")?;
        let mut note = format!("qsd is {}, the best of {} ways for this case", way.name(), self.qsd.len());
        if !crashed.is_empty() {
            let _ = write!(note, "; it failed as {}", crashed.join(" and "));
        }
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
