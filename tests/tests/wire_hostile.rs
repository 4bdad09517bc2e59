// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that breaks every rule: each broken chain is answered, the queue goes on, and the neighbour's disk never
//! notices. Classes are those in which back-ends of this kind have been broken before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rand::Rng;
use vssd_protocol::guest::{Request, RequestType};
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::frontend::{Frontend, header};
use vssd_tests::mock::machine::{F_DISCARD, F_WRITE_ZEROES, Machine, Options};
use vssd_tests::mock::neighbour::Neighbour;
use vssd_tests::mock::queue::{
    S_IOERR, S_OK, S_UNSUPP, SECTOR, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, UNWRITTEN,
};
use vssd_tests::mock::ram::GuestRam;
use vssd_tests::mock::ring::{Descriptor, F_INDIRECT, F_NEXT, F_WRITE, Ring, Segment, Used};
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::scenario::Medium;
use vssd_tests::wait::Deadline;

const SIZE: u64 = 32 * MIB;

/// A site with an attacker's machine, whose first queue is driven by hand, and a neighbour.
struct Scene {
    site: Site,
    neighbour: Neighbour,
    machine: Machine,
    ring: Ring,
    ram: Arc<GuestRam>,
    /// Memory for headers, data and status.
    area: u64,
    descriptors: usize,
}

/// Offsets in the area.
const HEADER: u64 = 0;
const DATA: u64 = 0x1000;
const STATUS: u64 = 0x8000;
const TABLE: u64 = 0x9000;
const AREA: u64 = 0x20000;

impl Scene {
    fn new(options: Options) -> Result<Self> {
        Self::on(Medium::Nvram, options)
    }

    fn on(medium: Medium, options: Options) -> Result<Self> {
        let mut site = Site::new(medium, 100)?;
        let neighbour = Neighbour::start(&mut site)?;
        let mut machine = site.machine("attacker", SIZE, options)?;
        let ring = machine.take_queue(0)?.ring;
        let ram = Arc::clone(&machine.ram);
        let area = ram.alloc(AREA, 4096);
        let mut scene = Self { site, neighbour, machine, ring, ram, area, descriptors: 0 };
        scene.expect_good("before anything bad")?;
        scene.descriptors = scene.site.descriptors()?;
        Ok(scene)
    }

    /// Writes a header for a request.
    fn header(&self, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.ram.write(self.area + HEADER, &bytes);
        self.ram.write(self.area + STATUS, &[UNWRITTEN]);
    }

    fn status(&self) -> u8 {
        self.ram.read(self.area + STATUS, 1)[0]
    }

    /// Offers `head` and waits for its used entry.
    fn send(&mut self, head: u16) -> Result<Used> {
        self.ring.offer(head);
        self.ring.publish()?;
        let used = self.ring.wait_used(PATIENCE)?;
        ensure!(used.id == u32::from(head), "{used:?} instead of {head}");
        Ok(used)
    }

    /// Writes descriptors as they are, at indices that follow each other from a fresh head on, and sends the head. In
    /// `next`, 0 is the head.
    fn chain(&mut self, descriptors: &[Descriptor]) -> Result<Used> {
        let mut indices = Vec::new();
        for _ in descriptors {
            indices.push(self.ring.take()?);
        }
        for (index, desc) in indices.iter().zip(descriptors) {
            let next = indices.get(usize::from(desc.next)).copied().unwrap_or(desc.next);
            self.ring.set(*index, Descriptor { next, ..*desc });
        }
        let head = indices[0];
        self.ring.adopt(head, indices);
        self.send(head)
    }

