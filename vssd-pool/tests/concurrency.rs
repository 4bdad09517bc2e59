// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Many lanes, resizes and scrubbing at once, with the real threads.

// A panic is how a test reports; sizes are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vssd_pool::store::fault::{Sim, Tear};
use vssd_pool::{
    BlockRange, BlockSize, CreateOptions, IoError, MediumKind, MediumSpec, OpenOptions, Pool, RangeStatus,
    Submitted, Vssd,
};

const B: u64 = 4096;

fn file_pool(dir: &tempfile::TempDir, kinds: &[MediumKind]) -> Arc<Pool> {
    let media =
        kinds.iter().map(|kind| MediumSpec::new(*kind, dir.path().join(kind.to_string()), Some(6 * MIB)));
    let mut create = CreateOptions::new("files", media.collect());
    create.block_size = BlockSize::new(4096).unwrap();
    Pool::create(&create).unwrap();
    Pool::open(&OpenOptions::new(create.media.iter().map(|medium| medium.path.clone()))).unwrap()
}

/// Each worker owns some blocks of a vSSD that all share: it alone writes, discards and checks them, tagged with its
/// own name; meanwhile another thread unplugs and plugs blocks, so that physical blocks wander between workers
/// and vSSDs all the time.
fn hammer(pool: &Arc<Pool>, seed: u64, time: Duration) {
    const WORKERS: u32 = 3;
    let total = pool.info().total_blocks;
    let per_vssd = total / 2;
    let vssds: Vec<_> =
        ["a", "b"].iter().map(|name| pool.create_vssd(&spec(name, per_vssd, per_vssd)).unwrap()).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let writes = Arc::new(AtomicU32::new(0));
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let (pool, vssds) = (Arc::clone(pool), vssds.clone());
            let (stop, writes) = (Arc::clone(&stop), Arc::clone(&writes));
            std::thread::spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed + u64::from(worker));
                let mut io = Io::new(&pool);
                // What each of this worker's blocks holds; 0 is nothing.
                let mut expected: Vec<Vec<u64>> =
                    vssds.iter().map(|vssd| vec![0; vssd.total_blocks() as usize]).collect();
                let mut generation = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let which = rng.random_range(0..vssds.len());
                    let block = rng.random_range(0..per_vssd / WORKERS) * WORKERS + worker;
                    let (vssd, held) = (&vssds[which], &mut expected[which][block as usize]);
                    let offset = u64::from(block) * B;
                    generation += 1;
                    // Worker, vSSD and block are in the tag: bytes from anywhere else are told apart.
                    let tag = (generation << 32)
                        | (u64::from(worker) << 24)
                        | ((which as u64) << 20)
                        | (u64::from(block) + 1);
                    match rng.random_range(0..10) {
                        0..4 => match io.write(vssd, offset, &tag.to_le_bytes().repeat(B as usize / 8)) {
                            Ok(()) => {
                                writes.fetch_add(1, Ordering::Relaxed);
                                *held = tag;
                            }
                            Err(error) => {
                                assert_eq!(error, IoError::Evicted);
                                *held = 0;
                            }
                        },
                        4..8 => match io.read_vec(vssd, offset, B) {
                            Ok(bytes) => {
                                let seen = u64::from_le_bytes(bytes[..8].try_into().unwrap());
                                assert!(
                                    bytes.chunks(8).all(|word| word == seen.to_le_bytes()),
                                    "torn block {block}"
                                );
                                // An unplug and plug behind this worker's back leaves zero; nothing else may.
                                assert!(
                                    seen == *held || seen == 0,
                                    "block {block} holds {seen:#x}, not {:#x}",
                                    *held
                                );
                                *held = seen;
                            }
                            Err(error) => {
                                assert_eq!(error, IoError::Evicted);
                                *held = 0;
                            }
                        },
                        8 => match io.discard(vssd, offset, B) {
                            Ok(()) => *held = 0,
                            Err(error) => assert_eq!(error, IoError::Evicted),
                        },
                        _ => io.flush(vssd).unwrap(),
                    }
                }
            })
        })
        .collect();
    let mut rng = StdRng::seed_from_u64(seed ^ 0xdead);
    let end = Instant::now() + time;
    let mut resizes = 0;
    while Instant::now() < end && !workers.iter().any(|worker| worker.is_finished()) {
        let vssd = &vssds[rng.random_range(0..vssds.len())];
        let start = rng.random_range(0..per_vssd - 8);
        let range = vec![BlockRange::new(start, rng.random_range(1..8))];
        let statuses = if rng.random() {
            pool.unplug_wait(vssd.id(), range).unwrap()
        } else {
            pool.plug_wait(vssd.id(), range, per_vssd).unwrap()
        };
        assert!(matches!(statuses[..], [RangeStatus::Ok | RangeStatus::Already]), "{statuses:?}");
        resizes += 1;
    }
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.join().unwrap_or_else(|_| panic!("a worker failed, seed {seed}"));
    }
    let writes = writes.load(Ordering::Relaxed);
    assert!(writes > 100 && resizes > 10, "only {writes} writes and {resizes} resizes in {time:?}");
    let info = pool.info();
    assert_eq!(info.leased_blocks, vssds.iter().map(|vssd| vssd.allocated_blocks()).sum::<u32>());
    assert_eq!(
        info.free_blocks + info.scrubbing_blocks + info.leased_blocks + info.reserved_blocks,
        info.total_blocks
    );
}

