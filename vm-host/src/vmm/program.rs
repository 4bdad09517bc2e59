// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What every hypervisor's program needs: to be asked what it is, a socket to inherit, and to be heard when it ends.

use std::fs;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::VmmError;
use super::process::Process;

/// So much of what it said last goes into an error.
const LAST_WORDS: usize = 400;

/// Runs it for what it says, and it is soon over.
pub(super) fn run(program: &Path, args: &[&str]) -> Result<String, VmmError> {
    let output = Command::new(program)
        .args(args)
        .output()
        .map_err(|source| VmmError::Start { program: program.to_owned(), source })?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(VmmError::Ended { said: format!("{} {}: {said}", output.status, args.join(" ")) })
    }
}

/// A socket that is served by whoever inherits it.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    UnixListener::bind(path)
}

/// Ends a machine at once, and waits until it has ended.
pub(super) fn kill(process: &Process, limit: Duration) -> Result<(), VmmError> {
    match process.kill(limit) {
        Ok(true) => Ok(()),
        Ok(false) => Err(VmmError::Silent { command: "SIGKILL", limit }),
        Err(source) => Err(connection("kill", source)),
    }
}

/// If the hypervisor has ended, that is the reason; it closes its connection a moment before it can be waited for.
pub(super) fn last_words(process: &Process, log: &Path, error: VmmError) -> VmmError {
    let grace = match error {
        VmmError::Connection { .. } => Duration::from_secs(1),
        _ => Duration::ZERO,
    };
    if process.wait(grace) { VmmError::Ended { said: tail(log) } } else { error }
}

/// What a log ends with.
pub(super) fn tail(log: &Path) -> String {
    let said = fs::read(log).unwrap_or_default();
    let from = said.len().saturating_sub(LAST_WORDS);
    let text = String::from_utf8_lossy(&said[from..]).trim().replace('\n', "; ");
    if text.is_empty() { "without a word".to_owned() } else { text }
}

pub(super) fn connection(doing: &'static str, source: io::Error) -> VmmError {
    VmmError::Connection { doing, source }
}
