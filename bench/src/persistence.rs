// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long it takes to save VMs when the power fails, and to have them run again: `cargo xtask bench persistence` on this machine, and
//! `cargo xtask bench power-cut` on an emulated host whose power is cut.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::persistent::PersistentHost;
use vssd_tests::scenario::find;
use vssd_tests::serial::guest_slot;
use vssd_tests::vm_host::VmHost;

use crate::report::{CaseReport, Verdict, table};
use crate::stats::{median, range};

const ORIGINAL: &str = "original: NV-Hypervisor, DSN 2014, QEMU starts from NV-RAM on two Xeons";

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

/// Milliseconds, as they are said.
fn times(ms: &[f64]) -> String {
    format!("{:.1} ms (largest {:.1} ms)", median(ms), range(ms).1)
}

/// A figure that may take so long in the median, if a limit is given.
fn figure(what: String, ms: &[f64], limit: Option<f64>) -> Verdict {
    match limit {
        Some(limit) => Verdict::of(what, times(ms), format!("<= {limit} ms"), median(ms) <= limit),
        None => Verdict::info(what, times(ms)),
    }
}

/// Prints the table of saves and restores; true if every required figure was reached.
pub fn run(args: &Args) -> Result<bool> {
    let _slot = guest_slot()?;
    let mut case = CaseReport {
        name: "persistence".to_owned(),
        about: format!("guests on emulated processors, NV-RAM is a tmpfs; medians of {} rounds", args.rounds),
        notes: vec![ORIGINAL.to_owned()],
        ..CaseReport::default()
    };
    for (memory, vms) in [("256MiB", 1), ("4GiB", 1), ("256MiB", 6)] {
        case.verdicts.extend(measure(memory, vms, args.rounds)?);
    }
    println!("{}", table::case(&case));
    Ok(case.verdicts.iter().all(|verdict| verdict.pass != Some(false)))
}

fn measure(memory: &str, vms: usize, rounds: usize) -> Result<Vec<Verdict>> {
    let image = ImageBuilder::small(&Kernel::debian()?).build()?;
    let mut host = VmHost::new()?;
    host.start()?;
    let names: Vec<String> = (0..vms).map(|at| format!("vm{at}")).collect();
    for name in &names {
        host.define(&host.definition(name, &image, memory))?;
        host.ok(&["start", name])?;
        host.run(name, "true")?;
    }
    let (mut each, mut all, mut recovery, mut restore) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        eprintln!("{vms} x {memory}: round {} of {rounds}", round + 1);
        host.ok(&["power", "test", "critical"])?;
        for name in &names {
            host.wait_state(name, "saved")?;
            let saved = &host.show(name)?["last_save"];
            let us = ["stop_us", "save_us", "flush_us", "commit_us"].map(|step| saved[step].as_f64());
            each.push(us.into_iter().sum::<Option<f64>>().context("a save without its times")? / 1000.0);
        }
        all.push(save_ms(&host.ok(&["power", "status"])?)?);
        host.power_cut()?;
        let begun = Instant::now();
        host.start()?;
        recovery.push(begun.elapsed().as_secs_f64() * 1000.0);
        for name in &names {
            let vm = host.show(name)?;
            ensure!(vm["state"] == "running", "{vm}");
            restore.push(vm["last_restore_us"].as_f64().context("no time of the restore")? / 1000.0);
        }
    }
    let what = |what: &str| format!("{vms} x {memory}: {what}");
    Ok(vec![
        figure(what("save, each"), &each, (vms == 1).then_some(10.0)),
        figure(what("save, all"), &all, (vms == 6).then_some(30.0)),
        figure(what("restore, each (original: 8 s)"), &restore, None),
        figure(what("daemon starts, all run (original: 8 s)"), &recovery, (vms == 1).then_some(150.0)),
    ])
}

/// How long the last save of all took, of an answer to `power status`.
fn save_ms(status: &Value) -> Result<f64> {
    let us = find(status, "last_save_us").and_then(Value::as_f64).context("no time of the last save")?;
    Ok(us / 1000.0)
}

/// Cuts the power of an emulated host again and again; true if nothing was ever lost.
pub fn power_cut(args: &PowerCutArgs) -> Result<bool> {
    let _slot = guest_slot()?;
    let mut host = PersistentHost::new(args.guests)?;
    host.boot()?;
    host.start_guests()?;
    let mut lost = 0;
    let (mut save, mut dark) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds {
        if round > 1 {
            host.restart_guests()?;
        }
        let work = host.begin_work()?;
        save.push(save_ms(&host.fail_power()?)?);
        host.cut_power()?;
        let begun = Instant::now();
        host.boot()?;
        dark.push(begun.elapsed().as_secs_f64() * 1000.0);
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
    let case = CaseReport {
        name: "power-cut".to_owned(),
        about: format!("{} power cuts; the times are those of an emulator in an emulator", args.rounds),
        verdicts: vec![
            Verdict::of("lost", lost.to_string(), "0", lost == 0),
            figure("all guests saved".to_owned(), &save, None),
            figure("host switched on, guests run".to_owned(), &dark, None),
        ],
        ..CaseReport::default()
    };
    println!("{}", table::case(&case));
    Ok(lost == 0)
}
