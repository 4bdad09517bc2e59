// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `resize`, `grow`, `shrink`, and the job commands.

use serde_json::{Value, json};

use crate::fixtures::{GIB, job, vm1, vm2, with};
use crate::peer::{Step, alone, ctl, ok, refuse};

/// `device.resize` of vm2-db with what no option changes.
fn params(size_bytes: u64, expected_bytes: Value) -> Value {
    json!({
        "name": "vm2-db", "size_bytes": size_bytes, "expected_bytes": expected_bytes, "deadline_ms": null,
        "on_timeout": null, "force": false, "dry_run": false
    })
}

fn accepted(job: Value) -> Value {
    json!({"job": job, "from_bytes": 40 * GIB, "to_bytes": 28 * GIB, "plan": "the guest is asked to give 12 GiB"})
}

fn show(requested_bytes: u64) -> Step {
    ok("device.show", json!({"name": "vm2-db"}), with(vm2(), "requested_bytes", json!(requested_bytes)))
}

fn wait_for(answer: Value) -> Step {
    ok("job.wait", json!({"id": 41, "timeout_ms": 20000}), answer)
}

#[test]
fn absolute_resize_is_followed_to_its_end() {
    let steps = vec![
        ok("device.resize", params(28 * GIB, Value::Null), accepted(job("offered", 40 * GIB, 3))),
        wait_for(job("evacuating", 40 * GIB, 100)),
        wait_for(job("evacuating", 34 * GIB, 12000)),
        wait_for(job("committing", 28 * GIB, 30000)),
        wait_for(job("done", 28 * GIB, 31000)),
    ];
    let outcome = ctl(steps, &["resize", "vm2-db", "28G"]);
    assert_eq!(outcome.code, 0);
    assert_eq!(outcome.stdout, "vm2-db: 40 GiB -> 28 GiB in 31 s; 12 GiB returned to the pool\n");
    assert_eq!(
        outcome.stderr,
        "\
job 41: the guest is asked to give 12 GiB
job 41: offered, 0 B of 12 GiB
job 41: evacuating, 0 B of 12 GiB
job 41: committing, 12 GiB of 12 GiB, 409.5 MiB/s, 0 s left
"
    );
}

fn done_at_once(params: Value) -> Step {
    ok("device.resize", params, accepted(job("done", 28 * GIB, 400)))
}

#[test]
fn resize_to_the_present_size_says_that_there_was_nothing_to_do() {
    let done = json!({
        "id": 41, "device": "vm2-db", "state": "done", "from_bytes": 28 * GIB, "target_bytes": 28 * GIB,
        "plugged_bytes": 28 * GIB, "started_ms": 0, "elapsed_ms": 0, "message": "nothing to do",
        "requested_by_uid": 0, "requested_by_pid": 77
    });
    let outcome = ctl(
        vec![ok("device.resize", params(28 * GIB, Value::Null), accepted(done))],
        &["resize", "vm2-db", "28G"],
    );
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (0, "vm2-db: 28 GiB -> 28 GiB in 0 s (nothing to do)\n")
    );
}

#[test]
fn grow_says_nothing_of_returned_space() {
    let grown = json!({
        "id": 41, "device": "vm2-db", "state": "done", "from_bytes": 40 * GIB, "target_bytes": 42 * GIB,
        "plugged_bytes": 42 * GIB, "started_ms": 0, "elapsed_ms": 31, "message": "", "requested_by_uid": 0,
        "requested_by_pid": 77
    });
    let answer =
        json!({"job": grown, "from_bytes": 40 * GIB, "to_bytes": 42 * GIB, "plan": "blocks are added"});
    for args in [["grow", "vm2-db", "2G"], ["grow", "vm2-db", "+2G"], ["resize", "vm2-db", "+2G"]] {
        let steps =
            vec![show(40 * GIB), ok("device.resize", params(42 * GIB, json!(40 * GIB)), answer.clone())];
        let outcome = ctl(steps, &args);
        assert_eq!(
            (outcome.code, outcome.stdout.as_str()),
            (0, "vm2-db: 40 GiB -> 42 GiB in 31 ms\n"),
            "{args:?}"
        );
    }
}

