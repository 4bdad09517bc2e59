// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What only happens on a terminal: questions, progress bars, colours. The terminal is a real one of the kernel.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::thread;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::{Value, json};

use crate::fixtures::{GIB, job, vm1, vm2};
use crate::peer::{Outcome, Peer, Step, command, ok, read_all, wait};

fn terminal() -> (File, File) {
    let ours: OwnedFd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
    let theirs = File::options().read(true).write(true).open(name).unwrap();
    (File::from(ours), theirs)
}

/// Runs the command on a terminal where somebody types `typed`; standard output is a pipe. The screen is
/// returned in the place of standard error.
fn on_terminal(steps: Vec<Step>, args: &[&str], typed: &str, env: &[(&str, &str)]) -> Outcome {
    let peer = Peer::play(steps);
    let (mut ours, theirs) = terminal();
    let mut command = command(&peer.socket());
    command.args(args).envs(env.iter().copied());
    command.stdin(theirs.try_clone().unwrap()).stderr(theirs).stdout(Stdio::piped());
    ours.write_all(typed.as_bytes()).unwrap();
    let screen = ours.try_clone().unwrap();
    let screen = thread::spawn(move || read_all(screen));
    let child = command.spawn().unwrap();
    // The command keeps our copies of the other end, and the screen ends when the last is closed.
    drop(command);
    let outcome = wait(child);
    peer.finish();
    Outcome { stderr: screen.join().unwrap(), ..outcome }
}

fn show() -> Step {
    ok("device.show", json!({"name": "vm1-data"}), vm1())
}

fn delete() -> Step {
    ok("device.delete", json!({"name": "vm1-data", "force": false, "dry_run": false}), json!({}))
}

#[test]
fn delete_asks_and_takes_yes_for_an_answer() {
    for typed in ["y\n", "YES\n"] {
        let outcome = on_terminal(vec![show(), delete()], &["delete", "vm1-data"], typed, &[]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "vm1-data deleted\n"), "{outcome:?}");
        let question = "delete vm1-data, which a guest is using, and the 12.3 GiB of data on it? [y/N] ";
        assert!(outcome.stderr.contains(question), "{outcome:?}");
    }
}

#[test]
fn delete_takes_anything_else_for_no() {
    for typed in ["n\n", "\n", "yep\n", "\u{4}"] {
        let outcome = on_terminal(vec![show()], &["delete", "vm1-data"], typed, &[]);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""), "{typed:?}: {outcome:?}");
        assert!(outcome.stderr.contains("E_DECLINED"), "{typed:?}: {outcome:?}");
    }
}

fn forced(size_bytes: u64) -> Value {
    json!({
        "name": "vm1-data", "size_bytes": size_bytes, "expected_bytes": null, "deadline_ms": null,
        "on_timeout": null, "force": true, "dry_run": false
    })
}

#[test]
fn force_asks_for_a_shrink_only() {
    let question = "take 15 GiB from vm1-data without asking its guest? Data in those blocks is lost [y/N] ";
    let args = ["resize", "vm1-data", "5G", "--force"];
    let outcome = on_terminal(vec![show()], &args, "n\n", &[]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.stderr.contains(question), "{outcome:?}");

    let answer = |to: u64| json!({"from_bytes": 20 * GIB, "to_bytes": to, "plan": "so be it"});
    let steps = vec![show(), ok("device.resize", forced(5 * GIB), answer(5 * GIB))];
    let outcome = on_terminal(steps, &args, "y\n", &[]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "vm1-data: 20 GiB -> 5 GiB: so be it\n"));

    let steps = vec![show(), ok("device.resize", forced(30 * GIB), answer(30 * GIB))];
    let outcome = on_terminal(steps, &["resize", "vm1-data", "30G", "--force"], "", &[]);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(!outcome.stderr.contains("[y/N]"), "{outcome:?}");
}

fn long_shrink() -> Vec<Step> {
    let wait_for = |answer: Value| ok("job.wait", json!({"id": 41, "timeout_ms": 20000}), answer);
    vec![
        ok("job.show", json!({"id": 41}), job("offered", 40 * GIB, 3)),
        wait_for(job("evacuating", 37 * GIB, 12000)),
        wait_for(job("done", 28 * GIB, 31000)),
    ]
}

#[test]
fn progress_is_a_bar_that_makes_way_for_the_result() {
    let outcome = on_terminal(long_shrink(), &["job", "wait", "41"], "", &[]);
    assert_eq!(outcome.code, 0);
    assert_eq!(outcome.stdout, "vm2-db: 40 GiB -> 28 GiB in 31 s; 12 GiB returned to the pool\n");
    assert!(outcome.stderr.contains("0 B of 12 GiB"), "{outcome:?}");
    // The last thing on the screen is an emptied line.
    assert!(outcome.stderr.ends_with("\r\u{1b}[2K"), "{outcome:?}");
    let outcome = on_terminal(long_shrink(), &["job", "wait", "41", "-q"], "", &[]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
}

#[test]
fn colours_are_for_terminals_that_want_them() {
    let refused = || {
        vec![crate::peer::refuse(
            "device.show",
            json!({"name": "vm2-db"}),
            "E_NOT_FOUND",
            "no such vSSD",
            Some("list"),
        )]
    };
    let args = ["show", "vm2-db"];
    let coloured = on_terminal(refused(), &args, "", &[]);
    assert_eq!(coloured.code, 3);
    assert_eq!(
        coloured.stderr,
        "\u{1b}[1;31merror[E_NOT_FOUND]\u{1b}[0m: no such vSSD\r\n\u{1b}[36mhint\u{1b}[0m: list\r\n"
    );
    for env in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let plain = on_terminal(refused(), &args, "", &[env]);
        assert_eq!(plain.stderr, "error[E_NOT_FOUND]: no such vSSD\r\nhint: list\r\n", "{env:?}");
    }
    let data =
        on_terminal(vec![ok("device.list", json!({}), json!({"devices": [vm2()]}))], &["list"], "", &[]);
    assert!(!data.stdout.contains('\u{1b}'), "{data:?}");
}
