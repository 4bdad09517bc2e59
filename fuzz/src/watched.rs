// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A medium in memory that is put back as it was after each input, at the cost of what was written to it.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use vssd_pool::MediumKind;
use vssd_pool::store::{MemStore, Store};

#[derive(Debug)]
pub struct Watched {
    store: MemStore,
    written: Mutex<Vec<Range<usize>>>,
}

impl Watched {
    pub fn new(kind: MediumKind, bytes: &[u8]) -> Self {
        let store = MemStore::new(kind, bytes.len());
        store.write_at(0, bytes).unwrap();
        Self { store, written: Mutex::default() }
    }

    /// Puts back what was written; `bytes` are those it was made of.
    pub fn restore(&self, bytes: &[u8]) {
        for range in self.written.lock().unwrap().drain(..) {
            self.store.write_at(range.start as u64, &bytes[range]).unwrap();
        }
    }

    fn note(&self, offset: u64, len: usize) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let size = usize::try_from(self.store.size()).unwrap_or(usize::MAX);
        // What does not fit is refused, and writes nothing.
        if let Some(end) = start.checked_add(len).filter(|end| *end <= size) {
            self.written.lock().unwrap().push(start..end);
        }
    }
}

impl Store for Watched {
    fn kind(&self) -> MediumKind {
        self.store.kind()
    }

    fn path(&self) -> &Path {
        self.store.path()
    }

    fn size(&self) -> u64 {
        self.store.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.store.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.note(offset, buf.len());
        self.store.write_at(offset, buf)
    }

    fn write_align(&self) -> u32 {
        self.store.write_align()
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.note(offset, usize::try_from(len).unwrap_or(usize::MAX));
        self.store.zero(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.store.sync()
    }

    fn sync_is_instant(&self) -> bool {
        self.store.sync_is_instant()
    }

    unsafe fn copy_out(&self, offset: u64, to: *mut u8, len: usize) -> io::Result<()> {
        // SAFETY: the caller promises what the store asks for.
        unsafe { self.store.copy_out(offset, to, len) }
    }

    unsafe fn copy_in(&self, offset: u64, from: *const u8, len: usize) -> io::Result<()> {
        self.note(offset, len);
        // SAFETY: the caller promises what the store asks for.
        unsafe { self.store.copy_in(offset, from, len) }
    }

    fn bytes_written(&self) -> u64 {
        self.store.bytes_written()
    }
}
