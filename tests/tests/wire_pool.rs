// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Several vSSDs share a pool: what one gives another gets, and nobody sees another's bytes.

use anyhow::{Result, anyhow, ensure};
use rand::Rng;
use serde_json::json;
use vssd_protocol::control::{ErrorCode, JobState, method};
use vssd_protocol::guest::RangeStatus;
use vssd_protocol::units::BlockRange;
use vssd_tests::mock::driver::{Driver, anywhere, lowest, pick};
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::queue::{Queue, S_OK};
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::mock::{PATIENCE, rng, seed};
use vssd_tests::pattern::{self, Found};
use vssd_tests::scenario::Medium;
use vssd_tests::wait::Deadline;

fn fill(queue: &mut Queue, tenant: u64, blocks: impl IntoIterator<Item = u32>) -> Result<()> {
    let mut bytes = vec![0; usize::try_from(BLOCK)?];
    for block in blocks {
        pattern::fill(&mut bytes, tenant, block.into());
        ensure!(queue.write(u64::from(block) * BLOCK, &bytes)? == S_OK, "block {block}");
    }
    Ok(())
}

fn judge(queue: &mut Queue, tenant: u64, block: u32) -> Result<Found> {
    let read = queue.read(u64::from(block) * BLOCK, usize::try_from(BLOCK)?)?;
    let bytes = read.map_err(|status| anyhow!("block {block}: status {status:#x}"))?;
    Ok(pattern::judge(&bytes, tenant, block.into()))
}

/// Two tenants whose sizes add up to all there is: `rounds` times one gives and the other takes, fills and checks.
fn give_and_take(medium: Medium, rounds: u32) -> Result<()> {
    // Room for 128 MiB of blocks and not for 160.
    let mut site = Site::new(medium, 144)?;
    let mut rng = rng(seed("wire_pool/give_and_take"));
    for name in ["vm1", "vm2"] {
        let more = json!({ "max_bytes": 128 * MIB, "min_bytes": MIB });
        site.operator.create(name, 64 * MIB, &more)?;
    }
    let error = site.operator.refused(
        ErrorCode::PoolFull,
        method::DEVICE_CREATE,
        &json!({ "name": "vm3", "size_bytes": 32 * MIB }),
    )?;
    ensure!(error.data.detail["requested_bytes"] == 32 * MIB, "{error:?}");
    ensure!(error.data.detail["available_bytes"].as_u64().is_some_and(|b| b < 32 * MIB), "{error:?}");
    ensure!(error.data.hint.is_some_and(|hint| hint.contains("pool")), "no hint");

    let mut tenants = Vec::new();
    for (tenant, name) in [(1u64, "vm1"), (2, "vm2")] {
        let mut machine = Machine::start(&site.socket(name), Options::default())?;
        let mut driver = Driver::start(machine.take_queue(0)?)?;
        let all: Vec<u32> = driver.present().collect();
        fill(&mut driver.queue, tenant, all)?;
        tenants.push((name, tenant, machine, driver));
    }
    for round in 0..rounds {
        let amount = rng.random_range(16..256u32);
        // By turns, unless one is near its minimum already.
        let turn = if round % 2 == 0 { 0 } else { 1 };
        let giver = if tenants[turn].3.count() < 512 { 1 - turn } else { turn };
        let taker = 1 - giver;
        let (name, _, _, driver) = &mut tenants[giver];
        let to = u64::from(driver.count() - amount) * BLOCK;
        let job = site.operator.resize(name, to, &json!({}))?;
        ensure!(driver.attend(&mut anywhere(&mut rng))?);
        ensure!(site.operator.finish(job.id)?.state == JobState::Done);

        let (name, tenant, _, driver) = &mut tenants[taker];
        let to = u64::from(driver.count() + amount) * BLOCK;
        let before = driver.plugged.clone();
        let job = site.operator.resize(name, to, &json!({}))?;
        ensure!(driver.attend(&mut lowest)?);
        ensure!(site.operator.finish(job.id)?.state == JobState::Done);
        let new: Vec<u32> = driver.present().filter(|block| !before[*block as usize]).collect();
        ensure!(new.len() == amount as usize);
        for block in &new {
            ensure!(
                judge(&mut driver.queue, *tenant, *block)? == Found::Zero,
                "round {round}, block {block}"
            );
        }
        // First a sector only: what is around it must be zero too.
        for block in &new {
            let offset = u64::from(*block) * BLOCK + 8192;
            ensure!(driver.queue.write(offset, &[0xff; 4096])? == S_OK);
            let around = driver.queue.read(offset - 8192, usize::try_from(BLOCK)?)?;
            let around = around.map_err(|status| anyhow!("status {status:#x}"))?;
            let rest = around[..8192].iter().chain(&around[8192 + 4096..]);
            ensure!(rest.copied().all(|byte| byte == 0), "round {round}: {name} sees another's bytes");
        }
        fill(&mut driver.queue, *tenant, new)?;
    }
    for (name, tenant, _, driver) in &mut tenants {
        let all: Vec<u32> = driver.present().collect();
        for block in all {
            let found = judge(&mut driver.queue, *tenant, block)?;
            ensure!(found == Found::Intact, "{name}, block {block}: {found:?}");
        }
        driver.agree(&mut site.operator, name)?;
    }
    let pool = site.operator.pool()?;
    ensure!(pool.promised_bytes == 128 * MIB && pool.allocated_bytes == 128 * MIB, "{pool:?}");
    site.finish()
}

