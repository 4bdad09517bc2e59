// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The way to the host through a driver that knows nothing of vSSDs: reads that make a letter, and the serial number, which the
//! driver asks the device for each time it is read. Described in [`vssd_protocol::letter`]; it knows nothing of file systems.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl, opcode};
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use tracing::debug;
use vssd_protocol::letter::{Letter, Notice};
use vssd_protocol::units::{BlockRange, SECTOR_SIZE};

use crate::error::{AgentError, Result};

const SYS: &str = "/sys/block";
/// What the serial numbers of vSSDs begin with.
const SERIAL: &str = "vssd-";
/// A read by somebody else in the middle of a letter spoils it.
const TRIES: u32 = 5;
const AGAIN: Duration = Duration::from_millis(20);
/// Enough for any device's rules about buffers of direct reads.
const ALIGN: usize = 4096;

/// The disks under a stock driver whose serial number says that they are vSSDs. Those that are `known` are not asked: a serial
/// number that is read behind a letter takes the answer to it away.
pub(crate) fn list_besides(known: &BTreeSet<String>) -> Vec<String> {
    let entries = fs::read_dir(SYS).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("vd") && !known.contains(name) && is_vssd(name))
        .collect();
    names.sort();
    names
}

fn is_vssd(name: &str) -> bool {
    serial(name).is_ok_and(|serial| serial.starts_with(SERIAL))
}

/// What a call that failed means. A disk that another driver takes has no bytes any more, then no device, and then no name.
fn failure(what: &'static str, name: &str, path: &Path, source: io::Error) -> AgentError {
    let no_device = matches!(Errno::from_io_error(&source), Some(Errno::NXIO | Errno::NODEV | Errno::NOENT));
    if no_device || source.kind() == ErrorKind::UnexpectedEof || !is_vssd(name) {
        AgentError::no_disk(name, source)
    } else {
        AgentError::io(what, path, source)
    }
}

fn serial(name: &str) -> io::Result<String> {
    Ok(fs::read_to_string(Path::new(SYS).join(name).join("serial"))?.trim_end().to_owned())
}

/// A disk and the host behind it.
#[derive(Debug)]
pub(crate) struct Line {
    name: String,
    path: PathBuf,
    device: File,
    /// Bytes of a logical block.
    logical: usize,
    buffer: Vec<u8>,
}

impl Line {
    pub(crate) fn open(name: &str) -> Result<Self> {
        let path = Path::new("/dev").join(name);
        let no_disk = |source| AgentError::no_disk(name, source);
        let text = fs::read_to_string(Path::new(SYS).join(name).join("queue/logical_block_size"))
            .map_err(no_disk)?;
        let logical = text.trim().parse().ok().filter(|size| (512..=ALIGN).contains(size)).unwrap_or(512);
        let direct = OFlags::DIRECT.bits().cast_signed();
        let device = OpenOptions::new()
            .read(true)
            .custom_flags(direct)
            .open(&path)
            .map_err(|source| failure("open", name, &path, source))?;
        Ok(Self { name: name.to_owned(), path, device, logical, buffer: vec![0; 2 * ALIGN] })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> Result<u64> {
        let text = fs::read_to_string(Path::new(SYS).join(&self.name).join("size"))
            .map_err(|source| AgentError::no_disk(&self.name, source))?;
        Ok(text.trim().parse().unwrap_or(0u64).saturating_mul(SECTOR_SIZE))
    }

    /// Tells the host something, and hears what it says.
    pub(crate) fn exchange(&mut self, letter: Letter) -> Result<Notice> {
        let home = sched_getaffinity(None).ok();
        // A letter is one queue's, and a processor has one queue.
        let mut here = CpuSet::new();
        here.set(sched_getcpu());
        let pinned = sched_setaffinity(None, &here);
        if let Err(errno) = pinned {
            debug!(disk = self.name, %errno, "cannot stay on one processor");
        }
        let heard = self.exchange_here(letter);
        if let Some(home) = home.filter(|_| pinned.is_ok()) {
            // What was allowed before is allowed still.
            let _ = sched_setaffinity(None, &home);
        }
        heard
    }

    fn exchange_here(&mut self, letter: Letter) -> Result<Notice> {
        for _ in 0..TRIES {
            self.send(letter)?;
            let serial = serial(&self.name).map_err(|source| AgentError::no_disk(&self.name, source))?;
            if let Some(notice) = Notice::decode(serial.as_bytes()) {
                return Ok(notice);
            }
            thread::sleep(AGAIN);
        }
        Err(AgentError::Unheard { disk: self.name.clone() })
    }

    fn send(&mut self, letter: Letter) -> Result<()> {
        let at = self.buffer.as_ptr().align_offset(ALIGN);
        let logical = self.logical;
        for block in letter.encode() {
            let piece = self.buffer.get_mut(at..at + logical).unwrap_or_default();
            self.device
                .read_exact_at(piece, u64::from(block) * logical as u64)
                .map_err(|source| failure("read", &self.name, &self.path, source))?;
        }
        Ok(())
    }

    /// Tells the device that the contents of blocks are not needed.
    pub(crate) fn discard(
        &self,
        block_size: u64,
        ranges: impl IntoIterator<Item = BlockRange>,
    ) -> Result<()> {
        let failed = |source| failure("discard blocks of", &self.name, &self.path, source);
        let device = OpenOptions::new().write(true).open(&self.path).map_err(failed)?;
        for range in ranges {
            let bytes = [u64::from(range.start) * block_size, u64::from(range.count) * block_size];
            // BLKDISCARD, _IO(0x12, 119), with `uint64_t range[2]`.
            // SAFETY: the kernel reads two numbers, and nothing else.
            unsafe {
                let call = Setter::<{ opcode::none(0x12, 119) }, [u64; 2]>::new(bytes);
                ioctl(&device, call).map_err(|errno| failed(errno.into()))?;
            }
        }
        Ok(())
    }
}
