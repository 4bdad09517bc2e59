// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The ready-made server over real sockets: calls, doors, events, and its end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod lamp;

use std::net::Shutdown;
use std::time::Duration;

use control_server::Door::{Control, Monitor};
use control_server::events::KEPT;
use lamp::{Client, Daemon, LONG};
use serde_json::json;

/// Far more than an end takes that waits for nobody.
const PROMPTLY: Duration = Duration::from_secs(2);

#[test]
fn calls_are_answered_in_order_with_who_asks_and_through_which_door() {
    let daemon = Daemon::start();
    let mut client = daemon.client(Control);
    client.ask("lamp.switch", &json!({}));
    client.ask("lamp.show", &json!({}));
    let uid = rustix::process::getuid().as_raw();
    assert_eq!(client.hear().unwrap(), json!({ "jsonrpc": "2.0", "id": "lamp.switch", "result": {} }));
    assert_eq!(client.hear().unwrap()["result"], json!({ "on": true, "door": "control", "uid": uid }));
    assert_eq!(daemon.client(Monitor).call("lamp.show")["result"]["door"], "monitor");
}

#[test]
fn monitor_serves_reads_only_and_unknown_is_unknown_everywhere() {
    let daemon = Daemon::start();
    let (mut control, mut monitor) = (daemon.client(Control), daemon.client(Monitor));
    assert_eq!(monitor.code("lamp.switch"), "E_PERMISSION");
    assert_eq!(monitor.code("lamp.explode"), "E_UNKNOWN_METHOD");
    assert_eq!(control.code("lamp.explode"), "E_UNKNOWN_METHOD");
    assert_eq!(monitor.call("lamp.show")["result"]["on"], false, "nothing was switched");
    control.ask("lamp.show", &json!({ "colour": "red" }));
    let error = &control.hear().unwrap()["error"];
    assert_eq!(error["message"], "unknown field \"colour\": this method takes no parameters");
}

#[test]
fn fault_of_the_service_reaches_the_client_whole() {
    let daemon = Daemon::start();
    daemon.lamp.let_go();
    let error = daemon.client(Control).call("lamp.wait")["error"].clone();
    let data = json!({ "code": "E_BUSY", "hint": "wait no more" });
    assert_eq!(error, json!({ "code": -32013, "message": "it took long", "data": data }));
}

#[test]
fn subscriber_gets_what_it_asked_for_after_the_answer() {
    let daemon = Daemon::start();
    daemon.lamp.tell(2);
    let (mut new, mut all, mut some) =
        (daemon.client(Control), daemon.client(Monitor), daemon.client(Control));
    assert_eq!(new.subscribe(&json!({}))["result"], json!({ "seq": 2 }));
    all.subscribe(&json!({ "since_seq": 0 }));
    some.subscribe(&json!({ "filter": ["power.", "water"], "since_seq": 1 }));
    daemon.lamp.tell(1);
    daemon.lamp.tell_other();
    assert_eq!(new.event(), ("lamp.switched".to_owned(), 3));
    assert_eq!([all.event().1, all.event().1, all.event().1, all.event().1], [1, 2, 3, 4]);
    assert_eq!(some.event(), ("power.lost".to_owned(), 4));
    // Of another run of the daemon: all follows it.
    let mut stale = daemon.client(Control);
    stale.subscribe(&json!({ "since_seq": 99 }));
    assert_eq!(stale.event().1, 1);
}

#[test]
fn subscriber_that_comes_too_late_is_told_what_it_missed() {
    let daemon = Daemon::start();
    daemon.lamp.tell(KEPT + 9);
    let mut client = daemon.client(Control);
    client.subscribe(&json!({ "since_seq": 4 }));
    let lost = client.hear().unwrap();
    assert_eq!((&lost["params"]["event"], &lost["params"]["data"]["n"]), (&json!("events.lost"), &json!(5)));
    for seq in 10..=KEPT as u64 + 9 {
        assert_eq!(client.event().1, seq);
    }
}

#[test]
fn events_and_calls_go_on_beside_a_call_that_blocks() {
    let daemon = Daemon::start();
    let (mut blocked, mut watcher) = (daemon.client(Control), daemon.client(Control));
    watcher.subscribe(&json!({}));
    blocked.subscribe(&json!({}));
    blocked.ask("lamp.wait", &json!({}));
    daemon.lamp.await_waiting(1);
    assert_eq!(daemon.client(Control).call("lamp.switch")["result"], json!({}));
    assert_eq!(watcher.event(), ("lamp.switched".to_owned(), 1));
    daemon.lamp.let_go();
    assert_eq!(blocked.hear().unwrap()["id"], "lamp.wait");
    assert_eq!(blocked.event().1, 1, "late, and not lost");
}

#[test]
fn half_closed_client_gets_its_answers() {
    let daemon = Daemon::start();
    let mut client = daemon.client(Control);
    client.ask("lamp.switch", &json!({}));
    client.ask("lamp.big", &json!({}));
    client.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.hear().unwrap()["id"], "lamp.switch");
    assert_eq!(client.hear().unwrap()["id"], "lamp.big");
    assert!(client.hear().is_none());
}

#[test]
fn end_of_the_daemon_ends_all_connections_promptly() {
    let mut daemon = Daemon::start();
    let mut clients: Vec<Client> = (0..20).map(|_| daemon.client(Control)).collect();
    clients.extend((0..20).map(|_| daemon.client(Monitor)));
    for client in &mut clients {
        client.subscribe(&json!({}));
    }
    // One that does not read, and one in the middle of a line.
    let mut deaf = daemon.client(Control);
    (0..20).for_each(|_| deaf.ask("lamp.big", &json!({})));
    daemon.client(Control).say(b"{\"jsonrpc\"");
    let took = daemon.end();
    assert!(took < PROMPTLY, "{took:?}");
    for mut client in clients {
        assert!(client.hear().is_none());
    }
    assert!(std::os::unix::net::UnixStream::connect(daemon.path(Control)).is_err());
}

#[test]
fn call_under_way_is_answered_at_the_end_and_no_other_begins() {
    let mut daemon = Daemon::start_with(LONG);
    let mut client = daemon.client(Control);
    client.ask("lamp.wait", &json!({}));
    client.ask("lamp.switch", &json!({}));
    daemon.lamp.await_waiting(1);
    daemon.begin_to_end();
    daemon.lamp.let_go();
    daemon.end();
    assert_eq!(client.hear().unwrap()["id"], "lamp.wait");
    assert!(client.hear().is_none());
    assert_eq!(daemon.lamp.newest(), 0, "it was not switched");
}

#[test]
fn patience_with_calls_that_do_not_end_has_a_limit() {
    let mut daemon = Daemon::start_with(Duration::from_millis(100));
    let mut client = daemon.client(Control);
    client.ask("lamp.wait", &json!({}));
    daemon.lamp.await_waiting(1);
    let took = daemon.end();
    assert!((Duration::from_millis(100)..PROMPTLY).contains(&took), "{took:?}");
}
