// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The ready-made server and clients that mean harm, or know no better.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod lamp;

use std::io::Write;
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use control_server::Door::{self, Control, Monitor};
use control_server::blocking::MAX_CLIENTS;
use control_server::events::KEPT;
use lamp::{Client, Daemon, LONG};
use serde_json::{Value, json};

/// Connects until the daemon has room, which it has once it notices who has gone.
fn client_once_there_is_room(daemon: &Daemon, door: Door) -> Client {
    let give_up = Instant::now() + LONG;
    loop {
        let mut client = daemon.client(door);
        let line = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"lamp.show\"}\n";
        // Where there is no room, it may have hung up already.
        let said = client.stream.write_all(line);
        if said.is_ok() && client.hear().is_some_and(|answer| answer["result"].is_object()) {
            return client;
        }
        assert!(Instant::now() < give_up, "no room");
        thread::sleep(Duration::from_millis(5));
    }
}

fn code(answer: &Value) -> &Value {
    &answer["error"]["data"]["code"]
}

#[test]
fn line_without_end_ends_the_connection_at_the_limit_of_its_door() {
    let daemon = Daemon::start();
    for door in [Control, Monitor] {
        let mut client = daemon.client(door);
        client.say(&vec![b'x'; door.max_line() - 1]);
        client.say(b"x");
        let answer = client.hear().unwrap();
        assert_eq!(code(&answer), "E_TOO_LARGE");
        assert_eq!(answer["error"]["message"], format!("a line has at most {} bytes", door.max_line()));
        assert!(client.hear().is_none());
        // One that goes on is not listened to.
        let mut client = daemon.client(door);
        let endless = (0..1000).all(|_| client.stream.write_all(&vec![b' '; door.max_line() / 4]).is_ok());
        assert!(!endless);
    }
    let mut longest = vec![b' '; Monitor.max_line()];
    longest[Monitor.max_line() - 1] = b'\n';
    let mut client = daemon.client(Monitor);
    client.say(&longest);
    assert_eq!(code(&client.hear().unwrap()), "E_PARSE", "the longest line is read");
    longest.insert(0, b' ');
    client.say(&longest);
    assert_eq!(code(&client.hear().unwrap()), "E_TOO_LARGE");
}

#[test]
fn half_a_line_and_a_hang_up_leave_nothing_behind() {
    let daemon = Daemon::start();
    for at in 0..2 * MAX_CLIENTS {
        let mut client = client_once_there_is_room(&daemon, Control);
        client.say(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"lamp.switch\"");
        if at % 2 == 0 {
            client.stream.shutdown(Shutdown::Write).unwrap();
            assert!(client.rest().is_empty());
        }
    }
    assert_eq!(daemon.lamp.newest(), 0, "half a request is none");
    // All seats are free again.
    let _all: Vec<Client> = (0..MAX_CLIENTS).map(|_| client_once_there_is_room(&daemon, Control)).collect();
}

#[test]
fn watchers_without_number_do_not_keep_operators_out() {
    let daemon = Daemon::start();
    let mut watchers: Vec<Client> = (0..MAX_CLIENTS).map(|_| daemon.client(Monitor)).collect();
    for watcher in &mut watchers {
        assert!(watcher.call("lamp.show")["result"].is_object());
    }
    let mut refused = daemon.client(Monitor);
    let answer = refused.hear().unwrap();
    assert_eq!((code(&answer), &answer["id"]), (&json!("E_TOO_LARGE"), &Value::Null));
    assert!(refused.hear().is_none());
    assert_eq!(daemon.client(Control).call("lamp.switch")["result"], json!({}));
    watchers.pop();
    client_once_there_is_room(&daemon, Monitor);
}

