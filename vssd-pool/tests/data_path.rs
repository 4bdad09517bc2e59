// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the data path does not do: allocate, and fill the host's page cache.

// A panic is how a test reports; sizes are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use common::*;
use vssd_pool::{BlockSize, CreateOptions, Lane, MediumKind, MediumSpec, OpenOptions, Pool, Submitted, Vssd};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator; counting touches a plain thread-local.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are the system allocator's demands.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const B: u64 = 64 << 10;

fn pool_on(dir: &tempfile::TempDir, kind: MediumKind, size: u64) -> (Arc<Pool>, Arc<Vssd>) {
    let medium = MediumSpec::new(kind, dir.path().join("medium"), Some(size));
    let mut create = CreateOptions::new("p", vec![medium]);
    create.block_size = BlockSize::DEFAULT;
    Pool::create(&create).unwrap();
    let pool = Pool::open(&OpenOptions::new([dir.path().join("medium")])).unwrap();
    let vssd = pool.create_vssd(&spec("a", 128, 128)).unwrap();
    (pool, vssd)
}

/// Page-aligned memory.
fn aligned(len: usize) -> (Vec<u8>, usize) {
    let memory = vec![7u8; len + 4096];
    let start = memory.as_ptr().align_offset(4096);
    (memory, start)
}

/// One batch of reads, one of writes, over two blocks each, and their completions.
fn batches(lane: &mut Lane, vssd: &Arc<Vssd>, buffers: &mut [u8]) {
    for is_write in [false, true] {
        lane.begin_batch();
        let mut pending = 0;
        for (i, buffer) in (0u64..).zip(buffers.chunks_exact_mut(8192)) {
            let (front, back) = buffer.split_at_mut(4096);
            let iov = [libc_iovec(front), libc_iovec(back)];
            let offset = (i + 1) * B - 4096;
            // SAFETY: the buffers outlive the requests, which are waited for below.
            let submitted = unsafe {
                if is_write { lane.write(vssd, offset, &iov, i) } else { lane.read(vssd, offset, &iov, i) }
            };
            match submitted {
                Submitted::Done(result) => assert_eq!(result, Ok(())),
                Submitted::Pending => pending += 1,
            }
        }
        lane.end_batch();
        while pending > 0 {
            lane.poll(&mut |_, result| {
                assert_eq!(result, Ok(()));
                pending -= 1;
            });
        }
    }
}

#[test]
fn warm_lane_allocates_nothing() {
    for (base, kind) in [("/dev/shm", MediumKind::Nvram), ("/tmp", MediumKind::Ssd)] {
        let dir = tempfile::tempdir_in(base).unwrap();
        let (pool, vssd) = pool_on(&dir, kind, 32 * MIB);
        let mut lane = pool.lane().unwrap();
        let (mut memory, start) = aligned(32 * 8192);
        let buffers = &mut memory[start..start + 32 * 8192];
        for _ in 0..4 {
            batches(&mut lane, &vssd, buffers);
        }
        let before = ALLOCATIONS.get();
        for _ in 0..20 {
            batches(&mut lane, &vssd, buffers);
        }
        assert_eq!(ALLOCATIONS.get() - before, 0, "{kind}");
    }
}

#[test]
fn ssd_data_stays_out_of_the_page_cache() {
    const SIZE: usize = 32 << 20;
    // Beside the build results: a folder for temporary files may lie in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (pool, vssd) = pool_on(&dir, MediumKind::Ssd, SIZE as u64);
    let cache = pool.info().media[0].cache;
    assert_eq!(cache, Some(vssd_pool::Cache::Direct), "{} has no direct I/O", dir.path().display());
    let resident = || {
        let file = std::fs::File::open(dir.path().join("medium")).unwrap();
        let mut pages = vec![0u8; SIZE / 4096];
        // SAFETY: a fresh mapping that nothing else knows, of a file that keeps its size, unmapped again; mincore
        // fills one byte for each of its pages.
        unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                SIZE,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            assert_eq!(libc::mincore(at, SIZE, pages.as_mut_ptr()), 0);
            libc::munmap(at, SIZE);
        }
        pages.iter().filter(|page| **page & 1 != 0).count()
    };
    let before = resident();
    assert!(
        before < 64,
        "the superblocks are looked at before it is known what the medium is: {before} pages"
    );
    let mut io = Io::new(&pool);
    for block in 0..128 {
        io.fill(&vssd, block * B, B, 0x42).unwrap();
        io.read_vec(&vssd, block * B, B).unwrap();
    }
    io.flush(&vssd).unwrap();
    io.discard(&vssd, 0, 64 * B).unwrap();
    assert!(resident() <= before, "{} of {} pages, {before} before", resident(), SIZE / 4096);
    // The measurement itself can tell: reading through the page cache fills it.
    std::fs::read(dir.path().join("medium")).unwrap();
    assert!(resident() > 1000);
}
