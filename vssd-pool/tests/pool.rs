// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A pool from the outside, on every kind of medium.

// A panic is how a test reports; sizes are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use common::*;
use vssd_pool::{
    BlockIndex, BlockRange, BlockSize, CheckOptions, Class, CreateOptions, Error, IoError, MediumKind,
    MediumSpec, OpenOptions, Persistence, Pool, RangeStatus, Submitted, VssdAttrs, VssdSpec,
};

const B: u64 = 4096;

/// Pools on real files in a directory that lives as long as the returned guard.
fn file_pool(kinds: &[(MediumKind, &str)], base: &str) -> (tempfile::TempDir, CreateOptions, OpenOptions) {
    let dir = tempfile::tempdir_in(base).unwrap();
    let media =
        kinds.iter().map(|(kind, name)| MediumSpec::new(*kind, dir.path().join(name), Some(16 * MIB)));
    let mut create = CreateOptions::new("files", media.collect());
    create.block_size = BlockSize::new(4096).unwrap();
    let open = OpenOptions::new(create.media.iter().map(|medium| medium.path.clone()));
    (dir, create, open)
}

/// Every set of media the tests run on: in memory, mapped, on a real file system, mixed.
fn every_pool(test: impl Fn(&Arc<Pool>)) {
    use MediumKind::{Nvram, Ssd};
    for sizes in [&[(Nvram, 8 * MIB)][..], &[(Ssd, 8 * MIB)], &[(Nvram, 4 * MIB), (Ssd, 8 * MIB)]] {
        let (pool, _stores) = mem_pool(sizes, true);
        test(&pool);
    }
    for (base, kinds) in [
        ("/dev/shm", &[(Nvram, "n")][..]),
        ("/dev/shm", &[(Ssd, "s")]),
        ("/tmp", &[(Ssd, "s")]),
        ("/tmp", &[(Nvram, "n"), (Ssd, "s")]),
    ] {
        let (_dir, create, open) = file_pool(kinds, base);
        Pool::create(&create).unwrap();
        test(&Pool::open(&open).unwrap());
    }
}

#[test]
fn written_data_is_read_back_and_the_rest_is_zero() {
    every_pool(|pool| {
        let vssd = pool.create_vssd(&spec("a", 64, 32)).unwrap();
        let mut io = Io::new(pool);
        assert_eq!(io.read_vec(&vssd, 0, 32 * B).unwrap(), vec![0; (32 * B) as usize]);
        assert_eq!(vssd.allocated_blocks(), 0, "reading allocates nothing");
        io.fill(&vssd, 3 * B + 512, 2 * B, 0x11).unwrap();
        let mut expected = vec![0; (32 * B) as usize];
        expected[(3 * B + 512) as usize..(5 * B + 512) as usize].fill(0x11);
        assert_eq!(io.read_vec(&vssd, 0, 32 * B).unwrap(), expected);
        assert_eq!(vssd.allocated_blocks(), 3);
        io.flush(&vssd).unwrap();
        drop(io);
        pool.close().unwrap();
        drop(vssd);
    });
}