#[test]
fn subscriber_that_does_not_read_loses_events_and_holds_nobody_up() {
    let daemon = Daemon::start();
    let (mut slow, mut quick) = (daemon.client(Monitor), daemon.client(Control));
    slow.subscribe(&json!({}));
    quick.subscribe(&json!({}));
    let told = 8 * KEPT;
    // The quick one keeps up; what the slow one's socket takes is all that it has.
    for at in 0..told {
        daemon.lamp.tell(1);
        assert_eq!(quick.event().1, at as u64 + 1);
    }
    let (mut got, mut lost, mut last) = (0, 0, 0);
    while last < told as u64 {
        let event = slow.hear().unwrap();
        let params = &event["params"];
        let seq = params["seq"].as_u64().unwrap();
        if params["event"] == "events.lost" {
            lost += params["data"]["n"].as_u64().unwrap();
        } else {
            assert!(seq > last, "in order");
            got += 1;
        }
        last = seq;
    }
    assert_eq!(got + lost, told as u64, "each is sent or counted");
    assert!(lost > 0);
}

#[test]
fn client_that_does_not_read_its_answers_is_not_listened_to() {
    let daemon = Daemon::start();
    let mut client = daemon.client(Control);
    let asked = 500;
    // At once: a socket has room for few small pieces.
    let line = "{\"jsonrpc\":\"2.0\",\"id\":\"lamp.big\",\"method\":\"lamp.big\"}\n";
    client.say(line.repeat(asked).as_bytes());
    let settled = || {
        let calls = daemon.lamp.calls.load(Ordering::Relaxed);
        thread::sleep(Duration::from_millis(100));
        (calls == daemon.lamp.calls.load(Ordering::Relaxed) && calls > 0).then_some(calls)
    };
    let calls = (0..100).find_map(|_| settled()).unwrap();
    // 256 KiB wait and the socket holds about as much again; the rest is not even read.
    assert!(calls < 20, "{calls}");
    for _ in 0..asked {
        assert_eq!(client.hear().unwrap()["id"], "lamp.big");
    }
}

#[test]
fn what_is_no_request_is_answered_and_the_next_one_served() {
    let daemon = Daemon::start();
    let mut client = daemon.client(Monitor);
    let long_id = format!(r#"{{"jsonrpc":"2.0","id":"{}","method":"lamp.show"}}"#, "i".repeat(60_000));
    let deep = "[".repeat(60_000);
    for (line, expected) in [
        (&b""[..], "E_PARSE"),
        (b"GET / HTTP/1.1\r", "E_PARSE"),
        (b"\x00\x01\x02", "E_PARSE"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\xff\xfe\"}", "E_PARSE"),
        (deep.as_bytes(), "E_PARSE"),
        (b"[{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"lamp.show\"}]", "E_INVALID_REQUEST"),
        (long_id.as_bytes(), "E_INVALID_REQUEST"),
        (b"{\"jsonrpc\":\"2.0\",\"method\":\"lamp.show\"}", "E_INVALID_REQUEST"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"lamp.show\",\"params\":7}", "E_INVALID_PARAMS"),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"events.subscribe\",\"params\":{\"x\":1}}",
            "E_INVALID_PARAMS",
        ),
    ] {
        client.say(line);
        client.say(b"\n");
        let answer = client.hear().unwrap();
        assert_eq!(code(&answer), expected, "{:?}", String::from_utf8_lossy(&line[..line.len().min(60)]));
    }
    client.ask("events.subscribe", &json!({ "filter": vec!["a"; 33] }));
    assert_eq!(code(&client.hear().unwrap()), "E_TOO_LARGE");
    assert!(client.call("lamp.show")["result"].is_object());
}

#[test]
fn requests_that_come_byte_by_byte_are_requests() {
    let daemon = Daemon::start();
    let mut client = daemon.client(Control);
    for byte in b"{\"jsonrpc\":\"2.0\",\"id\":null,\"method\":\"m\"}\n{\"jsonrpc\":\"2.0\",\"id\":3,\"method\":\"lamp.show\"}\n" {
        client.say(&[*byte]);
    }
    assert_eq!(code(&client.hear().unwrap()), "E_INVALID_REQUEST");
    assert_eq!(client.hear().unwrap()["id"], 3);
}
