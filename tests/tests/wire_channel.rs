// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest channel message by message: every requirement on the device that one driver can see by itself.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use serde_json::json;
use vssd_protocol::control::JobState;
use vssd_protocol::guest::{
    self, DeclineReason, Estimate, NEWS_TARGET, RangeStatus, Reason, Request, RequestResult, RequestType,
    Response, ResponseBody, STATE_F_EMPTY, STATUS_EVICTED, Urgency,
};
use vssd_protocol::units::BlockRange;
use vssd_tests::mock::driver::{Driver, anywhere, lowest, pick};
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::queue::{S_IOERR, S_OK, S_UNSUPP, SECTOR, T_IN, T_OUT};
use vssd_tests::mock::ring::Segment;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::pattern;
use vssd_tests::scenario::Medium;

const SIZE: u64 = 64 * MIB;
const BLOCKS: u32 = 1024;

fn site() -> Result<(Site, Machine, Driver)> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    let (machine, driver) = site.driver("vm1", SIZE)?;
    Ok((site, machine, driver))
}

fn range(start: u32, count: u32) -> BlockRange {
    BlockRange::new(start, count)
}

fn block(seed: u64, index: u32) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(BLOCK).unwrap_or(0)];
    pattern::fill(&mut bytes, seed, index.into());
    bytes
}

fn at(block: u32) -> u64 {
    u64::from(block) * BLOCK
}

fn is_zero(driver: &mut Driver, block: u32) -> Result<bool> {
    let read = driver.queue.read(at(block), usize::try_from(BLOCK)?)?;
    Ok(read.is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0)))
}

/// A worker that looks for work instead of sleeping hears of replies and of queues that are to stop all the same.
#[test]
fn worker_that_looks_for_work_answers_the_guest_channel_and_stops_its_queues() -> Result<()> {
    let mut site = Site::with(Medium::Nvram, 100, &[], &["--workers=1", "--poll-us=60000"])?;
    site.operator.create("vm1", SIZE, &json!({}))?;
    let mut slowest = Duration::ZERO;
    for _ in 0..3 {
        let mut machine = Machine::start(&site.socket("vm1"), Options::default())?;
        let mut driver = Driver::start(machine.take_queue(0)?)?;
        for _ in 0..100 {
            is_zero(&mut driver, 0)?;
            let since = Instant::now();
            driver.state(0)?;
            slowest = slowest.max(since.elapsed());
        }
    }
    println!("300 calls, the slowest took {slowest:?}");
    ensure!(slowest < Duration::from_secs(1), "a reply took {slowest:?}");
    site.finish()
}

/// V-14, V-17, V-15.
#[test]
fn hello_says_what_the_vssd_is_and_begins_a_session_of_its_own() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 120)?;
    let limits = json!({ "min_bytes": 8 * MIB, "max_bytes": 96 * MIB });
    site.operator.create("vm-1.x", SIZE, &limits)?;
    let mut machine = Machine::start(&site.socket("vm-1.x"), Options::default())?;
    let mut driver = Driver::start(machine.take_queue(0)?)?;
    let first = driver.hello.clone();
    ensure!(first.version == guest::VERSION && first.features == 0 && first.epoch != 0);
    ensure!(u64::from(first.block_size) == BLOCK && first.total_blocks == 96 * 16);
    ensure!(first.min_blocks == 8 * 16 && first.max_ranges >= 4096 && first.name == "vm-1.x");
    ensure!(driver.sizes.plugged_blocks == BLOCKS && driver.sizes.requested_blocks == BLOCKS);
    let shown = site.operator.show("vm-1.x")?;
    ensure!(shown.driver.name.as_deref() == Some("mock 1"), "{:?}", shown.driver);

    // A driver that speaks more than the device gets the device's version.
    let newer = Request::Hello { version: 7, features: 0, driver: "ü\u{7}\nnew".into() };
    let ResponseBody::Hello(second) = driver.ok(&newer)? else { bail!("no HELLO body") };
    ensure!(second.version == guest::VERSION);
    ensure!(second.epoch != 0 && second.epoch != first.epoch);
    let old = Request::State { epoch: first.epoch, flags: 0, start: 0 };
    ensure!(driver.call(&old)?.result == RequestResult::Stale);
    // One that speaks less is told so, and the session goes on.
    let older = Request::Hello { version: 0, features: 0, driver: String::new() };
    let response = driver.call(&older)?;
    ensure!(response.result == RequestResult::Version, "{response:?}");
    ensure!(matches!(&response.body, ResponseBody::Hello(body) if body.version == guest::VERSION));
    let current = Request::State { epoch: second.epoch, flags: 0, start: 0 };
    ensure!(driver.call(&current)?.result == RequestResult::Ok);
    site.finish()
}