fn hammer_and_reopen(open: impl Fn() -> Arc<Pool>, seed: u64) {
    let pool = open();
    hammer(&pool, seed, Duration::from_millis(1500));
    let plugged: Vec<_> =
        pool.vssds().iter().map(|vssd| (vssd.plugged_blocks(), vssd.allocated_blocks())).collect();
    pool.close().unwrap();
    drop(pool);
    let pool = open();
    let again: Vec<_> =
        pool.vssds().iter().map(|vssd| (vssd.plugged_blocks(), vssd.allocated_blocks())).collect();
    assert_eq!(again, plugged);
}

#[test]
fn no_worker_sees_bytes_of_another_in_memory() {
    for (seed, sizes) in [
        (1, &[(MediumKind::Nvram, 4 * MIB)][..]),
        (2, &[(MediumKind::Nvram, 3 * MIB), (MediumKind::Ssd, 2 * MIB)]),
    ] {
        let (pool, stores) = mem_pool(sizes, true);
        drop(pool);
        hammer_and_reopen(|| Pool::open_on(&open_options(true), stores.clone()).unwrap(), seed);
    }
}

#[test]
fn no_worker_sees_bytes_of_another_on_files() {
    for (seed, base, kinds) in [
        (3, "/tmp", &[MediumKind::Ssd][..]),
        (4, "/dev/shm", &[MediumKind::Ssd]),
        (5, "/tmp", &[MediumKind::Nvram, MediumKind::Ssd]),
    ] {
        let dir = tempfile::tempdir_in(base).unwrap();
        drop(file_pool(&dir, kinds));
        let paths: Vec<_> = kinds.iter().map(|kind| dir.path().join(kind.to_string())).collect();
        hammer_and_reopen(|| Pool::open(&OpenOptions::new(paths.clone())).unwrap(), seed);
    }
}

