// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The command line: every command, option and word of help. Knows no daemon.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use control_client::{CommonArgs, Millis, one_of, some_time};
use vssd_protocol::control::{self, Class, OnTimeout, PullPolicy, is_valid_name};
use vssd_protocol::units::ByteCount;

use crate::PROGRAM;
use crate::size::{SizeChange, grow_amount, shrink_amount};

/// Manage the vSSDs of a pool: disks that grow and shrink while their guests run.
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
    /// The daemon's control or monitor socket [default: /run/vssd/control.sock, else
    /// $XDG_RUNTIME_DIR/vssd/control.sock]
    #[arg(short, long, global = true, value_name = "PATH", env = PROGRAM.peer.socket_env)]
    #[arg(hide_env_values = true)]
    pub(crate) socket: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the vSSDs of the pool
    List {
        /// Order of the rows; sizes come largest first
        #[arg(long, value_name = "KEY", default_value = "name")]
        sort: SortKey,
    },
    /// Show all there is to know about a vSSD
    Show {
        /// Name of the vSSD
        name: String,
    },
    /// Create a vSSD
    Create(CreateArgs),
    /// Delete a vSSD and its data
    Delete {
        /// Name of the vSSD
        name: String,
        /// Even while a front-end is connected
        #[arg(long)]
        force: bool,
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
        /// Only check whether it could be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Change the size of a vSSD in agreement with its guest
    Resize {
        /// Name of the vSSD
        name: String,
        /// The new size (20G), the change (+2G, -2G), or one of the limits (min, max)
        #[arg(allow_hyphen_values = true)]
        size: SizeChange,
        #[command(flatten)]
        options: ResizeArgs,
    },
    /// Give a vSSD more space
    Grow {
        /// Name of the vSSD
        name: String,
        /// How much to add (2G or +2G)
        #[arg(allow_hyphen_values = true, value_parser = grow_amount)]
        amount: SizeChange,
        #[command(flatten)]
        options: ResizeArgs,
    },
    /// Ask the guest of a vSSD to give space back
    Shrink {
        /// Name of the vSSD
        name: String,
        /// How much to give back (2G or -2G)
        #[arg(allow_hyphen_values = true, value_parser = shrink_amount)]
        amount: SizeChange,
        #[command(flatten)]
        options: ResizeArgs,
    },
    /// Show how much the guest of a vSSD could give up now, by what that would cost it
    ///
    /// As its agent said last: nothing is promised, for the guest goes on meanwhile.
    Estimate {
        /// Name of the vSSD
        name: String,
    },
    /// Ask the agent of a guest whose driver cannot give blocks up to use less of the disk
    ///
    /// The guest's file system gives free space back to the pool and does not use it for as long as the wish stands. Nothing
    /// enforces that, and the pool goes on promising the whole size to the guest: where the guest has the vSSD driver, shrink.
    Reclaim {
        /// Name of the vSSD
        name: String,
        /// How much of the disk the guest may go on using (20G), or off: all of it
        #[arg(value_parser = soft_size)]
        size: SoftSize,
        /// How long to wait for it; the vSSD's policy, or two minutes, unless told
        #[arg(long, value_name = "SECONDS", value_parser = some_time)]
        deadline: Option<Millis>,
        /// Do not wait for the job to end
        #[arg(long, conflicts_with = "wait")]
        no_wait: bool,
        /// Wait for the job to end; the default
        #[arg(long)]
        wait: bool,
        /// Only say what would be asked
        #[arg(long)]
        dry_run: bool,
    },
    /// Make durable what the guests of vSSDs were told is written, whether they flushed it or not
    ///
    /// For whoever saves whole virtual machines before the power goes: stop them first, then sync. Guests that run go on
    /// meanwhile, and what is written later is not covered.
    Sync {
        /// Names of the vSSDs [default: all]
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },
    /// Show or change the limits and policies of a vSSD
    Limits(LimitsArgs),
    /// List the blocks that a vSSD does not have at present
    Evicted {
        /// Name of the vSSD
        name: String,
    },
    /// List the jobs of the daemon
    Jobs,
    /// Show, wait for or cancel a job
    #[command(subcommand)]
    Job(JobCommand),
    /// Print what has happened, oldest first
    Events {
        /// Go on with what happens from now on
        #[arg(short, long)]
        follow: bool,
        /// Begin after the event of this number [default: all that is kept; with --follow: only new ones]
        #[arg(long, value_name = "SEQ")]
        since: Option<u64>,
        /// Only events whose names begin with one of these, such as shrink. or device.created
        #[arg(long = "type", value_name = "PREFIX", num_args = 1.., value_delimiter = ',')]
        types: Vec<String>,
    },
    /// Show, create or check a pool
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Print what to give to a virtual machine monitor so that its guest gets the vSSD
    AttachInfo {
        /// Name of the vSSD
        name: String,
        /// The virtual machine monitor
        #[arg(long = "for", value_name = "VMM")]
        vmm: Vmm,
        /// Queues of the disk, best one for each virtual CPU
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
        queues: u16,
        /// RAM of the guest
        #[arg(long, value_name = "SIZE", default_value = "2G")]
        memory: ByteCount,
    },
    /// Look for what keeps vSSDs from working on this host
    Doctor,
    /// Ask whether the daemon answers
    Ping,
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
        /// Such as device.show
        method: String,
        /// The parameters, a JSON object
        #[arg(value_name = "JSON")]
        params: Option<String>,
    },
}

