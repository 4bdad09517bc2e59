// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `pool status` and `events`.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::fixtures::{pool, with};
use crate::peer::{Peer, Reply, Step, command, ctl, ok, refuse, run, step, wait};

#[test]
fn pool_status_shows_the_pool_and_its_media() {
    let steps = || vec![ok("pool.status", json!({}), pool())];
    assert_eq!(
        ctl(steps(), &["pool", "status"]).printed(),
        "\
POOL   MEDIA      SIZE   ALLOCATED  PROMISED  AVAILABLE  FREE       SCRUBBING  OVERCOMMIT  VSSDS  HEALTH
fast0  nvram+ssd  1 TiB  611 GiB    1.4 TiB   82 GiB     412.5 GiB  512 MiB    150 %       3      ok

MEDIUM  SIZE     WRITTEN  PERSISTENCE  PATH
nvram   64 GiB   5 GiB    map-sync     /dev/pmem0
ssd     960 GiB  7 GiB    direct       /dev/nvme0n1
"
    );
    assert_eq!(
        ctl(steps(), &["pool", "status", "--json"]).json(),
        json!({"schema": "vssd.v1", "pool": pool()})
    );
}

fn event(seq: u64, name: &str) -> Value {
    json!({
        "seq": seq, "time": "2026-11-21T06:40:56.120Z", "event": name, "device": "vm2-db", "job": 41,
        "data": {"reason": "guest-busy", "freeable_bytes": 7_516_192_768u64}
    })
}

fn created(seq: u64) -> Value {
    json!({"seq": seq, "time": "2026-11-21T06:40:55.000Z", "event": "device.created", "device": "vm2-db"})
}

/// All that is kept, unfiltered: three events.
fn backlog() -> Vec<Step> {
    let events = vec![created(1880), event(1881, "shrink.refused"), event(1882, "guest.pull")];
    let params = json!({"filter": [], "since_seq": 0});
    vec![step("events.subscribe", params, Reply::Events(json!({"seq": 1882}), events))]
}

#[test]
fn events_prints_what_is_kept_and_ends() {
    assert_eq!(
        ctl(backlog(), &["events"]).printed(),
        "\
2026-11-21T06:40:55.000Z    1880  device.created        vm2-db        -
2026-11-21T06:40:56.120Z    1881  shrink.refused        vm2-db        job 41    freeable=7 GiB, reason=guest-busy
2026-11-21T06:40:56.120Z    1882  guest.pull            vm2-db        job 41    freeable=7 GiB, reason=guest-busy
"
    );
}

#[test]
fn events_in_json_is_one_object_a_line_as_the_daemon_sent_it() {
    let text = ctl(backlog(), &["events", "--json"]).printed();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines, [created(1880), event(1881, "shrink.refused"), event(1882, "guest.pull")]);
}

#[test]
fn events_of_a_type_end_although_the_newest_is_of_another() {
    let text = ctl(backlog(), &["events", "--type", "shrink.", "device.", "--json"]).printed();
    let names: Vec<Value> =
        text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].clone()).collect();
    assert_eq!(names, ["device.created", "shrink.refused"]);
    assert_eq!(ctl(backlog(), &["events", "--type", "pool."]).printed(), "");
}

#[test]
fn events_since_the_newest_is_nothing() {
    let steps = vec![ok("events.subscribe", json!({"filter": [], "since_seq": 1882}), json!({"seq": 1882}))];
    assert_eq!(ctl(steps, &["events", "--since", "1882"]).printed(), "");
    let never = vec![ok("events.subscribe", json!({"filter": [], "since_seq": 0}), json!({"seq": 0}))];
    assert_eq!(ctl(never, &["events"]).printed(), "");
}

#[test]
fn events_since_a_number_of_an_older_daemon_are_all_that_is_kept() {
    let params = json!({"filter": [], "since_seq": 5000});
    let steps = vec![step(
        "events.subscribe",
        params,
        Reply::Events(json!({"seq": 2}), vec![created(1), created(2)]),
    )];
    assert_eq!(ctl(steps, &["events", "--since", "5000"]).printed().lines().count(), 2);
}

#[test]
fn lost_events_are_always_shown_and_do_not_end_the_output() {
    let lost =
        json!({"seq": 9999, "time": "2026-11-21T06:40:56.000Z", "event": "events.lost", "data": {"n": 5}});
    let events = vec![lost, event(1882, "guest.pull")];
    let params = json!({"filter": [], "since_seq": 0});
    let steps = vec![step("events.subscribe", params, Reply::Events(json!({"seq": 1882}), events))];
    assert_eq!(
        ctl(steps, &["events", "--type", "guest."]).printed(),
        "\
2026-11-21T06:40:56.000Z    9999  events.lost           -             -         n=5
2026-11-21T06:40:56.120Z    1882  guest.pull            vm2-db        job 41    freeable=7 GiB, reason=guest-busy
"
    );
}

