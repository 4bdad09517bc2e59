// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line: every command, option and word of help. Knows no daemon.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use control_client::{CommonArgs, Millis, one_of};
use vm_host::wire::Stage;

use super::PROGRAM;

/// Manage virtual machines whose memory survives power cuts.
#[derive(Debug, Parser)]
#[command(name = PROGRAM.name, version, after_help = PROGRAM.after_help(), propagate_version = true)]
#[command(disable_help_subcommand = true, arg_required_else_help = true, args_override_self = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct GlobalArgs {
    /// The daemon's control or monitor socket [default: /run/vm-host/control.sock]
    #[arg(short, long, global = true, value_name = "PATH", env = PROGRAM.peer.socket_env)]
    #[arg(hide_env_values = true)]
    pub(crate) socket: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the daemon
    Serve {
        /// Its configuration
        #[arg(long, value_name = "FILE", default_value = "/etc/vm-host.toml")]
        config: PathBuf,
    },
    /// List the VMs
    List,
    /// Show all there is to know about a VM
    Show {
        /// Name of the VM
        name: String,
    },
    /// Define a VM; it does not start yet
    Define {
        /// Its definition in TOML, or - for standard input
        file: PathBuf,
        /// Change the definition of a stopped VM
        #[arg(long)]
        replace: bool,
    },
    /// Remove a VM, and what its memory and its saved state hold
    Undefine {
        /// Name of the VM
        name: String,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// Boot a VM
    Start {
        /// Name of the VM
        name: String,
    },
    /// Ask the guest of a VM to turn itself off, and pull the plug if it does not
    Stop {
        /// Name of the VM
        name: String,
        /// How long the guest has [default: 60s]
        #[arg(long, value_name = "TIME", conflicts_with = "kill")]
        grace: Option<Millis>,
        /// Pull the plug at once
        #[arg(long)]
        kill: bool,
        /// Do not ask whether --kill is meant
        #[arg(short, long)]
        yes: bool,
    },
    /// Save a VM where it is, in NV-RAM, and end its hypervisor
    Save {
        /// Name of the VM
        name: String,
    },
    /// Continue a VM that was saved
    Restore {
        /// Name of the VM
        name: String,
    },
    /// Move a VM's memory and state from NV-RAM to secondary storage
    SwapOut {
        /// Name of the VM
        name: String,
    },
    /// Move a VM's memory and state back to NV-RAM
    SwapIn {
        /// Name of the VM
        name: String,
    },
    /// Give up the memory of a guest that cannot be continued
    ///
    /// After a crash or a power cut that came before it was saved, a guest's memory is kept for whoever wants to look at it. The VM
    /// can be started anew once it is given up.
    Discard {
        /// Name of the VM
        name: String,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
    },
    /// Say what in a definition would not survive a power cut; needs no daemon
    Lint {
        /// The definition in TOML, or - for standard input
        file: PathBuf,
    },
    /// Show or try NV-RAM
    #[command(subcommand)]
    Nvram(NvramCommand),
    /// Show how the power is, or pretend that it fails
    #[command(subcommand)]
    Power(PowerCommand),
    /// Print what has happened, oldest first
    Events {
        /// Go on with what happens from now on
        #[arg(short, long)]
        follow: bool,
        /// Begin after the event of this number [default: all that is kept; with --follow: only new ones]
        #[arg(long, value_name = "SEQ")]
        since: Option<u64>,
        /// Only events whose names begin with one of these, such as vm. or power.
        #[arg(long = "type", value_name = "PREFIX", num_args = 1.., value_delimiter = ',')]
        types: Vec<String>,
    },
    /// Print what the hypervisor of a VM has said
    Logs {
        /// Name of the VM
        name: String,
        /// What its guest has said on the serial port instead
        #[arg(long)]
        console: bool,
        /// Begin so many lines before the end
        #[arg(short = 'n', long, value_name = "LINES", default_value_t = 100)]
        lines: usize,
        /// Go on with what is said from now on
        #[arg(short, long)]
        follow: bool,
    },
    /// Print the versions of this program and of the daemon
    Version,
    /// Print the completion script of a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages of all commands into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        dir: PathBuf,
    },
    /// Call a method of the control channel and print its answer as it comes
    Rpc {
        /// Such as vm.show
        method: String,
        /// The parameters, a JSON object
        #[arg(value_name = "JSON")]
        params: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum NvramCommand {
    /// List the media that the daemon has
    List,
    /// Find out whether persistent VMs could live on a medium
    Probe {
        /// A directory, file or device
        path: PathBuf,
        /// As if the operator vouched that this host's memory outlives the power
        #[arg(long)]
        declared_persistent: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PowerCommand {
    /// Show the state of the power, its sources, and whether all VMs would be saved in time
    Status,
    /// Pretend that a supply says so; all VMs are saved at critical, and go on at online
    Test {
        /// on-battery, critical, or online: the end of the test
        #[arg(value_parser = one_of::<Stage>(&["on-battery", "critical", "online"]))]
        stage: Stage,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("vm-host").chain(args.iter().copied()))
    }

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn grace_is_for_guests_that_are_asked() {
        let Command::Stop { grace, kill, .. } = parse(&["stop", "db", "--grace", "5m"]).unwrap().command
        else {
            panic!()
        };
        assert_eq!((grace, kill), (Some(Millis(300_000)), false));
        assert!(parse(&["stop", "db", "--grace", "5m", "--kill"]).is_err());
    }

    #[test]
    fn stages_are_spelled_as_on_the_wire() {
        let Command::Power(PowerCommand::Test { stage }) =
            parse(&["power", "test", "on-battery"]).unwrap().command
        else {
            panic!()
        };
        assert_eq!(stage, Stage::OnBattery);
        assert!(parse(&["power", "test", "OnBattery"]).is_err());
    }

    #[test]
    fn daemon_has_a_configuration_unless_told() {
        let Command::Serve { config } = parse(&["serve"]).unwrap().command else { panic!() };
        assert_eq!(config.as_os_str(), "/etc/vm-host.toml");
    }
}