/// V-15: nothing happens for a request without a session, or of another.
#[test]
fn requests_of_another_session_are_stale_and_change_nothing() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let old = driver.epoch();
    driver.hello()?;
    for epoch in [0, old, !driver.epoch()] {
        let ranges = vec![range(0, 8)];
        for request in [
            Request::State { epoch, flags: 0, start: 0 },
            Request::Wait { epoch, seq_seen: 0 },
            Request::Unplug { epoch, ranges: ranges.clone() },
            Request::Plug { epoch, ranges },
            Request::Decline { epoch, seq: 0, could_give: 0, reason: DeclineReason::Busy },
            Request::Pull { epoch, want_blocks: 1, urgency: Urgency::Wish },
            Request::Report { epoch, estimate: Estimate { free: 1, ..Estimate::default() } },
        ] {
            let response = driver.call(&request)?;
            ensure!(response.result == RequestResult::Stale, "{request:?}: {response:?}");
        }
    }
    driver.agree(&mut site.operator, "vm1")?;
    ensure!(driver.count() == BLOCKS);
    site.finish()
}

/// V-5, class 20: what is not offered is not carried out.
#[test]
fn unknown_request_types_are_not_supported() -> Result<()> {
    let (site, _machine, mut driver) = site()?;
    let memory = driver.queue.bounce();
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 16, 0x100, 0x5653_0000, 0x5653_0009, 0x8000_0000, u32::MAX] {
        let data = [Segment::out(memory, 512), Segment::into(memory + 512, 512)];
        let answer = driver.queue.call(kind, 0, &data)?;
        ensure!(answer.status == S_UNSUPP && answer.written == 0, "type {kind:#x}: {answer:?}");
    }
    driver.refresh()?;
    site.finish()
}

/// V-1, V-2, V-4: one byte too few of anything, and nothing happened.
#[test]
fn malformed_requests_are_answered_and_change_nothing() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let epoch = driver.epoch();
    let ranges = vec![range(1, 2), range(5, 1)];
    let good = [
        Request::Hello { version: 1, features: 0, driver: "x".into() },
        Request::State { epoch, flags: 0, start: 0 },
        Request::Wait { epoch, seq_seen: 0 },
        Request::Unplug { epoch, ranges: ranges.clone() },
        Request::Plug { epoch, ranges },
        Request::Decline { epoch, seq: 0, could_give: 0, reason: DeclineReason::Busy },
        Request::Pull { epoch, want_blocks: 1, urgency: Urgency::Wish },
        Request::Report { epoch, estimate: Estimate::default() },
    ];
    for request in &good {
        let (kind, body) = (request.kind(), request.encode());
        let count = if matches!(kind, RequestType::Unplug | RequestType::Plug) { 2 } else { 0 };
        let room = guest::min_response_len(kind, count);
        for (body, room) in
            [(&body[..body.len() - 1], room), (&body[..0], room), (&body[..], room - 1), (&body[..], 0)]
        {
            let (answer, _) = driver.raw(kind as u32, body, room)?;
            ensure!(answer.status == S_IOERR, "{kind:?}, body {}, room {room}: {answer:?}", body.len());
        }
    }
    let mut bad = Vec::new();
    let mut wrong_magic = good[0].encode();
    wrong_magic[0] ^= 1;
    bad.push((RequestType::Hello, wrong_magic));
    // More ranges than there may be, or than follow.
    for count in [guest::MAX_RANGES + 1, u32::MAX, 3] {
        let mut body = good[3].encode();
        body[8..12].copy_from_slice(&count.to_le_bytes());
        bad.push((RequestType::Unplug, body));
    }
    for (kind, request) in [(RequestType::Decline, &good[5]), (RequestType::Pull, &good[6])] {
        let mut body = request.encode();
        let last = body.len() - 4;
        body[last..].copy_from_slice(&99u32.to_le_bytes());
        bad.push((kind, body));
    }
    for (kind, body) in bad {
        let (answer, _) = driver.raw(kind as u32, &body, 96)?;
        ensure!(answer.status == S_IOERR, "{kind:?} {body:x?}: {answer:?}");
    }
    driver.agree(&mut site.operator, "vm1")?;
    ensure!(driver.count() == BLOCKS && driver.epoch() == epoch);
    site.finish()
}