#[test]
fn follow_lets_the_daemon_filter_and_goes_on_until_the_daemon_ends() {
    let late = vec![event(1883, "shrink.done"), event(1884, "shrink.done")];
    let text: String = late
        .iter()
        .map(|event| format!("{}\n", json!({"jsonrpc": "2.0", "method": "event", "params": event})))
        .collect();
    let answer = format!("{}\n{text}", json!({"jsonrpc": "2.0", "id": 1, "result": {"seq": 1882}}));
    let params = json!({"filter": ["shrink.", "grow."], "since_seq": null});
    let steps = vec![step("events.subscribe", params, Reply::RawThenClose(answer.into_bytes()))];
    let outcome = ctl(steps, &["events", "--follow", "--type", "shrink.,grow.", "--json"]);
    assert_eq!(outcome.code, 7);
    let lines: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines, late);
    let error: Value = serde_json::from_str(&outcome.stderr).unwrap();
    assert_eq!(error["error"]["code"], "E_UNREACHABLE");
}

#[test]
fn events_before_the_answer_are_kept() {
    // Nothing orders the first events after the answer to the subscription.
    let mut text = format!("{}\n", json!({"jsonrpc": "2.0", "method": "event", "params": created(1)}));
    text += &format!("{}\n", json!({"jsonrpc": "2.0", "method": "other", "params": {}}));
    text += &format!("{}\n", json!({"jsonrpc": "2.0", "id": 1, "result": {"seq": 1}}));
    let params = json!({"filter": [], "since_seq": 0});
    let steps = vec![step("events.subscribe", params, Reply::Raw(text.into_bytes()))];
    assert_eq!(ctl(steps, &["events", "--json"]).printed(), format!("{}\n", created(1)));
}

#[test]
fn reader_that_leaves_ends_the_stream_quietly() {
    let events = (1..=2000).map(|seq| event(seq, "shrink.progress")).collect();
    let params = json!({"filter": [], "since_seq": null});
    let peer = Peer::play(vec![step("events.subscribe", params, Reply::Events(json!({"seq": 0}), events))]);
    let mut command = command(&peer.socket());
    command.args(["events", "--follow"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut first = String::new();
    let mut reader = BufReader::with_capacity(64, child.stdout.take().unwrap());
    reader.read_line(&mut first).unwrap();
    assert!(first.starts_with("2026-11-21T06:40:56.120Z       1  shrink.progress"), "{first}");
    drop(reader);
    let outcome = wait(child);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    peer.finish();
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let peer = Peer::play(vec![ok("pool.status", json!({}), pool())]);
    let mut command = command(&peer.socket());
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    command.args(["pool", "status"]).stdin(Stdio::null()).stdout(full).stderr(Stdio::piped());
    let outcome = wait(command.spawn().unwrap());
    peer.finish();
    assert_eq!(outcome.code, 1);
    assert_eq!(outcome.stderr, "error[E_LOCAL]: standard output: No space left on device (os error 28)\n");
}

#[test]
fn socket_may_come_from_the_environment() {
    let peer = Peer::play(vec![refuse("pool.status", json!({}), "E_PERMISSION", "no", None)]);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_balloon-ctl"));
    command.env("BALLOON_CTL_SOCKET", peer.socket()).args(["pool", "status"]);
    assert_eq!(run(command).code, 8);
    peer.finish();
}

#[test]
fn socket_of_the_user_is_found_where_the_system_has_none() {
    let peer = Peer::play(vec![ok("pool.status", json!({}), pool())]);
    let runtime_dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(runtime_dir.path().join("vssd")).unwrap();
    std::os::unix::fs::symlink(peer.socket(), runtime_dir.path().join("vssd/control.sock")).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_balloon-ctl"));
    command
        .env("XDG_RUNTIME_DIR", runtime_dir.path())
        .env_remove("BALLOON_CTL_SOCKET")
        .args(["pool", "status"]);
    if std::path::Path::new("/run/vssd/control.sock").exists() {
        eprintln!("not tested: this system has a socket of its own");
        return;
    }
    assert_eq!(run(command).code, 0);
    peer.finish();
}

#[test]
fn pool_of_unknown_health_is_shown_as_it_is() {
    let steps = vec![ok("pool.status", json!({}), with(pool(), "health", json!("degraded")))];
    assert!(ctl(steps, &["pool", "status"]).printed().lines().nth(1).unwrap().ends_with("degraded"));
}
