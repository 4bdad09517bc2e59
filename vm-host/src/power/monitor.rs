// SPDX-License-Identifier: Apache-2.0 OR MIT

//! All configured sources at work, and how they do.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use thiserror::Error;
use tracing::{error, warn};

use super::config::{ConfigError, Low, PowerConfig, SourceConfig};
use super::observation::{Observation, SourceId};
use super::sources::edge::{self, Line};
use super::sources::logind::{self, Lock};
use super::sources::signal::{self, Signals};
use super::sources::uevent::{self, Uevents};
use super::sources::{Health, Outlet, Reporter, Stop, nut, spawn};

/// More than this many observations are not kept for a receiver that is behind.
const QUEUE: usize = 256;
/// A lock that cannot be had sooner is taken when it can.
const START: Duration = Duration::from_secs(10);

/// Why the sources cannot be started.
#[derive(Debug, Error)]
pub enum StartError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("power source \"{name}\" cannot be started: {error}")]
    Source { name: String, error: io::Error },
    #[error("cannot make an event: {0}")]
    Event(io::Error),
}

/// What an operator can pretend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pretended {
    Battery,
    Critical,
    /// The end of the test.
    Online,
}

impl Pretended {
    fn word(self) -> &'static [u8] {
        match self {
            Self::Battery => b"battery\n",
            Self::Critical => b"critical\n",
            Self::Online => b"online\n",
        }
    }
}

/// The running sources. They end when it is dropped.
pub struct Monitor {
    reporters: Vec<Reporter>,
    threads: Vec<JoinHandle<()>>,
    stop: Stop,
    /// One of each source of planned shutdowns.
    locks: Vec<Lock>,
    /// Into the test's own line.
    test: OwnedFd,
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("sources", &self.reporters.len()).finish_non_exhaustive()
    }
}

impl Monitor {
    /// Starts all sources. Returns when each has begun: when the locks that delay a shutdown are held, as far as they can be had.
    /// A source that cannot be heard now is no error: it says so, and goes on trying.
    pub fn start(config: &PowerConfig) -> Result<(Self, Receiver<Observation>), StartError> {
        Self::start_notifying(config, None)
    }