/// V-18, V-19, V-12.
#[test]
fn state_lists_the_plugged_set_page_by_page_and_what_is_empty() -> Result<()> {
    let (site, _machine, mut driver) = site()?;
    let mut rng = rng(seed("wire_channel/state"));
    let gone = anywhere(&mut rng)(&driver, 300);
    driver.give(&gone)?;
    let all = driver.state(0)?;
    for page in [1, 2, 7, 100] {
        driver.page = page;
        ensure!(driver.state(0)?.iter().map(|r| r.count).sum::<u32>() == BLOCKS - 300);
        driver.refresh()?;
    }
    driver.page = 8192;
    ensure!(driver.state(0)? == all);
    ensure!(driver.state(STATE_F_EMPTY)? == all, "nothing was written yet");

    // What is written is not empty; what is discarded is again.
    let held: Vec<u32> = driver.present().take(200).collect();
    for block_index in &held {
        ensure!(driver.queue.write(at(*block_index) + 4096, &[7; 512])? == S_OK);
    }
    let empty: Vec<u32> =
        driver.state(STATE_F_EMPTY)?.iter().flat_map(|r| r.start..r.start + r.count).collect();
    let expected: Vec<u32> = driver.present().filter(|b| !held.contains(b)).collect();
    ensure!(empty == expected);
    for block_index in &held {
        ensure!(driver.queue.discard(at(*block_index), BLOCK)? == S_OK);
    }
    ensure!(driver.state(STATE_F_EMPTY)? == all);

    let epoch = driver.epoch();
    let poll = driver.ok(&Request::State { epoch, flags: 0, start: BLOCKS })?;
    ensure!(matches!(poll, ResponseBody::State { next: BLOCKS, ranges } if ranges.is_empty()));
    for (flags, start) in [(0, BLOCKS + 1), (0, u32::MAX), (2, 0), (0x8000_0001, 0)] {
        let response = driver.call(&Request::State { epoch, flags, start })?;
        ensure!(response.result == RequestResult::Invalid, "flags {flags:#x} start {start}: {response:?}");
    }
    // Room for the fixed part alone is legal and lists nothing.
    let request = Request::State { epoch, flags: 0, start: 0 };
    let (answer, bytes) = driver.raw(RequestType::State as u32, &request.encode(), 32 + 7)?;
    ensure!(answer.status == S_OK);
    let response = Response::decode(RequestType::State, &bytes)?;
    ensure!(matches!(response.body, ResponseBody::State { next: 0, ranges } if ranges.is_empty()));
    site.finish()
}