/// How much of a disk a guest may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SoftSize {
    Bytes(u64),
    Off,
}

fn soft_size(text: &str) -> Result<SoftSize, String> {
    if text == "off" {
        return Ok(SoftSize::Off);
    }
    text.parse().map(|ByteCount(bytes)| SoftSize::Bytes(bytes)).map_err(|error| format!("{error}, nor off"))
}

/// A virtual machine monitor that `attach-info` knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Vmm {
    Qemu,
    Libvirt,
    CloudHypervisor,
    Crosvm,
    Firecracker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SortKey {
    Name,
    Id,
    State,
    Size,
    Used,
    Target,
    Min,
    Max,
}

#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// Its name: letters, digits, dot, underscore and hyphen, at most 31
    #[arg(value_parser = new_name)]
    pub(crate) name: String,
    /// How much the guest gets at first
    #[arg(long)]
    pub(crate) size: ByteCount,
    /// Never ask the guest for less than this [default: one block]
    #[arg(long, value_name = "SIZE")]
    pub(crate) min: Option<ByteCount>,
    /// How far the vSSD can grow [default: --size]
    #[arg(long, value_name = "SIZE")]
    pub(crate) max: Option<ByteCount>,
    /// Which media its blocks may come from
    #[arg(long, default_value = "any", value_parser = one_of::<Class>(&["any", "nvram", "ssd"]))]
    pub(crate) class: Class,
    #[command(flatten)]
    pub(crate) policy: PolicyArgs,
    /// Only check whether it could be done
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PolicyArgs {
    /// When a shrink's deadline passes: go on asking, give up, or take the blocks, data or not
    #[arg(long, value_name = "POLICY", value_parser = one_of::<OnTimeout>(&["wait", "fail", "force"]))]
    pub(crate) on_timeout: Option<OnTimeout>,
    /// Deadline of a shrink that names none; 0 for none
    #[arg(long, value_name = "TIME")]
    pub(crate) deadline: Option<Millis>,
    /// When the guest asks for more: tell the operator, or grant it within the limits
    #[arg(long, value_name = "POLICY", value_parser = one_of::<PullPolicy>(&["notify", "grant"]))]
    pub(crate) pull: Option<PullPolicy>,
}

