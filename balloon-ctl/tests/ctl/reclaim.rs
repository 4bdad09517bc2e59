// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `reclaim` and `estimate`.

use serde_json::{Value, json};

use crate::fixtures::{GIB, vm2, with};
use crate::peer::{Step, ctl, ok, refuse};

fn params(soft_bytes: Value, deadline_ms: Value, dry_run: bool) -> Value {
    json!({"name": "vm2-db", "soft_bytes": soft_bytes, "deadline_ms": deadline_ms, "dry_run": dry_run})
}

fn answer(job: Value) -> Value {
    json!({"job": job, "allocated_bytes": 30 * GIB, "soft_bytes": 20 * GIB, "plan": "the agent is asked"})
}

fn job(state: &str, now: u64, message: &str, error: Value) -> Value {
    json!({
        "id": 7, "kind": "reclaim", "device": "vm2-db", "state": state, "from_bytes": 30 * GIB, "target_bytes": 20 * GIB,
        "plugged_bytes": now, "started_ms": 1000, "elapsed_ms": 9000, "deadline_ms": 120_000, "message": message,
        "error": error, "requested_by_uid": 0, "requested_by_pid": 77
    })
}

fn follow(last: Value) -> Vec<Step> {
    vec![
        ok(
            "device.reclaim",
            params(json!(20 * GIB), Value::Null, false),
            answer(job("created", 30 * GIB, "", Value::Null)),
        ),
        ok("job.wait", json!({"id": 7, "timeout_ms": 20000}), last),
    ]
}

#[test]
fn a_wish_is_followed_until_the_host_sees_it_come_true() {
    let outcome = ctl(follow(job("done", 19 * GIB, "", Value::Null)), &["reclaim", "vm2-db", "20G"]);
    assert_eq!(
        (outcome.code, outcome.stdout.as_str()),
        (0, "vm2-db: 30 GiB -> 19 GiB in use in 9 s; 11 GiB returned to the pool\n")
    );
    assert!(outcome.stderr.starts_with("job 7: the agent is asked\n"), "{}", outcome.stderr);
}

#[test]
fn each_end_has_its_exit_code_and_says_what_is_in_use() {
    for (state, error, code) in
        [("partial", "E_GUEST_REFUSED", 4), ("refused", "E_GUEST_REFUSED", 4), ("expired", "E_TIMED_OUT", 5)]
    {
        let last = job(state, 25 * GIB, "nothing more can be given up", json!(error));
        let outcome = ctl(follow(last), &["reclaim", "vm2-db", "20G"]);
        assert_eq!(outcome.code, code, "{state}");
        let said = format!("vm2-db has 25 GiB in use (20 GiB wished), {state}: nothing more can be given up");
        assert!(outcome.stderr.contains(&said), "{}", outcome.stderr);
    }
}

#[test]
fn it_is_taken_back_tried_and_left_alone() {
    let plan = "vm2-db: the agent is asked\n";
    let off = json!({"allocated_bytes": 30 * GIB, "plan": "the guest may use all of the disk again"});
    let steps = vec![ok("device.reclaim", params(Value::Null, Value::Null, false), off)];
    assert_eq!(
        ctl(steps, &["reclaim", "vm2-db", "off"]).printed(),
        "vm2-db: the guest may use all of the disk again\n"
    );
    let dry = vec![ok("device.reclaim", params(json!(20 * GIB), Value::Null, true), answer(Value::Null))];
    assert_eq!(
        ctl(dry, &["reclaim", "vm2-db", "20G", "--dry-run"]).printed(),
        "vm2-db (dry run): the agent is asked\n"
    );
    let created = answer(job("created", 30 * GIB, "", Value::Null));
    let alone = vec![ok("device.reclaim", params(json!(20 * GIB), json!(5000), false), created)];
    assert_eq!(ctl(alone, &["reclaim", "vm2-db", "20G", "--no-wait", "--deadline", "5s"]).printed(), plan);
    assert_eq!(ctl(vec![], &["reclaim", "vm2-db", "much"]).code, 2);
}

#[test]
fn show_says_that_a_wish_is_one() {
    let device = with(vm2(), "soft_bytes", json!(20 * GIB));
    let agent = json!({"heard_ms": 1500, "held_bytes": 9 * GIB, "shortfall": "nothing"});
    let device = with(device, "agent", agent);
    let shown =
        ctl(vec![ok("device.show", json!({"name": "vm2-db"}), device)], &["show", "vm2-db"]).printed();
    for line in [
        "soft size    20 GiB (a wish that nothing enforces; 28 GiB stay promised)\n",
        "agent        keeps 9 GiB unused, no more: nothing, heard 1.5 s ago\n",
    ] {
        assert!(shown.contains(line), "{shown}");
    }
}

#[test]
fn an_estimate_is_a_table_by_cost() {
    let told = json!({
        "name": "vm2-db", "age_ms": 2000, "free_bytes": 9 * GIB, "clean_cold_bytes": 2 * GIB, "clean_hot_bytes": GIB,
        "dirty_bytes": 0, "unwritten_bytes": 5 * GIB
    });
    let steps = || vec![ok("device.estimate", json!({"name": "vm2-db"}), told.clone())];
    let outcome = ctl(steps(), &["estimate", "vm2-db"]);
    assert_eq!(
        outcome.stdout,
        "\
COST        SIZE   WHAT IT IS
free        9 GiB  nothing lies there
clean-cold  2 GiB  copies of what is elsewhere, not asked for lately
clean-hot   1 GiB  copies of what is elsewhere, in use
dirty       0 B    must be written elsewhere first
"
    );
    assert!(outcome.stderr.contains("as its guest said 2 s ago"), "{}", outcome.stderr);
    assert_eq!(
        ctl(steps(), &["estimate", "vm2-db", "--json"]).json(),
        json!({"schema": "vssd.v1", "estimate": told})
    );
    let nobody =
        vec![refuse("device.estimate", json!({"name": "vm2-db"}), "E_NO_DRIVER", "nobody has said", None)];
    assert_eq!(ctl(nobody, &["estimate", "vm2-db"]).code, 4);
}
