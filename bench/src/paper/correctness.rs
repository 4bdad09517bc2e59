// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Experiment 1: after each resize the disk is read from end to end; the reads that fail are exactly those of evicted blocks.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use vssd_protocol::units::ByteCount;
use vssd_tests::scenario::{ENODATA, Range, blocks, normal};

use super::host::{Host, Pool};
use super::lab::Lab;
use super::plots;
use super::progress::Progress;
use super::report::{Section, csv, table};
use crate::report::Verdict;

/// Of the contents of the disk.
const CONTENT: u64 = 0x7357;
/// Of the choice of blocks.
const CHOICE: u64 = 1;

#[derive(Clone, Debug)]
pub(super) struct Plan {
    size: u64,
    block_size: u64,
    /// Blocks to give up at each step; a negative number is a grow by so many.
    steps: [i64; 8],
}

impl Plan {
    pub(super) const FULL: Self =
        Self { size: 1 << 30, block_size: 64 << 10, steps: [16, 256, 1024, -500, 2048, 4000, -6000, -844] };
    /// An eighth of it.
    pub(super) const QUICK: Self =
        Self { size: 128 << 20, block_size: 64 << 10, steps: [2, 32, 128, -62, 256, 500, -750, -106] };
}

/// What was seen after one resize, in blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Step {
    asked: i64,
    /// What the operator has taken so far.
    balloon: u64,
    /// What driver and daemon hold for evicted.
    driver: u64,
    daemon: u64,
    /// Reads that answered ENODATA.
    errors: u64,
    /// Reads that failed otherwise, or gave something else than what was written (or zeroes, of blocks that came back).
    others: u64,
    intact: u64,
    zero: u64,
    /// Whether the failing blocks, those that the driver holds for evicted, those that the daemon holds for evicted and those that were
    /// nominated and not given back are the same ones.
    same: bool,
}

impl Step {
    fn is_exact(&self) -> bool {
        self.same
            && self.others == 0
            && [self.driver, self.daemon, self.errors].iter().all(|n| *n == self.balloon)
    }
}

pub(super) fn run(lab: &Lab, plan: &Plan) -> Result<Vec<Step>> {
    let mut progress = Progress::new("correctness", plan.steps.len() as u64 + 2);
    progress.step("a guest boots and fills its disk");
    let scratch = lab.scratch()?;
    let mut host = Host::new(scratch.path(), Pool::Nvram, plan.size, plan.block_size, &[])?;
    let (mut guest, disks) = lab.boot(&[&host.socket()])?;
    let disk = &disks[0];
    ensure!(disk.total_blocks == plan.size / plan.block_size, "the guest sees another disk: {disk:?}");
    disk.fill(&mut guest, CONTENT, &[(0, disk.total_blocks)])?;

    let mut rng = StdRng::seed_from_u64(CHOICE);
    let mut away: BTreeSet<u64> = BTreeSet::new();
    let mut returned: BTreeSet<u64> = BTreeSet::new();
    let (mut balloon, mut found) = (0i64, Vec::new());
    for asked in std::iter::once(0).chain(plan.steps) {
        progress.step(&format!("{asked:+} blocks, then all are read"));
        let bytes = asked.unsigned_abs() * plan.block_size;
        if asked > 0 {
            let mut plugged: Vec<u64> =
                (0..disk.total_blocks).filter(|block| !away.contains(block)).collect();
            let (chosen, _) = plugged.partial_shuffle(&mut rng, usize::try_from(asked)?);
            disk.hint(&mut guest, &chosen.iter().map(|block| (*block, 1)).collect::<Vec<_>>())?;
            away.extend(chosen.iter());
            host.shrink(bytes)?;
        } else if asked < 0 {
            host.grow(bytes)?;
        }
        balloon += asked;
        let daemon = host.evicted()?;
        if asked < 0 {
            // Which ones come back is the guest's choice, but they must be some of those that went.
            let still = set(&daemon);
            ensure!(still.is_subset(&away), "blocks are evicted that nobody nominated");
            returned.extend(away.difference(&still));
            away = still;
        }
        let driver = normal(disk.evicted(&mut guest)?);
        let scan = disk.scan(&mut guest, CONTENT)?;
        let failing = normal(scan.ranges(ENODATA).to_vec());
        let (errors, intact, zero) = (blocks(&failing), scan.blocks("intact"), scan.blocks("zero"));
        let zeroes_are_due = set(scan.ranges("zero")) == returned.difference(&away).copied().collect();
        found.push(Step {
            asked,
            balloon: u64::try_from(balloon)?,
            driver: blocks(&driver),
            daemon: blocks(&daemon),
            errors,
            // What reads zero without having been away is data lost.
            others: disk.total_blocks - errors - intact - if zeroes_are_due { zero } else { 0 },
            intact,
            zero,
            same: failing == driver && failing == daemon && set(&failing) == away,
        });
    }
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()?;
    Ok(found)
}

