// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A hypervisor that does not do what it should, and states that are not what they were.

use std::fs::{self, File};
use std::time::Instant;

use vm_host::vmm::cloud_hypervisor::CloudHypervisor;
use vm_host::vmm::{Begin, Memory, RunState, Vmm, VmmError};

use crate::machine::{BYTES, Site};
use crate::program::{PATIENCE, count, expect_counting, expect_still, wait_for};

/// The kind of an error.
fn kind(error: &VmmError) -> &'static str {
    match error {
        VmmError::Start { .. } => "start",
        VmmError::Ended { .. } => "ended",
        VmmError::Silent { .. } => "silent",
        VmmError::Refused { .. } => "refused",
        VmmError::Protocol(_) => "protocol",
        VmmError::Connection { .. } => "connection",
        VmmError::State { .. } => "state",
        VmmError::Stranger { .. } => "stranger",
    }
}

#[test]
fn program_that_is_another_or_too_old_is_refused_before_it_is_started() {
    let site = Site::new();
    for (says, expected, word) in [
        ("QEMU emulator version 10.0.2", "protocol", "not cloud-hypervisor"),
        ("cloud-hypervisor", "protocol", "not cloud-hypervisor"),
        ("cloud-hypervisor v52.0", "refused", "v53.0 or later"),
    ] {
        site.stand_in.order("--version", says);
        let error = site.plan_with("").unwrap_err();
        assert_eq!(kind(&error), expected, "{says}");
        assert!(error.to_string().contains(word), "{error}");
    }
    site.stand_in.order("--version", "cloud-hypervisor v54.1-3-gabcdef");
    assert_eq!(site.plan().version, "54.1");
}

#[test]
fn program_that_cannot_start_leaves_no_process_and_says_why() {
    let site = Site::new();
    for (call, order, expected) in [
        ("start", "", "ended"),
        ("vmm.ping", "die", "ended"),
        ("vmm.ping", "nonsense", "protocol"),
        ("vmm.ping", "half", "connection"),
        ("vmm.ping", "endless", "protocol"),
        ("vmm.ping", "wrong-status", "protocol"),
        ("version", "odd", "protocol"),
        ("pid", "", "stranger"),
        ("vm.create", "refuse", "refused"),
        ("vm.create", "die", "ended"),
    ] {
        site.stand_in.order(call, order);
        let error = site.launch(Begin::Boot).map(drop).unwrap_err();
        assert_eq!(kind(&error), expected, "{call} {order}: {error}");
        if call == "start" {
            assert!(error.to_string().contains("hypervisor interface"), "{error}");
        }
        assert!(!processes_of(&site), "{call} {order}: a process is left");
        CloudHypervisor.end_orphan(&site.places).unwrap();
    }
    let mut launch = site.plan();
    launch.args.push("--disk".to_owned());
    let error = site.launch_in(&launch, &site.memory, Begin::Boot).map(drop).unwrap_err();
    assert!(error.to_string().contains("unexpected argument '--disk'"), "{error}");
    launch.config = None;
    assert_eq!(kind(&site.launch_in(&launch, &site.memory, Begin::Boot).map(drop).unwrap_err()), "start");
    launch.program = "/nonexistent".into();
    launch.config = site.plan().config;
    assert_eq!(kind(&site.launch_in(&launch, &site.memory, Begin::Boot).map(drop).unwrap_err()), "start");
}

/// Whether a process with the site's orders is there.
fn processes_of(site: &Site) -> bool {
    let orders = site.path("orders").display().to_string();
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(&orders)
    })
}

#[test]
fn call_that_goes_wrong_is_an_error_of_its_kind_and_the_guest_goes_on() {
    let site = Site::new();
    let mut machine = site.booted();
    for (call, order, expected) in [
        ("vm.pause", "refuse", "refused"),
        ("vm.pause", "nonsense", "protocol"),
        ("vm.pause", "wrong-status", "protocol"),
        ("vm.pause", "half", "connection"),
        ("vm.info", "half", "connection"),
        ("vm.info", "refuse", "refused"),
        ("vm.power-button", "refuse", "refused"),
    ] {
        site.stand_in.order(call, order);
        let machine = machine.get();
        let error = match call {
            "vm.pause" => machine.pause(),
            "vm.info" => machine.run_state().map(drop),
            _ => machine.power_button(),
        };
        let error = error.unwrap_err();
        assert_eq!(kind(&error), expected, "{call} {order}: {error}");
        machine.resume().unwrap();
        expect_counting(&site.memory);
    }
    site.stand_in.order("vm.pause", "die");
    let error = machine.get().pause().unwrap_err();
    assert!(error.to_string().contains("told to die in vm.pause"), "{error}");
    wait_for("news of its end", || machine.get().news().is_err());
    assert_eq!(kind(&machine.get().news().unwrap_err()), "ended");
}

