// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Puts the daemon together from its parts, runs it, and takes it apart in order:
//! sockets close first, then the workers end, then the pool.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use control_server::{bind, group_id};
use rustix::event::{EventfdFlags, eventfd};
use tracing::{info, warn};
use vssd_pool::{
    CreateOptions, MediumKind, MediumSpec, OpenOptions, Pool, PoolThread, ThreadStart, VssdAttrs, VssdSpec,
};
use vssd_protocol::control::is_valid_name;
use vssd_protocol::units::{BlockSize, ByteCount};

use crate::config::{Config, MediumArg, Serve, Single, SingleSocket};
use crate::control::{Server, ServerOptions};
use crate::device::OwnerHandle;
use crate::nursery::Nursery;
use crate::sandbox::{self, Files, Sandbox, Thread};
use crate::vhost_user::frontends::{FrontendOptions, SocketSource, VhostUserFrontends};
use crate::vhost_user::worker::Workers;

const CANNOT_CONFINE: &str = "cannot confine the daemon; --sandbox=off does without";

/// Serves until SIGTERM or SIGINT. A second signal ends the process at once.
pub fn run(config: &Config) -> Result<()> {
    let group =
        config.socket_group.as_deref().map(group_id).transpose().context("cannot use the socket's group")?;
    // Threads inherit it: before the first.
    let files = files(config)?;
    let (sandbox, refusals) = if config.sandbox {
        let prepared = sandbox::prepare(&files).and_then(|()| Sandbox::new());
        let (sandbox, refusals) = prepared.context(CANNOT_CONFINE)?;
        // Its threads will not be allowed to.
        vssd_pool::sigbus::install();
        (sandbox, Some(refusals))
    } else {
        (Sandbox::off(), None)
    };
    let shutdown =
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).context("cannot make an eventfd")?;
    end_on_signals(shutdown.try_clone()?, sandbox.clone())?;
    let nursery = Nursery::start(sandbox.clone()).context("cannot start a thread")?;

    let (pool, source) = open(config, &sandbox)?;
    let workers = Workers::spawn(&pool, config.workers, config.polling, &sandbox)
        .context("cannot start the worker threads")?;
    let (owner, events, wake) = OwnerHandle::new().context("cannot make the owner's event queue")?;
    let options = FrontendOptions {
        source,
        mode: 0o660,
        group,
        queues: config.queues,
        read_only: config.read_only,
        logical_block_size: pool.info().logical_block_bytes,
    };
    let finished = Some(shutdown.try_clone()?);
    let frontends = VhostUserFrontends::new(options, workers.handles(), owner, finished, nursery);

    let listen = |path: &Path, mode, group| {
        bind(path, mode, group).with_context(|| format!("cannot listen on {}", path.display()))
    };
    let control = config.control_socket.as_deref().map(|path| listen(path, 0o660, group)).transpose()?;
    let monitor = config.monitor_socket.as_deref().map(|path| listen(path, 0o666, None)).transpose()?;
    let server = Server::new(ServerOptions {
        pool: Arc::clone(&pool),
        frontends: Box::new(frontends),
        events,
        wake,
        control,
        monitor,
        shutdown,
        refusals,
    })
    .context("cannot start serving")?
    .with_max_ranges(config.max_ranges);
    sandbox.close().context(CANNOT_CONFINE)?;
    let ended = server.run().context("the control loop failed");

    info!("ending: no vSSD is served any more");
    drop(workers);
    pool.close().context("cannot close the pool")?;
    for path in [&config.control_socket, &config.monitor_socket].into_iter().flatten() {
        let _ = fs::remove_file(path);
    }
    ended
}

/// What is to be opened or made from now on. Makes the folders of sockets that are missing.
fn files(config: &Config) -> Result<Files> {
    let mut files = Files::default();
    match &config.serve {
        Serve::Pool { media, device_dir } => {
            files.media.clone_from(media);
            files.sockets.push(device_dir.clone());
        }
        Serve::Single(single) => {
            let file = &single.file;
            files.media.push(if file.exists() { file.clone() } else { folder(file) });
            if let SingleSocket::Path(path) = &single.socket {
                files.sockets.push(folder(path));
            }
        }
    }
    let sockets = [&config.control_socket, &config.monitor_socket];
    files.sockets.extend(sockets.into_iter().flatten().map(|path| folder(path)));
    for dir in &files.sockets {
        fs::create_dir_all(dir).with_context(|| format!("cannot make the folder {}", dir.display()))?;
    }
    Ok(files)
}

/// The folder that a file is in.
fn folder(path: &Path) -> PathBuf {
    let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    parent.unwrap_or(Path::new(".")).to_owned()
}

/// Opens the pool and decides where its vSSDs' sockets are.
fn open(config: &Config, sandbox: &Sandbox) -> Result<(Arc<Pool>, SocketSource)> {
    match &config.serve {
        Serve::Pool { media, device_dir } => {
            let mut options = OpenOptions::new(media);
            options.read_only = config.read_only;
            options.thread_start = Some(confine_pool(sandbox));
            let pool = Pool::open(&options).with_context(|| {
                let names: Vec<_> = media.iter().map(|path| path.display().to_string()).collect();
                format!("cannot open the pool on {}", names.join(", "))
            })?;
            Ok((pool, SocketSource::Directory(device_dir.clone())))
        }
        Serve::Single(single) => {
            let pool = open_single(single, config.read_only, sandbox)?;
            let source = match &single.socket {
                SingleSocket::Path(path) => SocketSource::Path(path.clone()),
                SingleSocket::Inherited(fd) => SocketSource::Inherited(inherit(*fd)?),
            };
            Ok((pool, source))
        }
    }
}

