// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the daemon is told at its start: command line over configuration file over defaults.
//!
//! A first run needs no file. What the file does not know it refuses, with line and column, so that a typing error cannot
//! silently leave a default in force. vSSDs and their limits are not configuration: they live in the pool.

use std::num::NonZeroUsize;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;
use vssd_protocol::guest::MAX_RANGES;
use vssd_protocol::units::ByteCount;

/// Queues that a front-end may use on one vSSD.
const DEFAULT_QUEUES: u16 = 16;
const MAX_QUEUES: u16 = 256;
/// Off: a processor spent on looking is one that a guest does not have.
const DEFAULT_POLL_US: u16 = 0;

/// Serves resizable virtual SSDs (vSSDs) from one pool over vhost-user.
///
/// With --blk-file it serves a single vSSD that fills a pool in that file, made at first use. With --pool or --config it
/// serves every vSSD of a pool, each on its own socket, and is steered with balloon-ctl.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Makes or examines a pool that no daemon is using
    #[command(subcommand)]
    Pool(PoolCommand),
}

#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Makes a pool
    Create(PoolCreateArgs),
    /// Looks for damage; changes nothing
    Check(PoolCheckArgs),
}

#[derive(Debug, Args)]
pub struct PoolCreateArgs {
    /// NV-RAM medium: a device, a file, or a new file as FILE:SIZE
    #[arg(long, value_name = "FILE[:SIZE]")]
    pub nvram: Option<String>,
    /// SSD medium: a device, a file, or a new file as FILE:SIZE
    #[arg(long, value_name = "FILE[:SIZE]", required_unless_present = "nvram")]
    pub ssd: Option<String>,
    /// Unit of growing and shrinking: a power of two from 4K to 2M
    #[arg(long, value_name = "SIZE", default_value = "64K")]
    pub block_size: ByteCount,
    #[arg(long, default_value = "pool")]
    pub name: String,
    /// How much may be promised to vSSDs, in per cent of what there is
    #[arg(long, value_name = "PERCENT", default_value_t = 100)]
    pub overcommit: u32,
    /// Overwrite whatever the media hold
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct PoolCheckArgs {
    /// Every medium of the pool
    #[arg(required = true, value_name = "FILE")]
    pub media: Vec<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Listen on this vhost-user socket (one vSSD)
    #[arg(long, value_name = "PATH", conflicts_with = "fd", requires = "blk_file")]
    pub socket_path: Option<PathBuf>,
    /// Serve the vhost-user socket inherited as this descriptor (one vSSD)
    #[arg(long, value_name = "FDNUM", requires = "blk_file")]
    pub fd: Option<RawFd>,
    /// Pool file of the one vSSD; made at first use if --size is given
    #[arg(long, value_name = "FILE", conflicts_with_all = ["pool", "config"])]
    pub blk_file: Option<PathBuf>,
    /// Size of the pool file made at first use
    #[arg(long, requires = "blk_file")]
    pub size: Option<ByteCount>,
    /// What the pool file made at first use lies on
    #[arg(long, value_enum, requires = "blk_file", default_value = "ssd")]
    pub medium: MediumArg,
    /// Block size of the pool file made at first use
    #[arg(long, requires = "blk_file", value_name = "SIZE", default_value = "64K")]
    pub block_size: ByteCount,
    /// Let guests read only
    #[arg(long)]
    pub read_only: bool,
    /// Print what this program can do as JSON and end
    #[arg(long)]
    pub print_capabilities: bool,
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Read the configuration, say whether it is valid, and end
    #[arg(long)]
    pub check_config: bool,
    /// Medium of the pool; once for each
    #[arg(long, value_name = "FILE")]
    pub pool: Vec<PathBuf>,
    /// Folder for sockets: control.sock, monitor.sock and dev/NAME.sock
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// Control socket, if not in the runtime folder
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,
    /// Monitor socket, if not in the runtime folder
    #[arg(long, value_name = "PATH")]
    pub monitor_socket: Option<PathBuf>,
    /// Group that may use the control socket and the vSSDs' sockets
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,
    /// Threads that do I/O; one for each processor if not given
    #[arg(long, value_name = "N")]
    pub workers: Option<NonZeroUsize>,
    /// Queues that a front-end may use on one vSSD
    #[arg(long, value_name = "N")]
    pub queues: Option<u16>,
    /// How long a thread may look for work before it sleeps, in microseconds; adapts to the load, 0 means never
    #[arg(long, value_name = "MICROSECONDS")]
    pub poll_us: Option<u16>,
    /// Ranges of blocks that a guest may put into one message; fewer only to measure what small messages cost
    #[arg(long, value_name = "N", default_value_t = MAX_RANGES, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RANGES)))]
    pub max_ranges: u32,
    /// Give up what the daemon does not need once it serves; off for debuggers [default: on]
    #[arg(long, value_enum, value_name = "ON|OFF")]
    pub sandbox: Option<Switch>,
    #[arg(long, value_enum)]
    pub log_format: Option<LogFormat>,
    /// error, warn, info, debug or trace, or a filter such as vssd_pool=debug
    #[arg(long, value_name = "LEVEL", env = "VSSD_LOG")]
    pub log_level: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum MediumArg {
    #[default]
    Ssd,
    Nvram,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    #[default]
    On,
    Off,
}

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConfigFile {
    pool: PoolSection,
    server: ServerSection,
    log: LogSection,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PoolSection {
    media: Vec<PathBuf>,
    read_only: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ServerSection {
    runtime_dir: Option<PathBuf>,
    control_socket: Option<PathBuf>,
    monitor_socket: Option<PathBuf>,
    socket_group: Option<String>,
    workers: Option<NonZeroUsize>,
    queues: Option<u16>,
    poll_us: Option<u16>,
    sandbox: Option<Switch>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LogSection {
    format: Option<LogFormat>,
    level: Option<String>,
}

/// Which vSSDs are served, and where.
#[derive(Debug)]
pub enum Serve {
    /// All of a pool.
    Pool { media: Vec<PathBuf>, device_dir: PathBuf },
    /// One, in a pool of its own.
    Single(Single),
}

#[derive(Debug)]
pub struct Single {
    pub file: PathBuf,
    pub socket: SingleSocket,
    pub create: Option<ByteCount>,
    pub medium: MediumArg,
    pub block_size: ByteCount,
}

#[derive(Debug)]
pub enum SingleSocket {
    Path(PathBuf),
    Inherited(RawFd),
}

/// The whole configuration, checked.
#[derive(Debug)]
pub struct Config {
    pub serve: Serve,
    pub control_socket: Option<PathBuf>,
    pub monitor_socket: Option<PathBuf>,
    pub socket_group: Option<String>,
    pub workers: usize,
    pub queues: u16,
    pub polling: Duration,
    pub max_ranges: u32,
    pub read_only: bool,
    pub sandbox: bool,
    pub log_format: LogFormat,
    pub log_level: String,
}

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {path:?}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{path:?} is not a valid configuration")]
    Parse {
        path: PathBuf,
        #[source]
        source: Box<toml::de::Error>,
    },
    #[error("nothing to serve: give --blk-file and --socket-path for one vSSD, or --pool for a pool")]
    NothingToServe,
    #[error("--blk-file needs --socket-path or --fd")]
    NoSocket,
    #[error("{0} queues: between 1 and {MAX_QUEUES} are possible")]
    Queues(u16),
    #[error("no runtime folder: give --runtime-dir")]
    NoRuntimeDir,
}

impl ServeArgs {
    /// Adds the configuration file and the defaults.
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let file = self.config.as_deref().map(read).transpose()?.unwrap_or_default();
        let queues = self.queues.or(file.server.queues).unwrap_or(DEFAULT_QUEUES);
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(ConfigError::Queues(queues));
        }
        let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let mut control_socket = self.control_socket.or(file.server.control_socket);
        let mut monitor_socket = self.monitor_socket.or(file.server.monitor_socket);
        let runtime_dir = self.runtime_dir.or(file.server.runtime_dir);
        let serve = if let Some(blk_file) = self.blk_file {
            let socket = match (self.socket_path, self.fd) {
                (Some(path), _) => SingleSocket::Path(path),
                (None, Some(fd)) => SingleSocket::Inherited(fd),
                (None, None) => return Err(ConfigError::NoSocket),
            };
            if let Some(dir) = &runtime_dir {
                control_socket.get_or_insert_with(|| dir.join("control.sock"));
                monitor_socket.get_or_insert_with(|| dir.join("monitor.sock"));
            }
            Serve::Single(Single {
                file: blk_file,
                socket,
                create: self.size,
                medium: self.medium,
                block_size: self.block_size,
            })
        } else {
            let media = if self.pool.is_empty() { file.pool.media } else { self.pool };
            if media.is_empty() {
                return Err(ConfigError::NothingToServe);
            }
            let dir = runtime_dir.or_else(default_runtime_dir).ok_or(ConfigError::NoRuntimeDir)?;
            control_socket.get_or_insert_with(|| dir.join("control.sock"));
            monitor_socket.get_or_insert_with(|| dir.join("monitor.sock"));
            Serve::Pool { media, device_dir: dir.join("dev") }
        };
        Ok(Config {
            serve,
            control_socket,
            monitor_socket,
            socket_group: self.socket_group.or(file.server.socket_group),
            workers: self.workers.or(file.server.workers).map_or(processors, NonZeroUsize::get),
            queues,
            polling: Duration::from_micros(
                self.poll_us.or(file.server.poll_us).unwrap_or(DEFAULT_POLL_US).into(),
            ),
            max_ranges: self.max_ranges,
            read_only: self.read_only || file.pool.read_only,
            sandbox: self.sandbox.or(file.server.sandbox).unwrap_or_default() == Switch::On,
            log_format: self.log_format.or(file.log.format).unwrap_or_default(),
            log_level: self.log_level.or(file.log.level).unwrap_or_else(|| "info".to_owned()),
        })
    }
}

fn read(path: &Path) -> Result<ConfigFile, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    toml::from_str(&text)
        .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
}

/// `/run/vssd` for root, else the user's own runtime folder. The same places that balloon-ctl looks in.
fn default_runtime_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some(PathBuf::from("/run/vssd"));
    }
    std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("vssd"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(args: &[&str]) -> Result<Config, String> {
        let cli = Cli::try_parse_from([&["vssd-backend"], args].concat()).map_err(|e| e.to_string())?;
        cli.serve.resolve().map_err(|e| e.to_string())
    }

    #[test]
    fn one_vssd_needs_a_file_and_a_socket() {
        let config = resolve(&["--socket-path=/s", "--blk-file=/f", "--size=1G"]).unwrap();
        let Serve::Single(single) = config.serve else { panic!("not a single vSSD") };
        assert_eq!(single.create, Some(ByteCount(1 << 30)));
        assert!(config.control_socket.is_none());
        assert!(resolve(&["--socket-path=/s"]).is_err());
        assert!(resolve(&["--blk-file=/f"]).is_err());
        assert!(resolve(&["--socket-path=/s", "--fd=3", "--blk-file=/f"]).is_err(), "mutually exclusive");
        assert!(resolve(&[]).is_err());
    }

    #[test]
    fn messages_have_between_one_range_and_what_the_codec_takes() {
        let with =
            |ranges: u32| resolve(&["--pool=/a", "--runtime-dir=/r", &format!("--max-ranges={ranges}")]);
        assert_eq!(resolve(&["--pool=/a", "--runtime-dir=/r"]).unwrap().max_ranges, MAX_RANGES);
        assert_eq!(with(1).unwrap().max_ranges, 1);
        assert_eq!(with(MAX_RANGES).unwrap().max_ranges, MAX_RANGES);
        assert!(with(0).is_err() && with(MAX_RANGES + 1).is_err());
    }

    #[test]
    fn the_command_line_wins_over_the_file_and_unknown_keys_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vssd.toml");
        std::fs::write(&path, "[pool]\nmedia = ['/a']\n[server]\nruntime_dir = '/r'\nqueues = 4\n").unwrap();
        let path = path.to_str().unwrap();
        let config = resolve(&["--config", path, "--queues=8"]).unwrap();
        assert_eq!(config.queues, 8);
        assert!(config.sandbox, "on by default");
        assert!(!resolve(&["--config", path, "--sandbox=off"]).unwrap().sandbox);
        assert_eq!(config.control_socket, Some(PathBuf::from("/r/control.sock")));
        std::fs::write(path, "[pool]\nmediums = []\n").unwrap();
        let error =
            Cli::try_parse_from(["vssd-backend", "--config", path]).unwrap().serve.resolve().unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("line 2") && source.contains("mediums"), "{source}");
    }
}