/// V-20, V-21, V-22, V-23.
#[test]
fn a_wait_is_answered_by_news_by_a_newer_wait_and_by_the_end_of_its_queue() -> Result<()> {
    let (mut site, mut machine, mut driver) = site()?;
    // At once, for HELLO itself was news.
    driver.park(0)?;
    let response = driver.wait_answer(PATIENCE)?.context("V-20")?;
    ensure!(response.result == RequestResult::Ok && response.sizes.seq > 0, "{response:?}");
    let seq = response.sizes.seq;

    // Not before there is news, and not in the way of other requests.
    let first = driver.park(seq)?;
    for _ in 0..100 {
        ensure!(driver.queue.read(0, 4096)?.is_ok());
    }
    ensure!(driver.wait_answer(Duration::from_millis(100))?.is_none(), "answered without news");

    // Superseded by a newer one.
    let second = driver.park(seq)?;
    ensure!(first != second);
    let old = driver.queue.wait(first, PATIENCE).context("V-21")?;
    ensure!(old.status == S_OK);
    ensure!(driver.wait_answer(Duration::from_millis(50))?.is_none());

    // Several changes are one piece of news with the newest values.
    let job = site.operator.resize("vm1", SIZE - 10 * MIB, &json!({ "deadline_ms": 60_000 }))?;
    let response = driver.wait_answer(PATIENCE)?.context("V-20")?;
    let ResponseBody::Wait { flags, reason, deadline_ms } = response.body else { bail!("{response:?}") };
    ensure!(flags == NEWS_TARGET && reason == Reason::Operator, "{flags} {reason:?}");
    ensure!((1..=60_000).contains(&deadline_ms), "{deadline_ms} ms are left");
    ensure!(response.sizes.requested_blocks == BLOCKS - 160);
    for mib in 11..15 {
        site.operator.resize("vm1", SIZE - mib * MIB, &json!({ "deadline_ms": 0 }))?;
    }
    driver.park(response.sizes.seq)?;
    let merged = driver.wait_answer(PATIENCE)?.context("V-23")?;
    ensure!(merged.sizes.requested_blocks == BLOCKS - 14 * 16, "{merged:?}");
    ensure!(matches!(merged.body, ResponseBody::Wait { deadline_ms: 0, .. }), "{merged:?}");
    driver.park(merged.sizes.seq)?;
    ensure!(driver.wait_answer(Duration::from_millis(50))?.is_none(), "one piece of news, not four");
    ensure!(site.operator.job(job.id)?.state == JobState::Superseded);

    // A seq that the device has not reached is not waited for.
    driver.park(merged.sizes.seq + 1)?;
    let response = driver.wait_answer(PATIENCE)?.context("no answer")?;
    ensure!(response.result == RequestResult::Invalid, "{response:?}");

    // The queue stops: NO_NEWS before GET_VRING_BASE is answered, and everything goes on after.
    driver.park(merged.sizes.seq)?;
    // What comes later is taken later: now the WAIT is parked.
    driver.refresh()?;
    let base = machine.stop_queue(0)?;
    ensure!(base == driver.queue.ring.next_avail(), "every request taken is answered");
    let response = driver.wait_answer(PATIENCE)?.context("V-22")?;
    ensure!(response.result == RequestResult::NoNews, "{response:?}");
    machine.start_queue(0)?;
    driver.refresh()?;
    ensure!(driver.follow(&mut lowest)?);
    driver.agree(&mut site.operator, "vm1")?;
    site.finish()
}

/// V-31, V-9, V-13.
#[test]
fn reads_and_writes_that_touch_an_unplugged_block_transfer_nothing() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let len = usize::try_from(BLOCK)?;
    for index in 0..10 {
        ensure!(driver.queue.write(at(index), &block(1, index))? == S_OK);
    }
    driver.give(&[range(4, 2)])?;
    driver.agree(&mut site.operator, "vm1")?;
    // From the left, from the right, across, within.
    for (from, to) in [(3, 5), (5, 7), (3, 7), (4, 6), (0, 10)] {
        let (offset, size) = (at(from) + 512, usize::try_from(at(to - from))? - 1024);
        ensure!(driver.queue.read(offset, size)? == Err(STATUS_EVICTED), "read {from}..{to}");
        ensure!(driver.queue.write(offset, &vec![9; size])? == STATUS_EVICTED, "write {from}..{to}");
        let size = size as u64;
        ensure!(driver.queue.write_zeroes(offset, size, false)? == STATUS_EVICTED, "zero {from}..{to}");
        ensure!(driver.queue.write_zeroes(offset, size, true)? == STATUS_EVICTED, "unmap {from}..{to}");
    }
    for index in [0, 1, 2, 3, 6, 7, 8, 9] {
        ensure!(driver.queue.read(at(index), len)? == Ok(block(1, index)), "block {index} is unharmed");
    }
    ensure!(site.operator.show("vm1")?.io.evicted >= 20, "counted for the operator");
    site.finish()
}

