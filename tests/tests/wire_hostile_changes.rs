// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that changes what the device is reading. Class 6 of `wire_hostile.rs`, whose text says how rounds are judged.
//!
//! Long form: `cargo xtask long hostile`; this file alone:
//! `VSSD_HOSTILE_ROUNDS=10000 cargo test -p vssd-tests --release --test wire_hostile_changes -- --test-threads=1`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use vssd_tests::mock::arena::{Arena, Verdict};
use vssd_tests::mock::machine::Options;
use vssd_tests::mock::queue::{S_OK, SECTOR, T_IN, T_OUT};
use vssd_tests::mock::ring::{F_NEXT, F_WRITE};
use vssd_tests::mock::scene::{DATA, SIZE, STATUS, Scene, desc};
use vssd_tests::mock::site::BLOCK;
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::scenario::Medium;

/// A thread that changes memory for as long as it lives.
struct Flipper {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Flipper {
    fn start(seed: u64, mut flip: impl FnMut(&mut StdRng) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let mut rng = rng(seed);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                flip(&mut rng);
            }
        });
        Self { stop, thread }
    }

    fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the flipper panicked"))
    }
}

#[test]
fn class_06_chains_that_change_while_they_are_read_touch_nothing_they_never_named_on_nvram() -> Result<()> {
    changing_chains("class_06 nvram", Medium::Nvram)
}

#[test]
fn class_06_chains_that_change_while_they_are_read_touch_nothing_they_never_named_on_an_ssd() -> Result<()> {
    changing_chains("class_06 ssd", Medium::Ssd)
}

/// Class 6: a second thread changes chains while the device reads them. Nothing outside what the chain may ever name is
/// touched: neither the guard memory nor the guard blocks.
fn changing_chains(class: &'static str, medium: Medium) -> Result<()> {
    let mut scene = Scene::with(Arena::new(class, medium, SIZE)?, Options::default())?;
    let a = scene.area;
    let ram = Arc::clone(&scene.ram);
    let guard = vec![0xa7; 0x8000];
    // Guard blocks on both sides of the two that the header may name.
    let queue = scene.machine.queue(1)?;
    let guard_block = vec![0x19; usize::try_from(BLOCK)?];
    for block in [1, 3, 5] {
        ensure!(queue.write(block * BLOCK, &guard_block)? == S_OK);
    }
    let memory = ram.alloc(0x20000, 0x1000);
    let buffers = [memory + 0x8000, memory + 0x14000];
    ram.write(memory, &guard);
    ram.write(memory + 0xc000, &guard);
    let desc_table = scene.ring.shape.desc;
    let shared = Arc::clone(&ram);
    let flipper = Flipper::start(seed("wire_hostile/flipper"), move |rng| {
        let at = desc_table + 16 * rng.random_range(0..128);
        match rng.random_range(0..6) {
            // No flush: a storm of them is not what this is about, and holds up whoever shares the disk.
            0 => shared.write(a, &[[0u8, 1, 8, 99][rng.random_range(0..4)]]),
            1 => shared.write(a + 8, &[[2u8, 4][rng.random_range(0..2)]; 1]),
            // Any descriptor of the ring: another buffer, another length, other flags.
            2 => {
                let buffer: u64 = buffers[rng.random_range(0..2)];
                shared.write(at, &buffer.to_le_bytes());
            }
            3 => {
                let len = [0u32, 1, 16, 512, 4096, 16384][rng.random_range(0..6)];
                shared.write(at + 8, &len.to_le_bytes());
            }
            4 => shared.write(at + 12, &[[0u8, 1, 2, 3][rng.random_range(0..4)], 0]),
            _ => shared.write(at + 14, &[rng.random_range(0..128), 0]),
        }
    });
    let mut sent = 0u64;
    for _ in scene.arena.rounds(2000) {
        for head in 0..64u16 {
            let start = head * 2;
            scene.ring.set(start, desc(a, 16, F_NEXT, start + 1));
            scene.ring.set(start + 1, desc(buffers[0], 4096, F_WRITE, 0));
            scene.ring.offer(start);
        }
        scene.ring.publish()?;
        let answered = (0..64).try_for_each(|_| scene.ring.wait_used(PATIENCE).map(drop));
        sent += 64;
        scene.arena.judge("64 chains under change", answered.map(|()| Verdict::Pass))?;
    }
    flipper.end()?;
    println!("{sent} chains under change");
    ensure!(ram.read(memory, 0x8000) == guard, "memory before the buffers was written");
    ensure!(ram.read(memory + 0xc000, 0x8000) == guard, "memory between the buffers was written");
    let queue = scene.machine.queue(1)?;
    for block in [1, 3, 5] {
        let found = queue.read(block * BLOCK, usize::try_from(BLOCK)?)?;
        ensure!(found == Ok(guard_block.clone()), "block {block} was written");
    }
    scene.end()
}

