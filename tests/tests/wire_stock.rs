// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver that does not know the guest channel: an ordinary disk that grows live and is never shrunk into its data.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vssd_protocol::control::{
    DriverKind, ErrorCode, EstimateAnswer, JobKind, JobState, ReclaimAnswer, method,
};
use vssd_protocol::guest::STATUS_EVICTED;
use vssd_protocol::letter::{Letter, Notice, Report, Shortfall};
use vssd_protocol::units::BlockRange;
use vssd_tests::mock::PATIENCE;
use vssd_tests::mock::driver::Driver;
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::queue::{S_IOERR, S_OK, SECTOR};
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::pattern;
use vssd_tests::scenario::Medium;
use vssd_tests::wait::Deadline;

/// A stock guest of 32 MiB that may have 64, known as such.
fn site() -> Result<(Site, Machine)> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    site.operator.create("vm1", 32 * MIB, &json!({ "max_bytes": 64 * MIB }))?;
    let mut machine = Machine::start(&site.socket("vm1"), Options::default())?;
    let _ = machine.queue(0)?.read(0, 4096)?;
    let mut operator = site.another_operator()?;
    Deadline::after(PATIENCE).until("the driver to count as a stock driver", || {
        Ok(operator.show("vm1")?.driver.kind == DriverKind::Stock)
    })?;
    Ok((site, machine))
}

fn content(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    pattern::fill(&mut bytes, seed, 0);
    bytes
}

/// V-6, V-8, V-42.
#[test]
fn a_grow_is_seen_live() -> Result<()> {
    let (mut site, mut machine) = site()?;
    ensure!(machine.capacity()? == 32 * MIB);
    let beyond = 40 * MIB;
    // The address space is there, its blocks are not plugged yet.
    ensure!(machine.queue(0)?.read(beyond, 4096)? == Err(STATUS_EVICTED));
    ensure!(machine.queue(0)?.read(64 * MIB, 4096)? == Err(S_IOERR), "past the address space");
    let job = site.operator.resize("vm1", 48 * MIB, &json!({}))?;
    machine.wait_capacity(48 * MIB)?;
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    ensure!(machine.queue(0)?.write(beyond, &content(1))? == S_OK);
    ensure!(machine.queue(0)?.read(beyond, 4096)? == Ok(content(1)));
    site.finish()
}

/// V-43.
#[test]
fn a_shrink_never_reaches_into_data_unless_it_is_forced() -> Result<()> {
    let (mut site, mut machine) = site()?;
    let last = 20 * MIB;
    ensure!(machine.queue(0)?.write(last, &content(2))? == S_OK);
    let too_small = json!({ "name": "vm1", "size_bytes": 16 * MIB });
    let error = site.operator.refused(ErrorCode::InUse, method::DEVICE_RESIZE, &too_small)?;
    let end = last + BLOCK;
    ensure!(error.data.detail["last_allocated_bytes"] == end, "{error:?}");
    ensure!(error.data.hint.is_some(), "{error:?}");
    ensure!(machine.capacity()? == 32 * MIB && machine.queue(0)?.read(last, 4096)? == Ok(content(2)));

    // Down to the last block that holds data it may go.
    let job = site.operator.resize("vm1", end, &json!({}))?;
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    machine.wait_capacity(end)?;
    ensure!(machine.queue(0)?.read(last, 4096)? == Ok(content(2)));
    ensure!(machine.queue(0)?.write(end, &content(2))? == STATUS_EVICTED);

    // By force, the tail goes with what it holds.
    let job = site.operator.resize("vm1", 16 * MIB, &json!({ "force": true }))?;
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    machine.wait_capacity(16 * MIB)?;
    ensure!(machine.queue(0)?.read(last, 4096)? == Err(STATUS_EVICTED));
    ensure!(machine.queue(0)?.read(0, 4096)? == Ok(vec![0; 4096]));
    site.finish()
}

#[test]
fn discarded_space_returns_to_the_pool_and_makes_room_for_a_shrink() -> Result<()> {
    let (mut site, mut machine) = site()?;
    let queue = machine.queue(0)?;
    for block in 0..512u64 {
        ensure!(queue.write(block * BLOCK, &content(block))? == S_OK);
    }
    ensure!(site.operator.pool()?.allocated_bytes == 32 * MIB);
    // fstrim in pieces of a MiB, everything behind the first 4.
    for mib in 4..32 {
        ensure!(queue.discard(mib * MIB, MIB)? == S_OK);
    }
    ensure!(queue.flush()? == S_OK);
    let mut operator = site.another_operator()?;
    Deadline::after(PATIENCE).until("the space to be back in the pool", || {
        let pool = operator.pool()?;
        Ok(pool.allocated_bytes == 4 * MIB && pool.scrubbing_bytes == 0)
    })?;
    let shown = site.operator.show("vm1")?;
    ensure!(shown.plugged_bytes == 32 * MIB && shown.allocated_bytes == 4 * MIB, "{shown:?}");
    for block in 0..512u64 {
        let expected = if block < 64 { content(block) } else { vec![0; 4096] };
        ensure!(queue.read(block * BLOCK, 4096)? == Ok(expected), "block {block}");
    }
    let job = site.operator.resize("vm1", 4 * MIB, &json!({}))?;
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    machine.wait_capacity(4 * MIB)?;
    site.finish()
}

