// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Chooses, in the guest, the blocks of its vSSDs that it can do without.
///
/// When the host wants a vSSD to shrink, the agent takes free space of the file system on it into a balloon file and gives
/// the blocks of that file to the host; when it grows again, the file system gets them back.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = false)]
pub(crate) struct Cli {
    /// Configuration file; /etc/vssd-agent.toml unless told, which need not be there
    #[arg(long, value_name = "FILE", global = true)]
    pub(crate) config: Option<PathBuf>,
    /// Only these disks (vda); all vSSDs unless told
    #[arg(long = "disk", value_name = "NAME", global = true)]
    pub(crate) disks: Vec<String>,
    /// Say what would be done and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

#[derive(Clone, Copy, Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve until stopped; the default
    Run,
    /// Show what the host asks, what has gone, and how much could go
    Status {
        /// A JSON object for each disk, one a line
        #[arg(long)]
        json: bool,
    },
}
