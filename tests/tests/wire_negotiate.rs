// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Negotiation under stress. After each scenario STATE, the driver's model and the operator's view name the same blocks, no
//! job hangs, and the pool is sound.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use serde_json::{Value, json};
use vssd_protocol::control::{ErrorCode, Event, JobInfo, JobState, OnTimeout, PullPolicy, method};
use vssd_protocol::guest::{DeclineReason, NEWS_STATE, RangeStatus, Reason, RequestResult, Urgency};
use vssd_protocol::units::BlockRange;
use vssd_tests::mock::driver::{Driver, anywhere, highest, lowest, pick};
use vssd_tests::mock::machine::Machine;
use vssd_tests::mock::queue::S_OK;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::pattern;
use vssd_tests::scenario::Medium;

const SIZE: u64 = 64 * MIB;
const BLOCKS: u32 = 1024;

fn bytes(blocks: u32) -> u64 {
    u64::from(blocks) * BLOCK
}

/// A vSSD in use: every fourth block holds data.
fn site() -> Result<(Site, Machine, Driver)> {
    let mut site = Site::new(Medium::Nvram, 160)?;
    site.operator.create("vm1", SIZE, &json!({ "max_bytes": 2 * SIZE, "min_bytes": 4 * MIB }))?;
    let mut machine = Machine::start(&site.socket("vm1"), Default::default())?;
    let mut driver = Driver::start(machine.take_queue(0)?)?;
    for index in (0..BLOCKS).step_by(4) {
        write(&mut driver, index)?;
    }
    Ok((site, machine, driver))
}

fn content(index: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    pattern::fill(&mut bytes, 77, index.into());
    bytes
}

fn write(driver: &mut Driver, index: u32) -> Result<()> {
    ensure!(driver.queue.write(bytes(index), &content(index))? == S_OK, "write to block {index}");
    Ok(())
}

/// Blocks that hold data hold the right data, or none at all if they were away.
fn expect_data(driver: &mut Driver, was_away: &[bool]) -> Result<()> {
    for index in (0..BLOCKS).step_by(4) {
        if driver.plugged[index as usize] {
            let zeroed = was_away.get(index as usize).copied().unwrap_or(false);
            let expected = if zeroed { vec![0; 4096] } else { content(index) };
            ensure!(driver.queue.read(bytes(index), 4096)? == Ok(expected), "block {index}");
        }
    }
    Ok(())
}

/// The end of every scenario.
fn settle(mut site: Site, mut driver: Driver) -> Result<()> {
    driver.agree(&mut site.operator, "vm1")?;
    let jobs: Value = site.operator.call(method::JOB_LIST, &json!({}))?;
    let jobs: Vec<JobInfo> = serde_json::from_value(jobs["jobs"].clone())?;
    ensure!(jobs.iter().all(|job| job.state.is_final()), "{jobs:?}");
    ensure!(!jobs.is_empty());
    site.finish()
}

fn shrink(site: &mut Site, to: u32, more: &Value) -> Result<JobInfo> {
    site.operator.resize("vm1", bytes(to), more)
}

#[test]
fn a_guest_gives_what_is_asked_and_takes_it_back() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let mut rng = rng(seed("wire_negotiate/plain"));
    let mut away = vec![false; BLOCKS as usize];
    for (round, target) in [700, 300, 1024, 64, 65, 1024].into_iter().enumerate() {
        let job = shrink(&mut site, target, &json!({ "deadline_ms": 60_000 }))?;
        ensure!(driver.attend(&mut anywhere(&mut rng))?, "round {round}");
        let job = site.operator.finish(job.id)?;
        ensure!(job.state == JobState::Done && job.plugged_bytes == bytes(target), "{job:?}");
        driver.absent().filter(|block| *block < BLOCKS).for_each(|block| away[block as usize] = true);
        driver.agree(&mut site.operator, "vm1")?;
        expect_data(&mut driver, &away)?;
    }
    settle(site, driver)
}

