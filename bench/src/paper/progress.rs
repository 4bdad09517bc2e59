// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How far an experiment is, on standard error: a bar on a terminal, elsewhere a line for each step.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

#[derive(Debug)]
pub(super) struct Progress {
    name: &'static str,
    steps: u64,
    done: u64,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Of an experiment of so many steps.
    pub(super) fn new(name: &'static str, steps: u64) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(steps);
            let style =
                ProgressStyle::with_template("  {prefix} [{bar:24}] {pos}/{len} {elapsed}  {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
            bar.enable_steady_tick(Duration::from_millis(250));
            bar.set_prefix(name);
            bar
        });
        Self { name, steps, done: 0, bar }
    }

    /// The next step begins.
    pub(super) fn step(&mut self, what: &str) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.done);
                bar.set_message(what.to_owned());
            }
            None => eprintln!("{} {}/{}: {what}", self.name, self.done + 1, self.steps),
        }
        self.done += 1;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