#[test]
fn pool_opened_again_holds_what_it_held() {
    use MediumKind::{Nvram, Ssd};
    for kinds in [&[(Nvram, "n")][..], &[(Ssd, "s")], &[(Nvram, "n"), (Ssd, "s")]] {
        let (_dir, create, open) = file_pool(kinds, "/tmp");
        Pool::create(&create).unwrap();
        let pool = Pool::open(&open).unwrap();
        let vssd = pool.create_vssd(&spec("a", 64, 32)).unwrap();
        let (id, uuid) = (vssd.id(), vssd.uuid());
        let mut io = Io::new(&pool);
        io.fill(&vssd, 5 * B, 3 * B, 0x77).unwrap();
        io.discard(&vssd, 6 * B, B).unwrap();
        io.flush(&vssd).unwrap();
        assert_eq!(pool.unplug_wait(id, vec![BlockRange::new(30, 2)]).unwrap(), [RangeStatus::Ok]);
        drop((io, vssd, pool));
        for round in 0..2 {
            let pool = Pool::open(&open).unwrap();
            let vssd = pool.vssd(id).unwrap();
            assert_eq!((vssd.uuid(), vssd.name()), (uuid, "a"));
            assert_eq!((vssd.plugged_blocks(), vssd.allocated_blocks()), (30, 2), "round {round}");
            let mut io = Io::new(&pool);
            let bytes = io.read_vec(&vssd, 5 * B, 3 * B).unwrap();
            assert!(
                bytes.iter().enumerate().all(|(i, &byte)| byte == if (i as u64) / B == 1 { 0 } else { 0x77 })
            );
            assert_eq!(io.read_vec(&vssd, 30 * B, B), Err(IoError::Evicted));
            drop((io, vssd));
            pool.close().unwrap();
        }
        let report = Pool::check(&CheckOptions { media: open.media.clone(), verify_zero: true }).unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!((report.vssds, report.leased_blocks), (1, 2));
    }
}

#[test]
fn unplugged_blocks_answer_evicted_and_read_zero_when_plugged_again() {
    every_pool(|pool| {
        let vssd = pool.create_vssd(&spec("a", 16, 16)).unwrap();
        let mut io = Io::new(pool);
        io.fill(&vssd, 0, 16 * B, 0x5a).unwrap();
        let statuses = pool.unplug_wait(
            vssd.id(),
            vec![BlockRange::new(4, 4), BlockRange::new(15, 2), BlockRange::new(5, 1)],
        );
        assert_eq!(statuses.unwrap(), [RangeStatus::Ok, RangeStatus::Range, RangeStatus::Already]);
        assert_eq!((vssd.plugged_blocks(), vssd.allocated_blocks()), (12, 12));
        for block in 0..16 {
            let expected =
                if (4..8).contains(&block) { Err(IoError::Evicted) } else { Ok(vec![0x5a; B as usize]) };
            assert_eq!(io.read_vec(&vssd, block * B, B), expected, "block {block}");
        }
        // A request that touches one does nothing at all.
        assert_eq!(io.fill(&vssd, 2 * B, 4 * B, 0xff), Err(IoError::Evicted));
        assert_eq!(io.read_vec(&vssd, 2 * B, 2 * B).unwrap(), vec![0x5a; 2 * B as usize]);
        assert_eq!(io.discard(&vssd, 7 * B, 2 * B), Err(IoError::Evicted));
        assert_eq!(pool.unplug_wait(vssd.id(), vec![BlockRange::new(4, 4)]).unwrap(), [RangeStatus::Already]);
        assert_eq!(pool.plug_wait(vssd.id(), vec![BlockRange::new(3, 6)], 15).unwrap(), [RangeStatus::Limit]);
        assert_eq!(pool.plug_wait(vssd.id(), vec![BlockRange::new(3, 6)], 16).unwrap(), [RangeStatus::Ok]);
        assert_eq!(io.read_vec(&vssd, 4 * B, 4 * B).unwrap(), vec![0; 4 * B as usize]);
        assert_eq!(io.read_vec(&vssd, 3 * B, B).unwrap(), vec![0x5a; B as usize]);
        assert_eq!(
            pool.plug_wait(vssd.id(), vec![BlockRange::new(0, 16)], 16).unwrap(),
            [RangeStatus::Already]
        );
        let stats = vssd.stats();
        assert_eq!(stats.evicted, 6);
    });
}

