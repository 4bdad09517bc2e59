// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `vm-host`: the daemon that keeps whole virtual machines in NV-RAM (`vm-host serve`), and the operator's command for it.
//!
//! ```text
//!   args ──► serve ──► the daemon
//!       └──► client ──► control_client ──JSON-RPC──► the daemon
//! ```

#![forbid(unsafe_code)]

mod client;

use std::error::Error;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use client::args::{Cli, Command};
use control_client::{Exit, Session, print_error};
use tracing_subscriber::EnvFilter;
use vm_host::config::Config;
use vm_host::daemon::{self, DaemonError};

fn main() -> ExitCode {
    // Nothing before this starts a thread: the daemon blocks signals first.
    let Cli { global, command } = match control_client::parse(&client::PROGRAM) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    if let Command::Serve { config } = command {
        return serve(&config);
    }
    let session = Session::new(&client::PROGRAM, global.socket, &global.common);
    session.conclude(client::run(&session, command))
}

/// Runs the daemon until it is told to end.
fn serve(path: &Path) -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    log.with_ansi(io::stderr().is_terminal()).with_target(false).init();
    let ended = Config::read(path).map_err(DaemonError::from).and_then(|config| daemon::run(&config));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let (code, exit) = match &error {
                DaemonError::Config(_) => ("E_CONFIG", Exit::Usage),
                DaemonError::Host(fault) => {
                    print_error(fault.code.as_str(), &fault.message, fault.hint.as_deref());
                    return Exit::Failed.into();
                }
                _ => ("E_DAEMON", Exit::Failed),
            };
            print_error(code, &chain(&error), None);
            exit.into()
        }
    }
}

/// An error with its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(error.to_string().trim_end());
        cause = error.source();
    }
    text
}
