// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Every exit code, and peers that do not behave.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixtures::{GIB, job, pool, vm1};
use crate::peer::{Outcome, Peer, Reply, Step, command, ctl, ok, refuse, run, step};

fn asked(reply: Reply, args: &[&str]) -> Outcome {
    ctl(vec![step("pool.status", json!({}), reply)], &[&["pool", "status"], args].concat())
}

#[test]
fn each_exit_code_is_reached() {
    let refused = |code: &str| {
        ctl(vec![refuse("device.show", json!({"name": "vm1"}), code, "no", None)], &["show", "vm1"]).code
    };
    assert_eq!(ctl(vec![ok("pool.status", json!({}), pool())], &["pool", "status"]).code, 0);
    for (code, exit) in [
        ("E_INTERNAL", 1),
        ("E_EXISTS", 1),
        ("E_BUSY", 1),
        ("E_FROM_THE_FUTURE", 1),
        ("E_INVALID_PARAMS", 2),
        ("E_NOT_FOUND", 3),
        ("E_BELOW_MIN", 4),
        ("E_ABOVE_MAX", 4),
        ("E_GUEST_REFUSED", 4),
        ("E_NO_DRIVER", 4),
        ("E_IN_USE", 4),
        ("E_CONFLICT", 4),
        ("E_TIMED_OUT", 5),
        ("E_POOL_FULL", 6),
        ("E_PERMISSION", 8),
    ] {
        assert_eq!(refused(code), exit, "{code}");
    }
    assert_eq!(asked(Reply::RawThenClose(Vec::new()), &[]).code, 7);
}

#[test]
fn error_of_the_daemon_is_shown_with_code_and_hint() {
    let steps = || {
        vec![step(
            "device.resize",
            json!({
                "name": "vm1-data", "size_bytes": 2 * GIB, "expected_bytes": null, "deadline_ms": null,
                "on_timeout": null, "force": false, "dry_run": false
            }),
            Reply::Error(json!({
                "code": -32003, "message": "vm1-data cannot go to 2 GiB: minimum is 5 GiB",
                "data": {"code": "E_BELOW_MIN", "hint": "the largest shrink now is 7.6 GiB",
                         "detail": {"min_bytes": 5 * GIB}, "later": true}
            })),
        )]
    };
    let outcome = ctl(steps(), &["resize", "vm1-data", "2G"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (4, ""));
    assert_eq!(
        outcome.stderr,
        "error[E_BELOW_MIN]: vm1-data cannot go to 2 GiB: minimum is 5 GiB\nhint: the largest shrink now is 7.6 GiB\n"
    );
    let outcome = ctl(steps(), &["resize", "vm1-data", "2G", "--json"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (4, ""));
    assert_eq!(
        serde_json::from_str::<Value>(&outcome.stderr).unwrap(),
        json!({"schema": "vssd.v1", "error": {
            "code": "E_BELOW_MIN", "exit_code": 4, "rpc_code": -32003,
            "message": "vm1-data cannot go to 2 GiB: minimum is 5 GiB",
            "hint": "the largest shrink now is 7.6 GiB", "detail": {"min_bytes": 5 * GIB}
        }})
    );
}

#[test]
fn no_socket_and_nobody_listening_are_unreachable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    let list = || {
        let mut command = command(&path);
        command.arg("list");
        run(command)
    };
    let outcome = list();
    assert_eq!((outcome.code, outcome.stdout.as_str()), (7, ""));
    assert_eq!(
        outcome.stderr,
        format!(
            "error[E_UNREACHABLE]: cannot reach the daemon at {}: No such file or directory (os error 2)\n\
             hint: start vssd-backend, or name its control socket with --socket or BALLOON_CTL_SOCKET\n",
            path.display()
        )
    );
    drop(UnixListener::bind(&path).unwrap());
    let outcome = list();
    assert_eq!(outcome.code, 7);
    assert!(outcome.stderr.contains("nobody listens"), "{outcome:?}");
}

#[test]
fn peer_that_closes_is_unreachable_half_an_answer_or_none() {
    let half = br#"{"jsonrpc":"2.0","id":1,"result":{}}"#.to_vec();
    for bytes in [Vec::new(), half] {
        let outcome = asked(Reply::RawThenClose(bytes), &[]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (7, ""));
        assert!(
            outcome.stderr.contains("it closed the connection\nhint: it ended or was restarted"),
            "{outcome:?}"
        );
    }
}

#[test]
fn answers_that_make_no_sense_are_named() {
    for (bytes, complaint) in [
        (&b"garbage\x1b[2J\n"[..], "no JSON object: \"garbage\\u{1b}[2J\""),
        (b"\xff\xfe\n", "no JSON object"),
        (b"\n", "no JSON object: \"\""),
        (b"[]\n", "no JSON object: \"[]\""),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1}\n", "neither result nor error"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":2,\"result\":{}}\n", "it answers call 2 instead of 1"),
        (
            b"{\"jsonrpc\":\"2.0\",\"id\":2,\"error\":{\"code\":1,\"message\":\"\"}}\n",
            "it answers call 2 instead of 1",
        ),
        (b"{\"jsonrpc\":\"2.0\",\"id\":null,\"result\":{}}\n", "it answers call null instead of 1"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"error\":7}\n", "error: invalid type"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"name\":3}}\n", "pool.status: invalid type"),
        (b"{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"name\":\"a\"}}\n", "pool.status: missing field"),
        (b"{\"jsonrpc\":\"2.0\",\"method\":\"event\"}\n", "an event without params"),
    ] {
        let outcome = asked(Reply::Raw(bytes.to_vec()), &[]);
        let shown = String::from_utf8_lossy(bytes);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""), "{shown}: {outcome:?}");
        assert!(
            outcome
                .stderr
                .starts_with(&format!("error[E_PROTOCOL]: the daemon's answer makes no sense: {complaint}")),
            "{shown}: {outcome:?}"
        );
    }
}