#[test]
fn discard_and_write_zeroes_read_as_zero_and_give_whole_blocks_back() {
    every_pool(|pool| {
        let vssd = pool.create_vssd(&spec("a", 16, 16)).unwrap();
        let mut io = Io::new(pool);
        io.fill(&vssd, 0, 16 * B, 0x5a).unwrap();
        // Whole blocks 1 and 2; the edges stay.
        io.discard(&vssd, 512, 3 * B - 512 + 1024).unwrap();
        assert_eq!(vssd.allocated_blocks(), 14);
        let bytes = io.read_vec(&vssd, 0, 4 * B).unwrap();
        for (i, byte) in bytes.iter().enumerate() {
            let expected = if (B as usize..3 * B as usize).contains(&i) { 0 } else { 0x5a };
            assert_eq!(*byte, expected, "byte {i}");
        }
        for (unmap, allocated) in [(false, 14), (true, 12)] {
            io.fill(&vssd, 4 * B, 4 * B, 0x5a).unwrap();
            io.write_zeroes(&vssd, 4 * B + 1024, 3 * B, unmap).unwrap();
            assert_eq!(vssd.allocated_blocks(), allocated);
            let bytes = io.read_vec(&vssd, 4 * B, 4 * B).unwrap();
            for (i, byte) in bytes.iter().enumerate() {
                let expected = if (1024..1024 + 3 * B as usize).contains(&i) { 0 } else { 0x5a };
                assert_eq!(*byte, expected, "unmap {unmap}, byte {i}");
            }
        }
        // Zeroes over nothing allocate nothing.
        let before = vssd.allocated_blocks();
        io.write_zeroes(&vssd, B, 2 * B, false).unwrap();
        assert_eq!(vssd.allocated_blocks(), before);
    });
}

#[test]
fn blocks_go_from_one_vssd_to_another_without_their_bytes() {
    every_pool(|pool| {
        let total = pool.info().total_blocks;
        let a = pool.create_vssd(&spec("a", total, total)).unwrap();
        let mut io = Io::new(pool);
        for block in 0..u64::from(total) {
            io.fill(&a, block * B, B, 0xaa).unwrap();
        }
        assert_eq!(pool.info().leased_blocks, total, "a pool at 100 % can be written full");
        let refused = pool.create_vssd(&spec("b", total, 8)).unwrap_err();
        assert!(matches!(refused, Error::PoolFull { requested_blocks: 8, available_blocks: 0 }), "{refused}");
        assert_eq!(pool.unplug_wait(a.id(), vec![BlockRange::new(10, 8)]).unwrap(), [RangeStatus::Ok]);
        let b = pool.create_vssd(&spec("b", total, 8)).unwrap();
        for block in 0..8 {
            // A first write of one sector: the rest of the block must be zero, not what was there before.
            io.fill(&b, block * B + 512, 512, 0xbb).unwrap();
            let bytes = io.read_vec(&b, block * B, B).unwrap();
            for (i, byte) in bytes.iter().enumerate() {
                assert_eq!(*byte, if (512..1024).contains(&i) { 0xbb } else { 0 }, "block {block} byte {i}");
            }
        }
        assert_eq!(
            pool.plug_wait(a.id(), vec![BlockRange::new(10, 1)], total).unwrap(),
            [RangeStatus::NoSpace]
        );
        pool.delete_vssd(b.id()).unwrap();
        assert_eq!(io.read_vec(&b, 0, B), Err(IoError::Evicted));
        assert!(b.is_deleted() && pool.vssd_by_name("b").is_none());
        assert_eq!(pool.plug_wait(a.id(), vec![BlockRange::new(10, 8)], total).unwrap(), [RangeStatus::Ok]);
        io.fill(&a, 10 * B, 8 * B, 0xcc).unwrap();
        assert_eq!(pool.info().leased_blocks, total);
    });
}