/// V-41 without a deadline: the job ends and the target is withdrawn, so that nothing drifts later.
#[test]
fn a_guest_that_declines_ends_the_job_refused() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    for reason in [DeclineReason::Nothing, DeclineReason::Busy, DeclineReason::Policy, DeclineReason::Error] {
        let job = shrink(&mut site, 900, &json!({}))?;
        let news = driver.expect_news()?;
        ensure!(news.sizes.requested_blocks == 900 && news.reason == Reason::Operator, "{news:?}");
        ensure!(driver.decline(17, reason)? == RequestResult::Ok);
        let job = site.operator.finish(job.id)?;
        ensure!(job.state == JobState::Refused && job.error == Some(ErrorCode::GuestRefused), "{job:?}");
        ensure!(site.operator.show("vm1")?.driver.could_give_bytes == Some(bytes(17)));
        // The withdrawal is news too.
        let news = driver.expect_news()?;
        ensure!(news.sizes.requested_blocks == BLOCKS, "{news:?}");
    }
    settle(site, driver)
}

#[test]
fn a_guest_that_gives_part_and_declines_the_rest_ends_the_job_partial() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let job = shrink(&mut site, 512, &json!({}))?;
    driver.expect_news()?;
    driver.give(&lowest(&driver, 100))?;
    ensure!(driver.decline(0, DeclineReason::Busy)? == RequestResult::Ok);
    let job = site.operator.finish(job.id)?;
    ensure!(job.state == JobState::Partial && job.plugged_bytes == bytes(BLOCKS - 100), "{job:?}");
    driver.news(Duration::from_millis(200))?;
    ensure!(driver.sizes.requested_blocks == BLOCKS - 100, "both sides agree on where it stopped");
    settle(site, driver)
}

/// V-41 with a deadline: the guest may decline and still change its mind.
#[test]
fn a_guest_that_declines_in_time_may_still_give() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let job = shrink(&mut site, 900, &json!({ "deadline_ms": 30_000, "on_timeout": OnTimeout::Wait }))?;
    driver.expect_news()?;
    ensure!(driver.decline(5, DeclineReason::Busy)? == RequestResult::Ok);
    let waiting = site.operator.job(job.id)?;
    ensure!(!waiting.state.is_final() && waiting.message.contains("declined"), "{waiting:?}");
    ensure!(driver.follow(&mut highest)?);
    let job = site.operator.finish(job.id)?;
    ensure!(job.state == JobState::Done, "{job:?}");
    settle(site, driver)
}

/// V-29.
#[test]
fn a_decline_of_old_news_says_nothing_about_the_new_target() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    shrink(&mut site, 900, &json!({}))?;
    let old = driver.expect_news()?;
    let job = shrink(&mut site, 800, &json!({}))?;
    driver.expect_news()?;
    let newest = driver.sizes.seq;
    driver.sizes.seq = old.sizes.seq;
    ensure!(driver.decline(0, DeclineReason::Nothing)? == RequestResult::Ok);
    ensure!(!site.operator.job(job.id)?.state.is_final(), "the decline was of something else");
    driver.sizes.seq = newest + 1;
    ensure!(driver.decline(0, DeclineReason::Nothing)? == RequestResult::Invalid, "of news to come");
    ensure!(driver.follow(&mut lowest)?);
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    settle(site, driver)
}

#[test]
fn a_silent_guest_past_its_deadline_is_asked_on_under_policy_wait() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let job = shrink(&mut site, 900, &json!({ "deadline_ms": 300, "on_timeout": OnTimeout::Wait }))?;
    let job = site.operator.finish(job.id)?;
    ensure!(job.state == JobState::Expired && job.error == Some(ErrorCode::TimedOut), "{job:?}");
    driver.expect_news()?;
    ensure!(driver.sizes.requested_blocks == 900, "the target stands");
    ensure!(driver.follow(&mut lowest)?, "a late guest may still reach it");
    settle(site, driver)
}

#[test]
fn a_silent_guest_past_its_deadline_is_left_alone_under_policy_fail() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let job = shrink(&mut site, 900, &json!({ "deadline_ms": 300, "on_timeout": OnTimeout::Fail }))?;
    driver.expect_news()?;
    driver.give(&lowest(&driver, 10))?;
    let job = site.operator.finish(job.id)?;
    ensure!(job.state == JobState::Expired && job.plugged_bytes == bytes(BLOCKS - 10), "{job:?}");
    driver.expect_news()?;
    ensure!(driver.sizes.requested_blocks == BLOCKS - 10, "the request is withdrawn");
    settle(site, driver)
}

