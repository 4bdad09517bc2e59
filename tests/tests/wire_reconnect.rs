// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The front-end leaves, queues stop, the daemon dies in the middle of a negotiation: no request is lost, none is carried out
//! wrongly, and nothing of the negotiation is forgotten. Deaths under load are in `wire_kill`.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use serde_json::{Value, json};
use vssd_protocol::control::{JobInfo, JobState, method};
use vssd_protocol::guest::{RangeStatus, Request, RequestResult, RequestType, Response, ResponseBody};
use vssd_tests::mock::driver::{Driver, anywhere};
use vssd_tests::mock::load::{Load, Profile};
use vssd_tests::mock::machine::{F_EVENT_IDX, Machine, Options};
use vssd_tests::mock::queue::{S_OK, SECTOR, T_IN, T_OUT};
use vssd_tests::mock::ram::GuestRam;
use vssd_tests::mock::ring::Segment;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::pattern;
use vssd_tests::scenario::Medium;

const SIZE: u64 = 64 * MIB;

/// Verified I/O at depth 32 on each queue of a new machine.
fn load(site: &mut Site, options: Options, zeroing: bool, seed: u64) -> Result<(Machine, Load)> {
    let mut machine = site.machine("vm1", SIZE, options)?;
    let queues = (0..options.queues).map(|index| machine.take_queue(index)).collect::<Result<_>>()?;
    let unit = machine.logical_block()?.into();
    let profile = Profile { bytes: 0..SIZE, unit, block: BLOCK, depth: 32, zeroing, tables: true };
    let load = Load::new(queues, profile, seed)?;
    Ok((machine, load))
}

/// The front-end leaves and comes back to the same daemon, which has answered or kept what was in flight.
#[test]
fn a_front_end_that_leaves_under_load_finds_every_request_answered_or_replayed() -> Result<()> {
    for medium in [Medium::Nvram, Medium::Ssd] {
        let seed = seed("wire_reconnect/leave");
        let mut site = Site::new(medium, 100)?;
        let (mut machine, mut load) = load(&mut site, Options::default(), true, seed)?;
        let mut rng = rng(!seed);
        for _ in 0..25 {
            load.run(rng.random_range(20..300))?;
            load.fill()?;
            machine.reconnect()?;
        }
        load.verify()?;
        site.finish()?;
    }
    Ok(())
}

#[test]
fn a_daemon_that_is_asked_to_end_under_load_leaves_nothing_undone() -> Result<()> {
    let seed = seed("wire_reconnect/terminate");
    let mut site = Site::new(Medium::Ssd, 100)?;
    let (mut machine, mut load) = load(&mut site, Options::default(), true, seed)?;
    let mut rng = rng(!seed);
    for _ in 0..8 {
        load.run(rng.random_range(100..600))?;
        load.fill()?;
        ensure!(site.daemon.terminate()?.success());
        site.revive()?;
        machine.reconnect()?;
    }
    load.verify()?;
    site.finish()
}

/// Class 15: what was taken is answered before GET_VRING_BASE is, and nothing happens after it.
#[test]
fn a_queue_that_stops_under_load_has_answered_all_it_took_and_then_rests() -> Result<()> {
    for medium in [Medium::Nvram, Medium::Ssd] {
        let seed = seed("wire_reconnect/stop");
        let mut site = Site::new(medium, 100)?;
        let (mut machine, mut load) = load(&mut site, Options::default(), true, seed)?;
        let mut rng = rng(!seed);
        for round in 0..60 {
            load.run(rng.random_range(5..60))?;
            load.fill()?;
            for index in 0..2 {
                let base = machine.stop_queue(index)?;
                let used = machine.ram.load(machine.shape(index).used_idx());
                ensure!(base == used, "round {round}: stopped at {base} with {used} answered");
            }
            let rests: Vec<u16> = (0..2).map(|i| machine.ram.load(machine.shape(i).used_idx())).collect();
            // What is offered to a stopped queue stays where it is.
            load.fill()?;
            thread::sleep(Duration::from_millis(1));
            for (index, rest) in (0..2).zip(rests) {
                ensure!(machine.ram.load(machine.shape(index).used_idx()) == rest, "round {round}");
            }
            (0..2).try_for_each(|index| machine.start_queue(index))?;
        }
        load.verify()?;
        site.finish()?;
    }
    Ok(())
}