#[test]
fn buffers_of_any_split_and_alignment_arrive_whole() {
    every_pool(|pool| {
        let vssd = pool.create_vssd(&spec("a", 64, 64)).unwrap();
        let mut io = Io::new(pool);
        let len = 7 * B as usize + 512;
        let pattern: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        for (skew, pieces) in [
            (0usize, vec![len]),
            (1, vec![len]),
            (0, vec![100, 1, 4096, 411]),
            (3, vec![7; 40]),
            (0, vec![1; 1500]),
        ] {
            // The same bytes, in buffers that start `skew` bytes off a page and are cut into `pieces`.
            let cut = |memory: &mut [u8]| -> Vec<libc::iovec> {
                let mut rest = memory;
                let mut iov = Vec::new();
                for piece in &pieces {
                    let (now, later) = rest.split_at_mut((*piece).min(rest.len()));
                    iov.push(libc_iovec(now));
                    rest = later;
                }
                iov.push(libc_iovec(rest));
                iov
            };
            let mut memory = vec![0u8; len + 4096 + skew];
            let start = memory.as_ptr().align_offset(4096) + skew;
            memory[start..start + len].copy_from_slice(&pattern);
            let iov = cut(&mut memory[start..start + len]);
            // SAFETY: the memory outlives the request, which is drained below.
            let submitted = unsafe { io.lane.write(&vssd, 3 * B + 1024, &iov, 7) };
            let mut result = if let Submitted::Done(result) = submitted { Some(result) } else { None };
            io.lane.drain(&mut |_, done| result = Some(done));
            assert_eq!(result, Some(Ok(())), "write skew {skew}");
            let mut memory = vec![0u8; len + 4096 + skew];
            let start = memory.as_ptr().align_offset(4096) + skew;
            let iov = cut(&mut memory[start..start + len]);
            // SAFETY: as above.
            let submitted = unsafe { io.lane.read(&vssd, 3 * B + 1024, &iov, 7) };
            let mut result = if let Submitted::Done(result) = submitted { Some(result) } else { None };
            io.lane.drain(&mut |_, done| result = Some(done));
            assert_eq!(result, Some(Ok(())), "read skew {skew}");
            assert!(memory[start..start + len] == pattern[..], "skew {skew} pieces {}", pieces.len());
            assert!(memory[start + len..].iter().all(|&byte| byte == 0), "nothing beyond the buffers");
        }
    });
}

#[test]
fn requests_out_of_bounds_are_refused() {
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 8 * MIB)], true);
    let vssd = pool.create_vssd(&spec("a", 4, 4)).unwrap();
    let (other_pool, _other_stores) = mem_pool(&[(MediumKind::Nvram, 8 * MIB)], true);
    let foreign = other_pool.create_vssd(&spec("a", 4, 4)).unwrap();
    let mut io = Io::new(&pool);
    for (offset, len) in
        [(4 * B, 512), (u64::MAX - 511, 512), (u64::MAX - 511, 1024), (0, 4 * B + 512), (1, 512), (0, 511)]
    {
        assert_eq!(io.read_vec(&vssd, offset, len), Err(IoError::OutOfRange), "{offset}+{len}");
        assert_eq!(io.discard(&vssd, offset, len), Err(IoError::OutOfRange), "{offset}+{len}");
    }
    assert_eq!(io.read_vec(&foreign, 0, 512), Err(IoError::OutOfRange));
    assert_eq!(io.read_vec(&vssd, 0, 0), Ok(Vec::new()));
}