#[test]
fn line_without_end_is_cut_off_at_its_greatest_length() {
    for bytes in [vec![b' '; (1 << 20) + 100], [vec![b' '; 1 << 20], vec![b'\n']].concat()] {
        let outcome = asked(Reply::RawThenClose(bytes), &[]);
        assert_eq!(outcome.code, 1);
        assert!(outcome.stderr.contains("a line longer than 1048576 bytes"), "{outcome:?}");
    }
}

#[test]
fn line_of_the_greatest_length_is_read() {
    let mut line = json!({"jsonrpc": "2.0", "id": 1, "result": pool()}).to_string();
    line.extend(std::iter::repeat_n(' ', (1 << 20) - 1 - line.len()));
    line.push('\n');
    assert_eq!(line.len(), 1 << 20);
    assert_eq!(asked(Reply::Raw(line.into_bytes()), &[]).code, 0);
}

#[test]
fn request_longer_than_a_line_is_not_sent() {
    // The arguments of a process are limited too, to 128 KiB each, so a line is made of many.
    let name = "x".repeat(100_000);
    let outcome = ctl(
        vec![refuse("device.show", json!({"name": name}), "E_INVALID_PARAMS", "too long", None)],
        &["show", &name],
    );
    assert_eq!(outcome.code, 2);
    let types: Vec<String> = (0..12).map(|_| name.clone()).collect();
    let mut args = vec!["events", "--follow", "--type"];
    args.extend(types.iter().map(String::as_str));
    let outcome = ctl(vec![], &args);
    assert_eq!(outcome.code, 2, "{}", &outcome.stderr[..200.min(outcome.stderr.len())]);
    assert!(outcome.stderr.contains("a line has 1048576 at most"));
}

fn timed(steps: Vec<Step>, args: &[&str]) -> (Outcome, Duration) {
    let begun = Instant::now();
    (ctl(steps, args), begun.elapsed())
}

#[test]
fn peer_that_never_answers_is_given_up() {
    for reply in [Reply::Silence, Reply::Drip] {
        let (outcome, time) =
            timed(vec![step("pool.status", json!({}), reply)], &["pool", "status", "--timeout", "300ms"]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (5, ""));
        assert!(
            outcome.stderr.starts_with(
                "error[E_TIMED_OUT]: the daemon did not answer pool.status within 300 ms\nhint: "
            ),
            "{outcome:?}"
        );
        assert!((Duration::from_millis(300)..Duration::from_secs(10)).contains(&time), "{time:?}");
    }
}

