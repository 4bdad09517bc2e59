// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The progress of a job on standard error: a bar on a terminal, elsewhere a line for each new state.

use std::io::{self, IsTerminal};
use std::time::Duration;

use control_client::{Millis, Output, eprint_line, has_colour, printable, word};
use indicatif::{ProgressBar, ProgressStyle};
use vssd_protocol::control::{JobInfo, JobState};

#[derive(Debug)]
pub(crate) struct Progress<'a> {
    out: &'a Output,
    bar: Option<ProgressBar>,
    last_state: Option<JobState>,
}

impl<'a> Progress<'a> {
    pub(crate) fn new(out: &'a Output, job: &JobInfo) -> Self {
        let silent = out.quiet || out.json;
        let bar = (!silent && io::stderr().is_terminal() && !job.state.is_final()).then(|| {
            let bar = ProgressBar::new(job.from_bytes.abs_diff(job.target_bytes));
            bar.set_style(bar_style());
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        Self { out, bar, last_state: None }
    }

    pub(crate) fn show(&mut self, job: &JobInfo) {
        if let Some(bar) = &self.bar {
            bar.set_position(moved(job));
            bar.set_prefix(word(&job.state));
            bar.set_message(printable(&numbers(self.out, job)));
        } else if self.last_state != Some(job.state) && !self.out.quiet && !self.out.json {
            eprint_line(&printable(&format!(
                "job {}: {}, {}",
                job.id,
                word(&job.state),
                numbers(self.out, job)
            )));
        }
        self.last_state = Some(job.state);
    }
}

impl Drop for Progress<'_> {
    /// The result takes the place of the bar.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar_style() -> ProgressStyle {
    let template = if has_colour(&io::stderr()) {
        "  {prefix:.cyan} [{bar:24.cyan}] {elapsed}  {wide_msg}"
    } else {
        "  {prefix} [{bar:24}] {elapsed}  {wide_msg}"
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// Bytes given or taken so far.
fn moved(job: &JobInfo) -> u64 {
    if job.target_bytes < job.from_bytes {
        job.from_bytes.saturating_sub(job.plugged_bytes)
    } else {
        job.plugged_bytes.saturating_sub(job.from_bytes)
    }
}

/// `7.1 GiB of 12 GiB, 410 MiB/s, 12 s left (what it waits for)`; the rate is that of the whole job, so that
/// it does not jump.
fn numbers(out: &Output, job: &JobInfo) -> String {
    let (moved, total) = (moved(job), job.from_bytes.abs_diff(job.target_bytes));
    let mut text = format!("{} of {}", out.size(moved), out.size(total));
    if moved > 0 && job.elapsed_ms > 0 {
        let rate = u128::from(moved) * 1000 / u128::from(job.elapsed_ms);
        let left_ms =
            u128::from(total.saturating_sub(moved)) * u128::from(job.elapsed_ms) / u128::from(moved);
        if let (Ok(rate), Ok(left)) = (u64::try_from(rate), u64::try_from(left_ms)) {
            let left = Millis(left.div_ceil(1000).saturating_mul(1000));
            text = format!("{text}, {}/s, {left} left", out.size(rate));
        }
    }
    if !job.message.is_empty() {
        text = format!("{text} ({})", job.message);
    }
    text
}

#[cfg(test)]
mod tests {
    use control_client::CommonArgs;
    use vssd_protocol::control::JobKind;

    use super::*;

    fn job(from: u64, target: u64, plugged: u64, elapsed_ms: u64) -> JobInfo {
        JobInfo {
            id: 41,
            kind: JobKind::Resize,
            device: "vm2".to_owned(),
            state: JobState::Evacuating,
            from_bytes: from,
            target_bytes: target,
            plugged_bytes: plugged,
            started_ms: 0,
            elapsed_ms,
            deadline_ms: None,
            message: String::new(),
            error: None,
            requested_by_uid: 0,
            requested_by_pid: 1,
        }
    }

    #[test]
    fn progress_counts_what_moved_in_the_direction_of_the_job() {
        assert_eq!(moved(&job(40, 28, 35, 0)), 5);
        assert_eq!(moved(&job(28, 40, 30, 0)), 2);
        // The guest gave blocks of its own accord while it was to get some.
        assert_eq!(moved(&job(28, 40, 20, 0)), 0);
    }

    #[test]
    fn numbers_give_rate_and_time_left_once_something_moved() {
        let out = Output::new(crate::PROGRAM.schema, &CommonArgs::default());
        let gib = 1 << 30;
        assert_eq!(numbers(&out, &job(40 * gib, 28 * gib, 40 * gib, 5000)), "0 B of 12 GiB");
        assert_eq!(
            numbers(&out, &job(40 * gib, 28 * gib, 36 * gib, 8000)),
            "4 GiB of 12 GiB, 512 MiB/s, 16 s left"
        );
        assert_eq!(numbers(&out, &job(0, u64::MAX, 1, u64::MAX)), "1 B of 15.9 EiB");
        let waiting = JobInfo { message: "no driver yet".to_owned(), ..job(5, 5, 5, 10) };
        assert_eq!(numbers(&out, &waiting), "0 B of 0 B (no driver yet)");
    }
}
