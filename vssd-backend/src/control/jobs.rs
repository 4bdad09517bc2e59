// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The register of jobs: all that run, and the last [`KEPT`] that have ended.
//!
//! It is told what became of a job and tells operators; it decides nothing.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use control_server::Clock;
use vssd_protocol::control::JobInfo;
use vssd_protocol::units::BlockSize;

use super::negotiation::JobView;

/// How many ended jobs are kept.
pub const KEPT: usize = 256;

#[derive(Debug)]
struct Record {
    device: String,
    block_size: BlockSize,
    view: JobView,
}

/// All jobs that are known.
#[derive(Debug, Default)]
pub struct Jobs {
    last: u64,
    records: BTreeMap<u64, Record>,
    ended: VecDeque<u64>,
    changed: BTreeSet<u64>,
}

impl Jobs {
    /// A number for a new job.
    pub fn next_id(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Notes a change worth showing.
    pub fn update(&mut self, device: &str, block_size: BlockSize, view: JobView) {
        let id = view.id;
        if view.state.is_final() {
            self.ended.push_back(id);
            if self.ended.len() > KEPT
                && let Some(oldest) = self.ended.pop_front()
            {
                self.records.remove(&oldest);
            }
        }
        self.changed.insert(id);
        self.records.insert(id, Record { device: device.to_owned(), block_size, view });
    }

    /// Keeps the size of a running job up to date without waking those who wait for a change.
    pub fn set_plugged(&mut self, id: u64, plugged: u32) {
        if let Some(record) = self.records.get_mut(&id) {
            record.view.plugged = plugged;
        }
    }

    /// Which jobs changed since the last call.
    pub fn take_changed(&mut self) -> BTreeSet<u64> {
        std::mem::take(&mut self.changed)
    }

    pub fn info(&self, id: u64, clock: &Clock) -> Option<JobInfo> {
        let Record { device, block_size, view } = self.records.get(&id)?;
        let until = view.ended_ms.unwrap_or_else(|| clock.now_ms());
        Some(JobInfo {
            id,
            kind: view.kind,
            device: device.clone(),
            state: view.state,
            from_bytes: block_size.bytes_of(view.from),
            target_bytes: block_size.bytes_of(view.target),
            plugged_bytes: block_size.bytes_of(view.plugged),
            started_ms: clock.unix_ms(view.started_ms),
            elapsed_ms: until.saturating_sub(view.started_ms),
            deadline_ms: view.deadline_ms,
            message: view.message.clone(),
            error: view.error,
            requested_by_uid: view.actor.uid,
            requested_by_pid: view.actor.pid,
        })
    }

    /// All jobs, oldest first.
    pub fn list(&self, clock: &Clock) -> Vec<JobInfo> {
        self.records.keys().filter_map(|id| self.info(*id, clock)).collect()
    }
}

#[cfg(test)]
mod tests {
    use vssd_protocol::control::{JobKind, JobState};

    use super::*;
    use crate::control::negotiation::Actor;

    fn view(id: u64, state: JobState) -> JobView {
        JobView {
            id,
            kind: JobKind::Resize,
            state,
            from: 4,
            target: 2,
            plugged: 3,
            started_ms: 0,
            ended_ms: state.is_final().then_some(5),
            deadline_ms: None,
            message: String::new(),
            error: None,
            actor: Actor { uid: 1, pid: 2 },
        }
    }

    #[test]
    fn oldest_ended_jobs_are_forgotten_running_ones_never() {
        let mut jobs = Jobs::default();
        let clock = Clock::start();
        let running = jobs.next_id();
        jobs.update("vm1", BlockSize::DEFAULT, view(running, JobState::Offered));
        for _ in 0..=KEPT {
            let id = jobs.next_id();
            jobs.update("vm2", BlockSize::DEFAULT, view(id, JobState::Done));
        }
        assert_eq!(jobs.list(&clock).len(), KEPT + 1);
        assert!(jobs.info(running, &clock).is_some());
        assert!(jobs.info(2, &clock).is_none() && jobs.info(3, &clock).is_some());
    }

    #[test]
    fn ended_job_stands_still() {
        let mut jobs = Jobs::default();
        let clock = Clock::start();
        jobs.update("vm1", BlockSize::DEFAULT, view(1, JobState::Done));
        let info = jobs.info(1, &clock).unwrap();
        assert_eq!((info.elapsed_ms, info.plugged_bytes), (5, 3 * 65536));
        assert_eq!(jobs.take_changed().into_iter().collect::<Vec<_>>(), [1]);
        assert!(jobs.take_changed().is_empty());
    }
}