#[test]
fn daemon_that_takes_no_connection_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    // Fill the queue of connections that nobody accepts: each that cannot be queued would block.
    let mut waiting = Vec::new();
    loop {
        let target = path.clone();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(std::os::unix::net::UnixStream::connect(target)));
        match receiver.recv_timeout(Duration::from_millis(500)) {
            Ok(stream) => waiting.push(stream.unwrap()),
            Err(_) => break,
        }
        assert!(waiting.len() < 100_000, "the queue has no end");
    }
    let mut command = command(&path);
    command.args(["list", "--timeout", "300ms"]);
    let outcome = run(command);
    assert_eq!(outcome.code, 5, "{outcome:?}");
    assert!(outcome.stderr.contains("takes no connection"), "{outcome:?}");
}

#[test]
fn timeout_ends_the_wait_for_a_job_and_leaves_it_running() {
    // The daemon answers long polls at once and without news: that must not make the command spin.
    let evacuating = job("evacuating", 35 * GIB, 100);
    let peer = Peer::repeat(evacuating, 40);
    let mut command = command(&peer.socket());
    command.args(["job", "wait", "41", "--timeout", "1500ms"]);
    let begun = Instant::now();
    let outcome = run(command);
    let time = begun.elapsed();
    peer.finish();
    assert_eq!((outcome.code, outcome.stdout.as_str()), (5, ""));
    assert_eq!(
        outcome.stderr,
        "job 41: evacuating, 5 GiB of 12 GiB, 50 GiB/s, 1 s left\n\
         error[E_TIMED_OUT]: job 41 is still evacuating: vm2-db is at 35 GiB (28 GiB asked)\n\
         hint: it goes on; `balloon-ctl job wait 41` or `balloon-ctl job cancel 41`\n"
    );
    assert!((Duration::from_millis(1500)..Duration::from_secs(10)).contains(&time), "{time:?}");
}

#[test]
fn answer_with_unknown_fields_is_understood() {
    let mut newer = pool();
    newer["wear"] = json!({"percent": 3});
    newer["media"][0]["temperature_celsius"] = json!(41);
    let line = json!({"jsonrpc": "2.0", "id": 1, "result": newer, "trace": "abc"}).to_string() + "\n";
    let outcome = asked(Reply::Raw(line.clone().into_bytes()), &[]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let outcome = asked(Reply::Raw(line.into_bytes()), &["--json"]);
    assert_eq!(outcome.json(), json!({"schema": "vssd.v1", "pool": newer}));
}

#[test]
fn refusal_before_the_question_is_heard() {
    // Too many connections: the daemon says so without having read anything, and hangs up.
    let line = json!({"jsonrpc": "2.0", "id": null, "error": {
        "code": -32012, "message": "too many connections", "data": {"code": "E_TOO_LARGE"}
    }})
    .to_string()
        + "\n";
    let outcome = asked(Reply::RawThenClose(line.into_bytes()), &[]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (1, "error[E_TOO_LARGE]: too many connections\n"));
}

#[test]
fn daemon_that_ends_during_a_wait_is_unreachable() {
    let steps = vec![
        ok("job.show", json!({"id": 41}), job("evacuating", 35 * GIB, 100)),
        step("job.wait", json!({"id": 41, "timeout_ms": 20000}), Reply::RawThenClose(Vec::new())),
    ];
    let outcome = ctl(steps, &["job", "wait", "41", "-q"]);
    assert_eq!(outcome.code, 7);
    assert!(outcome.stderr.starts_with("error[E_UNREACHABLE]: "), "{outcome:?}");
    assert!(outcome.stderr.contains("hint: what was asked is kept: "), "{outcome:?}");
}

#[test]
fn message_of_the_daemon_cannot_command_the_terminal() {
    let steps =
        vec![refuse("device.show", json!({"name": "vm1"}), "E_INTERNAL", "a\u{1b}[2Jb", Some("c\u{7}d"))];
    let outcome = ctl(steps, &["show", "vm1"]);
    assert_eq!(outcome.stderr, "error[E_INTERNAL]: a\u{fffd}[2Jb\nhint: c\u{fffd}d\n");
    let steps = vec![ok("device.show", json!({"name": "vm1"}), vm1())];
    assert_eq!(ctl(steps, &["show", "vm1"]).code, 0);
}