impl PolicyArgs {
    /// The policy of a new vSSD.
    pub(crate) fn to_policy(&self) -> control::Policy {
        let default = control::Policy::default();
        control::Policy {
            on_timeout: self.on_timeout.unwrap_or(default.on_timeout),
            deadline_ms: self.deadline.map_or(default.deadline_ms, |time| time.0),
            pull: self.pull.unwrap_or(default.pull),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ResizeArgs {
    /// Wait until the guest has done its part (the default)
    #[arg(long, overrides_with = "no_wait")]
    pub(crate) wait: bool,
    /// Return as soon as the daemon has accepted the request
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// Time the guest has; 0 for no limit [default: the vSSD's policy]
    #[arg(long, value_name = "TIME")]
    pub(crate) deadline: Option<Millis>,
    /// When the deadline passes: go on asking, give up, or take the blocks, data or not [default: the
    /// vSSD's policy]
    #[arg(long, value_name = "POLICY", value_parser = one_of::<OnTimeout>(&["wait", "fail", "force"]))]
    pub(crate) on_timeout: Option<OnTimeout>,
    /// Only say what would happen
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Take the blocks without asking the guest; data may be lost
    #[arg(long)]
    pub(crate) force: bool,
    /// Do not ask whether --force is meant
    #[arg(short, long)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LimitsArgs {
    /// Name of the vSSD
    pub(crate) name: String,
    /// Never ask the guest for less than this
    #[arg(long, value_name = "SIZE")]
    pub(crate) min: Option<ByteCount>,
    /// How far the vSSD can grow; may only be raised
    #[arg(long, value_name = "SIZE")]
    pub(crate) max: Option<ByteCount>,
    #[command(flatten)]
    pub(crate) policy: PolicyArgs,
}

impl LimitsArgs {
    /// Whether the command only shows.
    pub(crate) fn is_empty(&self) -> bool {
        let policy = &self.policy;
        self.min.is_none()
            && self.max.is_none()
            && policy.on_timeout.is_none()
            && policy.deadline.is_none()
            && policy.pull.is_none()
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum JobCommand {
    /// Show a job
    Show {
        /// Number of the job
        id: u64,
    },
    /// End a job; what it has moved stays moved
    Cancel {
        /// Number of the job
        id: u64,
    },
    /// Wait until a job has ended
    Wait {
        /// Number of the job
        id: u64,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Show how full the pool is and the state of its media
    Status,
    /// Make a pool on a file or block device (runs `vssd-backend pool create`)
    Create(PoolCreateArgs),
    /// Check a pool that no daemon uses (runs `vssd-backend pool check`)
    Check {
        /// The media of the pool
        #[arg(required = true, value_name = "FILE")]
        files: Vec<OsString>,
    },
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("medium").required(true).multiple(true))]
pub(crate) struct PoolCreateArgs {
    /// NV-RAM medium: a file on a DAX mount, tmpfs or hugetlbfs, or a pmem device; the size makes the file
    #[arg(long, value_name = "FILE[:SIZE]", group = "medium")]
    pub(crate) nvram: Option<OsString>,
    /// SSD medium: a file or a block device; the size makes the file
    #[arg(long, value_name = "FILE[:SIZE]", group = "medium")]
    pub(crate) ssd: Option<OsString>,
    /// The unit in which vSSDs grow and shrink, 4K to 2M [default: 64K]
    #[arg(long, value_name = "SIZE")]
    pub(crate) block_size: Option<OsString>,
    /// Name of the pool
    #[arg(long)]
    pub(crate) name: Option<OsString>,
    /// How much may be promised to vSSDs, in percent of the pool's size
    #[arg(long, value_name = "PERCENT")]
    pub(crate) overcommit: Option<OsString>,
    /// Even if the media hold a pool or other data
    #[arg(long)]
    pub(crate) force: bool,
}

fn new_name(text: &str) -> Result<String, String> {
    if is_valid_name(text) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "a name has 1 to {} letters, digits, dots, underscores and hyphens, and begins with none of . and -",
            control::MAX_NAME
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(args: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("balloon-ctl").chain(args.iter().copied()))
    }

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn signed_sizes_are_values_wherever_options_stand() {
        for args in [
            &["resize", "vm1", "-2G", "--no-wait", "-b"][..],
            &["resize", "--no-wait", "vm1", "-2G", "-b"],
            &["resize", "vm1", "--no-wait", "-b", "-2G"],
            &["-b", "resize", "vm1", "--no-wait", "--", "-2G"],
        ] {
            let cli = parse(args).unwrap_or_else(|err| panic!("{args:?}: {err}"));
            assert!(cli.global.common.exact, "{args:?}");
            let Command::Resize { name, size, options } = cli.command else { panic!("{args:?}") };
            assert_eq!((name.as_str(), size), ("vm1", SizeChange::ShrinkBy(2 << 30)), "{args:?}");
            assert!(options.no_wait, "{args:?}");
        }
        let Command::Shrink { amount, .. } = parse(&["shrink", "vm1", "-2G"]).unwrap().command else {
            panic!()
        };
        assert_eq!(amount, SizeChange::ShrinkBy(2 << 30));
        let Command::Grow { amount, .. } = parse(&["grow", "vm1", "+2G"]).unwrap().command else { panic!() };
        assert_eq!(amount, SizeChange::GrowBy(2 << 30));
    }

    #[test]
    fn mistyped_option_is_not_taken_for_a_size() {
        for args in
            [&["resize", "vm1", "--dryrun"][..], &["shrink", "vm1", "2G", "--forec"], &["grow", "vm1", "-2G"]]
        {
            assert_eq!(parse(args).unwrap_err().exit_code(), 2, "{args:?}");
        }
    }

    #[test]
    fn the_last_of_wait_and_no_wait_counts() {
        let options = |args: &[&str]| match parse(args).unwrap().command {
            Command::Grow { options, .. } => options,
            other => panic!("{other:?}"),
        };
        assert!(options(&["grow", "vm1", "1G", "--wait", "--no-wait"]).no_wait);
        assert!(!options(&["grow", "vm1", "1G", "--no-wait", "--wait"]).no_wait);
    }

    #[test]
    fn the_last_socket_counts_so_that_an_alias_can_name_another() {
        for args in [
            &["-s", "a", "-s", "b", "list"][..],
            &["-s", "a", "list", "-s", "b"],
            &["list", "-s", "a", "-s", "b"],
        ] {
            assert_eq!(parse(args).unwrap().global.socket.as_deref(), Some("b".as_ref()), "{args:?}");
        }
        let Command::Events { types, .. } =
            parse(&["events", "--type", "a", "--type", "b,c"]).unwrap().command
        else {
            panic!()
        };
        assert_eq!(types, ["a", "b", "c"]);
    }

    #[test]
    fn policies_are_spelled_as_on_the_wire() {
        let Command::Create(args) = parse(&[
            "create",
            "vm1",
            "--size",
            "20G",
            "--class",
            "nvram",
            "--on-timeout",
            "force",
            "--deadline",
            "5m",
            "--pull",
            "grant",
        ])
        .unwrap()
        .command
        else {
            panic!()
        };
        assert_eq!(args.class, Class::Nvram);
        assert_eq!(
            args.policy.to_policy(),
            control::Policy { on_timeout: OnTimeout::Force, deadline_ms: 300_000, pull: PullPolicy::Grant }
        );
        assert!(parse(&["create", "vm1", "--size", "20G", "--on-timeout", "FORCE"]).is_err());
    }
}
