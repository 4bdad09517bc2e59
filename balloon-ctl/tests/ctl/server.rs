// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `ping`, `version`, `rpc`, `completion`, `man` and the help.

use std::fs;

use serde_json::{Value, json};

use crate::fixtures::{hello, hello_params, vm1};
use crate::peer::{Peer, Step, alone, command, ctl, ok, refuse, run};

fn greet() -> Vec<Step> {
    vec![ok("server.hello", hello_params(), hello())]
}

#[test]
fn ping_tells_who_answers_and_how_fast() {
    let peer = Peer::play(greet());
    let socket = peer.socket();
    let mut command = command(&socket);
    command.arg("ping");
    let text = run(command).printed();
    peer.finish();
    let expected = format!(
        "vssd-backend 0.1.0 serves pool fast0 on {} (control socket), up 1 h 2 min, answered in ",
        socket.display()
    );
    let time = text.strip_prefix(&expected).and_then(|rest| rest.strip_suffix(" ms\n"));
    assert!(time.is_some_and(|time| time.parse::<f64>().is_ok()), "{text}");
}

#[test]
fn ping_in_json() {
    let object = ctl(greet(), &["ping", "--json"]).json();
    assert_eq!(object["server"], hello());
    assert!(object["round_trip_us"].as_u64().is_some_and(|micros| micros < 20_000_000), "{object}");
}

#[test]
fn version_names_both_sides() {
    assert_eq!(
        ctl(greet(), &["version"]).printed(),
        "balloon-ctl 0.1.0 (schema vssd.v1)\nvssd-backend 0.1.0 (schema vssd.v1)\n"
    );
    assert_eq!(
        ctl(greet(), &["version", "--json"]).json(),
        json!({
            "schema": "vssd.v1", "client": {"name": "balloon-ctl", "version": "0.1.0"}, "server": hello()
        })
    );
}

#[test]
fn version_needs_no_daemon() {
    let mut command = command("/nonexistent/control.sock".as_ref());
    command.arg("version");
    let outcome = run(command);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "balloon-ctl 0.1.0 (schema vssd.v1)\n"));
    assert!(outcome.stderr.starts_with("no daemon: cannot reach"), "{outcome:?}");
    let mut command = crate::peer::command("/nonexistent/control.sock".as_ref());
    command.args(["version", "--json"]);
    assert_eq!(run(command).json()["server"], Value::Null);
}

#[test]
fn rpc_passes_through_both_ways() {
    let steps = || vec![ok("device.show", json!({"name": "vm1-data"}), vm1())];
    let text = ctl(steps(), &["rpc", "device.show", r#"{"name":"vm1-data"}"#]).printed();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), vm1());
    assert_eq!(text.lines().count(), 1);
    let steps = vec![ok("server.hello", json!({}), json!([1, "two"]))];
    assert_eq!(ctl(steps, &["rpc", "server.hello"]).printed(), "[1,\"two\"]\n");
}

#[test]
fn rpc_ends_as_the_daemon_answers() {
    let steps = vec![refuse("no.such", json!({}), "E_UNKNOWN_METHOD", "no.such is no method", None)];
    let outcome = ctl(steps, &["rpc", "no.such"]);
    assert_eq!(
        (outcome.code, outcome.stderr.as_str()),
        (1, "error[E_UNKNOWN_METHOD]: no.such is no method\n")
    );
    let outcome = alone(&["rpc", "device.show", "{name}"]);
    assert_eq!(outcome.code, 2);
    assert!(outcome.stderr.starts_with("error[E_USAGE]: the parameters are no JSON: "), "{outcome:?}");
}

#[test]
fn help_lists_the_exit_codes() {
    let text = alone(&["--help"]).printed();
    for line in [
        "  0  done",
        "  1  failed",
        "  2  wrong usage, or a value that the daemon does not accept",
        "  3  no such vSSD or job",
        "  4  refused by the guest, by a limit or policy, or because somebody else changed it",
        "  5  timed out: the deadline or --timeout passed, and the request may still be pending",
        "  6  the pool is full",
        "  7  the daemon cannot be reached",
        "  8  not permitted",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}");
    }
    assert!(!text.contains("\n  man "), "the command for packagers is hidden");
}

#[test]
fn wrong_usage_has_its_code_in_both_languages() {
    let outcome = alone(&["lst"]);
    assert_eq!(outcome.code, 2);
    assert!(outcome.stderr.starts_with("error[E_USAGE]: unrecognized subcommand 'lst'"), "{outcome:?}");
    let outcome = alone(&["--json", "show"]);
    assert_eq!(outcome.code, 2);
    let error: Value = serde_json::from_str(&outcome.stderr).unwrap();
    assert_eq!((&error["schema"], &error["error"]["code"]), (&json!("vssd.v1"), &json!("E_USAGE")));
    assert_eq!(error["error"]["exit_code"], 2);
    assert_eq!(alone(&["list", "--timeout", "0"]).code, 2, "no time is no time to answer in");
    let outcome = alone(&[]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""));
    assert!(outcome.stderr.contains("Usage: balloon-ctl"), "{outcome:?}");
}

#[test]
fn completion_knows_commands_and_values() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = alone(&["completion", shell]).printed();
        for word in ["balloon-ctl", "attach-info", "on-timeout"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(alone(&["completion", shell]).printed().contains("cloud-hypervisor"), "{shell}");
    }
    assert_eq!(alone(&["completion", "cmd"]).code, 2);
}

#[test]
fn man_writes_a_page_for_each_command() {
    let dir = tempfile::tempdir().unwrap();
    let pages = dir.path().join("man1");
    assert_eq!(alone(&["man", pages.to_str().unwrap()]).printed(), "");
    let mut names: Vec<String> = fs::read_dir(&pages)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "balloon-ctl-attach-info.1",
            "balloon-ctl-completion.1",
            "balloon-ctl-create.1",
            "balloon-ctl-delete.1",
            "balloon-ctl-doctor.1",
            "balloon-ctl-estimate.1",
            "balloon-ctl-events.1",
            "balloon-ctl-evicted.1",
            "balloon-ctl-grow.1",
            "balloon-ctl-job-cancel.1",
            "balloon-ctl-job-show.1",
            "balloon-ctl-job-wait.1",
            "balloon-ctl-job.1",
            "balloon-ctl-jobs.1",
            "balloon-ctl-limits.1",
            "balloon-ctl-list.1",
            "balloon-ctl-ping.1",
            "balloon-ctl-pool-check.1",
            "balloon-ctl-pool-create.1",
            "balloon-ctl-pool-status.1",
            "balloon-ctl-pool.1",
            "balloon-ctl-reclaim.1",
            "balloon-ctl-resize.1",
            "balloon-ctl-rpc.1",
            "balloon-ctl-show.1",
            "balloon-ctl-shrink.1",
            "balloon-ctl-sync.1",
            "balloon-ctl-version.1",
            "balloon-ctl.1",
        ]
    );
    let page = fs::read_to_string(pages.join("balloon-ctl.1")).unwrap();
    assert!(page.contains("the daemon cannot be reached"), "{page}");
    let outcome = alone(&["man", "/proc/no/such/folder"]);
    assert_eq!(outcome.code, 1);
    assert!(
        outcome.stderr.starts_with("error[E_LOCAL]: cannot write to /proc/no/such/folder: "),
        "{outcome:?}"
    );
}
