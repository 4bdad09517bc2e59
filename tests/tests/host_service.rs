// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vm-host` as what it is on most hosts: a unit of systemd, which logind's shutdowns wait for.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vssd_tests::guest::Guest;
use vssd_tests::image::{ImageBuilder, SYSTEMD};
use vssd_tests::kernel::Kernel;
use vssd_tests::paths;
use vssd_tests::qemu::{Qemu, QemuBinary};
use vssd_tests::report::Report;
use vssd_tests::serial::guest_slot;
use vssd_tests::wait::Deadline;

const CONFIG: &str = "[[nvram]]\nname = 'nv0'\npath = '/nv'\ndeclared_persistent = true\n\
                      [[power.source]]\nkind = 'logind'\nname = 'host'\n";
/// The longest that logind waits for a lock: nothing here takes so long.
const LOGIND: &str = "[Login]\nInhibitDelayMaxSec=300\n";
/// The journal ends with the machine; the console is kept.
const CONSOLE: &str = "[Service]\nStandardError=journal+console\n";
const LIMIT: Duration = Duration::from_secs(60);
/// How long the daemon keeps the machine from shutting down.
const WAITS: Duration = Duration::from_secs(5);

fn show(guest: &mut Guest, property: &str) -> Result<String> {
    guest.ok(&format!("systemctl show -P {property} vm-host"))
}

/// The lock, as logind lists it, and that the daemon knows of it.
fn wait_lock(guest: &mut Guest) -> Result<String> {
    let pid = show(guest, "MainPID")?;
    let lock = Deadline::after(LIMIT).poll("a lock of vm-host", || {
        let list = guest.ok("systemd-inhibit --list --no-legend")?;
        // WHO UID USER PID COMM WHAT WHY MODE
        let lock = list.lines().find(|line| line.split_whitespace().any(|word| word == pid));
        Ok(lock.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")))
    });
    lock.with_context(|| guest.ok("journalctl --no-pager -o cat").unwrap_or_default())
}

fn preparing(guest: &mut Guest) -> Result<String> {
    guest.ok(
        "busctl get-property org.freedesktop.login1 /org/freedesktop/login1 org.freedesktop.login1.Manager PreparingForShutdown",
    )
}

#[test]
fn a_shutdown_waits_for_vm_host_and_no_longer_and_a_restart_ends_only_the_daemon() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("vm-host under systemd");
    let image = ImageBuilder::small(&Kernel::debian()?)
        .artifact("vm-host", "vm-host")?
        .file("/usr/bin/vm-host", &paths::artifact("vm-host", "vm-host")?)
        .file("/etc/systemd/system/vm-host.service", &paths::repo_root().join("vm-host/vm-host.service"))
        .systemd()?
        .logind()?
        .build()?;
    let mut guest = Qemu::new(QemuBinary::debian()?, &image)
        .memory_mib(768)
        .cmdline(SYSTEMD)
        .boot_limit(Duration::from_secs(120))
        .boot()?;
    guest.ok("mkdir -p /nv /etc/systemd/logind.conf.d /etc/systemd/system/vm-host.service.d && mount -t tmpfs tmpfs /nv")?;
    guest.write_file("/etc/vm-host.toml", CONFIG.as_bytes())?;
    guest.write_file("/etc/systemd/logind.conf.d/test.conf", LOGIND.as_bytes())?;
    guest.write_file("/etc/systemd/system/vm-host.service.d/test.conf", CONSOLE.as_bytes())?;
    guest.ok("systemctl daemon-reload && systemctl start dbus.socket systemd-logind && systemctl enable --now vm-host")?;
    let lock = wait_lock(&mut guest)?;
    report.check("a lock delays shutdowns", lock.contains("shutdown") && lock.ends_with("delay"), lock);

    // What its machines and their sockets are to it: a process of its cgroup, and a file of its runtime directory.
    let cgroup = format!("/sys/fs/cgroup{}", show(&mut guest, "ControlGroup")?);
    let other = guest.ok(&format!(
        "sleep 10000 > /dev/null 2>&1 & echo $! > {cgroup}/cgroup.procs; echo $!; touch /run/vm-host/socket"
    ))?;
    for how in ["systemctl restart vm-host", "systemctl kill -s KILL --kill-whom=main vm-host"] {
        let before = show(&mut guest, "MainPID")?;
        guest.ok(how)?;
        Deadline::after(LIMIT).until("another daemon", || {
            Ok(show(&mut guest, "ActiveState")? == "active" && show(&mut guest, "MainPID")? != before)
        })?;
        wait_lock(&mut guest)?;
        let listed = guest.ok(&format!("cat {cgroup}/cgroup.procs"))?;
        report.check(
            how,
            listed.lines().any(|pid| pid == other) && guest.sh("test -e /run/vm-host/socket")?.success(),
            format!("processes of its cgroup: {}", listed.replace('\n', " ")),
        );
    }

    // It cannot say that all is saved: the machine does not go down.
    guest.ok("systemctl kill -s STOP --kill-whom=main vm-host && systemctl poweroff")?;
    std::thread::sleep(WAITS);
    report.check("a shutdown waits", preparing(&mut guest)? == "b true", "");
    let pid = show(&mut guest, "MainPID")?;
    ensure!(!guest.console().contains("the host may shut down"));
    let continued = Instant::now();
    guest.ok(&format!("kill -CONT {pid}"))?;
    let console = guest.console_path().to_owned();
    guest.wait_off(LIMIT)?;
    let took = continued.elapsed();
    let said = String::from_utf8_lossy(&std::fs::read(console)?).into_owned();
    let order = ["saving all VMs", "the host may shut down"].map(|words| said.find(words));
    report.check(
        "and goes on when all is saved",
        order[0].is_some() && order[0] < order[1],
        format!("off after {:.1} s", took.as_secs_f64()),
    );
    report.finish()
}