#[test]
fn unplug_waits_for_open_batches_and_requests_wait_for_the_unplug() {
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 8 * MIB)], true);
    let vssd = pool.create_vssd(&spec("a", 16, 16)).unwrap();
    let mut holder = pool.lane().unwrap();
    let mut late = pool.lane().unwrap();
    let mut bytes = vec![1u8; B as usize];
    let iov = [libc_iovec(&mut bytes)];
    holder.begin_batch();
    // SAFETY: `bytes` outlives the request, which is done inline.
    assert_eq!(unsafe { holder.write(&vssd, 0, &iov, 1) }, Submitted::Done(Ok(())));
    let (send, receive) = std::sync::mpsc::channel();
    pool.unplug(vssd.id(), vec![BlockRange::new(0, 4)], Box::new(move |result| send.send(result).unwrap()));
    assert!(
        receive.recv_timeout(Duration::from_millis(100)).is_err(),
        "a batch that may use the blocks is open"
    );
    let mut read = vec![0u8; B as usize];
    let read_iov = [libc_iovec(&mut read)];
    // SAFETY: `read` outlives the request, which is drained below.
    assert_eq!(unsafe { late.read(&vssd, 0, &read_iov, 9) }, Submitted::Pending);
    assert!(late.has_pending());
    holder.end_batch();
    assert_eq!(receive.recv_timeout(Duration::from_secs(5)).unwrap().unwrap(), [RangeStatus::Ok]);
    let mut answers = Vec::new();
    late.drain(&mut |token, result| answers.push((token, result)));
    assert_eq!(answers, [(9, Err(IoError::Evicted))]);
    assert!(read.iter().all(|&byte| byte == 0), "nothing was read");
}

#[test]
fn discarded_block_is_not_zeroed_while_a_batch_may_use_it() {
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 8 * MIB)], true);
    let vssd = pool.create_vssd(&spec("a", 16, 16)).unwrap();
    let mut io = Io::new(&pool);
    io.fill(&vssd, 0, B, 1).unwrap();
    let mut holder = pool.lane().unwrap();
    let mut bytes = vec![0u8; B as usize];
    let iov = [libc_iovec(&mut bytes)];
    holder.begin_batch();
    // SAFETY: `bytes` outlives the request, which is done inline.
    assert_eq!(unsafe { holder.read(&vssd, 0, &iov, 1) }, Submitted::Done(Ok(())));
    io.discard(&vssd, 0, B).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(pool.info().scrubbing_blocks, 1);
    holder.end_batch();
    let end = Instant::now() + Duration::from_secs(5);
    while pool.info().scrubbing_blocks > 0 {
        assert!(Instant::now() < end, "never zeroed");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The journal is 64 pages, a first write takes a 126th of one: the lanes outrun it several times over.
#[test]
fn burst_of_first_writes_waits_for_checkpoints_and_ends() {
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 96 * MIB)], true);
    let total = pool.info().total_blocks;
    let vssd = pool.create_vssd(&spec("a", total, total)).unwrap();
    let started = Instant::now();
    let half = total / 2;
    std::thread::scope(|scope| {
        for worker in 0..2 {
            let (pool, vssd) = (&pool, &vssd);
            scope.spawn(move || {
                let mut io = Io::new(pool);
                for block in (0..half).map(|block| u64::from(worker * half + block)) {
                    io.fill(vssd, block * B, 512, 1).unwrap();
                    if block % 64 == 0 {
                        io.flush(vssd).unwrap();
                    }
                }
            });
        }
    });
    assert!(pool.info().checkpoints > 5 && vssd.allocated_blocks() == half * 2);
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
}

#[test]
fn closing_answers_whoever_waits() {
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 8 * MIB)], true);
    let vssd = pool.create_vssd(&spec("a", 16, 16)).unwrap();
    let mut holder = pool.lane().unwrap();
    let mut late = pool.lane().unwrap();
    let mut bytes = vec![1u8; B as usize];
    let iov = [libc_iovec(&mut bytes)];
    holder.begin_batch();
    let (send, receive) = std::sync::mpsc::channel();
    pool.unplug(vssd.id(), vec![BlockRange::new(0, 4)], Box::new(move |result| send.send(result).unwrap()));
    // Once the keeper has set the fence, the request waits for it.
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        // SAFETY: `bytes` outlives the request, which is drained below.
        match unsafe { late.write(&vssd, 0, &iov, 9) } {
            Submitted::Pending => break,
            Submitted::Done(result) => assert_eq!(result, Ok(())),
        }
        assert!(Instant::now() < end, "no fence");
    }
    pool.close().unwrap();
    assert_eq!(receive.recv().unwrap().unwrap_err().code(), "E_BUSY");
    let mut answers = Vec::new();
    late.drain(&mut |token, result| answers.push((token, result)));
    assert!(matches!(answers[..], [(9, Ok(()) | Err(IoError::Io(libc::ESHUTDOWN)))]), "{answers:?}");
    holder.end_batch();
    assert_eq!(pool.create_vssd(&spec("b", 1, 1)).unwrap_err().code(), "E_BUSY");
}

