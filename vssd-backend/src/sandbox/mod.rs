// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Takes away from the process what a daemon that serves does not need. A guest or a front-end that should ever run code of its own
//! in it finds little to work with.
//!
//! ```text
//!   start ─ prepare ───────────► threads, media, sockets ──────────── confine ───────► serve
//!           no new privileges,   each thread: its own filters, when   the control
//!           capabilities,        it has opened what it needs          loop's own
//!           Landlock
//! ```
//!
//! * **Landlock** and capabilities belong to a thread and are inherited, so they come before the first thread: only the media, the
//!   folders of the sockets and the kernel's own folders (to read) can be opened at all.
//! * **seccomp**: each kind of thread has a list of the calls it makes ([`Thread`]), which it installs itself; the daemon does not
//!   begin to serve while there is a thread that has not. A call that is not listed fails with EPERM, is counted and logged
//!   ([`refusals`]): a program that works never makes one, so it is a mistake of ours or an attack, and a mistake should
//!   cost one operation, not every guest's disk. What no mistake explains (exec, ptrace, mount and the like) ends the process.
//!
//! | thread | calls | besides memory, locks, descriptors and an end |
//! |---|---|---|
//! | control | 39 | clients of the control sockets, sockets of new vSSDs |
//! | signals | 22 | |
//! | nursery | 38 | starts acceptors and sessions, and so has what they have |
//! | acceptor | 22 | front-ends of a vSSD |
//! | session | 31 | messages, descriptors and memory of one front-end |
//! | worker | 30 | rings of guests, media |
//! | keeper | 26 | the pool's metadata |
//! | committer | 23 | the pool's journal |
//! | scrubber | 26 | zeroes blocks |
//! | syncer | 23 | the pool's media and journal, for operators |
//!
//! A thread inherits the filters of the one that starts it. Threads that are started while the daemon serves are therefore
//! started by one of their own ([`Nursery`](crate::nursery::Nursery)), and not by the control loop, whose list would have to
//! be the sum of all. What a ring of io_uring does is not seen by seccomp; it is restricted by itself (`vssd-pool`'s `lane::ring`),
//! and Landlock sees the files it opens. Knows no guests and no pools.

mod lists;
pub mod refusals;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::BpfProgram;
use tracing::{error, info, warn};

pub use self::lists::Thread;
use self::refusals::Refusals;

