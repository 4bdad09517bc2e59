// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench nv-hypervisor`: the table of *Hypervisor-based Persistence for Virtual Machines* (Sartakov, Kapitza; DSN 2014) with a
//! real database: how long it takes after a power cut until it serves at full speed again, rebooted and continued from NV-RAM.
//!
//! ```text
//!   database (image: PostgreSQL, guest.sh) ─┐
//!   prepare: tables on a vSSD, once ────────┼─► arm ─► host (vm-host, vssd-backend, one VM) ─► news (what the guest says, and when)
//!                                           │    │ Outcome
//!                                           └────┴──► report: table, plot, CSV        rates: when is it at full speed?
//! ```
//!
//! Both arms run in the same minute, from copies of the same pool, and their VMs differ in one line: `nvram`. What this does not know: how a VM is
//! saved, or what a database does to recover.

mod arm;
mod database;
mod host;
mod news;
mod rates;
mod report;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vssd_tests::qemu::probed_accel;
use vssd_tests::serial::guest_slot;
use vssd_tests::{paths, process};

use database::Database;
use host::{Host, Memory};

/// Making the tables on emulated processors.
const PREPARE: Duration = Duration::from_secs(1800);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of the report [default: target/bench/nv-hypervisor]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Few tables and a short load: to see that it works, not to quote
    #[arg(long)]
    quick: bool,
    /// Size of the tables, in pgbench's units of 15 MiB
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=24))]
    scale: Option<u32>,
}

/// How much is done.
#[derive(Clone, Copy, Debug)]
struct Plan {
    /// pgbench's: 100 000 accounts each.
    scale: u32,
    /// From warm tables to the cut.
    load: Duration,
    /// Seconds before the cut whose median is full speed.
    median: usize,
    /// How long full speed is waited for.
    patience: Duration,
    /// How long it is watched then.
    after: Duration,
}

impl Plan {
    const FULL: Self = Self {
        scale: 20,
        load: Duration::from_secs(75),
        median: 30,
        patience: Duration::from_secs(400),
        after: Duration::from_secs(20),
    };
    const QUICK: Self = Self {
        scale: 4,
        load: Duration::from_secs(25),
        median: 15,
        patience: Duration::from_secs(120),
        after: Duration::from_secs(8),
    };
}

/// Carries both arms out, prints the table and writes the report; true if all that is required was reached.
pub fn run(args: &Args) -> Result<bool> {
    let out = args.out.clone().unwrap_or_else(|| paths::repo_root().join("target/bench/nv-hypervisor"));
    // Before minutes are spent on what could not be kept.
    std::fs::create_dir_all(&out).with_context(|| {
        format!("cannot make the folder {} for the report: choose another with --out", out.display())
    })?;
    let mut plan = if args.quick { Plan::QUICK } else { Plan::FULL };
    plan.scale = args.scale.unwrap_or(plan.scale);
    let _slot = guest_slot()?;
    let database = Database::open()?;
    let pool = prepare(&database, plan.scale)?;
    eprintln!("commodity: load, power cut, reboot");
    let commodity = arm::run(&database, &pool, Memory::Ordinary, &plan).context("the commodity arm")?;
    eprintln!("persistent: load, power cut, continue");
    let persistent = arm::run(&database, &pool, Memory::Nvram, &plan).context("the persistent arm")?;
    let report = report::Report {
        plan,
        quick: args.quick,
        accel: probed_accel(),
        database: database.version,
        commodity,
        persistent,
    };
    let path = report.write(&out)?;
    print!("{}", report.summary());
    println!("report: {}", path.display());
    Ok(report.reached())
}

/// A pool with the tables on its vSSD; made once for each size, daemon and version of the database.
fn prepare(database: &Database, scale: u32) -> Result<PathBuf> {
    let mut backend = Command::new(paths::artifact("vssd-backend", "vssd-backend")?);
    let backend = process::run(backend.arg("--version"))?;
    let backend = backend.split_whitespace().last().unwrap_or_default().to_owned();
    let postgres = database.version.split_whitespace().next().unwrap_or_default();
    let dir = paths::cache_dir()?.join("databases");
    std::fs::create_dir_all(&dir)?;
    let pool = dir.join(format!("postgresql-{postgres}-scale-{scale}-{backend}.pool"));
    if !pool.exists() {
        fill(database, scale, &pool).context("make the tables")?;
        paths::keep_newest(&dir, ".pool", 2)?;
    }
    Ok(pool)
}

fn fill(database: &Database, scale: u32, pool: &Path) -> Result<()> {
    eprintln!("making tables of about {} MiB", u64::from(scale) * 15);
    let mut host = Host::new(None)?;
    host.switch_on()?;
    host.create_disk()?;
    host.define(&database.image, Memory::Ordinary)?;
    host.start_vm()?;
    host.wait_guest()?;
    let begun = Instant::now();
    host.script(&format!("load {scale}"))?;
    let done = host.news.wait_step("loaded", begun, PREPARE)?;
    eprintln!("made in {:.0} s", (done - begun).as_secs_f64());
    host.keep_pool(pool)
}
