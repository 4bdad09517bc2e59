// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front-end that breaks every rule: at most its own connection ends, no descriptor leaks, and the neighbour's disk never
//! notices. Classes are those in which back-ends of this kind have been broken before.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;
use serde_json::json;
use vssd_tests::mock::frontend::{F_NEED_REPLY, Frontend, header, request, words};
use vssd_tests::mock::machine::{Machine, Options, addresses, describe, state};
use vssd_tests::mock::neighbour::Neighbour;
use vssd_tests::mock::queue::T_IN;
use vssd_tests::mock::ram::GuestRam;
use vssd_tests::mock::ring::Segment;
use vssd_tests::mock::site::{MIB, Site};
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::scenario::Medium;
use vssd_tests::wait::Deadline;

const SIZE: u64 = 32 * MIB;

/// What is said, and the messages that say it.
type Offence = (&'static str, Vec<(u32, Vec<u8>)>);

/// Sends one message on a fresh connection; says whether the daemon kept it. Then it must serve a new one.
fn offend(site: &Site, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<bool> {
    let link = Frontend::connect(&site.socket("attacker"))?;
    link.send_raw(bytes, fds)?;
    // Whatever it was, an honest question behind it is answered or the connection is over.
    let kept = link.send(request::GET_FEATURES, 0, &[], &[]).is_ok() && link.receive().is_ok();
    Ok(kept)
}

/// Classes 9, 10, 11, 14: single messages that no front-end should send.
#[test]
fn malformed_messages_end_at_most_their_own_connection() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    let neighbour = Neighbour::start(&mut site)?;
    site.operator.create("attacker", SIZE, &json!({}))?;
    let ram = GuestRam::standard()?;
    let files: Vec<OwnedFd> = (0..32)
        .map(|_| Ok(rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC)?))
        .collect::<Result<_>>()?;
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    drop(Machine::start(&site.socket("attacker"), Options::default())?);
    thread::sleep(Duration::from_millis(100));
    let base = site.descriptors()?;

    let message = |request: u32, payload: &[u8]| -> Vec<u8> {
        let mut bytes = header(request, 1, u32::try_from(payload.len()).unwrap_or(0));
        bytes.extend_from_slice(payload);
        bytes
    };
    // Every request number with no payload, a short one, an overlong one, and any number of descriptors.
    for number in (0..50).chain([0x7f, 1000, u32::MAX]) {
        for payload in [&[][..], &[0xff; 7], &[0; 8], &[0xff; 64], &[0x41; 4000]] {
            for count in [0, 1, 2, 9, 32] {
                offend(&site, &message(number, payload), &fds[..count])?;
            }
        }
    }
    // Headers that lie.
    for (request, flags, size) in [
        (1, 0, 0),
        (1, 2, 0),
        (1, 1 | 4, 0),
        (1, u32::MAX, 0),
        (1, 1, u32::MAX),
        (5, 1, 0x7fff_ffff),
        (24, 1, 4096 + 1),
    ] {
        offend(&site, &header(request, flags, size), &[])?;
    }
    for len in 1..12 {
        let link = Frontend::connect(&site.socket("attacker"))?;
        link.send_raw(&header(1, 1, 0)[..len], &[])?;
        drop(link);
    }
    // Memory tables: none, too many, overlapping, empty, wrapping, longer than the file.
    let region = &ram.regions()[0];
    let good = describe(region);
    let table = |regions: &[Vec<u8>]| {
        let mut bytes = words(&[regions.len() as u64]);
        regions.iter().for_each(|r| bytes.extend(r));
        bytes
    };
    let wild = |guest: u64, len: u64, user: u64, offset: u64| words(&[guest, len, user, offset]);
    for (regions, count) in [
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
    ] {
        let fds = vec![region.file(); count];
        offend(&site, &message(request::SET_MEM_TABLE, &table(&regions)), &fds)?;
    }
    let after = Machine::start(&site.socket("attacker"), Options::default())?;
    drop(after);
    neighbour.end()?;
    Deadline::after(PATIENCE)
        .until("descriptors to be given back", || Ok(site.descriptors()? <= base))
        .with_context(|| "descriptors leak")?;
    site.finish()
}

/// The machine, or a new one in its place when drivers have come and gone in it so often that it runs out of memory.
fn replaced(mut machine: Machine, socket: &Path) -> Result<Machine> {
    if machine.ram.alloc(0, 1) < 40 << 20 {
        return Ok(machine);
    }
    machine.disconnect();
    Machine::start(socket, Options::default())
}

