// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which ways of tracking and catching accesses the kernel offers for some memory: found by trying them on a page of it.
//!
//! What does not work is an answer with the kernel's reason: an old kernel, a process without the privilege, a file system
//! that the kernel does not let a userfaultfd watch. The page's content stays as it is.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use rustix::mm::{Advice, madvise};
use serde::Serialize;

use super::store::Mapping;

/// Whether something works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "support")]
pub enum Support {
    Yes,
    No { why: String },
}

impl Support {
    pub fn is_yes(&self) -> bool {
        *self == Self::Yes
    }

    pub(super) fn no(why: impl Into<String>) -> Self {
        Self::No { why: why.into() }
    }
}

impl From<io::Result<()>> for Support {
    fn from(result: io::Result<()>) -> Self {
        match result {
            Ok(()) => Self::Yes,
            Err(error) => Self::no(error.to_string()),
        }
    }
}

/// What a userfaultfd can do with a medium's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UserFaults {
    /// A write to a protected page waits for a handler: copy on write.
    pub write_protect: Support,
    /// The kernel notes which pages were written to, and PAGEMAP_SCAN tells: dirty tracking.
    pub write_protect_async: Support,
    /// An access to a page that is not there waits for a handler: memory that is fetched on demand.
    pub missing: Support,
    /// An access to a page that is in the file but not mapped waits: fetched through a second mapping.
    pub minor: Support,
}

/// `_IOWR(0xAA, nr, size)` and so on of linux/userfaultfd.h; `_IOWR('f', 16, 96)` of linux/fs.h. All arguments are
/// arrays of u64.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xAA00;
const UFFDIO_API: libc::Ioctl = 0xC018_AA3F_u32 as libc::Ioctl;
const UFFDIO_REGISTER: libc::Ioctl = 0xC020_AA00_u32 as libc::Ioctl;
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xC018_AA06_u32 as libc::Ioctl;
const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610_u32 as libc::Ioctl;

const API: u64 = 0xAA;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
const MODE_MINOR: u64 = 4;

/// Bits of what UFFDIO_REGISTER says is possible with the range.
const CAN_COPY: u64 = 1 << 3;
const CAN_WRITEPROTECT: u64 = 1 << 6;
const CAN_CONTINUE: u64 = 1 << 7;

const PAGE_IS_WRITTEN: u64 = 1 << 1;

fn ioctl<const N: usize>(fd: RawFd, request: libc::Ioctl, argument: &mut [u64; N]) -> io::Result<u64> {
    // SAFETY: each request reads and writes exactly the structure whose size its number holds, N words; what it does
    // to memory is said where it is called.
    let result = unsafe { libc::ioctl(fd, request, argument.as_mut_ptr()) };
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// A userfaultfd before its handshake. Not for faults in user mode only: the processors of a guest fault in the kernel.
fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes flags only and makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = match RawFd::try_from(fd) {
        Ok(fd) if fd >= 0 => fd,
        _ => {
            let refused = io::Error::last_os_error();
            if refused.raw_os_error() != Some(libc::EPERM) {
                return Err(refused);
            }
            // Where the system call is reserved, access to this file may be given instead.
            let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") else {
                return Err(refused);
            };
            // SAFETY: takes flags only and makes a descriptor.
            let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            fd
        }
    };
    // SAFETY: just made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A userfaultfd with these features. Each can shake hands once, so each attempt has its own.
fn with_features(wanted: u64) -> io::Result<OwnedFd> {
    let mut asked = [API, 0, 0];
    ioctl(open()?.as_raw_fd(), UFFDIO_API, &mut asked)?;
    let missing = wanted & !asked[1];
    if missing != 0 {
        return Err(io::Error::other(format!("the kernel lacks userfaultfd features {missing:#x}")));
    }
    let fd = open()?;
    ioctl(fd.as_raw_fd(), UFFDIO_API, &mut [API, wanted, 0])?;
    Ok(fd)
}

struct Range {
    start: u64,
    len: u64,
}

/// Registers the range, and requires what must be possible with it then. It ends with the descriptor.
fn register(fd: &OwnedFd, range: &Range, mode: u64, required: u64) -> io::Result<()> {
    let mut argument = [range.start, range.len, mode, 0];
    ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &mut argument)?;
    if argument[3] & required != required {
        return Err(io::Error::other("the kernel offers no way to resolve such faults here"));
    }
    Ok(())
}

fn protect(fd: &OwnedFd, range: &Range) -> io::Result<()> {
    ioctl(fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &mut [range.start, range.len, 1]).map(drop)
}

/// How many stretches of the range have been written to since they were protected.
fn written(pagemap: RawFd, range: &Range) -> io::Result<u64> {
    let mut found = [0u64; 3];
    let end = range.start + range.len;
    // size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, _mask, _anyof_mask, return_mask
    let mut argument = [
        96,
        0,
        range.start,
        end,
        0,
        found.as_mut_ptr().expose_provenance() as u64,
        1,
        0,
        0,
        PAGE_IS_WRITTEN,
        0,
        PAGE_IS_WRITTEN,
    ];
    ioctl(pagemap, PAGEMAP_SCAN, &mut argument)
}

/// Makes the page writable as a store would, without one: what is in it stays, and where a store would end in SIGBUS this fails.
fn touch(mapping: &Mapping) -> io::Result<()> {
    // SAFETY: populating changes no byte; the range is the mapping's own.
    unsafe { madvise(mapping.start().cast(), mapping.len(), Advice::LinuxPopulateWrite) }?;
    Ok(())
}

/// Goes all the way to a store: a DAX device takes the registration, but the protection splits its large page, and the next store to it
/// ends in SIGBUS (seen on Linux 6.12).
fn try_async(mapping: &Mapping, range: &Range) -> io::Result<()> {
    let fd = with_features(FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_ASYNC)?;
    touch(mapping)?;
    register(&fd, range, MODE_WP, 0)?;
    protect(&fd, range)?;
    let pagemap = OpenOptions::new().read(true).open("/proc/self/pagemap")?;
    let before = written(pagemap.as_raw_fd(), range)?;
    touch(mapping)?;
    let after = written(pagemap.as_raw_fd(), range)?;
    if (before, after) == (0, 1) {
        Ok(())
    } else {
        Err(io::Error::other(format!("{before} pages were written to before, {after} after writing to one")))
    }
}

/// Tries everything on a shared mapping of one page, of whatever size.
pub(super) fn try_all(mapping: &Mapping) -> UserFaults {
    let range = Range { start: mapping.start().expose_provenance() as u64, len: mapping.len() as u64 };
    let attempt = |features, mode, required| {
        let fd = with_features(features)?;
        register(&fd, &range, mode, required)?;
        if mode == MODE_WP { protect(&fd, &range) } else { Ok(()) }
    };
    let write_protect = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM;
    let minor = FEATURE_MINOR_SHMEM | FEATURE_MINOR_HUGETLBFS;
    UserFaults {
        write_protect: attempt(write_protect, MODE_WP, CAN_WRITEPROTECT).into(),
        write_protect_async: try_async(mapping, &range).into(),
        missing: attempt(0, MODE_MISSING, CAN_COPY).into(),
        minor: attempt(minor, MODE_MINOR, CAN_CONTINUE).into(),
    }
}

/// Nothing could be tried.
pub(super) fn untried(why: &str) -> UserFaults {
    let no = || Support::no(why);
    UserFaults { write_protect: no(), write_protect_async: no(), missing: no(), minor: no() }
}
