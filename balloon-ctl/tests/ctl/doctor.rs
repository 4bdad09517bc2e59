// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `doctor`. What it says of the host depends on the host; its unit tests judge those parts.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use crate::fixtures::{hello, hello_params, pool, vm1, vm2, vm3, with};
use crate::peer::{Outcome, Peer, Reply, Step, command, ok, refuse, run, step};

/// The checks that depend on the daemon only, as (check, device, status).
fn verdicts(outcome: &Outcome) -> Vec<(String, String, String)> {
    let object: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    object["checks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|check| (text(&check["check"]), text(&check["device"]), text(&check["status"])))
        .filter(|(check, _, _)| !["kvm", "io_uring", "memlock"].contains(&check.as_str()))
        .collect()
}

fn triples(expected: &[(&str, &str, &str)]) -> Vec<(String, String, String)> {
    expected.iter().map(|(a, b, c)| ((*a).to_owned(), (*b).to_owned(), (*c).to_owned())).collect()
}

fn steps(pool: Value, devices: Vec<Value>) -> Vec<Step> {
    vec![
        ok("server.hello", hello_params(), hello()),
        ok("pool.status", json!({}), pool),
        ok("device.list", json!({}), json!({"devices": devices})),
    ]
}

fn doctor(steps: Vec<Step>, mode: u32, args: &[&str]) -> Outcome {
    let peer = Peer::play(steps);
    std::fs::set_permissions(peer.socket(), PermissionsExt::from_mode(mode)).unwrap();
    let mut command = command(&peer.socket());
    command.arg("doctor").args(args);
    let outcome = run(command);
    peer.finish();
    outcome
}

#[test]
fn doctor_judges_each_vssd_by_what_the_daemon_knows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dev.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let there = |device: Value| with(device, "socket_path", json!(path));
    let idle = with(
        with(vm1(), "name", json!("vm4")),
        "frontend",
        json!({"connected": true, "queues": 0, "connections": 1}),
    );
    let stuck = with(with(vm1(), "name", json!("vm5")), "state", json!("uncooperative"));
    let booting = with(with(vm1(), "name", json!("vm6")), "driver", json!({"kind": "none"}));
    let devices = vec![there(vm3()), there(vm1()), there(vm2()), there(idle), there(stuck), there(booting)];
    let outcome = doctor(steps(pool(), devices), 0o660, &["--json"]);
    assert_eq!(
        verdicts(&outcome),
        triples(&[
            ("socket", "", "ok"),
            ("pool", "", "ok"),
            ("frontend", "vm1-data", "ok"),
            ("driver", "vm1-data", "ok"),
            ("frontend", "vm2-db", "ok"),
            ("driver", "vm2-db", "warn"),
            ("frontend", "vm3-tmp", "warn"),
            ("frontend", "vm4", "warn"),
            ("frontend", "vm5", "ok"),
            ("driver", "vm5", "warn"),
            ("frontend", "vm6", "ok"),
            ("driver", "vm6", "warn"),
        ])
    );
    let object: Value = serde_json::from_str(&outcome.stdout).unwrap();
    for check in object["checks"].as_array().unwrap() {
        assert_eq!(
            check["status"] == "ok",
            check["hint"].is_null(),
            "all but what is fine has a hint: {check}"
        );
    }
}

#[test]
fn doctor_fails_for_what_cannot_work() {
    let failed = with(with(vm1(), "state", json!("failed")), "socket_path", json!("/nonexistent/dev.sock"));
    let outcome = doctor(steps(with(pool(), "health", json!("failed")), vec![failed]), 0o660, &["--json"]);
    assert_eq!(
        verdicts(&outcome),
        triples(&[
            ("socket", "", "ok"),
            ("pool", "", "fail"),
            ("vssd-socket", "vm1-data", "fail"),
            ("frontend", "vm1-data", "ok"),
            ("driver", "vm1-data", "fail"),
        ])
    );
    assert_eq!(outcome.code, 1);
    assert_eq!(serde_json::from_str::<Value>(&outcome.stdout).unwrap()["healthy"], false);
    let error: Value = serde_json::from_str(&outcome.stderr).unwrap();
    assert_eq!(error["error"]["code"], "E_UNHEALTHY");
}