/// V-40.
#[test]
fn a_silent_guest_past_its_deadline_loses_empty_blocks_first_under_policy_force() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let job = shrink(&mut site, 500, &json!({ "deadline_ms": 300, "on_timeout": OnTimeout::Force }))?;
    let job = site.operator.finish(job.id)?;
    ensure!(job.state == JobState::Done && job.plugged_bytes == bytes(500), "{job:?}");
    let mut state_news = false;
    while driver.sizes.plugged_blocks != 500 || !state_news {
        let news = driver.expect_news()?;
        state_news |= news.flags & NEWS_STATE != 0;
    }
    driver.refresh()?;
    // 768 of 1024 blocks were empty and 524 had to go: no data was lost.
    ensure!((0..BLOCKS).step_by(4).all(|index| driver.plugged[index as usize]));
    expect_data(&mut driver, &[])?;
    settle(site, driver)
}

/// V-40: an operator's force does not wait at all, and says what it cost.
#[test]
fn force_takes_blocks_at_once_and_tells_what_was_lost() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let job = shrink(&mut site, 200, &json!({ "force": true }))?;
    let job = site.operator.finish(job.id)?;
    ensure!(job.state == JobState::Done && job.plugged_bytes == bytes(200), "{job:?}");
    driver.expect_news()?;
    driver.refresh()?;
    // 256 blocks held data and 200 are left: all of those hold data.
    ensure!(driver.present().all(|block| block % 4 == 0), "an empty block was kept, a full one was taken");
    expect_data(&mut driver, &[])?;
    let events = events(&mut site, "shrink.forced")?;
    let lost: u64 = events.iter().filter_map(|event| event.data["lost_bytes"].as_u64()).sum();
    ensure!(lost == bytes(56), "{events:?}");
    settle(site, driver)
}

/// All events kept whose name begins with `prefix`.
fn events(site: &mut Site, prefix: &str) -> Result<Vec<Event>> {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(site.control_socket())?;
    stream.set_read_timeout(Some(Duration::from_millis(500)))?;
    let params = json!({ "filter": [prefix], "since_seq": 0 });
    let call = json!({ "jsonrpc": "2.0", "id": 1, "method": method::EVENTS_SUBSCRIBE, "params": params });
    stream.write_all(format!("{call}\n").as_bytes())?;
    let mut events = Vec::new();
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        let message: Value = serde_json::from_str(&line)?;
        if message["method"] == method::EVENT {
            events.push(serde_json::from_value(message["params"].clone())?);
        }
    }
    Ok(events)
}

#[test]
fn raising_the_target_in_mid_shrink_cancels_the_rest_of_it() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let down = shrink(&mut site, 500, &json!({}))?;
    driver.expect_news()?;
    driver.give(&lowest(&driver, 300))?;
    let up = shrink(&mut site, 900, &json!({}))?;
    ensure!(site.operator.finish(down.id)?.state == JobState::Superseded);
    ensure!(driver.attend(&mut lowest)?);
    let up = site.operator.finish(up.id)?;
    ensure!(up.state == JobState::Done && up.plugged_bytes == bytes(900), "{up:?}");
    // Beyond where it began, too.
    let beyond = shrink(&mut site, BLOCKS + 200, &json!({}))?;
    ensure!(driver.attend(&mut lowest)?);
    ensure!(site.operator.finish(beyond.id)?.state == JobState::Done);
    settle(site, driver)
}

#[test]
fn a_cancelled_job_leaves_things_where_they_are() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let job = shrink(&mut site, 500, &json!({}))?;
    driver.expect_news()?;
    driver.give(&lowest(&driver, 50))?;
    let job = site.operator.cancel(job.id)?;
    ensure!(job.state == JobState::Cancelled && job.plugged_bytes == bytes(BLOCKS - 50), "{job:?}");
    driver.expect_news()?;
    ensure!(driver.sizes.requested_blocks == BLOCKS - 50);
    site.operator.refused(ErrorCode::Conflict, method::JOB_CANCEL, &json!({ "id": job.id }))?;
    site.operator.refused(ErrorCode::NotFound, method::JOB_CANCEL, &json!({ "id": 9999 }))?;
    settle(site, driver)
}

