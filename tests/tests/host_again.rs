// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The power fails again while the guests of the first failure are coming back, and comes back while they are being saved.
//!
//! ```text
//!   saved ── the daemon starts ── a delay ── power fails ─┬─ all is saved ─┬─ darkness     every guest goes on
//!                                                         │                └─ power back   every guest goes on
//!                                                         └─ darkness at once              one that had run is lost, and said to be
//! ```

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::report::Report;
use vssd_tests::serial::guest_slot;
use vssd_tests::vm_host::{Mark, VmHost};
use vssd_tests::wait::Deadline;

/// More than are restored at a time.
const VMS: [&str; 3] = ["a", "b", "c"];
const LIMIT: Duration = Duration::from_secs(60);
/// They come back within about two of these, on a machine with nothing else to do.
const STEP: Duration = Duration::from_millis(60);
const TRIALS: u32 = 10;

fn all_are(host: &VmHost, state: &str) -> Result<bool> {
    for vm in VMS {
        if host.state(vm)? != state {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A host whose guests have been saved because the power failed; the copy `failed` is what the darkness left.
fn site() -> Result<(VmHost, Vec<Mark>)> {
    let image = ImageBuilder::small(&Kernel::debian()?).build()?;
    let mut host = VmHost::new()?;
    host.start()?;
    for vm in VMS {
        host.define(&host.definition(vm, &image, "96MiB"))?;
        host.ok(&["start", vm])?;
    }
    let mut marks = Vec::new();
    for vm in VMS {
        marks.push(Mark::make(&host, vm)?);
    }
    host.power(false)?;
    Deadline::after(LIMIT)
        .until("all to be saved", || all_are(&host, "saved"))
        .with_context(|| host.log())?;
    ensure!(host.power_cut()? == VMS.len(), "their machines were not kept for power that comes back");
    host.keep("failed")?;
    Ok((host, marks))
}

/// How often a daemon has let a guest go on from a saved state.
fn restored(host: &VmHost) -> usize {
    host.whole_log().matches("why=\"restored\"").count()
}

#[test]
fn power_fails_again_while_guests_come_back() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("the power fails again while guests come back");
    let (mut host, marks) = site()?;

    let (mut caught, mut spared) = (0, 0);
    for trial in 0..TRIALS {
        host.put_back("failed")?;
        let before = restored(&host);
        host.begin()?;
        thread::sleep(STEP * trial);
        host.power(false)?;
        host.serves()?;
        Deadline::after(LIMIT)
            .until("all to be saved", || {
                let status = host.ok(&["power", "status"])?;
                Ok(status["power"]["state"] == "saved" && all_are(&host, "saved")?)
            })
            .with_context(|| host.log())?;
        let ran = restored(&host) - before;
        caught += u32::from(ran > 0);
        spared += u32::from(ran < VMS.len());
        // Nobody lets one run by hand, either.
        let refused = host.call(&["restore", "a"])?;
        ensure!(refused.error() == "E_BUSY", "{refused:?}");
        if trial.is_multiple_of(2) {
            host.power_cut()?;
            host.start()?;
        } else {
            host.power(true)?;
            VMS.iter().try_for_each(|vm| host.wait_state(vm, "running"))?;
        }
        for (vm, mark) in VMS.iter().zip(&marks) {
            ensure!(host.state(vm)? == "running", "trial {trial}: {}\n{}", host.show(vm)?, host.log());
            mark.check(&host, vm)?;
        }
    }
    report.pass(
        "saved again, every guest goes on: after darkness, or because the power is back",
        format!("{TRIALS} trials"),
    );
    report.check("in some of them guests ran already", caught > 0, format!("{caught}"));
    report.check("and in some not all of them", spared > 0, format!("{spared}"));

    // They run again, if they do, after 100 ms of good power.
    host.put_back("failed")?;
    host.start()?;
    let mut saves = 0;
    for trial in 0..TRIALS {
        let before = host.whole_log().matches("why=\"saved\"").count();
        host.power(false)?;
        // A save of all takes about ten of these.
        thread::sleep(Duration::from_millis(1) * trial);
        host.power(true)?;
        Deadline::after(LIMIT).until("the power to be online", || {
            Ok(host.ok(&["power", "status"])?["power"]["state"] == "online" && all_are(&host, "running")?)
        })?;
        saves += host.whole_log().matches("why=\"saved\"").count() - before;
        for (vm, mark) in VMS.iter().zip(&marks) {
            mark.check(&host, vm)?;
        }
    }
    report.pass(
        "power that is back while they are being saved",
        format!("{TRIALS} trials, every guest runs on"),
    );
    // Of words that come at once only the last counts.
    let all = VMS.len() * TRIALS as usize;
    report.check("and they had been saved", saves > all / 2, format!("{saves} times of {all}"));

    let (mut kept, mut lost) = (0, 0);
    for trial in 0..TRIALS {
        host.put_back("failed")?;
        host.begin()?;
        thread::sleep(STEP * trial);
        host.power(false)?;
        host.power_cut()?;
        host.start()?;
        for (vm, mark) in VMS.iter().zip(&marks) {
            let shown = host.show(vm)?;
            match shown["state"].as_str() {
                Some("running") => {
                    mark.check(&host, vm)?;
                    kept += 1;
                }
                Some("lost") => {
                    ensure!(shown["error"] == "E_STATE" && shown["hint"].is_string(), "{shown}");
                    lost += 1;
                }
                _ => bail!("trial {trial}: {shown}\n{}", host.log()),
            }
        }
    }
    report.pass(
        "in darkness at once, each goes on or is said to be lost",
        format!("{kept} went on, {lost} had run unsaved"),
    );
    report.check("both were seen", kept > 0 && lost > 0, "");
    report.finish()
}