#[test]
fn minimum_protects_and_attributes_are_kept() {
    let (pool, stores) = mem_pool(&[(MediumKind::Nvram, 8 * MIB)], true);
    let vssd = pool.create_vssd(&spec("a", 16, 8)).unwrap();
    let attrs = VssdAttrs {
        requested_blocks: 12,
        min_blocks: 6,
        class: Class::Nvram,
        policy: "{\"x\":1}".to_owned(),
    };
    pool.set_attrs(vssd.id(), &attrs).unwrap();
    let ranges = vec![BlockRange::new(0, 3), BlockRange::new(3, 2), BlockRange::new(5, 1)];
    assert_eq!(
        pool.unplug_wait(vssd.id(), ranges).unwrap(),
        [RangeStatus::Protected, RangeStatus::Ok, RangeStatus::Protected]
    );
    pool.extend_vssd(vssd.id(), 100).unwrap();
    assert_eq!(pool.plug_wait(vssd.id(), vec![BlockRange::new(90, 10)], 100).unwrap(), [RangeStatus::Ok]);
    assert_eq!(pool.extend_vssd(vssd.id(), 99).unwrap_err().code(), "E_INVALID");
    let class_of_none = VssdAttrs { class: Class::Ssd, ..attrs.clone() };
    assert_eq!(pool.set_attrs(vssd.id(), &class_of_none).unwrap_err().code(), "E_INVALID");
    let id = vssd.id();
    drop((pool, vssd));
    let pool = Pool::open_on(&open_options(true), stores).unwrap();
    let vssd = pool.vssd(id).unwrap();
    assert_eq!((vssd.attrs(), vssd.total_blocks(), vssd.plugged_blocks()), (attrs, 100, 16));
    assert!(vssd.is_plugged(BlockIndex(99)) && !vssd.is_plugged(BlockIndex(3)));
}

#[test]
fn names_and_sizes_are_checked() {
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 8 * MIB)], true);
    pool.create_vssd(&spec("a", 4, 4)).unwrap();
    let code = |spec: VssdSpec| pool.create_vssd(&spec).unwrap_err().code();
    assert_eq!(code(spec("a", 4, 4)), "E_EXISTS");
    assert_eq!(code(spec("", 4, 4)), "E_INVALID");
    assert_eq!(code(spec("a\n", 4, 4)), "E_INVALID");
    assert_eq!(code(spec(&"x".repeat(65), 4, 4)), "E_INVALID");
    assert_eq!(code(spec("b", 0, 0)), "E_INVALID");
    assert_eq!(code(spec("b", 4, 5)), "E_INVALID");
    let mut long = spec("b", 4, 4);
    long.attrs.policy = "p".repeat(257);
    assert_eq!(code(long), "E_INVALID");
    assert_eq!(pool.delete_vssd(vssd_pool::VssdId(99)).unwrap_err().code(), "E_NOT_FOUND");
}

#[test]
fn media_are_locked_and_used_media_are_refused() {
    let (_dir, create, open) = file_pool(&[(MediumKind::Nvram, "n"), (MediumKind::Ssd, "s")], "/tmp");
    Pool::create(&create).unwrap();
    assert_eq!(Pool::create(&create).unwrap_err().code(), "E_EXISTS");
    let pool = Pool::open(&open).unwrap();
    let error = Pool::open(&open).unwrap_err();
    assert_eq!(error.code(), "E_LOCKED");
    assert!(error.to_string().ends_with(&format!("in use by process {}", std::process::id())), "{error}");
    assert_eq!(
        Pool::check(&CheckOptions { media: open.media.clone(), verify_zero: false }).unwrap_err().code(),
        "E_LOCKED"
    );
    drop(pool);
    let mut taken = create.clone();
    taken.media.iter_mut().for_each(|medium| medium.size = None);
    assert_eq!(Pool::create(&taken).unwrap_err().code(), "E_EXISTS");
    taken.force = true;
    Pool::create(&taken).unwrap();
    let pool = Pool::open(&open).unwrap();
    assert!(pool.vssds().is_empty());
    drop(pool);
    let mut one = open.clone();
    one.media.pop();
    assert_eq!(Pool::open(&one).unwrap_err().code(), "E_NOT_FOUND");
    let mut twice = open.clone();
    twice.media[1] = twice.media[0].clone();
    assert_eq!(Pool::open(&twice).unwrap_err().code(), "E_LOCKED");
}