#[test]
fn hypervisor_that_hangs_costs_the_limit_and_can_be_killed() {
    let site = Site::new();
    let mut machine = site.booted();
    site.stand_in.order("vm.pause", "hang");
    let begun = Instant::now();
    let error = machine.get().pause().unwrap_err();
    assert!(matches!(error, VmmError::Silent { command: "vm.pause", .. }), "{error}");
    assert!(begun.elapsed() < PATIENCE);
    machine.kill();
}

#[test]
fn snapshot_that_is_not_a_whole_state_without_memory_is_none() {
    let site = Site::new();
    let mut machine = site.booted();
    for (spoilt, word) in [
        ("memory", "its memory was copied"),
        ("torn", "not whole"),
        ("private", "not in a shared, named file"),
        ("no-state", "state.json"),
    ] {
        machine.get().pause().unwrap();
        site.stand_in.order("snapshot", spoilt);
        let error = machine.get().save().unwrap_err();
        assert_eq!(kind(&error), "state", "{spoilt}: {error}");
        assert!(error.to_string().contains(word), "{spoilt}: {error}");
        machine.get().resume().unwrap();
        expect_counting(&site.memory);
    }
    let error = machine.get().save().unwrap_err();
    assert!(error.to_string().contains("while VM is running"), "{error}");
    machine.get().pause().unwrap();
    for (order, expected) in [("half", "connection"), ("nonsense", "protocol"), ("die", "ended")] {
        site.stand_in.order("vm.snapshot", order);
        assert_eq!(kind(&machine.get().save().unwrap_err()), expected, "{order}");
    }
}

#[test]
fn ordinary_guest_runs_and_has_no_state_to_save() {
    let site = Site::new();
    let memory = Memory::Ordinary { bytes: BYTES };
    let mut machine = CloudHypervisor.launch(&site.plan(), &memory, Begin::Boot, &site.places).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.run_state().unwrap(), RunState::Running);
    machine.pause().unwrap();
    assert!(machine.save().unwrap_err().to_string().contains("its memory was copied"));
    machine.kill().unwrap();
}

#[test]
fn damaged_state_is_refused_and_the_right_one_still_fits() {
    let site = Site::new();
    let mut machine = site.booted();
    expect_counting(&site.memory);
    machine.get().pause().unwrap();
    let state = machine.get().save().unwrap();
    let saved_at = count(&site.memory);
    machine.kill();

    let mut machine = site.launch(Begin::Restore).unwrap();
    let damaged = [Vec::new(), state[..state.len() - 1].to_vec(), [state.as_slice(), b"x"].concat(), {
        let mut changed = state.clone();
        let at = changed.len() - 9;
        changed[at] ^= 1;
        changed
    }];
    for state in damaged {
        assert_eq!(kind(&machine.get().load(&state).unwrap_err()), "state");
        assert_eq!(machine.get().run_state().unwrap(), RunState::AwaitsState);
    }
    site.stand_in.order("vm.restore", "refuse");
    assert_eq!(kind(&machine.get().load(&state).unwrap_err()), "state");
    machine.get().load(&state).unwrap();
    assert_eq!(expect_still(&site.memory), saved_at);
    machine.get().resume().unwrap();
    expect_counting(&site.memory);
    machine.kill();

    let launch = site.plan();
    let small =
        Memory::Named { path: site.memory.clone(), offset: 0, bytes: BYTES / 2, align: None, pmem: false };
    let mut machine = CloudHypervisor.launch(&launch, &small, Begin::Restore, &site.places).unwrap();
    assert!(machine.load(&state).unwrap_err().to_string().contains("bytes of memory"));
    machine.kill().unwrap();
    let part =
        Memory::Named { path: site.memory.clone(), offset: 1 << 20, bytes: BYTES, align: None, pmem: false };
    let error = CloudHypervisor.launch(&launch, &part, Begin::Boot, &site.places).map(drop).unwrap_err();
    assert_eq!(kind(&error), "start");
}

#[test]
fn images_of_disks_are_made_durable_when_the_guest_is_stopped() {
    let site = Site::new();
    let (image, other) = (site.path("image"), site.path("read-only"));
    for path in [&image, &other] {
        File::create(path).unwrap();
    }
    let disks = format!(
        "[[disk]]\npath = {image:?}\ncache = 'writeback'\n[[disk]]\npath = {other:?}\ncache = 'none'\nreadonly = true\n"
    );
    let launch = site.plan_with(&disks).unwrap();
    let mut machine = site.launch_in(&launch, &site.memory, Begin::Boot).unwrap();
    machine.get().resume().unwrap();
    // What is only read has nothing to lose.
    fs::remove_file(&other).unwrap();
    machine.get().pause().unwrap();
    machine.get().resume().unwrap();
    let id = machine.leave();
    let mut machine = site.adopt(&id).unwrap();
    machine.get().pause().unwrap();
    fs::remove_file(&image).unwrap();
    let error = machine.get().pause().unwrap_err();
    assert!(error.to_string().contains("make a disk's image durable"), "{error}");
}
