// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Experiment 3: how long a large vSSD takes to shrink and to grow, as it is and with the original's small messages.

use std::fmt;

use anyhow::{Result, ensure};
use vssd_protocol::units::ByteCount;
use vssd_tests::guest::Guest;
use vssd_tests::scenario::{self, Disk, Range};
use vssd_tests::scratch::Scratch;

use super::host::{Host, Pool};
use super::lab::Lab;
use super::plots;
use super::progress::Progress;
use super::report::{Section, csv, table};
use crate::meter::Bystanders;
use crate::report::Verdict;
use crate::report::figures::{seconds, times};
use crate::stats::{median, range};

const GIB: u64 = 1 << 30;
/// Others that are busier than this, in processors, make a result a hint.
const DISTURBED: f64 = 0.15;
/// What the original exchanged in one message: 4096 sectors.
const EXCHANGE: u64 = 4096 * 512;

#[derive(Clone, Debug)]
pub(super) struct Plan {
    size: u64,
    block_size: u64,
    /// Sizes to shrink to, in GiB, and to grow back from.
    to_gib: &'static [u64],
    pub(super) rounds: u64,
}

impl Plan {
    pub(super) const FULL: Self =
        Self { size: 32 * GIB, block_size: 64 << 10, to_gib: &[31, 28, 24, 16, 8, 4], rounds: 5 };
    pub(super) const QUICK: Self = Self { to_gib: &[31, 28], rounds: 2, ..Self::FULL };

    /// How many exchanges of the original's size it takes to shrink to a size.
    fn exchanges(&self, to_gib: u64) -> u64 {
        (self.size - to_gib * GIB) / EXCHANGE
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Ours,
    /// With messages of [`EXCHANGE`] bytes.
    Original,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ours => "vssd",
            Self::Original => "2 MiB a message",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Shrink,
    Grow,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shrink => "shrink",
            Self::Grow => "grow",
        })
    }
}

/// One resize.
#[derive(Clone, Debug)]
pub(super) struct Run {
    round: u64,
    to_gib: u64,
    way: Way,
    direction: Direction,
    seconds: f64,
    /// Of the driver, for this.
    messages: u64,
}

#[derive(Clone, Debug)]
pub(super) struct Found {
    runs: Vec<Run>,
    /// Processors that programs kept busy which have no part in it.
    others: f64,
}

/// `count` runs of `length` blocks, spread over `total` so that no two touch: what grows back comes in the same pieces.
fn runs_apart(total: u64, length: u64, count: u64) -> Result<Vec<Range>> {
    ensure!(
        count > 0 && total / count > length,
        "{count} runs of {length} blocks do not lie apart on {total}"
    );
    Ok((0..count).map(|at| (at * total / count, length)).collect())
}

pub(super) fn run(lab: &Lab, plan: &Plan) -> Result<Found> {
    let mut progress = Progress::new("resize", 2 * plan.rounds * plan.to_gib.len() as u64 + 1);
    progress.step("a guest with two disks boots");
    let scratch = lab.scratch()?;
    let disk = Scratch::on_disk()?;
    let host = |name: &str, options: &[&str]| {
        Host::new(&scratch.join(name), Pool::WithSsd(&disk.join(name)), plan.size, plan.block_size, options)
    };
    let mut hosts = [(Way::Ours, host("a", &[])?), (Way::Original, host("b", &["--max-ranges=1"])?)];
    let sockets = hosts.each_ref().map(|(_, host)| host.socket());
    let (mut guest, disks) = lab.boot(&[&sockets[0], &sockets[1]])?;
    let mut runs = Vec::new();
    let [(_, first), (_, second)] = &mut hosts;
    let bystanders = Bystanders::watch(vec![first.pid()?, second.pid()?, guest.pid()])?;
    for round in 0..plan.rounds {
        for to_gib in plan.to_gib {
            for ((way, host), disk) in hosts.iter_mut().zip(&disks) {
                progress.step(&format!("{way}: to {to_gib} GiB and back"));
                let hints =
                    runs_apart(disk.total_blocks, EXCHANGE / plan.block_size, plan.exchanges(*to_gib))?;
                disk.hint(&mut guest, &hints)?;
                for (direction, bytes) in [(Direction::Shrink, to_gib * GIB), (Direction::Grow, plan.size)] {
                    let before = sent(&mut guest, disk)?;
                    let took = host.resize(bytes)?;
                    let messages = sent(&mut guest, disk)? - before;
                    // Else what is compared with is something else than the original's exchange.
                    ensure!(
                        *way == Way::Ours || messages >= plan.exchanges(*to_gib),
                        "{direction} to or from {to_gib} GiB took {messages} messages, though none should carry more than {}",
                        ByteCount(EXCHANGE)
                    );
                    let seconds = took.as_secs_f64();
                    runs.push(Run { round, to_gib: *to_gib, way: *way, direction, seconds, messages });
                }
            }
        }
    }
    let others = bystanders.cores()?;
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    hosts.into_iter().try_for_each(|(_, host)| host.finish())?;
    Ok(Found { runs, others })
}

