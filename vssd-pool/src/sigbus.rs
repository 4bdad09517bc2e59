// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Mappings of files that others can shorten: an access behind the end raises an alarm instead of ending the process.
//!
//! ```text
//!   access ► page is gone ► SIGBUS ► find the mapping ─┬─ watched ► raise its alarm ► zero pages to its end ► go on
//!                                                      └─ unknown ► default action (core dump)
//! ```
//!
//! A page of a shared mapping is gone when the file was truncated, when the filesystem has no room for a hole that is
//! written to, or when the memory under it is broken. The thread that met it goes on with zero pages, so whoever uses a
//! watched mapping looks at the [`Alarm`] after using it and before telling anybody what came of it: one relaxed load.
//!
//! The handler is installed with the first watch. It takes no lock and allocates nothing: the table of mappings is fixed,
//! and each of its slots carries a sequence number that is odd while the slot changes. Knows neither guests nor media.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Once};

/// Watched mappings at a time. The table takes memory only as far as it is used.
const SLOTS: usize = 1 << 15;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

#[derive(Debug)]
struct Bell {
    raised: AtomicBool,
    event: OwnedFd,
}

/// Whether any of the mappings that share it has lost a page. Once raised it stays so.
#[derive(Clone, Debug)]
pub struct Alarm(Arc<Bell>);

impl Alarm {
    /// # Errors
    /// When the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self(Arc::new(Bell { raised: AtomicBool::new(false), event })))
    }

    /// One relaxed load: a thread sees what its own accesses met.
    pub fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::Relaxed)
    }

    /// Readable once raised, for somebody who sleeps.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

/// A mapping as the handler finds it. A slot is written by its owner only.
struct Slot {
    owned: AtomicBool,
    /// Odd while the fields below change.
    sequence: AtomicU32,
    start: AtomicUsize,
    /// One past the last byte; 0 in a free slot.
    end: AtomicUsize,
    page: AtomicUsize,
    protection: AtomicI32,
    bell: AtomicPtr<Bell>,
}

impl Slot {
    const fn free() -> Self {
        Self {
            owned: AtomicBool::new(false),
            sequence: AtomicU32::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            protection: AtomicI32::new(0),
            bell: AtomicPtr::new(ptr::null_mut()),
        }
    }

    fn set(&self, mapping: &Found) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(mapping.start, Ordering::Relaxed);
        self.end.store(mapping.end, Ordering::Relaxed);
        self.page.store(mapping.page, Ordering::Relaxed);
        self.protection.store(mapping.protection, Ordering::Relaxed);
        self.bell.store(mapping.bell.cast_mut(), Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    /// What the slot holds, if it is not just changing.
    fn get(&self) -> Option<Found> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let found = Found {
            start: self.start.load(Ordering::Relaxed),
            end: self.end.load(Ordering::Relaxed),
            page: self.page.load(Ordering::Relaxed),
            protection: self.protection.load(Ordering::Relaxed),
            bell: self.bell.load(Ordering::Relaxed).cast_const(),
        };
        fence(Ordering::Acquire);
        let unchanged = sequence.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == sequence;
        unchanged.then_some(found)
    }
}

struct Found {
    start: usize,
    end: usize,
    page: usize,
    protection: libc::c_int,
    bell: *const Bell,
}

impl Found {
    const NONE: Self = Self { start: 0, end: 0, page: 1, protection: 0, bell: ptr::null() };
}

static TABLE: [Slot; SLOTS] = [const { Slot::free() }; SLOTS];
/// One past the highest slot that was ever used.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Keeps one mapping in the table. To be dropped before the mapping is unmapped.
#[derive(Debug)]
pub struct Watch {
    slot: usize,
    /// The handler follows a pointer to it.
    _alarm: Alarm,
}

