// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A power cut of a whole host with persistent guests: real KVM, NV-RAM, vSSDs, and `kill -9` of the machine. The short form of
//! `cargo xtask bench power-cut`.

use std::time::Instant;

use anyhow::Result;
use vssd_tests::persistent::PersistentHost;
use vssd_tests::report::Report;
use vssd_tests::scenario::find;
use vssd_tests::serial::guest_slot;

#[test]
fn guests_run_on_after_a_power_cut() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("power cut of a host with persistent guests");
    let mut host = PersistentHost::new(2)?;
    host.boot()?;
    host.start_guests()?;
    let work = host.begin_work()?;
    host.fail_power()?;
    for name in host.guests().to_vec() {
        let vm = host.order(&format!("show {name}"))?;
        let saved = find(&vm, "state").is_some_and(|state| state == "saved");
        report.check(&format!("{name} is saved"), saved, find(&vm, "last_save").unwrap_or(&vm));
    }
    host.cut_power()?;

    let begun = Instant::now();
    host.boot()?;
    report.pass("the host is up and serves again", format!("{:.1} s", begun.elapsed().as_secs_f64()));
    host.check_work(&work, |what, holds, detail| report.check(what, holds, detail))?;
    host.host().running()?.expect_quiet_kernel()?;
    report.finish()
}
