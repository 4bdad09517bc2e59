// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that breaks every rule: each broken chain is answered, the queue goes on, and the neighbour's disk never
//! notices. How rounds are judged is said in `mock::arena`.
//!
//! The classes are the ways in which back-ends of this kind have been broken before. Each has a test `class_NN_…`:
//!
//! | class | what | where |
//! |---|---|---|
//! | 1–5, 7–8, 17–21 | rings, chains and requests | this file, `wire_hostile_load.rs` |
//! | 6 | what changes while it is read | `wire_hostile_changes.rs` |
//! | 9–12, 14–16 | messages, descriptors, tables, starts and stops | `wire_hostile_frontend.rs` |
//! | 13 | memory that goes away | `wire_hostile_memory.rs` |
//! | 22 | values from the wire that no type has | `vssd-protocol` and `chain.rs` (property tests, Miri), noise here, `wire_hostile_channel.rs` |
//! | 23 | short transfers, no memory | `vssd-pool/src/lane/ring.rs` (transfers cut short), `vssd-pool/tests/damage.rs` |
//! | 24 | the control socket | `wire_hostile_frontend.rs` |
//!
//! Long form: `cargo xtask long hostile`; this file alone:
//! `VSSD_HOSTILE_ROUNDS=10000 cargo test -p vssd-tests --release --test wire_hostile -- --test-threads=1`

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use vssd_protocol::guest::RequestType;
use vssd_tests::mock::arena::{ATTACKER, Arena, Verdict, rounds};
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::frontend::{Frontend, header};
use vssd_tests::mock::machine::{F_DISCARD, F_RO, F_WRITE_ZEROES, Machine, Options};
use vssd_tests::mock::queue::{
    S_IOERR, S_OK, S_UNSUPP, SECTOR, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES,
};
use vssd_tests::mock::ring::{Descriptor, F_INDIRECT, F_NEXT, F_WRITE, Segment, Used};
use vssd_tests::mock::scene::{DATA, HEADER, SIZE, STATUS, Scene, TABLE, desc};
use vssd_tests::mock::site::{BLOCK, Site};
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::scenario::Medium;

