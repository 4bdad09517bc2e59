// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A medium in this process's memory, for tests and experiments. It forgets when it is dropped; whoever
//! wants to open a pool on it twice keeps the `Arc`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{AlignedBuf, Store, out_of_bounds, within};
use crate::types::MediumKind;

/// See the module's text.
#[derive(Debug)]
pub struct MemStore {
    kind: MediumKind,
    path: PathBuf,
    memory: AlignedBuf,
    bytes_written: AtomicU64,
}

impl MemStore {
    /// `size` zero bytes that play the part of a medium of that kind.
    pub fn new(kind: MediumKind, size: usize) -> Self {
        Self {
            kind,
            path: PathBuf::from(format!("memory:{kind}")),
            memory: AlignedBuf::zeroed(size),
            bytes_written: AtomicU64::new(0),
        }
    }

    fn at(&self, offset: u64, len: usize) -> io::Result<*mut u8> {
        if !within(offset, len as u64, self.memory.len() as u64) {
            return Err(out_of_bounds());
        }
        let offset = usize::try_from(offset).map_err(|_| out_of_bounds())?;
        // SAFETY: offset + len was just checked to lie within the allocation.
        Ok(unsafe { self.memory.as_mut_ptr().add(offset) })
    }
}

impl Store for MemStore {
    fn kind(&self) -> MediumKind {
        self.kind
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn size(&self) -> u64 {
        self.memory.len() as u64
    }

    fn is_fresh(&self) -> bool {
        self.bytes_written() == 0
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        // SAFETY: buf is exclusively ours and buf.len() bytes long.
        unsafe { self.copy_out(offset, buf.as_mut_ptr(), buf.len()) }
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.bytes_written.fetch_add(buf.len() as u64, Ordering::Relaxed);
        // SAFETY: buf is buf.len() readable bytes.
        unsafe { self.copy_in(offset, buf.as_ptr(), buf.len()) }
    }

    fn write_align(&self) -> u32 {
        64
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| out_of_bounds())?;
        let to = self.at(offset, len)?;
        // SAFETY: `at` checked the bounds; concurrent access to medium bytes is by raw pointer only.
        unsafe { to.write_bytes(0, len) };
        self.bytes_written.fetch_add(len as u64, Ordering::Relaxed);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync_is_instant(&self) -> bool {
        true
    }

    unsafe fn copy_out(&self, offset: u64, to: *mut u8, len: usize) -> io::Result<()> {
        let from = self.at(offset, len)?;
        // SAFETY: the caller answers for `to`, `at` for `from`. `copy` rather than `copy_nonoverlapping`
        // costs nothing and needs no promise that a guest's memory is not this very mapping.
        unsafe { std::ptr::copy(from, to, len) };
        Ok(())
    }

    unsafe fn copy_in(&self, offset: u64, from: *const u8, len: usize) -> io::Result<()> {
        let to = self.at(offset, len)?;
        // SAFETY: as in copy_out.
        unsafe { std::ptr::copy(from, to, len) };
        Ok(())
    }

    fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }
}
