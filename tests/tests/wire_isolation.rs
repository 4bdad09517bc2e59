// SPDX-License-Identifier: Apache-2.0 OR MIT
//! No tenant ever sees a byte of another: eight vSSDs share a pool that is too small for them, so that every block that one gives
//! back is soon another's.
//!
//! Blocks go by discard, write-zeroes, shrink and the deletion of their vSSD; the daemon is killed between that and the next
//! use. A new owner writes a part of its block and reads all of it: the rest must be zeroes. `used.len` must not count more than
//! what was written, and memory behind it stays as it was.
//!
//! A hundred thousand reuses on each medium: `cargo test --release -p vssd-tests --test wire_isolation -- --ignored --nocapture`

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use vssd_tests::mock::site::{MIB, Site};
use vssd_tests::mock::tenant::{Counts, Tenant};
use vssd_tests::mock::{rng, seed};
use vssd_tests::scenario::Medium;

const TENANTS: u64 = 8;
/// Bytes of each vSSD.
const SIZE: u64 = 4 * MIB;
/// MiB of the pool: for less than half of what is promised.
const POOL: u64 = 14;
/// Blocks taken in one shrink.
const SHRINK: u32 = 24;

fn kill(site: &mut Site, tenants: &mut [Tenant]) -> Result<()> {
    site.kill_and_restart()?;
    tenants.iter_mut().try_for_each(Tenant::reconnect)
}

/// Runs until physical blocks were used again `reuses` times, with `kills` kills on the way.
fn change_hands(medium: Medium, reuses: u64, kills: u64, seed: u64) -> Result<()> {
    let started = Instant::now();
    let mut site = Site::with(medium, POOL, &["--block-size", "4K", "--overcommit", "400"], &[])?;
    let mut rng = rng(seed);
    let mut counts = Counts::default();
    let mut ids = 1..;
    let mut tenants = Vec::new();
    for index in 0..TENANTS {
        let id = ids.next().context("ids")?;
        tenants.push(Tenant::new(&mut site, &format!("t{index}"), id, SIZE)?);
    }
    let status = site.operator.pool()?;
    let physical = status.size_bytes / status.block_size_bytes;
    // Leaves room for what waits to be zeroed.
    let budget = usize::try_from(physical / TENANTS)? * 6 / 10;
    let (mut killed, mut rounds) = (0, 0u64);
    // Each first write takes a block that holds nothing; beyond as many as there are, it is one that held something.
    while counts.touched < physical + reuses {
        rounds += 1;
        for tenant in &mut tenants {
            tenant.send(&mut rng, budget, &mut counts)?;
        }
        let due = counts.touched >= (physical + reuses) * (killed + 1) / (kills + 1);
        // With requests in flight, or with blocks just given back and not yet zeroed.
        let late: bool = rng.random();
        if due && !late {
            kill(&mut site, &mut tenants)?;
        }
        for tenant in &mut tenants {
            tenant.receive(&mut counts).with_context(|| format!("round {rounds}, {killed} kills"))?;
        }
        if due && late {
            thread::sleep(Duration::from_micros(rng.random_range(0..300)));
            kill(&mut site, &mut tenants)?;
        }
        killed += u64::from(due);
        if rng.random_ratio(1, 6) {
            let index = rng.random_range(0..tenants.len());
            tenants[index].resize(&mut site, &mut rng, SHRINK, &mut counts)?;
        }
        if rng.random_ratio(1, 60) {
            let index = rng.random_range(0..tenants.len());
            let old = tenants.swap_remove(index);
            let id = ids.next().context("ids")?;
            tenants.push(old.replace(&mut site, id, &mut counts)?);
        }
    }
    for tenant in &mut tenants {
        tenant.verify(&mut counts)?;
    }
    println!(
        "{medium:?}: {} reuses of {physical} blocks by {} tenants in {:.1} s, {killed} kills: {counts:?}",
        counts.touched - physical,
        ids.next().context("ids")? - 1,
        started.elapsed().as_secs_f64()
    );
    let every = [counts.discarded, counts.zeroed, counts.unplugged, counts.deleted, counts.evicted_reads];
    ensure!(every.iter().all(|count| *count > 0), "not every way of giving blocks back was taken");
    drop(tenants);
    site.finish()
}

#[test]
fn twenty_thousand_blocks_change_hands_and_their_new_owners_read_zeroes_on_nvram() -> Result<()> {
    change_hands(Medium::Nvram, 20_000, 40, seed("wire_isolation/nvram"))
}

#[test]
fn twenty_thousand_blocks_change_hands_and_their_new_owners_read_zeroes_on_an_ssd() -> Result<()> {
    change_hands(Medium::Ssd, 20_000, 40, seed("wire_isolation/ssd"))
}

#[test]
#[ignore = "takes minutes; the module says how to run it"]
fn a_hundred_thousand_blocks_change_hands_on_either_medium() -> Result<()> {
    change_hands(Medium::Nvram, 100_000, 400, seed("wire_isolation/long-nvram"))?;
    change_hands(Medium::Ssd, 100_000, 400, seed("wire_isolation/long-ssd"))
}