#[test]
fn failed_creation_leaves_no_files_behind() {
    let (dir, mut create, open) = file_pool(&[(MediumKind::Nvram, "n"), (MediumKind::Ssd, "s")], "/tmp");
    std::fs::write(dir.path().join("s"), b"precious").unwrap();
    assert_eq!(Pool::create(&create).unwrap_err().code(), "E_EXISTS");
    assert!(!dir.path().join("n").exists());
    assert_eq!(std::fs::read(dir.path().join("s")).unwrap(), b"precious");
    std::fs::remove_file(dir.path().join("s")).unwrap();
    create.media[1].size = Some(MIB);
    assert_eq!(Pool::create(&create).unwrap_err().code(), "E_INVALID");
    assert!(!dir.path().join("n").exists() && !dir.path().join("s").exists());
    create.media[1].size = Some(16 * MIB);
    Pool::create(&create).unwrap();
    Pool::open(&open).unwrap();
}

#[test]
fn reused_medium_counts_as_dirty_until_scrubbed() {
    let (dir, mut create, open) = file_pool(&[(MediumKind::Ssd, "s")], "/tmp");
    std::fs::write(dir.path().join("s"), vec![0xdd; 16 << 20]).unwrap();
    create.media[0].size = None;
    assert_eq!(Pool::create(&create).unwrap_err().code(), "E_EXISTS");
    create.force = true;
    Pool::create(&create).unwrap();
    let pool = Pool::open(&open).unwrap();
    let total = pool.info().total_blocks;
    let vssd = pool.create_vssd(&spec("a", total, total)).unwrap();
    let mut io = Io::new(&pool);
    for block in 0..u64::from(total) {
        io.fill(&vssd, block * B, 512, 1).unwrap();
        assert!(
            io.read_vec(&vssd, block * B + 512, B - 512).unwrap().iter().all(|&byte| byte == 0),
            "block {block}"
        );
    }
}

#[test]
fn read_only_pool_reads_and_changes_nothing() {
    let (dir, create, mut open) = file_pool(&[(MediumKind::Nvram, "n"), (MediumKind::Ssd, "s")], "/tmp");
    Pool::create(&create).unwrap();
    let pool = Pool::open(&open).unwrap();
    let vssd = pool.create_vssd(&spec("a", 8, 8)).unwrap();
    let mut io = Io::new(&pool);
    io.fill(&vssd, 0, B, 9).unwrap();
    io.flush(&vssd).unwrap();
    drop((io, vssd, pool));
    let image = || ["n", "s"].map(|name| std::fs::read(dir.path().join(name)).unwrap());
    let before = image();
    open.read_only = true;
    let pool = Pool::open(&open).unwrap();
    let second = Pool::open(&open).unwrap();
    let vssd = pool.vssd_by_name("a").unwrap();
    let mut io = Io::new(&pool);
    assert_eq!(io.read_vec(&vssd, 0, B).unwrap(), vec![9; B as usize]);
    assert_eq!(io.fill(&vssd, 0, B, 1), Err(IoError::ReadOnly));
    assert_eq!(io.discard(&vssd, 0, B), Err(IoError::ReadOnly));
    assert_eq!(io.flush(&vssd), Ok(()));
    assert_eq!(pool.create_vssd(&spec("b", 1, 1)).unwrap_err().code(), "E_READ_ONLY");
    assert_eq!(pool.unplug_wait(vssd.id(), vec![BlockRange::new(0, 1)]).unwrap_err().code(), "E_READ_ONLY");
    drop((io, vssd, pool, second));
    assert!(image() == before);
}

#[test]
fn confined_vssds_lie_where_they_should() {
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 4 * MIB), (MediumKind::Ssd, 8 * MIB)], true);
    let info = pool.info();
    let nvram = info.media[0].blocks;
    let class = |name: &str, class, blocks| {
        let mut spec = spec(name, blocks, blocks);
        spec.attrs.class = class;
        pool.create_vssd(&spec)
    };
    let strict = class("n", Class::Nvram, 10).unwrap();
    let any = class("a", Class::Any, nvram).unwrap();
    let ssd = class("s", Class::Ssd, 5).unwrap();
    assert_eq!(class("m", Class::Nvram, nvram - 9).unwrap_err().code(), "E_POOL_FULL");
    let mut io = Io::new(&pool);
    // The one that may lie anywhere must leave room on NV-RAM for the one that may not.
    for (vssd, blocks) in [(&any, nvram), (&strict, 10), (&ssd, 5)] {
        for block in 0..u64::from(blocks) {
            io.fill(vssd, block * B, B, 3).unwrap();
        }
    }
    assert_eq!(strict.stats().bytes_written, [10 * B, 0]);
    assert_eq!(ssd.stats().bytes_written, [0, 5 * B]);
    assert_eq!(any.stats().bytes_written, [u64::from(nvram - 10) * B, 10 * B]);
}