/// V-36, V-37, D-7: a reset ends the session and moves nothing.
#[test]
fn a_device_reset_in_mid_shrink_ends_the_session_and_nothing_else() -> Result<()> {
    let (mut site, mut machine, mut driver) = site()?;
    let job = shrink(&mut site, 800, &json!({ "deadline_ms": 60_000 }))?;
    driver.expect_news()?;
    driver.give(&lowest(&driver, 100))?;
    driver.park(driver.sizes.seq)?;
    let (epoch, model) = (driver.epoch(), driver.plugged.clone());

    machine.reset()?;
    let mut driver = Driver::start(machine.take_queue(0)?)?;
    ensure!(driver.epoch() != epoch);
    ensure!(driver.plugged == model, "a reset changed the plugged set");
    ensure!(driver.sizes.requested_blocks == 800, "the target outlives the driver");
    let still = site.operator.job(job.id)?;
    ensure!(!still.state.is_final(), "{still:?}");
    ensure!(driver.follow(&mut lowest)?);
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    expect_data(&mut driver, &[])?;
    settle(site, driver)
}

/// V-37: a queue that starts at 0 belongs to a new driver, even if the old one said nothing.
#[test]
fn a_new_driver_that_says_no_hello_gets_nothing_of_the_old_session() -> Result<()> {
    let (mut site, mut machine, driver) = site()?;
    let old = driver.epoch();
    machine.reset()?;
    // Another driver that guesses: the old epoch is worth nothing.
    let mut queue = machine.take_queue(0)?;
    let area = queue.bounce();
    let request = vssd_protocol::guest::Request::Unplug { epoch: old, ranges: vec![BlockRange::new(0, 8)] };
    queue.ring.ram.write(area, &request.encode());
    let data = [
        vssd_tests::mock::ring::Segment::out(area, 24),
        vssd_tests::mock::ring::Segment::into(area + 4096, 25),
    ];
    let answer = queue.call(0x5653_0004, 0, &data)?;
    ensure!(answer.status == S_OK && queue.ring.ram.read(area + 4096, 1) == [1], "STALE");
    let mut driver = Driver::start(queue)?;
    ensure!(driver.count() == BLOCKS);
    let job = shrink(&mut site, 1000, &json!({}))?;
    ensure!(driver.attend(&mut lowest)?);
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    settle(site, driver)
}

#[test]
fn a_guest_that_reboots_over_and_over_in_mid_shrink_ends_where_both_sides_agree() -> Result<()> {
    let (mut site, mut machine, mut driver) = site()?;
    let mut rng = rng(seed("wire_negotiate/reboots"));
    let job = shrink(&mut site, 200, &json!({ "deadline_ms": 120_000 }))?;
    let mut boots = 0;
    while driver.count() > 200 {
        let some = rng.random_range(1..80).min(driver.count() - 200);
        driver.give(&anywhere(&mut rng)(&driver, some))?;
        if boots < 12 && rng.random_ratio(2, 3) {
            boots += 1;
            let model = driver.plugged.clone();
            machine.reset()?;
            driver = Driver::start(machine.take_queue(0)?)?;
            ensure!(driver.plugged == model, "boot {boots}");
        }
    }
    println!("{boots} reboots");
    let job = site.operator.finish(job.id)?;
    ensure!(job.state == JobState::Done, "{job:?}");
    expect_data(&mut driver, &[])?;
    settle(site, driver)
}

