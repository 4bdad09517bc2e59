// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One call of a program: the daemon it speaks to, how long it waits, how it prints, and how it ends.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::args::CommonArgs;
use crate::client::Client;
use crate::error::{Failure, Result};
use crate::output::Output;
use crate::program::Program;

const CALL_LIMIT: Duration = Duration::from_secs(10);

/// What all commands share: where the daemon is, how long to wait, how to print.
#[derive(Debug)]
pub struct Session {
    pub program: &'static Program,
    pub socket: PathBuf,
    /// As given; a command that waits for a job has no limit without it.
    timeout: Option<Duration>,
    begun: Instant,
    pub out: Output,
}

impl Session {
    /// `socket` is the one that the command line names, if any.
    pub fn new(program: &'static Program, socket: Option<PathBuf>, args: &CommonArgs) -> Self {
        Self {
            program,
            socket: socket.unwrap_or_else(|| program.default_socket()),
            timeout: args.timeout.map(|time| Duration::from_millis(time.0)),
            begun: Instant::now(),
            out: Output::new(program.schema, args),
        }
    }

    pub fn connect(&self) -> Result<Client> {
        Client::connect(self.program, &self.socket, self.timeout.unwrap_or(CALL_LIMIT))
    }

    /// When a command that waits gives up.
    pub fn give_up_at(&self) -> Option<Instant> {
        self.begun.checked_add(self.timeout?)
    }

    /// Says what failed, if anything did, and what the program ends with.
    pub fn conclude<E: Failure>(&self, result: std::result::Result<(), E>) -> ExitCode {
        match result {
            Ok(()) => ExitCode::SUCCESS,
            Err(err) => {
                err.report(self.program, self.out.json);
                err.exit().into()
            }
        }
    }
}
