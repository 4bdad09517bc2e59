// SPDX-License-Identifier: Apache-2.0 OR MIT
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
//! The negotiation in every order of events, within the bounds of each scene below; and proof that the checker sees what it is for.
//!
//! `cargo xtask model` walks the scenes of [`short`] to their ends. `cargo xtask model --long` walks those of [`long`] as well, each up
//! to `VSSD_MODEL_STEPS` steps (40 million unless told otherwise; about 11 GB of memory). The search is exhaustive and knows no seed: a failure prints the shortest story that leads to it.

use std::env;
use std::thread;

use vssd_model::{Blocks, Budget, Kind, Rule, Sabotage, Scene, Wish, check};
use vssd_protocol::control::OnTimeout;

const NONE: Budget = Budget::NONE;

/// Every policy, and force.
const TIMED: &[Wish] = &[
    Wish::to(1).within(8_000, OnTimeout::Wait),
    Wish::to(1).within(8_000, OnTimeout::Fail),
    Wish::to(1).within(8_000, OnTimeout::Force),
    Wish::to(2).forced(),
];

/// A driver that reaches every target.
const fn willing(name: &'static str, budget: Budget) -> Scene {
    Scene { name, budget, ..Scene::BASE }
}

/// A driver that would give one block only, and targets with deadlines that want more.
const fn reluctant(name: &'static str, budget: Budget) -> Scene {
    Scene { name, budget, wishes: TIMED, willing: Blocks::of(0b0100), ..Scene::BASE }
}

/// A guest that begins under a driver without the guest channel.
const fn stock(name: &'static str, budget: Budget) -> Scene {
    Scene { name, budget, driver: Kind::Stock, ..Scene::BASE }
}

fn short() -> Vec<Scene> {
    vec![
        willing("two operators, retarget, cancel", Budget { orders: 2, ..NONE }),
        willing("daemon killed twice", Budget { orders: 1, kills: 2, ..NONE }),
        willing("guest reboots twice, into either driver", Budget { orders: 1, reboots: 2, ..NONE }),
        willing("guest powered off", Budget { orders: 1, power_offs: 1, ..NONE }),
        willing("connection lost", Budget { orders: 1, hang_ups: 1, ..NONE }),
        willing("guest paused, news unnoticed", Budget { orders: 1, pauses: 1, lost: 1, ..NONE }),
        willing("guest gives and asks unasked", Budget { orders: 1, gifts: 1, pulls: 1, ..NONE }),
        willing("pool fails", Budget { orders: 1, gifts: 1, writes: 1, pool_failures: 1, ..NONE }),
        reluctant("deadlines, retarget, cancel", Budget { orders: 2, ..NONE }),
        reluctant("deadlines, daemon killed", Budget { orders: 1, kills: 1, ..NONE }),
        reluctant("deadlines, guest reboots", Budget { orders: 1, reboots: 1, ..NONE }),
        reluctant("deadlines, writes, gifts", Budget { orders: 1, writes: 1, lost: 1, gifts: 1, ..NONE }),
        stock("stock driver, retarget", Budget { orders: 2, writes: 1, ..NONE }),
        stock("stock driver, retarget, a driver comes", Budget { orders: 2, reboots: 1, ..NONE }),
        stock("stock driver, reboots, writes", Budget { orders: 1, reboots: 2, writes: 1, ..NONE }),
        stock("stock driver, reboots three times", Budget { orders: 1, reboots: 3, ..NONE }),
        stock("stock driver, daemon killed", Budget { orders: 1, kills: 1, reboots: 1, ..NONE }),
    ]
}

