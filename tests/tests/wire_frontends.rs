// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Two front-ends on one vSSD: the second may look, and takes the rings over only when the first has let go of them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vssd_tests::mock::PATIENCE;
use vssd_tests::mock::driver::highest;
use vssd_tests::mock::frontend::{Frontend, request};
use vssd_tests::mock::load::{Load, Profile};
use vssd_tests::mock::machine::{Machine, Options};
use vssd_tests::mock::queue::S_OK;
use vssd_tests::mock::seed;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::scenario::Medium;

const SIZE: u64 = 32 * MIB;
/// Connections that a vSSD serves at a time.
const MOST: usize = 8;

#[test]
fn a_second_front_end_reads_the_configuration_and_cannot_take_a_running_guests_disk() -> Result<()> {
    let seed = seed("wire_frontends/second");
    let mut site = Site::new(Medium::Nvram, 100)?;
    let mut machine = site.machine("vm1", SIZE, Options::default())?;
    let queues = (0..2).map(|index| machine.take_queue(index)).collect::<Result<_>>()?;
    let unit = machine.logical_block()?.into();
    let profile = Profile { bytes: 0..SIZE, unit, block: BLOCK, depth: 32, zeroing: true, tables: true };
    let mut load = Load::new(queues, profile, seed)?;
    let socket = site.socket("vm1");

    let mut thief = Machine::new(&socket, Options::default(), vssd_tests::mock::ram::GuestRam::standard()?)?;
    let start = Instant::now();
    let attempt = std::thread::spawn(move || -> Result<(u64, bool)> {
        thief.connect()?;
        let capacity = thief.capacity()?;
        let taken = thief.run().is_ok() && thief.queue(0)?.flush().is_ok();
        Ok((capacity, taken))
    });
    let mut rounds = 0;
    while !attempt.is_finished() {
        load.run(500).context("I/O beside the attempt")?;
        rounds += 500;
    }
    let (capacity, taken) = attempt.join().map_err(|_| anyhow::anyhow!("the attempt panicked"))??;
    ensure!(capacity == SIZE, "the second front-end saw a capacity of {capacity}");
    ensure!(!taken, "the second front-end runs its rings beside the first");
    load.run(500)?;
    load.verify()?;
    println!("{rounds} requests beside an attempt of {:.1} s", start.elapsed().as_secs_f64());
    site.finish()
}

/// A guest is moved: the driver's session goes on, nothing is answered STALE, and the operator still reaches the guest.
#[test]
fn rings_are_handed_over_and_the_drivers_session_goes_on() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    let (mut machine, mut driver) = site.driver("vm1", SIZE)?;
    let epoch = driver.epoch();
    for round in 0u32..20 {
        driver.park(driver.sizes.seq)?;
        ensure!(driver.queue.write(0, &vec![u8::try_from(round)?; 4096])? == S_OK);
        // In every other round the old monitor is gone before the new one begins.
        let mut old = Some(machine.prepare_move()?);
        if round % 2 == 0 {
            old = None;
        }
        machine.run()?;
        let news = driver.wait_answer(PATIENCE)?.context("the parked WAIT is not answered")?;
        ensure!(news.result == vssd_protocol::guest::RequestResult::NoNews, "{news:?}");
        drop(old);
        ensure!(driver.queue.read(0, 4096)? == Ok(vec![u8::try_from(round)?; 4096]));
        driver.refresh().with_context(|| format!("round {round}"))?;
        ensure!(driver.epoch() == epoch);
        let size = if round % 2 == 0 { SIZE / 2 } else { SIZE };
        let job = site.operator.resize("vm1", size, &json!({}))?;
        driver.attend(&mut highest)?;
        site.operator.finish(job.id)?;
    }
    println!("20 moves, one session");
    ensure!(site.operator.show("vm1")?.frontend.queues == 2);
    site.finish()
}

#[test]
fn front_ends_beyond_the_eighth_are_turned_away_and_harm_nobody() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 100)?;
    let mut machine = site.machine("vm1", SIZE, Options::default())?;
    let socket = site.socket("vm1");
    let baseline = site.descriptors()?;
    for _ in 0..3 {
        let mut guests = Vec::new();
        for _ in 1..MOST {
            let link = Frontend::connect(&socket)?;
            link.get(request::GET_FEATURES, &[], &[])?;
            guests.push(link);
        }
        for _ in 0..20 {
            ensure!(Frontend::connect(&socket)?.ends(), "a ninth front-end is served");
        }
        ensure!(machine.queue(0)?.flush()? == S_OK);
        drop(guests);
        let start = Instant::now();
        while site.descriptors()? > baseline {
            ensure!(start.elapsed() < PATIENCE, "descriptors are left behind");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    println!("60 turned away");
    site.finish()
}