/// V-12, V-25.
#[test]
fn a_block_that_comes_back_reads_zero_and_forgets_what_it_held() -> Result<()> {
    for medium in [Medium::Nvram, Medium::Ssd] {
        let mut site = Site::new(medium, 100)?;
        let (_machine, mut driver) = site.driver("vm1", SIZE)?;
        let mut rng = rng(seed("wire_channel/replug"));
        for round in 0..20u64 {
            let ranges = anywhere(&mut rng)(&driver, 16);
            for range in &ranges {
                ensure!(driver.queue.write(at(range.start), &block(round, range.start))? == S_OK);
            }
            driver.give(&ranges)?;
            let statuses = driver.plug(&ranges)?.context("STALE")?;
            ensure!(statuses.iter().all(|status| *status == RangeStatus::Ok), "{statuses:?}");
            for range in &ranges {
                ensure!(is_zero(&mut driver, range.start)?, "round {round}, block {}", range.start);
            }
        }
        driver.agree(&mut site.operator, "vm1")?;
        site.finish()?;
    }
    Ok(())
}

/// V-9: an UNPLUG waits for requests in flight and lets none in after it.
fn unplug_races_writes(medium: Medium) -> Result<()> {
    let mut site = Site::new(medium, 100)?;
    let (mut machine, mut driver) = site.driver("vm1", SIZE)?;
    let mut other = machine.take_queue(1)?;
    let mut rng = rng(seed("wire_channel/race"));
    let memory = other.bounce();
    let (mut evicted, mut written) = (0, 0);
    for round in 0..400 {
        let target = rng.random_range(0..BLOCKS - 1);
        other.ring.ram.write(memory, &block(round, target));
        // A few writes into the block on their way, some over its edge, as the UNPLUG goes out.
        let heads: Vec<u16> = (0..8u64)
            .map(|i| {
                let sector = (at(target) + i * 8192) / SECTOR;
                other.submit(T_OUT, sector, &[Segment::out(memory, 8192)])
            })
            .collect::<Result<_>>()?;
        if rng.random() {
            std::thread::sleep(Duration::from_micros(rng.random_range(0..300)));
        }
        driver.give(&[range(target, 1)])?;
        // What comes after the answer finds nothing.
        ensure!(driver.queue.read(at(target), 4096)? == Err(STATUS_EVICTED), "round {round}");
        for head in heads {
            match other.wait(head, PATIENCE)?.status {
                S_OK => written += 1,
                STATUS_EVICTED => evicted += 1,
                status => bail!("round {round}: status {status:#x}"),
            }
        }
        let statuses = driver.plug(&[range(target, 1)])?.context("STALE")?;
        ensure!(statuses == [RangeStatus::Ok], "{statuses:?}");
        ensure!(is_zero(&mut driver, target)?, "round {round}: a late write landed in block {target}");
    }
    println!("{written} writes went before the UNPLUG, {evicted} were refused");
    driver.agree(&mut site.operator, "vm1")?;
    site.finish()
}

#[test]
fn no_write_lands_after_its_block_was_given_up_on_nvram() -> Result<()> {
    unplug_races_writes(Medium::Nvram)
}

#[test]
fn no_write_lands_after_its_block_was_given_up_on_an_ssd() -> Result<()> {
    unplug_races_writes(Medium::Ssd)
}