    /// A correct write and read on the same queue.
    fn expect_good(&mut self, after: &str) -> Result<()> {
        let area = self.area;
        let mark = after.bytes().fold(0x3c, |sum: u8, byte| sum.wrapping_mul(31) ^ byte);
        self.ram.fill(area + DATA, 4096, mark);
        for (kind, data) in
            [(T_OUT, Segment::out(area + DATA, 4096)), (T_IN, Segment::into(area + DATA + 4096, 4096))]
        {
            self.header(kind, 64);
            let chain = [Segment::out(area + HEADER, 16), data, Segment::into(area + STATUS, 1)];
            let head = self.ring.chain(&chain)?;
            self.send(head).with_context(|| format!("a good request after: {after}"))?;
            ensure!(self.status() == S_OK, "a good request after: {after}: status {}", self.status());
        }
        let read = self.ram.read(area + DATA + 4096, 4096);
        ensure!(read.iter().all(|byte| *byte == mark), "wrong data after: {after}");
        Ok(())
    }

    /// The neighbour is fine, no descriptor leaked, the pool is sound.
    fn end(mut self) -> Result<()> {
        self.neighbour.end()?;
        self.machine.disconnect();
        let expected = self.descriptors;
        let mut fresh = Machine::start(&self.site.socket("attacker"), self.machine.options)?;
        let _neighbour = Machine::start(&self.site.socket("neighbour"), Options::default())?;
        ensure!(fresh.queue(0)?.read(0, 4096)?.is_ok(), "a new connection is not served");
        let site = &mut self.site;
        Deadline::after(PATIENCE).until("descriptors to be given back", || {
            let now = site.descriptors()?;
            Ok(now <= expected)
        })?;
        drop((fresh, _neighbour));
        self.site.finish()
    }
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor::new(addr, len, flags, next)
}

