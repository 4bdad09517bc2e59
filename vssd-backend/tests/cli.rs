// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The daemon as a program: QEMU's back-end conventions, its configuration, its end, and media that are not what they
//! should be.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(20);

fn daemon(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vssd-backend"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(args: &[&str]) -> Output {
    let mut child = daemon(args).spawn().unwrap();
    wait(&mut child);
    child.wait_with_output().unwrap()
}

fn wait(child: &mut Child) -> i32 {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or(-1);
        }
        if started.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("the daemon did not end within {LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < LIMIT, "waited {LIMIT:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn terminate(child: &mut Child) -> i32 {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    wait(child)
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Kills what it holds when a test fails half-way.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A vhost-user request without payload, and the 64-bit answer.
fn ask(socket: &mut UnixStream, request: u32) -> u64 {
    let header: Vec<u8> = [request, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    socket.write_all(&header).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let mut answer = [0; 20];
    socket.read_exact(&mut answer).unwrap();
    u64::from_ne_bytes(answer[12..].try_into().unwrap())
}

const GET_FEATURES: u32 = 1;
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
const F_RO: u64 = 1 << 5;

#[test]
fn capabilities_are_printed_whatever_other_options_say() {
    for args in
        [&["--print-capabilities"][..], &["--print-capabilities", "--socket-path=/s", "--blk-file=/nowhere"]]
    {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0));
        let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(said, serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]}));
    }
    let discovery: serde_json::Value =
        serde_json::from_str(include_str!("../dist/50-vssd-blk.json")).unwrap();
    assert_eq!(discovery["type"], "block");
    assert!(discovery["binary"].as_str().unwrap().ends_with("/vssd-backend"));
}

#[test]
fn one_vssd_in_a_file_is_made_at_first_use_and_found_at_the_next() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (socket, file) = (dir.path().join("s.sock"), dir.path().join("disk.vssd"));
    let socket_arg = format!("--socket-path={}", socket.display());
    let file_arg = format!("--blk-file={}", file.display());

    let refused = run(&[&socket_arg, &file_arg]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(errors(&refused).contains("--size"), "{}", errors(&refused));

    for (round, extra) in [&["--size=64M"][..], &[], &["--read-only"]].iter().enumerate() {
        let mut guard = Guard(daemon(&[&[socket_arg.as_str(), &file_arg], *extra].concat()).spawn().unwrap());
        until("the socket", || socket.exists());
        let features = ask(&mut UnixStream::connect(&socket).unwrap(), GET_FEATURES);
        assert!(features & F_PROTOCOL_FEATURES != 0);
        assert_eq!(features & F_RO != 0, round == 2, "read-only is offered only when asked for");
        assert_eq!(terminate(&mut guard.0), 0, "a clean end");
        assert!(!socket.exists(), "the socket is gone with the daemon");
    }
    let check = run(&["pool", "check", file.to_str().unwrap(), "--json"]);
    assert_eq!(check.status.code(), Some(0), "{}", errors(&check));
    let said: serde_json::Value = serde_json::from_slice(&check.stdout).unwrap();
    assert_eq!((&said["clean"], &said["vssds"]), (&true.into(), &1.into()));
    assert!(said["blocks"].as_u64().unwrap() >= (64 << 20) / 65536, "the vSSD has its full size");
}

#[test]
fn an_inherited_connection_is_served_and_its_end_is_the_daemons_end() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let file_arg = format!("--blk-file={}", dir.path().join("disk").display());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let inherited = theirs.as_raw_fd();
    let mut command = daemon(&["--fd=7", &file_arg, "--size=16M"]);
    // SAFETY: dup2 is async-signal-safe, and the descriptor stays open until the child has started.
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(inherited, 7) < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let mut guard = Guard(command.spawn().unwrap());
    drop(theirs);
    assert!(ask(&mut ours, GET_FEATURES) & F_PROTOCOL_FEATURES != 0);
    drop(ours);
    assert_eq!(wait(&mut guard.0), 0);

    let refused = run(&["--fd=9", &file_arg]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(errors(&refused).contains("--fd=9"), "{}", errors(&refused));
}