/// Messages that the driver has sent.
fn sent(guest: &mut Guest, disk: &Disk) -> Result<u64> {
    scenario::number(&disk.status(guest)?, "messages")
}

/// All resizes of one kind.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Series {
    median: f64,
    low: f64,
    high: f64,
    /// Of the median run.
    messages: f64,
}

impl Series {
    fn of(runs: &[Run], to_gib: u64, way: Way, direction: Direction) -> Self {
        let those =
            || runs.iter().filter(|run| run.to_gib == to_gib && run.way == way && run.direction == direction);
        let seconds: Vec<f64> = those().map(|run| run.seconds).collect();
        let messages: Vec<f64> = those().map(|run| run.messages as f64).collect();
        let (low, high) = range(&seconds);
        Self { median: median(&seconds), low, high, messages: median(&messages) }
    }

    fn shown(self) -> String {
        format!("{} ({} to {})", seconds(self.median), seconds(self.low), seconds(self.high))
    }
}

pub(super) fn section(plan: &Plan, found: &Found) -> Result<Section> {
    let runs = &found.runs;
    let of = |to_gib, way, direction| Series::of(runs, to_gib, way, direction);
    let mut verdicts = Vec::new();
    let mut rows = Vec::new();
    for direction in [Direction::Shrink, Direction::Grow] {
        let mut ratios = Vec::new();
        for to_gib in plan.to_gib {
            let (ours, original) = (of(*to_gib, Way::Ours, direction), of(*to_gib, Way::Original, direction));
            let ratio = original.median / ours.median;
            ratios.push(ratio);
            let what = if direction == Direction::Shrink { "shrink to" } else { "grow from" };
            rows.push(vec![
                format!("{what} {to_gib} GiB"),
                ours.shown(),
                format!("{:.0}", ours.messages),
                original.shown(),
                format!("{:.0}", original.messages),
                times(ratio),
            ]);
        }
        let (least, most) = range(&ratios);
        verdicts.push(Verdict::of(
            format!(
                "{direction}: time with 2 MiB a message ÷ time of vssd, smallest and largest of all sizes"
            ),
            format!("{} to {}", times(least), times(most)),
            format!("> {}", times(1.0)),
            least > 1.0,
        ));
    }
    let grow_to_shrink = |way| {
        let ratios: Vec<f64> = plan
            .to_gib
            .iter()
            .map(|to| of(*to, way, Direction::Grow).median / of(*to, way, Direction::Shrink).median)
            .collect();
        (median(&ratios), range(&ratios).1)
    };
    for way in [Way::Ours, Way::Original] {
        let (middle, most) = grow_to_shrink(way);
        verdicts.push(Verdict::info(
            format!("{way}: time to grow ÷ time to shrink, median and largest of all sizes"),
            format!("{}, {}", times(middle), times(most)),
        ));
    }
    let exchange = |direction| {
        let all: Vec<f64> = plan
            .to_gib
            .iter()
            .map(|to| of(*to, Way::Original, direction))
            .map(|series| series.median / series.messages)
            .collect();
        seconds(median(&all))
    };
    verdicts.push(Verdict::info(
        "processors that other programs kept busy meanwhile",
        format!("{:.2}{}", found.others, if found.others > DISTURBED { ": disturbed" } else { "" }),
    ));
    let (middle, _) = grow_to_shrink(Way::Ours);
    let text = format!(
        "A vSSD of {size} with blocks of {block} shrinks to each size and grows back, from the operator's call to the end of its job. \
         Medians of {rounds} (smallest to largest). It holds no data; what a shrink does with data, zeroing it, is done after the answer, which \
         waits for nothing of it. The pool's journal is in NV-RAM, its blocks are those of a sparse file that stands for an SSD; no block is ever written.\n\n\
         The original exchanged 4096 sectors, {exchange_size}, in a message. Its exchange is emulated by a second daemon, whose disk the same guest \
         has beside the first: it takes one range of blocks a message (`--max-ranges=1`), and both disks get the same hints, runs of {exchange_size} \
         that do not touch, so that each run is a message, on the way out and on the way back. Everything else, driver and daemon, is the same, and \
         both take turns. The emulation flatters the original: a message here names one run of blocks, not 4096 sectors, and the extra step of the original's \
         grow is left out.\n\n\
         {table}\nThe median exchange of {exchange_size} took {shrink_each} in a shrink and {grow_each} in a grow. The original's grow took far longer than its \
         shrink; here growing takes {middle} the time of shrinking. Processors of the guest are emulated where the machine has no working KVM (see \
         the head of this report): compare times of one column with those of the other, not with those of another machine.\n\n\
         ![Time to shrink and to grow](resize.svg)\n\nData: [resize.csv](resize.csv).",
        size = ByteCount(plan.size),
        block = ByteCount(plan.block_size),
        rounds = plan.rounds,
        exchange_size = ByteCount(EXCHANGE),
        table = table(&["", "vssd", "messages", "2 MiB a message", "messages", "ratio"], &rows),
        shrink_each = exchange(Direction::Shrink),
        grow_each = exchange(Direction::Grow),
        middle = times(middle),
    );
    let lines = runs.iter().map(|run| {
        format!(
            "{},{},{},{},{:.6},{}",
            run.round, run.to_gib, run.way, run.direction, run.seconds, run.messages
        )
    });
    let panels = [Direction::Shrink, Direction::Grow].map(|direction| {
        [Way::Ours, Way::Original].map(|way| {
            plan.to_gib
                .iter()
                .map(|to| {
                    let series = of(*to, way, direction);
                    plots::Spread { x: *to as f64, low: series.low, middle: series.median, high: series.high }
                })
                .collect::<Vec<_>>()
        })
    });
    Ok(Section {
        title: format!("3. Time to shrink and to grow {}", ByteCount(plan.size)),
        text,
        verdicts,
        files: vec![
            ("resize.svg", plots::resize(&ByteCount(plan.size).to_string(), &panels)?),
            ("resize.csv", csv("round,gib,way,direction,seconds,messages", lines)),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_of_the_plan_is_reached_in_runs_that_do_not_touch() {
        let plan = Plan::FULL;
        let (total, length) = (plan.size / plan.block_size, EXCHANGE / plan.block_size);
        for to_gib in plan.to_gib {
            let runs = runs_apart(total, length, plan.exchanges(*to_gib)).unwrap();
            assert_eq!(scenario::blocks(&runs) * plan.block_size, plan.size - to_gib * GIB);
            assert_eq!(scenario::normal(runs.clone()), runs, "merged: some touch");
            assert!(runs.last().unwrap().0 + length <= total);
        }
        assert!(runs_apart(64, 32, 2).is_err() && runs_apart(64, 32, 0).is_err());
    }

    fn found(ours: f64, original: f64) -> Found {
        let mut all = Vec::new();
        for to_gib in Plan::QUICK.to_gib {
            for direction in [Direction::Shrink, Direction::Grow] {
                for (way, seconds, messages) in [(Way::Ours, ours, 1), (Way::Original, original, 512)] {
                    for (round, factor) in [(0, 1.0), (1, 3.0), (2, 2.0)] {
                        let seconds = seconds * factor;
                        all.push(Run { round, to_gib: *to_gib, way, direction, seconds, messages });
                    }
                }
            }
        }
        Found { runs: all, others: 0.5 }
    }

    #[test]
    fn medians_are_compared_and_being_slower_than_the_original_is_a_miss() {
        let faster = section(&Plan::QUICK, &found(0.01, 1.0)).unwrap();
        assert!(faster.verdicts.iter().all(|verdict| verdict.pass != Some(false)));
        assert_eq!(faster.verdicts[0].reached, "100 × to 100 ×");
        assert!(faster.text.contains("20.0 ms (10.0 ms to 30.0 ms)"), "{}", faster.text);
        assert!(faster.verdicts[4].reached.ends_with("disturbed"), "{:?}", faster.verdicts);
        let slower = section(&Plan::QUICK, &found(0.02, 0.01)).unwrap();
        assert_eq!(slower.verdicts[0].pass, Some(false));
        assert_eq!(slower.verdicts[1].pass, Some(false));
    }
}