#[test]
fn event_descriptor_tells_of_completions() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let pool = file_pool(&dir, &[MediumKind::Ssd]);
    let vssd = pool.create_vssd(&spec("a", 64, 64)).unwrap();
    let mut lane = pool.lane().unwrap();
    let mut buffers: Vec<Vec<u8>> = (0..32u8).map(|i| vec![i; B as usize]).collect();
    let mut left = 0;
    let wait = |lane: &vssd_pool::Lane| {
        let mut fds = [libc::pollfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(&lane.event_fd()),
            events: libc::POLLIN,
            revents: 0,
        }];
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), 1, 5000) };
        assert_eq!(ready, 1, "no event although requests are pending");
    };
    for round in 0..20 {
        lane.begin_batch();
        for (i, buffer) in (0u64..).zip(&mut buffers) {
            let iov = [libc_iovec(buffer)];
            // SAFETY: the buffers outlive the requests, which are waited for below.
            let submitted = unsafe {
                if round % 2 == 0 {
                    lane.write(&vssd, i * B, &iov, i)
                } else {
                    lane.read(&vssd, i * B, &iov, i)
                }
            };
            assert!(matches!(submitted, Submitted::Pending | Submitted::Done(Ok(()))));
            left += u32::from(submitted == Submitted::Pending);
        }
        lane.end_batch();
        while left > 0 {
            wait(&lane);
            lane.poll(&mut |_, result| {
                assert_eq!(result, Ok(()));
                left -= 1;
            });
        }
        assert!(!lane.has_pending());
        let flush = lane.flush(&vssd, 99);
        let mut is_done = flush == Submitted::Done(Ok(()));
        while !is_done {
            wait(&lane);
            lane.poll(&mut |token, result| {
                assert_eq!((token, result), (99, Ok(())));
                is_done = true;
            });
        }
    }
    assert!((0u8..).zip(&buffers).all(|(i, buffer)| buffer.iter().all(|&byte| byte == i)));
}

#[test]
fn lane_dropped_with_requests_in_flight_leaves_no_trace() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let pool = file_pool(&dir, &[MediumKind::Ssd]);
    let vssd: Arc<Vssd> = pool.create_vssd(&spec("a", 256, 256)).unwrap();
    let mut buffer = vec![7u8; 64 * B as usize];
    for _ in 0..80 {
        let mut lane = pool.lane().unwrap();
        let iov = [libc_iovec(&mut buffer)];
        // SAFETY: the buffer outlives the lane, which waits for its requests when dropped.
        let _ = unsafe { lane.write(&vssd, 0, &iov, 1) };
    }
    // More lanes than there are slots came and went, and a grace period still ends.
    assert_eq!(pool.unplug_wait(vssd.id(), vec![BlockRange::new(0, 256)]).unwrap(), [RangeStatus::Ok]);
}

/// What one worker was told is durable: at which moment, and each block's generation.
type Flushed = Vec<(usize, Vec<u64>)>;

fn write_and_flush(
    pool: &Arc<Pool>,
    sim: &Sim,
    worker: u64,
    blocks: u32,
    seed: u64,
    stop: &AtomicBool,
) -> Flushed {
    let mut rng = StdRng::seed_from_u64(seed + worker);
    let vssd = pool.vssd_by_name(&format!("worker {worker}")).unwrap();
    let mut io = Io::new(pool);
    let mut generations = vec![0; blocks as usize];
    let mut flushed = vec![(0, generations.clone())];
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..rng.random_range(1..8) {
            let block = rng.random_range(0..blocks);
            generations[block as usize] += 1;
            let tag = (worker << 48) | (u64::from(block) << 32) | generations[block as usize];
            io.write(&vssd, u64::from(block) * B, &tag.to_le_bytes().repeat(B as usize / 8)).unwrap();
        }
        io.flush(&vssd).unwrap();
        flushed.push((sim.now(), generations.clone()));
    }
    flushed
}

