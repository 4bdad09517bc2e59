// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Takes away from the process what a daemon that serves does not need. A guest or a front-end that should ever run code of its own
//! in it finds little to work with.
//!
//! ```text
//!   start ─ prepare ───────────► threads, media, sockets ─ confine ──────────────► serve
//!           no new privileges,                             filters on all threads;
//!           capabilities, Landlock                         workers: a tighter one
//! ```
//!
//! * **Landlock** and capabilities belong to a thread and are inherited, so they come before the first thread: only the media, the
//!   folders of the sockets and the kernel's own folders (to read) can be opened at all.
//! * **seccomp** comes once everything is open. A call that is not listed fails with EPERM: opening, making sockets other than
//!   Unix ones, executable memory, new processes. A program that works never makes one, so what fails is a mistake of ours or an
//!   attack, and a mistake should cost one operation, not every guest's disk. What no mistake explains (`ABSURD`) ends the
//!   process.
//! * **Workers**, which look at what guests wrote, can besides this not make sockets or threads nor change files' names or modes.
//!
//! Sockets for vSSDs that are made at run time are the reason for the calls about sockets and paths in `COMMON` and
//! `CONTROL`. What a ring of io_uring does is not seen by seccomp; Landlock sees the files it opens. Knows no guests and no pools.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use tracing::{info, warn};

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

/// The only uses of ioctl: block devices are zeroed, descriptors made not to block.
const BLKZEROOUT: u64 = 0x127f;
const FIONBIO: u64 = 0x5421;

/// Calls of every thread, as often as it likes.
const COMMON: [libc::c_long; 31] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_io_uring_enter,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// Calls of threads that serve sockets or make others.
const CONTROL: [libc::c_long; 18] = [
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_eventfd2,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_listen,
    libc::SYS_memfd_create,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_rseq,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_shutdown,
    libc::SYS_statx,
];

/// What makes a socket usable and takes it away, in the form that the C library of the architecture uses.
#[cfg(target_arch = "x86_64")]
const PATHS: [libc::c_long; 3] = [libc::SYS_chmod, libc::SYS_chown, libc::SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const PATHS: [libc::c_long; 3] = [libc::SYS_fchmodat, libc::SYS_fchownat, libc::SYS_unlinkat];

/// Calls after which there is nothing to go on with.
const ABSURD: [libc::c_long; 16] = [
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_setns,
    libc::SYS_unshare,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The call is allowed with this argument.
fn when(index: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompRule, SandboxError> {
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn any_of(index: u8, values: &[libc::c_int]) -> Result<Vec<SeccompRule>, SandboxError> {
    values.iter().map(|value| when(index, SeccompCmpOp::Eq, u64::from(value.unsigned_abs()))).collect()
}

fn unset(index: u8, bit: libc::c_int) -> Result<Vec<SeccompRule>, SandboxError> {
    Ok(vec![when(index, SeccompCmpOp::MaskedEq(u64::from(bit.unsigned_abs())), 0)?])
}

/// What workers may call.
fn worker_rules() -> Result<Rules, SandboxError> {
    let mut rules: Rules = COMMON.iter().map(|call| (*call, Vec::new())).collect();
    let fcntl = [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL];
    let file = [libc::F_ADD_SEALS, libc::F_GET_SEALS, libc::F_OFD_SETLK];
    rules.insert(libc::SYS_fcntl, any_of(1, &[&fcntl[..], &file].concat())?);
    rules.insert(
        libc::SYS_ioctl,
        vec![when(1, SeccompCmpOp::Eq, BLKZEROOUT)?, when(1, SeccompCmpOp::Eq, FIONBIO)?],
    );
    rules.insert(libc::SYS_mmap, unset(2, libc::PROT_EXEC)?);
    rules.insert(libc::SYS_mprotect, unset(2, libc::PROT_EXEC)?);
    rules.insert(libc::SYS_prctl, any_of(0, &[libc::PR_SET_NAME])?);
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    rules.insert(libc::SYS_tgkill, any_of(0, &[pid])?);
    Ok(rules)
}

/// What every other thread may call.
fn process_rules() -> Result<Rules, SandboxError> {
    let mut rules = worker_rules()?;
    rules.extend(CONTROL.iter().chain(&PATHS).map(|call| (*call, Vec::new())));
    // To give up more.
    rules.insert(libc::SYS_seccomp, Vec::new());
    rules.insert(libc::SYS_prctl, any_of(0, &[libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS])?);
    rules.insert(libc::SYS_socket, any_of(0, &[libc::AF_UNIX])?);
    rules.insert(libc::SYS_getsockopt, any_of(1, &[libc::SOL_SOCKET])?);
    let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
    rules.insert(libc::SYS_clone, vec![when(0, SeccompCmpOp::MaskedEq(thread), thread)?]);
    Ok(rules)
}

fn program(rules: Rules, otherwise: SeccompAction, then: SeccompAction) -> Result<BpfProgram, SandboxError> {
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, otherwise, then, arch)?.try_into()?)
}

fn refused(errno: libc::c_int) -> SeccompAction {
    SeccompAction::Errno(errno.unsigned_abs())
}

/// How many calls a worker and any other thread may make.
pub fn allowed_calls() -> Result<(usize, usize), SandboxError> {
    Ok((worker_rules()?.len(), process_rules()?.len()))
}

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

/// The second half, once media and sockets are open: filters on every thread there is, inherited by those to come.
pub fn confine() -> Result<(), SandboxError> {
    let (worker, other) = allowed_calls()?;
    let listed = program(process_rules()?, refused(libc::EPERM), SeccompAction::Allow)?;
    let absurd = ABSURD.iter().map(|call| (*call, Vec::new())).collect();
    let absurd = program(absurd, SeccompAction::Allow, SeccompAction::KillProcess)?;
    // The arguments of clone3 lie in memory, where no filter can see them: with ENOSYS the C library takes clone instead.
    let clone3 = Rules::from([(libc::SYS_clone3, Vec::new())]);
    let clone3 = program(clone3, SeccompAction::Allow, refused(libc::ENOSYS))?;
    // Of two errors that of the filter installed last counts.
    for filter in [absurd, listed, clone3] {
        seccompiler::apply_filter_all_threads(&filter)?;
    }
    info!(calls = other, worker_calls = worker, "confined");
    Ok(())
}

/// What a thread that looks at what guests wrote gives up besides. To be called by that thread, after [`confine`].
#[derive(Clone, Debug)]
pub struct WorkerFilter(Arc<BpfProgram>);

impl WorkerFilter {
    pub fn new() -> Result<Self, SandboxError> {
        let rules = worker_rules()?;
        Ok(Self(Arc::new(program(rules, refused(libc::EPERM), SeccompAction::Allow)?)))
    }

    pub fn install(&self) -> Result<(), SandboxError> {
        Ok(seccompiler::apply_filter(&self.0)?)
    }
}
