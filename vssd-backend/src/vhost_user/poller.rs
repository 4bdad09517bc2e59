// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How long a worker looks for work before it goes to sleep.
//!
//! Waking a sleeping thread takes longer than a request on NV-RAM, so a worker that expects work soon looks for it
//! instead. What it may spend on that follows from what it met: the window doubles each time work came soon after it went to
//! sleep, halves each time work let itself be waited for, and so decays to nothing where nobody asks. When even the longest
//! window was looked through in vain although work came right after it, the driver most likely needs this very processor; then
//! looking pauses, twice as long each time.
//!
//! Pure: durations in, durations out.

use std::time::Duration;

const FIRST_WINDOW: Duration = Duration::from_micros(4);
const FIRST_PAUSE: u32 = 16;
const LONGEST_PAUSE: u32 = 1 << 14;

/// See the module's text.
#[derive(Debug)]
pub struct Poller {
    longest: Duration,
    window: Duration,
    /// Sleeps for which no look is taken.
    skip: u32,
    /// How many the next pause skips.
    pause: u32,
}

impl Poller {
    /// `longest` is the longest window; zero means never to look.
    pub fn new(longest: Duration) -> Self {
        Self { longest, window: Duration::ZERO, skip: 0, pause: FIRST_PAUSE }
    }

    pub fn is_on(&self) -> bool {
        !self.longest.is_zero()
    }

    /// How long to look before the sleep that is due.
    pub fn window(&self) -> Duration {
        if self.skip > 0 { Duration::ZERO } else { self.window }
    }

    /// There was work within the window.
    pub fn found(&mut self) {
        self.pause = FIRST_PAUSE;
    }

    /// There was none; it came after a sleep of `slept`.
    pub fn slept(&mut self, slept: Duration) {
        if !self.is_on() {
            return;
        }
        if self.skip > 0 {
            self.skip -= 1;
        } else if slept > self.longest {
            self.window /= 2;
            if self.window < FIRST_WINDOW {
                self.window = Duration::ZERO;
            }
        } else if self.window < self.longest {
            self.window = (self.window * 2).max(FIRST_WINDOW).min(self.longest);
        } else {
            self.window = Duration::ZERO;
            self.skip = self.pause;
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(50);
    const SOON: Duration = Duration::from_micros(20);
    const LATE: Duration = Duration::from_millis(1);

    #[test]
    fn window_grows_while_work_comes_soon_and_decays_to_nothing_when_it_does_not() {
        let mut poller = Poller::new(LONGEST);
        assert_eq!(poller.window(), Duration::ZERO);
        let grown: Vec<_> = std::iter::repeat_with(|| {
            poller.slept(SOON);
            poller.window()
        })
        .take_while(|window| *window < LONGEST)
        .collect();
        assert_eq!(grown, [4, 8, 16, 32].map(Duration::from_micros));
        assert_eq!(poller.window(), LONGEST);
        poller.found();
        assert_eq!(poller.window(), LONGEST);
        let decay: Vec<_> = std::iter::repeat_with(|| {
            poller.slept(LATE);
            poller.window()
        })
        .take_while(|window| !window.is_zero())
        .collect();
        assert_eq!(decay.len(), 3);
        poller.slept(LATE);
        assert_eq!(poller.window(), Duration::ZERO);
    }

    #[test]
    fn looking_in_vain_for_the_longest_window_pauses_ever_longer() {
        let mut poller = Poller::new(LONGEST);
        let mut looked = 0u32;
        let sleeps = 10_000;
        for _ in 0..sleeps {
            looked += u32::from(!poller.window().is_zero());
            poller.slept(SOON);
        }
        assert!(looked < 60, "{looked} looks in {sleeps} sleeps");
        // A success ends the distrust: the next pause is a short one again.
        poller.found();
        assert_eq!(poller.pause, FIRST_PAUSE);
    }

    #[test]
    fn poller_that_is_off_never_looks() {
        let mut poller = Poller::new(Duration::ZERO);
        for slept in [SOON, Duration::ZERO, LATE] {
            poller.slept(slept);
            assert_eq!(poller.window(), Duration::ZERO);
        }
    }
}