/// V-24, V-26.
#[test]
fn each_range_stands_or_falls_by_itself_in_order() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let epoch = driver.epoch();
    let ask = |driver: &mut Driver, unplug: bool, ranges: &[BlockRange]| -> Result<Vec<RangeStatus>> {
        let ranges = ranges.to_vec();
        let request =
            if unplug { Request::Unplug { epoch, ranges } } else { Request::Plug { epoch, ranges } };
        let ResponseBody::Ranges(statuses) = driver.ok(&request)? else { bail!("no statuses") };
        Ok(statuses)
    };
    use RangeStatus::{Already, Limit, Ok as Done, Protected, Range};
    let ranges = [
        range(10, 5),
        range(12, 3),             // was part of the one before
        range(13, 4),             // half of it is gone
        range(0, 0),              // empty
        range(BLOCKS, 1),         // outside
        range(BLOCKS - 1, 2),     // reaches outside
        range(u32::MAX, 2),       // wraps around
        range(20, u32::MAX - 10), // wraps around
        range(BLOCKS - 1, 1),
    ];
    let statuses = ask(&mut driver, true, &ranges)?;
    ensure!(statuses == [Done, Already, Done, Range, Range, Range, Range, Range, Done], "{statuses:?}");
    ensure!(driver.sizes.plugged_blocks == BLOCKS - 8);
    ensure!(ask(&mut driver, true, &ranges[..3])? == [Already; 3]);
    let statuses = ask(&mut driver, false, &ranges)?;
    ensure!(statuses == [Done, Already, Done, Range, Range, Range, Range, Range, Done], "{statuses:?}");
    ensure!(ask(&mut driver, false, &ranges[..3])? == [Already; 3]);
    ensure!(ask(&mut driver, true, &[])?.is_empty(), "no ranges, no statuses");

    // Not below the minimum: the range that would go below it stays, a smaller one after it goes (V-24).
    site.operator.limits("vm1", &json!({ "min_bytes": at(BLOCKS - 10) }))?;
    let statuses = ask(&mut driver, true, &[range(0, 6), range(6, 5), range(6, 4), range(10, 1)])?;
    ensure!(statuses == [Done, Protected, Done, Protected], "{statuses:?}");
    // Not above what is requested (V-27).
    site.operator.limits("vm1", &json!({ "min_bytes": BLOCK }))?;
    site.operator.resize("vm1", at(BLOCKS - 4), &json!({}))?;
    let statuses = ask(&mut driver, false, &[range(0, 4), range(4, 3), range(4, 2), range(6, 1)])?;
    ensure!(statuses == [Done, Limit, Done, Limit], "{statuses:?}");
    driver.refresh()?;
    ensure!(driver.count() == BLOCKS - 4 && driver.absent().eq(6..10));
    driver.agree(&mut site.operator, "vm1")?;
    site.finish()
}

/// The protocol's largest request; one more is malformed (V-1).
#[test]
fn sixteen_thousand_scattered_ranges_go_in_one_request() -> Result<()> {
    let mut site = Site::with(Medium::Nvram, 200, &["--block-size", "4K"], &[])?;
    let (_machine, mut driver) = site.driver("vm1", 160 * MIB)?;
    ensure!(driver.hello.total_blocks == 40_960 && driver.hello.max_ranges == guest::MAX_RANGES);
    let every_other: Vec<BlockRange> = (0..guest::MAX_RANGES).map(|i| range(2 * i, 1)).collect();
    let mut too_many = every_other.clone();
    too_many.push(range(40_000, 1));
    let request = Request::Unplug { epoch: driver.epoch(), ranges: too_many };
    let room = 24 + guest::MAX_RANGES as usize + 1;
    // The longest body is known to the device, so this chain is refused before it is read.
    let (answer, _) = driver.raw(RequestType::Unplug as u32, &request.encode(), room)?;
    ensure!(answer.status == S_IOERR, "{answer:?}");
    driver.agree(&mut site.operator, "vm1")?;

    driver.give(&every_other)?;
    driver.agree(&mut site.operator, "vm1")?;
    ensure!(driver.absent().count() == guest::MAX_RANGES as usize);
    driver.page = 1000;
    driver.refresh()?;
    let statuses = driver.plug(&every_other)?.context("STALE")?;
    ensure!(statuses.iter().all(|status| *status == RangeStatus::Ok));
    driver.agree(&mut site.operator, "vm1")?;
    site.finish()
}

