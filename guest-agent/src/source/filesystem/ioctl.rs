// SPDX-License-Identifier: Apache-2.0 OR MIT

//! System calls that no library wraps: where the bytes of a file lie (FIEMAP), "discard what is free" (FITRIM), and how long
//! an XFS is.
//!
//! Layouts are those of Linux, include/uapi/linux/fiemap.h and fs.h, and of xfs_fs.h.

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Getter, Updater, ioctl, opcode};

/// Extents that one call lists.
const BATCH: u32 = 512;

const FLAG_SYNC: u32 = 1;
const EXTENT_LAST: u32 = 1;
const EXTENT_UNWRITTEN: u32 = 0x800;
const EXTENT_MERGED: u32 = 0x1000;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved2: [u32; 3],
}

#[repr(C)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [RawExtent; BATCH as usize],
}

#[repr(C)]
struct FstrimRange {
    start: u64,
    len: u64,
    min_len: u64,
}

/// `struct xfs_fsop_geom_v1`.
#[repr(C)]
#[derive(Clone, Copy)]
struct XfsGeometry {
    block_size: u32,
    realtime_extent: u32,
    group_blocks: u32,
    other: [u32; 5],
    data_blocks: u64,
    rest: [u64; 9],
}

/// Bytes of a file that lie together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Offset in the file.
    pub(crate) logical: u64,
    /// Offset in the file system's device.
    pub(crate) physical: u64,
    pub(crate) len: u64,
    /// Allocated, never written, and of no other kind: nothing reads or writes it, and nothing moves it.
    pub(crate) is_idle: bool,
}

impl Extent {
    pub(crate) fn end(&self) -> u64 {
        self.logical.saturating_add(self.len)
    }
}

/// The extents of a file, by their offset in it.
pub(crate) fn extents(file: impl AsFd) -> io::Result<Vec<Extent>> {
    let mut all: Vec<Extent> = Vec::new();
    let mut map = Box::new(Fiemap {
        start: 0,
        length: u64::MAX,
        flags: FLAG_SYNC,
        mapped: 0,
        count: BATCH,
        reserved: 0,
        extents: [RawExtent::default(); BATCH as usize],
    });
    loop {
        map.mapped = 0;
        // FS_IOC_FIEMAP, _IOWR('f', 11, struct fiemap): the size in the number is that of the header.
        // SAFETY: the kernel writes the header and at most `count` extents, which is what follows it.
        unsafe {
            let call = Updater::<{ opcode::read_write::<[u8; 32]>(b'f', 11) }, Fiemap>::new(&mut map);
            ioctl(file.as_fd(), call)?;
        }
        let mapped = map.extents.get(..map.mapped as usize).unwrap_or(&map.extents);
        for extent in mapped {
            all.push(Extent {
                logical: extent.logical,
                physical: extent.physical,
                len: extent.length,
                is_idle: extent.flags & !(EXTENT_LAST | EXTENT_MERGED) == EXTENT_UNWRITTEN,
            });
        }
        let is_last = mapped.last().is_none_or(|extent| extent.flags & EXTENT_LAST != 0);
        let next = all.last().map_or(0, Extent::end);
        if is_last || next <= map.start {
            return Ok(all);
        }
        map.start = next;
        map.length = u64::MAX - next;
    }
}

/// How many bytes of its device an XFS uses, and of how many each of its allocation groups has.
pub(crate) fn xfs_lens(directory: impl AsFd) -> io::Result<(u64, u64)> {
    // XFS_IOC_FSGEOMETRY_V1, _IOR('X', 100, struct xfs_fsop_geom_v1).
    // SAFETY: the kernel writes that struct, and any bytes are numbers.
    let geometry = unsafe {
        let call = Getter::<{ opcode::read::<XfsGeometry>(b'X', 100) }, XfsGeometry>::new();
        ioctl(directory, call)?
    };
    let bytes = |blocks: u64| blocks.saturating_mul(geometry.block_size.into());
    Ok((bytes(geometry.data_blocks), bytes(geometry.group_blocks.into())))
}

/// Discards what a file system has free, and says how many bytes that were.
pub(crate) fn trim(directory: impl AsFd) -> io::Result<u64> {
    let mut range = FstrimRange { start: 0, len: u64::MAX, min_len: 0 };
    // FITRIM, _IOWR('X', 121, struct fstrim_range).
    // SAFETY: the kernel reads and writes that struct, and nothing else.
    unsafe {
        let call = Updater::<{ opcode::read_write::<FstrimRange>(b'X', 121) }, FstrimRange>::new(&mut range);
        ioctl(directory, call)?;
    }
    Ok(range.len)
}
