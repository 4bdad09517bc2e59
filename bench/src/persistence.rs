// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long it takes to save VMs when the power fails, and to have them run again: `cargo xtask bench persistence` on this machine, and
//! `cargo xtask bench power-cut` on an emulated host whose power is cut.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use comfy_table::{Table, presets};
use serde_json::Value;
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::persistent::PersistentHost;
use vssd_tests::scenario::find;
use vssd_tests::serial::guest_slot;
use vssd_tests::vm_host::VmHost;

/// NV-Hypervisor, DSN 2014: "QEMU starts", from NV-RAM, on two Xeons.
const ORIGINAL_RESTORE: &str = "8 s";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Saves and restores of each kind
    #[arg(long, value_name = "N", default_value_t = 20)]
    rounds: usize,
}

#[derive(Debug, clap::Args)]
pub struct PowerCutArgs {
    /// Power cuts, one after the other
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Guests on the host
    #[arg(long, value_name = "N", default_value_t = 2)]
    guests: usize,
}

/// Durations of one thing.
#[derive(Debug, Default)]
struct Times(Vec<f64>);

impl Times {
    fn add_us(&mut self, us: f64) {
        self.0.push(us / 1000.0);
    }

    fn add(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1000.0);
    }

    /// Median and largest, in milliseconds.
    fn of(&self) -> (f64, f64) {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        (
            sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN),
            sorted.last().copied().unwrap_or(f64::NAN),
        )
    }
}

struct Figures {
    table: Table,
    reached: bool,
}

impl Figures {
    fn new() -> Self {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN);
        table.set_header(["", "median", "largest", "required (median)", "original", ""]);
        Self { table, reached: true }
    }

    fn add(&mut self, what: &str, times: &Times, required_ms: Option<f64>, original: &str) {
        let (median, largest) = times.of();
        let holds = required_ms.is_none_or(|required| median <= required);
        self.reached &= holds;
        let ms = |ms: f64| format!("{ms:.1} ms");
        self.table.add_row([
            what.to_owned(),
            ms(median),
            ms(largest),
            required_ms.map_or_else(String::new, |required| format!("<= {required} ms")),
            original.to_owned(),
            required_ms.map_or("", |_| if holds { "PASS" } else { "FAIL" }).to_owned(),
        ]);
    }
}

/// Prints the table of saves and restores; true if every required figure was reached.
pub fn run(args: &Args) -> Result<bool> {
    let _slot = guest_slot()?;
    let mut figures = Figures::new();
    for (memory, vms) in [("256MiB", 1), ("4GiB", 1), ("256MiB", 6)] {
        measure(memory, vms, args.rounds, &mut figures)?;
    }
    println!("{}", figures.table);
    println!("guests on emulated processors; NV-RAM is a tmpfs; medians of {} rounds", args.rounds);
    Ok(figures.reached)
}

fn measure(memory: &str, vms: usize, rounds: usize, figures: &mut Figures) -> Result<()> {
    let image = ImageBuilder::small(&Kernel::debian()?).build()?;
    let mut host = VmHost::new()?;
    host.start()?;
    let names: Vec<String> = (0..vms).map(|at| format!("vm{at}")).collect();
    for name in &names {
        host.define(&host.definition(name, &image, memory))?;
        host.ok(&["start", name])?;
        host.run(name, "true")?;
    }
    let (mut each, mut all, mut recovery, mut restore) =
        (Times::default(), Times::default(), Times::default(), Times::default());
    for round in 0..rounds {
        eprintln!("{vms} x {memory}: round {} of {rounds}", round + 1);
        host.ok(&["power", "test", "critical"])?;
        for name in &names {
            host.wait_state(name, "saved")?;
            let saved = &host.show(name)?["last_save"];
            let us = ["stop_us", "save_us", "flush_us", "commit_us"].map(|step| saved[step].as_f64());
            each.add_us(us.into_iter().sum::<Option<f64>>().context("a save without its times")?);
        }
        let status = host.ok(&["power", "status"])?;
        all.add_us(
            find(&status, "last_save_us").and_then(Value::as_f64).context("no time of the last save")?,
        );
        host.power_cut()?;
        let begun = Instant::now();
        host.start()?;
        recovery.add(begun.elapsed());
        for name in &names {
            let vm = host.show(name)?;
            ensure!(vm["state"] == "running", "{vm}");
            restore.add_us(vm["last_restore_us"].as_f64().context("no time of the restore")?);
        }
    }
    let what = |what: &str| format!("{vms} x {memory}: {what}");
    figures.add(&what("save, each"), &each, (vms == 1).then_some(10.0), "");
    figures.add(&what("save, all"), &all, (vms == 6).then_some(30.0), "");
    figures.add(&what("restore, each"), &restore, None, ORIGINAL_RESTORE);
    figures.add(&what("daemon starts, all run"), &recovery, (vms == 1).then_some(150.0), ORIGINAL_RESTORE);
    Ok(())
}

/// Cuts the power of an emulated host again and again; true if nothing was ever lost.
pub fn power_cut(args: &PowerCutArgs) -> Result<bool> {
    let _slot = guest_slot()?;
    let mut host = PersistentHost::new(args.guests)?;
    host.boot()?;
    host.start_guests()?;
    let mut lost = 0;
    let (mut save, mut dark) = (Times::default(), Times::default());
    for round in 1..=args.rounds {
        let work = host.begin_work()?;
        let status = host.fail_power()?;
        save.add_us(find(&status, "last_save_us").and_then(Value::as_f64).context("no time of the save")?);
        host.cut_power()?;
        let begun = Instant::now();
        host.boot()?;
        dark.add(begun.elapsed());
        println!("power cut {round} of {}", args.rounds);
        host.check_work(&work, |what, holds, detail| {
            println!(
                "  {} {what}{}{detail}",
                if holds { "PASS" } else { "FAIL" },
                if detail.is_empty() { "" } else { ": " }
            );
            lost += usize::from(!holds);
        })?;
    }
    let mut figures = Figures::new();
    figures.add("all guests saved", &save, None, "");
    figures.add("host switched on, guests run", &dark, None, "");
    println!("{}", figures.table);
    println!(
        "emulated twice: the times are those of an emulator; {lost} things were lost in {} power cuts",
        args.rounds
    );
    Ok(lost == 0)
}
