// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front-end that breaks every rule: at most its own connection ends, no descriptor leaks, and the neighbour's disk never
//! notices. The table of classes is in `wire_hostile.rs`; how rounds are judged is said in `mock::arena`.
//!
//! Long form: `cargo xtask long hostile`; this file alone:
//! `VSSD_HOSTILE_ROUNDS=10000 cargo test -p vssd-tests --release --test wire_hostile_frontend -- --test-threads=1`

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde_json::{Value, json};
use vssd_tests::mock::arena::{ATTACKER, Arena, Verdict};
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::frontend::{F_NEED_REPLY, header, request, words};
use vssd_tests::mock::machine::{Machine, Options, addresses, describe, state};
use vssd_tests::mock::queue::{S_OK, T_IN, T_OUT};
use vssd_tests::mock::ram::GuestRam;
use vssd_tests::mock::ring::Segment;
use vssd_tests::mock::site::MIB;
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::scenario::Medium;

const SIZE: u64 = 32 * MIB;

/// What is said, and the messages that say it.
type Offence = (&'static str, Vec<(u32, Vec<u8>)>);

fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(request, 1, u32::try_from(payload.len()).unwrap_or(0));
    bytes.extend_from_slice(payload);
    bytes
}

/// Sends one message on a fresh connection. Whatever it was, an honest question behind it is answered or the connection is
/// over.
fn offend(arena: &Arena, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Verdict> {
    let link = arena.connect()?;
    let sent = link.send_raw(bytes, fds).is_ok() && link.send(request::GET_FEATURES, 0, &[], &[]).is_ok();
    if sent && link.receive().is_ok() {
        return Ok(Verdict::Pass);
    }
    ensure!(link.ends(), "nothing was used: the connection neither answers nor ends");
    Ok(Verdict::Reject)
}

/// Class 10: messages of every kind with 0 to 32 descriptors each, as many as a connection takes.
#[test]
fn class_10_messages_with_any_number_of_descriptors_leak_none() -> Result<()> {
    let mut arena = Arena::new("class_10", Medium::Nvram, SIZE)?;
    let mut rng = rng(seed("class_10"));
    let files: Vec<OwnedFd> =
        (0..32).map(|_| Ok(memfd_create("x", MemfdFlags::CLOEXEC)?)).collect::<Result<_>>()?;
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let mut link = arena.connect()?;
    // Ten messages a round.
    for _ in arena.rounds(10_000) {
        let mut verdict = Verdict::Pass;
        for _ in 0..10 {
            // Half of them would be right with one descriptor.
            let (number, payload) = match rng.random_range(0..6) {
                0 => (request::SET_VRING_CALL, words(&[rng.random_range(0..3)])),
                1 => (request::SET_VRING_ERR, words(&[rng.random_range(0..3)])),
                2 => (request::SET_BACKEND_REQ_FD, Vec::new()),
                3 => (rng.random_range(0..50), vec![0xff; rng.random_range(0..70)]),
                4 => (rng.random_range(0..50), vec![0; rng.random_range(0..70)]),
                _ => (request::GET_FEATURES, Vec::new()),
            };
            let count = if rng.random() { 1 } else { rng.random_range(0..=32) };
            if link.send_raw(&message(number, &payload), &fds[..count]).is_err() || link.has_ended() {
                verdict = Verdict::Reject;
                link = arena.connect()?;
            }
        }
        arena.judge("ten messages", Ok(verdict))?;
    }
    drop(link);
    // Every request number with no payload, a short one, an overlong one, and some numbers of descriptors.
    for number in (0..50).chain([0x7f, 1000, u32::MAX]) {
        for payload in [&[][..], &[0xff; 7], &[0; 8], &[0xff; 64], &[0x41; 4000]] {
            for count in [0, 1, 9, 32] {
                let verdict = offend(&arena, &message(number, payload), &fds[..count]);
                arena.judge("one message", verdict)?;
            }
        }
    }
    for (number, flags, size) in [
        (1, 0, 0),
        (1, 2, 0),
        (1, 1 | 4, 0),
        (1, u32::MAX, 0),
        (1, 1, u32::MAX),
        (5, 1, 0x7fff_ffff),
        (24, 1, 4096 + 1),
    ] {
        // A header that promises more than comes makes the daemon wait for it: no question can follow.
        let link = arena.connect()?;
        link.send_raw(&header(number, flags, size), &[])?;
        drop(link);
        arena.judge("a header that lies", Ok(Verdict::Reject))?;
    }
    for len in 1..12 {
        let link = arena.connect()?;
        link.send_raw(&header(1, 1, 0)[..len], &[])?;
        drop(link);
        arena.judge("a header cut short", Ok(Verdict::Reject))?;
    }
    arena.end()
}

/// Class 11: dirty logs whose size and offset overflow, or that do not cover memory.
#[test]
fn class_11_dirty_logs_that_cannot_be_are_refused() -> Result<()> {
    let mut arena = Arena::new("class_11", Medium::Nvram, SIZE)?;
    let file = memfd_create("log", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, 4096)?;
    let values = [0, 1, 4095, 4096, 4097, 1 << 32, 1 << 47, 1 << 63, u64::MAX - 4095, u64::MAX];
    let machine = arena.machine(Options::default())?;
    drop(machine);
    for round in arena.rounds(3000) {
        let (size, offset) = (values[round % 10], values[round / 10 % 10]);
        let fds = vec![file.as_fd(); round / 100 % 3];
        let verdict = offend(&arena, &message(request::SET_LOG_BASE, &words(&[size, offset])), &fds);
        arena.judge("a log base", verdict)?;
    }
    arena.end()
}

/// Class 14: memory tables that are empty, too long, overlapping, wrapping, or longer than their files.
#[test]
fn class_14_memory_tables_that_cannot_be_are_refused() -> Result<()> {
    let mut arena = Arena::new("class_14 tables", Medium::Nvram, SIZE)?;
    let ram = GuestRam::standard()?;
    let region = &ram.regions()[0];
    let good = describe(region);
    let table = |regions: &[Vec<u8>]| {
        let mut bytes = words(&[regions.len() as u64]);
        regions.iter().for_each(|r| bytes.extend(r));
        bytes
    };
    let wild = |guest: u64, len: u64, user: u64, offset: u64| words(&[guest, len, user, offset]);
    let tables = [
        (vec![], 0),
        (vec![good.clone(); 2], 2),
        (vec![good.clone(); 9], 9),
        (vec![good.clone()], 0),
        (vec![good.clone()], 2),
        (vec![wild(0, 0, 0, 0)], 1),
        (vec![wild(u64::MAX - 4095, 8192, 0, 0)], 1),
        (vec![wild(0, 4096, u64::MAX - 4095, 0)], 1),
        (vec![wild(0, u64::MAX, 0, 0)], 1),
        (vec![wild(0, 1 << 62, 0, 0)], 1),
        (vec![wild(0, 4096, 0, u64::MAX - 4095)], 1),
        (vec![wild(0, 4096, 0, 1 << 40)], 1),
        (vec![wild(0, 4096, 0, 123)], 1),
        (vec![wild(0, region.len * 2, 0, region.offset)], 1),
    ];
    for round in arena.rounds(4000) {
        let (regions, count) = &tables[round % tables.len()];
        let fds = vec![region.file(); *count];
        let verdict = offend(&arena, &message(request::SET_MEM_TABLE, &table(regions)), &fds);
        arena.judge("a table", verdict)?;
    }
    arena.end()
}

/// Class 14: the table is exchanged, and regions come and go, while a request waits and others run. What the daemon maps
/// stays bounded.
#[test]
fn class_14_memory_tables_that_change_under_io_neither_pile_up_nor_stop_it() -> Result<()> {
    let mut arena = Arena::new("class_14 changes", Medium::Ssd, SIZE)?;
    let mut machine = arena.machine(Options::default())?;
    let mut driver = Driver::start(machine.take_queue(1)?)?;
    let seq = driver.sizes.seq;
    driver.park(seq)?;
    let maps = |arena: &mut Arena| -> Result<usize> {
        Ok(std::fs::read_to_string(format!("/proc/{}/maps", arena.site.daemon.pid()?))?.lines().count())
    };
    let before = maps(&mut arena)?;
    let mut most = before;
    for round in arena.rounds(3000) {
        let queue = machine.queue(0)?;
        let memory = queue.bounce();
        let mut heads = Vec::new();
        for i in 0..8 {
            heads.push(queue.submit(T_IN, i * 128, &[Segment::into(memory + i * 65_536, 65_536)])?);
        }
        let mut verdict = machine.share_memory().map(|()| Verdict::Pass);
        for head in heads {
            let answer = machine.queue(0)?.wait(head, PATIENCE);
            verdict = verdict.and_then(|verdict| {
                ensure!(answer?.status == S_OK, "a read failed");
                Ok(verdict)
            });
        }
        arena.judge("a table exchanged under reads", verdict)?;
        if round % 100 == 0 {
            most = most.max(maps(&mut arena)?);
        }
    }
    println!("class_14 changes: {before} mappings before, at most {most}");
    // Each table is three mappings; on a busy machine a worker may be some dozens of them behind.
    ensure!(most <= before + 600, "{before} mappings have become {most}");
    // The request that was parked all the time is answered where the guest expects it.
    arena.site.operator.resize(ATTACKER, SIZE - MIB, &json!({}))?;
    ensure!(driver.wait_answer(PATIENCE)?.is_some(), "the parked request was lost");
    drop(driver);
    machine.disconnect();
    arena.end()
}

#[test]
fn class_15_nothing_is_written_behind_the_answer_to_a_stop_on_nvram() -> Result<()> {
    answers_behind_a_stop("class_15 nvram", Medium::Nvram)
}

#[test]
fn class_15_nothing_is_written_behind_the_answer_to_a_stop_on_an_ssd() -> Result<()> {
    answers_behind_a_stop("class_15 ssd", Medium::Ssd)
}

/// Class 15: a queue is stopped, or the device reset, while its requests are under way. Behind the answer nothing is
/// written any more.
fn answers_behind_a_stop(class: &'static str, medium: Medium) -> Result<()> {
    let mut arena = Arena::new(class, medium, SIZE)?;
    let mut machine = arena.machine(Options::default())?;
    for round in arena.rounds(600) {
        let queue = machine.queue(0)?;
        let memory = queue.bounce();
        for i in 0..32 {
            let kind = if i % 4 == 0 { T_OUT } else { T_IN };
            let segment = Segment { addr: memory + i * 16_384, len: 16_384, write: kind == T_IN };
            queue.prepare(kind, i * 32, &[segment])?;
        }
        queue.ring.publish()?;
        let reset = round % 2 == 0;
        let stopped = if reset {
            machine.link()?.set(request::RESET_DEVICE, &[], &[])
        } else {
            machine.link()?.get(request::GET_VRING_BASE, &state(0, 0), &[]).map(drop)
        };
        let verdict = stopped.and_then(|()| {
            machine.ram.fill(memory, 32 * 16_384, 0x77);
            let used = machine.ram.load(machine.shape(0).used_idx());
            if round % 20 < 2 {
                thread::sleep(Duration::from_millis(3));
            }
            let untouched = machine.ram.read(memory, 32 * 16_384).iter().all(|byte| *byte == 0x77);
            ensure!(untouched, "memory was written behind the answer");
            ensure!(machine.ram.load(machine.shape(0).used_idx()) == used, "a request was answered late");
            Ok(Verdict::Pass)
        });
        arena.judge(if reset { "a reset" } else { "a stop" }, verdict)?;
        machine = replaced(&arena, machine)?;
        machine.disconnect();
        machine.connect()?;
        machine.begin_anew()?;
        machine.run()?;
    }
    machine.disconnect();
    arena.end()
}

/// Class 16: kick, call, enable and chains in every order; no chain is forgotten, no interrupt lost.
#[test]
fn class_16_no_kick_is_lost_in_whatever_order_a_queue_is_set_up() -> Result<()> {
    let mut arena = Arena::new("class_16", Medium::Nvram, SIZE)?;
    let mut rng = rng(seed("class_16"));
    let mut machine = arena.machine(Options::default())?;
    for _ in arena.rounds(10_000) {
        let verdict = shuffled_start(&mut machine, &mut rng).map(|()| Verdict::Pass);
        arena.judge("a shuffled start", verdict)?;
    }
    machine.disconnect();
    arena.end()
}

fn shuffled_start(machine: &mut Machine, rng: &mut StdRng) -> Result<()> {
    machine.stop_queue(0)?;
    let shape = machine.shape(0);
    let base = machine.ram.load(shape.used_idx());
    let mut steps: Vec<u8> = (0..6).collect();
    for i in (1..steps.len()).rev() {
        steps.swap(i, rng.random_range(0..=i));
    }
    let mut head = None;
    for (i, step) in steps.iter().enumerate() {
        let (link, done) = (machine.link()?, &steps[..i]);
        match step {
            // A running queue has its base already.
            0 if done.contains(&1) && done.contains(&3) => {}
            0 => link.set(request::SET_VRING_BASE, &state(0, base.into()), &[])?,
            1 => link.set(request::SET_VRING_KICK, &words(&[0]), &[shape.kick.as_fd()])?,
            2 => link.set(request::SET_VRING_CALL, &words(&[0]), &[shape.call.as_fd()])?,
            3 => link.set(request::SET_VRING_ENABLE, &state(0, 1), &[])?,
            4 => {
                let queue = machine.queue(0)?;
                let memory = Segment::into(queue.bounce(), 4096);
                head = Some(queue.submit(T_IN, 64, &[memory])?);
            }
            // A kick that nobody asked for.
            _ => drop(rustix::io::write(&shape.kick, &1u64.to_ne_bytes())),
        }
    }
    let head = head.context("no request")?;
    let answer = machine.queue(0)?.wait(head, PATIENCE)?;
    ensure!(answer.status == S_OK, "{answer:?}");
    Ok(())
}

/// Class 24: an operator's program that misbehaves holds up neither guests nor other operators.
#[test]
fn class_24_nonsense_on_the_control_socket_harms_nobody() -> Result<()> {
    let mut arena = Arena::new("class_24", Medium::Nvram, SIZE)?;
    let socket = arena.site.control_socket();
    let mut rng = rng(seed("class_24"));
    // Programs that say half a line and then nothing, for as long as this lasts.
    let mut sleepers = Vec::new();
    for _ in 0..20 {
        let mut sleeper = UnixStream::connect(&socket)?;
        // It may be turned away when there are too many.
        let _ = sleeper.write_all(b"{\"jsonrpc\":");
        sleepers.push(sleeper);
    }
    let names =
        ["", "..", "../x", "a/b", "-x", ".hidden", "a\0b", "x y", &"n".repeat(32), &"n".repeat(5000), "ü"];
    for round in arena.rounds(5000) {
        let name = names[round % names.len()];
        let bad = match round % 6 {
            0 => json!({ "name": name, "size_bytes": MIB }),
            1 => json!({ "name": "late", "size_bytes": u64::MAX }),
            2 => json!({ "name": "late", "size_bytes": 0 }),
            3 => json!({ "name": ATTACKER, "size_bytes": MIB }),
            4 => json!({ "name": "late", "size_bytes": -1 }),
            _ => json!({ "name": "late", "size_bytes": MIB, "unknown": true }),
        };
        let verdict = match arena.site.operator.call::<Value>("device.create", &bad) {
            Err(error) if format!("{error:#}").contains("E_") => Ok(Verdict::Reject),
            Err(error) => Err(error),
            Ok(made) => Err(anyhow::anyhow!("{bad} made {made}")),
        };
        arena.judge("a vSSD that cannot be", verdict)?;
        if round % 10 == 0 {
            let mut noise = vec![0u8; rng.random_range(1..3000)];
            rng.fill(&mut noise[..]);
            noise.push(b'\n');
            let mut stream = UnixStream::connect(&socket)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let _ = stream.write_all(&noise);
            // It is answered with an error, or cut off.
            let verdict = match stream.read(&mut [0; 64]) {
                Ok(_) => Ok(Verdict::Reject),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(Verdict::Reject),
                Err(error) => Err(error.into()),
            };
            arena.judge("noise", verdict)?;
        }
    }
    // A line without end.
    let mut endless = UnixStream::connect(&socket)?;
    endless.set_write_timeout(Some(PATIENCE))?;
    let cut = (0..64).any(|_| endless.write_all(&[b'x'; 1 << 16]).is_err());
    ensure!(cut, "a line of 4 MiB is taken");
    drop(sleepers);
    arena.end()
}

/// The machine, or a new one in its place when drivers have come and gone in it so often that it runs out of memory.
fn replaced(arena: &Arena, mut machine: Machine) -> Result<Machine> {
    if machine.ram.alloc(0, 1) < 40 << 20 {
        return Ok(machine);
    }
    machine.disconnect();
    arena.machine(Options::default())
}

/// Says `messages` while requests are under way. A monitor that starts over is served afterwards.
fn under_load(machine: &mut Machine, messages: &[(u32, Vec<u8>)]) -> Result<Verdict> {
    let queue = machine.queue(0)?;
    let memory = Segment::into(queue.bounce(), 65_536);
    for i in 0..32 {
        queue.submit(T_IN, i * 128, &[memory])?;
    }
    let mut verdict = Verdict::Pass;
    for (number, payload) in messages {
        // Refused, obeyed, or the end of the connection: all are right.
        let said = machine.link()?.send(*number, F_NEED_REPLY, payload, &[]).is_ok();
        let answer = machine.link()?.receive();
        if !said || answer.and_then(|answer| answer.u64()).map_or(true, |code| code != 0) {
            verdict = Verdict::Reject;
        }
    }
    machine.disconnect();
    machine.connect()?;
    machine.begin_anew()?;
    machine.run()?;
    ensure!(machine.queue(0)?.read(0, 4096)?.is_ok(), "a monitor that starts over is not served");
    Ok(verdict)
}

/// Class 9: a machine's rings are pulled away under load.
#[test]
fn class_09_a_running_queue_survives_or_ends_whatever_is_said_about_it() -> Result<()> {
    let mut arena = Arena::new("class_09", Medium::Ssd, SIZE)?;
    let socket = arena.site.socket(ATTACKER);
    let wild: Vec<Offence> = vec![
        ("another size", vec![(request::SET_VRING_NUM, state(0, 64))]),
        ("size 0", vec![(request::SET_VRING_NUM, state(0, 0))]),
        ("size 3", vec![(request::SET_VRING_NUM, state(0, 3))]),
        ("size 65536", vec![(request::SET_VRING_NUM, state(0, 65_536))]),
        ("size 2^32-128", vec![(request::SET_VRING_NUM, state(0, u32::MAX - 127))]),
        ("queue 256", vec![(request::SET_VRING_NUM, state(256, 128))]),
        ("queue 2^31", vec![(request::SET_VRING_ENABLE, state(1 << 31, 1))]),
        ("queue 2^32-1", vec![(request::GET_VRING_BASE, state(u32::MAX, 0))]),
        ("base 65536", vec![(request::SET_VRING_BASE, state(0, 65_536))]),
        ("another base", vec![(request::SET_VRING_BASE, state(0, 7))]),
        ("an enable of 2", vec![(request::SET_VRING_ENABLE, state(0, 2))]),
        ("a kick without a descriptor", vec![(request::SET_VRING_KICK, words(&[0x100]))]),
        ("a call without a descriptor", vec![(request::SET_VRING_CALL, words(&[0x100]))]),
        ("a kick for queue 255", vec![(request::SET_VRING_KICK, words(&[0xff]))]),
        ("features not offered", vec![(request::SET_FEATURES, words(&[u64::MAX]))]),
        ("other features while it runs", vec![(request::SET_FEATURES, words(&[1 << 30 | 1 << 32]))]),
        ("protocol features not offered", vec![(request::SET_PROTOCOL_FEATURES, words(&[u64::MAX]))]),
        ("a dirty log", vec![(request::SET_LOG_BASE, words(&[u64::MAX, u64::MAX]))]),
        ("all memory gone", vec![(request::SET_MEM_TABLE, words(&[0]))]),
        ("a reset", vec![(request::RESET_DEVICE, Vec::new())]),
        ("another owner", vec![(request::RESET_OWNER, Vec::new()), (request::SET_OWNER, Vec::new())]),
    ];
    let mut machine = arena.machine(Options::default())?;
    for round in arena.rounds(600) {
        let (name, messages) = &wild[round % wild.len()];
        let verdict = under_load(&mut machine, messages);
        arena.judge(name, verdict)?;
        machine = replaced(&arena, machine)?;
    }
    // Ring addresses that are misaligned, in a hole, at the end of memory, unknown.
    let shape = machine.shape(0);
    let good = addresses(&machine.ram, 0, &shape);
    for field in 0..3usize {
        for value in [1u64, 0, u64::MAX, machine.ram.user(machine.ram.seam() + (16 << 20) - 16), 0xdead_0000]
        {
            let mut payload = good.clone();
            payload[8 + 8 * field..16 + 8 * field].copy_from_slice(&value.to_ne_bytes());
            let mut other = Machine::new(&socket, Options::default(), GuestRam::standard()?)?;
            machine.disconnect();
            other.connect()?;
            other.share_memory()?;
            let link = other.link()?;
            link.set(request::SET_VRING_NUM, &state(0, 128), &[])?;
            let _ = link.set(request::SET_VRING_ADDR, &payload, &[]);
            let _ = link.set(request::SET_VRING_KICK, &words(&[0]), &[shape.kick.as_fd()]);
            let _ = link.set(request::SET_VRING_ENABLE, &state(0, 1), &[]);
            drop(other);
        }
    }
    machine.reconnect()?;
    ensure!(machine.queue(0)?.read(0, 4096)?.is_ok(), "after bad ring addresses");
    machine.disconnect();
    arena.end()
}

/// Class 12: the inflight region is scribbled over while it is in use, and comes back scribbled over.
#[test]
fn class_12_a_scribbled_inflight_region_harms_only_its_own_guest() -> Result<()> {
    let mut arena = Arena::new("class_12", Medium::Nvram, SIZE)?;
    let mut machine = arena.machine(Options::default())?;
    let mut rng = rng(seed("wire_hostile/inflight"));
    for round in arena.rounds(600) {
        let (case, scribble) =
            [("ones", 0xff), ("marks", 1), ("chance", 2), ("a circle", 3), ("counters at their limit", 4)]
                [round % 5];
        let running = round % 2 == 0;
        let verdict = scribbled(&mut machine, running, scribble, &mut rng).map(|()| Verdict::Pass);
        arena.judge(&format!("{case}{}", if running { ", while it runs" } else { "" }), verdict)?;
        machine = replaced(&arena, machine)?;
    }
    machine.disconnect();
    arena.end()
}

fn scribbled(machine: &mut Machine, running: bool, scribble: u8, rng: &mut StdRng) -> Result<()> {
    if running {
        let queue = machine.queue(0)?;
        let memory = Segment::into(queue.bounce(), 4096);
        for i in 0..32 {
            queue.submit(T_IN, i * 8, &[memory])?;
        }
    } else {
        machine.disconnect();
    }
    let file = machine.inflight_file()?;
    ensure!(ftruncate(file, 0).is_err(), "the region can be shortened under the daemon");
    let len = usize::try_from(rustix::fs::fstat(file)?.st_size)?;
    let mut bytes = vec![0; len];
    match scribble {
        2 => rng.fill(&mut bytes[..]),
        3 => {
            // Plausible: every head is in flight, with counters in any order, in a batch that leads in a circle.
            for (at, entry) in bytes.chunks_mut(16).enumerate() {
                entry[0] = u8::from(at % 3 != 0);
                entry[6] = rng.random_range(0..128);
                entry[8] = rng.random();
            }
        }
        4 => {
            for entry in bytes.chunks_mut(16) {
                entry[0] = 1;
                entry[8..].fill(0xff);
            }
        }
        byte => bytes.fill(byte),
    }
    rustix::io::pwrite(file, &bytes, 0)?;
    machine.disconnect();
    machine.connect()?;
    machine.run()?;
    // What is replayed is this guest's own; afterwards a driver starts over and is served.
    if rng.random_ratio(1, 8) {
        thread::sleep(Duration::from_millis(2));
    }
    machine.disconnect();
    machine.connect()?;
    machine.begin_anew()?;
    machine.run()?;
    ensure!(machine.queue(0)?.read(0, 4096)?.is_ok(), "a driver that starts over is not served");
    Ok(())
}

/// Class 12: descriptions of the region.
#[test]
fn class_12_inflight_regions_that_cannot_be_are_refused() -> Result<()> {
    let mut arena = Arena::new("class_12 descriptions", Medium::Nvram, SIZE)?;
    let ram = || GuestRam::new(&[(0, 16 << 20), (16 << 20, 1 << 20)]);
    let region = |size: u64, offset: u64, queues: u16, length: u16| {
        let mut bytes = words(&[size, offset]);
        bytes.extend(queues.to_ne_bytes());
        bytes.extend(length.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes
    };
    let file = memfd_create("inflight", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, 4096)?;
    let cases = [
        (request::GET_INFLIGHT_FD, region(0, 0, 0, 128), 0),
        (request::GET_INFLIGHT_FD, region(0, 0, 2, 0), 0),
        (request::GET_INFLIGHT_FD, region(0, 0, u16::MAX, 128), 0),
        (request::GET_INFLIGHT_FD, region(0, 0, 2, u16::MAX), 0),
        (request::SET_INFLIGHT_FD, region(4096, 0, u16::MAX, u16::MAX), 1),
        (request::SET_INFLIGHT_FD, region(u64::MAX, 0, 2, 128), 1),
        (request::SET_INFLIGHT_FD, region(1 << 40, 0, 16, 32768), 1),
        (request::SET_INFLIGHT_FD, region(4096, u64::MAX, 1, 128), 1),
        (request::SET_INFLIGHT_FD, region(4096, 1, 1, 128), 1),
        (request::SET_INFLIGHT_FD, region(4096, 0, 1, 128), 0),
        (request::SET_INFLIGHT_FD, region(4096, 0, 1, 128), 2),
    ];
    for round in arena.rounds(1000) {
        let (number, payload, fds) = &cases[round % cases.len()];
        let mut machine = Machine::new(&arena.site.socket(ATTACKER), Options::default(), ram()?)?;
        let fds = vec![file.as_fd(); *fds];
        let verdict = machine.connect().and_then(|()| {
            let refused = if *number == request::GET_INFLIGHT_FD {
                machine.link()?.get(*number, payload, &[]).is_err()
            } else {
                machine.link()?.set(*number, payload, &fds).is_err()
            };
            ensure!(refused, "message {number} with {payload:?} and {} descriptors is taken", fds.len());
            Ok(Verdict::Reject)
        });
        arena.judge(&format!("description {}", round % cases.len()), verdict)?;
    }
    arena.end()
}
