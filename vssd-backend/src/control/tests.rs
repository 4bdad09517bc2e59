// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The control sockets as clients see them: real sockets, a real pool, a guest that a test plays.

use std::collections::BTreeSet;
use std::io::{BufRead, Read, Write};
use std::net::Shutdown;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng, TryRngCore};
use serde_json::{Value, json};
use vssd_protocol::control::{ErrorCode, MAX_LINE};
use vssd_protocol::guest::{
    self, RangeStatus, Reason, Request, RequestResult, ResponseBody, STATE_F_EMPTY, Urgency,
};
use vssd_protocol::units::BlockRange;

use super::server::MAX_SESSIONS;
use super::testkit::{Asked, Client, Daemon, Disks, Guest, MIB};
use crate::device::DeviceEvent;

const BLOCK: u64 = 64 << 10;

fn by_name(name: &str) -> Value {
    json!({ "name": name })
}

fn resize(name: &str, size_bytes: u64) -> Value {
    json!({ "name": name, "size_bytes": size_bytes })
}

/// Waits for a job to end and returns it.
fn ended(client: &mut Client, job: &Value) -> Value {
    loop {
        let info = client.ok("job.wait", json!({ "id": job, "timeout_ms": 5000 }));
        let state = info["state"].as_str().unwrap();
        if !matches!(state, "created" | "offered" | "evacuating" | "committing") {
            return info;
        }
    }
}

/// Writes to one block.
pub(super) fn write_block(daemon: &Daemon, name: &str, block: u64) {
    let vssd = daemon.pool.vssd_by_name(name).unwrap();
    let mut lane = daemon.pool.lane().unwrap();
    let data = [0x5a_u8; 4096];
    let iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    lane.begin_batch();
    // SAFETY: `data` lives until this function ends, and before that the write has completed.
    let submitted = unsafe { lane.write(&vssd, block * BLOCK, &[iov], 1) };
    lane.end_batch();
    if submitted == vssd_pool::Submitted::Pending {
        let end = Instant::now() + Duration::from_secs(10);
        let mut done = None;
        while done.is_none() {
            assert!(Instant::now() < end, "the write never ends");
            lane.poll(&mut |_, result| done = Some(result));
        }
        done.unwrap().unwrap();
    } else {
        assert_eq!(submitted, vssd_pool::Submitted::Done(Ok(())));
    }
}

#[test]
fn hello_says_which_socket_it_is() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let info = daemon.client().ok("server.hello", json!({ "client": "test" }));
    assert_eq!(
        (&info["socket"], &info["schema"], &info["pool"]),
        (&json!("control"), &json!("vssd.v1"), &json!("test"))
    );
    assert_eq!(daemon.watcher().ok("server.hello", json!({}))["socket"], "monitor");
}

