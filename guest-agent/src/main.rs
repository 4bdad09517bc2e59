// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `vssd-agent`: decides, in the guest, which blocks of a vSSD the host may have.
//!
//! ```text
//!   /proc/vssd/<disk>/request ──► serve (one thread a disk) ──► source (which blocks)
//!                    hints ◄────────┘
//!   /dev/vdX, its serial number ◄──► stock (agent-only mode) ──► source::filesystem, discard
//! ```
//!
//! It speaks to the driver, or through a stock driver to the device, and knows nothing else of the host.

mod args;
mod blocks;
mod config;
mod disk;
mod error;
mod estimate;
mod serve;
mod source;
mod status;
mod stock;
mod why;

use std::collections::BTreeSet;
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clap::Parser;
use tracing::info;
use tracing_subscriber::EnvFilter;

use crate::args::{Cli, Command};
use crate::config::{Config, DiskConfig};
use crate::error::{AgentError, Result};

const LOOK_FOR_DISKS: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error[{}]: {}", error.code(), error.message());
            eprintln!("hint: {}", error.hint());
            ExitCode::from(error.exit())
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let config = Config::load(cli.config.as_deref())?;
    let disks = || found_besides(&cli.disks, &BTreeSet::new());
    match cli.command.unwrap_or(Command::Run) {
        Command::Status { json } => status::print(&disks(), &config, json),
        Command::Run if cli.dry_run => {
            let disks = disks();
            if disks.is_empty() {
                let what = "there is none in /proc/vssd, and no virtio disk whose serial number is a vSSD's";
                return Err(AgentError::no_disk("nothing", io::Error::new(io::ErrorKind::NotFound, what)));
            }
            status::print_plan(&disks, &config)
        }
        Command::Run => serve_all(&cli.disks, &config),
    }
}

/// Serves the disks that are named, or all there are, also those that come later.
fn serve_all(named: &[String], config: &Config) -> Result<()> {
    let filter = EnvFilter::try_from_env("VSSD_AGENT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
    // The journal has a clock of its own.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().with_ansi(false).init();
    } else {
        log.with_ansi(io::stderr().is_terminal()).init();
    }
    let (ended, end) = mpsc::channel();
    let mut served = BTreeSet::new();
    let mut waits = false;
    loop {
        for name in found_besides(named, &served) {
            served.insert(name.clone());
            let (config, ended) = (config.of(&name), ended.clone());
            thread::spawn(move || {
                let outcome = serve_one(&name, &config);
                if outcome.is_ok() {
                    // It has gone. One that was named is looked for again, but not all the time.
                    thread::sleep(LOOK_FOR_DISKS);
                }
                ended.send((name, outcome))
            });
        }
        if served.is_empty() && !waits {
            info!("there is no vSSD here yet; waits for one");
            waits = true;
        }
        // Disks come and go, and change their names when another driver takes them.
        match end.recv_timeout(LOOK_FOR_DISKS) {
            Ok((name, Ok(()))) => drop(served.remove(&name)),
            // One that cannot be served ends the others: who runs this process is to hear of it.
            Ok((_, Err(error))) => return Err(error),
            Err(_) => {}
        }
    }
}

fn serve_one(name: &str, config: &DiskConfig) -> Result<()> {
    if disk::has_driver(name) { serve::serve(name, config) } else { stock::serve(name, config) }
}

/// The disks that are named, or else the vSSDs of this guest, whichever driver they have; without those that are `known`.
fn found_besides(named: &[String], known: &BTreeSet<String>) -> Vec<String> {
    let is_new = |name: &String| !known.contains(name);
    if !named.is_empty() {
        return named.iter().filter(|name| is_new(name)).cloned().collect();
    }
    let mut disks: Vec<String> = disk::list().into_iter().filter(is_new).collect();
    disks.extend(stock::list_besides(known));
    disks
}
