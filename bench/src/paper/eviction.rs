// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Experiment 2: how many of an application's reads are lost when the guest chooses what goes, and how many when the hypervisor does.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use vssd_protocol::units::ByteCount;
use vssd_tests::draw::Bell;
use vssd_tests::guest::Guest;
use vssd_tests::scenario::{Disk, ENODATA, Range, blocks, normal};

use super::host::{Host, Pool};
use super::lab::Lab;
use super::plots::{self, Access, Bin};
use super::progress::Progress;
use super::report::{Section, csv, table};
use crate::report::Verdict;
use crate::report::figures::{share, times};
use crate::stats::{Confidence, confidence};

/// Of the contents of the disk.
const CONTENT: u64 = 0xcac4e;
/// Bars of the plot of accesses.
const BINS: u64 = 128;

#[derive(Clone, Debug)]
pub(super) struct Plan {
    size: u64,
    block_size: u64,
    /// Blocks that the application reads: where most of them lie, and how far around.
    mean: u64,
    sigma: u32,
    /// Bytes that go.
    evict: u64,
    /// Reads of the application, watched and measured.
    reads: u64,
    pub(super) seeds: u64,
}

impl Plan {
    pub(super) const FULL: Self = Self {
        size: 1 << 30,
        block_size: 16 << 10,
        mean: 20_000,
        sigma: 8192,
        evict: 256 << 20,
        reads: 65_536,
        seeds: 10,
    };
    /// An eighth of it.
    pub(super) const QUICK: Self = Self {
        size: 128 << 20,
        block_size: 16 << 10,
        mean: 2500,
        sigma: 1024,
        evict: 32 << 20,
        reads: 8192,
        seeds: 3,
    };

    fn blocks(&self) -> u64 {
        self.size / self.block_size
    }

    fn evicted_blocks(&self) -> u64 {
        self.evict / self.block_size
    }

    fn bell(&self) -> Result<Bell> {
        Bell::new(self.blocks(), self.mean, self.sigma)
    }

    /// The reads that are measured.
    fn real(trial: u64) -> u64 {
        2 * trial
    }

    /// What the application watched before.
    fn watched(trial: u64) -> u64 {
        2 * trial + 1
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manager {
    Guest,
    Hypervisor,
}

impl fmt::Display for Manager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Guest => "guest",
            Self::Hypervisor => "hypervisor",
        })
    }
}

/// One shrink and the reads after it.
#[derive(Clone, Debug)]
struct Trial {
    seed: u64,
    manager: Manager,
    hits: u64,
    misses: u64,
    /// Reads of the same draw that meet a block which the daemon says is evicted.
    expected: u64,
}