/// Class 9 and 14 on a machine that runs: its rings and memory are pulled away under load.
#[test]
fn a_running_queue_survives_or_ends_whatever_is_said_about_it() -> Result<()> {
    let mut site = Site::new(Medium::Ssd, 100)?;
    let neighbour = Neighbour::start(&mut site)?;
    site.operator.create("attacker", SIZE, &json!({}))?;
    let socket = site.socket("attacker");
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
    let mut machine = Machine::start(&socket, Options::default())?;
    for (name, messages) in wild {
        let busy = |machine: &mut Machine| -> Result<()> {
            let queue = machine.queue(0)?;
            let memory = Segment::into(queue.bounce(), 65_536);
            for i in 0..32 {
                queue.submit(T_IN, i * 128, &[memory])?;
            }
            Ok(())
        };
        busy(&mut machine).context(name)?;
        for (number, payload) in messages {
            // Refused, obeyed, or the end of the connection: all are right.
            let _ = machine.link()?.send(number, F_NEED_REPLY, &payload, &[]);
            let _ = machine.link()?.receive();
        }
        // A monitor that starts over is served.
        machine.disconnect();
        machine.connect().with_context(|| format!("after {name}"))?;
        machine.begin_anew()?;
        machine.run().with_context(|| format!("after {name}"))?;
        ensure!(machine.queue(0)?.read(0, 4096)?.is_ok(), "after {name}");
        machine = replaced(machine, &socket)?;
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
    neighbour.end()?;
    site.finish()
}

/// Class 12: the inflight region comes back scribbled over, shortened, or described wrongly.
#[test]
fn a_scribbled_inflight_region_harms_only_its_own_guest() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    let neighbour = Neighbour::start(&mut site)?;
    let mut machine = site.machine("attacker", SIZE, Options::default())?;
    let mut rng = rng(seed("wire_hostile/inflight"));
    for round in 0..60 {
        machine.disconnect();
        let file = machine.inflight_file()?;
        ensure!(rustix::fs::ftruncate(file, 0).is_err(), "the region can be shortened under the daemon");
        let len = usize::try_from(rustix::fs::fstat(file)?.st_size)?;
        let mut bytes = vec![0; len];
        match round % 4 {
            0 => bytes.fill(0xff),
            1 => bytes.fill(1),
            2 => rng.fill(&mut bytes[..]),
            _ => {
                // Plausible: every head is in flight, with counters in any order, in a batch that leads in a circle.
                for (at, entry) in bytes.chunks_mut(16).enumerate() {
                    entry[0] = u8::from(at % 3 != 0);
                    entry[6] = rng.random_range(0..128);
                    entry[8] = rng.random();
                }
            }
        }
        rustix::io::pwrite(file, &bytes, 0)?;
        machine.connect()?;
        machine.run()?;
        // What is replayed is this guest's own; afterwards a driver starts over and is served.
        thread::sleep(Duration::from_millis(5));
        machine.disconnect();
        machine.connect()?;
        machine.begin_anew()?;
        machine.run()?;
        ensure!(machine.queue(0)?.read(0, 4096)?.is_ok(), "round {round}");
        machine = replaced(machine, &site.socket("attacker"))?;
    }
    neighbour.end()?;
    site.finish()
}

/// Class 12: descriptions of the region.
#[test]
fn inflight_regions_that_cannot_be_are_refused() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    site.operator.create("attacker", SIZE, &json!({}))?;
    let region = |size: u64, offset: u64, queues: u16, length: u16| {
        let mut bytes = words(&[size, offset]);
        bytes.extend(queues.to_ne_bytes());
        bytes.extend(length.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes
    };
    let file = rustix::fs::memfd_create("inflight", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, 4096)?;
    for (number, payload, fds) in [
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
    ] {
        let mut machine = Machine::new(&site.socket("attacker"), Options::default(), GuestRam::standard()?)?;
        machine.connect()?;
        let fds = vec![file.as_fd(); fds];
        let refused = if number == request::GET_INFLIGHT_FD {
            machine.link()?.get(number, &payload, &[]).is_err()
        } else {
            machine.link()?.set(number, &payload, &fds).is_err()
        };
        ensure!(refused, "message {number} with {payload:?} and {} descriptors", fds.len());
    }
    let mut machine = Machine::start(&site.socket("attacker"), Options::default())?;
    ensure!(machine.queue(0)?.read(0, 4096)?.is_ok());
    site.finish()
}
