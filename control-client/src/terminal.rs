// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Questions to whoever sits at the terminal.

use std::io::{self, BufRead, IsTerminal, Write};

use crate::error::{Error, Result};
use crate::text::printable;

/// Asks on a terminal whether `question` is meant; elsewhere `--yes` has to say so, see [`require_terminal`].
pub fn confirm(question: &str) -> Result<()> {
    // Standard error is a terminal here; one that goes away leaves nobody to answer, which is a no.
    let mut stderr = io::stderr().lock();
    let _ = write!(stderr, "{} [y/N] ", printable(question)).and_then(|()| stderr.flush());
    drop(stderr);
    let mut answer = String::new();
    io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|source| Error::Local { what: "standard input".to_owned(), source })?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Error::Declined),
    }
}

/// Refuses to go on where nobody can be asked: before anything is sent to the daemon.
pub fn require_terminal(what: &str) -> Result<()> {
    if io::stdin().is_terminal() && io::stderr().is_terminal() {
        Ok(())
    } else {
        Err(Error::Usage {
            message: format!("{what} needs a confirmation, and this is no terminal"),
            hint: Some("add --yes if it is meant"),
        })
    }
}
