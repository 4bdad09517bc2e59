// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `device.sync` as operators see it: who is answered when, while a medium takes its time or fails.

use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vssd_pool::store::Store;
use vssd_pool::store::fault::{Failure, Sim};
use vssd_pool::{CreateOptions, MediumKind, OpenOptions, Pool};
use vssd_protocol::control::ErrorCode;

use super::testkit::{Client, Daemon, Disks, MIB};
use super::tests::write_block;

/// A medium whose flushes wait at a gate, like a disk with much to do.
#[derive(Debug)]
struct Gated {
    inner: Arc<dyn Store>,
    gate: Arc<Gate>,
}

#[derive(Debug, Default)]
struct Gate {
    /// Whether it is shut, and how many flushes there were so far.
    state: Mutex<(bool, u64)>,
    opened: Condvar,
}

impl Gate {
    fn set(&self, is_shut: bool) {
        self.state.lock().unwrap().0 = is_shut;
        self.opened.notify_all();
    }

    fn flushes(&self) -> u64 {
        self.state.lock().unwrap().1
    }
}

impl Store for Gated {
    fn kind(&self) -> MediumKind {
        self.inner.kind()
    }

    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.inner.read_at(offset, buf)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.inner.write_at(offset, buf)
    }

    fn write_align(&self) -> u32 {
        self.inner.write_align()
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.zero(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.gate.state.lock().unwrap();
        state.1 += 1;
        while state.0 {
            state = self.gate.opened.wait(state).unwrap();
        }
        drop(state);
        self.inner.sync()
    }

    fn sync_is_instant(&self) -> bool {
        false
    }

    unsafe fn copy_out(&self, offset: u64, to: *mut u8, len: usize) -> io::Result<()> {
        // SAFETY: as the caller says.
        unsafe { self.inner.copy_out(offset, to, len) }
    }

    unsafe fn copy_in(&self, offset: u64, from: *const u8, len: usize) -> io::Result<()> {
        // SAFETY: as the caller says.
        unsafe { self.inner.copy_in(offset, from, len) }
    }

    fn bytes_written(&self) -> u64 {
        self.inner.bytes_written()
    }
}

/// A daemon over simulated NV-RAM, with two vSSDs of a MiB.
fn daemon() -> (Arc<Sim>, Arc<Gate>, Disks, Daemon) {
    let sim = Sim::new(&[(MediumKind::Nvram, 24 << 20)]);
    let gate = Arc::new(Gate::default());
    let stores: Vec<Arc<dyn Store>> = sim
        .stores()
        .into_iter()
        .map(|inner| Arc::new(Gated { inner, gate: Arc::clone(&gate) }) as Arc<dyn Store>)
        .collect();
    Pool::create_on(&CreateOptions::new("test", Vec::new()), &stores).unwrap();
    let pool = Pool::open_on(&OpenOptions::new::<&str>([]), stores).unwrap();
    let disks = Disks::new(64);
    let daemon = Daemon::over(pool, &disks);
    daemon.create("vm1", MIB, MIB);
    daemon.create("vm2", MIB, MIB);
    (sim, gate, disks, daemon)
}

fn names(names: &[&str]) -> Value {
    json!({ "names": names })
}