/// Class, name, request type, chain, and the status where there is a place for it.
type Case = (u8, &'static str, u32, Vec<Descriptor>, Option<u8>);

/// Chains that no driver should send; puts their tables into memory.
fn malformed(scene: &Scene) -> Vec<Case> {
    let a = scene.area;
    let hole = 0xf000_0000;
    let end = scene.ram.seam() + (16 << 20);
    let size = 128u16;
    let head = desc(a + HEADER, 16, F_NEXT, 1);
    let last = |next: u16| desc(a + STATUS, 1, F_WRITE, next);
    let data = |addr: u64, len: u32, next: u16| desc(addr, len, F_NEXT | F_WRITE, next);
    let huge = 60 << 20;
    let cases: Vec<Case> = vec![
        (1, "a descriptor that leads to itself", T_IN, vec![desc(a, 16, F_NEXT, 0)], None),
        (1, "a loop of two", T_IN, vec![head, data(a + DATA, 512, 0)], None),
        (1, "a loop behind the status", T_IN, vec![head, data(a + STATUS, 1, 1)], None),
        (1, "next just outside the ring", T_IN, vec![desc(a, 16, F_NEXT, size)], None),
        (1, "next far outside the ring", T_IN, vec![desc(a, 16, F_NEXT, u16::MAX)], None),
        (5, "a header in no memory", T_IN, vec![desc(hole, 16, F_NEXT, 1), last(0)], None),
        (5, "a header that wraps around", T_IN, vec![desc(u64::MAX - 7, 16, F_NEXT, 1), last(0)], None),
        (5, "data in no memory", T_IN, vec![head, data(hole, 512, 2), last(0)], None),
        (5, "data that reaches into a hole", T_IN, vec![head, data(end - 256, 512, 2), last(0)], None),
        (5, "data that wraps around", T_IN, vec![head, data(u64::MAX - 511, 1024, 2), last(0)], None),
        (5, "a status in no memory", T_IN, vec![head, desc(hole, 1, F_WRITE, 0)], None),
        (17, "no status", T_IN, vec![desc(a, 16, 0, 0)], None),
        (17, "a status that cannot be written", T_FLUSH, vec![head, desc(a + STATUS, 1, 0, 0)], None),
        (17, "a status of no bytes", T_FLUSH, vec![head, desc(a + STATUS, 0, F_WRITE, 0)], None),
        (
            17,
            "nothing but empty descriptors",
            T_FLUSH,
            vec![desc(a, 0, F_NEXT, 1), desc(a, 0, F_WRITE, 0)],
            None,
        ),
        (17, "only a status", T_FLUSH, vec![last(0)], Some(S_IOERR)),
        (17, "a header of 15 bytes", T_FLUSH, vec![desc(a, 15, F_NEXT, 1), last(0)], Some(S_IOERR)),
        (
            17,
            "a header that cannot be read",
            T_FLUSH,
            vec![desc(a, 16, F_NEXT | F_WRITE, 1), last(0)],
            Some(S_IOERR),
        ),
        (
            17,
            "readable behind writable",
            T_OUT,
            vec![head, desc(a + STATUS, 1, F_WRITE | F_NEXT, 2), desc(a + DATA, 512, 0, 0)],
            None,
        ),
        (
            17,
            "a read into memory to be read",
            T_IN,
            vec![head, desc(a + DATA, 512, F_NEXT, 2), last(0)],
            Some(S_IOERR),
        ),
        (
            17,
            "a write from memory to be written",
            T_OUT,
            vec![head, data(a + DATA, 512, 2), last(0)],
            Some(S_IOERR),
        ),
        (7, "half a sector", T_IN, vec![head, data(a + DATA, 256, 2), last(0)], Some(S_IOERR)),
        (7, "a sector and a byte", T_OUT, vec![head, desc(a + DATA, 513, F_NEXT, 2), last(0)], Some(S_IOERR)),
        (7, "an id in 19 bytes", T_GET_ID, vec![head, data(a + DATA, 19, 2), last(0)], Some(S_IOERR)),
        (4, "a nested table", T_IN, vec![desc(a + TABLE, 32, F_INDIRECT, 0)], None),
        (4, "a table with next", T_IN, vec![desc(a + TABLE + 64, 48, F_INDIRECT | F_NEXT, 1), last(0)], None),
        (4, "a table of no bytes", T_IN, vec![desc(a + TABLE + 64, 0, F_INDIRECT, 0)], None),
        (4, "a table of 17 bytes", T_IN, vec![desc(a + TABLE + 64, 17, F_INDIRECT, 0)], None),
        (4, "a table of nearly 4 GiB", T_IN, vec![desc(a + TABLE + 64, 0xffff_fff0, F_INDIRECT, 0)], None),
        (4, "a table in no memory", T_IN, vec![desc(hole, 48, F_INDIRECT, 0)], None),
        (4, "a table that wraps around", T_IN, vec![desc(u64::MAX - 15, 48, F_INDIRECT, 0)], None),
        (4, "a table whose next is outside", T_IN, vec![desc(a + TABLE + 128, 32, F_INDIRECT, 0)], None),
        (4, "a table that is a loop", T_IN, vec![desc(a + TABLE + 192, 32, F_INDIRECT, 0)], None),
        (
            4,
            "a table longer than the ring",
            T_IN,
            vec![desc(a + TABLE + 0x1000, 16 * 200, F_INDIRECT, 0)],
            None,
        ),
        (
            7,
            "more than 4 GiB",
            T_IN,
            std::iter::once(head)
                .chain((0..75).map(|i| data(0, huge, i + 2)))
                .chain(std::iter::once(last(0)))
                .collect(),
            None,
        ),
    ];
    // Tables: nested, one to be refused for its neighbour's sake, next outside, a loop, one that is too long.
    let put = |at: u64, d: Descriptor| scene.ram.write(a + TABLE + at, &d.bytes());
    put(0, desc(a + TABLE + 64, 32, F_INDIRECT, 0));
    put(16, last(0));
    put(64, head);
    put(80, last(0));
    put(128, desc(a, 16, F_NEXT, 2));
    put(192, desc(a, 16, F_NEXT, 1));
    put(208, data(a + DATA, 512, 0));
    for i in 0..199 {
        put(0x1000 + 16 * u64::from(i), desc(a, 16, F_NEXT, i + 1));
    }
    put(0x1000 + 16 * 199, last(0));
    cases
}

/// Sends the malformed chains of one class over and over.
fn malformed_chains(class: u8, title: &'static str) -> Result<()> {
    let mut scene = Scene::new(title)?;
    let a = scene.area;
    let cases: Vec<Case> = malformed(&scene).into_iter().filter(|case| case.0 == class).collect();
    for round in scene.arena.rounds(20_000) {
        let (_, name, kind, chain, status) = &cases[round % cases.len()];
        scene.judge(name, |scene| {
            scene.header(*kind, 8);
            scene.ram.fill(a + DATA, 0x2000, 0x77);
            let start = Instant::now();
            let used = scene.chain(chain)?;
            let took = start.elapsed();
            ensure!(took < Duration::from_secs(2), "took {took:?}");
            match status {
                Some(status) => {
                    // At most the status byte, and that only where nothing is writable before it.
                    ensure!(scene.status() == *status && used.len <= 1, "{used:?}: {:#x}", scene.status());
                }
                None => ensure!(used.len == 0, "{used:?}"),
            }
            let untouched = scene.ram.read(a + DATA, 0x2000).iter().all(|byte| *byte == 0x77);
            ensure!(untouched, "memory was written");
            Ok(Verdict::Reject)
        })?;
    }
    scene.end()
}

#[test]
fn class_01_loops_and_chains_longer_than_the_queue_are_answered() -> Result<()> {
    malformed_chains(1, "class_01")
}

#[test]
fn class_04_tables_that_lie_are_refused() -> Result<()> {
    malformed_chains(4, "class_04 malformed")
}

#[test]
fn class_05_memory_that_the_guest_does_not_have_is_refused() -> Result<()> {
    malformed_chains(5, "class_05")
}

#[test]
fn class_07_lengths_that_no_request_has_are_refused() -> Result<()> {
    malformed_chains(7, "class_07 lengths")
}

#[test]
fn class_17_headers_and_statuses_that_are_missing_or_misplaced_are_refused() -> Result<()> {
    malformed_chains(17, "class_17 malformed")
}

/// What looks odd and is allowed (virtio 1.3, §2.7.4.1, §2.7.5.3): the other half of classes 4 and 17.
#[test]
fn class_04_and_17_odd_but_legal_chains_are_carried_out() -> Result<()> {
    let mut scene = Scene::new("class_04 and 17, legal")?;
    let a = scene.area;
    let hole = 0xf000_0000;
    let last = |next: u16| desc(a + STATUS, 1, F_WRITE, next);
    let put = |scene: &Scene, at: u64, d: Descriptor| scene.ram.write(a + TABLE + at, &d.bytes());
    put(&scene, 0, desc(a, 16, F_NEXT, 3));
    put(&scene, 16, desc(a + DATA, 512, F_NEXT | F_WRITE, 2));
    put(&scene, 32, last(0));
    put(&scene, 48, desc(hole, 0, F_NEXT | F_WRITE, 1));
    let cases: Vec<(&str, Vec<Descriptor>)> = vec![
        (
            "a header in four pieces",
            vec![
                desc(a, 1, F_NEXT, 1),
                desc(a + 1, 7, F_NEXT, 2),
                desc(a + 8, 0, F_NEXT, 3),
                desc(a + 8, 8, F_NEXT, 4),
                desc(a + DATA, 512, F_NEXT | F_WRITE, 5),
                last(0),
            ],
        ),
        (
            "data and status in one descriptor",
            vec![desc(a, 16, F_NEXT, 1), desc(a + STATUS - 512, 513, F_WRITE, 0)],
        ),
        ("a table out of order, with an empty descriptor nowhere", vec![desc(a + TABLE, 64, F_INDIRECT, 0)]),
        ("a table marked to be written", vec![desc(a + TABLE, 64, F_INDIRECT | F_WRITE, 0)]),
        (
            "a table behind a descriptor of the ring",
            vec![desc(a, 16, F_NEXT, 1), desc(a + TABLE + 16, 32, F_INDIRECT, 0)],
        ),
    ];
    for round in scene.arena.rounds(20_000) {
        let (name, chain) = &cases[round % cases.len()];
        // The indices of a table behind a descriptor count from its own start.
        let next = if name.starts_with("a table behind") { 1 } else { 2 };
        put(&scene, 16, desc(a + DATA, 512, F_NEXT | F_WRITE, next));
        scene.judge(name, |scene| {
            scene.header(T_IN, 64);
            let used = scene.chain(chain)?;
            ensure!(scene.status() == S_OK && used.len == 513, "{used:?}, status {}", scene.status());
            Ok(Verdict::Pass)
        })?;
    }
    scene.end()
}

/// Class 7: every number in a request that could overflow or point elsewhere.
#[test]
fn class_07_numbers_at_the_edge_are_refused_and_touch_nothing() -> Result<()> {
    let mut scene = Scene::new("class_07 numbers")?;
    let a = scene.area;
    let sectors = SIZE / SECTOR;
    let edges = [
        sectors,
        sectors - 1,
        sectors + 1,
        1 << 31,
        1 << 32,
        (1 << 55) - 1,
        1 << 55,
        u64::MAX / 512 + 1,
        u64::MAX,
    ];
    let segment = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    let mut bad = vec![
        (segment(0, 1, 2), S_UNSUPP),
        (segment(0, 1, u32::MAX), S_UNSUPP),
        (segment(0, 8, 0)[..15].to_vec(), S_IOERR),
        ([segment(0, 8, 0), segment(8, 8, 0)].concat(), S_IOERR),
        (Vec::new(), S_IOERR),
    ];
    bad.extend(edges.map(|sector| (segment(sector, 8, 0), S_IOERR)));
    bad.extend([(segment(0, u32::MAX, 0), S_IOERR), (segment(sectors - 8, 16, 0), S_IOERR)]);
    bad.push((segment(u64::MAX - 3, u32::MAX, 1), S_IOERR));
    for round in scene.arena.rounds(20_000) {
        let kind = [T_IN, T_OUT, T_DISCARD, T_WRITE_ZEROES][round % 4];
        let name = ["a read", "a write", "a discard", "a write of zeroes"][round % 4];
        if matches!(kind, T_IN | T_OUT) {
            let sector = edges[round / 4 % edges.len()];
            scene.judge(name, |scene| {
                scene.header(kind, sector);
                let data = Segment { addr: a + DATA, len: 1024, write: kind == T_IN };
                let head = scene.ring.chain(&[Segment::out(a, 16), data, Segment::into(a + STATUS, 1)])?;
                let used = scene.send(head)?;
                let counted = u32::from(kind == T_OUT);
                ensure!(scene.status() == S_IOERR && used.len == counted, "sector {sector:#x}: {used:?}");
                Ok(Verdict::Reject)
            })?;
            continue;
        }
        let (body, status) = &bad[round / 4 % bad.len()];
        scene.judge(name, |scene| {
            scene.header(kind, 0);
            scene.ram.write(a + DATA, body);
            let mut chain = vec![Segment::out(a, 16)];
            if !body.is_empty() {
                chain.push(Segment::out(a + DATA, u32::try_from(body.len())?));
            }
            chain.push(Segment::into(a + STATUS, 1));
            let head = scene.ring.chain(&chain)?;
            scene.send(head)?;
            // A discard has no flag at all.
            let unmap = kind == T_DISCARD && body.len() == 16 && body[12] == 1;
            let expected = if unmap { S_UNSUPP } else { *status };
            ensure!(scene.status() == expected, "{body:x?}: status {}", scene.status());
            Ok(Verdict::Reject)
        })?;
    }
    scene.end()
}

/// Class 20: what was not negotiated, and what nobody offers, is refused.
#[test]
fn class_20_types_that_are_not_offered_are_refused() -> Result<()> {
    let options = Options { without: F_DISCARD | F_WRITE_ZEROES, ..Options::default() };
    let mut scene = Scene::with(Arena::new("class_20", Medium::Nvram, SIZE)?, options)?;
    let a = scene.area;
    // SCSI commands, barriers, secure erase, zoned requests, and whatever may come.
    let kinds =
        [T_DISCARD, T_WRITE_ZEROES, 2, 3, 5, 10, 14, 15, 16, 18, 20, 22, 24, 26, 0x8000_0000, u32::MAX];
    let before = scene.arena.site.operator.show(ATTACKER)?.io.errors;
    let mut total = 0;
    for round in scene.arena.rounds(20_000) {
        total += 1;
        let kind = kinds[round % kinds.len()];
        scene.judge(&format!("type {kind}"), |scene| {
            scene.header(kind, 0);
            scene.ram.write(a + DATA, &[0, 0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 0, 0, 0, 0]);
            let chain = [Segment::out(a, 16), Segment::out(a + DATA, 16), Segment::into(a + STATUS, 1)];
            let head = scene.ring.chain(&chain)?;
            scene.send(head)?;
            ensure!(scene.status() == S_UNSUPP, "status {}", scene.status());
            Ok(Verdict::Reject)
        })?;
    }
    let errors = scene.arena.site.operator.show(ATTACKER)?.io.errors - before;
    ensure!(errors == total, "{total} refused requests, {errors} errors counted");
    scene.end()
}

/// Class 18: no byte beyond the answer, no stale byte in it.
#[test]
fn class_18_no_more_is_written_than_is_said() -> Result<()> {
    let mut scene = Scene::new("class_18")?;
    let a = scene.area;
    let cases = [
        (T_GET_ID, 4096u32, 20u32, S_OK),
        (T_IN, 4096, 4096, S_OK),
        (T_FLUSH, 4096, 0, S_OK),
        (99, 4096, 0, S_UNSUPP),
    ];
    for round in scene.arena.rounds(20_000) {
        let (kind, len, wrote, status) = cases[round % cases.len()];
        scene.judge(&format!("type {kind}"), |scene| {
            scene.header(kind, 4096);
            scene.ram.fill(a + DATA, 0x2000, 0x77);
            let chain = [Segment::out(a, 16), Segment::into(a + DATA, len), Segment::into(a + STATUS, 1)];
            let head = scene.ring.chain(&chain)?;
            let used = scene.send(head)?;
            ensure!(scene.status() == status, "status {}", scene.status());
            // The status byte lies at the end of what is writable.
            ensure!(used.len == wrote + u32::from(wrote == len), "{used:?}");
            let memory = scene.ram.read(a + DATA, 0x2000);
            ensure!(memory[wrote as usize..].iter().all(|byte| *byte == 0x77), "too much was written");
            Ok(Verdict::Pass)
        })?;
    }
    scene.end()
}

/// Class 3: indices that no driver can have stop only their own queue.
#[test]
fn class_03_an_avail_index_that_cannot_be_stops_only_its_queue() -> Result<()> {
    let mut scene = Scene::new("class_03")?;
    let ahead = [129u16, 200, 32_768, 65_535];
    for round in scene.arena.rounds(20_000) {
        let ahead = ahead[round % ahead.len()];
        scene.judge(&format!("{ahead} ahead"), |scene| {
            let good = scene.ring.next_avail();
            scene.ring.force_avail_idx(good.wrapping_add(ahead));
            scene.ring.kick()?;
            ensure!(scene.machine.queue(1)?.read(0, 4096)?.is_ok(), "the other queue");
            // The driver comes to its senses.
            scene.ring.force_avail_idx(good);
            scene.ring.kick()?;
            scene.ring.publish()?;
            Ok(Verdict::Reject)
        })?;
    }
    scene.end()
}

/// Class 2: what is broken is not looked at again and again, and its queue can be stopped.
#[test]
fn class_02_a_queue_that_stays_broken_burns_no_processor_time_and_can_be_stopped() -> Result<()> {
    let mut scene = Scene::new("class_02")?;
    for _ in scene.arena.rounds(2000) {
        scene.judge("a broken queue is stopped and started", |scene| {
            let good = scene.ring.next_avail();
            scene.ring.force_avail_idx(good.wrapping_add(3000));
            scene.ring.kick()?;
            scene.machine.queue(1)?.flush()?;
            ensure!(scene.machine.stop_queue(0)? == good, "stopped elsewhere than at {good}");
            scene.ring.force_avail_idx(good);
            scene.machine.start_queue(0)?;
            Ok(Verdict::Reject)
        })?;
    }
    scene.end()?;

    let mut site = Site::new(Medium::Nvram, 60)?;
    let mut machine = site.machine(ATTACKER, SIZE, Options::default())?;
    let mut ring = machine.take_queue(0)?.ring;
    ring.force_avail_idx(5000);
    ring.kick()?;
    thread::sleep(Duration::from_millis(200));
    let before = site.cpu_ticks()?;
    thread::sleep(Duration::from_secs(1));
    let ticks = site.cpu_ticks()? - before;
    ensure!(ticks <= 3, "{} ms of processor time in a second of a broken ring", ticks * 10);
    ensure!(machine.queue(1)?.read(0, 4096)?.is_ok());
    site.finish()
}

/// Class 8: heads that are in flight already, or outside the ring.
#[test]
fn class_08_a_head_that_is_in_flight_or_outside_harms_only_its_own_guest() -> Result<()> {
    let mut scene = Scene::new("class_08")?;
    let mut driver = Driver::start(scene.machine.take_queue(1)?)?;
    let seq = driver.sizes.seq;
    let head = driver.park(seq)?;
    let outside = [128u16, 129, 4096, u16::MAX];
    for round in scene.arena.rounds(20_000) {
        scene.judge("a head that is in flight", |_| {
            driver.queue.ring.offer(head);
            driver.queue.ring.publish()?;
            // The second use comes back at once and empty; the first stays with the device.
            let used = driver.queue.ring.wait_used(PATIENCE)?;
            ensure!(used == Used { id: u32::from(head), len: 0 }, "{used:?}");
            Ok(Verdict::Reject)
        })?;
        scene.judge("a head outside the ring", |scene| {
            scene.ring.offer(outside[round % outside.len()]);
            scene.ring.publish()?;
            Ok(Verdict::Reject)
        })?;
    }
    drop(driver);
    scene.end()
}

#[test]
fn class_19_a_flood_of_heads_takes_no_memory_on_nvram() -> Result<()> {
    flood_of_heads("class_19 nvram", Medium::Nvram)
}

#[test]
fn class_19_a_flood_of_heads_takes_no_memory_on_an_ssd() -> Result<()> {
    flood_of_heads("class_19 ssd", Medium::Ssd)
}

/// Class 19: as many heads as an index can count are made available; the daemon's memory stays bounded. The same head over
/// and over, and requests that nobody takes answers of.
fn flood_of_heads(class: &'static str, medium: Medium) -> Result<()> {
    let arena = Arena::new(class, medium, SIZE)?;
    let options = Options { queues: 1, queue_size: 1024, ..Options::default() };
    let mut scene = Scene::with(arena, options)?;
    let a = scene.area;
    // Descriptors of its own: header, data, status, all requests the same.
    scene.header(T_IN, 64);
    for head in 0..340u16 {
        scene.ring.set(3 * head, desc(a, 16, F_NEXT, 3 * head + 1));
        scene.ring.set(3 * head + 1, desc(a + DATA, 4096, F_NEXT | F_WRITE, 3 * head + 2));
        scene.ring.set(3 * head + 2, desc(a + STATUS, 1, F_WRITE, 0));
    }
    let mut offered = 0u32;
    for _ in scene.arena.rounds(1300) {
        // A thousand at a time, and each head as often as the ring allows; used entries are never looked at.
        for i in 0..1000u16 {
            scene.ring.offer(3 * (i % 340));
        }
        scene.ring.publish()?;
        offered += 1000;
        // The next thousand must not overtake: an index too far ahead is another class.
        let deadline = Instant::now() + PATIENCE;
        let target = scene.ring.next_avail();
        while scene.ram.load(scene.ring.shape.used_idx()) != target {
            let missing = target.wrapping_sub(scene.ram.load(scene.ring.shape.used_idx()));
            let verdict = ensure_in_time(deadline, missing).map(|()| Verdict::Pass);
            if verdict.is_err() {
                scene.arena.judge("a thousand heads", verdict)?;
            }
            thread::yield_now();
        }
        scene.arena.judge("a thousand heads", Ok(Verdict::Pass))?;
    }
    println!("{class}: {offered} heads");
    scene.end()
}

fn ensure_in_time(deadline: Instant, missing: u16) -> Result<()> {
    ensure!(Instant::now() < deadline, "nothing was used: {missing} answers are missing");
    Ok(())
}

/// Class 21: read-only is enforced by the device, whatever the driver negotiated.
#[test]
fn class_21_a_read_only_device_takes_no_write_from_a_driver_that_ignores_it() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 60)?;
    let mut machine = site.machine(ATTACKER, SIZE, Options::default())?;
    let bytes = vec![0x5a; 4096];
    ensure!(machine.queue(0)?.write(BLOCK, &bytes)? == S_OK);
    machine.disconnect();
    site.restart_with(&["--read-only"])?;
    let mut machine =
        Machine::start(&site.socket(ATTACKER), Options { without: F_RO, ..Options::default() })?;
    let queue = machine.queue(0)?;
    let total = rounds(2000);
    for _ in 0..total {
        ensure!(queue.write(BLOCK, &[1; 4096])? == S_IOERR, "a write is carried out");
        ensure!(queue.discard(BLOCK, BLOCK)? != S_OK && queue.write_zeroes(BLOCK, BLOCK, true)? != S_OK);
        ensure!(queue.read(BLOCK, 4096)? == Ok(bytes.clone()), "the data changed");
    }
    println!("class_21: {total} rounds");
    site.finish()
}