/// The power is cut while workers write and flush, and blocks go round between vSSDs: checkpoints, scrubbing, plugging
/// and first writes overlap as they do in life.
#[test]
fn power_cut_under_concurrent_load_loses_nothing_flushed() {
    const BLOCKS: u32 = 24;
    let seed = std::env::var("CRASH_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(7);
    let sim = Sim::new(&[(MediumKind::Nvram, 1_600_000 & !4095), (MediumKind::Ssd, (1 << 20) + 160 * 4096)]);
    Pool::create_on(&create_options(), &sim.stores()).unwrap();
    sim.record();
    let pool = Pool::open_on(&open_options(true), sim.stores()).unwrap();
    for worker in 1..3 {
        pool.create_vssd(&spec(&format!("worker {worker}"), BLOCKS, BLOCKS)).unwrap();
    }
    let created = sim.now();
    let churned = pool.create_vssd(&spec("churned", 100, 100)).unwrap();
    let stop = AtomicBool::new(false);
    let flushed: Vec<Flushed> = std::thread::scope(|scope| {
        let workers: Vec<_> = (1..3u64)
            .map(|worker| {
                let (pool, sim, stop) = (&pool, &sim, &stop);
                scope.spawn(move || write_and_flush(pool, sim, worker, BLOCKS, seed, stop))
            })
            .collect();
        let mut rng = StdRng::seed_from_u64(seed);
        let mut io = Io::new(&pool);
        // On a loaded machine this thread may get few turns: then it asks for checkpoints.
        while sim.now() < 15_000 {
            if sim.now() > 4_000 * usize::try_from(pool.info().checkpoints).unwrap() {
                pool.checkpoint().unwrap();
            }
            let range = BlockRange::new(rng.random_range(0..90), 10);
            let (offset, len) = (u64::from(range.start) * B, 10 * B);
            io.fill(&churned, offset, len, 0xcc).unwrap();
            if rng.random() {
                io.discard(&churned, offset, len).unwrap();
            } else {
                pool.unplug_wait(churned.id(), vec![range]).unwrap();
                pool.plug_wait(churned.id(), vec![range], 100).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let end = sim.now();
    let mut replay = sim.replay();
    assert!(pool.info().checkpoints >= 3, "{:?}", pool.info());
    drop(pool);

    let mut rng = StdRng::seed_from_u64(seed ^ 0xc0ffee);
    let mut moments: Vec<usize> = (0..250).map(|_| rng.random_range(created..=end)).collect();
    moments.sort_unstable();
    for (i, moment) in moments.into_iter().enumerate() {
        let context = format!("seed {seed}, cut {i} after {moment} of {end} events");
        replay.advance(moment);
        let bias = [0.0, 1.0, 0.5, 0.1, 0.9][i % 5];
        let after = Sim::with_images(replay.crash(Tear::Fine, || rng.random_bool(bias)));
        let report =
            Pool::check_on(after.stores(), true).unwrap_or_else(|error| panic!("{context}: {error}"));
        assert!(report.is_clean(), "{context}: {:?}", report.findings);
        let pool = Pool::open_on(&open_options(false), after.stores()).unwrap();
        let mut io = Io::new(&pool);
        for (worker, flushed) in (1u64..).zip(&flushed) {
            let known =
                flushed.iter().rfind(|(at, _)| *at <= moment).map(|(_, generations)| generations).unwrap();
            let vssd = pool.vssd_by_name(&format!("worker {worker}")).unwrap();
            for (block, &generation) in (0u64..).zip(known) {
                let bytes = io.read_vec(&vssd, block * B, B).unwrap();
                for word in bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())) {
                    let is_own = word >> 32 == (worker << 16) | block && word & 0xffff_ffff >= generation;
                    assert!(
                        is_own || (word == 0 && generation == 0),
                        "{context}: block {block} holds {word:#x}, flushed was {generation}"
                    );
                }
            }
        }
    }
}
