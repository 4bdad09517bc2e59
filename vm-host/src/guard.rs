// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The power loop: observations and the ends of saves go into the state machine, and what it wants is done to all VMs.
//!
//! ```text
//!   Monitor ──► Word::Observed ─┐
//!   save, resume threads ───────┼──► Machine::apply ──► SaveAll ──► thread ──► Host::save_all
//!   Host: a VM came or went ────┘                   └─► Event ──► Report
//! ```
//!
//! The loop itself never waits for a VM, so that it hears that the power fails again while the VMs are being resumed.

use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::{error, info, warn};

use crate::host::{Host, Outcome};
use crate::power::{
    Effect, Event, Health, Input, Machine, Monitor, Observation, PowerConfig, Pretended, StartError, State,
    Ticket, View,
};

/// What the loop hears.
#[derive(Debug)]
enum Word {
    Observed(Observation),
    Saved(Ticket, Outcome),
    Resumed(Ticket, Outcome),
    /// A VM came, went, or was measured.
    Fleet,
    End,
}

/// Takes what the loop has to tell.
pub trait Report: fmt::Debug + Send + Sync {
    /// Of the state machine; `source` is what its source is called.
    fn power(&self, event: &Event, source: Option<&str>);
    /// A save or resume of all VMs is over.
    fn over(&self, what: &'static str, outcome: Outcome);
    fn armed(&self, armed: bool);
}

/// How the power is.
#[derive(Clone, Debug, Serialize)]
pub struct PowerStatus {
    #[serde(flatten)]
    pub view: View,
    /// Milliseconds in this state.
    pub for_ms: u64,
    /// A planned shutdown of the host waits for us.
    pub delays_shutdown: bool,
    pub sources: Vec<Health>,
    /// How long the last save of all took, in microseconds.
    pub last_save_us: Option<u64>,
}

/// Tells the loop that VMs have changed.
#[derive(Clone, Debug)]
pub struct Bell(Sender<Word>);

impl Bell {
    pub fn ring(&self) {
        let _ = self.0.send(Word::Fleet);
    }
}

/// The running loop. It ends when it is dropped.
#[derive(Debug)]
pub struct Guard {
    words: Sender<Word>,
    monitor: Arc<Monitor>,
    seen: Arc<Mutex<Seen>>,
    clock: Instant,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Seen {
    view: View,
    last_save: Option<Duration>,
}

/// The loop before it runs: it exists before the host does, so that both can know each other's ends.
#[derive(Debug)]
pub struct Unstarted {
    words: Sender<Word>,
    inbox: Receiver<Word>,
}

impl Unstarted {
    #[expect(clippy::new_without_default, reason = "it is no value, but a beginning")]
    pub fn new() -> Self {
        let (words, inbox) = channel();
        Self { words, inbox }
    }

    pub fn bell(&self) -> Bell {
        Bell(self.words.clone())
    }

