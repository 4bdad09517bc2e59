// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver that does not know the guest channel: an ordinary disk that grows live and is never shrunk into its data.

use anyhow::{Result, ensure};
use serde_json::json;
use vssd_protocol::control::{DriverKind, ErrorCode, JobState, method};
use vssd_protocol::guest::STATUS_EVICTED;
use vssd_tests::mock::PATIENCE;
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::queue::{S_IOERR, S_OK};
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
