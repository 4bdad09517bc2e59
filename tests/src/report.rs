// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One line for each thing shown: `PASS name … detail`.

use std::fmt::Display;
use std::time::Instant;

use anyhow::{Result, bail};

/// Collects the outcome of a scenario's checks and prints each as it comes.
#[derive(Debug)]
pub struct Report {
    title: String,
    started: Instant,
    passed: usize,
    failed: Vec<String>,
}

impl Report {
    /// A report with nothing in it yet.
    pub fn new(title: &str) -> Self {
        println!("---- {title}");
        Self { title: title.to_owned(), started: Instant::now(), passed: 0, failed: Vec::new() }
    }

    /// Records something that holds.
    pub fn pass(&mut self, name: &str, detail: impl Display) {
        self.passed += 1;
        println!("PASS {name} … {detail}");
    }

    /// Records something that does not hold; the scenario goes on.
    pub fn fail(&mut self, name: &str, detail: impl Display) {
        println!("FAIL {name} … {detail}");
        self.failed.push(name.to_owned());
    }

    /// Records whether `holds`.
    pub fn check(&mut self, name: &str, holds: bool, detail: impl Display) {
        if holds {
            self.pass(name, detail);
        } else {
            self.fail(name, detail);
        }
    }

    /// Records the outcome of a step.
    pub fn outcome<T: Display>(&mut self, name: &str, outcome: Result<T>) {
        match outcome {
            Ok(detail) => self.pass(name, detail),
            Err(error) => self.fail(name, format!("{error:#}")),
        }
    }

    /// Prints the count; an error if anything failed or nothing was checked.
    pub fn finish(self) -> Result<()> {
        println!(
            "---- {}: {} passed, {} failed, {:.1} s",
            self.title,
            self.passed,
            self.failed.len(),
            self.started.elapsed().as_secs_f64()
        );
        if !self.failed.is_empty() {
            bail!("{}: failed: {}", self.title, self.failed.join(", "));
        }
        if self.passed == 0 {
            bail!("{}: nothing was checked", self.title);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failed_check_fails_the_report_by_name() {
        let mut report = Report::new("demo");
        report.check("first", true, "");
        report.check("second", false, "broken");
        let error = report.finish().unwrap_err().to_string();
        assert!(error.contains("second") && !error.contains("first"), "{error}");
    }

    #[test]
    fn a_report_without_checks_is_a_failure() {
        assert!(Report::new("empty").finish().is_err());
    }
}