/// Waits until a flush is under way.
fn wait_for_flush(gate: &Gate, before: u64) {
    let end = Instant::now() + Duration::from_secs(10);
    while gate.flushes() == before {
        assert!(Instant::now() < end, "nothing is flushed");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// protocol.md: C-7, C-12.
#[test]
fn sync_is_answered_when_all_is_durable_and_says_who_asked() {
    let (_sim, gate, _disks, daemon) = daemon();
    let mut client = daemon.client();
    let mut watcher = daemon.watcher();
    watcher.ok("events.subscribe", json!({ "filter": ["device.synced"] }));
    write_block(&daemon, "vm1", 0);
    let before = gate.flushes();
    let answer = client.ok("device.sync", names(&["vm1", "vm1"]));
    assert_eq!(answer["devices"], 1);
    assert!(answer["took_us"].is_u64(), "{answer}");
    let flushes = gate.flushes();
    assert!(flushes > before);
    let event = watcher.events_until("device.synced").pop().unwrap();
    assert_eq!((&event["device"], &event["data"]["took_us"]), (&json!("vm1"), &answer["took_us"]));
    assert_eq!(event["data"]["pid"], std::process::id());
    // Nothing was written since.
    for params in [json!({}), names(&[]), names(&["vm1", "vm2"])] {
        assert_eq!(client.ok("device.sync", params)["devices"], 2);
    }
    assert_eq!(gate.flushes(), flushes, "a sync with nothing to do flushed a medium");
    let event = watcher.events_until("device.synced").pop().unwrap();
    assert_eq!((event.get("device"), &event["data"]["devices"]), (None, &json!(2)));
}

#[test]
fn sync_of_unknown_names_does_nothing_and_of_the_monitor_socket_is_refused() {
    let (_sim, gate, _disks, daemon) = daemon();
    let mut client = daemon.client();
    write_block(&daemon, "vm1", 0);
    let before = gate.flushes();
    client.fails_with(ErrorCode::NotFound, "device.sync", names(&["vm1", "vm3"]));
    client.fails_with(ErrorCode::InvalidParams, "device.sync", json!({ "names": "vm1" }));
    client.fails_with(ErrorCode::InvalidParams, "device.sync", json!({ "name": "vm1" }));
    daemon.watcher().fails_with(ErrorCode::Permission, "device.sync", json!({}));
    assert_eq!(gate.flushes(), before);
}

#[test]
fn sync_that_takes_long_holds_up_nobody_and_those_who_wait_share_the_next() {
    let (_sim, gate, _disks, daemon) = daemon();
    let mut operators: Vec<Client> = (0..6).map(|_| daemon.client()).collect();
    write_block(&daemon, "vm1", 0);
    let before = gate.flushes();
    gate.set(true);
    let first = operators[0].request("device.sync", json!({}));
    wait_for_flush(&gate, before);
    // I/O goes on, and so do operators, also the one who waits.
    write_block(&daemon, "vm2", 0);
    let list = operators[0].request("device.list", json!({}));
    assert_eq!(operators[0].read().unwrap()["id"], list, "the sync was answered before it was over");
    let waiting: Vec<u64> =
        operators[1..].iter_mut().map(|client| client.request("device.sync", names(&["vm2"]))).collect();
    // One of them goes.
    drop(operators.remove(1));
    assert_eq!(daemon.client().ok("pool.status", json!({}))["health"], "ok");
    gate.set(false);
    let answer = operators[0].read().unwrap();
    assert_eq!((&answer["id"], &answer["result"]["devices"]), (&json!(first), &json!(2)));
    for (client, id) in operators[1..].iter_mut().zip(&waiting[1..]) {
        let answer = client.read().unwrap();
        assert_eq!((&answer["id"], &answer["result"]["devices"]), (&json!(id), &json!(1)));
    }
    // Two for the first (data and journal), two for all others.
    assert!(gate.flushes() - before <= 4, "{} flushes for 6 syncs", gate.flushes() - before);
}

#[test]
fn sync_after_a_failure_of_a_medium_is_never_acknowledged() {
    let (sim, _gate, _disks, daemon) = daemon();
    let mut client = daemon.client();
    write_block(&daemon, "vm1", 0);
    sim.fail_at(0, Failure::Errno(libc::EIO));
    for params in [json!({}), names(&["vm2"]), json!({})] {
        client.fails_with(ErrorCode::Media, "device.sync", params);
    }
    assert_eq!(client.ok("pool.status", json!({}))["health"], "failed");
}

#[test]
fn calls_that_wait_are_bounded() {
    let (_sim, gate, _disks, daemon) = daemon();
    let mut client = daemon.client();
    write_block(&daemon, "vm1", 0);
    let before = gate.flushes();
    gate.set(true);
    let ids: Vec<u64> = (0..65).map(|_| client.request("device.sync", json!({}))).collect();
    wait_for_flush(&gate, before);
    let refused = client.read().unwrap();
    assert_eq!((&refused["id"], &refused["error"]["data"]["code"]), (&json!(ids[64]), &json!("E_TOO_LARGE")));
    gate.set(false);
    for id in &ids[..64] {
        let answer = client.read().unwrap();
        assert!(answer["id"] == *id && answer.get("error").is_none(), "{answer}");
    }
}