/// Class 15: no write reaches the disk after its queue was reported to have stopped.
#[test]
fn no_write_lands_after_its_queue_has_stopped() -> Result<()> {
    let mut site = Site::new(Medium::Ssd, 100)?;
    let mut machine = site.machine("vm1", SIZE, Options::default())?;
    let mut rng = rng(seed("wire_reconnect/late"));
    for round in 0..40u8 {
        let queue = machine.queue(0)?;
        let memory = queue.bounce();
        queue.ring.ram.fill(memory, 64 << 10, round);
        for i in 0..16u64 {
            queue.submit(T_OUT, i * 128, &[Segment::out(memory, 64 << 10)])?;
        }
        thread::sleep(Duration::from_micros(rng.random_range(0..200)));
        machine.stop_queue(0)?;
        let other = machine.queue(1)?;
        let len = 1 << 20;
        let first = other.read(0, len)?;
        thread::sleep(Duration::from_millis(2));
        ensure!(other.read(0, len)? == first, "round {round}: the disk changed with its queue stopped");
        machine.start_queue(0)?;
        let queue = machine.queue(0)?;
        while queue.in_flight() > 0 {
            ensure!(queue.next(PATIENCE)?.status == S_OK);
        }
        ensure!(queue.read(0, len)? == Ok(vec![round; len]));
    }
    site.finish()
}

/// Class 16: a chain is served however kick, stop and start meet, and with the call descriptor set last.
#[test]
fn no_kick_and_no_interrupt_is_lost_however_starts_and_stops_fall() -> Result<()> {
    for without in [0, F_EVENT_IDX] {
        let mut site = Site::new(Medium::Nvram, 100)?;
        let mut machine = site.machine("vm1", SIZE, Options { without, ..Options::default() })?;
        for round in 0..1500u32 {
            let early = round % 3;
            let mut head = None;
            let send = |machine: &mut Machine| -> Result<u16> {
                let queue = machine.queue(0)?;
                let memory = Segment::into(queue.bounce(), 512);
                queue.submit(0, u64::from(round), &[memory])
            };
            if early == 0 {
                head = Some(send(&mut machine)?);
            }
            machine.stop_queue(0)?;
            if early == 1 {
                head = Some(send(&mut machine)?);
            }
            machine.start_queue(0)?;
            let head = head.map_or_else(|| send(&mut machine), Ok)?;
            let answer = machine.queue(0)?.wait(head, PATIENCE).with_context(|| format!("round {round}"))?;
            ensure!(answer.status == S_OK);
        }
        site.finish()?;
    }
    Ok(())
}

/// Shows the device what is offered, and does not kick.
fn show(machine: &mut Machine, sector: u64) -> Result<u16> {
    let queue = machine.queue(0)?;
    let memory = Segment::into(queue.bounce(), 512);
    let head = queue.prepare(T_IN, sector, &[memory])?;
    let next = queue.ring.next_avail();
    queue.ring.force_avail_idx(next);
    Ok(head)
}

/// Class 16: chains that were made available without any kick are taken when their ring starts: the first time, after a
/// stop, for a new front-end and for a new daemon.
#[test]
fn a_ring_that_starts_is_processed_unprompted() -> Result<()> {
    let (mut firsts, mut starts, mut reconnects, mut deaths) = (0, 0, 0, 0);
    for (medium, without) in [(Medium::Nvram, 0), (Medium::Ssd, 0), (Medium::Nvram, F_EVENT_IDX)] {
        let mut site = Site::new(medium, 100)?;
        site.operator.create("vm1", SIZE, &json!({}))?;
        let options = Options { without, ..Options::default() };
        let mut machine = Machine::new(&site.socket("vm1"), options, GuestRam::standard()?)?;
        let mut sector = 0;
        let mut round =
            |machine: &mut Machine, begin: &mut dyn FnMut(&mut Machine) -> Result<()>| -> Result<()> {
                // A ring's worth now and then, so that indices wrap and the first look must take more than one chain.
                let chains = if sector % 5 == 0 { 40 } else { 1 };
                let heads: Vec<u16> = (0..chains).map(|_| show(machine, sector)).collect::<Result<_>>()?;
                sector += 1;
                begin(machine)?;
                for head in heads {
                    let answer = machine.queue(0)?.wait(head, PATIENCE).context("shown without a kick")?;
                    ensure!(answer.status == S_OK, "{answer:?}");
                }
                Ok(())
            };
        round(&mut machine, &mut |machine| {
            machine.connect()?;
            machine.run()
        })?;
        firsts += 1;
        for _ in 0..300 {
            machine.stop_queue(0)?;
            round(&mut machine, &mut |machine| machine.start_queue(0))?;
            starts += 1;
        }
        for _ in 0..20 {
            machine.disconnect();
            round(&mut machine, &mut Machine::reconnect)?;
            reconnects += 1;
        }
        for _ in 0..5 {
            site.daemon.kill()?;
            round(&mut machine, &mut |machine| {
                site.revive()?;
                machine.reconnect()
            })?;
            deaths += 1;
        }
        site.finish()?;
    }
    println!(
        "{firsts} first starts, {starts} starts, {reconnects} reconnects, {deaths} deaths without a kick"
    );
    Ok(())
}