/// A resize of a vSSD that nobody uses is seen by whoever connects next, by the message as well (V-8).
#[test]
fn a_resize_while_nobody_is_connected_is_there_at_the_next_connection() -> Result<()> {
    let (mut site, mut machine) = site()?;
    machine.disconnect();
    let mut operator = site.another_operator()?;
    Deadline::after(PATIENCE)
        .until("the front-end to be gone", || Ok(!operator.show("vm1")?.frontend.connected))?;
    let job = site.operator.resize("vm1", 40 * MIB, &json!({}))?;
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    machine.reconnect()?;
    machine.wait_capacity(40 * MIB)?;
    machine.disconnect();
    Deadline::after(PATIENCE)
        .until("the front-end to be gone", || Ok(!operator.show("vm1")?.frontend.connected))?;
    let job = site.operator.resize("vm1", 24 * MIB, &json!({}))?;
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    machine.reconnect()?;
    machine.wait_capacity(24 * MIB)?;
    site.finish()
}

/// The operator asks before it is known which driver there is.
#[test]
fn a_resize_right_after_the_start_waits_until_the_driver_is_known() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    let machine = site.machine("vm1", 32 * MIB, Options::default())?;
    let job = site.operator.resize("vm1", 16 * MIB, &json!({}))?;
    ensure!(!job.state.is_final(), "{job:?}");
    ensure!(machine.capacity()? == 32 * MIB, "nothing is taken from a driver that may still say HELLO");
    let job = site.operator.finish(job.id)?;
    ensure!(job.state == JobState::Done, "{job:?}");
    machine.wait_capacity(16 * MIB)?;
    site.finish()
}

/// What an agent does through a stock driver.
fn write_letter(machine: &mut Machine, letter: Letter) -> Result<String> {
    let queue = machine.queue(0)?;
    for block in letter.encode() {
        ensure!(queue.read(u64::from(block) * SECTOR, 512)?.is_ok());
    }
    queue.id()
}

fn notice(machine: &mut Machine) -> Result<Notice> {
    let id = write_letter(machine, Letter::Ask)?;
    Notice::decode(id.as_bytes()).with_context(|| format!("{id:?} is no notice"))
}

