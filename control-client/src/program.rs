// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which command this is and which daemon it speaks to: names, defaults, and the advice that needs them.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

/// A command, in the words that its messages, hints and help need.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// What an operator types. It must have a command `version`: hints name it.
    pub name: &'static str,
    /// The program's own, `env!("CARGO_PKG_VERSION")`.
    pub version: &'static str,
    /// Name and version of the daemon's set of messages: the member `schema` of all JSON.
    pub schema: &'static str,
    /// What commands take by name or number, for the help: `vSSD or job`.
    pub objects: &'static str,
    /// What [`Exit::PoolFull`](crate::Exit::PoolFull) means here, for the help: `the pool is full`.
    pub full: &'static str,
    pub peer: Peer,
}

/// The daemon at the other end, and where it is found.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// What operators call it.
    pub name: &'static str,
    /// What starts it, as it follows the word "start".
    pub start: &'static str,
    /// The usual path of its control socket.
    pub socket: &'static str,
    /// The path below `XDG_RUNTIME_DIR` where a daemon of the user's own has it.
    pub user_socket: Option<&'static str>,
    /// The environment variable that names another.
    pub socket_env: &'static str,
    /// Whether a socket for reading by all lies beside the control socket.
    pub has_monitor: bool,
}

impl Program {
    /// `balloon-ctl 0.1.0`.
    pub fn title(&self) -> String {
        format!("{} {}", self.name, self.version)
    }

    /// What stands below the help and in the manual page: exit codes and units, the same for all commands.
    pub fn after_help(&self) -> String {
        let Self { objects, full, .. } = self;
        format!(
            "\
Exit codes:
  0  done
  1  failed
  2  wrong usage, or a value that the daemon does not accept
  3  no such {objects}
  4  refused by the guest, by a limit or policy, or because somebody else changed it
  5  timed out: the deadline or --timeout passed, and the request may still be pending
  6  {full}
  7  the daemon cannot be reached
  8  not permitted

Sizes are bytes or a number with K, M, G, T, P, in powers of 1024: 64K, 20G, 20GiB, 1.5T.
Times are seconds or a number with ms, s, m, h: 90, 500ms, 5m."
        )
    }

    /// The first of the usual places that has a socket; the system's where none has.
    pub fn default_socket(&self) -> PathBuf {
        self.usual_socket(env::var_os("XDG_RUNTIME_DIR").as_deref())
    }

    fn usual_socket(&self, runtime_dir: Option<&OsStr>) -> PathBuf {
        let system = Path::new(self.peer.socket);
        let user = runtime_dir.zip(self.peer.user_socket).map(|(dir, socket)| Path::new(dir).join(socket));
        match user {
            Some(user) if !system.exists() && user.exists() => user,
            _ => system.to_owned(),
        }
    }

    /// What to do where connecting failed for this reason.
    pub(crate) fn connect_hint(&self, kind: io::ErrorKind) -> String {
        let Peer { name, start, socket_env, .. } = self.peer;
        match kind {
            io::ErrorKind::NotFound => {
                format!("start {start}, or name its control socket with --socket or {socket_env}")
            }
            io::ErrorKind::ConnectionRefused => {
                format!("the socket is there but nobody listens: {name} has ended; start it again")
            }
            _ => format!("see whether {name} runs and which control socket it has"),
        }
    }

    pub(crate) fn denied_hint(&self) -> String {
        let monitor =
            if self.peer.has_monitor { "; the monitor socket beside it is for reading by all" } else { "" };
        format!("run as root or as a member of the socket's group{monitor}")
    }

    pub(crate) fn protocol_hint(&self) -> String {
        format!("is this the control socket of {}? `{} version` compares versions", self.peer.name, self.name)
    }
}

/// A program that shares no word with any of this repository's.
#[cfg(test)]
pub(crate) static LAMPCTL: Program = Program {
    name: "lampctl",
    version: "3.2.1",
    schema: "lamp.v3",
    objects: "lamp",
    full: "there is no socket left",
    peer: Peer {
        name: "lampd",
        start: "the lamp daemon",
        socket: "/nonexistent/lamp.sock",
        user_socket: Some("lamp/control.sock"),
        socket_env: "LAMPCTL_SOCKET",
        has_monitor: false,
    },
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_this_program_and_its_daemon() {
        assert_eq!(
            LAMPCTL.connect_hint(io::ErrorKind::NotFound),
            "start the lamp daemon, or name its control socket with --socket or LAMPCTL_SOCKET"
        );
        assert_eq!(
            LAMPCTL.connect_hint(io::ErrorKind::ConnectionRefused),
            "the socket is there but nobody listens: lampd has ended; start it again"
        );
        assert_eq!(
            LAMPCTL.connect_hint(io::ErrorKind::InvalidInput),
            "see whether lampd runs and which control socket it has"
        );
        assert_eq!(
            LAMPCTL.protocol_hint(),
            "is this the control socket of lampd? `lampctl version` compares versions"
        );
    }

    #[test]
    fn monitor_socket_is_advised_where_there_is_one() {
        assert_eq!(LAMPCTL.denied_hint(), "run as root or as a member of the socket's group");
        let monitored = Program { peer: Peer { has_monitor: true, ..LAMPCTL.peer }, ..LAMPCTL };
        assert!(
            monitored.denied_hint().ends_with("group; the monitor socket beside it is for reading by all")
        );
    }

    #[test]
    fn socket_of_the_users_own_daemon_counts_where_the_system_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("lamp/control.sock");
        let runtime_dir = Some(dir.path().as_os_str());
        let system = Path::new(LAMPCTL.peer.socket);
        assert_eq!(LAMPCTL.usual_socket(runtime_dir), system, "neither is there");
        std::fs::create_dir(dir.path().join("lamp")).unwrap();
        std::fs::write(&own, "").unwrap();
        assert_eq!(LAMPCTL.usual_socket(runtime_dir), own);
        assert_eq!(LAMPCTL.usual_socket(None), system);
        let with = |peer: Peer| Program { peer, ..LAMPCTL }.usual_socket(runtime_dir);
        assert_eq!(with(Peer { user_socket: None, ..LAMPCTL.peer }), system);
        assert_eq!(
            with(Peer { socket: "/dev/null", ..LAMPCTL.peer }),
            Path::new("/dev/null"),
            "both are there"
        );
    }

    #[test]
    fn help_says_what_the_codes_mean_for_this_program() {
        let help = LAMPCTL.after_help();
        assert!(help.contains("\n  3  no such lamp\n"), "{help}");
        assert!(help.contains("\n  6  there is no socket left\n"), "{help}");
    }
}
