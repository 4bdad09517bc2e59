// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `vssd-agent`: decides, in the guest, which blocks of a vSSD the host may have.
//!
//! ```text
//!   /proc/vssd/<disk>/request ──► serve (one thread a disk) ──► source (which blocks)
//!                    hints ◄────────┘
//! ```
//!
//! It speaks to the driver only and knows nothing of the host.

mod args;
mod blocks;
mod config;
mod disk;
mod error;
mod serve;
mod source;
mod status;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::thread;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::args::{Cli, Command};
use crate::config::Config;
use crate::error::{AgentError, Result};

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
    let disks = if cli.disks.is_empty() { disk::list() } else { cli.disks.clone() };
    match cli.command.unwrap_or(Command::Run) {
        Command::Status { json } => status::print(&disks, &config, json),
        Command::Run if disks.is_empty() => {
            let source = io::Error::new(io::ErrorKind::NotFound, "there is none in /proc/vssd");
            Err(AgentError::NoDisk { disk: "nothing".to_owned(), source })
        }
        Command::Run if cli.dry_run => status::print_plan(&disks, &config),
        Command::Run => serve_all(&disks, &config),
    }
}

fn serve_all(disks: &[String], config: &Config) -> Result<()> {
    let filter = EnvFilter::try_from_env("VSSD_AGENT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
    // The journal has a clock of its own.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().with_ansi(false).init();
    } else {
        log.with_ansi(io::stderr().is_terminal()).init();
    }
    let (ended, end) = std::sync::mpsc::channel();
    for name in disks {
        let (name, config, ended) = (name.clone(), config.of(name), ended.clone());
        thread::spawn(move || ended.send(serve::serve(&name, &config)));
    }
    drop(ended);
    // One that cannot be served ends the others: who runs this process is to hear of it.
    end.recv().unwrap_or(Ok(()))
}
