// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `cargo xtask demo` shows.

pub mod persistent;
pub mod shrink;

use std::fmt::Display;
use std::time::Instant;

/// Prints each step with the time it took.
struct Steps {
    began: Instant,
    last: Instant,
}

impl Steps {
    fn new() -> Self {
        let now = Instant::now();
        println!("{:>8}  step", "seconds");
        Self { began: now, last: now }
    }

    fn done(&mut self, what: impl Display) {
        println!("{:>8.2}  {what}", self.last.elapsed().as_secs_f64());
        self.last = Instant::now();
    }

    fn end(&self) {
        println!("{:>8.2}  in all", self.began.elapsed().as_secs_f64());
    }
}
