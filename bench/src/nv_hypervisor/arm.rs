// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One arm: a database under load, a power cut, and what follows until it serves at full speed again.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Plan;
use super::database::Database;
use super::host::{Host, Memory};
use super::news::Word;
use super::rates::{self, Point};

/// How long there is no power.
pub(super) const DARK: Duration = Duration::from_secs(5);
/// A step of an emulated guest on a busy machine.
const STEP: Duration = Duration::from_secs(240);

/// What was measured. Times are the host's; seconds of what is drawn count from the cut.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    /// From the power event to the end of the save; only with NV-RAM.
    pub(super) save: Option<f64>,
    /// Both daemons, without the VM.
    pub(super) daemons: f64,
    /// Until the VM's processors run.
    pub(super) qemu: f64,
    /// Until the guest can be spoken to; only of one that boots.
    pub(super) boot: Option<f64>,
    /// From then to the first transaction that was acknowledged.
    pub(super) recovery: f64,
    /// From then to full speed; nothing if that was not reached while it was watched.
    pub(super) warm_up: Option<f64>,
    /// The power's return, in seconds after the cut.
    pub(super) back: f64,
    /// Transactions a second before the cut, median.
    pub(super) before: f64,
    /// Updates acknowledged before the cut, and how many of them were not there after it.
    pub(super) acknowledged: u64,
    pub(super) lost: u64,
    /// Whether the load's connections went on.
    pub(super) connected: bool,
    /// Processors that programs without a part in it kept busy, before the cut and since the first answer.
    pub(super) others: [f64; 2],
    pub(super) rates: Vec<Point>,
    /// Seconds and number of each acknowledged update.
    pub(super) ledger: Vec<(f64, u64)>,
}

impl Outcome {
    /// From the power's return to the first answer.
    pub(super) fn first_answer(&self) -> f64 {
        self.daemons + self.qemu + self.boot.unwrap_or(0.0) + self.recovery
    }

    /// From the power's return to full speed.
    pub(super) fn full_speed(&self) -> Option<f64> {
        Some(self.first_answer() + self.warm_up?)
    }
}

/// Carries an arm out on a copy of `pool`.
pub(super) fn run(database: &Database, pool: &Path, memory: Memory, plan: &Plan) -> Result<Outcome> {
    let mut host = Host::new(Some(pool))?;
    host.switch_on()?;
    host.define(&database.image, memory)?;
    host.start_vm()?;
    host.wait_guest()?;
    let begun = Instant::now();
    host.script("run warm")?;
    host.news.wait_step("warm", begun, STEP)?;
    let bystanders = host.bystanders()?;
    host.news.listen_for(plan.load)?;
    let others_before = bystanders.cores()?;

    let event = Instant::now();
    let mut save = None;
    if memory == Memory::Nvram {
        host.fail_power()?;
        save = Some(event.elapsed().as_secs_f64());
    }
    host.cut_power()?;
    let cut = Instant::now();
    let last = host.news.heard().iter().rev();
    let acknowledged = last
        .clone()
        .find_map(|(_, word)| if let Word::Acknowledged(n) = word { Some(*n) } else { None })
        .context("no update was acknowledged before the cut")?;
    let load_ran = last
        .clone()
        .find_map(|(_, word)| if let Word::Rate { runs, .. } = word { Some(*runs) } else { None })
        .context("the load did not run before the cut")?;
    std::thread::sleep(DARK);

    let back = Instant::now();
    host.switch_on()?;
    let on = back.elapsed().as_secs_f64();
    let (daemons, qemu, boot);
    if memory == Memory::Nvram {
        let vm = host.show()?;
        ensure!(vm["state"] == "running", "{vm}");
        qemu = vm["last_restore_us"].as_f64().context("no time of the restore")? / 1e6;
        (daemons, boot) = (on - qemu, None);
    } else {
        daemons = on;
        qemu = host.start_vm()?.as_secs_f64();
        let started = Instant::now();
        host.wait_guest()?;
        boot = Some(started.elapsed().as_secs_f64());
        host.script("run")?;
    }
    let first = host.news.listen(STEP, |heard| {
        heard.iter().find_map(|(at, word)| match word {
            Word::Acknowledged(n) if *at > back => Some((*at, *n)),
            _ => None,
        })
    })?;
    let (answered, number) = first.context("the database does not answer after the cut")?;

    let bystanders = host.bystanders()?;
    let since = |at: Instant| {
        // Before the cut is negative.
        at.checked_duration_since(cut).map_or_else(|| -(cut - at).as_secs_f64(), |time| time.as_secs_f64())
    };
    let points = |heard: &[(Instant, Word)]| -> Vec<Point> {
        let rate = |(at, word): &(Instant, Word)| match word {
            Word::Rate { tps, .. } => Some(Point { at: since(*at), tps: *tps }),
            _ => None,
        };
        heard.iter().filter_map(rate).collect()
    };
    let before = rates::before(&points(host.news.heard()), plan.median);
    let first_second = since(answered);
    // A second can be reported just before the ledger is answered.
    let full = host
        .news
        .listen(plan.patience, |heard| rates::full_speed(&points(heard), since(back), before))?
        .map(|at| at.max(first_second));
    host.news.listen_for(plan.after)?;
    let others = [others_before, bystanders.cores()?];

    let heard = host.news.heard();
    // A load that began anew counts from zero.
    let runs_after = heard.iter().find_map(|(at, word)| match word {
        Word::Rate { runs, .. } if *at > back => Some(*runs),
        _ => None,
    });
    let outcome = Outcome {
        save,
        daemons,
        qemu,
        boot,
        recovery: first_second - since(back) - daemons - qemu - boot.unwrap_or(0.0),
        warm_up: full.map(|at| at - first_second),
        back: since(back),
        before,
        acknowledged,
        lost: rates::lost(acknowledged, number),
        connected: runs_after.is_some_and(|runs| runs > load_ran),
        others,
        rates: points(heard),
        ledger: heard
            .iter()
            .filter_map(|(at, word)| match word {
                Word::Acknowledged(n) => Some((since(*at), *n)),
                _ => None,
            })
            .collect(),
    };
    host.finish()?;
    Ok(outcome)
}