/// Classes 1, 4, 5, 7, 17.
#[test]
fn every_malformed_chain_is_answered_and_the_queue_goes_on() -> Result<()> {
    let mut scene = Scene::new(Options::default())?;
    let a = scene.area;
    let hole = 0xf000_0000;
    let end = scene.ram.seam() + (16 << 20);
    let size = 128u16;
    let head = desc(a + HEADER, 16, F_NEXT, 1);
    let last = |next: u16| desc(a + STATUS, 1, F_WRITE, next);
    let data = |addr: u64, len: u32, next: u16| desc(addr, len, F_NEXT | F_WRITE, next);
    let huge = 60 << 20;
    // Name, request type, chain, and the status where there is a place for it.
    let cases: Vec<(&str, u32, Vec<Descriptor>, Option<u8>)> = vec![
        ("a descriptor that leads to itself", T_IN, vec![desc(a, 16, F_NEXT, 0)], None),
        ("a loop of two", T_IN, vec![head, data(a + DATA, 512, 0)], None),
        ("a loop behind the status", T_IN, vec![head, data(a + STATUS, 1, 1)], None),
        ("next just outside the ring", T_IN, vec![desc(a, 16, F_NEXT, size)], None),
        ("next far outside the ring", T_IN, vec![desc(a, 16, F_NEXT, u16::MAX)], None),
        ("a header in no memory", T_IN, vec![desc(hole, 16, F_NEXT, 1), last(0)], None),
        ("a header that wraps around", T_IN, vec![desc(u64::MAX - 7, 16, F_NEXT, 1), last(0)], None),
        ("data in no memory", T_IN, vec![head, data(hole, 512, 2), last(0)], None),
        ("data that reaches into a hole", T_IN, vec![head, data(end - 256, 512, 2), last(0)], None),
        ("data that wraps around", T_IN, vec![head, data(u64::MAX - 511, 1024, 2), last(0)], None),
        ("a status in no memory", T_IN, vec![head, desc(hole, 1, F_WRITE, 0)], None),
        ("no status", T_IN, vec![desc(a, 16, 0, 0)], None),
        ("a status that cannot be written", T_FLUSH, vec![head, desc(a + STATUS, 1, 0, 0)], None),
        ("a status of no bytes", T_FLUSH, vec![head, desc(a + STATUS, 0, F_WRITE, 0)], None),
        ("nothing but empty descriptors", T_FLUSH, vec![desc(a, 0, F_NEXT, 1), desc(a, 0, F_WRITE, 0)], None),
        ("only a status", T_FLUSH, vec![last(0)], Some(S_IOERR)),
        ("a header of 15 bytes", T_FLUSH, vec![desc(a, 15, F_NEXT, 1), last(0)], Some(S_IOERR)),
        (
            "a header that cannot be read",
            T_FLUSH,
            vec![desc(a, 16, F_NEXT | F_WRITE, 1), last(0)],
            Some(S_IOERR),
        ),
        (
            "readable behind writable",
            T_OUT,
            vec![head, desc(a + STATUS, 1, F_WRITE | F_NEXT, 2), desc(a + DATA, 512, 0, 0)],
            None,
        ),
        (
            "a read into memory to be read",
            T_IN,
            vec![head, desc(a + DATA, 512, F_NEXT, 2), last(0)],
            Some(S_IOERR),
        ),
        (
            "a write from memory to be written",
            T_OUT,
            vec![head, data(a + DATA, 512, 2), last(0)],
            Some(S_IOERR),
        ),
        ("half a sector", T_IN, vec![head, data(a + DATA, 256, 2), last(0)], Some(S_IOERR)),
        ("a sector and a byte", T_OUT, vec![head, desc(a + DATA, 513, F_NEXT, 2), last(0)], Some(S_IOERR)),
        ("an id in 19 bytes", T_GET_ID, vec![head, data(a + DATA, 19, 2), last(0)], Some(S_IOERR)),
        ("a nested table", T_IN, vec![desc(a + TABLE, 32, F_INDIRECT, 0)], None),
        ("a table with next", T_IN, vec![desc(a + TABLE + 64, 48, F_INDIRECT | F_NEXT, 1), last(0)], None),
        ("a table of no bytes", T_IN, vec![desc(a + TABLE + 64, 0, F_INDIRECT, 0)], None),
        ("a table of 17 bytes", T_IN, vec![desc(a + TABLE + 64, 17, F_INDIRECT, 0)], None),
        ("a table of nearly 4 GiB", T_IN, vec![desc(a + TABLE + 64, 0xffff_fff0, F_INDIRECT, 0)], None),
        ("a table in no memory", T_IN, vec![desc(hole, 48, F_INDIRECT, 0)], None),
        ("a table that wraps around", T_IN, vec![desc(u64::MAX - 15, 48, F_INDIRECT, 0)], None),
        ("a table whose next is outside", T_IN, vec![desc(a + TABLE + 128, 32, F_INDIRECT, 0)], None),
        ("a table that is a loop", T_IN, vec![desc(a + TABLE + 192, 32, F_INDIRECT, 0)], None),
        ("a table longer than the ring", T_IN, vec![desc(a + TABLE + 0x1000, 16 * 200, F_INDIRECT, 0)], None),
        (
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

    for (name, kind, chain, status) in cases {
        scene.header(kind, 8);
        scene.ram.fill(a + DATA, 0x2000, 0x77);
        let start = Instant::now();
        let used = scene.chain(&chain).context(name)?;
        let took = start.elapsed();
        ensure!(took < Duration::from_secs(2), "{name}: took {took:?}");
        match status {
            Some(status) => {
                ensure!(scene.status() == status, "{name}: status {:#x}", scene.status());
                ensure!(used.len == 1, "{name}: {used:?}");
            }
            None => ensure!(used.len == 0, "{name}: {used:?}"),
        }
        let untouched = scene.ram.read(a + DATA, 0x2000).iter().all(|byte| *byte == 0x77);
        ensure!(untouched, "{name}: memory was written");
        scene.expect_good(name)?;
    }
    scene.end()
}

/// What looks odd and is allowed (virtio 1.3, §2.7.4.1, §2.7.5.3): the other half of classes 4 and 17.
#[test]
fn odd_but_legal_chains_are_carried_out() -> Result<()> {
    let mut scene = Scene::new(Options::default())?;
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
    for (name, chain) in cases {
        if name.starts_with("a table behind") {
            // Its indices count from its own start.
            put(&scene, 16, desc(a + DATA, 512, F_NEXT | F_WRITE, 1));
        }
        scene.header(T_IN, 64);
        let used = scene.chain(&chain).context(name)?;
        ensure!(scene.status() == S_OK && used.len == 513, "{name}: {used:?}, status {}", scene.status());
        scene.expect_good(name)?;
    }
    scene.end()
}

/// Class 7: every number in a request that could overflow or point elsewhere.
#[test]
fn numbers_at_the_edge_are_refused_and_touch_nothing() -> Result<()> {
    let mut scene = Scene::new(Options::default())?;
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
    for kind in [T_IN, T_OUT] {
        for sector in edges {
            scene.header(kind, sector);
            let data = Segment { addr: a + DATA, len: 1024, write: kind == T_IN };
            let head = scene.ring.chain(&[Segment::out(a, 16), data, Segment::into(a + STATUS, 1)])?;
            let used = scene.send(head)?;
            ensure!(scene.status() == S_IOERR && used.len == 1, "type {kind}, sector {sector:#x}");
        }
    }
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
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        for (body, status) in &bad {
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
            ensure!(scene.status() == expected, "type {kind}, {body:x?}: status {}", scene.status());
        }
    }
    scene.expect_good("numbers at the edge")?;
    scene.end()
}

/// Class 20: what was not negotiated is refused.
#[test]
fn features_that_were_not_accepted_are_refused() -> Result<()> {
    let mut scene = Scene::new(Options { without: F_DISCARD | F_WRITE_ZEROES, ..Options::default() })?;
    let a = scene.area;
    for kind in [T_DISCARD, T_WRITE_ZEROES] {
        scene.header(kind, 0);
        scene.ram.write(a + DATA, &[0, 0, 0, 0, 0, 0, 0, 0, 128, 0, 0, 0, 0, 0, 0, 0]);
        let chain = [Segment::out(a, 16), Segment::out(a + DATA, 16), Segment::into(a + STATUS, 1)];
        let head = scene.ring.chain(&chain)?;
        scene.send(head)?;
        ensure!(scene.status() == S_UNSUPP, "type {kind}: {}", scene.status());
    }
    let errors = scene.site.operator.show("attacker")?.io.errors;
    ensure!(errors == 2, "two refused requests, {errors} errors counted");
    scene.expect_good("refused features")?;
    scene.end()
}

/// Class 18: no byte beyond the answer, no stale byte in it.
#[test]
fn no_more_is_written_than_is_said() -> Result<()> {
    let mut scene = Scene::new(Options::default())?;
    let a = scene.area;
    for (kind, len, wrote, status) in [
        (T_GET_ID, 4096u32, 20u32, S_OK),
        (T_IN, 4096, 4096, S_OK),
        (T_FLUSH, 4096, 0, S_OK),
        (99, 4096, 0, S_UNSUPP),
    ] {
        scene.header(kind, 4096);
        scene.ram.fill(a + DATA, 0x2000, 0x77);
        let chain = [Segment::out(a, 16), Segment::into(a + DATA, len), Segment::into(a + STATUS, 1)];
        let head = scene.ring.chain(&chain)?;
        let used = scene.send(head)?;
        ensure!(scene.status() == status, "type {kind}: status {}", scene.status());
        ensure!(used.len <= wrote + 1, "type {kind}: {used:?}");
        let memory = scene.ram.read(a + DATA, 0x2000);
        ensure!(memory[wrote as usize..].iter().all(|byte| *byte == 0x77), "type {kind} wrote too much");
    }
    scene.end()
}

/// Classes 2 and 3: indices that no driver can have.
#[test]
fn a_broken_avail_index_stops_only_its_queue_and_costs_no_time() -> Result<()> {
    let mut scene = Scene::new(Options::default())?;
    for ahead in [129u16, 200, 32_768, 65_535] {
        let good = scene.ring.next_avail();
        scene.ring.force_avail_idx(good.wrapping_add(ahead));
        scene.ring.kick()?;
        thread::sleep(Duration::from_millis(20));
        ensure!(scene.machine.queue(1)?.read(0, 4096)?.is_ok(), "the other queue");
        // The driver comes to its senses.
        scene.ring.force_avail_idx(good);
        scene.ring.kick()?;
        scene.ring.publish()?;
        scene.expect_good("a broken index")?;
    }
    // A ring that stays broken is not looked at again and again.
    let good = scene.ring.next_avail();
    scene.ring.force_avail_idx(good.wrapping_add(3000));
    scene.ring.kick()?;
    thread::sleep(Duration::from_millis(50));
    scene.machine.queue(1)?.flush()?;
    ensure!(scene.machine.stop_queue(0)? == good, "a broken queue can be stopped");
    scene.ring.force_avail_idx(good);
    scene.machine.start_queue(0)?;
    scene.expect_good("a queue that was broken and stopped")?;
    scene.end()
}

#[test]
fn a_broken_ring_burns_no_processor_time() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 60)?;
    let mut machine = site.machine("attacker", SIZE, Options::default())?;
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
fn a_head_that_is_in_flight_or_outside_harms_only_its_own_guest() -> Result<()> {
    let mut scene = Scene::new(Options::default())?;
    let mut driver = Driver::start(scene.machine.take_queue(1)?)?;
    let seq = driver.sizes.seq;
    let head = driver.park(seq)?;
    for _ in 0..10 {
        driver.queue.ring.offer(head);
        driver.queue.ring.publish()?;
        // The second use comes back at once and empty; the first stays with the device.
        let used = driver.queue.ring.wait_used(PATIENCE)?;
        ensure!(used == Used { id: u32::from(head), len: 0 }, "{used:?}");
    }
    for outside in [128u16, 129, 4096, u16::MAX] {
        scene.ring.offer(outside);
        scene.ring.publish()?;
        scene.expect_good("a head outside the ring")?;
    }
    scene.end()
}

