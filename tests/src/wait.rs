// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Waiting for a condition with a limit, instead of sleeping and hoping.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at. Guests under emulation are slow; looking more often only takes from them.
const STEP: Duration = Duration::from_millis(10);

/// A moment after which waiting is given up.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    start: Instant,
    limit: Duration,
}

impl Deadline {
    /// `limit` from now.
    pub fn after(limit: Duration) -> Self {
        Self { start: Instant::now(), limit }
    }

    /// `seconds` from now.
    pub fn secs(seconds: u64) -> Self {
        Self::after(Duration::from_secs(seconds))
    }

    /// Time left; zero when it is over.
    pub fn left(&self) -> Duration {
        self.limit.saturating_sub(self.start.elapsed())
    }

    /// Whether it is over.
    pub fn passed(&self) -> bool {
        self.left().is_zero()
    }

    /// Time since the deadline was set.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Calls `look` until it gives a value; an error ends the wait. `what` completes "waited 5 s for …".
    pub fn poll<T>(&self, what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        loop {
            if let Some(found) = look()? {
                return Ok(found);
            }
            if self.passed() {
                bail!("waited {:.1} s for {what}", self.limit.as_secs_f64());
            }
            thread::sleep(STEP.min(self.left()));
        }
    }

    /// As [`Deadline::poll`] for a plain condition.
    pub fn until(&self, what: &str, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
        self.poll(what, || Ok(look()?.then_some(())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_comes_true_ends_the_wait() {
        let mut looks = 0;
        let found = Deadline::secs(5).poll("three looks", || {
            looks += 1;
            Ok((looks == 3).then_some("third"))
        });
        assert_eq!(found.unwrap(), "third");
    }

    #[test]
    fn a_condition_that_stays_false_names_what_was_awaited() {
        let error = Deadline::after(Duration::from_millis(30)).until("the moon", || Ok(false)).unwrap_err();
        assert!(error.to_string().contains("for the moon"), "{error}");
    }
}
