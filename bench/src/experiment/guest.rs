// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How fast a real guest with our driver gives a large part of its disk up and gets it back.

use std::fs::File;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vssd_tests::guest::Guest;
use vssd_tests::kernel::Kernel;
use vssd_tests::mock::operator::Operator;
use vssd_tests::qemu::{Qemu, QemuBinary, VhostUserDisk, probed_accel};
use vssd_tests::scenario::{self, Disk};
use vssd_tests::serial::guest_slot;

use crate::peer::server::{VssdBuild, VssdOptions};
use crate::peer::{Media, Medium, Server};
use crate::report::figures::seconds;
use crate::report::{CaseReport, Verdict};
use crate::run::{Bench, VSSD};
use crate::stats::median;

const GIB: u64 = 1 << 30;
/// What goes and comes back, and what stays.
const MOVED: u64 = 32 * GIB;
const KEPT: u64 = GIB;
/// Seconds that each way may take.
const REQUIRED: f64 = 1.0;

pub fn run(bench: &mut Bench) -> Result<CaseReport> {
    let _slot = guest_slot()?;
    let runtime = bench.media.runtime().join("g");
    std::fs::create_dir_all(&runtime)?;
    let file = bench.media.dir(Medium::Nvram).join("guest");
    // Sparse. The daemon zeroes it in the background, and is gone long before that fills memory.
    File::create(&file)?.set_len(Media::pool_bytes(MOVED + KEPT))?;
    let options = VssdOptions { build: VssdBuild::Product, workers: 2, queues: 2, poll_us: 0 };
    let server = Server::new_vssd(&file, Medium::Nvram, &[VSSD], MOVED + KEPT, options, None, &runtime)?;
    let mut operator = Operator::connect(server.control())?;
    let image = scenario::image(&Kernel::debian()?)?;
    let mut guest =
        Qemu::new(QemuBinary::debian()?, &image).disk(VhostUserDisk::new(server.disk(VSSD))).boot()?;
    let disk = scenario::bind(&mut guest, 0)?;

    let (mut shrinks, mut grows) = (Vec::new(), Vec::new());
    let mut messages = [0; 2];
    for _ in 0..bench.effort.rounds {
        shrinks.push(resize(&mut operator, &mut guest, &disk, KEPT, &mut messages[0])?);
        grows.push(resize(&mut operator, &mut guest, &disk, MOVED + KEPT, &mut messages[1])?);
    }
    guest.expect_quiet_kernel()?;
    guest.power_off()?;
    server.stop()?;
    std::fs::remove_file(file)?;

    let verdicts =
        [("shrink", shrinks, messages[0]), ("grow", grows, messages[1])].map(|(way, times, messages)| {
            let took = median(&times);
            Verdict::of(
                format!("{way} by {} GiB: from the operator's call to the end of its job", MOVED / GIB),
                format!("{} in {messages} messages", seconds(took)),
                format!("< {}", seconds(REQUIRED)),
                took < REQUIRED,
            )
        });
    Ok(CaseReport {
        about: format!(
            "a guest with vssd.ko under QEMU ({}), a vSSD of {} GiB without data, {} KiB blocks",
            probed_accel(),
            (MOVED + KEPT) / GIB,
            disk.block_size >> 10
        ),
        verdicts: verdicts.into(),
        ..CaseReport::default()
    })
}

/// Seconds until the job was done; `messages` is what the driver sent for it.
fn resize(
    operator: &mut Operator,
    guest: &mut Guest,
    disk: &Disk,
    bytes: u64,
    messages: &mut u64,
) -> Result<f64> {
    let sent = |guest: &mut Guest| scenario::number(&disk.status(guest)?, "messages");
    let before = sent(guest)?;
    let start = Instant::now();
    let job = operator.resize(VSSD, bytes, &json!({}))?;
    let job = operator.finish(job.id).context("the guest does not follow")?;
    let took = start.elapsed().as_secs_f64();
    ensure!(job.error.is_none() && job.plugged_bytes == bytes, "{job:?}");
    *messages = sent(guest)? - before;
    Ok(took)
}