impl Trial {
    fn miss_ratio(&self) -> f64 {
        self.misses as f64 / (self.hits + self.misses) as f64
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    trials: Vec<Trial>,
    /// What went in the first trials.
    guest: Vec<Range>,
    hypervisor: Vec<Range>,
}

pub(super) fn run(lab: &Lab, plan: &Plan) -> Result<Found> {
    let mut progress = Progress::new("eviction", 2 * plan.seeds + 1);
    progress.step("a guest boots and fills its disk");
    let bell = plan.bell()?;
    let scratch = lab.scratch()?;
    let mut host = Host::new(scratch.path(), Pool::Nvram, plan.size, plan.block_size, &[])?;
    let (mut guest, disks) = lab.boot(&[&host.socket()])?;
    let disk = &disks[0];
    ensure!(disk.total_blocks == plan.blocks(), "the guest sees another disk: {disk:?}");
    disk.fill(&mut guest, CONTENT, &[(0, disk.total_blocks)])?;

    let mut found = Found::default();
    for seed in 0..plan.seeds {
        // Who is first takes turns, should it matter.
        let mut order = [Manager::Guest, Manager::Hypervisor];
        order.rotate_left(usize::from(seed % 2 == 1));
        for manager in order {
            progress.step(&format!("seed {seed}, blocks of the {manager}'s choice"));
            disk.clear_hints(&mut guest)?;
            match manager {
                Manager::Guest => nominate(plan, &mut guest, disk, seed)?,
                Manager::Hypervisor => disk.hint(&mut guest, &uniform(plan, seed))?,
            }
            host.shrink(plan.evict)?;
            let evicted = host.evicted()?;
            ensure!(
                normal(disk.evicted(&mut guest)?) == evicted,
                "driver and daemon disagree on what is evicted"
            );
            ensure!(blocks(&evicted) == plan.evicted_blocks(), "{} blocks went", blocks(&evicted));
            let (hits, misses) = read(plan, &mut guest, disk, Plan::real(seed))?;
            let mut away = vec![false; usize::try_from(plan.blocks())?];
            for (start, count) in &evicted {
                away[usize::try_from(*start)?..usize::try_from(start + count)?].fill(true);
            }
            let meets = |block: &u64| usize::try_from(*block).is_ok_and(|block| away[block]);
            let expected = bell.draws(Plan::real(seed), plan.reads).filter(meets).count() as u64;
            found.trials.push(Trial { seed, manager, hits, misses, expected });
            if seed == 0 {
                match manager {
                    Manager::Guest => found.guest = evicted,
                    Manager::Hypervisor => found.hypervisor = evicted,
                }
            }
            host.grow(plan.evict)?;
        }
    }
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    host.finish()?;
    Ok(found)
}

/// The application says which blocks it would not miss.
fn nominate(plan: &Plan, guest: &mut Guest, disk: &Disk, seed: u64) -> Result<()> {
    let command = format!(
        "guest_reads untouched {} {} {} {} {} {} > /proc/vssd/{}/hints",
        plan.blocks(),
        plan.mean,
        plan.sigma,
        Plan::watched(seed),
        plan.reads,
        plan.evicted_blocks(),
        disk.name
    );
    guest.ok(&command).map(drop)
}

/// What somebody chooses who knows nothing.
fn uniform(plan: &Plan, seed: u64) -> Vec<Range> {
    let mut all: Vec<Range> = (0..plan.blocks()).map(|block| (block, 1)).collect();
    let wanted = usize::try_from(plan.evicted_blocks()).unwrap_or(usize::MAX).min(all.len());
    let (chosen, _) = all.partial_shuffle(&mut StdRng::seed_from_u64(seed), wanted);
    chosen.to_vec()
}

/// Hits and misses of the application.
fn read(plan: &Plan, guest: &mut Guest, disk: &Disk, seed: u64) -> Result<(u64, u64)> {
    let command = format!(
        "guest_reads read /dev/{} {} {} {} {seed} {} {CONTENT}",
        disk.name, plan.block_size, plan.mean, plan.sigma, plan.reads
    );
    let said = guest.ok(&command)?;
    let (mut hits, mut misses) = (0, 0);
    for line in said.lines() {
        let (outcome, count) =
            line.split_once(' ').with_context(|| format!("the application said {line:?}"))?;
        let count: u64 = count.parse().with_context(|| format!("the application said {line:?}"))?;
        match outcome {
            // Zeroes are what a block holds that was away.
            "intact" | "zero" => hits += count,
            ENODATA => misses += count,
            other => bail!("{count} reads ended as {other}: the disk lost data"),
        }
    }
    ensure!(hits + misses == plan.reads, "{hits} hits and {misses} misses are not {} reads", plan.reads);
    Ok((hits, misses))
}

/// Miss ratios of one manager, in the order of seeds.
fn ratios(found: &Found, manager: Manager) -> Vec<f64> {
    found.trials.iter().filter(|trial| trial.manager == manager).map(Trial::miss_ratio).collect()
}

/// A difference of shares, in percentage points.
fn points(difference: f64) -> String {
    format!("{:.2} points", difference * 100.0)
}

fn shown(confidence: Confidence) -> String {
    format!("{} ± {}", share(confidence.mean), share(confidence.half))
}

pub(super) fn section(plan: &Plan, found: &Found) -> Result<Section> {
    let (guest, hypervisor) = (ratios(found, Manager::Guest), ratios(found, Manager::Hypervisor));
    ensure!(guest.len() == hypervisor.len(), "not every seed was tried both ways");
    let differences: Vec<f64> = hypervisor.iter().zip(&guest).map(|(theirs, ours)| theirs - ours).collect();
    let interval = |values: &[f64]| confidence(values).context("fewer than two seeds give no interval");
    let (ours, theirs, difference) = (interval(&guest)?, interval(&hypervisor)?, interval(&differences)?);
    let met = found.trials.iter().filter(|trial| trial.misses == trial.expected).count();
    let wins = difference.low() > 0.0;
    let even = plan.evict as f64 / plan.size as f64;

    let totals = |manager| {
        let of = |pick: fn(&Trial) -> u64| -> u64 {
            found.trials.iter().filter(|trial| trial.manager == manager).map(pick).sum()
        };
        (of(|trial| trial.hits), of(|trial| trial.misses))
    };
    let row = |name: &str, manager, confidence| {
        let (hits, misses) = totals(manager);
        vec![name.to_owned(), hits.to_string(), misses.to_string(), shown(confidence)]
    };
    let rows = [
        row("guest-managed", Manager::Guest, ours),
        row("hypervisor-managed (uniform)", Manager::Hypervisor, theirs),
        vec![
            "paired difference".into(),
            String::new(),
            String::new(),
            format!("{} ± {}", points(difference.mean), points(difference.half)),
        ],
    ];
    let verdict = if wins {
        format!(
            "The guest's choice wins: its application meets {} fewer evicted blocks, and the interval of the paired difference, {} to {}, \
             lies above 0.",
            times(theirs.mean / ours.mean),
            points(difference.low()),
            points(difference.high())
        )
    } else {
        format!(
            "The guest's choice does not win: the interval of the paired difference, {} to {}, does not lie above 0.",
            points(difference.low()),
            points(difference.high())
        )
    };
    let text = format!(
        "An application in the guest reads blocks of a vSSD of {size} with direct I/O, their numbers drawn from a normal distribution with \
         μ = {mean} and σ = {sigma}. Then {evict} of the disk go, and the application reads {reads} blocks of another draw: a read that the \
         device answers is a *hit*, one that ends with ENODATA a *miss*.\n\n\
         - *Guest-managed*: the application nominates, through `/proc/vssd/<disk>/hints`, blocks chosen at random from those that a draw of as \
         many numbers **with another seed** did not touch: what it knows is what it did before, not what it will do.\n\
         - *Hypervisor-managed*: blocks chosen uniformly at random by the host. They reach the same device by the same way, as hints that the host \
         wrote: the device never takes random blocks of its own accord. (Forced, the daemon takes empty blocks and then the highest ones, which \
         this application hardly reads; that would say more about where it reads than about who chooses.)\n\n\
         **Block size.** The original gives block numbers, not their size. Blocks of {block} make {blocks} of {size}: μ − {near:.1} σ is the beginning \
         of the disk and μ + 4 σ = {far} lies on it ({outside} of the distribution lie outside and are drawn again), and {evict} are {even} of \
         all blocks. So neither way can win because there is nothing else on the disk to give. With pages of 4 KiB four fifths of it \
         would be beyond the reach of the application, and giving those up would prove little.\n\n\
         {seeds} seeds; with each, both ways meet the same reads. All reads go through the device: of {trials} trials {met} have exactly as many \
         misses as the same draw, made again on the host, has blocks that the daemon holds for evicted.\n\n\
         {table}\nMeans with 95 % confidence intervals (Student's t, {freedom} degrees of freedom). Chosen blindly, {even} of the blocks are expected \
         to cost {even} of the reads; measured: {theirs}. {verdict} How much it wins depends on how long the application watched: blocks that it \
         will read, but did not happen to read among {reads} watched reads, are among those it gives up.\n\n\
         ![Hits and misses](eviction.svg)\n\n\
         The reads of the first seed, and what share of the blocks around each place had gone:\n\n\
         ![Reads and evicted blocks](access.svg)\n\n\
         Data: [eviction.csv](eviction.csv), [access.csv](access.csv) ({bins} pieces of the disk).",
        size = ByteCount(plan.size),
        mean = plan.mean,
        sigma = plan.sigma,
        evict = ByteCount(plan.evict),
        reads = plan.reads,
        block = ByteCount(plan.block_size),
        blocks = plan.blocks(),
        near = plan.mean as f64 / f64::from(plan.sigma),
        far = plan.mean + 4 * u64::from(plan.sigma),
        outside = share(outside(plan)),
        even = share(even),
        seeds = plan.seeds,
        trials = found.trials.len(),
        freedom = guest.len() - 1,
        theirs = shown(theirs),
        table = table(&["", "hits", "misses", "miss ratio"], &rows),
        bins = BINS,
    );
    let lines = found.trials.iter().map(|t| {
        format!("{},{},{},{},{:.6},{}", t.seed, t.manager, t.hits, t.misses, t.miss_ratio(), t.expected)
    });
    let access = access(plan, found)?;
    Ok(Section {
        title: "2. Guest-managed against hypervisor-managed eviction".into(),
        text,
        verdicts: vec![
            Verdict::of(
                "trials in which exactly the reads of evicted blocks miss",
                format!("{met} of {}", found.trials.len()),
                "all",
                met == found.trials.len(),
            ),
            Verdict::of(
                "miss ratio, hypervisor-managed − guest-managed, paired, 95 % interval",
                format!("{} to {}", points(difference.low()), points(difference.high())),
                "above 0",
                wins,
            ),
            Verdict::info("misses, hypervisor-managed ÷ guest-managed", times(theirs.mean / ours.mean)),
        ],
        files: vec![
            (
                "eviction.svg",
                plots::eviction(&[("guest-managed", &guest, ours), ("uniform", &hypervisor, theirs)])?,
            ),
            ("eviction.csv", csv("seed,manager,hits,misses,miss_ratio,misses_expected", lines)),
            ("access.svg", plots::access(&access)?),
            (
                "access.csv",
                csv(
                    "first_block,reads,evicted_by_guest,evicted_by_hypervisor",
                    access.bins.iter().map(|bin| {
                        format!("{},{},{:.4},{:.4}", bin.first, bin.reads, bin.guest, bin.hypervisor)
                    }),
                ),
            ),
        ],
    })
}

/// The share of the normal distribution that does not lie on the disk, by summing up what does.
fn outside(plan: &Plan) -> f64 {
    let sigma = f64::from(plan.sigma);
    let on_disk: f64 = (0..plan.blocks())
        .map(|block| (-0.5 * ((block as f64 - plan.mean as f64) / sigma).powi(2)).exp())
        .sum();
    (1.0 - on_disk / (sigma * (2.0 * std::f64::consts::PI).sqrt())).max(0.0)
}

/// Where the application reads and what goes, piece by piece.
fn access(plan: &Plan, found: &Found) -> Result<Access> {
    let width = plan.blocks().div_ceil(BINS);
    let count = usize::try_from(plan.blocks().div_ceil(width))?;
    let place = |block: u64| usize::try_from(block / width).unwrap_or(usize::MAX);
    let tally = |blocks: &mut dyn Iterator<Item = u64>| {
        let mut bins = vec![0u64; count];
        blocks.for_each(|block| bins[place(block)] += 1);
        bins
    };
    let each = |ranges: &[Range]| ranges.iter().flat_map(|(start, n)| *start..start + n).collect::<Vec<_>>();
    let reads = tally(&mut plan.bell()?.draws(Plan::real(0), plan.reads));
    let guest = tally(&mut each(&found.guest).into_iter());
    let hypervisor = tally(&mut each(&found.hypervisor).into_iter());
    let bins = (0..plan.blocks())
        .step_by(usize::try_from(width)?)
        .zip(reads.iter().zip(guest.iter().zip(&hypervisor)))
        .map(|(first, (reads, (guest, hypervisor)))| Bin {
            first,
            reads: *reads,
            guest: *guest as f64 / width as f64,
            hypervisor: *hypervisor as f64 / width as f64,
        })
        .collect();
    Ok(Access { blocks: plan.blocks(), bins })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(seed: u64, manager: Manager, misses: u64) -> Trial {
        Trial { seed, manager, hits: 1000 - misses, misses, expected: misses }
    }

    fn found(pairs: &[(u64, u64)]) -> Found {
        let trials = (0..)
            .zip(pairs)
            .flat_map(|(seed, (guest, hypervisor))| {
                [trial(seed, Manager::Guest, *guest), trial(seed, Manager::Hypervisor, *hypervisor)]
            })
            .collect();
        Found { trials, ..Found::default() }
    }

    #[test]
    fn the_guest_wins_only_if_the_paired_interval_lies_above_zero() {
        let clear = section(&Plan::QUICK, &found(&[(70, 250), (72, 255), (71, 249)])).unwrap();
        assert!(clear.verdicts.iter().all(|verdict| verdict.pass != Some(false)), "{:?}", clear.verdicts);
        assert!(clear.text.contains("The guest's choice wins"));
        let noise = section(&Plan::QUICK, &found(&[(70, 250), (250, 70), (100, 101)])).unwrap();
        assert_eq!(noise.verdicts[1].pass, Some(false));
        assert!(noise.text.contains("does not win"));
        assert!(section(&Plan::QUICK, &found(&[(70, 250)])).is_err(), "one seed has no interval");
    }

    #[test]
    fn a_miss_that_no_evicted_block_explains_is_noticed() {
        let mut found = found(&[(70, 250), (72, 255), (71, 249)]);
        found.trials[3].expected -= 1;
        let section = section(&Plan::QUICK, &found).unwrap();
        assert_eq!((section.verdicts[0].reached.as_str(), section.verdicts[0].pass), ("5 of 6", Some(false)));
    }

    #[test]
    fn plans_differ_in_scale_only_and_leave_enough_blocks_untouched() {
        let (full, quick) = (Plan::FULL, Plan::QUICK);
        for (big, small) in [
            (full.size, quick.size),
            (full.mean, quick.mean),
            (full.sigma.into(), quick.sigma.into()),
            (full.evict, quick.evict),
            (full.reads, quick.reads),
        ] {
            assert_eq!(big, 8 * small);
        }
        let chosen = uniform(&quick, 3);
        assert_eq!(blocks(&normal(chosen)), quick.evicted_blocks());
        assert!(quick.bell().unwrap().untouched(1, quick.reads, quick.evicted_blocks()).is_ok());
    }

    #[test]
    fn pieces_of_the_disk_hold_all_reads_and_all_evicted_blocks() {
        let plan = Plan::QUICK;
        let found =
            Found { guest: vec![(0, 2048)], hypervisor: normal(uniform(&plan, 1)), ..Found::default() };
        let access = access(&plan, &found).unwrap();
        assert_eq!(access.bins.len() as u64, BINS);
        assert_eq!(access.bins.iter().map(|bin| bin.reads).sum::<u64>(), plan.reads);
        assert!((access.bins[0].guest - 1.0).abs() < 1e-9 && access.bins[32].guest.abs() < 1e-9);
        let mean = access.bins.iter().map(|bin| bin.hypervisor).sum::<f64>() / BINS as f64;
        assert!((mean - 0.25).abs() < 1e-9, "{mean}");
    }
}
