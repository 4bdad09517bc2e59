// SPDX-License-Identifier: Apache-2.0 OR MIT

//! SSD: a block device or a file on one.
//!
//! Metadata goes through `pread`/`pwrite` here, data through the lanes' io_urings on the same descriptor.
//! `O_DIRECT` keeps the host's page cache out of both.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::file::{BLKSSZGET, BLKZEROOUT, MediumFile};
use super::{AlignedBuf, RingTarget, Store, out_of_bounds, within};
use crate::error::{Error, Result};
use crate::types::{Cache, MediumKind};

/// Bytes that one metadata system call moves at most.
const PIECE: usize = 1 << 20;

/// `STATX_DIOALIGN` of linux/stat.h.
const STATX_DIOALIGN: u32 = 0x2000;

/// How the medium makes zeroes, from the cheapest on; each is tried until one is not refused.
const ZERO_RANGE: u8 = 0;
const PUNCH_HOLE: u8 = 1;
const ZERO_WRITE: u8 = 2;

/// See the module's text.
#[derive(Debug)]
pub struct SsdStore {
    medium: MediumFile,
    cache: Cache,
    memory_align: u32,
    offset_align: u32,
    zero_method: AtomicU8,
    bounce: Mutex<AlignedBuf>,
    bytes_written: AtomicU64,
    /// The shortest that the file was seen to be.
    intact: AtomicU64,
}

impl SsdStore {
    pub(super) fn new(medium: MediumFile, wanted: Cache) -> Result<Self> {
        let (cache, memory_align, offset_align) = match wanted {
            Cache::Buffered => (Cache::Buffered, 1, 512),
            Cache::Direct => match enable_direct(&medium) {
                Ok((memory_align, offset_align)) => (Cache::Direct, memory_align, offset_align),
                Err(_) if medium.is_tmpfs() => (Cache::Buffered, 1, 512),
                Err(source) => {
                    let what =
                        format!("does not take direct I/O ({source}); ask for buffered I/O or use another");
                    return Err(Error::medium(&medium.path, what));
                }
            },
        };
        if offset_align > 4096 || memory_align > 4096 {
            let what = format!("wants direct I/O aligned to {offset_align} bytes, more than 4096");
            return Err(Error::medium(&medium.path, what));
        }
        Ok(Self {
            intact: AtomicU64::new(medium.size),
            medium,
            cache,
            memory_align,
            offset_align,
            zero_method: AtomicU8::new(ZERO_RANGE),
            bounce: Mutex::new(AlignedBuf::zeroed(PIECE)),
            bytes_written: AtomicU64::new(0),
        })
    }

    fn bounce(&self) -> std::sync::MutexGuard<'_, AlignedBuf> {
        // Its content means nothing between uses, so a poisoned one is as good as any.
        self.bounce.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Asks the kernel or the device to make zeroes; an error means this way is not offered.
    fn zero_by(&self, method: u8, offset: u64, len: u64) -> io::Result<()> {
        if self.medium.is_device {
            if method != ZERO_RANGE {
                return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
            }
            let range = [offset, len];
            // SAFETY: BLKZEROOUT reads two u64 at the pointer, which names a live local.
            if unsafe { libc::ioctl(self.medium.fd(), BLKZEROOUT, range.as_ptr()) } == 0 {
                return Ok(());
            }
            return Err(io::Error::last_os_error());
        }
        let mode = match method {
            ZERO_RANGE => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            PUNCH_HOLE => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            _ => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        };
        self.medium.fallocate(mode, offset, len)
    }

    fn zero_by_writing(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let mut bounce = self.bounce();
        bounce.as_mut_slice().fill(0);
        while len > 0 {
            let piece = len.min(PIECE as u64);
            // At most PIECE, so it fits.
            #[allow(clippy::cast_possible_truncation)]
            self.medium.file.write_all_at(&bounce.as_slice()[..piece as usize], offset)?;
            offset += piece;
            len -= piece;
        }
        Ok(())
    }
}

/// Switches the open file to `O_DIRECT` and finds what alignment it wants: (memory, offset).
fn enable_direct(medium: &MediumFile) -> io::Result<(u32, u32)> {
    let fd = medium.file.as_raw_fd();
    // SAFETY: F_GETFL and F_SETFL take no pointers.
    let set = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 { flags } else { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_DIRECT) }
    };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    let aligns = match direct_alignment(medium) {
        Some((0, _) | (_, 0)) => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        Some(aligns) => Ok(aligns),
        None => probe_alignment(medium),
    };
    if aligns.is_err() {
        // SAFETY: as above; back to buffered, which the caller may choose to go on with.
        unsafe {
            let flags = libc::fcntl(fd, libc::F_GETFL);
            libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_DIRECT);
        }
    }
    aligns
}

/// What the kernel says (Linux 6.1 and later), or `None`.
fn direct_alignment(medium: &MediumFile) -> Option<(u32, u32)> {
    let mut stat = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the empty path with AT_EMPTY_PATH names the descriptor itself; the kernel fills the structure.
    let result = unsafe {
        libc::statx(medium.fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, STATX_DIOALIGN, stat.as_mut_ptr())
    };
    // SAFETY: initialised by zeroed(), and filled where the call succeeded.
    let stat = unsafe { stat.assume_init() };
    (result == 0 && stat.stx_mask & STATX_DIOALIGN != 0)
        .then_some((stat.stx_dio_mem_align, stat.stx_dio_offset_align))
}