    /// Starts the sources of power events and the loop.
    pub fn start(
        self,
        config: PowerConfig,
        host: Arc<Host>,
        report: Arc<dyn Report>,
    ) -> Result<Guard, StartError> {
        let (monitor, observations) = Monitor::start(&config)?;
        let monitor = Arc::new(monitor);
        let clock = Instant::now();
        let machine = Machine::new(config.policy(host.plan().needed_ms()), &config.roles(), 0);
        let seen = Arc::new(Mutex::new(Seen { view: machine.view(), last_save: None }));
        let words = self.words.clone();
        // Ends when the monitor does.
        let forward = move || {
            for observation in observations {
                if words.send(Word::Observed(observation)).is_err() {
                    return;
                }
            }
        };
        let started = |error: io::Error| StartError::Event(error);
        thread::Builder::new().name("power words".to_owned()).spawn(forward).map_err(started)?;
        let looper = Loop {
            config,
            host,
            report,
            monitor: Arc::clone(&monitor),
            machine,
            words: self.words.clone(),
            seen: Arc::clone(&seen),
            clock,
        };
        let inbox = self.inbox;
        let thread = thread::Builder::new()
            .name("power".to_owned())
            .spawn(move || looper.run(&inbox))
            .map_err(started)?;
        Ok(Guard { words: self.words, monitor, seen, clock, thread: Some(thread) })
    }
}

impl Guard {
    pub fn status(&self) -> PowerStatus {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now_ms = millis(self.clock.elapsed());
        PowerStatus {
            view: seen.view,
            for_ms: now_ms.saturating_sub(seen.view.since_ms),
            delays_shutdown: self.monitor.delays_shutdown(),
            sources: self.monitor.health(),
            last_save_us: seen.last_save.map(|took| u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
        }
    }

    /// As if a supply had said so.
    pub fn pretend(&self, what: Pretended) -> io::Result<()> {
        self.monitor.pretend(what)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.words.send(Word::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Loop {
    config: PowerConfig,
    host: Arc<Host>,
    report: Arc<dyn Report>,
    monitor: Arc<Monitor>,
    machine: Machine,
    words: Sender<Word>,
    seen: Arc<Mutex<Seen>>,
    clock: Instant,
}

impl Loop {
    fn run(mut self, inbox: &Receiver<Word>) {
        loop {
            let word = match self.machine.wake_at_ms() {
                None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => inbox.recv_timeout(Duration::from_millis(at.saturating_sub(self.now_ms()))),
            };
            let input = match word {
                Ok(Word::End) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(Word::Observed(observation)) => Input::Observed(observation),
                Ok(Word::Saved(ticket, outcome)) => {
                    self.seen.lock().unwrap_or_else(PoisonError::into_inner).last_save = Some(outcome.took);
                    self.report.over("save", outcome);
                    Input::SaveFinished { ticket, ok: outcome.ok, failed: outcome.failed }
                }
                Ok(Word::Resumed(ticket, outcome)) => {
                    self.report.over("resume", outcome);
                    Input::ResumeFinished { ticket }
                }
                Ok(Word::Fleet) | Err(RecvTimeoutError::Timeout) => Input::Time,
            };
            if input == Input::Time {
                self.machine.set_needed(self.host.plan().needed_ms());
            }
            let effects = self.machine.apply(input, self.now_ms());
            self.host.hold_back(matches!(self.machine.state(), State::Critical | State::Saved));
            for effect in &effects {
                self.perform(effect);
            }
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).view = self.machine.view();
        }
    }

    fn perform(&self, effect: &Effect) {
        match *effect {
            Effect::PreArm => {
                self.report.armed(true);
                // What is durable already need not be made so in a hurry.
                self.in_background("pre-arm", |host| {
                    host.flush_all();
                    None
                });
            }
            Effect::DisArm => self.report.armed(false),
            Effect::SaveAll { ticket, reason, deadline_ms } => {
                info!(%reason, within_ms = deadline_ms.saturating_sub(self.now_ms()), "saving all VMs");
                if !self.in_background("save all", move |host| Some(Word::Saved(ticket, host.save_all()))) {
                    // It is tried again.
                    let _ = self.words.send(Word::Saved(ticket, Outcome { failed: 1, ..Outcome::default() }));
                }
            }
            Effect::ResumeAll { ticket } => {
                info!("resuming all VMs");
                self.in_background("resume all", move |host| Some(Word::Resumed(ticket, host.resume_all())));
            }
            Effect::AllowShutdown => self.monitor.allow_shutdown(),
            Effect::Event(event) => {
                let source = match event {
                    Event::SourceLost { source, .. } | Event::SourceBack { source } => Some(source),
                    Event::StateChanged { .. } | Event::SaveIncomplete { .. } => None,
                };
                if !matches!(event, Event::StateChanged { .. } | Event::SourceBack { .. }) {
                    warn!(?event, "power alarm");
                }
                self.report.power(&event, source.map(|source| self.config.source_name(source)));
            }
        }
    }

    /// False where there is no thread to be had.
    fn in_background(&self, name: &str, work: impl FnOnce(&Host) -> Option<Word> + Send + 'static) -> bool {
        let (host, words) = (Arc::clone(&self.host), self.words.clone());
        let work = move || {
            if let Some(word) = work(&host) {
                let _ = words.send(word);
            }
        };
        let spawned = thread::Builder::new().name(name.to_owned()).spawn(work);
        if let Err(error) = &spawned {
            error!(%error, "cannot start a thread");
        }
        spawned.is_ok()
    }

    fn now_ms(&self) -> u64 {
        millis(self.clock.elapsed())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