#[test]
fn a_second_daemon_on_the_same_pool_is_refused() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let file_arg = format!("--blk-file={}", dir.path().join("disk").display());
    let first_socket = dir.path().join("1");
    let first = format!("--socket-path={}", first_socket.display());
    let _guard = Guard(daemon(&[&first, &file_arg, "--size=16M"]).spawn().unwrap());
    until("the socket", || first_socket.exists());
    let second = run(&[&format!("--socket-path={}", dir.path().join("2").display()), &file_arg]);
    assert_eq!(second.status.code(), Some(1));
    assert!(errors(&second).contains("lock") || errors(&second).contains("use"), "{}", errors(&second));
    let taken = run(&[&first, &format!("--blk-file={}", dir.path().join("other").display()), "--size=16M"]);
    assert!(errors(&taken).contains("another process listens"), "{}", errors(&taken));
}

#[test]
fn a_configuration_is_checked_with_place_and_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vssd.toml");
    let check = |text: &str| {
        fs::write(&path, text).unwrap();
        run(&["--config", path.to_str().unwrap(), "--check-config"])
    };
    let good = check("[pool]\nmedia = ['/dev/pmem0']\n[server]\nruntime_dir = '/run/vssd'\nworkers = 2\n");
    assert_eq!(good.status.code(), Some(0), "{}", errors(&good));
    for (bad, word) in [
        ("[pool]\nmedia = 5\n", "line 2"),
        ("[server]\nqeues = 4\n", "qeues"),
        ("[pool]\nmedia = ['/a']\n[server]\nruntime_dir = '/r'\nqueues = 1000\n", "1000 queues"),
        ("[pool\n", "line 1"),
    ] {
        let output = check(bad);
        assert_eq!(output.status.code(), Some(2), "{bad}");
        assert!(errors(&output).contains(word), "{bad}: {}", errors(&output));
    }
}

type Damage = fn(&mut Vec<u8>);

/// Whatever is wrong with a pool file: a message that names it, a non-zero exit code, and the file as it was.
#[test]
fn damaged_pool_files_are_refused_by_name_and_left_alone() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = dir.path().join("pool");
    let socket = format!("--socket-path={}", dir.path().join("s").display());
    let blk_file = format!("--blk-file={}", file.display());
    let made = run(&["pool", "create", "--nvram", &format!("{}:32M", file.display())]);
    assert_eq!(made.status.code(), Some(0), "{}", errors(&made));
    let sound = fs::read(&file).unwrap();
    let damages: [(&str, Damage); 5] = [
        ("empty", Vec::clear),
        ("truncated", |bytes| bytes.truncate(8 << 20)),
        ("not a pool", |bytes| bytes.iter_mut().for_each(|byte| *byte = 0x5a)),
        ("both superblocks", |bytes| {
            bytes[100] ^= 1;
            bytes[(512 << 10) + 100] ^= 1;
        }),
        ("both checkpoints", |bytes| bytes[1 << 20..4 << 20].fill(0xff)),
    ];
    for (damage, apply) in damages {
        let mut bytes = sound.clone();
        apply(&mut bytes);
        fs::write(&file, &bytes).unwrap();
        let output = run(&[&socket, &blk_file]);
        assert_eq!(output.status.code(), Some(1), "{damage}");
        let said = errors(&output);
        assert!(said.contains("pool") && !said.contains("panicked"), "{damage}: {said}");
        assert_ne!(run(&["pool", "check", file.to_str().unwrap()]).status.code(), Some(0), "{damage}");
        assert!(fs::read(&file).unwrap() == bytes, "{damage}: the file was changed");
    }
    // One superblock is enough.
    let mut bytes = sound;
    bytes[100] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let runtime = dir.path().join("run");
    let mut guard = Guard(
        daemon(&["--pool", file.to_str().unwrap(), "--runtime-dir", runtime.to_str().unwrap()])
            .spawn()
            .unwrap(),
    );
    until("the control socket", || runtime.join("control.sock").exists());
    assert_eq!(terminate(&mut guard.0), 0);
}

#[test]
fn the_log_is_json_if_asked_for_and_says_what_is_served() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let socket = dir.path().join("s");
    let mut guard = Guard(
        daemon(&[
            &format!("--socket-path={}", socket.display()),
            &format!("--blk-file={}", dir.path().join("disk").display()),
            "--size=16M",
            "--log-format=json",
        ])
        .spawn()
        .unwrap(),
    );
    let mut lines = BufReader::new(guard.0.stderr.take().unwrap()).lines();
    let serving = lines.by_ref().map(Result::unwrap).find(|line| line.contains("serving")).unwrap();
    let line: serde_json::Value = serde_json::from_str(&serving).unwrap();
    assert_eq!(line["level"], "INFO");
    assert_eq!(line["fields"]["device"], "disk");
    until("the socket", || Path::new(&socket).exists());
    assert_eq!(terminate(&mut guard.0), 0);
}