fn probe_alignment(medium: &MediumFile) -> io::Result<(u32, u32)> {
    if medium.is_device {
        let mut sector: libc::c_int = 0;
        // SAFETY: BLKSSZGET stores one int at the pointer, which names a live local.
        if unsafe { libc::ioctl(medium.fd(), BLKSSZGET, &raw mut sector) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let sector = u32::try_from(sector).unwrap_or(4096).clamp(512, 4096);
        return Ok((sector, sector));
    }
    let mut page = AlignedBuf::zeroed(4096);
    if medium.file.read_exact_at(&mut page.as_mut_slice()[..512], 512).is_ok() {
        return Ok((512, 512));
    }
    medium.file.read_exact_at(page.as_mut_slice(), 0).map(|()| (4096, 4096))
}

impl Store for SsdStore {
    fn kind(&self) -> MediumKind {
        MediumKind::Ssd
    }

    fn path(&self) -> &Path {
        &self.medium.path
    }

    fn size(&self) -> u64 {
        self.medium.size
    }

    fn is_fresh(&self) -> bool {
        self.medium.is_fresh
    }

    fn cache(&self) -> Option<Cache> {
        Some(self.cache)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if !within(offset, buf.len() as u64, self.medium.size) {
            return Err(out_of_bounds());
        }
        let mut bounce = self.bounce();
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            // Whole 4 KiB pieces around what is wanted satisfy every alignment this store accepts.
            let start = at & !4095;
            // Less than 4096.
            #[allow(clippy::cast_possible_truncation)]
            let skip = (at - start) as usize;
            let take = rest.len().min(PIECE - skip);
            let want = (skip + take).next_multiple_of(4096);
            let mut filled = 0;
            while filled < skip + take {
                match self
                    .medium
                    .file
                    .read_at(&mut bounce.as_mut_slice()[filled..want], start + filled as u64)
                {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(n) => filled += n,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            let (now, later) = rest.split_at_mut(take);
            now.copy_from_slice(&bounce.as_slice()[skip..skip + take]);
            at += take as u64;
            rest = later;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.look();
        if offset.saturating_add(buf.len() as u64) > self.intact() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let align = u64::from(self.write_align());
        if !within(offset, buf.len() as u64, self.medium.size)
            || !(offset | buf.len() as u64).is_multiple_of(align)
        {
            return Err(out_of_bounds());
        }
        let mut bounce = self.bounce();
        for (i, piece) in buf.chunks(PIECE).enumerate() {
            bounce.as_mut_slice()[..piece.len()].copy_from_slice(piece);
            self.medium.file.write_all_at(&bounce.as_slice()[..piece.len()], offset + (i * PIECE) as u64)?;
        }
        self.bytes_written.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn write_align(&self) -> u32 {
        4096
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        if !within(offset, len, self.medium.size) {
            return Err(out_of_bounds());
        }
        self.bytes_written.fetch_add(len, Ordering::Relaxed);
        loop {
            let method = self.zero_method.load(Ordering::Relaxed);
            if method == ZERO_WRITE {
                return self.zero_by_writing(offset, len);
            }
            match self.zero_by(method, offset, len) {
                Ok(()) => return Ok(()),
                // Zeroes may take room on a file system that has none left; a hole gives some back.
                Err(error) if method == ZERO_RANGE && error.raw_os_error() == Some(libc::ENOSPC) => {
                    return self.zero_by(PUNCH_HOLE, offset, len).map_err(|_| error);
                }
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EIO | libc::ENOSPC | libc::EINTR)) =>
                {
                    return Err(error);
                }
                // Not offered here: never ask again.
                Err(_) => self.zero_method.store(method + 1, Ordering::Relaxed),
            }
        }
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.medium.is_device {
            return Ok(());
        }
        match self.medium.fallocate(libc::FALLOC_FL_KEEP_SIZE, offset, len) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
            result => result,
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.medium.file.sync_data()
    }

    fn sync_is_instant(&self) -> bool {
        false
    }

    fn ring(&self) -> Option<RingTarget<'_>> {
        Some(RingTarget {
            fd: self.medium.file.as_fd(),
            data: true,
            memory_align: self.memory_align,
            offset_align: self.offset_align,
        })
    }

    unsafe fn copy_out(&self, _offset: u64, _to: *mut u8, _len: usize) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    unsafe fn copy_in(&self, _offset: u64, _from: *const u8, _len: usize) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    fn look(&self) {
        if self.medium.is_device {
            return;
        }
        // SAFETY: no pointers; the position that it moves is used by nobody.
        let end = unsafe { libc::lseek(self.medium.fd(), 0, libc::SEEK_END) };
        // An error says nothing about the file.
        let Ok(end) = u64::try_from(end) else { return };
        if end < self.intact.load(Ordering::Relaxed) && end < self.intact.fetch_min(end, Ordering::Relaxed) {
            tracing::error!(
                code = "E_MEDIUM",
                path = %self.medium.path.display(),
                was = self.medium.size,
                now = end,
                "the file was shortened under the pool: what lay behind its new end is lost, and requests to it fail"
            );
        }
    }

    fn intact(&self) -> u64 {
        self.intact.load(Ordering::Relaxed)
    }

    fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }
}
