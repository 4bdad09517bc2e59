// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that asks for as much as it may, and for more: nobody waits for it longer than for an honest guest. More of class 19
//! of `wire_hostile.rs`, whose text says how rounds are judged.
//!
//! Long form: `cargo xtask long hostile`; this file alone:
//! `VSSD_HOSTILE_ROUNDS=10000 cargo test -p vssd-tests --release --test wire_hostile_load -- --test-threads=1`

use anyhow::{Result, ensure};
use vssd_protocol::guest::{Request, RequestType, STATUS_EVICTED, min_response_len};
use vssd_protocol::units::BlockRange;
use vssd_tests::mock::PATIENCE;
use vssd_tests::mock::arena::{Arena, Verdict};
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::queue::{
    Layout, Queue, S_IOERR, S_OK, SECTOR, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, range_segment,
};
use vssd_tests::mock::ring::Segment;
use vssd_tests::mock::site::MIB;
use vssd_tests::scenario::Medium;

const SIZE: u64 = 32 * MIB;
const QUEUE_SIZE: u16 = 256;
/// Segments of a request and bytes of a segment at most, as the configuration space says.
const SEG_MAX: usize = 126;
const SIZE_MAX: u32 = 64 << 10;
/// As many as a table in a slot of the mock queue holds, besides header and status.
const MANY: usize = 240;

/// What a flood is made of: the same request over and over.
struct Flood {
    case: &'static str,
    kind: u32,
    data: Vec<Segment>,
    /// How many at a time.
    count: u16,
    /// The ways in which it may be answered.
    right: &'static [u8],
}

/// Sends the flood and waits for all answers.
fn flood(queue: &mut Queue, flood: &Flood) -> Result<Verdict> {
    let mut heads = Vec::new();
    for _ in 0..flood.count {
        heads.push(queue.prepare(flood.kind, 0, &flood.data)?);
    }
    queue.ring.publish()?;
    let mut verdict = Verdict::Pass;
    for head in heads {
        let answer = queue.wait(head, PATIENCE)?;
        ensure!(flood.right.contains(&answer.status), "{answer:?}");
        if answer.status != S_OK {
            verdict = Verdict::Reject;
        }
    }
    Ok(verdict)
}

/// Sends each flood in turn; the second queue serves meanwhile.
fn floods(class: &'static str, medium: Medium, make: impl Fn(&Queue, u64) -> Vec<Flood>) -> Result<()> {
    let mut arena = Arena::new(class, medium, SIZE)?;
    let options = Options { queue_size: QUEUE_SIZE, ..Options::default() };
    let mut machine: Machine = arena.machine(options)?;
    let mut queue = machine.take_queue(0)?;
    let driver = Driver::start(machine.take_queue(1)?)?;
    queue.layout = Layout::Table;
    // What waits for the owner, as request and as answer, and on an SSD what describes 4 MiB in pieces of a block.
    arena.allow_growth(12 << 10);
    let floods = make(&queue, driver.epoch());
    for round in arena.rounds(400) {
        let one = &floods[round % floods.len()];
        let verdict = flood(&mut queue, one);
        arena.judge(one.case, verdict)?;
    }
    // Wherever that ended, the last of them leaves the disk as it was.
    if let Some(last) = floods.last() {
        let verdict = flood(&mut queue, last);
        arena.judge(last.case, verdict)?;
    }
    drop((queue, driver));
    machine.disconnect();
    arena.end()
}

fn data(at: u64, count: usize, len: u32, write: bool) -> Vec<Segment> {
    vec![Segment { addr: at, len, write }; count]
}

/// Reads and writes as long as they may be, and longer; all their segments are the same memory.
fn long_requests(queue: &Queue, _: u64) -> Vec<Flood> {
    let at = queue.bounce();
    let flood = |case, kind, data, count, right| Flood { case, kind, data, count, right };
    vec![
        flood("reads of 8 MiB", T_IN, data(at, SEG_MAX, SIZE_MAX, true), 8, &[S_OK]),
        flood("writes of 8 MiB", T_OUT, data(at, SEG_MAX, SIZE_MAX, false), 8, &[S_OK]),
        flood(
            "reads of 8 MiB and a sector",
            T_IN,
            data(at, SEG_MAX, SIZE_MAX + 512, true),
            QUEUE_SIZE,
            &[S_IOERR],
        ),
        flood("writes of the whole disk", T_OUT, data(at, 32, 1 << 20, false), QUEUE_SIZE, &[S_IOERR]),
        flood("reads in many pieces", T_IN, data(at, MANY, 32, true), QUEUE_SIZE, &[S_OK]),
    ]
}