/// Bytes of chance as messages and as requests.
#[test]
fn noise_on_the_socket_and_in_the_ring_is_survived() -> Result<()> {
    let mut scene = Scene::new("noise")?;
    let mut rng = rng(seed("wire_hostile/noise"));
    let kinds = [T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES];
    let (a, ram) = (scene.area, Arc::clone(&scene.ram));
    for round in scene.arena.rounds(20_000) {
        // Mostly right, now and then not.
        let rarely = |rng: &mut rand::rngs::StdRng| rng.random_ratio(1, 6);
        let mut kind = kinds[rng.random_range(0..kinds.len())];
        if rarely(&mut rng) {
            kind = RequestType::ALL[rng.random_range(0..7)] as u32;
        }
        scene.header(kind, if rarely(&mut rng) { rng.random() } else { rng.random_range(0..1000) });
        let mut body = vec![0; 256];
        rng.fill(&mut body[..]);
        if rng.random() {
            body[8..16].fill(0);
        }
        ram.write(a + DATA, &body);
        let count = rng.random_range(1..6u16);
        let chain: Vec<Descriptor> = (0..count)
            .map(|i| {
                let len = if rarely(&mut rng) {
                    rng.random()
                } else {
                    [16, 16, 512, 1024, 1][rng.random_range(0..5)]
                };
                let addr = if rarely(&mut rng) { rng.random() } else { a + u64::from(i) * 0x1000 };
                let mut flags = if i + 1 < count { F_NEXT } else { F_WRITE };
                if rarely(&mut rng) {
                    flags ^= [F_NEXT, F_WRITE, F_INDIRECT][rng.random_range(0..3)];
                }
                let next = if rarely(&mut rng) { rng.random() } else { i + 1 };
                Descriptor::new(addr, len, flags, next)
            })
            .collect();
        let answered = scene.chain(&chain).with_context(|| format!("round {round}: {chain:x?}"));
        scene.arena.judge("a chain of chance", answered.map(|_| Verdict::Pass))?;
    }
    scene.expect_good("noise")?;
    for _ in 0..300 {
        let mut bytes = vec![0; rng.random_range(1..200)];
        rng.fill(&mut bytes[..]);
        if rng.random() {
            let plausible = header(rng.random_range(1..44), 1, rng.random_range(0..64));
            bytes.splice(0..0, plausible);
        }
        let other = Frontend::connect(&scene.arena.site.socket(ATTACKER))?;
        // It may be turned away while others are connected.
        let _ = other.send_raw(&bytes, &[]);
        drop(other);
    }
    scene.machine.reconnect()?;
    scene.expect_good("noise on other connections")?;
    scene.end()
}