fn long() -> Vec<Scene> {
    const SIX: Scene =
        Scene { total: 6, plugged: Blocks::first(5), wishes: &[Wish::to(2), Wish::to(6)], ..Scene::BASE };
    vec![
        willing("kill, reboot, lost news", Budget { orders: 2, kills: 1, reboots: 1, lost: 1, ..NONE }),
        willing(
            "one of each",
            Budget {
                orders: 1,
                kills: 1,
                reboots: 1,
                hang_ups: 1,
                pauses: 1,
                lost: 1,
                gifts: 1,
                pulls: 1,
                ..NONE
            },
        ),
        reluctant("deadlines, kill, reboot", Budget { orders: 2, kills: 1, reboots: 1, ..NONE }),
        reluctant(
            "deadlines, kill, write, pull",
            Budget { orders: 2, kills: 1, writes: 1, pulls: 1, ..NONE },
        ),
        reluctant(
            "deadlines, failing pool",
            Budget { orders: 2, kills: 1, hang_ups: 1, pool_failures: 1, gifts: 1, ..NONE },
        ),
        stock("stock driver, everything", Budget { orders: 2, kills: 1, reboots: 2, writes: 1, ..NONE }),
        Scene { name: "six blocks", budget: Budget { orders: 3, kills: 1, ..NONE }, ..SIX },
    ]
}

fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Walks scenes and prints what was seen; gives the number of states.
fn walk(scenes: &[Scene], limit: usize) -> usize {
    let mut all = 0;
    for scene in scenes {
        let outcome = check(*scene, threads(), limit);
        println!(
            "{}: {} states, {} steps, depth {}, {} in {:.1} s; bounds: {}",
            outcome.name,
            outcome.states,
            outcome.steps,
            outcome.depth,
            if outcome.complete { "complete" } else { "cut short" },
            outcome.took.as_secs_f64(),
            scene.budget,
        );
        if let Some((_, story)) = outcome.broken {
            panic!("{story}");
        }
        assert!(outcome.complete || limit < usize::MAX, "{}: the search did not end", outcome.name);
        all += outcome.states;
    }
    all
}

#[test]
fn every_rule_holds_in_every_order_of_events() {
    let mut states = walk(&short(), usize::MAX);
    if env::var("VSSD_MODEL").is_ok_and(|form| form == "long") {
        let limit = env::var("VSSD_MODEL_STEPS").map_or(40_000_000, |steps| steps.parse().unwrap());
        states += walk(&long(), limit);
    }
    println!("states {states}");
    assert!(states >= 1_000_000, "the bounds were made for more than {states} states");
}

#[test]
fn checker_finds_every_defect_that_is_put_in() {
    let two = Budget { orders: 2, ..NONE };
    let cases: [(Sabotage, Rule, Scene); 7] = [
        (Sabotage::AnswerBeforeJournal, Rule::OneOwner, willing("answer before journal", two)),
        (
            Sabotage::EpochUnchecked,
            Rule::StaleChangesNothing,
            willing("epoch unchecked", Budget { orders: 1, hang_ups: 1, kills: 1, ..NONE }),
        ),
        (
            Sabotage::WaitKeptOnStop,
            Rule::WaitFreedOnStop,
            willing("WAIT kept on stop", Budget { pauses: 1, ..NONE }),
        ),
        (Sabotage::NewsDropped, Rule::Converged, willing("news dropped", two)),
        (Sabotage::TargetNotStored, Rule::Converged, willing("target not stored", two)),
        (Sabotage::NotResumed, Rule::Converged, stock("not resumed", Budget { orders: 1, kills: 1, ..NONE })),
        (
            Sabotage::TakesData,
            Rule::NoDataTaken,
            stock("takes data", Budget { orders: 1, writes: 1, ..NONE }),
        ),
    ];
    let mut found = 0;
    for (sabotage, rule, scene) in cases {
        let outcome = check(Scene { sabotage: Some(sabotage), ..scene }, threads(), 5_000_000);
        let (broken, story) = outcome.broken.unwrap_or_else(|| panic!("{sabotage:?} was not found"));
        assert_eq!(broken, rule, "{story}");
        println!(
            "{sabotage:?} was found after {} states, {} steps long",
            outcome.states,
            story.lines().count() - 1
        );
        found += 1;
    }
    println!("sabotages found {found}");
}