#[test]
fn class_19_requests_that_are_as_long_as_can_be_hold_nobody_up_on_nvram() -> Result<()> {
    floods("class_19 long, nvram", Medium::Nvram, long_requests)
}

#[test]
fn class_19_requests_that_are_as_long_as_can_be_hold_nobody_up_on_an_ssd() -> Result<()> {
    floods("class_19 long, ssd", Medium::Ssd, long_requests)
}

/// Sixteen bytes that name much.
fn ranges(queue: &Queue, _: u64) -> Vec<Flood> {
    let at = queue.bounce();
    let put = |index: u64, len: u64| -> Vec<Segment> {
        let segment = range_segment(0, len, 0).unwrap_or([0xff; 16]);
        queue.ring.ram.write(at + 16 * index, &segment);
        vec![Segment::out(at + 16 * index, 16)]
    };
    let flood = |case, kind, data, right| Flood { case, kind, data, count: QUEUE_SIZE, right };
    vec![
        flood("discards of the whole disk", T_DISCARD, put(0, SIZE), &[S_OK]),
        flood("zeroes for 1 MiB", T_WRITE_ZEROES, put(1, MIB), &[S_OK]),
        flood("discards of more than there is", T_DISCARD, put(2, (1 << 32) - SECTOR), &[S_IOERR]),
        flood("zeroes for the whole disk", T_WRITE_ZEROES, put(3, SIZE), &[S_IOERR]),
        flood("flushes", T_FLUSH, Vec::new(), &[S_OK]),
    ]
}

#[test]
fn class_19_discards_zeroes_and_flushes_hold_nobody_up_on_nvram() -> Result<()> {
    floods("class_19 ranges, nvram", Medium::Nvram, ranges)
}

#[test]
fn class_19_discards_zeroes_and_flushes_hold_nobody_up_on_an_ssd() -> Result<()> {
    floods("class_19 ranges, ssd", Medium::Ssd, ranges)
}

/// Requests of the guest channel with thousands of ranges, many at a time: each waits for the owner, and those that
/// are too many are refused.
fn calls(queue: &Queue, epoch: u64) -> Vec<Flood> {
    const RANGES: u32 = 4096;
    let at = queue.bounce();
    let ranges = (0..RANGES).map(|range| BlockRange::new(range % 512, 1)).collect();
    let body = Request::Unplug { epoch, ranges }.encode();
    queue.ring.ram.write(at, &body);
    let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let room = u32::try_from(min_response_len(RequestType::Unplug, RANGES)).unwrap_or(u32::MAX);
    let data = vec![Segment::out(at, len), Segment::into(at + (1 << 19), room)];
    let flood = |case, kind: RequestType| Flood {
        case,
        kind: kind as u32,
        data: data.clone(),
        count: QUEUE_SIZE,
        right: &[S_OK, S_IOERR],
    };
    vec![
        flood("UNPLUG of 4096 ranges", RequestType::Unplug),
        Flood {
            case: "STATE of everything",
            kind: RequestType::State as u32,
            data: vec![Segment::out(at, 24), Segment::into(at + (1 << 19), 1 << 16)],
            count: QUEUE_SIZE,
            right: &[S_OK, S_IOERR],
        },
        Flood {
            case: "reads of what is gone",
            kind: T_IN,
            data: vec![Segment::into(at + (1 << 19), 4096)],
            count: QUEUE_SIZE,
            right: &[S_OK, STATUS_EVICTED],
        },
        flood("PLUG of 4096 ranges", RequestType::Plug),
    ]
}

#[test]
fn class_19_requests_of_the_guest_channel_hold_nobody_up_on_nvram() -> Result<()> {
    floods("class_19 calls, nvram", Medium::Nvram, calls)
}

#[test]
fn class_19_requests_of_the_guest_channel_hold_nobody_up_on_an_ssd() -> Result<()> {
    floods("class_19 calls, ssd", Medium::Ssd, calls)
}
