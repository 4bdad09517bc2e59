// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Files and block devices: making, opening and locking them. Knows nothing of what they hold.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::types::MediumKind;

const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// `_IO(0x12, 127)`, `_IOR(0x12, 114, size_t)` and `_IO(0x12, 104)` of linux/fs.h.
pub(super) const BLKZEROOUT: libc::Ioctl = 0x127f;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
pub(super) const BLKSSZGET: libc::Ioctl = 0x1268;

/// An open, locked medium.
#[derive(Debug)]
pub(super) struct MediumFile {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) is_device: bool,
    pub(super) is_fresh: bool,
    pub(super) read_only: bool,
    magic: u64,
}

impl MediumFile {
    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub(super) fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
            return Err(super::out_of_bounds());
        };
        // SAFETY: fallocate touches no memory of ours; the descriptor is open.
        if unsafe { libc::fallocate(self.fd(), mode, offset, len) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    pub(super) fn is_tmpfs(&self) -> bool {
        !self.is_device && self.magic == TMPFS_MAGIC
    }

    /// Whether the file is plain memory, which never reaches a disk.
    pub(super) fn is_memory(&self) -> bool {
        !self.is_device && (self.magic == TMPFS_MAGIC || self.magic == HUGETLBFS_MAGIC)
    }
}

pub(crate) fn open_error(path: &Path, source: io::Error) -> Error {
    if source.kind() == io::ErrorKind::NotFound {
        Error::NotFound { what: format!("medium {}", path.display()) }
    } else {
        Error::io(format!("cannot open {}", path.display()), source)
    }
}

pub(super) fn open_existing(path: &Path, read_only: bool) -> Result<MediumFile> {
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
        .map_err(|source| open_error(path, source))?;
    finish(file, path, false, read_only)
}

/// Makes a file of `size` zero bytes. With `force` an existing one is emptied first.
pub(super) fn create(path: &Path, size: u64, kind: MediumKind, force: bool) -> Result<MediumFile> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_CLOEXEC);
    let file = match options.clone().create_new(true).open(path) {
        Ok(file) => file,
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists && force => {
            options.open(path).map_err(|source| open_error(path, source))?
        }
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
            return Err(Error::Exists { what: path.display().to_string() });
        }
        Err(source) => return Err(Error::io(format!("cannot create {}", path.display()), source)),
    };
    let mut medium = finish(file, path, true, false)?;
    if medium.is_device {
        if size > medium.size {
            return Err(Error::medium(path, format!("has {} bytes, {size} were asked for", medium.size)));
        }
        medium.size = size;
        medium.is_fresh = false;
        return Ok(medium);
    }
    let resize = |len| {
        medium
            .file
            .set_len(len)
            .map_err(|source| Error::io(format!("cannot size {}", path.display()), source))
    };
    resize(0)?;
    resize(size)?;
    if kind == MediumKind::Nvram {
        reserve_space(&medium, size)?;
    }
    medium.size = size;
    Ok(medium)
}

/// Takes the room of a mapped file at once: a store into a hole of a full file system is a SIGBUS.
fn reserve_space(medium: &MediumFile, size: u64) -> Result<()> {
    match medium.fallocate(0, 0, size) {
        Err(source) if source.raw_os_error() != Some(libc::EOPNOTSUPP) => {
            Err(Error::io(format!("cannot reserve the room of {}", medium.path.display()), source))
        }
        _ => Ok(()),
    }
}

fn finish(file: File, path: &Path, is_fresh: bool, read_only: bool) -> Result<MediumFile> {
    let io_error = |source| Error::io(format!("cannot examine {}", path.display()), source);
    let metadata = file.metadata().map_err(io_error)?;
    let is_device = metadata.file_type().is_block_device();
    if !is_device && !metadata.file_type().is_file() {
        return Err(Error::medium(path, "is neither a file nor a block device"));
    }
    lock(&file, path, read_only)?;
    let size = if is_device { device_size(&file).map_err(io_error)? } else { metadata.len() };
    let magic = file_system_magic(&file).map_err(io_error)?;
    Ok(MediumFile { file, path: path.to_owned(), size, is_device, is_fresh, read_only, magic })
}

fn device_size(file: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 stores one u64 at the pointer, which names a live local.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(size)
}

fn file_system_magic(file: &File) -> io::Result<u64> {
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: fstatfs fills the structure the pointer names; all-zero is a valid value of it besides.
    if unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: initialised by zeroed() and filled by the call.
    let magic = unsafe { stat.assume_init() }.f_type;
    // The field's type differs between architectures; the magic numbers fit in 32 bits on all.
    #[allow(clippy::cast_sign_loss, clippy::unnecessary_cast)]
    Ok(magic as u64 & 0xffff_ffff)
}

/// How long a lock may outlive its holder: the kernel tears io_urings down after their process is gone, and
/// they keep their files open until then, which takes as long as a busy disk takes to flush.
const AFTERLIFE: Duration = Duration::from_secs(10);

/// Locks a medium against every other open file description, in this process too; it holds as long as the
/// description is open and ends with the process, however that ends.
fn lock(file: &File, path: &Path, read_only: bool) -> Result<()> {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let started = Instant::now();
    loop {
        let Err(source) = set_lock(file, kind) else { return Ok(()) };
        if !matches!(source.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) {
            return Err(Error::io(format!("cannot lock {}", path.display()), source));
        }
        let holder = holder_of(file);
        if holder.is_some() || started.elapsed() > AFTERLIFE {
            return Err(Error::Locked { path: path.to_owned(), holder });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn set_lock(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: flock is plain data; all-zero is a valid value (the whole file, l_pid 0 as OFD locks demand).
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    // The constants are small; the field is an i16.
    #[allow(clippy::cast_possible_truncation)]
    {
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
    }
    // SAFETY: F_OFD_SETLK reads the structure the pointer names, which lives on this frame.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Drop for MediumFile {
    /// Closing would do, were it not for the io_urings that keep the file open a little longer.
    fn drop(&mut self) {
        if let Err(error) = set_lock(&self.file, libc::F_UNLCK) {
            tracing::debug!(medium = %self.path.display(), %error, "cannot unlock");
        }
    }
}

/// Some process, perhaps this one, that has the same file open besides us. The kernel does not say who holds
/// an OFD lock.
fn holder_of(file: &File) -> Option<u32> {
    let wanted = file.metadata().ok()?;
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(fds) = std::fs::read_dir(process.path().join("fd")) else { continue };
        let same = fds.flatten().filter(|fd| {
            std::fs::metadata(fd.path())
                .is_ok_and(|open| open.ino() == wanted.ino() && open.dev() == wanted.dev())
        });
        if same.count() > usize::from(pid == std::process::id()) {
            return Some(pid);
        }
    }
    None
}
