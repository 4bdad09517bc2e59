// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The n-th operation fails, for every n.

use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vssd_pool::store::fault::{Failure, Sim, Tear};

use vssd_pool::{Class, IoError, MediumKind, Pool};

use crate::common::*;
use crate::cuts::verify;
use crate::model::BLOCK;
use crate::workload::{Kind, Run};
use crate::{for_seeds, setting};

/// Actions of a trace.
const ACTIONS: usize = 120;

const FAILURES: [Failure; 4] =
    [Failure::Errno(libc::EIO), Failure::Errno(libc::ENOSPC), Failure::Errno(libc::ENOMEM), Failure::Short];

/// One trace with one failing operation; whether it made the pool refuse changes.
fn run_with_failure(seed: u64, n: u64, failure: Failure) -> Result<bool, String> {
    let mut run = Run::new(seed);
    run.sim.fail_at(n, failure);
    let mut has_failed = false;
    for _ in 0..ACTIONS {
        run.action();
        let was_recovered = run.steps.last().is_some_and(|step| step.kind == Kind::Recovery);
        // Once a flush failed nothing is acknowledged any more, until the next opening has made everything durable.
        if has_failed && !was_recovered && run.pool.is_some() && !run.has_failed() {
            return Err("a pool that failed works again".to_owned());
        }
        has_failed = run.has_failed();
    }
    let model = run.model();
    let mut rng = StdRng::seed_from_u64(n);
    let mut replay = run.sim.replay();
    replay.advance(run.sim.now());
    for (tear, bias) in [(Tear::Whole, 0.0), (Tear::Fine, 0.5), (Tear::Whole, 1.0)] {
        let images = replay.crash(tear, || rng.random_bool(bias));
        verify(&Sim::with_images(images), &model, true).map_err(|what| format!("bias {bias}: {what}"))?;
    }
    Ok(has_failed)
}

#[test]
fn flush_covers_what_an_earlier_process_answered() {
    use MediumKind::{Nvram, Ssd};
    let media: [&[(MediumKind, usize)]; 3] =
        [&[(Nvram, 2 << 20)], &[(Ssd, 2 << 20)], &[(Nvram, 2 << 20), (Ssd, 2 << 20)]];
    for media in media {
        let sim = Sim::new(media);
        Pool::create_on(&create_options(), &sim.stores()).unwrap();
        sim.record();
        for byte in 1..4 {
            let pool = Pool::open_on(&open_options(false), sim.stores()).unwrap();
            let mut io = Io::new(&pool);
            for (name, class) in [("a", Class::Nvram), ("b", Class::Ssd)] {
                let mut spec = spec(name, 8, 8);
                spec.attrs.class = class;
                let vssd = pool.vssd_by_name(name).or_else(|| pool.create_vssd(&spec).ok());
                let Some(vssd) = vssd else { continue };
                // Acknowledges what the process before wrote; what this one writes stays unflushed.
                io.flush(&vssd).unwrap();
                let mut replay = sim.replay();
                replay.advance(sim.now());
                let after = Sim::with_images(replay.crash(Tear::Whole, || false));
                let survivor = Pool::open_on(&open_options(false), after.stores()).unwrap();
                if let Some(vssd) = survivor.vssd_by_name(name) {
                    let held = Io::new(&survivor).read_vec(&vssd, 0, BLOCK).unwrap();
                    assert!(held.iter().all(|&held| held == byte - 1), "{media:?}: {name} holds {}", held[0]);
                }
                io.fill(&vssd, 0, BLOCK, byte).unwrap();
            }
            sim.set_power(false);
            drop((io, pool));
            sim.set_power(true);
        }
    }
}

#[test]
fn flush_after_one_that_failed_is_never_acknowledged() {
    use MediumKind::{Nvram, Ssd};
    let mut refused = 0;
    for media in [&[(Nvram, 2 << 20)][..], &[(Ssd, 2 << 20)], &[(Nvram, 2 << 20), (Ssd, 2 << 20)]] {
        // The n-th operation of a flush: of each medium, and of the journal.
        for n in 0..4 {
            let sim = Sim::new(media);
            Pool::create_on(&create_options(), &sim.stores()).unwrap();
            let pool = Pool::open_on(&open_options(false), sim.stores()).unwrap();
            let (a, b) =
                (pool.create_vssd(&spec("a", 8, 8)).unwrap(), pool.create_vssd(&spec("b", 8, 8)).unwrap());
            let (mut io, mut other) = (Io::new(&pool), Io::new(&pool));
            io.fill(&a, 0, BLOCK, 1).unwrap();
            other.fill(&b, 0, BLOCK, 2).unwrap();
            sim.fail_at(n, Failure::Errno(libc::EIO));
            let flushed = io.flush(&a);
            if sim.will_fail() {
                assert_eq!(flushed, Ok(()));
                continue;
            }
            assert_eq!(flushed, Err(IoError::Io(libc::EIO)), "operation {n} on {media:?}");
            for _ in 0..3 {
                assert!(io.flush(&a).is_err() && other.flush(&b).is_err());
                assert!(io.fill(&a, 0, 512, 3).is_err() && other.discard(&b, 0, BLOCK).is_err());
                refused += 4;
            }
            // What is there can be read.
            assert_eq!(io.read_vec(&a, 0, 1024).unwrap(), [1; 1024]);
            assert_eq!(other.read_vec(&b, 0, 1024).unwrap(), [2; 1024]);
            assert!(pool.checkpoint().is_err() && pool.create_vssd(&spec("c", 1, 1)).is_err());
        }
    }
    println!("{refused} requests refused after a failed flush");
    assert!(refused >= 36);
}

#[test]
fn any_failing_operation_is_answered_and_what_was_acknowledged_stays() {
    let traces = setting("CRASH_TRACES").unwrap_or(5);
    let (runs, fatal) = (AtomicU64::new(0), AtomicU64::new(0));
    for_seeds(|seed| {
        if seed >= traces && setting("CRASH_SEED").is_none() {
            return Ok(true);
        }
        let mut whole = Run::new(seed);
        let before = whole.sim.operations();
        whole.actions(ACTIONS);
        let operations = whole.sim.operations() - before;
        for n in 0..operations {
            let failure = FAILURES[usize::try_from(n + seed).unwrap() % FAILURES.len()];
            let failed = run_with_failure(seed, n, failure).map_err(|what| {
                format!("CRASH_SEED={seed}: {failure:?} at operation {n} of {operations}: {what}")
            })?;
            runs.fetch_add(1, Ordering::Relaxed);
            fatal.fetch_add(u64::from(failed), Ordering::Relaxed);
        }
        Ok(seed + 1 >= traces)
    });
    let (runs, fatal) = (runs.into_inner(), fatal.into_inner());
    println!(
        "{runs} failing operations in {traces} traces; after {fatal} of them the pool took no more changes"
    );
    assert!(runs > 100 && fatal > 0 && fatal < runs);
}
