// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the operators' commands have in common, so that whoever knows one knows the others: how they reach their
//! daemon, what their errors and exit codes mean, how they print, when they ask.
//!
//! ```text
//!   command line ──► parse ──► Session ──► Client ──JSON-RPC──► daemon
//!                                 └──────► Output (tables, JSON)         Failure ──► Session::conclude ──► exit code
//! ```
//!
//! What tells one command from another is a [`Program`]; a program with errors of its own wraps [`Error`] in an enum and
//! implements [`Failure`] for it. Knows no method, no daemon and no command.
//!
//! # Example
//!
//! ```no_run
//! use std::path::PathBuf;
//! use std::process::ExitCode;
//!
//! use clap::Parser;
//! use control_client::{Answer, CommonArgs, Peer, Program, Result, Session};
//! use serde_json::{Value, json};
//!
//! static PROGRAM: Program = Program {
//!     name: "lampctl",
//!     version: env!("CARGO_PKG_VERSION"),
//!     schema: "lamp.v1",
//!     objects: "lamp",
//!     full: "there is no socket left",
//!     peer: Peer {
//!         name: "lampd",
//!         start: "lampd",
//!         socket: "/run/lamp/control.sock",
//!         user_socket: None,
//!         socket_env: "LAMPCTL_SOCKET",
//!         has_monitor: false,
//!     },
//! };
//!
//! /// Switches lamps.
//! #[derive(Parser)]
//! #[command(name = PROGRAM.name, version, after_help = PROGRAM.after_help())]
//! struct Cli {
//!     /// The daemon's control socket [default: /run/lamp/control.sock]
//!     #[arg(short, long, global = true, env = PROGRAM.peer.socket_env)]
//!     socket: Option<PathBuf>,
//!     #[command(flatten)]
//!     common: CommonArgs,
//!     /// Name of the lamp
//!     name: String,
//! }
//!
//! fn main() -> ExitCode {
//!     match control_client::parse::<Cli>(&PROGRAM) {
//!         Ok(Cli { socket, common, name }) => {
//!             let session = Session::new(&PROGRAM, socket, &common);
//!             session.conclude(switch(&session, &name))
//!         }
//!         Err(code) => code,
//!     }
//! }
//!
//! fn switch(session: &Session, name: &str) -> Result<()> {
//!     let lamp: Answer<Value> = session.connect()?.call("lamp.switch", &json!({"name": name}))?;
//!     let out = &session.out;
//!     if out.json { out.object([("lamp", lamp.raw)]) } else { out.done(&format!("{name} switched")) }
//! }
//! ```

#![forbid(unsafe_code)]

pub mod about;
mod args;
mod client;
mod error;
mod events;
mod output;
mod program;
mod session;
mod terminal;
mod text;
mod time;

pub use args::{CommonArgs, one_of, parse, some_time};
pub use client::{Answer, Client};
pub use error::{Error, Exit, Failure, Refusal, Result};
pub use events::{event_details, print_events};
pub use output::Output;
pub use program::{Peer, Program};
pub use session::Session;
pub use terminal::{confirm, require_terminal};
pub use text::{NOTHING, envelope, eprint_line, has_colour, print_error, printable, word};
pub use time::{Millis, ParseMillisError};
