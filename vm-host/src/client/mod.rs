// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The operator's commands: each calls the daemon and hands what it learns to [`Output`](control_client::Output). Knows the control
//! channel ([`vm_host::wire`]) and nothing of how the daemon does its work.

pub(crate) mod args;
mod events;
mod lint;
mod nvram;
mod order;
mod power;
mod vm;

use std::time::Duration;

use clap::CommandFactory;
use control_client::{Peer, Program, Result, Session, about};
use vm_host::wire::{SCHEMA, ServerInfo, method};

use args::{Cli, Command, NvramCommand, PowerCommand};

pub(crate) static PROGRAM: Program = Program {
    name: "vm-host",
    version: env!("CARGO_PKG_VERSION"),
    schema: SCHEMA,
    objects: "VM or medium",
    full: "there is no room in the NV-RAM",
    peer: Peer {
        name: "vm-host",
        start: "`vm-host serve`",
        socket: "/run/vm-host/control.sock",
        user_socket: None,
        socket_env: "VM_HOST_SOCKET",
        has_monitor: true,
    },
};

/// Carries out what the command line asks for.
pub(crate) fn run(session: &Session, command: Command) -> Result<()> {
    match command {
        // Not a client's.
        Command::Serve { .. } => Ok(()),
        Command::List => vm::list(session),
        Command::Show { name } => vm::show(session, name),
        Command::Define { file, replace } => vm::define(session, &file, replace),
        Command::Undefine { name, yes } => vm::undefine(session, &name, yes),
        Command::Start { name } => order::run(session, method::VM_START, &name, "runs"),
        Command::Stop { name, grace, kill, yes } => vm::stop(session, &name, grace, kill, yes),
        Command::Save { name } => order::run(session, method::VM_SAVE, &name, "is saved"),
        Command::Restore { name } => order::run(session, method::VM_RESTORE, &name, "runs again"),
        Command::SwapOut { name } => order::run(session, method::VM_SWAP_OUT, &name, "is swapped out"),
        Command::SwapIn { name } => order::run(session, method::VM_SWAP_IN, &name, "is swapped in"),
        Command::Discard { name, yes } => vm::discard(session, &name, yes),
        Command::Lint { file } => lint::run(session, &file),
        Command::Nvram(NvramCommand::List) => nvram::list(session),
        Command::Nvram(NvramCommand::Probe { path, declared_persistent }) => {
            nvram::probe(session, &path, declared_persistent)
        }
        Command::Power(PowerCommand::Status) => power::status(session),
        Command::Power(PowerCommand::Test { stage }) => power::test(session, stage),
        Command::Events { follow, since, types } => events::run(session, follow, since, &types),
        Command::Logs { name, console, lines, follow } => {
            events::logs(session, &name, &events::LogOptions { console, lines, follow })
        }
        Command::Version => about::version(session, |info: &ServerInfo| {
            format!("{} {} (schema {}), the daemon", info.server, info.version, info.schema)
        }),
        Command::Completion { shell } => about::completion(session, Cli::command(), shell),
        Command::Man { dir } => about::man(Cli::command(), &dir),
        Command::Rpc { method, params } => {
            // Any method: those that take long, too.
            let patience = if session.give_up_at().is_some() { Duration::ZERO } else { Duration::MAX };
            about::rpc(session, &method, params.as_deref(), patience)
        }
    }
}