impl Watch {
    /// Watches the `len` bytes at `start`, a shared mapping of `file` with `protection`.
    ///
    /// # Errors
    /// When `file` cannot be examined or too many mappings are watched.
    ///
    /// # Safety
    /// The range must be one mapping that the caller owns and that stays until the `Watch` is dropped; nobody may have
    /// references to its bytes, for they may become zero.
    pub unsafe fn new(
        start: *mut u8,
        len: usize,
        file: &File,
        protection: libc::c_int,
        alarm: &Alarm,
    ) -> io::Result<Self> {
        install();
        let page = page_size(file)?;
        let end = start.addr().checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let end = end.checked_next_multiple_of(page).ok_or(io::ErrorKind::InvalidInput)?;
        let free = |slot: &Slot| {
            slot.owned.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let slot = TABLE
            .iter()
            .position(free)
            .ok_or_else(|| io::Error::other("too many mappings of shared memory"))?;
        let bell = Arc::as_ptr(&alarm.0);
        TABLE[slot].set(&Found { start: start.addr(), end, page, protection, bell });
        USED.fetch_max(slot + 1, Ordering::Release);
        Ok(Self { slot, _alarm: alarm.clone() })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        TABLE[self.slot].set(&Found::NONE);
        TABLE[self.slot].owned.store(false, Ordering::Release);
    }
}

/// The unit in which a mapping of `file` can be replaced.
fn page_size(file: &File) -> io::Result<usize> {
    let stat = rustix::fs::fstatfs(file)?;
    let is_huge = u64::try_from(stat.f_type).is_ok_and(|kind| kind == HUGETLBFS_MAGIC);
    let huge = usize::try_from(stat.f_bsize).ok().filter(|size| is_huge && size.is_power_of_two());
    // SAFETY: sysconf has no preconditions. It makes no system call for this, which a sandbox might refuse.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Ok(huge.or(usize::try_from(page).ok()).unwrap_or(4096))
}

/// Installs the handler now and not with the first watch: for a process that soon may not.
pub fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = handle;
        // SAFETY: sigaction is plain data for which zeroes are valid; the call takes no pointer that outlives it. It cannot
        // fail for SIGBUS and a valid structure.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut());
        }
    });
}