/// Class 6: a second thread changes chains while the device reads them. Nothing outside what the chain may ever name is
/// touched: neither the guard memory nor the guard blocks.
#[test]
fn chains_that_change_while_they_are_read_touch_nothing_they_never_named() -> Result<()> {
    for medium in [Medium::Nvram, Medium::Ssd] {
        let mut scene = Scene::on(medium, Options::default())?;
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
        let stop = Arc::new(AtomicBool::new(false));
        let desc_table = scene.ring.shape.desc;
        let flipper = {
            let (ram, stop) = (Arc::clone(&ram), Arc::clone(&stop));
            let mut rng = rng(seed("wire_hostile/flipper"));
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..64 {
                        match rng.random_range(0..6) {
                            0 => ram.write(a, &[[0u8, 1, 4, 8, 99][rng.random_range(0..5)]]),
                            1 => ram.write(a + 8, &[[2u8, 4][rng.random_range(0..2)]; 1]),
                            // Any descriptor of the ring: another buffer, another length, other flags.
                            2 => {
                                let at = desc_table + 16 * rng.random_range(0..128);
                                let buffer: u64 = buffers[rng.random_range(0..2)];
                                ram.write(at, &buffer.to_le_bytes());
                            }
                            3 => {
                                let at = desc_table + 16 * rng.random_range(0..128) + 8;
                                let len = [0u32, 1, 16, 512, 4096, 16384][rng.random_range(0..6)];
                                ram.write(at, &len.to_le_bytes());
                            }
                            4 => {
                                let at = desc_table + 16 * rng.random_range(0..128) + 12;
                                ram.write(at, &[[0u8, 1, 2, 3][rng.random_range(0..4)], 0]);
                            }
                            _ => {
                                let at = desc_table + 16 * rng.random_range(0..128) + 14;
                                ram.write(at, &[rng.random_range(0..128), 0]);
                            }
                        }
                    }
                }
            })
        };
        let until = Instant::now() + Duration::from_secs(3);
        let mut sent = 0u64;
        while Instant::now() < until {
            for head in 0..64u16 {
                let start = head * 2;
                scene.ring.set(start, desc(a, 16, F_NEXT, start + 1));
                scene.ring.set(start + 1, desc(buffers[0], 4096, F_WRITE, 0));
                scene.ring.offer(start);
            }
            scene.ring.publish()?;
            for _ in 0..64 {
                scene.ring.wait_used(PATIENCE)?;
                sent += 1;
            }
        }
        stop.store(true, Ordering::Relaxed);
        flipper.join().map_err(|_| anyhow!("the flipper panicked"))?;
        println!("{sent} chains under change");
        ensure!(ram.read(memory, 0x8000) == guard, "memory before the buffers was written");
        ensure!(ram.read(memory + 0xc000, 0x8000) == guard, "memory between the buffers was written");
        let queue = scene.machine.queue(1)?;
        for block in [1, 3, 5] {
            let found = queue.read(block * BLOCK, usize::try_from(BLOCK)?)?;
            ensure!(found == Ok(guard_block.clone()), "block {block} was written");
        }
        scene.end()?;
    }
    Ok(())
}