#[test]
fn doctor_warns_of_a_socket_for_everybody_and_of_a_low_pool() {
    let outcome = doctor(steps(with(pool(), "health", json!("low")), vec![]), 0o666, &["--json"]);
    assert_eq!(verdicts(&outcome), triples(&[("socket", "", "warn"), ("pool", "", "warn")]));
}

#[test]
fn doctor_looks_for_what_ssds_need_only_where_there_is_one() {
    let asks_for_io = |pool: Value| {
        let outcome = doctor(steps(pool, vec![]), 0o660, &[]);
        ["io_uring: ", "memlock: "].map(|check| outcome.stdout.contains(check))
    };
    assert_eq!(asks_for_io(pool()), [true, true]);
    let nvram_only = json!([pool()["media"][0]]);
    assert_eq!(asks_for_io(with(pool(), "media", nvram_only)), [false, false]);
}

#[test]
fn doctor_goes_on_when_a_question_is_refused() {
    let steps = vec![
        ok("server.hello", hello_params(), with(hello(), "schema", json!("vssd.v2"))),
        refuse("pool.status", json!({}), "E_MEDIA", "the medium is gone", Some("look at the cable")),
        refuse("device.list", json!({}), "E_BUSY", "later", None),
    ];
    let outcome = doctor(steps, 0o660, &["--json"]);
    assert_eq!(
        verdicts(&outcome),
        triples(&[("socket", "", "warn"), ("pool", "", "fail"), ("devices", "", "fail")])
    );
}

#[test]
fn doctor_is_not_confused_by_an_answer_that_comes_late() {
    let late = format!(
        "{}\n{}\n",
        json!({"jsonrpc": "2.0", "id": 2, "result": pool()}),
        json!({"jsonrpc": "2.0", "id": 3, "result": {"devices": []}})
    );
    let steps = vec![
        ok("server.hello", hello_params(), hello()),
        step("pool.status", json!({}), Reply::Silence),
        step("device.list", json!({}), Reply::Raw(late.into_bytes())),
    ];
    let outcome = doctor(steps, 0o660, &["--json", "--timeout", "1500ms"]);
    assert_eq!(verdicts(&outcome), triples(&[("socket", "", "ok"), ("pool", "", "fail")]));
    assert_eq!(outcome.code, 1);
}

#[test]
fn doctor_without_daemon_still_looks_at_the_host() {
    let mut command = command("/nonexistent/control.sock".as_ref());
    command.arg("doctor");
    let outcome = run(command);
    assert_eq!(outcome.code, 1);
    let mut lines = outcome.stdout.lines();
    assert_eq!(
        lines.next(),
        Some(
            "FAIL  socket: cannot reach the daemon at /nonexistent/control.sock: No such file or directory (os error 2)"
        )
    );
    assert_eq!(
        lines.next(),
        Some(
            "      hint: start vssd-backend, or name its control socket with --socket or BALLOON_CTL_SOCKET"
        )
    );
    for subject in ["kvm: ", "io_uring: ", "memlock: "] {
        assert!(
            outcome.stdout.lines().any(|line| line.get(6..).is_some_and(|text| text.starts_with(subject))),
            "{subject}"
        );
    }
    assert!(outcome.stderr.starts_with("error[E_UNHEALTHY]: "), "{outcome:?}");
}

#[test]
fn doctor_speaks_in_lines() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dev.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let outcome = doctor(steps(pool(), vec![with(vm3(), "socket_path", json!(path))]), 0o660, &[]);
    for line in [
        "OK    pool: pool fast0 is ok, 40 % free",
        "WARN  vm3-tmp frontend: no virtual machine is connected",
        "      hint: balloon-ctl attach-info vm3-tmp --for qemu",
    ] {
        assert!(outcome.stdout.lines().any(|found| found == line), "{line}\n{}", outcome.stdout);
    }
    assert!(!outcome.stdout.contains('\u{1b}'), "colours are for terminals");
}
