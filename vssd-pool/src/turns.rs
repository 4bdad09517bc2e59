// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Whose turn it is on a processor that threads share.
//!
//! Threads that guests wait for take short turns ([`set_short`]). Linux 6.12 and later give the processor to the runnable thread
//! whose turn ends first, and the shorter a thread's turns are, the sooner they end (EEVDF; `sched_setattr(2)`, `sched_runtime`), so
//! one that wakes up goes before one that works in the background. Shares stay what they were. Older kernels do not look at it.
//!
//! Threads that work in the background do so at a [`Pace`] that offers the processor to others often.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

/// The shortest turn that the kernel accepts.
const SHORT: Duration = Duration::from_micros(100);

/// How a thread works that nobody waits for within milliseconds: it gives the processor away between small pieces. Never to be used
/// where a lock is held that a lane may want.
#[derive(Debug)]
pub struct Pace {
    /// Since when it has worked without a break.
    since: Cell<Instant>,
    /// Until when it does not give way.
    keeps_on_until: Cell<Instant>,
    /// Blocks looked at since the clock was.
    blocks: Cell<u32>,
}

impl Pace {
    /// What a request that comes to the same processor may have to wait for.
    const PIECE: Duration = Duration::from_micros(5);
    /// Between looks at the clock.
    const BLOCKS: u32 = 64;
    /// A worker gives the processor back sooner. What keeps it for longer is a stranger that has always work, and the more
    /// often one gives way to it, the slower one gets.
    const LONG_GONE: Duration = Duration::from_micros(300);
    /// After that, so many times as long as it took it does not give way.
    const KEEPS_ON: u32 = 20;

    /// To be called between pieces of work of unknown size.
    pub fn breathe(&self) {
        let now = Instant::now();
        let worked = now.duration_since(self.since.get());
        if worked < Self::PIECE || now < self.keeps_on_until.get() {
            return;
        }
        std::thread::yield_now();
        let back = Instant::now();
        self.since.set(back);
        let gone = back.duration_since(now);
        if gone > Self::LONG_GONE {
            self.keeps_on_until.set(back + gone * Self::KEEPS_ON);
        }
    }

    /// To be called when so many blocks were looked at or changed.
    pub fn did(&self, blocks: u32) {
        let done = self.blocks.get() + blocks;
        if done < Self::BLOCKS {
            self.blocks.set(done);
        } else {
            self.blocks.set(0);
            self.breathe();
        }
    }

    /// To be called after a sleep.
    pub fn has_slept(&self) {
        self.since.set(Instant::now());
    }
}

impl Default for Pace {
    fn default() -> Self {
        let now = Instant::now();
        Self { since: Cell::new(now), keeps_on_until: Cell::new(now), blocks: Cell::new(0) }
    }
}

/// Lets the calling thread take short turns. One that was given another policy than the ordinary ones keeps it as it is.
///
/// A thread can do without: a refusal is only logged.
pub fn set_short() {
    if let Err(error) = try_set(SHORT) {
        tracing::debug!(%error, "the length of a thread's turns cannot be set");
    }
}

fn try_set(slice: Duration) -> io::Result<()> {
    #[allow(clippy::cast_possible_truncation, reason = "a few dozen bytes")]
    const SIZE: u32 = size_of::<libc::sched_attr>() as u32;
    let mut attr = libc::sched_attr {
        size: SIZE,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel writes at most SIZE bytes, the size of the structure.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, SIZE, 0) })?;
    if ![libc::SCHED_OTHER, libc::SCHED_BATCH].contains(&attr.sched_policy.cast_signed()) {
        return Ok(());
    }
    attr.size = SIZE;
    attr.sched_runtime = u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX);
    // SAFETY: the kernel reads the structure, whose size it is told.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) })
}

fn check(outcome: libc::c_long) -> io::Result<()> {
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pace_gives_way_after_a_piece_of_work_and_not_after_each_block() {
        let pace = Pace::default();
        let since = pace.since.get();
        pace.did(Pace::BLOCKS - 1);
        assert_eq!(pace.since.get(), since, "too little to look at the clock");
        while since.elapsed() < Pace::PIECE {}
        pace.did(1);
        assert!(pace.since.get() > since, "it gave way");
        let until = Instant::now() + Duration::from_secs(60);
        pace.keeps_on_until.set(until);
        let since = pace.since.get();
        while since.elapsed() < Pace::PIECE {}
        pace.breathe();
        assert_eq!(
            (pace.since.get(), pace.keeps_on_until.get()),
            (since, until),
            "a stranger had the processor"
        );
    }

    #[test]
    fn thread_of_the_ordinary_policy_may_set_its_turns() {
        std::thread::spawn(|| {
            try_set(SHORT).unwrap();
            try_set(SHORT * 9).unwrap();
        })
        .join()
        .unwrap();
    }
}
