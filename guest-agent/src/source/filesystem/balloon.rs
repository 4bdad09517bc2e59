// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The balloon file: space that the file system has given to nobody, so that its blocks can go.
//!
//! It is allocated and never written (what reads it gets zeroes, and the file system reads nothing), has mode 0, belongs to
//! root, and is immutable but for the moment in which the agent changes it: nobody truncates, deletes or defragments it by
//! mistake. Where its extents lie is asked anew each time; nothing is remembered.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    FallocateFlags, IFlags, OFlags, StatVfs, fallocate, ioctl_getflags, ioctl_setflags, statvfs,
};

use super::ioctl::{self, Extent};
use super::layout::{self, Geometry};
use super::mount::Mount;
use crate::blocks::BlockSet;
use crate::error::{AgentError, Result};

/// Its name, in the root of the file system.
pub(crate) const NAME: &str = ".vssd-balloon";

/// An open balloon file. Kept open only while it is used: who unmounts must not be stopped by an idle agent.
#[derive(Debug)]
pub(crate) struct Balloon {
    path: PathBuf,
    file: File,
    geometry: Geometry,
}

/// Free space, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    pub(crate) size: u64,
    pub(crate) free: u64,
}

impl Space {
    pub(crate) fn of(stat: &StatVfs) -> Self {
        let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
        Self { size: bytes(stat.f_blocks), free: bytes(stat.f_bavail) }
    }
}

impl Balloon {
    /// Opens the file. `None` if it is not there.
    pub(crate) fn open(mount: &Mount, geometry: Geometry) -> Result<Option<Self>> {
        let path = mount.point.join(NAME);
        // An immutable file cannot be opened for writing. To change it, `unlocked` opens it once more.
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(&path);
        match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => Self::over(path, other, geometry).map(Some),
        }
    }

    /// Opens the file, or makes it.
    pub(crate) fn make(mount: &Mount, geometry: Geometry) -> Result<Self> {
        if let Some(balloon) = Self::open(mount, geometry)? {
            return Ok(balloon);
        }
        let path = mount.point.join(NAME);
        let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o000).open(&path);
        Self::over(path, made, geometry)
    }

    fn over(path: PathBuf, file: io::Result<File>, geometry: Geometry) -> Result<Self> {
        let file = file.map_err(|source| AgentError::io("open", &path, source))?;
        let meta = file.metadata().map_err(|source| AgentError::io("look at", &path, source))?;
        if !meta.is_file() || meta.uid() != 0 || meta.nlink() != 1 || meta.mode() & 0o777 != 0 {
            let what = "is no balloon file: not a file of root's with mode 0 and one name".to_owned();
            return Err(AgentError::Unsuitable { path, what });
        }
        Ok(Self { path, file, geometry })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn extents(&self) -> Result<Vec<Extent>> {
        ioctl::extents(&self.file).map_err(|source| AgentError::io("map", &self.path, source))
    }

    /// The blocks that lie wholly in it.
    pub(crate) fn blocks(&self) -> Result<BlockSet> {
        Ok(layout::whole_blocks(&self.extents()?, self.geometry))
    }

    /// What the file system has free for everybody.
    pub(crate) fn space(&self) -> Result<Space> {
        Ok(Space::of(&stat(&self.path)?))
    }

    /// Allocates `len` more bytes, durably. With `Ok(false)` there was not so much; a part may have come all the same.
    pub(crate) fn grow(&mut self, len: u64) -> Result<bool> {
        let at = layout::hole(&self.extents()?, len);
        let done = self.unlocked(|file| match fallocate(file, FallocateFlags::empty(), at, len) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::NOSPC) => Ok(false),
            Err(errno) => Err(io::Error::from(errno)),
        })?;
        // Before a block of it is nominated: after a power cut the file system must still know that it is taken.
        self.file.sync_all().map_err(|source| AgentError::io("sync", &self.path, source))?;
        Ok(done)
    }

    /// Gives back what holds no part of the blocks in `keep`.
    pub(crate) fn shrink_to(&mut self, keep: &BlockSet) -> Result<()> {
        let surplus = layout::surplus(&self.extents()?, keep, self.geometry);
        if surplus.is_empty() {
            return self.lock();
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.unlocked(|file| {
            for stretch in &surplus {
                fallocate(file, punch, stretch.at, stretch.len)?;
            }
            if keep.is_empty() {
                file.set_len(0)?;
            }
            Ok(())
        })
    }

    /// Sees to it that the file is immutable: whoever changed it last may have been killed meanwhile.
    fn lock(&self) -> Result<()> {
        self.set_immutable(true).map_err(|source| AgentError::io("protect", &self.path, source))
    }

    fn set_immutable(&self, on: bool) -> io::Result<()> {
        let mut flags = ioctl_getflags(&self.file)?;
        if flags.contains(IFlags::IMMUTABLE) != on {
            flags.set(IFlags::IMMUTABLE, on);
            ioctl_setflags(&self.file, flags)?;
        }
        Ok(())
    }

    /// Lets `change` have the file for writing, and protects it again, whatever came of it.
    fn unlocked<T>(&self, change: impl FnOnce(&File) -> io::Result<T>) -> Result<T> {
        let changed = self.set_immutable(false).and_then(|()| {
            let file = OpenOptions::new()
                .write(true)
                .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
                .open(&self.path)?;
            change(&file)
        });
        self.lock()?;
        changed.map_err(|source| AgentError::io("change", &self.path, source))
    }
}

pub(crate) fn stat(path: &Path) -> Result<StatVfs> {
    statvfs(path).map_err(|errno| AgentError::io("ask for the free space of", path, errno))
}