/// A front-end that goes away in mid-shrink and comes back with another guest.
#[test]
fn a_machine_that_is_killed_in_mid_shrink_and_started_again_goes_on() -> Result<()> {
    let (mut site, mut machine, mut driver) = site()?;
    let job = shrink(&mut site, 800, &json!({ "deadline_ms": 60_000 }))?;
    driver.expect_news()?;
    driver.give(&lowest(&driver, 100))?;
    driver.park(driver.sizes.seq)?;
    let model = driver.plugged.clone();
    machine.disconnect();
    drop((machine, driver));
    thread::sleep(Duration::from_millis(100));
    let waiting = site.operator.job(job.id)?;
    ensure!(!waiting.state.is_final(), "nobody there to choose, so the job waits: {waiting:?}");
    ensure!(site.operator.show("vm1")?.plugged_bytes == bytes(BLOCKS - 100), "the host chose blocks");

    let mut machine = Machine::start(&site.socket("vm1"), Default::default())?;
    let mut driver = Driver::start(machine.take_queue(0)?)?;
    ensure!(driver.plugged == model, "V-36");
    ensure!(driver.follow(&mut lowest)?);
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    expect_data(&mut driver, &[])?;
    settle(site, driver)
}

/// C-5.
#[test]
fn of_two_operators_who_resize_at_once_one_wins_and_the_other_is_told() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let mut won = Vec::new();
    for round in 0..20u32 {
        let before = site.operator.show("vm1")?.requested_bytes;
        let contenders: Vec<_> = (0..4u32)
            .map(|i| {
                let mut operator = site.another_operator()?;
                let to = bytes(600 + 4 * round + i);
                Ok(thread::spawn(move || {
                    let more = json!({ "expected_bytes": before });
                    operator.resize("vm1", to, &more).map(|job| (to, job.id))
                }))
            })
            .collect::<Result<_>>()?;
        let mut winners = Vec::new();
        for contender in contenders {
            match contender.join().map_err(|_| anyhow::anyhow!("a contender panicked"))? {
                Ok(winner) => winners.push(winner),
                Err(error) => {
                    let refused = error.downcast::<vssd_tests::mock::operator::Refused>()?;
                    ensure!(refused.0.data.code == ErrorCode::Conflict, "{refused}");
                    ensure!(!refused.0.data.detail.is_null(), "the current value is told: {refused:?}");
                }
            }
        }
        ensure!(winners.len() == 1, "round {round}: {winners:?}");
        ensure!(site.operator.show("vm1")?.requested_bytes == winners[0].0);
        won.extend(winners);
    }
    ensure!(driver.attend(&mut lowest)?);
    let (last, earlier) = won.split_last().context("nobody won")?;
    ensure!(site.operator.finish(last.1)?.state == JobState::Done);
    for (_, id) in earlier {
        ensure!(site.operator.job(*id)?.state == JobState::Superseded);
    }
    settle(site, driver)
}

/// V-30.
#[test]
fn a_pull_is_told_to_operators_or_granted_within_what_there_is() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    // Notify: an event, no more.
    ensure!(driver.pull(16, Urgency::Pressure)? == RequestResult::Ok);
    ensure!(driver.news(Duration::from_millis(200))?.is_none() || driver.sizes.requested_blocks == BLOCKS);
    let told = events(&mut site, "guest.pull")?;
    ensure!(told.len() == 1 && told[0].data["urgency"] == "pressure", "{told:?}");
    ensure!(told[0].data["want_bytes"] == bytes(16), "{told:?}");

    site.operator.limits("vm1", &json!({ "pull": PullPolicy::Grant }))?;
    ensure!(driver.pull(16, Urgency::Wish)? == RequestResult::Ok);
    while driver.sizes.requested_blocks != BLOCKS + 16 {
        let news = driver.expect_news()?;
        ensure!(news.reason != Reason::Operator, "{news:?}");
    }
    ensure!(driver.follow(&mut lowest)?, "the driver takes what it was granted");
    driver.agree(&mut site.operator, "vm1")?;

    // More than the pool can promise and than the operator allows: as much as there is, never more.
    ensure!(driver.pull(u32::MAX, Urgency::Critical)? == RequestResult::Ok);
    driver.news(PATIENCE)?.context("no grant of what is left")?;
    ensure!(driver.follow(&mut lowest)?);
    let shown = site.operator.show("vm1")?;
    ensure!(shown.requested_bytes <= shown.max_bytes, "{shown:?}");
    let pool = site.operator.pool()?;
    ensure!(pool.promised_bytes <= pool.size_bytes, "{pool:?}");
    println!("granted up to {} of {} blocks", driver.count(), driver.hello.total_blocks);

    let job = shrink(&mut site, BLOCKS, &json!({}))?;
    ensure!(driver.attend(&mut highest)?);
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    settle(site, driver)
}