#[test]
fn overcommitted_pool_that_is_full_answers_no_space_and_recovers_by_itself() {
    let stores: Vec<Arc<dyn vssd_pool::store::Store>> =
        vec![Arc::new(vssd_pool::store::MemStore::new(MediumKind::Nvram, 4 << 20))];
    let mut create = create_options();
    create.overcommit_percent = 300;
    Pool::create_on(&create, &stores).unwrap();
    let mut open = open_options(true);
    open.space_wait = Duration::from_millis(150);
    let pool = Pool::open_on(&open, stores).unwrap();
    let total = pool.info().total_blocks;
    let a = pool.create_vssd(&spec("a", total + 4, total + 4)).unwrap();
    let mut io = Io::new(&pool);
    for block in 0..u64::from(total) {
        io.fill(&a, block * B, B, 1).unwrap();
    }
    assert_eq!(io.fill(&a, u64::from(total) * B, B, 1), Err(IoError::NoSpace));
    // While it waits, another worker gives a block back.
    let waiting = {
        let (pool, a) = (Arc::clone(&pool), Arc::clone(&a));
        std::thread::spawn(move || Io::new(&pool).fill(&a, u64::from(total) * B, B, 2))
    };
    std::thread::sleep(Duration::from_millis(50));
    io.discard(&a, 0, B).unwrap();
    assert_eq!(waiting.join().unwrap(), Ok(()));
    assert_eq!(io.read_vec(&a, u64::from(total) * B, B).unwrap(), vec![2; B as usize]);
}

#[test]
fn resizes_are_answered_in_order_without_waiting_for_each_other() {
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 8 * MIB)], true);
    let vssd = pool.create_vssd(&spec("a", 256, 256)).unwrap();
    let (send, receive) = channel();
    for i in 0..64u32 {
        let send = send.clone();
        let done = Box::new(move |result: vssd_pool::Result<Vec<RangeStatus>>| {
            send.send((i, result.unwrap())).unwrap();
        });
        if i % 2 == 0 {
            pool.unplug(vssd.id(), vec![BlockRange::new(i, 2)], done);
        } else {
            pool.plug(vssd.id(), vec![BlockRange::new(i - 1, 1)], 256, done);
        }
    }
    for i in 0..64 {
        assert_eq!(receive.recv().unwrap(), (i, vec![RangeStatus::Ok]));
    }
    assert_eq!(vssd.plugged_blocks(), 256 - 32);
}

#[test]
fn msync_and_declared_persistence_are_taken_as_given() {
    let (_dir, mut create, mut open) = file_pool(&[(MediumKind::Nvram, "n")], "/tmp");
    Pool::create(&create).unwrap();
    for (wanted, got) in [
        (Persistence::Auto, Persistence::Msync),
        (Persistence::Msync, Persistence::Msync),
        (Persistence::Battery, Persistence::Battery),
    ] {
        open.media[0].persistence = wanted;
        let pool = Pool::open(&open).unwrap();
        assert_eq!(pool.info().media[0].persistence, Some(got));
    }
    open.media[0].persistence = Persistence::MapSync;
    assert_eq!(Pool::open(&open).unwrap_err().code(), "E_MEDIUM");
    create.media[0].persistence = Persistence::MapSync;
    create.force = true;
    assert_eq!(Pool::create(&create).unwrap_err().code(), "E_MEDIUM");
}

