// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A power cut of a whole host with persistent guests: real KVM, NV-RAM, vSSDs, and `kill -9` of the machine.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use vssd_tests::emulated_host::{EmulatedHost, NVRAM};
use vssd_tests::image::ImageBuilder;
use vssd_tests::kernel::Kernel;
use vssd_tests::qemu::{CMDLINE, QemuBinary};
use vssd_tests::report::Report;
use vssd_tests::scenario::find;
use vssd_tests::serial::guest_slot;
use vssd_tests::wire::PORT_NAME;

/// Past the guest's page cache.
const READ_BLOCKS: &str = "dd if=/dev/vda bs=64k count=128 iflag=direct 2>/dev/null | sha256sum";
const NAMES: [&str; 2] = ["left", "right"];

fn config() -> String {
    format!(
        "state_dir = '{NVRAM}/vm-host'\nlog_dir = '{NVRAM}/log'\n\
         [[nvram]]\nname = 'nv0'\npath = '{NVRAM}/memory'\n\
         [power]\nwindow_ms = 10000\n\
         [[power.source]]\nkind = 'edge'\nname = 'power-good'\npath = '/run/power-good'\nlow = 'critical'\n"
    )
}

fn definition(name: &str, other: &str, at: usize) -> String {
    format!(
        "name = '{name}'\nmemory = '256MiB'\nnvram = 'nv0'\naccel = 'kvm'\nmachine = 'pc-i440fx-7.2'\n\
         kernel = '/guests/small/kernel'\ninitrd = '/guests/small/initramfs'\ncmdline = '{CMDLINE} nokaslr'\n\
         extra = ['-device', 'virtio-serial-pci,id=vser', '-chardev', 'socket,id=agent0,path=/run/{name}.agent,server=on,wait=off', \
         '-device', 'virtserialport,bus=vser.0,chardev=agent0,name={PORT_NAME}']\n\
         [[vssd]]\nname = 'disk{at}'\nsocket = '/run/vssd/dev/disk{at}.sock'\nqueues = 1\n\
         [[network]]\nnetdev = 'dgram,local.type=unix,local.path=/run/{name}.net,remote.type=unix,remote.path=/run/{other}.net'\n"
    )
}

/// Starts both daemons in the background and waits for them.
fn serve(host: &mut EmulatedHost) -> Result<()> {
    host.ok(&format!(
        "test -p /run/power-good || mkfifo /run/power-good; \
         vssd-backend --pool {NVRAM}/pool --runtime-dir /run/vssd < /dev/null > /run/backend.log 2>&1 & \
         for i in $(seq 300); do test -S /run/vssd/control.sock && break; sleep 0.1; done; \
         vm-host serve --config /run/vm-host.toml < /dev/null > /run/vm-host.log 2>&1 & \
         for i in $(seq 300); do test -S /run/vm-host/control.sock && exit 0; sleep 0.1; done; \
         cat /run/backend.log /run/vm-host.log; exit 1"
    ))
    .map(drop)
}

/// An order to the daemon, and its answer.
fn order(host: &mut EmulatedHost, words: &str) -> Result<Value> {
    let said = host.ok(&format!("vm-host --timeout 100s --json {words}"))?;
    serde_json::from_str(&said).with_context(|| format!("{words}: {said:?}"))
}

fn run(host: &mut EmulatedHost, guest: &str, command: &str) -> Result<String> {
    let command = command.replace('\'', r"'\''");
    host.ok(&format!("guest_run /run/{guest}.agent 100 '{command}'"))
}

/// The last number that one guest has heard from the other, once it is larger than `than`.
fn heard_more(host: &mut EmulatedHost, than: u64) -> Result<u64> {
    let said = format!(
        "for i in $(seq 300); do n=$(tail -n 1 /tmp/heard); test \"${{n:-0}}\" -gt {than} && break; sleep 0.2; done; echo $n"
    );
    Ok(run(host, "left", &said)?.parse()?)
}

