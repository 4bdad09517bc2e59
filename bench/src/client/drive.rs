// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One thread that keeps the loads of any number of sessions going.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use hdrhistogram::Histogram;
use rustix::event::{Timespec, epoll};
use serde::Serialize;

use super::session::{Record, Session};

/// A backend that does not answer for so long hangs.
const PATIENCE: Duration = Duration::from_secs(20);
/// Rounds of work on queues that had some, before the others are looked at.
const ROUNDS_WITHOUT_EPOLL: u32 = 16;

/// What the client does while there is nothing to collect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Waiting {
    /// Sleeps until the backend signals.
    Sleeping,
    /// Looks at the rings all the time and wants no signals.
    Polling,
}

/// How long a load runs.
#[derive(Clone, Copy, Debug)]
pub enum Timing {
    /// For so long without being measured, then for so long measured.
    For { warm_up: Duration, measured: Duration },
    /// To the end of its list, measured from the first request on.
    ToEnd,
}

/// What happened to one session while it was measured.
#[derive(Clone, Debug)]
pub struct Tally {
    pub latencies: Histogram<u64>,
    pub bytes: u64,
    pub elapsed: Duration,
}

impl Tally {
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    pub fn iops(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }

    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64()
    }
}

/// Called at the beginning and at the end of what is measured.
pub trait Edges {
    fn begin(&mut self) -> Result<()>;
    fn end(&mut self) -> Result<()>;
}

/// Nothing to note at the edges.
impl Edges for () {
    fn begin(&mut self) -> Result<()> {
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        Ok(())
    }
}

impl Edges for crate::meter::Meter {
    fn begin(&mut self) -> Result<()> {
        Self::begin(self)
    }

    fn end(&mut self) -> Result<()> {
        Self::end(self)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    WarmUp,
    Measured,
    Ending,
}

struct Driver<'a> {
    sessions: &'a mut [Session],
    /// (session, queue) of a key.
    keys: Vec<(usize, usize)>,
    epoll: OwnedFd,
    ready: Vec<usize>,
    records: Vec<Record>,
    waiting: Waiting,
    phase: Phase,
    last_answer: Instant,
}

impl Driver<'_> {
    fn turn(&mut self, key: usize) -> Result<usize> {
        let (session, queue) = self.keys[key];
        let record = (self.phase == Phase::Measured).then(|| &mut self.records[session]);
        let queue = &mut self.sessions[session].queues[queue];
        queue.turn(self.phase == Phase::Ending, record)
    }

    /// A round over the queues that may have answers. The number of answers.
    fn round(&mut self) -> Result<usize> {
        let mut answers = 0;
        let ready = std::mem::take(&mut self.ready);
        for &key in &ready {
            let found = self.turn(key)?;
            answers += found;
            if self.waiting == Waiting::Sleeping {
                let (session, queue) = self.keys[key];
                if found > 0 || self.sessions[session].queues[queue].arm() {
                    self.ready.push(key);
                }
            }
        }
        if self.waiting == Waiting::Polling {
            self.ready = ready;
            if answers == 0 {
                std::hint::spin_loop();
            }
        }
        Ok(answers)
    }

    /// Sleeps until a queue has answers, or only asks if some are known to have.
    fn sleep(&mut self) -> Result<()> {
        let nanos = if self.ready.is_empty() { 50_000_000 } else { 0 };
        let timeout = Timespec { tv_sec: 0, tv_nsec: nanos };
        let mut events = [const { MaybeUninit::uninit() }; 64];
        // The call descriptors are edge-triggered: never read, so that a wake-up costs one system call.
        let events = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        for event in events {
            let key = usize::try_from(event.data.u64())?;
            if !self.ready.contains(&key) {
                let (session, queue) = self.keys[key];
                self.sessions[session].queues[queue].look();
                self.ready.push(key);
            }
        }
        Ok(())
    }

    fn is_idle(&self) -> bool {
        self.sessions.iter().all(|session| session.queues.iter().all(super::session::Queue::is_idle))
    }
}

/// Runs the sessions' loads on the calling thread and says what each did.
pub fn drive(
    sessions: &mut [Session],
    waiting: Waiting,
    timing: Timing,
    edges: &mut dyn Edges,
) -> Result<Vec<Tally>> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut keys = Vec::new();
    for (s, session) in sessions.iter_mut().enumerate() {
        for (q, queue) in session.queues.iter_mut().enumerate() {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&epoll, queue.call.as_ref(), epoll::EventData::new_u64(keys.len() as u64), flags)?;
            queue.look();
            keys.push((s, q));
        }
    }
    let records = sessions.iter().map(|_| Record::new()).collect::<Result<_>>()?;
    let ready = (0..keys.len()).collect();
    let (phase, last_answer) = (Phase::WarmUp, Instant::now());
    let mut driver = Driver { sessions, keys, epoll, ready, records, waiting, phase, last_answer };

    let mut from = Instant::now();
    if matches!(timing, Timing::ToEnd) {
        edges.begin()?;
        driver.phase = Phase::Measured;
        from = Instant::now();
    }
    for &(session, queue) in &driver.keys {
        driver.sessions[session].queues[queue].start()?;
    }
    let start = Instant::now();
    let mut elapsed = Duration::ZERO;
    let mut rounds = 0;
    loop {
        let answers = driver.round()?;
        // The clock is looked at where something happened, and otherwise now and then.
        rounds += 1;
        let others = driver.keys.len() > 1 && rounds % ROUNDS_WITHOUT_EPOLL == 0;
        let sleeps = waiting == Waiting::Sleeping && (driver.ready.is_empty() || others);
        if sleeps && !driver.is_idle() {
            driver.sleep()?;
        }
        if answers == 0 && !sleeps && rounds % 1024 != 0 {
            continue;
        }
        let now = Instant::now();
        if answers > 0 {
            driver.last_answer = now;
        } else if now.duration_since(driver.last_answer) > PATIENCE {
            bail!("the backend has not answered for {PATIENCE:?}");
        }
        match (driver.phase, timing) {
            (Phase::WarmUp, Timing::For { warm_up, .. }) if now.duration_since(start) >= warm_up => {
                edges.begin()?;
                driver.phase = Phase::Measured;
                from = Instant::now();
            }
            (Phase::Measured, Timing::For { measured, .. }) if now.duration_since(from) >= measured => {
                elapsed = now.duration_since(from);
                edges.end()?;
                driver.phase = Phase::Ending;
            }
            (Phase::Measured, Timing::ToEnd) if driver.is_idle() => {
                elapsed = now.duration_since(from);
                edges.end()?;
                break;
            }
            (Phase::Ending, _) if driver.is_idle() => break,
            _ => {}
        }
    }
    ensure!(!elapsed.is_zero(), "nothing was measured");
    let records = std::mem::take(&mut driver.records);
    Ok(records.into_iter().map(|r| Tally { latencies: r.latencies, bytes: r.bytes, elapsed }).collect())
}
