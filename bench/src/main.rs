// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench datapath`, `paper`, `persistence`, `nv-hypervisor` and `power-cut`, which build everything and start this.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use vssd_bench::cases::{self, Case};
use vssd_bench::experiment;
use vssd_bench::nv_hypervisor;
use vssd_bench::paper;
use vssd_bench::peer::{Media, Pages};
use vssd_bench::persistence;
use vssd_bench::placement::Cpus;
use vssd_bench::report::machine::Machine;
use vssd_bench::report::{Report, plot, table};
use vssd_bench::run::{Bench, Effort};

#[derive(Debug, Parser)]
#[command(about = "Measures vssd-backend against its peers, and repeats the experiments of the paper")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Speed and latency of reads and writes
    Datapath(Datapath),
    /// The vSSD paper's three experiments on real guests, with a report
    Paper(paper::Args),
    /// How long VMs take to be saved, and to run again
    Persistence(persistence::Args),
    /// A database after a power cut: rebooted, and continued from NV-RAM
    NvHypervisor(nv_hypervisor::Args),
    /// Power cuts of an emulated host with persistent guests
    PowerCut(persistence::PowerCutArgs),
}

#[derive(Debug, clap::Args)]
struct Datapath {
    /// Two short rounds: to see that it works, not to quote
    #[arg(long)]
    quick: bool,
    /// Only cases whose name contains one of these
    #[arg(long = "case", value_name = "NAME", num_args = 1..)]
    cases: Vec<String>,
    /// Rounds of each case
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Where the SSD's files are made; must take direct I/O
    #[arg(long, value_name = "DIR")]
    ssd_dir: Option<PathBuf>,
    /// Let NV-RAM be mapped in pages of 4 KiB, not of 2 MiB
    #[arg(long)]
    small_pages: bool,
    /// Write everything measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the rates of all cases into this file, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Print the names of the cases and end
    #[arg(long)]
    list: bool,
    /// Fail if a required figure is missed
    #[arg(long)]
    gate: bool,
}

fn main() -> ExitCode {
    let outcome = match Args::parse().command {
        Command::Datapath(args) => datapath(&args),
        Command::Paper(args) => paper::run(&args).map(code),
        Command::Persistence(args) => persistence::run(&args).map(code),
        Command::NvHypervisor(args) => nv_hypervisor::run(&args).map(code),
        Command::PowerCut(args) => persistence::power_cut(&args).map(code),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn code(reached: bool) -> ExitCode {
    if reached { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn datapath(args: &Datapath) -> Result<ExitCode> {
    let wanted =
        |case: &Case| args.cases.is_empty() || args.cases.iter().any(|name| case.name.contains(name));
    let cases: Vec<Case> = cases::all().into_iter().filter(wanted).collect();
    ensure!(!cases.is_empty(), "no case has such a name: see --list");
    if args.list {
        for case in &cases {
            println!("{}", case.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut effort = if args.quick { Effort::QUICK } else { Effort::FULL };
    effort.rounds = args.rounds.unwrap_or(effort.rounds).max(1);
    let cpus = Cpus::choose()?;
    let ssd_dir = match &args.ssd_dir {
        Some(dir) => dir.clone(),
        None => vssd_tests::paths::repo_root().join("target/bench"),
    };
    let pages = if args.small_pages { Pages::Small } else { Pages::Huge };
    let mut bench = Bench::new(cpus, Media::new(&ssd_dir, pages)?, effort)?;
    let machine = Machine::look(cpus, bench.media.pages(), &bench.storage_daemons());
    let mut report = Report { machine, effort, cases: Vec::new() };
    print!("{}", table::heading(&report));
    let mut broken = Vec::new();
    for case in &cases {
        // A peer that crashes, as some do, must not cost the other cases.
        let outcome = experiment::run(&mut bench, case).or_else(|error| {
            eprintln!("case {}, once more: {error:#}", case.name);
            experiment::run(&mut bench, case)
        });
        match outcome {
            Ok(outcome) => {
                print!("{}", table::case(&outcome));
                report.cases.push(outcome);
            }
            Err(error) => broken.push(format!("case {}: {error:#}", case.name)),
        }
    }
    print!("{}", table::summary(&report));
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))?;
    }
    if let Some(path) = &args.plot {
        std::fs::write(path, plot::svg(&report)).with_context(|| format!("write {}", path.display()))?;
    }
    ensure!(broken.is_empty(), "{}", broken.join("; "));
    let failed = args.gate && report.missed() > 0;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
