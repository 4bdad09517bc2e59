// SPDX-License-Identifier: Apache-2.0 OR MIT
#![allow(clippy::unwrap_used, reason = "a test ends at what it does not expect")]

//! What a thread cannot do inside the daemon's own sandbox. Each attempt runs in a process of its own, this program again,
//! which confines itself through the library as the daemon does and then tries.

use std::io::Error;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::ptr;

use vssd_backend::sandbox::{self, Files, Sandbox, Thread, refusals};

const ATTEMPT: &str = "VSSD_SANDBOX_ATTEMPT";
/// Before the number of refusals that were counted.
const COUNTED: &str = "counted: ";
/// Exit codes of an attempt, besides errno.
const SUCCEEDED: i32 = 200;

/// What became of an attempt.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Errno(i32),
    Succeeded,
    Killed(i32),
}

fn outcome(of: libc::c_long) -> i32 {
    if of < 0 { Error::last_os_error().raw_os_error().unwrap() } else { SUCCEEDED }
}

/// Carries out one attempt. The calls are made raw: it is the kernel that must refuse them.
fn attempt(what: &str) -> i32 {
    let null = c"/dev/null".as_ptr();
    let none: *const libc::c_char = ptr::null();
    let page = 4096usize;
    // SAFETY: every pointer is to a constant of this function or null where the call allows it; nothing that is mapped is used.
    unsafe {
        match what {
            "open" => outcome(libc::syscall(libc::SYS_openat, libc::AT_FDCWD, null, libc::O_RDWR)),
            "exec" => outcome(libc::syscall(
                libc::SYS_execve,
                c"/bin/true".as_ptr(),
                &raw const none,
                &raw const none,
            )),
            "ptrace" => outcome(libc::syscall(libc::SYS_ptrace, libc::PTRACE_TRACEME, 0, 0, 0)),
            "unix socket" => outcome(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0).into()),
            "inet socket" => outcome(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0).into()),
            "netlink socket" => outcome(libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0).into()),
            "fork" => outcome(libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)),
            "clone3" => outcome(libc::syscall(libc::SYS_clone3, ptr::null::<u8>(), 0)),
            "thread" => std::thread::Builder::new()
                .spawn(|| ())
                .map_or_else(|e| e.raw_os_error().unwrap(), |_| SUCCEEDED),
            "executable memory" => {
                let prot = libc::PROT_READ | libc::PROT_EXEC;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                outcome(libc::mmap(ptr::null_mut(), page, prot, flags, -1, 0) as libc::c_long)
            }
            "memory" => {
                let prot = libc::PROT_READ | libc::PROT_WRITE;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                outcome(libc::mmap(ptr::null_mut(), page, prot, flags, -1, 0) as libc::c_long)
            }
            "memory made executable" => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let at = libc::mmap(ptr::null_mut(), page, libc::PROT_READ, flags, -1, 0);
                outcome(libc::mprotect(at, page, libc::PROT_READ | libc::PROT_EXEC).into())
            }
            "ioctl" => outcome(libc::ioctl(2, libc::TCGETS, ptr::null_mut::<u8>()).into()),
            "kill another" => outcome(libc::kill(1, 0).into()),
            "ring" => outcome(libc::syscall(libc::SYS_io_uring_setup, 1, ptr::null_mut::<u8>())),
            "rename" => outcome(libc::rename(null, null).into()),
            "unlink" => outcome(libc::unlink(c"/nonexistent".as_ptr()).into()),
            "setuid" => outcome(libc::syscall(libc::SYS_setuid, 1)),
            "mount" => outcome(libc::syscall(libc::SYS_mount, none, none, none, 0, none)),
            "bpf" => outcome(libc::syscall(libc::SYS_bpf, 0, none, 0)),
            other => panic!("no attempt {other:?}"),
        }
    }
}