#[test]
fn relative_shrink_counts_from_the_requested_size_and_says_what_it_counted_from() {
    // 40 GiB are plugged, but 30 GiB are what the guest was last asked for.
    for args in [["shrink", "vm2-db", "2G"], ["shrink", "vm2-db", "-2G"], ["resize", "vm2-db", "-2G"]] {
        let steps = vec![show(30 * GIB), done_at_once(params(28 * GIB, json!(30 * GIB)))];
        assert_eq!(ctl(steps, &args).code, 0, "{args:?}");
    }
}

#[test]
fn named_sizes_are_the_limits() {
    let min = vec![show(40 * GIB), done_at_once(params(10 * GIB, Value::Null))];
    assert_eq!(ctl(min, &["resize", "vm2-db", "min"]).code, 0);
    let max = vec![show(40 * GIB), done_at_once(params(60 * GIB, Value::Null))];
    assert_eq!(ctl(max, &["resize", "vm2-db", "max"]).code, 0);
}

#[test]
fn of_two_operators_at_once_the_second_is_told() {
    let steps = vec![
        show(40 * GIB),
        refuse(
            "device.resize",
            params(42 * GIB, json!(40 * GIB)),
            "E_CONFLICT",
            "vm2-db was asked for 30 GiB by somebody else",
            Some("look again, then decide"),
        ),
    ];
    let outcome = ctl(steps, &["grow", "vm2-db", "2G"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (4, ""));
    assert_eq!(
        outcome.stderr,
        "error[E_CONFLICT]: vm2-db was asked for 30 GiB by somebody else\nhint: look again, then decide\n"
    );
}

#[test]
fn more_than_there_is_cannot_be_given_back() {
    let outcome = ctl(vec![show(40 * GIB)], &["shrink", "vm2-db", "41G"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (4, ""));
    assert_eq!(
        outcome.stderr,
        "error[E_BELOW_MIN]: vm2-db cannot give back 41 GiB of 40 GiB: its minimum is 10 GiB\n"
    );
    let outcome = ctl(vec![show(40 * GIB)], &["grow", "vm2-db", "18446744073709551615", "--json"]);
    assert_eq!(outcome.code, 4, "{outcome:?}");
    assert!(outcome.stderr.contains("E_ABOVE_MAX"), "{outcome:?}");
}

#[test]
fn options_travel_with_the_request() {
    let expected = json!({
        "name": "vm2-db", "size_bytes": 28 * GIB, "expected_bytes": null, "deadline_ms": 90000,
        "on_timeout": "force", "force": true, "dry_run": false
    });
    let args = [
        "resize",
        "vm2-db",
        "28G",
        "--deadline",
        "90s",
        "--on-timeout",
        "force",
        "--force",
        "--yes",
        "--no-wait",
    ];
    let steps = vec![ok("device.resize", expected, accepted(job("created", 40 * GIB, 0)))];
    assert_eq!(ctl(steps, &args).printed(), "vm2-db: 40 GiB -> 28 GiB: job 41\n");
}

#[test]
fn force_needs_yes_where_nobody_can_be_asked() {
    for args in [
        &["resize", "vm2-db", "28G", "--force"][..],
        &["shrink", "vm2-db", "2G", "--force"],
        &["resize", "vm2-db", "min", "--force"],
    ] {
        let outcome = alone(args);
        assert_eq!(outcome.code, 2, "{args:?}");
        assert_eq!(
            outcome.stderr,
            "error[E_USAGE]: --force needs a confirmation, and this is no terminal\nhint: add --yes if it is meant\n"
        );
    }
}

#[test]
fn dry_run_prints_the_plan_and_no_job() {
    let answer = json!({"from_bytes": 40 * GIB, "to_bytes": 28 * GIB, "plan": "the guest would be asked"});
    let steps = || {
        vec![ok("device.resize", with(params(28 * GIB, Value::Null), "dry_run", json!(true)), answer.clone())]
    };
    let args = ["resize", "vm2-db", "28G", "--dry-run"];
    assert_eq!(
        ctl(steps(), &args).printed(),
        "vm2-db: 40 GiB -> 28 GiB (dry run): the guest would be asked\n"
    );
    assert_eq!(
        ctl(steps(), &[&args[..], &["--json"]].concat()).json(),
        json!({"schema": "vssd.v1", "resize": answer, "dry_run": true})
    );
    // What would be lost is only told, so nobody has to confirm it.
    let forced = with(with(params(28 * GIB, Value::Null), "dry_run", json!(true)), "force", json!(true));
    let steps = vec![ok("device.resize", forced, answer.clone())];
    assert_eq!(ctl(steps, &[&args[..], &["--force"]].concat()).code, 0);
}

#[test]
fn json_has_the_job_as_it_ended_and_no_progress() {
    let steps = vec![
        ok("device.resize", params(28 * GIB, Value::Null), accepted(job("offered", 40 * GIB, 3))),
        wait_for(job("evacuating", 34 * GIB, 12000)),
        wait_for(job("done", 28 * GIB, 31000)),
    ];
    assert_eq!(
        ctl(steps, &["resize", "vm2-db", "28G", "--json"]).json(),
        json!({"schema": "vssd.v1", "dry_run": false, "resize": accepted(job("done", 28 * GIB, 31000))})
    );
    let offered = accepted(job("offered", 40 * GIB, 3));
    let steps = vec![ok("device.resize", params(28 * GIB, Value::Null), offered.clone())];
    assert_eq!(
        ctl(steps, &["resize", "vm2-db", "28G", "--json", "--no-wait"]).json(),
        json!({"schema": "vssd.v1", "dry_run": false, "resize": offered})
    );
}

#[test]
fn quiet_resize_says_nothing_but_errors() {
    let steps = vec![
        ok("device.resize", params(28 * GIB, Value::Null), accepted(job("offered", 40 * GIB, 3))),
        wait_for(job("done", 28 * GIB, 31000)),
    ];
    assert_eq!(ctl(steps, &["resize", "vm2-db", "28G", "-q"]).printed(), "");
}

/// How a resize ends whose job ends like this.
fn ends(last: Value) -> crate::peer::Outcome {
    let first = ok("device.resize", params(28 * GIB, Value::Null), accepted(job("offered", 40 * GIB, 3)));
    ctl(vec![first, wait_for(last)], &["resize", "vm2-db", "28G", "-q"])
}

#[test]
fn job_that_ended_otherwise_is_an_error_with_its_numbers() {
    let because = |state: &str, plugged: u64, message: &str| {
        with(job(state, plugged, 60000), "message", json!(message))
    };
    let outcome = ends(because("refused", 40 * GIB, "guest: nothing is free"));
    assert_eq!((outcome.code, outcome.stdout.as_str()), (4, ""));
    assert_eq!(
        outcome.stderr,
        "error[E_GUEST_REFUSED]: vm2-db stays at 40 GiB (28 GiB asked): guest: nothing is free\n\
         hint: `balloon-ctl show vm2-db` says what the guest could give; ask again later or for less\n"
    );
    let outcome = ends(because("partial", 35 * GIB, "guest: no more is free"));
    assert_eq!(outcome.code, 4);
    assert!(
        outcome.stderr.starts_with(
            "error[E_GUEST_REFUSED]: vm2-db went only from 40 GiB to 35 GiB (28 GiB asked): guest: no more is free\n"
        ),
        "{outcome:?}"
    );
    let outcome =
        ends(with(because("expired", 36 * GIB, "the guest is silent"), "error", json!("E_TIMED_OUT")));
    assert_eq!(outcome.code, 5);
    assert!(
        outcome.stderr.starts_with(
            "error[E_TIMED_OUT]: vm2-db is at 36 GiB after 60 s (28 GiB asked): the guest is silent\nhint: "
        ),
        "{outcome:?}"
    );
    let outcome = ends(job("cancelled", 36 * GIB, 5));
    assert_eq!(outcome.code, 4);
    assert_eq!(
        outcome.stderr,
        "error[E_CANCELLED]: job 41 was cancelled: vm2-db is at 36 GiB (28 GiB asked)\n"
    );
    let outcome = ends(job("superseded", 36 * GIB, 5));
    assert_eq!(outcome.code, 4);
    assert!(
        outcome.stderr.starts_with("error[E_CONFLICT]: a newer resize took the place of job 41"),
        "{outcome:?}"
    );
}

#[test]
fn json_of_a_failed_job_is_on_stdout_and_its_error_on_stderr() {
    let last = job("refused", 40 * GIB, 9);
    let steps = vec![
        ok("device.resize", params(28 * GIB, Value::Null), accepted(job("offered", 40 * GIB, 3))),
        wait_for(last.clone()),
    ];
    let outcome = ctl(steps, &["resize", "vm2-db", "28G", "--json"]);
    assert_eq!(outcome.code, 4);
    let stdout: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(stdout["resize"]["job"], last);
    let stderr: Value = serde_json::from_str(&outcome.stderr).unwrap();
    assert_eq!(
        stderr,
        json!({"schema": "vssd.v1", "error": {
            "code": "E_GUEST_REFUSED", "exit_code": 4, "message": "vm2-db stays at 40 GiB (28 GiB asked)",
            "hint": "`balloon-ctl show vm2-db` says what the guest could give; ask again later or for less"
        }})
    );
}

#[test]
fn jobs_are_a_table() {
    let list = json!({"jobs": [
        with(job("evacuating", 35 * GIB, 12000), "message", json!("waiting for the guest")),
        job("done", 28 * GIB, 31000)
    ]});
    let steps = || vec![ok("job.list", json!({}), list.clone())];
    assert_eq!(
        ctl(steps(), &["jobs"]).printed(),
        "\
ID  DEVICE  STATE       FROM    TARGET  NOW     ELAPSED  MESSAGE
41  vm2-db  evacuating  40 GiB  28 GiB  35 GiB  12 s     waiting for the guest
41  vm2-db  done        40 GiB  28 GiB  28 GiB  31 s
"
    );
    assert_eq!(ctl(steps(), &["jobs", "--json"]).json(), json!({"schema": "vssd.v1", "jobs": list["jobs"]}));
}

#[test]
fn job_show_tells_everything_and_judges_nothing() {
    let failed =
        with(with(job("refused", 40 * GIB, 9), "message", json!("no")), "error", json!("E_GUEST_REFUSED"));
    let steps = || vec![ok("job.show", json!({"id": 41}), failed.clone())];
    assert_eq!(
        ctl(steps(), &["job", "show", "41"]).printed(),
        "\
id            41
device        vm2-db
state         refused
from          40 GiB
target        28 GiB
now           40 GiB
elapsed       9 ms
deadline      60 s
message       no
error         E_GUEST_REFUSED
requested by  uid 0, pid 77
"
    );
    assert_eq!(
        ctl(steps(), &["job", "show", "41", "--json"]).json(),
        json!({"schema": "vssd.v1", "job": failed})
    );
}

#[test]
fn job_cancel_says_where_it_stopped() {
    let steps = || vec![ok("job.cancel", json!({"id": 41}), job("cancelled", 35 * GIB, 900))];
    assert_eq!(ctl(steps(), &["job", "cancel", "41"]).printed(), "job 41 cancelled: vm2-db is at 35 GiB\n");
    assert_eq!(
        ctl(steps(), &["job", "cancel", "41", "--json"]).json(),
        json!({"schema": "vssd.v1", "job": job("cancelled", 35 * GIB, 900)})
    );
}

#[test]
fn job_wait_follows_like_resize_does() {
    let steps = || {
        vec![
            ok("job.show", json!({"id": 41}), job("evacuating", 35 * GIB, 5000)),
            wait_for(job("done", 28 * GIB, 6000)),
        ]
    };
    let outcome = ctl(steps(), &["job", "wait", "41"]);
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (0, "vm2-db: 40 GiB -> 28 GiB in 6 s; 12 GiB returned to the pool\n")
    );
    assert_eq!(outcome.stderr, "job 41: evacuating, 5 GiB of 12 GiB, 1 GiB/s, 7 s left\n");
    assert_eq!(
        ctl(steps(), &["job", "wait", "41", "--json"]).json(),
        json!({"schema": "vssd.v1", "job": job("done", 28 * GIB, 6000)})
    );
}

#[test]
fn job_wait_for_a_job_that_ended_asks_once() {
    let steps = vec![ok("job.show", json!({"id": 41}), job("refused", 40 * GIB, 5000))];
    assert_eq!(ctl(steps, &["job", "wait", "41"]).code, 4);
}

#[test]
fn vssd_of_another_name_in_the_answer_changes_nothing() {
    // `show` answers for what the daemon has; the request that follows keeps the name that was typed.
    let steps = vec![
        ok("device.show", json!({"name": "vm2-db"}), vm1()),
        done_at_once(params(22 * GIB, json!(20 * GIB))),
    ];
    assert_eq!(ctl(steps, &["grow", "vm2-db", "2G"]).code, 0);
}
