// SPDX-License-Identifier: Apache-2.0 OR MIT

//! System calls that a filter refuses: they fail with EPERM, and are counted and logged.
//!
//! ```text
//!   call ► filter ► SIGSYS ► handler: count, note, wake ─► the call returns EPERM
//!                                             └─► control loop: one warning a call and kind of thread
//! ```
//!
//! The filter could give the error by itself (`SECCOMP_RET_ERRNO`), but then nobody would ever know: `SECCOMP_FILTER_FLAG_LOG`
//! tells the audit log alone, which the daemon cannot read and most machines do not keep. So the filter raises SIGSYS and
//! the handler gives the error. A call that is refused while SIGSYS is blocked ends the process; the C library blocks all signals
//! while it starts a thread, so that is refused in silence, and who wanted the thread has an error to log.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::warn;

use super::lists::{Thread, name_of};

/// Refusals of which is kept what they were until they are logged.
const RECENT: usize = 16;
/// `si_code` of a signal that a filter sent.
const SYS_SECCOMP: libc::c_int = 1;

static COUNT: AtomicU64 = AtomicU64::new(0);
/// Kind of thread plus one, and the number of the call; 0 where nothing is to be logged.
static NOTES: [AtomicU64; RECENT] = [const { AtomicU64::new(0) }; RECENT];
static EVENT: OnceLock<OwnedFd> = OnceLock::new();

thread_local! {
    /// Needs neither initialisation nor an end, so that the handler may read it.
    static KIND: Cell<Option<Thread>> = const { Cell::new(None) };
}

/// How many calls were refused since the process began.
pub fn count() -> u64 {
    COUNT.load(Ordering::Relaxed)
}

/// What this thread is called when a call of it is refused.
pub(super) fn set_thread(thread: Thread) {
    KIND.set(Some(thread));
}

/// Logs what was refused.
#[derive(Debug)]
pub struct Refusals {
    event: BorrowedFd<'static>,
    logged: BTreeSet<u64>,
}

impl Refusals {
    /// Installs the handler. Before the first filter.
    pub(super) fn install() -> io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        if EVENT.get().is_none() {
            let _ = EVENT.set(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        }
        let event = EVENT.get().ok_or(io::ErrorKind::Other)?;
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
        // SAFETY: sigaction is plain data for which zeroes are valid; the call takes no pointer that outlives it. It cannot fail
        // for SIGSYS and a valid structure.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut());
        }
        Ok(Self { event: event.as_fd(), logged: BTreeSet::new() })
    }

    /// Readable while there is something to log.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event
    }

    /// Logs each call of each kind of thread once.
    pub fn log(&mut self) {
        let _ = rustix::io::read(self.event, &mut [0; 8]);
        for note in &NOTES {
            let note = note.swap(0, Ordering::Acquire);
            if note == 0 || !self.logged.insert(note) {
                continue;
            }
            let kind = (note >> 32).checked_sub(1).and_then(|kind| usize::try_from(kind).ok());
            let thread =
                kind.and_then(|kind| Thread::ALL.get(kind)).map_or("unknown", |thread| thread.name());
            let number = i64::from(u32::try_from(note & 0xffff_ffff).unwrap_or(u32::MAX));
            warn!(
                call = name_of(number),
                number,
                thread,
                "a system call was refused: the daemon has no use for it, so this is a mistake in it, to be reported, \
                 or an attack"
            );
        }
    }
}

/// Async-signal-safe: atomics, a constant thread-local and one system call that every list has.
extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo and a valid context, which is this thread's as it will go on.
    // errno is this thread's.
    unsafe {
        if (*info).si_code != SYS_SECCOMP {
            return;
        }
        let errno = *libc::__errno_location();
        let number = answer(&mut *context.cast::<libc::ucontext_t>(), -libc::EPERM);
        note(number);
        *libc::__errno_location() = errno;
    }
}

fn note(number: u64) {
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let kind = KIND.get().map_or(0xff, |thread| thread as u64);
    let slot = usize::try_from(count).unwrap_or(0) % RECENT;
    NOTES[slot].store((kind + 1) << 32 | number & 0xffff_ffff, Ordering::Release);
    if let Some(event) = EVENT.get() {
        let one = 1u64.to_ne_bytes();
        // SAFETY: the descriptor is never closed, and eight bytes are there to be read.
        unsafe { libc::write(event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

/// Makes the call that was refused return `result`. Returns its number.
#[cfg(target_arch = "x86_64")]
fn answer(context: &mut libc::ucontext_t, result: libc::c_int) -> u64 {
    let register = &mut context.uc_mcontext.gregs[libc::REG_RAX as usize];
    let number = *register;
    *register = result.into();
    number.cast_unsigned()
}

/// Makes the call that was refused return `result`. Returns its number.
#[cfg(target_arch = "aarch64")]
fn answer(context: &mut libc::ucontext_t, result: libc::c_int) -> u64 {
    let registers = &mut context.uc_mcontext.regs;
    registers[0] = i64::from(result).cast_unsigned();
    registers[8]
}