#[test]
fn guests_run_on_after_a_power_cut() -> Result<()> {
    let _slot = guest_slot()?;
    let mut report = Report::new("power cut of a host with persistent guests");
    let kernel = Kernel::debian()?;
    let guest =
        ImageBuilder::small(&kernel).kernel_module("virtio_net").kernel_module("virtio_blk").build()?;
    let image = EmulatedHost::image_with(&kernel, &QemuBinary::debian()?, &guest)?
        .artifact("vssd-backend", "vssd-backend")?
        .artifact("balloon-ctl", "balloon-ctl")?
        .artifact("vm-host", "vm-host")?
        .build()?;
    let mut host = EmulatedHost::new(&image, 768)?;
    host.boot()?;
    host.ok(&format!("mkdir -p {NVRAM}/memory; vssd-backend pool create --nvram {NVRAM}/pool:96M"))?;
    host.running()?.write_file("/run/vm-host.toml", config().as_bytes())?;
    serve(&mut host)?;
    for (at, name) in NAMES.iter().enumerate() {
        host.ok(&format!("balloon-ctl --socket /run/vssd/control.sock create disk{at} --size 32M"))?;
        let text = definition(name, NAMES[1 - at], at);
        host.running()?.write_file(&format!("/run/{name}.toml"), text.as_bytes())?;
        order(&mut host, &format!("define /run/{name}.toml"))?;
        let begun = Instant::now();
        order(&mut host, &format!("start {name}"))?;
        report.pass(&format!("{name} started"), format!("{:.1} s", begun.elapsed().as_secs_f64()));
    }
    let mut before = Vec::new();
    for (at, name) in NAMES.iter().enumerate() {
        let begun = Instant::now();
        run(
            &mut host,
            name,
            &format!("modprobe virtio_net; ip link set eth0 up; ip addr add 10.0.0.{}/24 dev eth0", at + 1),
        )?;
        // A process that counts, one that holds a file that has no name any more.
        run(
            &mut host,
            name,
            "(i=0; while :; do i=$((i+1)); echo $i > /tmp/count; sleep 0.1; done) >/dev/null 2>&1 &",
        )?;
        run(
            &mut host,
            name,
            "echo secret > /tmp/open; (exec 3< /tmp/open; rm /tmp/open; while ! test -e /tmp/go; do sleep 0.1; done; cat <&3 > /tmp/read) > /dev/null 2>&1 &",
        )?;
        let memory = run(
            &mut host,
            name,
            "head -c 64M /dev/urandom > /tmp/data && test $(stat -c %s /tmp/data) = 67108864 && sha256sum < /tmp/data",
        )?;
        // Acknowledged, and never flushed.
        run(&mut host, name, "dd if=/dev/urandom of=/dev/vda bs=64k count=128 oflag=direct 2>/dev/null")?;
        let disk = run(&mut host, name, READ_BLOCKS)?;
        before.push((memory, disk));
        report.pass(&format!("{name} works"), format!("{:.1} s", begun.elapsed().as_secs_f64()));
    }
    // A connection that stays open over it.
    run(&mut host, "left", "(tail -f /dev/null | nc -l -p 7000 > /tmp/heard) > /dev/null 2>&1 &")?;
    run(
        &mut host,
        "right",
        "(i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done | nc 10.0.0.1 7000) > /dev/null 2>&1 &",
    )?;
    let heard = heard_more(&mut host, 4)?;
    let count: u64 = run(&mut host, "left", "cat /tmp/count")?.parse()?;
    report.check("the guests are connected", heard > 0, heard);

    host.ok("echo 0 > /run/power-good")?;
    let begun = Instant::now();
    let status = loop {
        let status = order(&mut host, "power status")?;
        if find(&status, "state").is_some_and(|state| state == "saved") {
            break status;
        }
        ensure!(begun.elapsed() < Duration::from_secs(60), "{status}\n{}", host.ok("cat /run/vm-host.log")?);
    };
    for name in NAMES {
        let vm = order(&mut host, &format!("show {name}"))?;
        let saved = find(&vm, "state").is_some_and(|state| state == "saved");
        report.check(&format!("{name} is saved"), saved, find(&vm, "last_save").unwrap_or(&vm));
    }
    println!("all saved in {} us", find(&status, "last_save_us").unwrap_or(&Value::Null));
    host.power_cut()?;

    host.boot()?;
    host.running()?.write_file("/run/vm-host.toml", config().as_bytes())?;
    let begun = Instant::now();
    serve(&mut host)?;
    report.pass("both daemons serve again", format!("{:.1} s", begun.elapsed().as_secs_f64()));
    for (name, (memory, disk)) in NAMES.iter().zip(before) {
        report.check(
            &format!("{name}'s memory"),
            run(&mut host, name, "sha256sum < /tmp/data")? == memory,
            "",
        );
        let blocks = run(&mut host, name, READ_BLOCKS)?;
        report.check(&format!("{name}'s vSSD"), blocks == disk, "");
        let read = run(
            &mut host,
            name,
            "touch /tmp/go; while ! test -s /tmp/read; do sleep 0.1; done; cat /tmp/read",
        )?;
        report.check(&format!("{name}'s open file"), read == "secret", read);
    }
    let now: u64 = run(&mut host, "left", "cat /tmp/count")?.parse()?;
    report.check("a counter goes on", now >= count, format!("{count}, then {now}"));
    let now = heard_more(&mut host, heard + 4)?;
    report.check("the connection goes on", now > heard, format!("{heard}, then {now}"));
    host.running()?.expect_quiet_kernel()?;
    report.finish()
}