    /// The same; `notify` is an eventfd that becomes readable with each observation, for a receiver that waits for descriptors.
    pub fn start_notifying(
        config: &PowerConfig,
        notify: Option<OwnedFd>,
    ) -> Result<(Self, Receiver<Observation>), StartError> {
        config.check()?;
        let (sender, receiver) = sync_channel(QUEUE);
        let stop = Stop::new().map_err(StartError::Event)?;
        let outlet = Outlet { sender, notify: notify.map(Arc::new), stop: stop.clone() };
        let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
        let (line, test) = rustix::pipe::pipe_with(flags).map_err(|errno| StartError::Event(errno.into()))?;
        let mut monitor = Self { reporters: Vec::new(), threads: Vec::new(), stop, locks: Vec::new(), test };
        let (started, wait) = sync_channel::<()>(config.sources.len());
        for (place, source) in config.sources.iter().enumerate() {
            let id = u16::try_from(place).map_or(SourceId::TEST, SourceId);
            let reporter = Reporter::new(id, source.name(), source.kind(), outlet.clone());
            let started = started.clone();
            let thread = match source.clone() {
                SourceConfig::Nut(config) => spawn(&reporter, move |reporter| nut::run(reporter, &config)),
                SourceConfig::Logind(config) => {
                    let lock = Lock::default();
                    monitor.locks.push(lock.clone());
                    spawn(&reporter, move |reporter| {
                        logind::run(reporter, config.address.as_deref(), &lock, || drop(started));
                    })
                }
                SourceConfig::Uevent(config) => Uevents::open().and_then(|uevents| {
                    spawn(&reporter, move |reporter| uevent::run(reporter, &uevents, &config.sysfs))
                }),
                SourceConfig::Signal(config) => Signals::open().and_then(|signals| {
                    spawn(&reporter, move |reporter| signal::run(reporter, &signals, &config.status_files))
                }),
                SourceConfig::Edge(config) => Line::of(&config)
                    .and_then(|line| spawn(&reporter, move |reporter| edge::run(reporter, line, config.low))),
            };
            let name = || source.name().to_owned();
            monitor.threads.push(thread.map_err(|error| StartError::Source { name: name(), error })?);
            monitor.reporters.push(reporter);
        }
        let reporter = Reporter::new(SourceId::TEST, "test", "test", outlet);
        let thread = spawn(&reporter, |reporter| edge::run(reporter, Line::Descriptor(line), Low::Critical));
        let name = || "test".to_owned();
        monitor.threads.push(thread.map_err(|error| StartError::Source { name: name(), error })?);
        monitor.reporters.push(reporter);
        // Ends when nobody has a sender any more: each source drops its own when it has begun.
        drop(started);
        if wait.recv_timeout(START) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            warn!("a planned shutdown would not wait: there is no lock yet");
        }
        Ok((monitor, receiver))
    }

    /// How each source does, in the order of the configuration; the test trigger comes last.
    pub fn health(&self) -> Vec<Health> {
        self.reporters.iter().map(Reporter::health).collect()
    }

    /// All is saved: a shutdown that waits may go on.
    pub fn allow_shutdown(&self) {
        self.locks.iter().for_each(Lock::release);
    }

    /// Whether a planned shutdown would wait for [`Self::allow_shutdown`].
    pub fn delays_shutdown(&self) -> bool {
        self.locks.iter().any(Lock::is_held)
    }

    /// Pretends. It takes the same way as the word of any line.
    pub fn pretend(&self, what: Pretended) -> io::Result<()> {
        rustix::io::write(&self.test, what.word())?;
        Ok(())
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.stop();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                error!("a power source panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::time::Instant;

    use super::*;
    use crate::power::config::{EdgeConfig, LogindConfig, NutConfig, UeventConfig};
    use crate::power::observation::Kind;

    fn edge(name: &str, path: &std::path::Path) -> SourceConfig {
        SourceConfig::Edge(EdgeConfig {
            name: name.into(),
            window_ms: None,
            path: Some(path.to_owned()),
            fd: None,
            low: Low::Battery,
        })
    }

    fn config(sources: Vec<SourceConfig>) -> PowerConfig {
        PowerConfig { sources, ..PowerConfig::default() }
    }

    fn next(receiver: &Receiver<Observation>) -> (SourceId, Kind) {
        let observation = receiver.recv_timeout(Duration::from_secs(20)).unwrap();
        (observation.source, observation.kind)
    }

    #[test]
    fn test_trigger_is_always_there_and_takes_the_way_of_any_line() {
        let (monitor, receiver) = Monitor::start(&config(Vec::new())).unwrap();
        for (what, kind) in [
            (Pretended::Battery, Kind::OnBattery { runtime_left_ms: None }),
            (Pretended::Critical, Kind::PowerFailing),
            (Pretended::Online, Kind::Online),
        ] {
            monitor.pretend(what).unwrap();
            assert_eq!(next(&receiver), (SourceId::TEST, kind));
        }
        let health = monitor.health();
        assert_eq!(health.len(), 1);
        assert_eq!((health[0].name.as_str(), health[0].state), ("test", Some(Kind::Online)));
        assert!(health[0].last_heard_unix_ms.unwrap() >= health[0].since_unix_ms.unwrap());
        assert!(!monitor.delays_shutdown());
    }

    #[test]
    fn mistakes_are_told_before_anything_runs() {
        let nut: NutConfig = toml::from_str("name = \"a\"\nlogin = true").unwrap();
        let error = Monitor::start(&config(vec![SourceConfig::Nut(nut)])).unwrap_err();
        assert_eq!(error.to_string(), "power source \"a\": a login needs a user");
        let edge =
            EdgeConfig { name: "b".into(), window_ms: None, path: None, fd: Some(9999), low: Low::Battery };
        let error = Monitor::start(&config(vec![SourceConfig::Edge(edge)])).unwrap_err();
        assert!(error.to_string().starts_with("power source \"b\" cannot be started"), "{error}");
    }

    #[test]
    fn flood_that_nobody_takes_blocks_no_end_and_loses_no_last_word() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let (monitor, receiver) = Monitor::start(&config(vec![edge("line", &path)])).unwrap();
        let mut writer = fs::OpenOptions::new().write(true).open(&path).unwrap();
        // Until the queue is full, each is taken by itself.
        let (mut word, start) = (0, Instant::now());
        while word < 2 * QUEUE && start.elapsed() < Duration::from_secs(5) {
            writer.write_all(if word % 2 == 0 { b"0" } else { b"1" }).unwrap();
            word += 1;
            std::thread::sleep(Duration::from_micros(200));
        }
        writer.write_all(b"critical\n").unwrap();
        let last = std::iter::from_fn(|| receiver.recv_timeout(Duration::from_secs(1)).ok()).last().unwrap();
        assert_eq!(last.kind, Kind::PowerFailing);
        for byte in [b"0", b"1"].iter().cycle().take(4 * QUEUE) {
            writer.write_all(*byte).unwrap();
            std::thread::sleep(Duration::from_micros(50));
        }
        let start = Instant::now();
        drop(monitor);
        assert!(start.elapsed() < Duration::from_secs(2));
        drop(receiver);
    }

    /// Sources without a protocol of their own sleep until there is something to hear.
    #[test]
    fn idle_sources_do_not_wake_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let uevent =
            UeventConfig { name: "idle-mains".into(), window_ms: None, sysfs: dir.path().to_owned() };
        let (_monitor, receiver) =
            Monitor::start(&config(vec![edge("idle-line", &path), SourceConfig::Uevent(uevent)])).unwrap();
        assert_eq!(next(&receiver), (SourceId(1), Kind::NotAvailable));
        std::thread::sleep(Duration::from_millis(200));
        let before = switches("power-idle-");
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(switches("power-idle-"), before);
        assert_eq!(before.len(), 2);
    }

    /// How often each thread whose name begins so has gone to sleep.
    fn switches(name: &str) -> Vec<String> {
        let mut found = Vec::new();
        for task in fs::read_dir("/proc/self/task").unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
            let field = |key: &str| {
                let line = status.lines().find(|line| line.starts_with(key))?;
                Some(line.split_once('\t')?.1.to_owned())
            };
            if field("Name:").is_some_and(|own| own.starts_with(name)) {
                found.push(format!("{:?} {:?}", field("Name:"), field("voluntary_ctxt_switches:")));
            }
        }
        found.sort();
        found
    }

    #[test]
    fn machine_without_logind_starts_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("unix:path={}", dir.path().join("no-bus").display());
        let logind = LogindConfig { name: "host".into(), window_ms: None, address: Some(address) };
        let (monitor, receiver) = Monitor::start(&config(vec![SourceConfig::Logind(logind)])).unwrap();
        assert_eq!(next(&receiver), (SourceId(0), Kind::NotAvailable));
        assert!(!monitor.delays_shutdown());
        let start = Instant::now();
        drop(monitor);
        assert!(start.elapsed() < Duration::from_secs(2));
    }
}
