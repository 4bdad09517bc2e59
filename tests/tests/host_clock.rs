// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The clocks of a guest that stood still: its uptime goes on where it was, and its QEMU guest agent sets its wall clock.
//!
//! ```text
//! outage      saved when the power fails, QEMU and daemon killed, found saved by the next daemon    set
//! by hand     save, restore                                                                         set
//! held        saved when the power fails, which comes back before QEMU is ended                     set
//! no answer   save, restore; the agent is there and silent         behind by the outage, and the guest goes on all the same
//! held        the agent answers again                                                               set, by all that is missing
//! ```

use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::report::Report;
use vssd_tests::serial::guest_slot;
use vssd_tests::vm_host::VmHost;
use vssd_tests::wait::Deadline;

const VM: &str = "a";
const OUTAGE: Duration = Duration::from_secs(8);
/// What two clocks may differ by; that much of an outage is not overlooked.
const CLOSE: f64 = 2.0;
/// In which a guest's agent sets it.
const SOON: Duration = Duration::from_secs(10);
/// A guest that goes on does not wait for its agent, which has 30 s.
const AT_ONCE: Duration = Duration::from_secs(15);
const TOLD: &str = "the guest's agent has set its clock";
const SILENT: &str = "the guest's agent has not answered";

/// There is no udev to name the port.
const RUN_AGENT: &str = "for port in /sys/class/virtio-ports/*; do \
     grep -q org.qemu.guest_agent.0 $port/name && qemu-ga -m virtio-serial -p /dev/${port##*/} -t /run -f /run/qga.pid -d; done; \
     test -s /run/qga.pid";

/// The clocks of a guest, and when they were read.
#[derive(Debug)]
struct Clocks {
    at: Instant,
    /// Against the host's, in seconds: negative where the guest's are behind.
    wall: f64,
    /// The same, less up to a second: it counts whole ones.
    hardware: f64,
    /// In seconds.
    uptime: f64,
}

impl Clocks {
    fn read(host: &VmHost) -> Result<Self> {
        let (at, before) = (Instant::now(), now());
        // By its path: busybox's own knows no nanoseconds.
        let said = host.run(
            VM,
            "/tools/date +%s.%N; cat /sys/class/rtc/rtc0/since_epoch; cut -d ' ' -f 1 /proc/uptime",
        )?;
        let middle = f64::midpoint(before, now());
        let numbers: Vec<f64> = said
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .with_context(|| format!("the guest said {said:?}"))?;
        let &[wall, hardware, uptime] = numbers.as_slice() else { anyhow::bail!("the guest said {said:?}") };
        Ok(Self { at, wall: wall - middle, hardware: hardware - middle, uptime })
    }

    /// Until the wall clock is right again, and the daemon knows.
    fn read_set(host: &VmHost, times: usize) -> Result<Self> {
        let mut last = None;
        let clocks = Deadline::after(SOON).poll("the guest's wall clock to be set", || {
            let clocks = Self::read(host)?;
            let set = clocks.wall.abs() < CLOSE && host.whole_log().matches(TOLD).count() == times;
            last = Some(clocks);
            Ok(if set { last.take() } else { None })
        });
        clocks.with_context(|| format!("{last:?}\n{}", host.log()))
    }

