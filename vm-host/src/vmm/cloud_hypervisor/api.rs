// SPDX-License-Identifier: Apache-2.0 OR MIT

//! cloud-hypervisor's calls and their answers (`vmm/src/api/openapi/cloud-hypervisor.yaml` in its source, API 0.3.0). Knows their
//! forms, and not when they are made.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::http::{Answer, Exchange, Method};
use crate::vmm::VmmError;

const ROOT: &str = "/api/v1/";
/// So much of what it says goes into an error.
const LONGEST_REASON: usize = 400;
const SHUTDOWN: &str = "vmm.shutdown";

/// A cloud-hypervisor, by its socket.
#[derive(Debug)]
pub(super) struct Api {
    socket: PathBuf,
}

/// `VmmPingResponse`
#[derive(Debug, Deserialize)]
pub(super) struct Ping {
    pub(super) version: String,
    pub(super) pid: u32,
}

/// `VmState`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) enum VmState {
    /// It is described and does not exist; so before it is booted, and after its guest has turned itself off.
    Created,
    Running,
    Shutdown,
    Paused,
    BreakPoint,
}

/// `VmInfo`
#[derive(Debug, Deserialize)]
pub(super) struct Info {
    pub(super) state: VmState,
    /// Its `VmConfig`.
    pub(super) config: Value,
}

impl Api {
    pub(super) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    pub(super) fn ping(&self, limit: Duration) -> Result<Ping, VmmError> {
        const PING: &str = "vmm.ping";
        read(PING, Exchange::begin(&self.socket, PING, limit)?.ask(Method::Get, &path(PING), None)?)
    }

    /// What there is of a machine; none if there is none.
    pub(super) fn info(&self, limit: Duration) -> Result<Option<Info>, VmmError> {
        const INFO: &str = "vm.info";
        let answer = Exchange::begin(&self.socket, INFO, limit)?.ask(Method::Get, &path(INFO), None)?;
        // 404 in its API document; 500 with these words in earlier versions.
        if answer.status == 404
            || answer.status == 500 && reason(500, &answer.body).contains("VM is not created")
        {
            return Ok(None);
        }
        read(INFO, answer).map(Some)
    }

    /// A call that answers nothing.
    pub(super) fn put(
        &self,
        command: &'static str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<(), VmmError> {
        let mut exchange = Exchange::begin(&self.socket, command, limit)?;
        accepted(command, exchange.ask(Method::Put, &path(command), body)?).map(drop)
    }

    /// Ends the hypervisor, and waits until it has ended.
    pub(super) fn shut_down(&self, limit: Duration) -> Result<(), VmmError> {
        let mut exchange = Exchange::begin(&self.socket, SHUTDOWN, limit)?;
        match exchange.ask(Method::Put, &path(SHUTDOWN), None) {
            Ok(answer) => drop(accepted(SHUTDOWN, answer)?),
            Err(VmmError::Connection { .. }) => return Ok(()),
            Err(error) => return Err(error),
        }
        exchange.wait_for_end()
    }
}

fn path(command: &str) -> String {
    format!("{ROOT}{command}")
}

fn read<T: DeserializeOwned>(command: &'static str, answer: Answer) -> Result<T, VmmError> {
    serde_json::from_slice(&accepted(command, answer)?)
        .map_err(|error| VmmError::Protocol(format!("its answer to {command}: {error}")))
}

/// What an answer brings, or why it is none.
fn accepted(command: &'static str, answer: Answer) -> Result<Vec<u8>, VmmError> {
    match answer.status {
        200..300 => Ok(answer.body),
        400.. => Err(VmmError::Refused { command, reason: reason(answer.status, &answer.body) }),
        status => Err(VmmError::Protocol(format!("its answer to {command} has status {status}"))),
    }
}

/// An error comes as a list: what went wrong, and what each time was behind it.
fn reason(status: u16, body: &[u8]) -> String {
    let said = match serde_json::from_slice::<Vec<String>>(body) {
        Ok(chain) => chain.join(": "),
        Err(_) => String::from_utf8_lossy(body).trim().to_owned(),
    };
    if said.is_empty() { format!("status {status}") } else { said.chars().take(LONGEST_REASON).collect() }
}

/// A folder, as it names one. What follows `file://` is no URL there, but a path as it is (`vmm/src/migration.rs`).
pub(super) fn file_url(dir: &Path) -> Result<String, String> {
    dir.to_str()
        .map(|path| format!("file://{path}"))
        .ok_or_else(|| format!("its API cannot name {}, which is not UTF-8", dir.display()))
}

/// The first two numbers of `cloud-hypervisor v53.0`, `v53.0-12-gabcdef` and `53.0.0`: a release is called by them.
pub(super) fn release(said: &str) -> Option<(u32, u32)> {
    let version = said.split_whitespace().next_back()?;
    let mut numbers = version.trim_start_matches('v').split(['.', '-']).map(|part| part.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn reasons_are_said_whatever_their_form() {
        for (body, said) in [
            (&br#"["Error from API","VM is not created"]"#[..], "Error from API: VM is not created"),
            (b"Not Found", "Not Found"),
            (b"", "status 500"),
            (b"[]", "status 500"),
            (b"\xff", "\u{fffd}"),
        ] {
            assert_eq!(reason(500, body), said);
        }
        assert_eq!(reason(500, &[b'x'; 5000]).len(), LONGEST_REASON);
        let odd = Answer { status: 302, body: Vec::new() };
        assert!(matches!(accepted("vm.pause", odd), Err(VmmError::Protocol(_))));
    }

    #[test]
    fn folders_and_versions_are_written_as_it_reads_them() {
        assert_eq!(file_url(Path::new("/run/a b/ü%?#")).unwrap(), "file:///run/a b/ü%?#");
        assert!(file_url(Path::new(OsStr::from_bytes(b"/\xff"))).is_err());
        assert_eq!(release("cloud-hypervisor v53.0"), Some((53, 0)));
        assert_eq!(release("cloud-hypervisor v53.0-12-gabcdef"), Some((53, 0)));
        assert_eq!(release("53.1.0"), Some((53, 1)));
        for odd in ["", "QEMU", "cloud-hypervisor", "v53", "vx.y"] {
            assert_eq!(release(odd), None, "{odd}");
        }
    }
}