/// V-52, V-53, V-54: a wish reaches an agent behind a stock driver, and its report the operator; nobody else sees a difference.
#[test]
fn an_agent_hears_the_wish_and_the_operator_its_report() -> Result<()> {
    let (mut site, mut machine) = site()?;
    let reclaim = |soft: Value| json!({ "name": "vm1", "soft_bytes": soft, "deadline_ms": 20_000 });
    let id = machine.queue(0)?.id()?;
    ensure!(id == "vssd-vm1");
    let first = notice(&mut machine)?;
    ensure!(first.soft_blocks.is_none() && first.block_shift == 16 && !first.has_holes, "{first:?}");
    ensure!(machine.queue(0)?.id()? == id, "one answer for each letter");

    for block in 0..8 {
        ensure!(machine.queue(0)?.write(block * BLOCK, &content(block))? == S_OK);
    }
    let answer: ReclaimAnswer = site.operator.call(method::DEVICE_RECLAIM, &reclaim(json!(6 * BLOCK)))?;
    let job = answer.job.context("no job")?;
    ensure!(
        job.state == JobState::Created && job.kind == JobKind::Reclaim && job.from_bytes == 8 * BLOCK,
        "{job:?}"
    );
    let told = notice(&mut machine)?;
    ensure!(told.soft_blocks == Some(6) && told.seq != first.seq, "{told:?}");

    // It says that it does something, and does it: the host goes by what it sees.
    let report = Report { seq: told.seq, held: 500, free: 3, clean_cold: 2, ..Report::default() };
    write_letter(&mut machine, Letter::Report(report))?;
    Deadline::after(PATIENCE)
        .until("the job to be offered", || Ok(site.operator.job(job.id)?.state == JobState::Offered))?;
    let estimate: EstimateAnswer = site.operator.call(method::DEVICE_ESTIMATE, &json!({ "name": "vm1" }))?;
    ensure!((estimate.free_bytes, estimate.clean_cold_bytes) == (3 * BLOCK, 2 * BLOCK), "{estimate:?}");
    ensure!(estimate.unwritten_bytes == 32 * MIB - 8 * BLOCK, "{estimate:?}");
    let agent = site.operator.show("vm1")?.agent.context("no agent")?;
    ensure!(agent.held_bytes == 500 * BLOCK && agent.shortfall.is_none(), "{agent:?}");
    ensure!(machine.queue(0)?.discard(2 * BLOCK, 2 * BLOCK)? == S_OK);
    let done = site.operator.finish(job.id)?;
    ensure!(done.state == JobState::Done && done.plugged_bytes == 6 * BLOCK, "{done:?}");

    // It cannot do more, and says so of this wish.
    let answer: ReclaimAnswer = site.operator.call(method::DEVICE_RECLAIM, &reclaim(json!(BLOCK)))?;
    let job = answer.job.context("no job")?;
    let told = notice(&mut machine)?;
    let short = Report { shortfall: Shortfall::Nothing, ..report };
    write_letter(&mut machine, Letter::Report(short))?;
    ensure!(site.operator.job(job.id)?.state == JobState::Created, "that was about another wish");
    // More than there is: nonsense.
    write_letter(&mut machine, Letter::Report(Report { seq: told.seq, held: 1025, ..short }))?;
    ensure!(site.operator.job(job.id)?.state == JobState::Created);
    write_letter(&mut machine, Letter::Report(Report { seq: told.seq, ..short }))?;
    let refused = site.operator.finish(job.id)?;
    ensure!(
        refused.state == JobState::Refused && refused.error == Some(ErrorCode::GuestRefused),
        "{refused:?}"
    );

    // The wish outlives the daemon, and nothing of all this has changed the disk.
    site.daemon.kill()?;
    site.daemon.start()?;
    let mut operator = site.another_operator()?;
    ensure!(operator.show("vm1")?.soft_bytes == Some(BLOCK));
    let mut machine = Machine::start(&site.socket("vm1"), Options::default())?;
    ensure!(notice(&mut machine)?.soft_blocks == Some(1));
    let off: ReclaimAnswer = operator.call(method::DEVICE_RECLAIM, &reclaim(Value::Null))?;
    ensure!(off.job.is_none() && notice(&mut machine)?.soft_blocks.is_none());
    let shown = operator.show("vm1")?;
    ensure!(shown.plugged_bytes == 32 * MIB && shown.soft_bytes.is_none(), "{shown:?}");
    ensure!(machine.queue(0)?.read(7 * BLOCK, 4096)? == Ok(content(7)));
    ensure!(machine.queue(0)?.read(3 * BLOCK, 4096)? == Ok(vec![0; 4096]));
    site.finish()
}

/// C-11: a job about a vSSD ends with it.
#[test]
fn a_wish_ends_with_its_vssd() -> Result<()> {
    let (mut site, mut machine) = site()?;
    ensure!(machine.queue(0)?.write(0, &content(1))? == S_OK);
    let wish = json!({ "name": "vm1", "soft_bytes": 0 });
    let answer: ReclaimAnswer = site.operator.call(method::DEVICE_RECLAIM, &wish)?;
    let job = answer.job.context("no job")?;
    ensure!(job.state == JobState::Created, "{job:?}");
    let _: Value = site.operator.call(method::DEVICE_DELETE, &json!({ "name": "vm1", "force": true }))?;
    let ended = site.operator.job(job.id)?;
    ensure!(ended.state == JobState::Cancelled && ended.message.contains("deleted"), "{ended:?}");
    site.finish()
}

/// V-55: an agent that cannot know which blocks are unplugged is told that some are.
#[test]
fn an_agent_is_told_of_holes_and_our_driver_is_not_asked_this_way() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    site.operator.create("vm1", 32 * MIB, &json!({}))?;
    let mut machine = Machine::start(&site.socket("vm1"), Options::default())?;
    let mut driver = Driver::start(machine.take_queue(0)?)?;
    let wish = json!({ "name": "vm1", "soft_bytes": MIB });
    let refused = site.operator.refused(ErrorCode::Conflict, method::DEVICE_RECLAIM, &wish)?;
    ensure!(refused.data.hint.is_some_and(|hint| hint.contains("shrink")));
    let job = site.operator.resize("vm1", 31 * MIB, &json!({}))?;
    driver.refresh()?;
    driver.unplug(&[BlockRange::new(100, 16)])?;
    ensure!(site.operator.finish(job.id)?.state == JobState::Done);
    machine.disconnect();
    let mut machine = Machine::start(&site.socket("vm1"), Options::default())?;
    let told = notice(&mut machine)?;
    ensure!(told.has_holes && told.soft_blocks.is_none(), "{told:?}");
    site.finish()
}
