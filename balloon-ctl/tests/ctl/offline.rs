// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `pool create` and `pool check` hand over to `vssd-backend`; a script stands in for it.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::peer::{Outcome, run};

const PRINT_ARGS: &str = "#!/bin/sh\nprintf '<%s>' \"$@\"\nexit 9\n";

/// A script of that content. A shell writes it, so that no other test can inherit a descriptor that is open
/// for writing, which would make the script impossible to run.
fn script(path: &Path, content: &str) {
    let status = Command::new("sh")
        .args(["-c", r#"printf %s "$1" > "$0" && chmod +x "$0""#])
        .args([path.as_os_str(), content.as_ref()])
        .status()
        .unwrap();
    assert!(status.success());
}

fn folder() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A link to the command, so that what is built beside it is not found.
fn command_in(dir: &Path) -> Command {
    let program = dir.join("balloon-ctl");
    fs::hard_link(env!("CARGO_BIN_EXE_balloon-ctl"), &program).unwrap();
    let mut command = Command::new(program);
    command.env("PATH", "/usr/bin:/bin");
    command
}

fn beside(args: &[&str]) -> Outcome {
    let dir = folder();
    script(&dir.path().join("vssd-backend"), PRINT_ARGS);
    let mut command = command_in(dir.path());
    command.args(args);
    run(command)
}

#[test]
fn options_pass_unchanged_and_the_exit_code_comes_back() {
    let outcome = beside(&[
        "pool",
        "create",
        "--nvram",
        "/dev/shm/a b:64M",
        "--ssd",
        "/dev/nvme0n1",
        "--block-size",
        "weird",
        "--name",
        "fast0",
        "--overcommit",
        "150",
        "--force",
    ]);
    assert_eq!(outcome.code, 9);
    assert_eq!(
        outcome.stdout,
        "<pool><create><--nvram></dev/shm/a b:64M><--ssd></dev/nvme0n1><--block-size><weird><--name><fast0>\
         <--overcommit><150><--force>"
    );
    assert_eq!(outcome.stderr, "");
    assert_eq!(beside(&["pool", "create", "--ssd", "f"]).stdout, "<pool><create><--ssd><f>");
}

#[test]
fn check_takes_every_medium() {
    let outcome = beside(&["pool", "check", "/dev/pmem0", "/dev/nvme0n1"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (9, "<pool><check><--></dev/pmem0></dev/nvme0n1>"));
    assert_eq!(beside(&["--json", "pool", "check", "a"]).stdout, "<pool><check><--json><--><a>");
}

#[test]
fn program_may_be_in_the_path() {
    let (dir, bin) = (folder(), folder());
    script(&bin.path().join("vssd-backend"), PRINT_ARGS);
    let mut command = command_in(dir.path());
    command.env("PATH", format!("{}:/usr/bin:/bin", bin.path().display())).args(["pool", "check", "a"]);
    let outcome = run(command);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (9, "<pool><check><--><a>"));
}

#[test]
fn program_that_is_nowhere_is_an_error() {
    let dir = folder();
    let mut command = command_in(dir.path());
    command.args(["pool", "check", "a"]);
    let outcome = run(command);
    assert_eq!(outcome.code, 1);
    assert_eq!(
        outcome.stderr,
        "error[E_LOCAL]: cannot run vssd-backend: No such file or directory (os error 2)\n"
    );
}

#[test]
fn pool_without_a_medium_is_wrong_usage() {
    for args in [&["pool", "create"][..], &["pool", "create", "--name", "x"], &["pool", "check"]] {
        assert_eq!(beside(args).code, 2, "{args:?}");
    }
}
