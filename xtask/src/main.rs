// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The commands of the README, which are also what the continuous integration runs: `cargo xtask <command>`.
//!
//! Orchestration only. What a guest, a daemon or a package is, `vssd-tests` knows.

mod bench;
mod fuzz;
mod guest;
mod long;
mod model;
mod programs;
mod sabotage;
mod schedules;
mod stages;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use vssd_tests::image::GuestImage;
use vssd_tests::kernel::Kernel;
use vssd_tests::qemu;

use crate::stages::Stages;

#[derive(Debug, Parser)]
#[command(about = "Builds, shows and tests vSSD; sets up what that needs on Debian 12")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install the Debian packages that are missing, or say which.
    Setup,
    /// Show a guest giving blocks up and getting them back, or one that lives through a power cut.
    Demo {
        #[arg(value_enum, default_value_t = Demo::Shrink)]
        what: Demo,
    },
    /// Check the style, build the driver for every kernel, run all tests.
    Test(test::Args),
    /// Measure the daemon against its peers.
    Bench(bench::Args),
    /// Boot a guest by hand.
    Guest(guest::Args),
    /// Run the fuzz targets on the kept corpus, or look at one input.
    Fuzz(fuzz::Args),
    /// Walk every order of events in the negotiation.
    Model(model::Args),
    /// Run the hand-offs between threads through every schedule, or very many.
    Schedules(schedules::Args),
    /// Run the codecs, the map and the journal under Miri.
    Miri,
    /// Run the long form of a test.
    Long(long::Args),
    /// Break the pool and the daemon on purpose and see that the tests notice.
    Sabotage,
    /// Build the guest driver for every kernel.
    Module,
    /// Build the guest's agent as one program that needs no library of the guest.
    Agent,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Demo {
    Shrink,
    Persistent,
}

fn main() -> ExitCode {
    match run(&Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<()> {
    match command {
        Command::Setup => {
            vssd_tests::setup::ensure()?;
            println!("everything needed is installed");
            Ok(())
        }
        Command::Demo { what } => demo(*what),
        Command::Test(args) => test::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Guest(args) => guest::run(args),
        Command::Fuzz(args) => fuzz::run(args),
        Command::Model(args) => model::run(args),
        Command::Schedules(args) => schedules::run(args),
        Command::Miri => schedules::miri(),
        Command::Long(args) => long::run(args),
        Command::Sabotage => sabotage::run(&sabotage::build()?, &test::build()?),
        Command::Agent => {
            let agent = stages::build_static_agent()?;
            println!("{}", agent.display());
            Ok(())
        }
        Command::Module => {
            vssd_tests::setup::ensure()?;
            stages::build_modules()
        }
    }
}

fn demo(what: Demo) -> Result<()> {
    let stages = Stages::new();
    stages.run("set up", vssd_tests::setup::ensure)?;
    stages.run("build", || stages::build_binaries(&["--quiet"]))?;
    match what {
        Demo::Shrink => {
            stages.run("guest kernel and driver", || {
                GuestImage::with_driver(&Kernel::debian()?)?;
                eprintln!("guests run on {}", qemu::probed_accel());
                Ok(())
            })?;
            stages.run("demo", vssd_tests::demo::shrink::run)?;
        }
        Demo::Persistent => stages.run("demo", vssd_tests::demo::persistent::run)?,
    }
    stages.finish();
    Ok(())
}