/// Why the process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("cannot give up new privileges")]
    Privileges(#[source] std::io::Error),
    #[error("cannot give up capabilities")]
    Capabilities(#[source] std::io::Error),
    #[error("cannot restrict the use of files")]
    Files(#[from] landlock::RulesetError),
    #[error("cannot make a filter of system calls")]
    Build(#[from] seccompiler::BackendError),
    #[error("cannot install a filter of system calls")]
    Install(#[from] seccompiler::Error),
    #[error("cannot handle refused system calls")]
    Handler(#[source] std::io::Error),
    #[error("cannot look at the threads of the process")]
    Threads(#[source] std::io::Error),
    #[error("thread {0} is not confined")]
    Unconfined(String),
}

/// Files that are still to be opened.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// Media, and folders in which one is to be made.
    pub media: Vec<PathBuf>,
    /// Where sockets are made and removed.
    pub sockets: Vec<PathBuf>,
}

/// Which file systems of the kernel are read while media are opened.
const KERNEL: [&str; 2] = ["/proc", "/sys"];

/// Capabilities that stay while media and sockets are opened, if they are there: sockets get a group, media and folders may
/// belong to others, old kernels charge rings to locked memory.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::IPC_LOCK);

/// The first half, before any other thread is started: no new privileges, few capabilities, few files.
pub fn prepare(files: &Files) -> Result<(), SandboxError> {
    rustix::thread::set_no_new_privs(true).map_err(|errno| SandboxError::Privileges(errno.into()))?;
    let capabilities = |errno: rustix::io::Errno| SandboxError::Capabilities(errno.into());
    let have = rustix::thread::capabilities(None).map_err(capabilities)?;
    let kept = have.permitted.intersection(KEPT);
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(capabilities)?;

    settle_allocator();
    let abi = ABI::V5;
    let media = AccessFs::from_file(abi) & !AccessFs::Execute | AccessFs::ReadDir | AccessFs::MakeReg;
    let sockets = AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::ReadDir;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .create()?;
    let folders = files.sockets.iter().map(|path| (path.clone(), sockets));
    let kernel = KERNEL.iter().map(|path| (PathBuf::from(path), AccessFs::ReadFile | AccessFs::ReadDir));
    let media = files.media.iter().map(|path| {
        let access =
            if path.is_dir() { media | AccessFs::RemoveFile } else { media & AccessFs::from_file(abi) };
        (path.clone(), access)
    });
    for (path, access) in media.chain(folders).chain(kernel) {
        // What is not there cannot be opened either.
        if let Ok(fd) = PathFd::new(&path) {
            ruleset = ruleset.add_rule(PathBeneath::new(fd, access))?;
        }
    }
    let status = ruleset.restrict_self()?;
    if status.ruleset != RulesetStatus::FullyEnforced {
        let missing =
            if status.ruleset == RulesetStatus::NotEnforced { "Landlock" } else { "parts of Landlock" };
        warn!("this kernel lacks {missing}: the daemon could open more files than it needs");
    }
    Ok(())
}

/// The C library's allocator would read the number of processors from a file when a thread needs an arena, and whether memory is
/// overcommitted when it first gives some of an arena back. The one it is told now, the other it is made to look up.
fn settle_allocator() {
    #[cfg(target_env = "gnu")]
    {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let arenas = libc::c_int::try_from(8 * processors).unwrap_or(libc::c_int::MAX);
        // SAFETY: sets a number that the allocator looks at; eight arenas a processor is its own choice.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
        // Not in this thread, whose arena is another kind. Should the thread fail, one call more is refused later, which does no harm.
        let give_back = || drop((0..32).map(|_| vec![1u8; 32 << 10]).collect::<Vec<_>>());
        let _ = std::thread::spawn(give_back).join();
    }
}

/// How long the threads that were just started may take to confine themselves.
const SETTLE: Duration = Duration::from_secs(5);

/// The filters of all kinds of threads, or none.
#[derive(Clone, Debug)]
pub struct Sandbox(Option<Arc<[Vec<BpfProgram>]>>);

impl Sandbox {
    /// Threads are not confined.
    pub fn off() -> Self {
        Self(None)
    }

    /// Makes the filters, and from here on counts what they refuse.
    pub fn new() -> Result<(Self, Refusals), SandboxError> {
        let refusals = Refusals::install().map_err(SandboxError::Handler)?;
        let programs = Thread::ALL.iter().map(|thread| thread.programs()).collect::<Result<_, _>>()?;
        Ok((Self(Some(programs)), refusals))
    }

    /// Takes from the calling thread, and from all that it will start, what one of its kind does not need.
    pub fn enter(&self, thread: Thread) -> Result<(), SandboxError> {
        let Some(programs) = &self.0 else { return Ok(()) };
        refusals::set_thread(thread);
        for program in &programs[thread as usize] {
            seccompiler::apply_filter(program)?;
        }
        #[cfg(debug_assertions)]
        probe(thread);
        Ok(())
    }

    /// [`Sandbox::enter`] for threads that begin before the daemon serves anyone: if it fails, the process ends.
    pub fn enter_early(&self, thread: Thread) {
        if let Err(error) = self.enter(thread) {
            error!(%error, thread = thread.name(), "cannot confine a thread; --sandbox=off does without");
            std::process::exit(1);
        }
    }

    /// The last step, for the control loop: every other thread has entered, now it does.
    pub fn close(&self) -> Result<(), SandboxError> {
        if self.0.is_none() {
            return Ok(());
        }
        let give_up = Instant::now() + SETTLE;
        while let Some(name) = unconfined().map_err(SandboxError::Threads)? {
            if Instant::now() > give_up {
                return Err(SandboxError::Unconfined(name));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.enter(Thread::Control)?;
        let calls = Thread::ALL.iter().map(|thread| thread.allowed_calls()).max().unwrap_or(0);
        info!(most_calls = calls, "confined");
        Ok(())
    }
}

/// A thread besides this one that has no filter. Those that the kernel makes for a ring run no code of ours.
fn unconfined() -> std::io::Result<Option<String>> {
    let own = rustix::thread::gettid().as_raw_nonzero().to_string();
    for task in fs::read_dir("/proc/self/task")? {
        let task = task?;
        // A thread that is gone meanwhile needs no filter.
        let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
        let value = |key: &str| {
            let mut lines = status.lines().filter_map(|line| line.strip_prefix(key));
            lines.next().unwrap_or_default().trim().to_owned()
        };
        let name = value("Name:");
        let is_ours = task.file_name() != *own && !name.starts_with("iou-");
        if is_ours && value("Seccomp:") != "2" {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// For the tests: with `VSSD_SANDBOX_PROBE=worker:open` such a thread tries just that once it is confined.
#[cfg(debug_assertions)]
fn probe(thread: Thread) {
    let Ok(text) = std::env::var("VSSD_SANDBOX_PROBE") else { return };
    let Some((kind, what)) = text.split_once(':').filter(|(kind, _)| *kind == thread.name()) else { return };
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: every pointer is to a constant or null where the call allows it.
    let result = unsafe {
        match what {
            "open" => libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/dev/null".as_ptr(), libc::O_RDWR),
            "exec" => {
                libc::syscall(libc::SYS_execve, c"/bin/true".as_ptr(), &raw const none, &raw const none)
            }
            "socket" => libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0),
            "ptrace" => libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0),
            _ => return,
        }
    };
    let error = std::io::Error::last_os_error();
    warn!(kind, what, succeeded = result >= 0, %error, "tried what is not allowed");
}