    /// What passed for the guest and did not pass while it stood still.
    fn check_uptime(&self, before: &Self, outage: Duration) -> Result<f64> {
        let passed = self.uptime - before.uptime;
        let ran = (self.at - before.at).as_secs_f64() - outage.as_secs_f64();
        ensure!(
            passed >= 0.0 && passed < ran + CLOSE,
            "{passed} s of uptime passed while it ran for {ran} s: {self:?} after {before:?}"
        );
        Ok(passed)
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// What stops the guest, and lets it go on after the outage.
type Step = fn(&mut VmHost) -> Result<()>;

fn fail(host: &mut VmHost) -> Result<()> {
    host.ok(&["power", "test", "critical"])?;
    host.wait_state(VM, "saved")
}

fn fail_and_cut(host: &mut VmHost) -> Result<()> {
    fail(host)?;
    host.power_cut().map(drop)
}

fn save(host: &mut VmHost) -> Result<()> {
    host.ok(&["save", VM]).map(drop)
}

fn online(host: &mut VmHost) -> Result<()> {
    host.ok(&["power", "test", "online"]).map(drop)
}

fn restore(host: &mut VmHost) -> Result<()> {
    host.ok(&["restore", VM]).map(drop)
}

/// The clocks before, and how long it took from the end of the outage until the guest ran.
fn stand_still(host: &mut VmHost, stop: Step, go_on: Step) -> Result<(Clocks, Duration)> {
    let before = Clocks::read(host)?;
    stop(host)?;
    thread::sleep(OUTAGE);
    let begun = Instant::now();
    go_on(host)?;
    host.wait_state(VM, "running")?;
    Ok((before, begun.elapsed()))
}

#[test]
fn the_wall_clock_of_a_guest_with_an_agent_is_set_and_its_uptime_goes_on() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("the clocks of a guest");
    let image = ImageBuilder::small(&Kernel::debian()?).tool("date").qemu_agent()?.build()?;
    let mut host = VmHost::new()?;
    host.start()?;
    host.define(&format!("{}guest_agent = true\n", host.definition(VM, &image, "128MiB")))?;
    host.ok(&["start", VM])?;
    host.run(VM, RUN_AGENT)?;
    let booted = Clocks::read(&host)?;
    ensure!(booted.wall.abs() < CLOSE, "a guest boots with another time: {booted:?}");

    let ways: [(&str, Step, Step); 4] = [
        ("outage", fail_and_cut, VmHost::start),
        ("by hand", save, restore),
        ("again", save, restore),
        ("held", fail, online),
    ];
    for (times, (name, stop, go_on)) in (1..).zip(ways) {
        let (before, took) = stand_still(&mut host, stop, go_on)?;
        let ran = Instant::now();
        let after = Clocks::read_set(&host, times)?;
        let passed = after.check_uptime(&before, OUTAGE)?;
        report.pass(
            name,
            format!(
                "it ran after {:.1} s and its clock was right {:.1} s later, by {:+.2} s; its uptime went on by {passed:.1} s",
                took.as_secs_f64(),
                ran.elapsed().as_secs_f64(),
                after.wall
            ),
        );
    }
    ensure!(!host.whole_log().contains("WARN"), "{}", host.log());

    // Its agent is there and does not answer; one that is not there is the same to the host.
    host.run(VM, "kill -STOP $(cat /run/qga.pid)")?;
    let (before, took) = stand_still(&mut host, save, restore)?;
    let after = Clocks::read(&host)?;
    after.check_uptime(&before, OUTAGE)?;
    report.check("without an answer the guest goes on at once", took < AT_ONCE, format!("{took:.1?}"));
    let behind = OUTAGE.as_secs_f64() - CLOSE;
    report.check("and its wall clock is behind by the outage", after.wall < -behind, format!("{after:?}"));
    report.check("its hardware clock is not", after.hardware.abs() < CLOSE + 1.0, "");
    Deadline::secs(60)
        .until("the daemon to say that nothing was set", || Ok(host.whole_log().contains(SILENT)))
        .with_context(|| host.log())?;
    report.pass("the daemon says so", "");

    host.run(VM, "kill -CONT $(cat /run/qga.pid)")?;
    let (before, _) = stand_still(&mut host, fail, online)?;
    let after = Clocks::read_set(&host, ways.len() + 1)?;
    after.check_uptime(&before, OUTAGE)?;
    report.pass(
        "the next time it is set",
        format!("by {:.1} s", after.wall - before.wall + OUTAGE.as_secs_f64()),
    );
    host.ok(&["stop", VM, "--kill", "--yes"])?;
    report.finish()
}
