// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One call of the program: the daemon it speaks to, how long it waits, how it prints, and whom it asks.

use std::env;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::args::GlobalArgs;
use crate::client::Client;
use crate::error::{CtlError, Result};
use crate::output::{Output, printable};

const SYSTEM_SOCKET: &str = "/run/vssd/control.sock";
const USER_SOCKET: &str = "vssd/control.sock";
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// What all commands share: where the daemon is, how long to wait, how to print.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) socket: PathBuf,
    /// As given; a command that waits for a job has no limit without it.
    timeout: Option<Duration>,
    begun: Instant,
    pub(crate) out: Output,
}

impl Session {
    pub(crate) fn new(global: &GlobalArgs) -> Self {
        Self {
            socket: global.socket.clone().unwrap_or_else(default_socket),
            timeout: global.timeout.map(|time| Duration::from_millis(time.0)),
            begun: Instant::now(),
            out: Output::new(global.json, global.exact, !global.no_headers, global.quiet),
        }
    }

    pub(crate) fn connect(&self) -> Result<Client> {
        Client::connect(&self.socket, self.timeout.unwrap_or(CALL_LIMIT))
    }

    /// When a command that waits gives up.
    pub(crate) fn give_up_at(&self) -> Option<Instant> {
        self.begun.checked_add(self.timeout?)
    }

    /// Asks on a terminal whether `question` is meant; elsewhere `--yes` has to say so.
    pub(crate) fn confirm(&self, question: &str) -> Result<()> {
        // Standard error is a terminal here; one that goes away leaves nobody to answer, which is a no.
        let mut stderr = io::stderr().lock();
        let _ = write!(stderr, "{} [y/N] ", printable(question)).and_then(|()| stderr.flush());
        drop(stderr);
        let mut answer = String::new();
        io::stdin()
            .lock()
            .read_line(&mut answer)
            .map_err(|source| CtlError::Local { what: "standard input".to_owned(), source })?;
        match answer.trim().to_ascii_lowercase().as_str() {
            "y" | "yes" => Ok(()),
            _ => Err(CtlError::Declined),
        }
    }
}

/// Refuses to go on where nobody can be asked: before anything is sent to the daemon.
pub(crate) fn require_terminal(what: &str) -> Result<()> {
    if io::stdin().is_terminal() && io::stderr().is_terminal() {
        Ok(())
    } else {
        Err(CtlError::Usage {
            message: format!("{what} needs a confirmation, and this is no terminal"),
            hint: Some("add --yes if it is meant"),
        })
    }
}

/// The first of the two usual places that has a socket; the system's where neither has.
fn default_socket() -> PathBuf {
    let system = Path::new(SYSTEM_SOCKET);
    let user = env::var_os("XDG_RUNTIME_DIR").map(|dir| Path::new(&dir).join(USER_SOCKET));
    match user {
        Some(user) if !system.exists() && user.exists() => user,
        _ => system.to_owned(),
    }
}
