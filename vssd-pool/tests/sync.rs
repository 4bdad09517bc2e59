// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A sync of the whole pool: what it costs, what it covers while others write, and how it fails.

// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vssd_pool::store::fault::{Failure, Sim, Tear};
use vssd_pool::{IoError, MediumKind, Pool};

const B: u64 = 4096;
use MediumKind::{Nvram, Ssd};
const MEDIA: [&[(MediumKind, usize)]; 3] =
    [&[(Nvram, 2 << 20)], &[(Ssd, 2 << 20)], &[(Nvram, 2 << 20), (Ssd, 2 << 20)]];

fn pool(media: &[(MediumKind, usize)], threads: bool) -> (Arc<Sim>, Arc<Pool>) {
    let sim = Sim::new(media);
    Pool::create_on(&create_options(), &sim.stores()).unwrap();
    let pool = Pool::open_on(&open_options(threads), sim.stores()).unwrap();
    (sim, pool)
}

#[test]
fn sync_with_nothing_to_make_durable_touches_no_medium() {
    for media in MEDIA {
        let (sim, pool) = pool(media, false);
        let vssd = pool.create_vssd(&spec("a", 8, 8)).unwrap();
        let mut io = Io::new(&pool);
        let cost = |io: &mut Io, act: &dyn Fn(&mut Io)| {
            let before = sim.operations();
            act(io);
            sim.operations() - before
        };
        let sync = |_: &mut Io| pool.sync_wait().unwrap();
        // Since it was opened nobody has written.
        pool.sync_wait().unwrap();
        assert_eq!(cost(&mut io, &sync), 0);
        for _ in 0..3 {
            io.fill(&vssd, 0, B, 1).unwrap();
            assert!(cost(&mut io, &sync) > 0);
            assert_eq!(cost(&mut io, &sync), 0, "{media:?}: a second sync");
            assert_eq!(cost(&mut io, &|io| io.flush(&vssd).unwrap()), 0, "{media:?}: a flush behind a sync");
            io.fill(&vssd, 0, B, 2).unwrap();
            io.flush(&vssd).unwrap();
            assert_eq!(cost(&mut io, &sync), 0, "{media:?}: a sync behind a flush");
            io.read_vec(&vssd, 0, B).unwrap();
            assert_eq!(cost(&mut io, &sync), 0, "{media:?}: a sync behind a read");
        }
    }
}

#[test]
fn sync_after_one_that_failed_is_never_acknowledged_nor_is_a_flush() {
    for media in MEDIA {
        let mut refused = 0;
        for n in 0..5 {
            let (sim, pool) = pool(media, false);
            let vssd = pool.create_vssd(&spec("a", 8, 8)).unwrap();
            let mut io = Io::new(&pool);
            io.fill(&vssd, 0, B, 1).unwrap();
            sim.fail_at(n, Failure::Errno(libc::EIO));
            let synced = pool.sync_wait();
            if sim.will_fail() {
                synced.unwrap();
                continue;
            }
            assert_eq!(synced.unwrap_err().code(), "E_IO", "operation {n} on {media:?}");
            assert_eq!(pool.sync_wait().unwrap_err().code(), "E_IO");
            assert_eq!(io.flush(&vssd), Err(IoError::Io(libc::EIO)));
            refused += 1;
        }
        assert!(refused >= 2, "{media:?}: only {refused} operations of a sync failed");
    }
}

#[test]
fn sync_after_a_flush_that_failed_is_never_acknowledged() {
    let (sim, pool) = pool(MEDIA[2], true);
    let vssd = pool.create_vssd(&spec("a", 8, 8)).unwrap();
    let mut io = Io::new(&pool);
    io.fill(&vssd, 0, B, 1).unwrap();
    sim.fail_at(0, Failure::Errno(libc::EIO));
    assert!(io.flush(&vssd).is_err());
    assert_eq!(pool.sync_wait().unwrap_err().code(), "E_IO");
    // All of those who wait together are told.
    let (send, receive) = channel();
    for _ in 0..8 {
        let send = send.clone();
        pool.sync(Box::new(move |result| send.send(result.is_err()).unwrap()));
    }
    drop(send);
    assert_eq!(receive.iter().collect::<Vec<_>>(), [true; 8]);
}