/// A loop device, detached when dropped.
struct LoopDevice(String);

/// Set to 1 where loop devices must not be missing.
const REQUIRE_LOOP: &str = "CI_REQUIRE_LOOP";

impl LoopDevice {
    /// `None` where that is not permitted, which is told past the test runner's capture, for `cargo xtask test` to sum up.
    fn new(file: &std::path::Path, sector: u32) -> Option<Self> {
        let mut losetup = std::process::Command::new("losetup");
        losetup.args(["--find", "--show", "--sector-size", &sector.to_string()]).arg(file);
        let why = match losetup.output() {
            Ok(output) if output.status.success() => {
                return Some(Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()));
            }
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        let is_required = std::env::var_os(REQUIRE_LOOP).is_some_and(|value| value == "1");
        assert!(!is_required, "no loop device: {why}");
        let text = format!(
            "\nNOT RUN: a pool on a block device: no loop device ({why}; {REQUIRE_LOOP}=1 makes this an error)\n"
        );
        std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes()).unwrap();
        None
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn maximum_is_bounded_by_what_the_pool_could_ever_be() {
    let (pool, stores) = mem_pool(&[(MediumKind::Nvram, 2 * MIB)], false);
    let most = pool.info().total_blocks * 4096;
    let error = pool.create_vssd(&spec("large", most + 1, 1)).unwrap_err();
    assert_eq!(error.code(), "E_INVALID", "{error}");
    let vssd = pool.create_vssd(&spec("large", most, 1)).unwrap();
    assert!(pool.extend_vssd(vssd.id(), most + 1).is_err());
    drop(vssd);
    drop(pool);
    let pool = Pool::open_on(&open_options(false), stores).unwrap();
    assert_eq!(pool.vssd_by_name("large").unwrap().total_blocks(), most);
}

#[test]
fn block_devices_of_either_sector_size_carry_pools() {
    for sector in [512u32, 4096] {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        std::fs::write(dir.path().join("disk"), vec![0; 16 << 20]).unwrap();
        let Some(device) = LoopDevice::new(&dir.path().join("disk"), sector) else { return };
        let mut create =
            CreateOptions::new("device", vec![MediumSpec::new(MediumKind::Ssd, &device.0, None)]);
        create.block_size = BlockSize::new(8192).unwrap();
        Pool::create(&create).unwrap();
        assert_eq!(Pool::create(&create).unwrap_err().code(), "E_EXISTS");
        let pool = Pool::open(&OpenOptions::new([&device.0])).unwrap();
        assert_eq!(pool.info().logical_block_bytes, sector);
        let total = pool.info().total_blocks;
        let vssd = pool.create_vssd(&spec("a", total, total)).unwrap();
        let mut io = Io::new(&pool);
        // Nothing of a device counts as zero: all of it is zeroed before it is lent.
        for block in 0..u64::from(total) {
            io.fill(&vssd, block * 8192 + 4096, 4096, 5).unwrap();
        }
        let bytes = io.read_vec(&vssd, 8192 + 3584, 1024).unwrap();
        assert!(bytes[..512].iter().all(|&byte| byte == 0) && bytes[512..].iter().all(|&byte| byte == 5));
        let part = io.fill(&vssd, 512, 512, 6);
        assert_eq!(part, if sector == 512 { Ok(()) } else { Err(IoError::OutOfRange) });
        io.write_zeroes(&vssd, 4096, 8192, true).unwrap();
        assert!(io.read_vec(&vssd, 4096, 8192).unwrap().iter().all(|&byte| byte == 0));
        io.discard(&vssd, 0, 8 * 8192).unwrap();
        io.flush(&vssd).unwrap();
        drop((io, vssd));
        pool.close().unwrap();
        drop(pool);
        let media = vec![std::path::PathBuf::from(&device.0).into()];
        let report = Pool::check(&CheckOptions { media, verify_zero: true }).unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.leased_blocks, total - 8);
    }
}