fn jobs(site: &mut Site) -> Result<Vec<JobInfo>> {
    let list: Value = site.operator.call(method::JOB_LIST, &json!({}))?;
    Ok(serde_json::from_value(list["jobs"].clone())?)
}

/// Waits for less time than a sleep takes.
fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// V-38, V-39: killed with an UNPLUG on its way and a WAIT parked.
#[test]
fn a_kill_in_mid_unplug_leaves_each_range_here_or_gone_and_the_wait_stale() -> Result<()> {
    let mut rng = rng(seed("wire_reconnect/unplug"));
    let mut outcomes = [0u32; 3];
    let mut site = Site::with(Medium::Nvram, 100, &["--block-size", "16K"], &[])?;
    let (mut machine, mut driver) = site.driver("vm1", SIZE)?;
    let total = driver.hello.total_blocks;
    let block = driver.block_size();
    let mut bytes = vec![0; 4096];
    for index in 0..total {
        pattern::fill(&mut bytes, 1, index.into());
        ensure!(driver.queue.write(u64::from(index) * block, &bytes)? == S_OK);
    }
    ensure!(driver.queue.flush()? == S_OK);
    for round in 0..12 {
        let target = driver.count() - 300;
        site.operator.resize("vm1", u64::from(target) * block, &json!({}))?;
        driver.expect_news()?;
        driver.park(driver.sizes.seq)?;
        let ranges = anywhere(&mut rng)(&driver, 300);
        let request = Request::Unplug { epoch: driver.epoch(), ranges: ranges.clone() };
        let (body, ram) = (request.encode(), machine.ram.clone());
        let area = driver.queue.bounce();
        ram.write(area, &body);
        let room = 24 + 300;
        let data = [
            Segment::out(area, u32::try_from(body.len())?),
            Segment::into(area + (64 << 10), u32::try_from(room)?),
        ];
        let head = driver.queue.submit(RequestType::Unplug as u32, 0, &data)?;
        spin(Duration::from_micros(rng.random_range(0..250)));
        site.daemon.kill()?;
        let answered = driver.queue.answered(head)?;
        let wait_answered = driver.wait_answer(Duration::ZERO)?;
        site.revive()?;
        machine.reconnect()?;

        let answer = match answered {
            Some(answer) => answer,
            None => driver.queue.wait(head, PATIENCE).with_context(|| format!("round {round}: UNPLUG"))?,
        };
        ensure!(answer.status == S_OK, "round {round}: {answer:?}");
        let response = Response::decode(RequestType::Unplug, &ram.read(area + (64 << 10), room))?;
        let told = match (&response.result, response.body) {
            (RequestResult::Ok, ResponseBody::Ranges(statuses)) => {
                ensure!(statuses.iter().all(|status| *status == RangeStatus::Ok), "{statuses:?}");
                true
            }
            (RequestResult::Stale, _) => false,
            other => anyhow::bail!("round {round}: {other:?}"),
        };
        let wait = match wait_answered {
            Some(wait) => wait,
            None => driver.wait_answer(PATIENCE)?.with_context(|| format!("round {round}: WAIT"))?,
        };
        ensure!(matches!(wait.result, RequestResult::Stale | RequestResult::Ok), "round {round}: {wait:?}");

        let before = driver.plugged.clone();
        driver.hello()?;
        let gone = |index: u32| before[index as usize] && !driver.plugged[index as usize];
        let named = ranges.iter().filter(|range| gone(range.start)).count();
        let all = (0..total).filter(|index| gone(*index)).count();
        ensure!(named == all, "round {round}: blocks went that were not named");
        ensure!(!told || named == 300, "round {round}: answered OK, and {named} of 300 are gone");
        outcomes[if told { 2 } else { usize::from(named > 0) }] += 1;
        // The target outlives the daemon, as a job that an operator can see and wait for.
        if driver.count() > target {
            let resumed = jobs(&mut site)?.into_iter().find(|job| !job.state.is_final());
            let resumed = resumed.context("no job for a target that is pending")?;
            let mut rest = anywhere(&mut rng);
            ensure!(driver.follow(&mut rest)?);
            ensure!(site.operator.finish(resumed.id)?.state == JobState::Done);
        }
        driver.agree(&mut site.operator, "vm1")?;
    }
    println!(
        "nothing done {}, done and not told {}, done and told {}",
        outcomes[0], outcomes[1], outcomes[2]
    );
    for index in 0..total {
        if driver.plugged[index as usize] {
            pattern::fill(&mut bytes, 1, index.into());
            ensure!(driver.queue.read(u64::from(index) * block, 4096)? == Ok(bytes.clone()), "block {index}");
        }
    }
    site.finish()
}