#[test]
fn pool_that_is_closed_says_so() {
    let (_sim, pool) = pool(MEDIA[0], true);
    pool.sync_wait().unwrap();
    pool.close().unwrap();
    assert_eq!(pool.sync_wait().unwrap_err().code(), "E_BUSY");
}

/// Workers write and never flush; somebody else has it made durable, again and again, and the power is cut at once.
#[test]
fn everything_acknowledged_before_a_sync_is_there_after_a_power_cut_under_load() {
    const WORKERS: u64 = 2;
    const BLOCKS: usize = 24;
    let seed = std::env::var("CRASH_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(3);
    for media in
        [&[(Nvram, 1_900_000 & !4095)][..], &[(Nvram, 1_600_000 & !4095), (Ssd, (1 << 20) + 160 * 4096)]]
    {
        let sim = Sim::new(media);
        Pool::create_on(&create_options(), &sim.stores()).unwrap();
        let pool = Pool::open_on(&open_options(true), sim.stores()).unwrap();
        let blocks = u32::try_from(BLOCKS).unwrap();
        for worker in 0..WORKERS {
            pool.create_vssd(&spec(&format!("worker {worker}"), blocks, blocks)).unwrap();
        }
        sim.record();
        let stop = AtomicBool::new(false);
        // The newest generation of each block that was acknowledged.
        let acknowledged: Vec<[AtomicU64; BLOCKS]> =
            (0..WORKERS).map(|_| [const { AtomicU64::new(0) }; BLOCKS]).collect();
        let synced: Vec<(usize, Vec<Vec<u64>>)> = std::thread::scope(|scope| {
            for (worker, acknowledged) in (0..WORKERS).zip(&acknowledged) {
                let (pool, stop) = (&pool, &stop);
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(seed + worker);
                    let vssd = pool.vssd_by_name(&format!("worker {worker}")).unwrap();
                    let mut io = Io::new(pool);
                    while !stop.load(Ordering::Relaxed) {
                        let block = rng.random_range(0..BLOCKS);
                        let generation = acknowledged[block].load(Ordering::Relaxed) + 1;
                        let bytes = generation.to_le_bytes().repeat(512);
                        io.write(&vssd, block as u64 * B, &bytes).unwrap();
                        acknowledged[block].store(generation, Ordering::Release);
                    }
                });
            }
            let mut written = 0;
            let synced = (0..60).map(|_| {
                // Something is written between two syncs, however few turns the workers get.
                let end = Instant::now() + Duration::from_secs(20);
                let before = loop {
                    let now: Vec<Vec<u64>> = acknowledged
                        .iter()
                        .map(|blocks| blocks.iter().map(|block| block.load(Ordering::Acquire)).collect())
                        .collect();
                    let sum = now.iter().flatten().sum::<u64>();
                    if sum >= written + 20 {
                        written = sum;
                        break now;
                    }
                    if Instant::now() > end {
                        stop.store(true, Ordering::Relaxed);
                        panic!("the workers stand still");
                    }
                    std::thread::yield_now();
                };
                pool.sync_wait().unwrap();
                (sim.now(), before)
            });
            let synced = synced.collect();
            stop.store(true, Ordering::Relaxed);
            synced
        });
        let mut replay = sim.replay();
        drop(pool);
        let mut covered = 0;
        for (moment, acknowledged) in synced {
            replay.advance(moment);
            // Nothing that no barrier covers arrives.
            let after = Sim::with_images(replay.crash(Tear::Whole, || false));
            let pool = Pool::open_on(&open_options(false), after.stores()).unwrap();
            let mut io = Io::new(&pool);
            for (worker, blocks) in acknowledged.iter().enumerate() {
                let vssd = pool.vssd_by_name(&format!("worker {worker}")).unwrap();
                for (block, &generation) in (0u64..).zip(blocks) {
                    let bytes = io.read_vec(&vssd, block * B, B).unwrap();
                    for word in bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())) {
                        assert!(
                            word >= generation,
                            "seed {seed}, after {moment} events: block {block} of {worker} holds {word}, {generation} was \
                             acknowledged before the sync"
                        );
                    }
                    covered += u64::from(generation > 0);
                }
            }
        }
        assert!(covered > 1000, "only {covered} blocks had been written before a sync");
    }
}
