// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `balloon-ctl`, the operator's command for vSSDs.
//!
//! ```text
//!   args ──► commands ──► control_client ──JSON-RPC──► vssd-backend
//!                 └─────► control_client::Output (tables, JSON), progress
//! ```
//!
//! It knows the control channel and nothing of how the daemon does its work. What an operator's command of any daemon
//! needs is in [`control_client`].

#![forbid(unsafe_code)]

mod args;
mod commands;
mod error;
mod progress;
mod size;

use std::process::ExitCode;

use control_client::{Peer, Program, Session};
use vssd_protocol::control::SCHEMA;

use crate::args::Cli;

static PROGRAM: Program = Program {
    name: "balloon-ctl",
    version: env!("CARGO_PKG_VERSION"),
    schema: SCHEMA,
    objects: "vSSD or job",
    full: "the pool is full",
    peer: Peer {
        name: "vssd-backend",
        start: "vssd-backend",
        socket: "/run/vssd/control.sock",
        user_socket: Some("vssd/control.sock"),
        socket_env: "BALLOON_CTL_SOCKET",
        has_monitor: true,
    },
};

fn main() -> ExitCode {
    let Cli { global, command } = match control_client::parse(&PROGRAM) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let session = Session::new(&PROGRAM, global.socket, &global.common);
    session.conclude(commands::run(&session, command))
}