/// V-22, V-38: a parked WAIT comes back as STALE after a crash, and also if only the front-end left.
#[test]
fn a_parked_wait_is_answered_stale_after_a_crash_or_a_reconnect() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    let (mut machine, mut driver) = site.driver("vm1", SIZE)?;
    for round in 0..6 {
        driver.park(driver.sizes.seq)?;
        let head = driver.queue.submit(0, 0, &[Segment::into(driver.queue.bounce(), 4096)])?;
        ensure!(driver.queue.wait(head, PATIENCE)?.status == S_OK);
        match round % 3 {
            0 => site.kill_and_restart()?,
            1 => {
                ensure!(site.daemon.terminate()?.success());
                site.revive()?;
            }
            _ => {}
        }
        machine.reconnect()?;
        let response = driver.wait_answer(PATIENCE)?.with_context(|| format!("round {round}"))?;
        // A daemon that ends in order stops its queues first.
        let expected = if round % 3 == 1 { RequestResult::NoNews } else { RequestResult::Stale };
        ensure!(response.result == expected, "round {round}: {response:?}");
        driver.hello()?;
        driver.agree(&mut site.operator, "vm1")?;
    }
    site.finish()
}

/// V-8 for a stock driver, through a crash.
#[test]
fn a_live_resize_reaches_a_stock_driver_also_after_a_crash() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    site.operator.create("vm1", 16 * MIB, &json!({ "max_bytes": SIZE }))?;
    let mut machine = Machine::start(&site.socket("vm1"), Options::default())?;
    for mib in [24u64, 32, 40] {
        let bytes = vec![u8::try_from(mib)?; 4096];
        let job = site.operator.resize("vm1", mib * MIB, &json!({}))?;
        machine.wait_capacity(mib * MIB)?;
        ensure!(site.operator.finish(job.id)?.state == JobState::Done);
        let sector = (mib * MIB - 4096) / SECTOR;
        ensure!(machine.queue(0)?.write(sector * SECTOR, &bytes)? == S_OK);
        ensure!(machine.queue(0)?.flush()? == S_OK);
        site.kill_and_restart()?;
        machine.reconnect()?;
        ensure!(machine.channel()?.config_changed(PATIENCE)?, "no message after a reconnect");
        ensure!(machine.capacity()? == mib * MIB);
        ensure!(machine.queue(0)?.read(sector * SECTOR, 4096)? == Ok(bytes));
    }
    site.finish()
}

/// Verified I/O on blocks that stay, with the daemon killed between and during resizes of the rest.
#[test]
fn resizes_and_kills_leave_the_blocks_that_stay_alone() -> Result<()> {
    let seed = seed("wire_reconnect/resize");
    let mut rng = rng(!seed);
    let mut site = Site::new(Medium::Nvram, 100)?;
    let mut machine = site.machine("vm1", SIZE, Options::default())?;
    let mut driver = Driver::start(machine.take_queue(0)?)?;
    let unit = machine.logical_block()?.into();
    let half = SIZE / 2;
    let profile = Profile { bytes: 0..half, unit, block: BLOCK, depth: 32, zeroing: true, tables: true };
    let mut load = Load::new(vec![machine.take_queue(1)?], profile, seed)?;
    let upper = |driver: &Driver, count: u32| {
        let first = driver.hello.total_blocks / 2;
        vssd_tests::mock::driver::pick(driver.present().filter(move |block| *block >= first), count)
    };
    for round in 0..20 {
        load.run(200)?;
        load.fill()?;
        // Another size than now: the same one is no news.
        let now = u64::from(driver.count());
        let target = (now - 520 + rng.random_range(1..504)) % 504 + 520;
        let job = site.operator.resize("vm1", target * BLOCK, &json!({}))?;
        ensure!(driver.attend(&mut { upper })?, "round {round}");
        ensure!(site.operator.finish(job.id)?.state == JobState::Done, "round {round}");
        load.fill()?;
        if rng.random() {
            site.kill_and_restart()?;
            machine.reconnect()?;
            driver.hello()?;
        }
        driver.agree(&mut site.operator, "vm1").with_context(|| format!("round {round}"))?;
    }
    load.verify()?;
    site.finish()
}
