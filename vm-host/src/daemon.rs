// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Puts the daemon together, runs it, and ends it. Guests outlive it.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use control_server::blocking::{Feed, Listeners, ServeError, serve};
use control_server::{Clock, bind, group_id};
use rustix::fs::{FlockOperation, flock};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing::info;

use crate::config::{Config, ConfigError};
use crate::fault::Fault;
use crate::guard::Unstarted;
use crate::host::Host;
use crate::news::Reporter;
use crate::power::{SourceConfig, StartError, block_signals};
use crate::service::Verbs;

/// How long calls that are under way may take to end when the daemon is asked to.
const PATIENCE: Duration = Duration::from_secs(5);
/// Sockets and logs of guests are their owner's business.
const PRIVATE: u32 = 0o750;

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("cannot {doing} {}", path.display())]
    Path { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("another vm-host has {} open", path.display())]
    Locked { path: PathBuf },
    #[error("cannot use the group {name:?}")]
    Group { name: String, source: io::Error },
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    #[error("{0}")]
    Host(#[from] Fault),
    #[error("cannot watch the power")]
    Power(#[from] StartError),
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Serves until SIGTERM or SIGINT. The guests run on.
pub fn run(config: &Config) -> Result<(), DaemonError> {
    // Before any thread: it ends the process otherwise.
    if config.power.sources.iter().any(|source| matches!(source, SourceConfig::Signal(_))) {
        block_signals().map_err(DaemonError::Signals)?;
    }
    let shutdown = end_on_signals().map_err(DaemonError::Signals)?;
    for dir in [&config.state_dir, &config.runtime_dir, &config.log_dir] {
        let made = DirBuilder::new().recursive(true).mode(PRIVATE).create(dir);
        made.map_err(|source| DaemonError::Path { doing: "make", path: dir.clone(), source })?;
    }
    let _lock = lock(&config.state_dir)?;
    let group_of =
        |name: &String| group_id(name).map_err(|source| DaemonError::Group { name: name.clone(), source });
    let group = config.socket_group.as_ref().map(group_of).transpose()?;

    let feed = Arc::new(Feed::new(Clock::start()));
    let guard = Unstarted::new();
    let backend = config.vssd.runtime_dir.join("control.sock");
    let reporter = Arc::new(Reporter { feed: Arc::clone(&feed), bell: guard.bell(), backend });
    let host = Arc::new(Host::open(config, Arc::clone(&reporter) as _)?);
    // The power may fail again while guests are being resumed.
    let guard = guard.start(config.power.clone(), Arc::clone(&host), reporter)?;
    let recovered = host.recover();
    info!(ok = recovered.ok, failed = recovered.failed, ms = recovered.took.as_millis(), "recovered");

    let listen = |name: &str, mode| {
        let path = config.runtime_dir.join(name);
        bind(&path, mode, group).map_err(|source| DaemonError::Path { doing: "listen on", path, source })
    };
    let listeners = Listeners {
        control: Some(listen("control.sock", 0o660)?),
        monitor: Some(listen("monitor.sock", 0o666)?),
    };
    let verbs = Arc::new(Verbs::new(host, guard, feed, config.log_dir.clone()));
    info!(socket = %config.runtime_dir.join("control.sock").display(), "serving");
    serve(listeners, verbs, shutdown.into(), PATIENCE)?;
    info!("ends; guests run on");
    Ok(())
}

/// Readable once the daemon is to end.
fn end_on_signals() -> io::Result<UnixStream> {
    let (readable, writable) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT] {
        signal_hook::low_level::pipe::register(signal, writable.try_clone()?)?;
    }
    Ok(readable)
}

/// Two daemons with the same records would each start every guest.
fn lock(state_dir: &Path) -> Result<File, DaemonError> {
    let path = state_dir.join("lock");
    let file = File::create(&path).map_err(|source| DaemonError::Path {
        doing: "make",
        path: path.clone(),
        source,
    })?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DaemonError::Locked { path: state_dir.to_owned() }),
        Err(errno) => Err(DaemonError::Path { doing: "lock", path, source: errno.into() }),
    }
}