/// V-10, V-11.
#[test]
fn what_one_vssd_gives_another_gets_as_zeroes_on_nvram() -> Result<()> {
    give_and_take(Medium::Nvram, 20)
}

/// V-10, V-11.
#[test]
fn what_one_vssd_gives_another_gets_as_zeroes_on_an_ssd() -> Result<()> {
    give_and_take(Medium::Ssd, 6)
}

/// V-11 through a crash between giving and taking.
#[test]
fn blocks_that_were_given_before_a_crash_are_zeroed_after_it() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 144)?;
    let (mut machine, mut driver) = site.driver("vm1", 64 * MIB)?;
    fill(&mut driver.queue, 1, 0..1024)?;
    for round in 0..4 {
        let count = driver.count();
        site.operator.resize("vm1", u64::from(count - 200) * BLOCK, &json!({}))?;
        ensure!(driver.attend(&mut lowest)?);
        site.kill_and_restart()?;
        let name = format!("heir{round}");
        let mut heir = site.machine(&name, 12 * MIB, Options::default())?;
        let queue = heir.queue(0)?;
        for block in 0..192 {
            ensure!(queue.write(u64::from(block) * BLOCK + 512, &[0xff; 512])? == S_OK);
            ensure!(judge(queue, 9, block)? == Found::Wrong);
            let read = queue.read(u64::from(block) * BLOCK, usize::try_from(BLOCK)?)?;
            let bytes = read.map_err(|status| anyhow!("status {status:#x}"))?;
            ensure!(bytes[..512].iter().chain(&bytes[1024..]).all(|byte| *byte == 0), "block {block}");
        }
        machine.reconnect()?;
        driver.hello()?;
    }
    site.finish()
}

/// The promise is what operators see; a delete gives it back at once.
#[test]
fn a_deleted_vssd_leaves_its_room_and_none_of_its_bytes() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 80)?;
    for round in 0..5u64 {
        let name = format!("vm{round}");
        let mut machine = site.machine(&name, 56 * MIB, Options::default())?;
        let queue = machine.queue(0)?;
        for block in (0..896).step_by(7) {
            ensure!(judge(queue, round, block)? == Found::Zero, "round {round}, block {block}");
        }
        fill(queue, round, 0..896)?;
        let params = json!({ "name": name });
        site.operator.refused(ErrorCode::InUse, method::DEVICE_DELETE, &params)?;
        machine.disconnect();
        let mut operator = site.another_operator()?;
        Deadline::after(PATIENCE)
            .until("the front-end to be gone", || Ok(!operator.show(&name)?.frontend.connected))?;
        site.operator.call::<serde_json::Value>(method::DEVICE_DELETE, &params)?;
        ensure!(!site.socket(&name).exists(), "its socket is still there");
        ensure!(site.operator.pool()?.promised_bytes == 0);
    }
    site.finish()
}

/// A PLUG that the pool has no room for is refused range by range and harms nobody.
#[test]
fn an_overcommitted_pool_that_is_full_says_so_and_stays_sound() -> Result<()> {
    let mut site = Site::with(Medium::Nvram, 80, &["--overcommit", "200"], &[])?;
    let (_machine1, mut first) = site.driver("vm1", 56 * MIB)?;
    let (_machine2, mut second) = site.driver("vm2", 56 * MIB)?;
    fill(&mut first.queue, 1, 0..896)?;
    let mut written = Vec::new();
    let mut bytes = vec![0; usize::try_from(BLOCK)?];
    let mut refused = 0;
    for block in 0..896u32 {
        pattern::fill(&mut bytes, 2, block.into());
        match second.queue.write(u64::from(block) * BLOCK, &bytes)? {
            S_OK => written.push(block),
            vssd_protocol::guest::STATUS_NOSPACE => {
                refused += 1;
                if refused == 2 {
                    break;
                }
            }
            status => anyhow::bail!("block {block}: status {status:#x}"),
        }
    }
    ensure!(refused > 0, "112 MiB fit into 80");
    println!("{} blocks of the second fit", written.len());
    // Room that the first gives is room for the second.
    first.give(&[BlockRange::new(0, 64)])?;
    let late: Vec<u32> = (832..880).collect();
    fill(&mut second.queue, 2, late.iter().copied())?;
    for block in written.iter().chain(&late) {
        ensure!(judge(&mut second.queue, 2, *block)? == Found::Intact, "block {block}");
    }
    for block in 64..896 {
        ensure!(judge(&mut first.queue, 1, block)? == Found::Intact, "block {block}");
    }
    let statuses = first.plug(&pick(first.absent(), 4))?;
    ensure!(
        statuses.is_some_and(|s| s.iter().all(|s| matches!(s, RangeStatus::Ok | RangeStatus::NoSpace))),
        "PLUG on a full pool"
    );
    site.finish()
}