/// Carries an attempt out as a thread of the given kind, or as one of a process that has only been prepared.
fn carry_out(place: &str, what: &str) -> i32 {
    sandbox::prepare(&Files::default()).unwrap();
    let Some(kind) = Thread::ALL.into_iter().find(|kind| kind.name() == place) else {
        return attempt(what);
    };
    let (sandbox, _refusals) = Sandbox::new().unwrap();
    let what = what.to_owned();
    // The other threads stay free, to end the process.
    let body = move || {
        sandbox.enter(kind).unwrap();
        attempt(&what)
    };
    std::thread::spawn(body).join().unwrap()
}

/// Not a test of its own: the inside of one.
#[test]
#[ignore = "run by the others, in a process of its own"]
fn inside() {
    let Ok(text) = std::env::var(ATTEMPT) else { return };
    let (place, what) = text.split_once(':').unwrap();
    let status = std::panic::catch_unwind(|| carry_out(place, what));
    eprintln!("{COUNTED}{}", refusals::count());
    // SAFETY: ends the process at once; nothing of it is needed any more.
    unsafe { libc::_exit(status.unwrap_or(201)) };
}

/// What became of it, and how many refusals were counted.
fn tried(place: &str, what: &str) -> (Outcome, u64) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "inside", "--ignored", "--nocapture"]).env(ATTEMPT, format!("{place}:{what}"));
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let counted = text.lines().find_map(|line| line.strip_prefix(COUNTED)).map_or(0, |n| n.parse().unwrap());
    match (output.status.code(), output.status.signal()) {
        (Some(SUCCEEDED), _) => (Outcome::Succeeded, counted),
        (Some(code), _) if code < SUCCEEDED => (Outcome::Errno(code), counted),
        (_, Some(signal)) => (Outcome::Killed(signal), counted),
        _ => panic!("{place}: {what}: {text}"),
    }
}

#[test]
fn opening_executing_tracing_and_sockets_fail_in_every_kind_of_thread() {
    let refused = Outcome::Errno(libc::EPERM);
    let killed = Outcome::Killed(libc::SIGSYS);
    let mut count = 0;
    let mut expect = |place: &str, what: &str, outcome: &Outcome, counted: u64| {
        let seen = tried(place, what);
        assert_eq!((&seen.0, seen.1), (outcome, counted), "{place}: {what}");
        count += 1;
    };
    for kind in Thread::ALL {
        let place = kind.name();
        for what in ["exec", "ptrace", "mount", "bpf"] {
            expect(place, what, &killed, 0);
        }
        for what in [
            "open",
            "inet socket",
            "netlink socket",
            "executable memory",
            "memory made executable",
            "ioctl",
            "kill another",
            "ring",
            "rename",
            "setuid",
        ] {
            expect(place, what, &refused, 1);
        }
        // What it lives on goes on.
        expect(place, "memory", &Outcome::Succeeded, 0);
        // Sockets of new vSSDs are made by the control loop, and threads by the nursery, at run time.
        if kind == Thread::Control {
            expect(place, "unix socket", &Outcome::Succeeded, 0);
        } else {
            expect(place, "unix socket", &refused, 1);
            expect(place, "unlink", &refused, 1);
        }
        if kind == Thread::Nursery {
            expect(place, "thread", &Outcome::Succeeded, 0);
            expect(place, "clone3", &Outcome::Errno(libc::ENOSYS), 0);
            expect(place, "fork", &refused, 1);
        } else {
            for what in ["thread", "clone3", "fork"] {
                expect(place, what, &refused, 0);
            }
        }
    }
    // Before the filters it is Landlock that says no to files that are not the daemon's.
    expect("files", "open", &Outcome::Errno(libc::EACCES), 0);
    expect("files", "rename", &Outcome::Errno(libc::EACCES), 0);
    println!("{count} attempts in {} kinds of threads", Thread::ALL.len());
}

#[test]
fn lists_of_calls_stay_short() {
    for kind in Thread::ALL {
        println!("{}: {} calls", kind.name(), kind.allowed_calls());
        assert!(kind.allowed_calls() <= 40, "{}", kind.name());
    }
}