/// What is wrong with a line, and the code and whether the id comes back.
fn bad_lines() -> Vec<(Vec<u8>, ErrorCode, bool)> {
    use ErrorCode::{InvalidParams, InvalidRequest, NotFound, Parse, UnknownMethod};
    let text = |line: &str| line.as_bytes().to_vec();
    let call = |method: &str, params: &str| {
        format!(r#"{{"jsonrpc":"2.0","id":9,"method":"{method}","params":{params}}}"#).into_bytes()
    };
    let mut bad = vec![
        (text(""), Parse, false),
        (text("hello"), Parse, false),
        (text("{"), Parse, false),
        (text(r#"{"jsonrpc":"2.0","id":9,"method":"device.list"}}"#), Parse, false),
        (text(r#"{"jsonrpc":"2.0","id":9,"method":"device.list"} {}"#), Parse, false),
        (vec![0xff, 0xfe, 0x00], Parse, false),
        (text("{\"id\":\"\u{0}\"}"), Parse, false),
        (vec![b'['; 100_000], Parse, false),
        (text(r#"{"jsonrpc":"2.0","id":1e999,"method":"device.list"}"#), Parse, false),
        (text(r#"{"jsonrpc":"2.0","id":9,"method":"\ud800"}"#), Parse, false),
        (text("[]"), InvalidRequest, false),
        (text(r#"[{"jsonrpc":"2.0","id":9,"method":"device.list"}]"#), InvalidRequest, false),
        (text("null"), InvalidRequest, false),
        (text("42"), InvalidRequest, false),
        (text(r#""device.list""#), InvalidRequest, false),
        (text("{}"), InvalidRequest, false),
        (text(r#"{"jsonrpc":"2.0","method":"device.list"}"#), InvalidRequest, false),
        (text(r#"{"jsonrpc":"2.0","id":null,"method":"device.list"}"#), InvalidRequest, false),
        (text(r#"{"jsonrpc":"2.0","id":[9],"method":"device.list"}"#), InvalidRequest, false),
        (text(r#"{"jsonrpc":"2.0","id":true,"method":"device.list"}"#), InvalidRequest, false),
        (text(r#"{"id":9,"method":"device.list"}"#), InvalidRequest, true),
        (text(r#"{"jsonrpc":"1.0","id":9,"method":"device.list"}"#), InvalidRequest, true),
        (text(r#"{"jsonrpc":2.0,"id":9,"method":"device.list"}"#), InvalidRequest, true),
        (text(r#"{"jsonrpc":"2.0","id":9}"#), InvalidRequest, true),
        (text(r#"{"jsonrpc":"2.0","id":9,"method":7}"#), InvalidRequest, true),
        (text(r#"{"jsonrpc":"2.0","id":9,"method":"device.list","extra":1}"#), InvalidRequest, true),
        (text(r#"{"jsonrpc":"2.0","id":9,"method":"device.list","params":[]}"#), InvalidParams, true),
        (text(r#"{"jsonrpc":"2.0","id":9,"method":"device.list","params":"x"}"#), InvalidParams, true),
        (call("device.list", r#"{"name":"a"}"#), InvalidParams, true),
        (call("", "{}"), UnknownMethod, true),
        (call("device.explode", "{}"), UnknownMethod, true),
        (call("DEVICE.LIST", "{}"), UnknownMethod, true),
        (call("event", "{}"), UnknownMethod, true),
        (call("device.show", "{}"), InvalidParams, true),
        (call("device.show", r#"{"name":7}"#), InvalidParams, true),
        (call("device.show", r#"{"name":"nobody"}"#), NotFound, true),
        (call("device.show", r#"{"name":"../../etc/passwd"}"#), NotFound, true),
        (call("device.show", r#"{"name":"vm1","x":1}"#), InvalidParams, true),
        (call("device.create", r#"{"name":"a"}"#), InvalidParams, true),
        (call("device.create", r#"{"name":"a/b","size_bytes":65536}"#), InvalidParams, true),
        (call("device.create", r#"{"name":"..","size_bytes":65536}"#), InvalidParams, true),
        (call("device.create", r#"{"name":"","size_bytes":65536}"#), InvalidParams, true),
        (call("device.create", r#"{"name":"a","size_bytes":0}"#), InvalidParams, true),
        (call("device.create", r#"{"name":"a","size_bytes":-1}"#), InvalidParams, true),
        (call("device.create", r#"{"name":"a","size_bytes":1.5}"#), InvalidParams, true),
        (call("device.create", r#"{"name":"a","size_bytes":"1G"}"#), InvalidParams, true),
        (call("device.create", r#"{"name":"a","size_bytes":18446744073709551615}"#), InvalidParams, true),
        (call("device.create", r#"{"name":"a","size_bytes":65536,"class":"tape"}"#), InvalidParams, true),
        (
            call("device.create", r#"{"name":"a","size_bytes":65536,"policy":{"pull":"always"}}"#),
            InvalidParams,
            true,
        ),
        (
            call("device.create", r#"{"name":"a","size_bytes":65536,"policy":{"typo":1}}"#),
            InvalidParams,
            true,
        ),
        (
            call("device.create", r#"{"name":"a","size_bytes":131072,"max_bytes":65536}"#),
            ErrorCode::AboveMax,
            true,
        ),
        (
            call("device.create", r#"{"name":"a","size_bytes":65536,"min_bytes":131072}"#),
            ErrorCode::BelowMin,
            true,
        ),
        (call("device.create", r#"{"name":"vm1","size_bytes":65536}"#), ErrorCode::Exists, true),
        (call("device.create", r#"{"name":"a","size_bytes":1099511627776}"#), ErrorCode::PoolFull, true),
        (call("device.delete", r#"{"name":"nobody"}"#), NotFound, true),
        (call("device.delete", r#"{"name":"vm1","force":"yes"}"#), InvalidParams, true),
        (call("device.resize", r#"{"name":"vm1"}"#), InvalidParams, true),
        (call("device.resize", r#"{"name":"nobody","size_bytes":65536}"#), NotFound, true),
        (call("device.resize", r#"{"name":"vm1","size_bytes":65536,"dead_line":1}"#), InvalidParams, true),
        (
            call("device.resize", r#"{"name":"vm1","size_bytes":65536,"on_timeout":"kill"}"#),
            InvalidParams,
            true,
        ),
        (call("device.resize", r#"{"name":"vm1","size_bytes":0}"#), ErrorCode::BelowMin, true),
        (
            call("device.resize", r#"{"name":"vm1","size_bytes":18446744073709551615}"#),
            ErrorCode::AboveMax,
            true,
        ),
        (call("device.limits", r#"{"name":"vm1","max_bytes":1}"#), InvalidParams, true),
        (call("device.limits", r#"{"name":"vm1","max_bytes":18446744073709551615}"#), InvalidParams, true),
        (call("device.limits", r#"{"name":"vm1","min_bytes":18446744073709551615}"#), InvalidParams, true),
        (call("job.show", r#"{"id":77}"#), NotFound, true),
        (call("job.show", r#"{"id":-1}"#), InvalidParams, true),
        (call("job.cancel", r#"{"id":77}"#), NotFound, true),
        (call("job.wait", r#"{"id":77,"timeout_ms":1}"#), NotFound, true),
        (call("job.wait", r#"{"id":77,"timeout_ms":60001}"#), InvalidParams, true),
        (call("job.wait", r#"{"id":77}"#), InvalidParams, true),
        (call("events.subscribe", r#"{"filter":"shrink."}"#), InvalidParams, true),
        (call("events.subscribe", r#"{"since_seq":-1}"#), InvalidParams, true),
        (call("server.hello", r#"{"client":1}"#), InvalidParams, true),
    ];
    let long_id = format!(r#"{{"jsonrpc":"2.0","id":"{}","method":"device.list"}}"#, "i".repeat(300));
    bad.push((long_id.into_bytes(), InvalidRequest, false));
    let filters = serde_json::to_string(&vec!["x"; 100]).unwrap();
    bad.push((call("events.subscribe", &format!(r#"{{"filter":{filters}}}"#)), ErrorCode::TooLarge, true));
    bad
}

/// protocol.md: C-2, C-3, C-4.
#[test]
fn every_bad_line_gets_its_code_and_the_connection_goes_on() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    daemon.create("vm1", MIB, 2 * MIB);
    let mut client = daemon.client();
    let lines = bad_lines();
    assert!(lines.len() >= 40);
    for (line, code, with_id) in lines {
        client.send_line(&line);
        let answer = client.read().expect("still connected");
        let shown = String::from_utf8_lossy(&line[..line.len().min(120)]).into_owned();
        assert_eq!(answer["error"]["data"]["code"], code.as_str(), "{shown}: {answer}");
        assert_eq!(answer["error"]["code"], code.rpc_code(), "{shown}");
        assert_eq!(answer["id"], if with_id { json!(9) } else { Value::Null }, "{shown}");
        assert_eq!(answer["jsonrpc"], "2.0");
    }
    let list = client.ok("device.list", json!({}));
    assert_eq!(list["devices"].as_array().unwrap().len(), 1, "nothing was created or deleted");
    assert_eq!(list["devices"][0]["requested_bytes"], MIB);
}

/// protocol.md: section 16.
#[test]
fn monitor_socket_reads_but_refuses_every_change() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    daemon.create("vm1", MIB, MIB);
    let mut watcher = daemon.watcher();
    for method in
        ["device.create", "device.delete", "device.resize", "device.limits", "device.sync", "job.cancel"]
    {
        // Refused before its parameters are looked at.
        watcher.fails_with(ErrorCode::Permission, method, json!({ "name": "vm1", "nonsense": 1 }));
    }
    assert_eq!(watcher.ok("device.show", by_name("vm1"))["name"], "vm1");
    assert_eq!(watcher.ok("pool.status", json!({}))["devices"], 1);
    watcher.ok("events.subscribe", json!({}));
    watcher.ok("job.list", json!({}));
}

/// protocol.md: C-7.
#[test]
fn create_show_delete_and_what_operators_are_told() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let mut client = daemon.client();
    client.ok("events.subscribe", json!({ "filter": ["device."] }));
    let params = json!({
        "name": "vm1", "size_bytes": 4 * MIB - 1, "min_bytes": MIB, "max_bytes": 8 * MIB, "class": "nvram",
        "policy": { "on_timeout": "fail", "deadline_ms": 5000, "pull": "grant" },
    });

    let mut dry = params.clone();
    dry["dry_run"] = true.into();
    assert_eq!(client.ok("device.create", dry)["requested_bytes"], 4 * MIB);
    client.fails_with(ErrorCode::NotFound, "device.show", by_name("vm1"));

    let info = client.ok("device.create", params);
    assert_eq!(info["state"], "detached");
    assert_eq!(info["plugged_bytes"], 4 * MIB, "rounded up to whole blocks");
    assert_eq!((&info["policy"]["on_timeout"], &info["class"]), (&json!("fail"), &json!("nvram")));
    assert_eq!(info["socket_path"], "/run/vm1.sock");
    assert_eq!(client.ok("device.show", by_name("vm1")), info);
    let status = client.ok("pool.status", json!({}));
    assert_eq!((&status["promised_bytes"], &status["devices"]), (&json!(4 * MIB), &json!(1)));

    let deleting = json!({ "name": "vm1", "dry_run": true });
    client.ok("device.delete", deleting);
    client.ok("device.delete", by_name("vm1"));
    client.fails_with(ErrorCode::NotFound, "device.show", by_name("vm1"));
    assert_eq!(client.ok("pool.status", json!({}))["promised_bytes"], 0);
    assert_eq!(daemon.asked()[0], Asked::Open("vm1".into(), 4 * MIB));
    assert!(matches!(daemon.asked()[1], Asked::Close(_)));

    let mut late = daemon.client();
    late.ok("events.subscribe", json!({ "filter": ["device."], "since_seq": 0 }));
    let events = late.events_until("device.deleted");
    assert_eq!(events[0]["event"], "device.created");
    for event in &events {
        assert_eq!(event["device"], "vm1");
        assert_eq!(event["data"]["pid"], std::process::id(), "who did it");
        assert_eq!(event["data"]["uid"], rustix::process::getuid().as_raw());
    }
}

#[test]
fn delete_is_refused_while_connected_unless_forced_and_parked_requests_are_answered() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let id = daemon.create("vm1", MIB, MIB);
    let mut guest = Guest::boot(&daemon, id);
    let epoch = guest.hello();
    let wait = guest.send(Request::Wait { epoch, seq_seen: 1 });
    let mut client = daemon.client();
    client.fails_with(ErrorCode::InUse, "device.delete", by_name("vm1"));
    client.fails_with(ErrorCode::InUse, "device.delete", json!({ "name": "vm1", "dry_run": true }));
    client.ok("device.delete", json!({ "name": "vm1", "force": true }));
    assert_eq!(guest.answer(wait).unwrap().result, RequestResult::Stale);
    assert_eq!(client.ok("job.list", json!({}))["jobs"], json!([]));
    let late = guest.send(Request::State { epoch, flags: 0, start: 0 });
    assert!(guest.answer(late).is_none(), "nobody is left to answer but IOERR");
}

#[test]
fn vssd_whose_socket_cannot_be_opened_is_not_created() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    daemon.recorded.lock().unwrap().refuse_open = true;
    let mut client = daemon.client();
    client.fails_with(ErrorCode::Internal, "device.create", resize("vm1", MIB));
    client.fails_with(ErrorCode::NotFound, "device.show", by_name("vm1"));
    assert_eq!(client.ok("pool.status", json!({}))["promised_bytes"], 0);
}

#[test]
fn pool_full_says_how_much_is_left() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let mut client = daemon.client();
    let available = client.ok("pool.status", json!({}))["available_bytes"].as_u64().unwrap();
    daemon.create("vm1", available - MIB, 2 * available);
    for (method, params, more) in [
        ("device.create", resize("vm2", 2 * MIB), 2 * MIB),
        ("device.create", json!({ "name": "vm2", "size_bytes": 2 * MIB, "dry_run": true }), 2 * MIB),
        ("device.resize", resize("vm1", available + 2 * MIB), 3 * MIB),
        (
            "device.resize",
            json!({ "name": "vm1", "size_bytes": available + 2 * MIB, "dry_run": true }),
            3 * MIB,
        ),
    ] {
        let (code, error) = client.err(method, params);
        assert_eq!(code, "E_POOL_FULL");
        let detail = &error["data"]["detail"];
        assert_eq!(
            (&detail["requested_bytes"], &detail["available_bytes"]),
            (&json!(more), &json!(MIB)),
            "{error}"
        );
        assert!(error["data"]["hint"].as_str().unwrap().contains("balloon-ctl pool status"));
    }
    client.ok("device.create", resize("vm2", MIB));
}

#[test]
fn detached_vssd_grows_and_shrinks_at_once_and_publishes_its_capacity() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let id = daemon.create("vm1", 4 * MIB, 16 * MIB);
    let mut client = daemon.client();
    let answer = client.ok("device.resize", resize("vm1", 8 * MIB));
    assert_eq!((&answer["from_bytes"], &answer["to_bytes"]), (&json!(4 * MIB), &json!(8 * MIB)));
    assert_eq!(ended(&mut client, &answer["job"]["id"])["state"], "done");
    let answer = client.ok("device.resize", resize("vm1", 2 * MIB));
    assert_eq!(ended(&mut client, &answer["job"]["id"])["state"], "done");
    let info = client.ok("device.show", by_name("vm1"));
    for key in ["capacity_bytes", "plugged_bytes", "requested_bytes"] {
        assert_eq!(info[key], 2 * MIB, "{key}");
    }
    let capacities: Vec<Asked> =
        daemon.asked().into_iter().filter(|asked| matches!(asked, Asked::Capacity(..))).collect();
    assert_eq!(capacities, [Asked::Capacity(id.0, 8 * MIB), Asked::Capacity(id.0, 2 * MIB)]);
    let evicted = client.ok("device.evicted", by_name("vm1"));
    assert_eq!(evicted["ranges"], json!([{ "start": 32, "count": 224 }]));
}

#[test]
fn data_at_the_end_is_dropped_only_by_force() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    daemon.create("vm1", 4 * MIB, 4 * MIB);
    write_block(&daemon, "vm1", 40);
    let mut client = daemon.client();
    let (code, error) = client.err("device.resize", resize("vm1", 2 * MIB));
    assert_eq!(code, "E_IN_USE");
    assert_eq!(error["data"]["detail"]["last_allocated_bytes"], 41 * BLOCK);
    assert!(error["data"]["hint"].is_string());
    let answer = client.ok("device.resize", resize("vm1", 41 * BLOCK));
    assert_eq!(ended(&mut client, &answer["job"]["id"])["state"], "done");
    let forced = json!({ "name": "vm1", "size_bytes": 2 * MIB, "force": true });
    let answer = client.ok("device.resize", forced);
    assert!(answer["plan"].as_str().unwrap().contains("lost"), "{answer}");
    assert_eq!(ended(&mut client, &answer["job"]["id"])["state"], "done");
    client.ok("events.subscribe", json!({ "since_seq": 0, "filter": ["shrink.forced"] }));
    let event = client.events_until("shrink.forced").pop().unwrap();
    assert_eq!((&event["data"]["blocks"], &event["data"]["lost_bytes"]), (&json!(9), &json!(BLOCK)));
}

#[test]
fn dry_run_of_a_resize_changes_nothing_and_tells_the_plan() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    daemon.create("vm1", 4 * MIB, 8 * MIB);
    let mut client = daemon.client();
    let before = client.ok("device.show", by_name("vm1"));
    let answer =
        client.ok("device.resize", json!({ "name": "vm1", "size_bytes": 5 * MIB - 3, "dry_run": true }));
    assert!(answer.get("job").is_none());
    assert_eq!(answer["to_bytes"], 5 * MIB);
    assert!(answer["plan"].as_str().unwrap().contains("rounded up"), "{answer}");
    assert_eq!(client.ok("device.show", by_name("vm1")), before);
}

/// protocol.md: V-24, V-26, V-27.
#[test]
fn guest_is_asked_gives_blocks_of_its_choice_and_the_job_is_done() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let id = daemon.create("vm1", 4 * MIB, 8 * MIB);
    write_block(&daemon, "vm1", 3);
    let mut guest = Guest::boot(&daemon, id);
    let epoch = guest.hello();
    let wait = guest.send(Request::Wait { epoch, seq_seen: 1 });
    let mut client = daemon.client();
    let mut watcher = daemon.watcher();
    watcher.ok("events.subscribe", json!({ "filter": ["shrink.", "grow."] }));

    let answer = client.ok("device.resize", resize("vm1", 2 * MIB));

    let news = guest.answer(wait).unwrap();
    assert_eq!((news.sizes.requested_blocks, news.sizes.plugged_blocks), (32, 64));
    let ResponseBody::Wait { flags, reason, .. } = news.body else { panic!("{news:?}") };
    assert_eq!((flags, reason), (guest::NEWS_TARGET, Reason::Operator));
    let ranges = vec![
        BlockRange::new(0, 8),
        BlockRange::new(60, 10),
        BlockRange::new(500, 1),
        BlockRange::new(40, 24),
    ];
    let given = guest.call(Request::Unplug { epoch, ranges });
    assert_eq!(
        given.body,
        ResponseBody::Ranges(vec![RangeStatus::Ok, RangeStatus::Ok, RangeStatus::Range, RangeStatus::Ok])
    );
    assert_eq!(given.sizes.plugged_blocks, 32);
    let job = ended(&mut client, &answer["job"]["id"]);
    assert_eq!((&job["state"], &job["plugged_bytes"]), (&json!("done"), &json!(2 * MIB)));
    assert_eq!(job["requested_by_pid"], std::process::id());
    let events = watcher.events_until("shrink.done");
    assert_eq!(events[0]["event"], "shrink.requested");
    assert_eq!(events[0]["job"], answer["job"]["id"]);
    let evicted = client.ok("device.evicted", by_name("vm1"))["ranges"].take();
    assert_eq!(evicted, json!([{ "start": 0, "count": 8 }, { "start": 40, "count": 88 }]));
    let info = client.ok("device.show", by_name("vm1"));
    assert_eq!((&info["driver"]["kind"], &info["driver"]["name"]), (&json!("vssd"), &json!("vssd test")));
    assert_eq!(info["allocated_bytes"], 0, "the block with data went");

    let again = guest.call(Request::Unplug { epoch, ranges: vec![BlockRange::new(0, 8)] });
    assert_eq!(again.body, ResponseBody::Ranges(vec![RangeStatus::Already]));
    client.ok("device.resize", resize("vm1", 3 * MIB));
    let back =
        guest.call(Request::Plug { epoch, ranges: vec![BlockRange::new(0, 8), BlockRange::new(100, 9)] });
    assert_eq!(back.body, ResponseBody::Ranges(vec![RangeStatus::Ok, RangeStatus::Limit]));
}

/// protocol.md: V-18.
/// protocol.md: V-1, V-17.
#[test]
fn driver_is_told_how_many_ranges_a_message_may_have_and_one_with_more_changes_nothing() {
    let disks = Disks::new(64);
    let daemon = Daemon::with_max_ranges(disks.open(), &disks, 2);
    let id = daemon.create("vm1", 4 * MIB, 8 * MIB);
    let mut guest = Guest::boot(&daemon, id);
    let hello = guest.call(Request::Hello { version: 1, features: 0, driver: "test".into() });
    let ResponseBody::Hello(hello) = hello.body else { panic!("{hello:?}") };
    assert_eq!(hello.max_ranges, 2);
    let unplug = |blocks: u32| Request::Unplug {
        epoch: hello.epoch,
        ranges: (0..blocks).map(|block| BlockRange::new(block, 1)).collect(),
    };

    let too_long = guest.send(unplug(3));
    assert!(guest.answer(too_long).is_none(), "IOERR");
    let given = guest.call(unplug(2));

    assert_eq!(given.body, ResponseBody::Ranges(vec![RangeStatus::Ok; 2]));
    assert_eq!(given.sizes.plugged_blocks, 62, "only those of the message that was answered");
}

#[test]
fn state_lists_what_is_plugged_as_far_as_the_buffer_goes() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let id = daemon.create("vm1", 4 * MIB, 4 * MIB);
    write_block(&daemon, "vm1", 5);
    let mut guest = Guest::boot(&daemon, id);
    let epoch = guest.hello();
    guest.call(Request::Unplug { epoch, ranges: vec![BlockRange::new(10, 1), BlockRange::new(20, 1)] });
    let mut page = |flags, start, ranges: usize| {
        let room = guest::min_response_len(guest::RequestType::State, 0) + ranges * 8 + 7;
        let ticket = guest.send_with_room(Request::State { epoch, flags, start }, room);
        match guest.answer(ticket).unwrap().body {
            ResponseBody::State { next, ranges } => (next, ranges),
            other => panic!("{other:?}"),
        }
    };
    let all = vec![BlockRange::new(0, 10), BlockRange::new(11, 9), BlockRange::new(21, 43)];
    assert_eq!(page(0, 0, 100), (64, all.clone()));
    let (next, first) = page(0, 0, 2);
    assert_eq!(first, all[..2]);
    assert_eq!(page(0, next, 2), (64, all[2..].to_vec()));
    assert_eq!(page(0, 64, 2), (64, vec![]));
    assert_eq!(page(0, 7, 0), (7, vec![]), "no room: no progress, and no lie");
    let (_, empty) = page(STATE_F_EMPTY, 0, 2);
    assert_eq!(empty, [BlockRange::new(0, 5), BlockRange::new(6, 4)]);
}

#[test]
fn minimum_holds_against_the_guest_and_limits_are_kept() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let id = daemon.create("vm1", 4 * MIB, 4 * MIB);
    let mut client = daemon.client();
    let limits = json!({ "name": "vm1", "min_bytes": 3 * MIB, "max_bytes": 6 * MIB, "pull": "grant", "deadline_ms": 7 });
    let info = client.ok("device.limits", limits);
    assert_eq!((&info["min_bytes"], &info["max_bytes"]), (&json!(3 * MIB), &json!(6 * MIB)));
    assert_eq!(info["policy"], json!({ "on_timeout": "wait", "deadline_ms": 7, "pull": "grant" }));
    client.fails_with(
        ErrorCode::InvalidParams,
        "device.limits",
        json!({ "name": "vm1", "min_bytes": 5 * MIB }),
    );
    client.fails_with(
        ErrorCode::InvalidParams,
        "device.limits",
        json!({ "name": "vm1", "max_bytes": 5 * MIB }),
    );
    client.fails_with(ErrorCode::BelowMin, "device.resize", resize("vm1", 3 * MIB - 1 - BLOCK));
    let mut guest = Guest::boot(&daemon, id);
    let epoch = guest.hello();
    let answer =
        guest.call(Request::Unplug { epoch, ranges: vec![BlockRange::new(0, 16), BlockRange::new(20, 1)] });
    assert_eq!(answer.body, ResponseBody::Ranges(vec![RangeStatus::Ok, RangeStatus::Protected]));

    guest.call(Request::Pull { epoch, want_blocks: 1000, urgency: Urgency::Critical });
    let info = client.ok("device.show", by_name("vm1"));
    assert_eq!(info["requested_bytes"], 6 * MIB, "granted up to the maximum");
}

/// protocol.md: C-5.
#[test]
fn of_two_operators_with_the_same_expectation_one_wins() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    daemon.create("vm1", 4 * MIB, 16 * MIB);
    for round in 0..20u64 {
        let now = daemon.client().ok("device.show", by_name("vm1"))["requested_bytes"].as_u64().unwrap();
        let outcomes: Vec<Value> = std::thread::scope(|scope| {
            let operators: Vec<_> = (1..=2)
                .map(|who| {
                    let mut client = daemon.client();
                    let to = (4 + (round + who) % 8) * MIB + who * BLOCK;
                    let params = json!({ "name": "vm1", "size_bytes": to, "expected_bytes": now });
                    scope.spawn(move || client.call("device.resize", params))
                })
                .collect();
            operators.into_iter().map(|operator| operator.join().unwrap()).collect()
        });
        let (won, lost): (Vec<_>, Vec<_>) =
            outcomes.iter().partition(|answer| answer.get("result").is_some());
        assert_eq!((won.len(), lost.len()), (1, 1), "{outcomes:?}");
        assert_eq!(lost[0]["error"]["data"]["code"], "E_CONFLICT");
        assert_eq!(lost[0]["error"]["data"]["detail"]["actual_bytes"], won[0]["result"]["to_bytes"]);
        ended(&mut daemon.client(), &won[0]["result"]["job"]["id"]);
    }
}

#[test]
fn job_wait_is_answered_by_change_or_time_and_cancel_withdraws() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let id = daemon.create("vm1", 4 * MIB, 4 * MIB);
    let mut guest = Guest::boot(&daemon, id);
    guest.hello();
    let mut client = daemon.client();
    let job = client.ok("device.resize", resize("vm1", 2 * MIB))["job"]["id"].clone();
    let start = Instant::now();
    let info = client.ok("job.wait", json!({ "id": job, "timeout_ms": 150 }));
    assert!(start.elapsed() >= Duration::from_millis(150), "nothing changed in that time");
    assert_eq!(info["state"], "created");
    let mut waiters: Vec<Client> = (0..10).map(|_| daemon.watcher()).collect();
    for waiter in &mut waiters {
        waiter.request("job.wait", json!({ "id": job, "timeout_ms": 60_000 }));
    }
    // Once its answer is here, the waiters' requests, sent before, are with the daemon as well.
    for waiter in &mut waiters {
        waiter.request("job.show", json!({ "id": job }));
        assert_eq!(waiter.read().unwrap()["id"], 2);
    }
    let cancelled = client.ok("job.cancel", json!({ "id": job }));
    assert_eq!(cancelled["state"], "cancelled");
    for waiter in &mut waiters {
        assert_eq!(waiter.read().unwrap()["result"]["state"], "cancelled");
    }
    assert_eq!(client.ok("device.show", by_name("vm1"))["requested_bytes"], 4 * MIB);
    client.fails_with(ErrorCode::Conflict, "job.cancel", json!({ "id": job }));
}

#[test]
fn pending_target_is_resumed_as_a_job_after_a_restart() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let id = daemon.create("vm1", 4 * MIB, 4 * MIB);
    let mut guest = Guest::boot(&daemon, id);
    let epoch = guest.hello();
    daemon.client().ok("device.resize", resize("vm1", 2 * MIB));
    guest.call(Request::Unplug { epoch, ranges: vec![BlockRange::new(0, 4)] });
    daemon.stop().unwrap();

    let daemon = Daemon::start(&disks);
    let mut client = daemon.client();
    let jobs = client.ok("job.list", json!({}))["jobs"].take();
    assert_eq!(
        (&jobs[0]["message"], &jobs[0]["target_bytes"]),
        (&json!("resumed after restart"), &json!(2 * MIB))
    );
    assert_eq!(jobs[0]["from_bytes"], 4 * MIB - 4 * BLOCK);
    let mut guest = Guest::boot(&daemon, id);
    let stale = guest.call(Request::Wait { epoch, seq_seen: 1 });
    assert_eq!(stale.result, RequestResult::Stale, "an epoch does not outlive the daemon");
    let epoch = guest.hello();
    guest.call(Request::Unplug { epoch, ranges: vec![BlockRange::new(4, 28)] });
    assert_eq!(ended(&mut client, &jobs[0]["id"])["state"], "done");
}

#[test]
fn deadline_of_a_resize_outlives_the_daemon() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let id = daemon.create("vm1", 4 * MIB, 4 * MIB);
    let mut guest = Guest::boot(&daemon, id);
    guest.hello();
    let timed = json!({ "name": "vm1", "size_bytes": 2 * MIB, "deadline_ms": 300_000, "on_timeout": "fail" });
    daemon.client().ok("device.resize", timed.clone());
    daemon.stop().unwrap();

    let daemon = Daemon::start(&disks);
    let mut client = daemon.client();
    let job = client.ok("job.list", json!({}))["jobs"][0].take();
    let left = job["deadline_ms"].as_u64().unwrap();
    assert!((200_000..=300_000).contains(&left), "{left} ms are left");
    let mut guest = Guest::boot(&daemon, id);
    guest.hello();
    let mut timed = timed;
    timed["on_timeout"] = json!("wait");
    client.ok("device.resize", timed);
    daemon.stop().unwrap();

    let daemon = Daemon::start(&disks);
    let mut client = daemon.client();
    let job = client.ok("job.list", json!({}))["jobs"][0].take();
    let mut guest = Guest::boot(&daemon, id);
    let epoch = guest.hello();
    let seq = guest.call(Request::State { epoch, flags: 0, start: 0 }).sizes.seq;
    let reason = vssd_protocol::guest::DeclineReason::Busy;
    guest.call(Request::Decline { epoch, seq, could_give: 0, reason });
    let now = client.ok("job.show", json!({ "id": job["id"] }));
    assert_eq!(now["error"], Value::Null, "a decline before the deadline ends nothing: {now}");
    guest.call(Request::Unplug { epoch, ranges: vec![BlockRange::new(0, 32)] });
    assert_eq!(ended(&mut client, &job["id"])["state"], "done");
}

/// protocol.md: C-10.
#[test]
fn force_is_stored_with_the_target_it_is_for() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let id = daemon.create("vm1", 4 * MIB, 4 * MIB);
    let stored = |daemon: &Daemon| daemon.pool.vssd(id).unwrap().attrs().policy;
    assert!(!stored(&daemon).contains("deadline\":{"), "{}", stored(&daemon));
    let mut client = daemon.client();
    let forced = json!({ "name": "vm1", "size_bytes": 2 * MIB, "force": true });
    client.ok("device.resize", forced);
    let policy: Value = serde_json::from_str(&stored(&daemon)).unwrap();
    assert_eq!(policy["deadline"]["on_timeout"], "force", "{policy}");
    for (bytes, what) in [(2 * MIB, "the same wish without force"), (4 * MIB, "a grow")] {
        client.ok("device.resize", resize("vm1", bytes));
        let policy: Value = serde_json::from_str(&stored(&daemon)).unwrap();
        assert_eq!(policy["deadline"], Value::Null, "{what} forces nothing: {policy}");
    }
}

/// protocol.md: V-22.
#[test]
fn stopping_queue_is_told_when_nothing_is_parked_any_more() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let device = daemon.create("vm1", MIB, MIB);
    let mut guest = Guest::boot(&daemon, device);
    let epoch = guest.hello();
    let wait = guest.send(Request::Wait { epoch, seq_seen: 1 });
    let (done, stopped) = mpsc::channel();
    daemon.owner.send(DeviceEvent::Quiesce { device, done });
    stopped.recv_timeout(Duration::from_secs(10)).unwrap();
    assert!(guest.is_answered(wait), "answered before, not after");
    assert_eq!(guest.answer(wait).unwrap().result, RequestResult::NoNews);
}

/// protocol.md: C-8.
#[test]
fn slow_reader_loses_events_and_holds_up_nobody() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    daemon.create("vm1", 4 * MIB, 8 * MIB);
    let mut slow = daemon.client();
    slow.ok("events.subscribe", json!({ "filter": ["device.limits"] }));
    let mut client = daemon.client();
    let limits = json!({ "name": "vm1", "deadline_ms": 5 });
    for _ in 0..9000 {
        client.ok("device.limits", limits.clone());
    }
    client.ok("device.delete", by_name("vm1"));
    let (mut seen, mut lost, mut last) = (0, 0, 0);
    while seen + lost < 9000 {
        let line = slow.read().expect("still connected");
        let event = &line["params"];
        let seq = event["seq"].as_u64().unwrap();
        assert!(seq > last, "in order");
        last = seq;
        if event["event"] == "events.lost" {
            lost += event["data"]["n"].as_u64().unwrap();
        } else {
            seen += 1;
        }
    }
    assert!(lost > 0 && seen >= 4096, "lost {lost}, seen {seen}");
    assert_eq!(seen + lost, 9000, "every event was seen or counted");
}

#[test]
fn clients_that_stall_or_flood_hold_up_nobody() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let mut half_open: Vec<Client> = (0..100).map(|_| daemon.client()).collect();
    for client in &mut half_open {
        client.stream.write_all(b"{\"jsonrpc\":\"2.0\",").unwrap();
    }
    // Asks and asks and never reads an answer.
    let mut flood = daemon.client();
    flood.stream.set_nonblocking(true).unwrap();
    let line = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"pool.status\"}\n".repeat(1000);
    let mut taken = 0usize;
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        match flood.stream.write(&line) {
            Ok(n) => taken += n,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    assert!(taken < 8 << 20, "the daemon took {taken} bytes of requests whose answers nobody reads");
    let start = Instant::now();
    daemon.client().ok("device.list", json!({}));
    assert!(start.elapsed() < Duration::from_secs(5));
    half_open[7].send_line(b"\"id\":3,\"method\":\"device.list\"}");
    assert_eq!(half_open[7].read().unwrap()["id"], 3, "a line may take its time");
}

/// protocol.md: C-1.
#[test]
fn oversize_line_is_refused_and_ends_the_connection() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let mut client = daemon.client();
    let _ = client.stream.write_all(&vec![b'x'; MAX_LINE + 1]);
    let answer = client.read().unwrap();
    assert_eq!(answer["error"]["data"]["code"], "E_TOO_LARGE");
    let mut rest = Vec::new();
    // The end may come as a reset, for the daemon does not read what it refuses.
    let _ = client.stream.read_to_end(&mut rest);
    assert!(rest.is_empty());
    daemon.client().ok("device.list", json!({}));
}

/// A generator whose seed is shown when a test fails; set `VSSD_SEED` to replay.
fn seeded() -> StdRng {
    let seed = std::env::var("VSSD_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| rand::rngs::OsRng.try_next_u64().unwrap());
    println!("VSSD_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

#[test]
fn damaged_requests_never_silence_the_daemon() {
    const SPICE: &[u8] = b"\"{}[]:,0-9e\\u";
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    daemon.create("vm1", MIB, 2 * MIB);
    let mut rng = seeded();
    let good: Vec<String> = [
        ("server.hello", json!({ "client": "x" })),
        ("device.show", by_name("vm1")),
        (
            "device.create",
            json!({ "name": "vm2", "size_bytes": MIB, "policy": { "pull": "grant" }, "dry_run": true }),
        ),
        ("device.resize", json!({ "name": "vm1", "size_bytes": MIB, "expected_bytes": 1, "force": false })),
        ("job.wait", json!({ "id": 1, "timeout_ms": 1 })),
        ("job.cancel", json!({ "id": 1 })),
    ]
    .into_iter()
    .map(|(method, params)| {
        json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params }).to_string()
    })
    .collect();
    let mut client = daemon.client();
    for _ in 0..3000 {
        let mut line = good[rng.random_range(0..good.len())].clone().into_bytes();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..line.len());
            match rng.random_range(0..3) {
                0 => line[at] = rng.random(),
                1 => drop(line.remove(at)),
                _ => line.insert(at, SPICE[rng.random_range(0..SPICE.len())]),
            }
        }
        line.retain(|byte| *byte != b'\n');
        client.send_line(&line);
        let answer = client.read().expect("an answer to every line");
        assert_eq!(answer["jsonrpc"], "2.0");
        assert!(answer.get("result").is_some() != answer.get("error").is_some(), "{answer}");
    }
    assert_eq!(client.ok("device.list", json!({}))["devices"].as_array().unwrap().len(), 1);
}

/// A guest, an operator and the pool at once: in the end all three name the same blocks.
#[test]
fn random_guest_and_operators_agree_with_the_pool() {
    const TOTAL: u32 = 256;
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let id = daemon.create("vm1", 8 * MIB, u64::from(TOTAL) * BLOCK);
    let mut guest = Guest::boot(&daemon, id);
    let mut epoch = guest.hello();
    let mut client = daemon.client();
    let mut plugged: BTreeSet<u32> = (0..128).collect();
    let mut rng = seeded();
    for step in 0..600 {
        let range = BlockRange::new(rng.random_range(0..TOTAL + 3), rng.random_range(0..40));
        let ranges = vec![range, BlockRange::new(rng.random_range(0..TOTAL), 1)];
        let blocks = |range: BlockRange| range.start..range.start + range.count;
        match rng.random_range(0..10) {
            0..4 => {
                let answer = guest.call(Request::Unplug { epoch, ranges: ranges.clone() });
                let ResponseBody::Ranges(statuses) = answer.body else { panic!("{answer:?}") };
                for (range, status) in ranges.into_iter().zip(statuses) {
                    match status {
                        RangeStatus::Ok => plugged.retain(|block| !blocks(range).contains(block)),
                        RangeStatus::Already => assert!(blocks(range).all(|block| !plugged.contains(&block))),
                        RangeStatus::Range => assert!(!range.is_within(TOTAL)),
                        RangeStatus::Protected => assert!(plugged.iter().all(|b| blocks(range).contains(b))),
                        other => panic!("{other:?}"),
                    }
                }
                assert_eq!(answer.sizes.plugged_blocks as usize, plugged.len());
            }
            4..8 => {
                let answer = guest.call(Request::Plug { epoch, ranges: ranges.clone() });
                let ResponseBody::Ranges(statuses) = answer.body else { panic!("{answer:?}") };
                let requested = answer.sizes.requested_blocks as usize;
                for (range, status) in ranges.into_iter().zip(statuses) {
                    match status {
                        RangeStatus::Ok => {
                            plugged.extend(blocks(range));
                            assert!(plugged.len() <= requested, "{} of {requested}", plugged.len());
                        }
                        RangeStatus::Already => assert!(blocks(range).all(|block| plugged.contains(&block))),
                        RangeStatus::Range => assert!(!range.is_within(TOTAL)),
                        RangeStatus::Limit => {}
                        other => panic!("{other:?}"),
                    }
                }
                assert_eq!(answer.sizes.plugged_blocks as usize, plugged.len());
            }
            8 => drop(
                client.call("device.resize", resize("vm1", rng.random_range(1..=u64::from(TOTAL)) * BLOCK)),
            ),
            _ if step % 3 == 0 => epoch = guest.hello(),
            _ => write_block(&daemon, "vm1", u64::from(*plugged.first().expect("never empty"))),
        }
    }
    let room = guest::min_response_len(guest::RequestType::State, 0) + 8 * TOTAL as usize;
    let ticket = guest.send_with_room(Request::State { epoch, flags: 0, start: 0 }, room);
    let answer = guest.answer(ticket).unwrap();
    let ResponseBody::State { next, ranges } = answer.body else { panic!("{answer:?}") };
    let listed: BTreeSet<u32> =
        ranges.into_iter().flat_map(|range| range.start..range.start + range.count).collect();
    assert_eq!((next, &listed), (TOTAL, &plugged), "what the guest was told and what STATE says");
    let evicted: Vec<BlockRange> =
        serde_json::from_value(client.ok("device.evicted", by_name("vm1"))["ranges"].take()).unwrap();
    let evicted: BTreeSet<u32> =
        evicted.into_iter().flat_map(|range| range.start..range.start + range.count).collect();
    assert_eq!(evicted, (0..TOTAL).filter(|block| !plugged.contains(block)).collect(), "what operators see");
}

#[test]
fn one_client_too_many_is_told_so() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let mut clients: Vec<Client> = (0..MAX_SESSIONS).map(|_| daemon.client()).collect();
    // The last one is served, so all are known.
    clients.last_mut().unwrap().ok("device.list", json!({}));
    daemon.watcher().ok("device.list", json!({}));
    let mut extra = daemon.client();
    assert_eq!(extra.read().unwrap()["error"]["data"]["code"], "E_TOO_LARGE");
    assert!(extra.read().is_none(), "and the connection ends");
    clients.pop();
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        // One too many is sent away before it has asked: then asking fails, or the answer is lost.
        let mut client = daemon.client();
        let mut answer = String::new();
        let asked =
            client.stream.write_all(br#"{"jsonrpc":"2.0","id":1,"method":"device.list","params":{}}"#);
        let asked = asked.and_then(|()| client.stream.write_all(b"\n"));
        if asked.and_then(|()| client.reader.read_line(&mut answer)).is_ok() && answer.contains("\"result\"")
        {
            break;
        }
        assert!(Instant::now() < end, "the place was not given free: {answer}");
    }
}

#[test]
fn half_closed_client_gets_all_its_answers_then_the_end() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let mut client = daemon.client();
    for _ in 0..100 {
        client.request("device.list", json!({}));
    }
    client.stream.shutdown(Shutdown::Write).unwrap();
    for id in 1..=100 {
        assert_eq!(client.read().unwrap()["id"], id);
    }
    assert!(client.read().is_none());
}

#[test]
fn shutdown_closes_every_front_end_and_answers_what_is_parked() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    let first = daemon.create("vm1", MIB, MIB);
    daemon.create("vm2", MIB, MIB);
    let mut guest = Guest::boot(&daemon, first);
    let epoch = guest.hello();
    let wait = guest.send(Request::Wait { epoch, seq_seen: 1 });
    let recorded = std::sync::Arc::clone(&daemon.recorded);
    daemon.stop().unwrap();
    assert_eq!(guest.answer(wait).unwrap().result, RequestResult::NoNews);
    let closed =
        recorded.lock().unwrap().asked.iter().filter(|asked| matches!(asked, Asked::Close(_))).count();
    assert_eq!(closed, 2);
}

#[test]
fn idle_daemon_is_never_woken() {
    let disks = Disks::new(64);
    let daemon = Daemon::start(&disks);
    daemon.create("vm1", MIB, MIB);
    let mut subscriber = daemon.client();
    subscriber.ok("events.subscribe", json!({}));
    let wake_ups = || {
        let path = format!("/proc/self/task/{}/status", daemon.thread_id.as_raw_nonzero());
        let status = std::fs::read_to_string(path).unwrap();
        let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    // The last look at the pool's space comes a second after the last change; a busy machine may delay it.
    let sleeps = |_| {
        let before = wake_ups();
        std::thread::sleep(Duration::from_secs(2));
        wake_ups() == before
    };
    assert!((0..5).any(sleeps), "woken again and again with nothing to do");
}
