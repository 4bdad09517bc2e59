// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the tests of the crate share: pools on small media, and I/O with plain buffers.

#![allow(dead_code)]

use std::sync::Arc;

use vssd_pool::store::{MemStore, Store};
use vssd_pool::{
    BlockSize, CreateOptions, IoError, Lane, MediumKind, OpenOptions, Pool, Submitted, Vssd, VssdAttrs,
    VssdSpec,
};

pub(crate) type IoResult = Result<(), IoError>;

pub(crate) const MIB: u64 = 1 << 20;

/// Options of a small pool with 4 KiB blocks.
pub(crate) fn create_options() -> CreateOptions {
    let mut options = CreateOptions::new("test", Vec::new());
    options.block_size = BlockSize::new(4096).expect("a valid block size");
    options
}

pub(crate) fn open_options(threads: bool) -> OpenOptions {
    let mut options = OpenOptions::new::<&str>([]);
    options.threads = threads;
    options
}

/// A pool in memory, with its stores so that it can be opened again.
pub(crate) fn mem_pool(sizes: &[(MediumKind, u64)], threads: bool) -> (Arc<Pool>, Vec<Arc<dyn Store>>) {
    let stores: Vec<Arc<dyn Store>> = sizes
        .iter()
        .map(|&(kind, size)| {
            Arc::new(MemStore::new(kind, usize::try_from(size).expect("small"))) as Arc<dyn Store>
        })
        .collect();
    Pool::create_on(&create_options(), &stores).expect("create");
    (Pool::open_on(&open_options(threads), stores.clone()).expect("open"), stores)
}

pub(crate) fn spec(name: &str, max_blocks: u32, initial_blocks: u32) -> VssdSpec {
    VssdSpec { name: name.to_owned(), max_blocks, initial_blocks, attrs: VssdAttrs::default() }
}

/// A lane whose requests are waited for.
pub(crate) struct Io {
    pub(crate) lane: Lane,
    pool: Arc<Pool>,
}

impl Io {
    pub(crate) fn new(pool: &Arc<Pool>) -> Self {
        Self { lane: pool.lane().expect("lane"), pool: Arc::clone(pool) }
    }

    fn finish(&mut self, submitted: Submitted) -> IoResult {
        let mut result = match submitted {
            Submitted::Done(result) => Some(result),
            Submitted::Pending => {
                // Only does something for a pool without threads.
                self.pool.run_background();
                None
            }
        };
        self.lane.drain(&mut |token, done| {
            assert_eq!(token, 7);
            assert!(result.replace(done).is_none(), "reported twice");
        });
        result.expect("reported")
    }

    pub(crate) fn read(&mut self, vssd: &Arc<Vssd>, offset: u64, bytes: &mut [u8]) -> IoResult {
        let iov = [libc_iovec(bytes)];
        // SAFETY: `bytes` outlives the request, which `finish` waits for.
        let submitted = unsafe { self.lane.read(vssd, offset, &iov, 7) };
        self.finish(submitted)
    }

    pub(crate) fn read_vec(&mut self, vssd: &Arc<Vssd>, offset: u64, len: u64) -> Result<Vec<u8>, IoError> {
        let mut bytes = vec![0xee; usize::try_from(len).expect("small")];
        self.read(vssd, offset, &mut bytes).map(|()| bytes)
    }

    pub(crate) fn write(&mut self, vssd: &Arc<Vssd>, offset: u64, bytes: &[u8]) -> IoResult {
        let mut bytes = bytes.to_vec();
        let iov = [libc_iovec(&mut bytes)];
        // SAFETY: `bytes` outlives the request, which `finish` waits for.
        let submitted = unsafe { self.lane.write(vssd, offset, &iov, 7) };
        self.finish(submitted)
    }

    pub(crate) fn fill(&mut self, vssd: &Arc<Vssd>, offset: u64, len: u64, byte: u8) -> IoResult {
        self.write(vssd, offset, &vec![byte; usize::try_from(len).expect("small")])
    }

    pub(crate) fn flush(&mut self, vssd: &Arc<Vssd>) -> IoResult {
        let submitted = self.lane.flush(vssd, 7);
        self.finish(submitted)
    }

    pub(crate) fn discard(&mut self, vssd: &Arc<Vssd>, offset: u64, len: u64) -> IoResult {
        let submitted = self.lane.discard(vssd, offset, len, 7);
        self.finish(submitted)
    }

    pub(crate) fn write_zeroes(&mut self, vssd: &Arc<Vssd>, offset: u64, len: u64, unmap: bool) -> IoResult {
        let submitted = self.lane.write_zeroes(vssd, offset, len, unmap, 7);
        self.finish(submitted)
    }
}

pub(crate) fn libc_iovec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}
