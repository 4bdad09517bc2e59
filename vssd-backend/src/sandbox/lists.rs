// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which system calls each kind of thread may make.
//!
//! A list has what its threads were seen to call in every scenario of the tests, and what the C library and the language's
//! runtime call on rarer ways: memory that is given back, a handler that returns, a call that a stopped process resumes, a
//! clock that the kernel does not share, an abort.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::SandboxError;

/// The kinds of threads of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The control loop: the first thread, which serves operators and makes sockets for new vSSDs.
    Control,
    /// Waits for signals.
    Signals,
    /// Starts threads for those who may not.
    Nursery,
    /// Accepts a vSSD's front-ends.
    Acceptor,
    /// Serves the messages of a front-end.
    Session,
    /// Serves the rings of guests.
    Worker,
    /// The pool's own.
    Keeper,
    Committer,
    Scrubber,
    Syncer,
}

/// A call: its number, and the name of its constant.
type Call = (libc::c_long, &'static str);

macro_rules! calls {
    ($($call:ident)*) => { &[$((libc::$call, stringify!($call))),*] };
}

/// What every thread needs to have memory, locks, descriptors, handlers of signals and an end.
const EVERY: &[Call] = calls![
    SYS_brk SYS_clock_gettime SYS_close SYS_exit SYS_futex SYS_getpid SYS_gettid SYS_madvise SYS_mremap
    SYS_munmap SYS_restart_syscall SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sched_yield SYS_sigaltstack SYS_write
];

/// Of these calls some arguments only ([`arguments`]): no executable memory, no signal to another process.
const EVERY_CHECKED: &[Call] = calls![SYS_fcntl SYS_mmap SYS_mprotect SYS_tgkill];

/// Metadata of a pool, and whether its files are still as long as they were. Data goes through memory or a ring.
const MEDIA: &[Call] = calls![SYS_fdatasync SYS_lseek SYS_pwrite64];

/// Blocks are zeroed or given back to the file system; a block device has an ioctl for that, which is checked.
const ZEROING: &[Call] = calls![SYS_fallocate SYS_ioctl];

/// Clients of the control sockets.
const CLIENTS: &[Call] = calls![
    SYS_accept4 SYS_epoll_ctl SYS_epoll_pwait SYS_exit_group SYS_getrandom SYS_getsockopt SYS_read SYS_recvfrom
    SYS_sendto
];

/// Sockets of new vSSDs, and their end.
const SOCKETS: &[Call] = calls![
    SYS_bind SYS_connect SYS_eventfd2 SYS_listen SYS_shutdown SYS_socket SYS_statx
];

/// What makes a socket usable and takes it away, in the form that the C library of the architecture uses.
#[cfg(target_arch = "x86_64")]
const PATHS: &[Call] = calls![SYS_chmod SYS_chown SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const PATHS: &[Call] = calls![SYS_fchmodat SYS_fchownat SYS_unlinkat];

/// A front-end's connection.
const ACCEPT: &[Call] = calls![SYS_accept4 SYS_ppoll];

/// A front-end's messages, its memory and its inflight region.
const MESSAGES: &[Call] = calls![
    SYS_eventfd2 SYS_fstatfs SYS_ftruncate SYS_getsockopt SYS_ioctl SYS_memfd_create SYS_ppoll SYS_recvmsg
    SYS_sendmsg SYS_sendto SYS_statx
];

/// A thread begins, and gives up what it does not need.
const SPAWN: &[Call] = calls![
    SYS_clone SYS_prctl SYS_rseq SYS_sched_getaffinity SYS_seccomp SYS_set_robust_list
];

const RINGS: &[Call] = calls![SYS_epoll_ctl SYS_epoll_pwait SYS_getrandom SYS_io_uring_enter SYS_read];
/// Waits for the requests in flight of all workers.
const GRACE: &[Call] = calls![SYS_clock_nanosleep];
const KEEPING: &[Call] = calls![SYS_fallocate SYS_getrandom];
const SIGNALS: &[Call] = calls![SYS_exit_group SYS_rt_sigtimedwait];

/// Calls after which there is nothing to go on with.
const ABSURD: &[Call] = calls![
    SYS_add_key SYS_bpf SYS_delete_module SYS_execve SYS_execveat SYS_finit_module SYS_init_module SYS_keyctl
    SYS_mount SYS_perf_event_open SYS_pivot_root SYS_process_vm_readv SYS_process_vm_writev SYS_ptrace SYS_setns
    SYS_unshare
];

/// Calls that are in no list and more likely than others, so that the log can name them.
const OTHERS: &[Call] = calls![
    SYS_clone3 SYS_dup SYS_epoll_create1 SYS_faccessat SYS_fchdir SYS_fchmod SYS_fchown SYS_fstat SYS_fsync
    SYS_getdents64 SYS_getrusage SYS_getuid SYS_io_uring_register SYS_io_uring_setup SYS_kill SYS_linkat
    SYS_membarrier SYS_mincore SYS_mkdirat SYS_mlock SYS_msync SYS_newfstatat SYS_openat SYS_openat2
    SYS_pidfd_open SYS_pipe2 SYS_pread64 SYS_prlimit64 SYS_readlinkat SYS_readv SYS_renameat2 SYS_rt_sigaction
    SYS_sched_setaffinity SYS_setsockopt SYS_setuid SYS_socketpair SYS_symlinkat SYS_timerfd_create SYS_uname
    SYS_userfaultfd SYS_utimensat SYS_wait4 SYS_writev
];

impl Thread {
    pub const ALL: [Self; 10] = [
        Self::Control,
        Self::Signals,
        Self::Nursery,
        Self::Acceptor,
        Self::Session,
        Self::Worker,
        Self::Keeper,
        Self::Committer,
        Self::Scrubber,
        Self::Syncer,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Signals => "signals",
            Self::Nursery => "nursery",
            Self::Acceptor => "acceptor",
            Self::Session => "session",
            Self::Worker => "worker",
            Self::Keeper => "keeper",
            Self::Committer => "committer",
            Self::Scrubber => "scrubber",
            Self::Syncer => "syncer",
        }
    }

    /// What it may call besides what every thread may.
    fn lists(self) -> &'static [&'static [Call]] {
        match self {
            Self::Control => &[CLIENTS, SOCKETS, PATHS],
            Self::Signals => &[SIGNALS],
            // Threads inherit what they may not: all that those it starts may.
            Self::Nursery => &[SPAWN, ACCEPT, MESSAGES],
            Self::Acceptor => &[ACCEPT],
            Self::Session => &[MESSAGES],
            Self::Worker => &[RINGS, MEDIA, ZEROING],
            Self::Keeper => &[KEEPING, GRACE, MEDIA],
            Self::Committer | Self::Syncer => &[MEDIA],
            Self::Scrubber => &[ZEROING, GRACE, MEDIA],
        }
    }

    fn calls(self) -> impl Iterator<Item = Call> {
        [EVERY, EVERY_CHECKED].iter().chain(self.lists()).copied().flatten().copied()
    }

    /// How many calls it may make.
    pub fn allowed_calls(self) -> usize {
        let mut calls: Vec<_> = self.calls().map(|(number, _)| number).collect();
        calls.sort_unstable();
        calls.dedup();
        calls.len()
    }

    /// The filters to install, in this order.
    pub(super) fn programs(self) -> Result<Vec<BpfProgram>, SandboxError> {
        let absurd = ABSURD.iter().map(|(number, _)| (*number, Vec::new())).collect();
        let mut rules = Rules::new();
        for (number, _) in self.calls() {
            rules.insert(number, arguments(number)?);
        }
        let mut programs = vec![program(absurd, SeccompAction::Allow, SeccompAction::KillProcess)?];
        // How threads are started is answered by a filter of its own, which the list has to let pass: its own answer, a signal,
        // would come before, and the C library blocks signals then. The arguments of clone3 lie in memory, where no filter
        // can see them: with ENOSYS the C library takes clone instead, with EPERM it gives up.
        let is_nursery = self == Self::Nursery;
        let start: &[_] = if is_nursery { &[libc::SYS_clone3] } else { &[libc::SYS_clone3, libc::SYS_clone] };
        let errno = if is_nursery { libc::ENOSYS } else { libc::EPERM };
        rules.extend(start.iter().map(|number| (*number, Vec::new())));
        let start = start.iter().map(|number| (*number, Vec::new())).collect();
        programs.push(program(start, SeccompAction::Allow, SeccompAction::Errno(errno.unsigned_abs()))?);
        programs.push(program(rules, SeccompAction::Trap, SeccompAction::Allow)?);
        Ok(programs)
    }
}

