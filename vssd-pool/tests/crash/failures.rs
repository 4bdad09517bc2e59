// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The n-th operation fails, for every n.

use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vssd_pool::store::fault::{Failure, Sim, Tear};

use crate::cuts::verify;
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