fn set(ranges: &[Range]) -> BTreeSet<u64> {
    ranges.iter().flat_map(|(start, count)| *start..start + count).collect()
}

pub(super) fn section(plan: &Plan, steps: &[Step]) -> Result<Section> {
    let exact = steps.iter().filter(|step| step.is_exact()).count();
    let rows: Vec<Vec<String>> = steps
        .iter()
        .map(|step| {
            let numbers =
                [step.balloon, step.driver, step.daemon, step.errors, step.others, step.intact, step.zero];
            let mut row =
                vec![if step.asked == 0 { "as created".into() } else { format!("{:+}", step.asked) }];
            row.extend(numbers.iter().map(u64::to_string));
            row.push(if step.is_exact() { "yes" } else { "**no**" }.into());
            row
        })
        .collect();
    let head = [
        "blocks taken",
        "balloon",
        "evicted (driver)",
        "evicted (daemon)",
        "read errors",
        "other errors",
        "intact",
        "zero",
        "exact",
    ];
    let text = format!(
        "A vSSD of {} with blocks of {}, every block filled with a pattern of its own, is resized with `balloon-ctl` by the numbers of blocks \
         below. Which blocks go is said by hints, drawn at random from those that are left; which come back first, the driver decides. After each \
         step a program in the guest reads the disk from the first block to the last with direct I/O, block by block. A *read error* is a read that \
         ends with ENODATA; *other errors* are reads that fail otherwise, or give anything but the block's pattern, or zeroes where it was away \
         meanwhile. A step is *exact* if the blocks that cannot be read, those the driver and the daemon hold for evicted, and those that were \
         nominated are the same ones, one by one.\n\n{}\n![Read errors against balloon size](correctness.svg)\n\n\
         {exact} of {} steps are exact: {}. Data: [correctness.csv](correctness.csv).",
        ByteCount(plan.size),
        ByteCount(plan.block_size),
        table(&head, &rows),
        steps.len(),
        if exact == steps.len() {
            "no read failed that should not have, and none succeeded that should have failed"
        } else {
            "elsewhere reads failed that should not have, or succeeded that should have failed"
        }
    );
    let lines = steps.iter().map(|s| {
        format!(
            "{},{},{},{},{},{},{},{},{}",
            s.asked,
            s.balloon,
            s.driver,
            s.daemon,
            s.errors,
            s.others,
            s.intact,
            s.zero,
            s.is_exact()
        )
    });
    let points: Vec<(i64, f64, f64)> =
        steps.iter().map(|step| (step.asked, step.balloon as f64, step.errors as f64)).collect();
    Ok(Section {
        title: "1. Correctness: read errors against balloon size".into(),
        text,
        verdicts: vec![Verdict::of(
            "steps after which exactly the evicted blocks answer with an error",
            format!("{exact} of {}", steps.len()),
            "all",
            exact == steps.len(),
        )],
        files: vec![
            ("correctness.svg", plots::correctness(&points)?),
            (
                "correctness.csv",
                csv(
                    "blocks_taken,balloon_blocks,evicted_driver,evicted_daemon,read_errors,other_errors,intact,zero,exact",
                    lines,
                ),
            ),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(asked: i64, balloon: u64, errors: u64) -> Step {
        Step { asked, balloon, driver: balloon, daemon: balloon, errors, same: true, ..Step::default() }
    }

    #[test]
    fn plans_take_blocks_and_give_all_of_them_back() {
        for plan in [Plan::FULL, Plan::QUICK] {
            let mut balloon = 0;
            for step in plan.steps {
                balloon += step;
                assert!((0..i64::try_from(plan.size / plan.block_size).unwrap()).contains(&balloon));
            }
            assert_eq!(balloon, 0);
        }
    }

    #[test]
    fn one_read_error_too_few_or_one_other_error_is_a_miss() {
        let good = section(&Plan::FULL, &[step(0, 0, 0), step(16, 16, 16)]).unwrap();
        assert_eq!(good.verdicts[0].pass, Some(true));
        let missing = section(&Plan::FULL, &[step(0, 0, 0), step(16, 16, 15)]).unwrap();
        assert_eq!((missing.verdicts[0].pass, missing.verdicts[0].reached.as_str()), (Some(false), "1 of 2"));
        let damaged = Step { others: 1, ..step(16, 16, 16) };
        assert_eq!(section(&Plan::FULL, &[damaged]).unwrap().verdicts[0].pass, Some(false));
        let others = Step { same: false, ..step(16, 16, 16) };
        assert_eq!(section(&Plan::FULL, &[others]).unwrap().verdicts[0].pass, Some(false));
    }
}