/// Bytes of chance as messages and as requests.
#[test]
fn noise_on_the_socket_and_in_the_ring_is_survived() -> Result<()> {
    let mut scene = Scene::new(Options::default())?;
    let mut rng = rng(seed("wire_hostile/noise"));
    let kinds = [T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES];
    let (a, ram) = (scene.area, Arc::clone(&scene.ram));
    for round in 0..4000 {
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
        scene.chain(&chain).with_context(|| format!("round {round}: {chain:x?}"))?;
    }
    scene.expect_good("noise")?;
    for _ in 0..300 {
        let mut bytes = vec![0; rng.random_range(1..200)];
        rng.fill(&mut bytes[..]);
        if rng.random() {
            let plausible = header(rng.random_range(1..44), 1, rng.random_range(0..64));
            bytes.splice(0..0, plausible);
        }
        let other = Frontend::connect(&scene.site.socket("attacker"))?;
        // It waits behind the machine that is connected; its noise is read once that leaves.
        other.send_raw(&bytes, &[])?;
        drop(other);
    }
    scene.machine.reconnect()?;
    scene.expect_good("noise on other connections")?;
    scene.end()
}

/// Damaged requests of the guest channel, byte by byte.
#[test]
fn noise_on_the_guest_channel_is_answered() -> Result<()> {
    let mut scene = Scene::new(Options::default())?;
    let mut driver = Driver::start(scene.machine.take_queue(1)?)?;
    let mut rng = rng(seed("wire_hostile/channel"));
    let epoch = driver.epoch();
    for round in 0..3000 {
        let kind = RequestType::ALL[rng.random_range(0..7)];
        if kind == RequestType::Wait {
            continue;
        }
        let mut body = match kind {
            RequestType::Hello => Request::Hello { version: 1, features: 0, driver: "noise".into() }.encode(),
            RequestType::State => Request::State { epoch, flags: 0, start: 0 }.encode(),
            _ => {
                let mut body = epoch.to_le_bytes().to_vec();
                body.resize(rng.random_range(8..120), 0);
                body
            }
        };
        for _ in 0..rng.random_range(1..6) {
            let at = rng.random_range(0..body.len());
            body[at] = rng.random();
        }
        body.truncate(rng.random_range(0..=body.len()));
        let room = rng.random_range(0..200);
        let (answer, _) = driver.raw(kind as u32, &body, room).with_context(|| format!("round {round}"))?;
        ensure!([S_OK, S_IOERR].contains(&answer.status), "round {round}: {answer:?}");
    }
    driver.hello()?;
    scene.expect_good("noise on the guest channel")?;
    scene.end()
}