/// Opens the pool of the one vSSD, made first if it does not exist.
fn open_single(single: &Single, read_only: bool, sandbox: &Sandbox) -> Result<Arc<Pool>> {
    let file = single.file.display();
    if !single.file.exists() {
        let Some(size) = single.create else {
            bail!("{file} does not exist; give --size to make it");
        };
        let block_size = block_size(single.block_size)?;
        let kind = match single.medium {
            MediumArg::Ssd => MediumKind::Ssd,
            MediumArg::Nvram => MediumKind::Nvram,
        };
        let bytes = vssd_pool::medium_bytes(size.0, block_size).context("--size cannot be served")?;
        let medium = MediumSpec::new(kind, &single.file, Some(bytes));
        let mut options = CreateOptions::new("single", vec![medium]);
        options.block_size = block_size;
        Pool::create(&options).with_context(|| format!("cannot make a pool in {file}"))?;
        info!(file = %file, %size, "pool made");
    }
    let mut options = OpenOptions::new([&single.file]);
    options.read_only = read_only;
    options.thread_start = Some(confine_pool(sandbox));
    let pool = Pool::open(&options).with_context(|| format!("cannot open the pool in {file}"))?;
    let count = pool.vssds().len();
    ensure!(count <= 1, "the pool in {file} has {count} vSSDs: serve it with --pool");
    if count == 0 {
        let info = pool.info();
        let wanted = single.create.and_then(|size| info.block_size.blocks_for(size.0));
        let blocks = wanted.map_or(info.total_blocks, |wanted| wanted.min(info.total_blocks));
        let attrs = VssdAttrs { requested_blocks: blocks, min_blocks: 1, ..VssdAttrs::default() };
        let name = single_name(&single.file);
        let spec = VssdSpec { name, max_blocks: blocks, initial_blocks: blocks, attrs };
        pool.create_vssd(&spec).context("cannot make the vSSD")?;
    }
    Ok(pool)
}

/// Each of the pool's threads gives up what it does not need when it begins.
fn confine_pool(sandbox: &Sandbox) -> ThreadStart {
    let sandbox = sandbox.clone();
    ThreadStart::new(move |thread| {
        sandbox.enter_early(match thread {
            PoolThread::Keeper => Thread::Keeper,
            PoolThread::Committer => Thread::Committer,
            PoolThread::Scrubber => Thread::Scrubber,
            PoolThread::Syncer => Thread::Syncer,
        });
    })
}

/// Names the one vSSD after its file where that is a valid name.
fn single_name(file: &Path) -> String {
    let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    if is_valid_name(stem) { stem.to_owned() } else { "disk".to_owned() }
}

/// Checks a block size from a command line.
pub fn block_size(bytes: ByteCount) -> Result<BlockSize> {
    u32::try_from(bytes.0).ok().and_then(BlockSize::new).with_context(|| {
        format!(
            "block size {bytes} is not a power of two from {} to {}",
            ByteCount(u64::from(BlockSize::MIN)),
            ByteCount(u64::from(BlockSize::MAX))
        )
    })
}

/// Takes over a descriptor that whoever started the daemon left open.
fn inherit(fd: RawFd) -> Result<OwnedFd> {
    ensure!(fd > 2, "--fd={fd}: 0, 1 and 2 are standard input, output and error");
    // SAFETY: `fcntl` with F_GETFD takes no pointers and fails on a descriptor that is not open.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    ensure!(flags >= 0, "--fd={fd}: {}", io::Error::last_os_error());
    // SAFETY: the descriptor is open, and by the convention of --fd it is ours.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    let kind =
        rustix::net::sockopt::socket_type(&owned).with_context(|| format!("--fd={fd} is no socket"))?;
    ensure!(kind == rustix::net::SocketType::STREAM, "--fd={fd} is no stream socket");
    Ok(owned)
}

/// Looks a group up in the group database, or takes a number.
/// Turns SIGTERM and SIGINT into an event. Must run before any other thread is started: signal masks are inherited.
fn end_on_signals(shutdown: OwnedFd, sandbox: Sandbox) -> Result<()> {
    // SAFETY: the set lives on this frame and is initialised by sigemptyset before use.
    let set = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&raw mut set, signal);
        }
        let error = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        ensure!(error == 0, "cannot block signals: {}", io::Error::from_raw_os_error(error));
        set
    };
    let wait = move || {
        sandbox.enter_early(Thread::Signals);
        let mut asked = false;
        loop {
            let mut signal = 0;
            // SAFETY: both pointers are to values of this thread.
            if unsafe { libc::sigwait(&raw const set, &raw mut signal) } != 0 || signal == libc::SIGHUP {
                continue;
            }
            if asked {
                warn!("second signal: ending at once");
                std::process::exit(1);
            }
            asked = true;
            info!(signal, "asked to end");
            let _ = rustix::io::write(&shutdown, &1u64.to_ne_bytes());
        }
    };
    thread::Builder::new().name("signals".into()).spawn(wait).context("cannot start the signal thread")?;
    Ok(())
}
