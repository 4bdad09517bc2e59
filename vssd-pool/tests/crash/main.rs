// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Power cuts, killed processes and failing media, each at every point.
//!
//! Random workloads run on simulated media beside a naive model of what a guest may rely on. Then each run is cut at every
//! moment of its timeline in many ways, the pool is opened on what is left and compared with the model as of that moment.
//!
//! The short form looks at 100,000 states and lets every operation of five traces fail. The long forms:
//!
//! ```text
//! CRASH_STATES=1000000 cargo test -p vssd-pool --test crash -- --nocapture power_cut
//! CRASH_TRACES=100 cargo test -p vssd-pool --test crash -- --nocapture any_failing_operation
//! ```
//!
//! A failure names its seed; `CRASH_SEED=n` runs that one alone.

// A panic is how a test reports; sizes are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a panic is how a test reports")]

#[path = "../common/mod.rs"]
mod common;
mod cuts;
mod failures;
mod model;
mod workload;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cuts::{Class, Tally};
use workload::{Kind, Run};

/// Actions of one run: enough to go round the journal.
const ACTIONS: usize = 80;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Calls `each` with one seed after the other from as many threads as there are processors, until it says that it is
/// enough or fails.
fn for_seeds(each: impl Fn(u64) -> Result<bool, String> + Sync) {
    if let Some(seed) = setting("CRASH_SEED") {
        each(seed).unwrap_or_else(|what| panic!("{what}"));
        return;
    }
    let next = AtomicU64::new(0);
    let is_over = AtomicBool::new(false);
    let wrong = Mutex::new(None);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    match each(next.fetch_add(1, Ordering::Relaxed)) {
                        Ok(enough) => is_over.fetch_or(enough, Ordering::Relaxed),
                        Err(what) => {
                            wrong.lock().unwrap().get_or_insert(what);
                            is_over.swap(true, Ordering::Relaxed)
                        }
                    };
                }
            });
        }
    });
    if let Some(what) = wrong.into_inner().unwrap() {
        panic!("{what}");
    }
}

#[test]
fn power_cut_anywhere_loses_nothing_flushed_and_shows_nothing_foreign() {
    let target = usize::try_from(setting("CRASH_STATES").unwrap_or(100_000)).unwrap();
    let total = Mutex::new(Tally::default());
    for_seeds(|seed| {
        let mut run = Run::new(seed);
        run.actions(ACTIONS);
        let tally = cuts::explore(&run.sim, &run.steps, seed)?;
        let mut total = total.lock().unwrap();
        total.add(&tally);
        Ok(total.states >= target)
    });
    let tally = total.into_inner().unwrap();
    println!(
        "{} states of {} seeds at {} moments; all subsets before {} barriers, a sample before {}",
        tally.states, tally.seeds, tally.moments, tally.exhaustive, tally.sampled
    );
    println!("states by crash: {:?}", tally.classes);
    println!("states by what was under way: {:?}", tally.kinds);
    if setting("CRASH_SEED").is_none() {
        for class in [Class::Killed, Class::Dropped, Class::Torn, Class::Reordered, Class::Recovery] {
            assert!(tally.classes.contains_key(&class), "no state was {class:?}");
        }
        for kind in Kind::ALL {
            assert!(tally.kinds.contains_key(&kind), "no crash within {kind:?}");
        }
    }
}

#[test]
fn drive_that_lies_about_flushes_is_noticed() {
    let noticed = (0..6).any(|seed| {
        let mut run = Run::new(seed);
        run.sim.ignore_syncs();
        run.actions(ACTIONS);
        cuts::explore(&run.sim, &run.steps, seed).is_err()
    });
    assert!(noticed, "the comparison with the model would let anything pass");
}