/// Async-signal-safe: atomics and system calls only.
extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo; for SIGBUS it holds an address. errno is this thread's.
    let (code, address, errno) =
        unsafe { ((*info).si_code, (*info).si_addr().addr(), *libc::__errno_location()) };
    // Only the kernel sends positive codes; a signal from a process carries no address.
    if code <= 0 {
        // SAFETY: abort has no preconditions.
        unsafe { libc::abort() };
    }
    if !repair(address) {
        // The access is repeated when this returns, and a fault whose signal is blocked ends the process. (Bringing back the
        // default action would take a call that a sandbox refuses.)
        // SAFETY: with SA_SIGINFO the kernel passes a valid context, of which it takes the mask back.
        unsafe {
            let context = context.cast::<libc::ucontext_t>();
            libc::sigaddset(&raw mut (*context).uc_sigmask, libc::SIGBUS);
        }
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts zero pages where the mapping around `address` has none, up to its end. False if nobody watches it.
fn repair(address: usize) -> bool {
    let slots = &TABLE[..USED.load(Ordering::Acquire).min(SLOTS)];
    // Watched mappings do not overlap, and that of the access exists as long as the access does: who finds one that
    // contains the address has found it, and its slot does not change.
    let mut found = slots.iter().filter_map(Slot::get);
    let Some(mapping) = found.find(|found| (found.start..found.end).contains(&address)) else { return false };
    let from = address & !(mapping.page - 1);
    // Before the pages: who sees the zeroes sees the alarm.
    // SAFETY: the `Watch` keeps the bell alive.
    let bell = unsafe { &*mapping.bell };
    bell.raised.store(true, Ordering::SeqCst);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range lies within a mapping whose owner said that it may become zero and to whose bytes there are no
    // references. `write` is given eight bytes.
    unsafe {
        let to = ptr::with_exposed_provenance_mut(from);
        let at = libc::mmap(to, mapping.end - from, mapping.protection, flags, -1, 0);
        let one = 1u64.to_ne_bytes();
        libc::write(bell.event.as_raw_fd(), one.as_ptr().cast(), one.len());
        at != libc::MAP_FAILED
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    const PAGE: usize = 4096;

    struct Mapped {
        start: *mut u8,
        len: usize,
        file: File,
    }

    impl Mapped {
        fn new(pages: usize) -> Self {
            let len = pages * PAGE;
            let file =
                File::from(rustix::fs::memfd_create("watched", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
            file.set_len(len as u64).unwrap();
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let start = unsafe {
                libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
            };
            assert_ne!(start, libc::MAP_FAILED);
            Self { start: start.cast(), len, file }
        }

        fn watch(&self, alarm: &Alarm) -> Watch {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: the test drops the watch first and makes no references.
            unsafe { Watch::new(self.start, self.len, &self.file, protection, alarm) }.unwrap()
        }

        fn put(&self, at: usize, value: u8) {
            assert!(at < self.len);
            // SAFETY: within the mapping.
            unsafe { self.start.add(at).write_volatile(value) };
        }

        fn get(&self, at: usize) -> u8 {
            assert!(at < self.len);
            // SAFETY: within the mapping.
            unsafe { self.start.add(at).read_volatile() }
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: the mapping of `new`, which nobody uses any more.
            unsafe { libc::munmap(self.start.cast(), self.len) };
        }
    }

    #[test]
    fn truncated_mapping_reads_zeroes_and_raises_only_its_own_alarm() {
        let (one, other) = (Mapped::new(8), Mapped::new(8));
        let (alarm, quiet) = (Alarm::new().unwrap(), Alarm::new().unwrap());
        let _watches = (one.watch(&alarm), other.watch(&quiet));
        (0..8).for_each(|page| {
            one.put(page * PAGE, 7);
            other.put(page * PAGE, 9);
        });
        one.file.set_len(2 * PAGE as u64).unwrap();
        assert_eq!(one.get(PAGE), 7, "what is left of the file");
        assert!(!alarm.is_raised());

        assert_eq!(one.get(5 * PAGE + 17), 0);
        assert!(alarm.is_raised());
        let mut fds = [rustix::event::PollFd::from_borrowed_fd(alarm.event(), rustix::event::PollFlags::IN)];
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&now)).unwrap(), 1);
        one.put(7 * PAGE, 1);
        // A page before the first hole: the hole was wider.
        one.put(3 * PAGE, 2);
        assert_eq!((one.get(3 * PAGE), one.get(0)), (2, 7));
        assert!(!quiet.is_raised() && (0..8).all(|page| other.get(page * PAGE) == 9));
    }

    #[test]
    fn many_threads_meet_the_same_hole_while_watches_come_and_go() {
        let rounds = 200;
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..rounds {
                        let mapped = Mapped::new(16);
                        let alarm = Alarm::new().unwrap();
                        let _watch = mapped.watch(&alarm);
                        (0..16).for_each(|page| mapped.put(page * PAGE, 3));
                        mapped.file.set_len(4 * PAGE as u64).unwrap();
                        let mapped = &mapped;
                        // A raw pointer may not cross threads by itself.
                        let start = mapped.start.expose_provenance();
                        std::thread::scope(|inner| {
                            for first in [15, 9] {
                                inner.spawn(move || {
                                    let at = ptr::with_exposed_provenance::<u8>(start + first * PAGE);
                                    // SAFETY: within the mapping, which the outer scope keeps.
                                    assert_eq!(unsafe { at.read_volatile() }, 0);
                                });
                            }
                        });
                        assert!(alarm.is_raised());
                        assert_eq!(mapped.get(3 * PAGE), 3);
                    }
                });
            }
        });
        println!("{} rounds", 4 * rounds);
    }

    #[test]
    fn fault_in_a_mapping_that_nobody_watches_ends_the_process() {
        const CHILD: &str = "VSSD_TEST_UNWATCHED_FAULT";
        if std::env::var_os(CHILD).is_some() {
            let (watched, unwatched) = (Mapped::new(1), Mapped::new(1));
            let _watch = watched.watch(&Alarm::new().unwrap());
            unwatched.file.set_len(0).unwrap();
            unwatched.get(0);
            return;
        }
        let name = "sigbus::tests::fault_in_a_mapping_that_nobody_watches_ends_the_process";
        let mut child = Command::new(std::env::current_exe().unwrap());
        let status = child.args(["--exact", name]).env(CHILD, "1").output().unwrap().status;
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
    }
}
