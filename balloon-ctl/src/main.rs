// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `balloon-ctl`, the operator's command for vSSDs.
//!
//! ```text
//!   args ──► commands ──► client ──JSON-RPC──► vssd-backend
//!                 └─────► output (tables, JSON), progress, session (where, how long, how shown)
//! ```
//!
//! It knows the control channel and nothing of how the daemon does its work.

#![forbid(unsafe_code)]

mod args;
mod client;
mod commands;
mod error;
mod output;
mod progress;
mod session;
mod size;

use std::env;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::args::Cli;
use crate::error::{CtlError, Exit};
use crate::session::Session;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(err) => return explain(&err),
    };
    let session = Session::new(&cli.global);
    match commands::run(&session, cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            report(&err, session.out.json);
            ExitCode::from(err.exit() as u8)
        }
    }
}

fn report(err: &CtlError, json: bool) {
    if json {
        output::eprint_line(&output::envelope([("error", err.to_json())]));
        return;
    }
    output::print_error(err.code(), &err.message(), err.hint().as_deref());
}

/// What the command line's parser has to say: help and versions are data, the rest are usage errors.
fn explain(err: &clap::Error) -> ExitCode {
    match err.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Whoever closed standard output does not want to read it.
            let _ = err.print();
            return ExitCode::SUCCESS;
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = err.print();
        }
        _ => {
            let text = err.render();
            let is_json = env::args_os().any(|arg| arg == "--json");
            if is_json {
                let plain = text.to_string();
                let message = plain.lines().next().unwrap_or_default().trim_start_matches("error: ");
                report(&CtlError::usage(message), true);
            } else {
                // The same words, with the code that all errors have.
                let text = if output::has_colour(&std::io::stderr()) {
                    text.ansi().to_string()
                } else {
                    text.to_string()
                };
                output::eprint_line(text.replacen("error", "error[E_USAGE]", 1).trim_end());
            }
        }
    }
    ExitCode::from(Exit::Usage as u8)
}
