// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The commands: each calls the daemon and hands what it learns to [`Output`](control_client::Output).

mod attach;
mod device;
mod doctor;
mod events;
mod job;
mod pool;
mod reclaim;
mod resize;
mod server;

use std::time::Duration;

use clap::CommandFactory;
use control_client::{Session, about};
use vssd_protocol::control::ServerInfo;

use crate::args::{Cli, Command, JobCommand, PoolCommand};
use crate::error::Result;

/// Carries out what the command line asks for.
pub(crate) fn run(session: &Session, command: Command) -> Result<()> {
    match command {
        Command::List { sort } => device::list(session, sort)?,
        Command::Show { name } => device::show(session, name)?,
        Command::Create(args) => device::create(session, args)?,
        Command::Delete { name, force, yes, dry_run } => device::delete(session, name, force, yes, dry_run)?,
        Command::Resize { name, size, options } => resize::run(session, name, size, &options)?,
        Command::Grow { name, amount, options } | Command::Shrink { name, amount, options } => {
            resize::run(session, name, amount, &options)?;
        }
        Command::Estimate { name } => device::estimate(session, &name)?,
        Command::Reclaim { name, size, deadline, no_wait, dry_run, .. } => {
            reclaim::run(session, &name, size, &reclaim::Options { deadline, no_wait, dry_run })?;
        }
        Command::Sync { names } => device::sync(session, names)?,
        Command::Limits(args) => device::limits(session, args)?,
        Command::Evicted { name } => device::evicted(session, name)?,
        Command::Jobs => job::list(session)?,
        Command::Job(JobCommand::Show { id }) => job::show(session, id)?,
        Command::Job(JobCommand::Cancel { id }) => job::cancel(session, id)?,
        Command::Job(JobCommand::Wait { id }) => job::wait(session, id)?,
        Command::Events { follow, since, types } => events::run(session, follow, since, &types)?,
        Command::Pool(PoolCommand::Status) => pool::status(session)?,
        Command::Pool(PoolCommand::Create(args)) => pool::create(args)?,
        Command::Pool(PoolCommand::Check { files }) => pool::check(session, files)?,
        Command::AttachInfo { name, vmm, queues, memory } => {
            attach::run(session, name, vmm, attach::Options { queues, memory })?;
        }
        Command::Doctor => doctor::run(session)?,
        Command::Ping => server::ping(session)?,
        Command::Version => about::version(session, |info: &ServerInfo| {
            format!("{} {} (schema {})", info.server, info.version, info.schema)
        })?,
        Command::Completion { shell } => about::completion(session, Cli::command(), shell)?,
        Command::Man { dir } => about::man(Cli::command(), &dir)?,
        Command::Rpc { method, params } => {
            about::rpc(session, &method, params.as_deref(), Duration::ZERO)?;
        }
    }
    Ok(())
}