/// What the log calls a call.
pub(super) fn name_of(number: i64) -> &'static str {
    let lists = Thread::ALL.iter().flat_map(|thread| thread.lists()).copied();
    let known = lists.chain([EVERY, EVERY_CHECKED, ABSURD, OTHERS]).flatten();
    let mut found = known.filter(|(known, _)| *known == number);
    found.next().map_or("unknown", |(_, name)| name.trim_start_matches("SYS_"))
}

/// The only uses of ioctl: block devices are zeroed, descriptors made not to block.
const BLKZEROOUT: u64 = 0x127f;
const FIONBIO: u64 = 0x5421;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// With which arguments a call is allowed; any if there is no rule.
fn arguments(call: libc::c_long) -> Result<Vec<SeccompRule>, SandboxError> {
    match call {
        libc::SYS_fcntl => {
            let descriptor =
                [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL];
            let file = [libc::F_ADD_SEALS, libc::F_GET_SEALS, libc::F_OFD_SETLK];
            any_of(1, &[&descriptor[..], &file].concat())
        }
        libc::SYS_ioctl => {
            Ok(vec![when(1, SeccompCmpOp::Eq, BLKZEROOUT)?, when(1, SeccompCmpOp::Eq, FIONBIO)?])
        }
        libc::SYS_mmap | libc::SYS_mprotect => {
            let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
            Ok(vec![when(2, SeccompCmpOp::MaskedEq(executable), 0)?])
        }
        libc::SYS_prctl => any_of(0, &[libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS]),
        libc::SYS_tgkill => any_of(0, &[rustix::process::getpid().as_raw_nonzero().get()]),
        libc::SYS_socket => any_of(0, &[libc::AF_UNIX]),
        libc::SYS_getsockopt => any_of(1, &[libc::SOL_SOCKET]),
        libc::SYS_clone => {
            let thread = u64::from(libc::CLONE_THREAD.unsigned_abs());
            Ok(vec![when(0, SeccompCmpOp::MaskedEq(thread), thread)?])
        }
        _ => Ok(Vec::new()),
    }
}

/// The call is allowed with this argument.
fn when(index: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompRule, SandboxError> {
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn any_of(index: u8, values: &[libc::c_int]) -> Result<Vec<SeccompRule>, SandboxError> {
    values.iter().map(|value| when(index, SeccompCmpOp::Eq, u64::from(value.unsigned_abs()))).collect()
}

fn program(rules: Rules, otherwise: SeccompAction, then: SeccompAction) -> Result<BpfProgram, SandboxError> {
    let arch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, otherwise, then, arch)?.try_into()?)
}
