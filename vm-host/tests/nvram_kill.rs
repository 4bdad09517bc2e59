// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A process that allocates and frees regions is killed at any moment, many times: the next one finds all
//! that was answered, and of what was going on all or nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vm_host::nvram::{MediumConfig, Nvram, Purpose};

const PATH: &str = "NVRAM_TEST_MEDIUM";
const SEED: &str = "NVRAM_TEST_SEED";
const MIB: u64 = 1 << 20;

/// Owners and purposes: all that the child can change.
type Model = BTreeSet<(String, String)>;

fn model_of(nvram: &Nvram) -> Model {
    nvram.list().into_iter().map(|region| (region.owner, region.purpose.to_string())).collect()
}

/// Says on standard output what it begins and what is done, until it is killed.
#[test]
#[ignore = "run by the others, in a process of its own"]
fn child() {
    let (Ok(path), Ok(seed)) = (std::env::var(PATH), std::env::var(SEED)) else { return };
    let mut lot = StdRng::seed_from_u64(seed.parse().unwrap());
    let nvram = Nvram::open(&MediumConfig::new("kill", path)).unwrap();
    let mut out = std::io::stdout();
    loop {
        let owner = format!("vm{}", lot.random_range(0..4));
        let purpose = Purpose::ALL[lot.random_range(0..2)];
        let found = nvram.find(&owner, purpose);
        let verb = if found.is_some() { "free" } else { "allocate" };
        writeln!(out, "\nbegin {verb} {owner} {purpose}").unwrap();
        match found {
            Some(region) => nvram.free(region.id).unwrap(),
            None => drop(nvram.allocate(&owner, purpose, MIB, |_, _| Ok(())).unwrap()),
        }
        writeln!(out, "\ndone").unwrap();
    }
}

fn apply(model: &mut Model, words: &[String]) {
    let key = (words[2].clone(), words[3].clone());
    if words[1] == "allocate" {
        model.insert(key);
    } else {
        model.remove(&key);
    }
}

/// Returns what the child answered, and that with what it was about.
fn run_and_kill(path: &Path, seed: u64, before: &Model, life: Duration) -> (Model, Model) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env(PATH, path)
        .env(SEED, seed.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (mut done, mut begun) = (before.clone(), None);
    std::thread::scope(|scope| {
        let (started, has_started) = std::sync::mpsc::channel();
        let (done, begun) = (&mut done, &mut begun);
        // Read while it runs, or it would soon wait for us.
        scope.spawn(move || {
            for line in lines.map_while(Result::ok) {
                let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
                match words[0].as_str() {
                    "begin" if words.len() == 4 => *begun = Some(words),
                    "done" => apply(done, &begun.take().unwrap()),
                    _ => continue,
                }
                let _ = started.send(());
            }
        });
        has_started.recv().unwrap();
        std::thread::sleep(life);
        child.kill().unwrap();
    });
    child.wait().unwrap();
    let mut after = done.clone();
    if let Some(words) = begun {
        apply(&mut after, &words);
    }
    (done, after)
}

/// One medium at a time: a child that is about to be started has all that this process has open, the lock of the other medium, too.
static ALONE: Mutex<()> = Mutex::new(());

fn kill_again_and_again(path: &Path) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = MediumConfig::new("kill", path);
    drop(Nvram::create(&config).unwrap());
    let mut lot = StdRng::seed_from_u64(7);
    let (mut model, mut changes) = (Model::new(), 0);
    for seed in 0..30 {
        let life = Duration::from_micros(lot.random_range(0..30_000));
        let (done, after) = run_and_kill(path, seed, &model, life);
        let nvram = Nvram::open(&config).unwrap();
        let found = model_of(&nvram);
        assert!(
            found == done || found == after,
            "round {seed}: {found:#?} is neither {done:#?} nor {after:#?}"
        );
        assert!(nvram.strangers().unwrap().is_empty(), "round {seed}: {:?}", nvram.strangers());
        for region in nvram.list() {
            assert_eq!(nvram.fault(region.id).unwrap(), None, "round {seed}");
        }
        changes += usize::from(found != model);
        model = found;
    }
    assert!(changes > 5, "the child lived too short: {changes} rounds changed something");
}

#[test]
fn directory_of_a_killed_process_is_as_it_answered() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    kill_again_and_again(folder.path());
}

#[test]
fn device_of_a_killed_process_is_as_it_answered() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("medium");
    File::create(&path).unwrap().set_len(64 * MIB).unwrap();
    kill_again_and_again(&path);
}