/// V-28, V-39, V-36.
#[test]
fn what_was_unplugged_or_plugged_holds_after_kill_9() -> Result<()> {
    for medium in [Medium::Nvram, Medium::Ssd] {
        let (mut site, mut rng) = (Site::new(medium, 100)?, rng(seed("wire_channel/durable")));
        let (mut machine, mut driver) = site.driver("vm1", SIZE)?;
        for index in 0..BLOCKS {
            ensure!(driver.queue.write(at(index), &block(1, index)[..4096])? == S_OK);
        }
        ensure!(driver.queue.flush()? == S_OK);
        let mut zeroed = vec![false; BLOCKS as usize];
        for round in 0..5 {
            let count = driver.count();
            site.operator.resize("vm1", at(count - 100), &json!({}))?;
            let gone = anywhere(&mut rng)(&driver, 200);
            driver.give(&gone)?;
            let back = pick(driver.absent(), 100);
            let statuses = driver.plug(&back)?.context("STALE")?;
            ensure!(statuses.iter().all(|status| *status == RangeStatus::Ok));
            back.iter().for_each(|r| zeroed[r.start as usize..][..r.count as usize].fill(true));
            let epoch = driver.epoch();
            site.kill_and_restart()?;
            machine.reconnect()?;
            let stale = driver.call(&Request::State { epoch, flags: 0, start: 0 })?;
            ensure!(stale.result == RequestResult::Stale, "round {round}: {stale:?}");
            let model = driver.plugged.clone();
            driver.hello()?;
            ensure!(driver.plugged == model, "round {round}: the plugged set changed");
            driver.agree(&mut site.operator, "vm1")?;
        }
        for index in 0..BLOCKS {
            let read = driver.queue.read(at(index), 4096)?;
            let expected = match (driver.plugged[index as usize], zeroed[index as usize]) {
                (false, _) => Err(STATUS_EVICTED),
                (true, true) => Ok(vec![0; 4096]),
                (true, false) => Ok(block(1, index)[..4096].to_vec()),
            };
            ensure!(read == expected, "block {index}");
        }
        site.finish()?;
    }
    Ok(())
}

#[test]
fn the_channel_works_on_any_queue_beside_io_on_the_same_one() -> Result<()> {
    let mut site = Site::new(Medium::Ssd, 100)?;
    let options = Options { queues: 4, ..Options::default() };
    let mut machine = site.machine("vm1", SIZE, options)?;
    let mut driver = Driver::start(machine.take_queue(3)?)?;
    let seq = driver.sizes.seq;
    driver.park(seq)?;
    let memory = driver.queue.bounce();
    for round in 0..50u32 {
        let heads: Vec<u16> = (0..32)
            .map(|i| driver.queue.submit(T_IN, i * 128, &[Segment::into(memory + i * 4096, 4096)]))
            .collect::<Result<_>>()?;
        driver.give(&[range(512 + round, 1)])?;
        for head in heads {
            ensure!(driver.queue.wait(head, PATIENCE)?.status == S_OK);
        }
    }
    ensure!(driver.is_parked() && driver.wait_answer(Duration::ZERO)?.is_none());
    driver.agree(&mut site.operator, "vm1")?;
    site.finish()
}

/// Exchanging few blocks a message is what made the original system's grow slow. Prints time and messages.
#[test]
fn a_vssd_of_32_gib_shrinks_to_half_and_grows_back_in_few_messages() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 33 << 10)?;
    let size = 32u64 << 30;
    let (_machine, mut driver) = site.driver("vm1", size)?;
    let total = driver.hello.total_blocks;
    ensure!(total == 1 << 19);
    // Every other run of 4 blocks, each block a range of its own, as a driver names them that looks for cold ones. The
    // 65,536 holes are more than one answer to an operator lists.
    let mut scattered = |driver: &Driver, count: u32| -> Vec<BlockRange> {
        let cold = driver.present().filter(|block| block / 4 % 2 == 0);
        cold.take(count as usize).map(|block| range(block, 1)).collect()
    };
    for (to, what) in [(size / 2, "shrink by 16 GiB"), (size, "grow by 16 GiB")] {
        let (start, before) = (Instant::now(), driver.messages);
        let job = site.operator.resize("vm1", to, &json!({}))?;
        ensure!(driver.attend(&mut scattered)?);
        let elapsed = start.elapsed();
        let job = site.operator.finish(job.id)?;
        ensure!(job.state == JobState::Done, "{job:?}");
        let messages = driver.messages - before;
        println!("{what}: {} blocks, {messages} messages, {:.0} ms", total / 2, elapsed.as_secs_f64() * 1e3);
        ensure!(messages <= u64::from(total / 2 / guest::MAX_RANGES), "{messages} messages");
        driver.agree(&mut site.operator, "vm1")?;
    }
    site.finish()
}
