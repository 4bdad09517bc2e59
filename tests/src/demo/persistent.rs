// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask demo persistent`: a guest counts, the power of its host is cut, and the guest counts on.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::Steps;
use crate::persistent::PersistentHost;
use crate::scenario::find;

/// Runs the demonstration. Fails where something shown does not hold.
pub fn run() -> Result<()> {
    let mut steps = Steps::new();
    let mut host = PersistentHost::new(1)?;
    host.boot()?;
    steps.done("a host is up: emulated, with a KVM that works and NV-RAM, vssd-backend and vm-host");

    host.start_guests()?;
    let work = host.begin_work()?;
    let name = host.guests()[0].clone();
    let uptime = host.run(&name, "cut -d' ' -f1 /proc/uptime")?;
    steps.done(format!(
        "{name} runs in it: it has counted to {}, is up for {uptime} s, and holds 64 MiB of data in memory",
        count(&mut host)?
    ));

    let status = host.fail_power()?;
    let vm = host.order(&format!("show {name}"))?;
    steps.done(format!(
        "the power-good line has fallen: saved in {:.0} ms, {} bytes of state, no memory copied",
        find(&status, "last_save_us").and_then(Value::as_f64).unwrap_or_default() / 1000.0,
        find(&vm, "state_bytes").unwrap_or(&Value::Null),
    ));

    host.cut_power()?;
    steps.done("the power is gone: kill -9 of the whole host");

    host.boot()?;
    steps.done("the host has booted again on the same NV-RAM");

    let mut lost = Vec::new();
    host.check_work(&work, |what, holds, detail| {
        println!(
            "{:>8}  {what}: {}{}{detail}",
            "",
            if holds { "ok" } else { "LOST" },
            if detail.is_empty() { "" } else { ", " }
        );
        if !holds {
            lost.push(what.to_owned());
        }
    })?;
    ensure!(lost.is_empty(), "lost: {}", lost.join(", "));
    let now = host.run(&name, "cut -d' ' -f1 /proc/uptime")?;
    steps.done(format!(
        "{name} counts on: it is at {} and up for {now} s; it knows of no power cut",
        count(&mut host)?
    ));
    steps.end();
    Ok(())
}

fn count(host: &mut PersistentHost) -> Result<u64> {
    Ok(host.counts()?[0])
}