/// D-13: more than asked for, and without having been asked.
#[test]
fn a_guest_may_give_more_than_it_was_asked_for() -> Result<()> {
    let (mut site, _machine, mut driver) = site()?;
    let job = shrink(&mut site, 1000, &json!({}))?;
    driver.expect_news()?;
    driver.give(&pick(driver.present(), 200))?;
    let job = site.operator.finish(job.id)?;
    ensure!(job.state == JobState::Done && job.plugged_bytes <= bytes(1000), "{job:?}");
    driver.refresh()?;
    // Up to what is requested it may take some back.
    let statuses = driver.plug(&pick(driver.absent(), 176))?.context("STALE")?;
    ensure!(statuses.iter().all(|status| *status == RangeStatus::Ok), "{statuses:?}");
    let more = pick(driver.absent(), 1);
    ensure!(driver.plug(&more)?.context("STALE")? == [RangeStatus::Limit]);
    settle(site, driver)
}

/// Operators and guest at random against each other for a while; then everything comes to rest.
#[test]
fn random_histories_end_in_agreement() -> Result<()> {
    let seed = seed("wire_negotiate/random");
    let mut rng = rng(seed);
    let (mut site, mut machine, mut driver) = site()?;
    let mut away = vec![false; 2 * BLOCKS as usize];
    let mut last = None;
    for step in 0..300 {
        match rng.random_range(0..12) {
            0..3 => {
                let to = rng.random_range(64..=2 * BLOCKS - 512);
                let deadline = [0u64, 5, 50, 60_000][rng.random_range(0..4)];
                let policy = [OnTimeout::Wait, OnTimeout::Fail][rng.random_range(0..2)];
                let more = json!({ "deadline_ms": deadline, "on_timeout": policy });
                match site.operator.resize("vm1", bytes(to), &more) {
                    Ok(job) => last = Some(job.id),
                    Err(error) => {
                        let refused = error.downcast::<vssd_tests::mock::operator::Refused>()?;
                        ensure!(refused.0.data.code == ErrorCode::PoolFull, "step {step}: {refused}");
                    }
                }
            }
            3..7 => {
                let some = rng.random_range(1..60).min(driver.count() - 64);
                let ranges = anywhere(&mut rng)(&driver, some);
                if driver.unplug(&ranges)?.is_none() {
                    bail!("step {step}: STALE without cause");
                }
            }
            7..9 => {
                let ranges = pick(driver.absent().rev(), rng.random_range(1..60));
                driver.plug(&ranges)?.context("STALE without cause")?;
            }
            9 => {
                if let Some(id) = last {
                    // It may have ended meanwhile.
                    let _ = site.operator.cancel(id);
                }
            }
            10 => {
                driver.news(Duration::from_millis(1))?;
                if rng.random() {
                    driver.decline(rng.random_range(0..100), DeclineReason::Busy)?;
                }
            }
            _ => {
                if rng.random_ratio(1, 6) {
                    let model = driver.plugged.clone();
                    machine.reset()?;
                    driver = Driver::start(machine.take_queue(0)?)?;
                    ensure!(driver.plugged == model, "step {step}: a reset changed the plugged set");
                } else {
                    driver.hello()?;
                }
            }
        }
        driver.absent().for_each(|block| away[block as usize] = true);
    }
    driver.refresh()?;
    let job = site.operator.resize("vm1", SIZE, &json!({}))?;
    driver.refresh()?;
    ensure!(driver.follow(&mut anywhere(&mut rng))?);
    let job = site.operator.finish(job.id)?;
    ensure!(job.state == JobState::Done, "{job:?}");
    driver.absent().for_each(|block| away[block as usize] = true);
    expect_data(&mut driver, &away)?;
    settle(site, driver)
}