/// The length of a write's data flips between what its memory has and far more. Checked and then fetched again, it would carry
/// bytes from behind the guest's memory, which are anybody's, into the sectors behind the one that the request names.
#[test]
fn class_06_a_length_that_changes_after_its_check_is_not_used() -> Result<()> {
    let mut scene = Scene::new("class_06 length")?;
    let (a, ram) = (scene.area, Arc::clone(&scene.ram));
    let guard = vec![0x19; 2 * usize::try_from(BLOCK)?];
    ensure!(scene.machine.queue(1)?.write(0, &guard)? == S_OK);
    // The last sector of memory; behind it is a hole.
    let data = (4 << 30) + (16 << 20) - SECTOR;
    ram.fill(data, 512, 0x3c);
    // A queue full of requests, so that the device finds the next one at once.
    let lens: Vec<u64> = (0..32).map(|i| scene.ring.shape.desc + 16 * (3 * i + 1) + 8).collect();
    let shared = Arc::clone(&ram);
    let flipper = Flipper::start(seed("wire_hostile/length"), move |_| {
        for len in [512u32, 65_536] {
            lens.iter().for_each(|at| shared.write(*at, &len.to_le_bytes()));
        }
    });
    let mut verdicts = [0u32; 2];
    let mut sent = 0u64;
    for round in scene.arena.rounds(5000) {
        scene.header(T_OUT, 8);
        for i in 0..32u16 {
            let head = 3 * i;
            scene.ring.set(head, desc(a, 16, F_NEXT, head + 1));
            scene.ring.set(head + 1, desc(data, 512, F_NEXT, head + 2));
            scene.ring.set(head + 2, desc(a + STATUS + u64::from(i), 1, F_WRITE, 0));
            scene.ring.offer(head);
        }
        scene.ring.publish()?;
        sent += 32;
        let answered = (0..32).try_for_each(|_| {
            let used = scene.ring.wait_used(PATIENCE)?;
            // As long as the memory: carried out. Longer: no chain at all.
            ensure!(used.len <= 1, "{used:?}");
            verdicts[usize::from(used.len == 0)] += 1;
            Ok(())
        });
        scene.arena.judge("32 writes of flipping length", answered.map(|()| Verdict::Pass))?;
        if round % 500 == 499 {
            let found = scene.machine.queue(1)?.read(0, guard.len())?;
            let mut expected = guard.clone();
            expected[8 * 512..9 * 512].fill(0x3c);
            ensure!(found == Ok(expected), "sectors that no request named were written");
        }
    }
    flipper.end()?;
    println!("class_06 length: {sent} chains, {} carried out, {} refused", verdicts[0], verdicts[1]);
    ensure!(verdicts.iter().all(|count| *count > 0), "the flips were not seen: {verdicts:?}");
    scene.end()
}

#[test]
fn class_06_bits_that_flip_anywhere_in_a_ring_break_only_their_queue_on_nvram() -> Result<()> {
    flipping_bits("class_06 bits, nvram", Medium::Nvram)
}

#[test]
fn class_06_bits_that_flip_anywhere_in_a_ring_break_only_their_queue_on_an_ssd() -> Result<()> {
    flipping_bits("class_06 bits, ssd", Medium::Ssd)
}

/// Bits flip anywhere in a ring while it is used: descriptors, indices, heads, flags, used entries. The queue may answer what it
/// likes; the other one serves meanwhile, and the broken one after a restart.
fn flipping_bits(class: &'static str, medium: Medium) -> Result<()> {
    let mut scene = Scene::with(Arena::new(class, medium, SIZE)?, Options::default())?;
    let (a, ram) = (scene.area, Arc::clone(&scene.ram));
    let mut rng = rng(seed("wire_hostile/bits"));
    let n = u64::from(scene.ring.shape.size);
    let parts = {
        let shape = &scene.ring.shape;
        [
            ("descriptors", shape.desc, 16 * n),
            ("avail ring", shape.avail, 6 + 2 * n),
            ("used ring", shape.used, 6 + 8 * n),
        ]
    };
    let mut flips = 0u64;
    for round in scene.arena.rounds(300) {
        let (case, start, len) = parts[round % parts.len()];
        // Every fourth time only the indices and flags at the front.
        let len = if round % 4 == 3 && start != parts[0].1 { 4 } else { len };
        let shared = Arc::clone(&ram);
        let flipper = Flipper::start(rng.random(), move |rng| {
            let at = start + rng.random_range(0..len);
            let bit = 1 << rng.random_range(0..8);
            shared.write(at, &[shared.read(at, 1)[0] ^ bit]);
        });
        scene.header(if round % 2 == 0 { T_IN } else { T_OUT }, 64);
        let until = Instant::now() + Duration::from_millis(3);
        while Instant::now() < until {
            for i in 0..32u16 {
                scene.ring.set(3 * i, desc(a, 16, F_NEXT, 3 * i + 1));
                let flags = if round % 2 == 0 { F_NEXT | F_WRITE } else { F_NEXT };
                scene.ring.set(3 * i + 1, desc(a + DATA, 4096, flags, 3 * i + 2));
                scene.ring.set(3 * i + 2, desc(a + STATUS, 1, F_WRITE, 0));
                scene.ring.offer(3 * i);
            }
            scene.ring.publish()?;
            scene.ring.kick()?;
            flips += 1;
        }
        let served = scene.machine.queue(1)?.read(0, 4096);
        flipper.end()?;
        let restarted = served.and_then(|read| {
            ensure!(read.is_ok(), "the other queue: {read:?}");
            let index = scene.machine.stop_queue(0)?;
            scene.ring.restart_at(index);
            scene.machine.start_queue(0)?;
            scene.expect_good(case)
        });
        scene.arena.judge(case, restarted.map(|()| Verdict::Reject))?;
    }
    println!("{class}: {flips} batches under flipping bits");
    scene.end()
}
