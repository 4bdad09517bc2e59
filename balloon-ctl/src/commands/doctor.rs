// SPDX-License-Identifier: Apache-2.0 OR MIT

//! `doctor`: looks for what goes wrong first. Facts are gathered by small functions that touch the host, and
//! judged by pure ones.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use control_client::{Answer, Client, Error, Failure, Program, Session, has_colour, printable};
use serde::Serialize;
use serde_json::{Value, json};
use vssd_protocol::control::{
    DeviceInfo, DeviceList, DeviceState, DriverKind, PoolStatus, SCHEMA, ServerInfo, method,
};

use super::device::frontend;
use crate::error::{CtlError, Result};

/// Below this, registering I/O buffers of several queues may fail.
const MEMLOCK_WANTED: u64 = 64 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Check {
    check: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    status: Status,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Check {
    fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self { check, device: None, status: Status::Ok, message: message.into(), hint: None }
    }

    fn warn(check: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status: Status::Warn, hint: Some(hint.into()), ..Self::ok(check, message) }
    }

    fn fail(check: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status: Status::Fail, hint: Some(hint.into()), ..Self::ok(check, message) }
    }

    fn of(self, device: &DeviceInfo) -> Self {
        Self { device: Some(device.name.clone()), ..self }
    }
}

pub(crate) fn run(session: &Session) -> Result<()> {
    let mut checks = Vec::new();
    let daemon = check_daemon(session, &mut checks);
    checks.push(judge_kvm(File::options().read(true).write(true).open("/dev/kvm").map(drop)));
    // Only SSD media need these two; a pool that nobody can ask about may have one.
    if daemon.has_ssd {
        checks.push(judge_io_uring(fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok().as_deref()));
        checks.push(check_memlock(daemon.pid));
    }
    report(session, &checks)
}

/// What the checks of the host have to know of the daemon.
#[derive(Debug)]
struct Daemon {
    pid: Option<u32>,
    has_ssd: bool,
}

/// All that the daemon can tell, if it answers.
fn check_daemon(session: &Session, checks: &mut Vec<Check>) -> Daemon {
    let unknown = Daemon { pid: None, has_ssd: true };
    let mut client = match session.connect() {
        Ok(client) => client,
        Err(err) => {
            checks.push(judge_unreachable(session.program, &err));
            return unknown;
        }
    };
    let info = match client.hello::<ServerInfo>() {
        Ok(answer) => answer.typed,
        Err(err) => {
            checks.push(judge_unreachable(session.program, &err));
            return unknown;
        }
    };
    let mut daemon = Daemon { pid: Some(info.pid), ..unknown };
    checks.push(judge_socket(&session.socket, &info, fs::metadata(&session.socket).ok().as_ref()));
    match client.call::<PoolStatus>(method::POOL_STATUS, &json!({})) {
        Ok(Answer { typed: pool, .. }) => {
            daemon.has_ssd = pool.media.iter().any(|medium| medium.kind == "ssd");
            checks.push(judge_pool(&pool));
        }
        Err(err) => checks.push(judge_refusal("pool", session.program, &err)),
    }
    check_devices(session.program, &mut client, checks);
    daemon
}

fn check_devices(program: &Program, client: &mut Client, checks: &mut Vec<Check>) {
    let devices: Answer<DeviceList> = match client.call(method::DEVICE_LIST, &json!({})) {
        Ok(devices) => devices,
        Err(err) => {
            checks.push(judge_refusal("devices", program, &err));
            return;
        }
    };
    let mut devices = devices.typed.devices;
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    for device in &devices {
        checks.extend(
            judge_device_socket(device, fs::metadata(&device.socket_path)).map(|check| check.of(device)),
        );
        checks.push(judge_frontend(device).of(device));
        checks.extend(judge_driver(device).map(|check| check.of(device)));
    }
}

fn judge_unreachable(program: &Program, err: &Error) -> Check {
    Check { hint: err.hint(program), ..Check::fail("socket", err.to_string(), "") }
}

fn judge_refusal(check: &'static str, program: &Program, err: &Error) -> Check {
    Check::fail(check, err.to_string(), err.hint(program).unwrap_or_default())
}

fn judge_socket(path: &Path, info: &ServerInfo, metadata: Option<&fs::Metadata>) -> Check {
    let message =
        format!("{} {} answers on the {} socket {}", info.server, info.version, info.socket, path.display());
    let is_open_to_all =
        info.socket == "control" && metadata.is_some_and(|metadata| metadata.mode() & 0o002 != 0);
    if info.schema != SCHEMA {
        let hint = "install balloon-ctl and vssd-backend of the same version";
        Check::warn("socket", format!("{message}, but speaks {} instead of {SCHEMA}", info.schema), hint)
    } else if is_open_to_all {
        let hint = "chmod o-w it; the monitor socket is the one for everybody";
        Check::warn("socket", format!("{message}, and every user may change vSSDs"), hint)
    } else {
        Check::ok("socket", message)
    }
}

fn judge_pool(pool: &PoolStatus) -> Check {
    let percent = pool.free_bytes.saturating_mul(100).checked_div(pool.size_bytes).unwrap_or(0);
    let message = format!("pool {} is {}, {percent} % free", pool.name, pool.health);
    match pool.health.as_str() {
        "ok" => Check::ok("pool", message),
        "low" => Check::warn("pool", message, "shrink a vSSD (balloon-ctl shrink) or delete one"),
        _ => {
            let unknown = "a medium failed: see the daemon's log, then balloon-ctl pool check";
            Check::fail("pool", message, pool.problem.as_deref().unwrap_or(unknown))
        }
    }
}

/// Nothing to say about a socket that this user cannot see: that is for the front-end's user.
fn judge_device_socket(device: &DeviceInfo, metadata: io::Result<fs::Metadata>) -> Option<Check> {
    let path = &device.socket_path;
    match metadata {
        Ok(metadata) if metadata.file_type().is_socket() => None,
        Ok(_) => Some(Check::fail("vssd-socket", format!("{path} is no socket"), "restart vssd-backend")),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Some(Check::fail(
            "vssd-socket",
            format!("{path} does not exist: no front-end can connect"),
            "something removed it; restart vssd-backend",
        )),
        Err(_) => None,
    }
}

fn judge_frontend(device: &DeviceInfo) -> Check {
    let name = &device.name;
    if !device.frontend.connected {
        let hint = format!("balloon-ctl attach-info {name} --for qemu");
        Check::warn("frontend", "no virtual machine is connected", hint)
    } else if device.frontend.queues == 0 {
        Check::warn(
            "frontend",
            "a front-end is connected but runs no queue",
            format!(
                "the guest has not started its driver, or its RAM is not shared (share=on, shared=on): \
                 balloon-ctl attach-info {name} shows how"
            ),
        )
    } else {
        Check::ok("frontend", format!("connected ({}), guest RAM is shared", frontend(device)))
    }
}

/// A guest's driver can only be judged once a front-end runs queues.
fn judge_driver(device: &DeviceInfo) -> Option<Check> {
    if device.state == DeviceState::Failed {
        return Some(Check::fail(
            "driver",
            "the vSSD failed: its medium gives errors",
            "see the daemon's log",
        ));
    }
    if !device.frontend.connected || device.frontend.queues == 0 {
        return None;
    }
    Some(match device.driver.kind {
        _ if device.state == DeviceState::Uncooperative => Check::warn(
            "driver",
            "the guest does not move towards the size it was asked for",
            format!("balloon-ctl limits {} --on-timeout decides what a deadline does", device.name),
        ),
        DriverKind::Vssd => Check::ok(
            "driver",
            format!("{} negotiates", device.driver.name.as_deref().unwrap_or("the vssd driver")),
        ),
        DriverKind::Stock => Check::warn(
            "driver",
            "the guest uses a driver that cannot negotiate: it can grow, and shrinks only at its empty end",
            "load vssd.ko in the guest and bind the disk to it (vssd-bind)",
        ),
        DriverKind::None => Check::warn(
            "driver",
            "no driver runs in the guest yet",
            "look at the guest's console: has it booted?",
        ),
    })
}

fn judge_kvm(opened: io::Result<()>) -> Check {
    match opened.map_err(|err| (err.kind(), err)) {
        Ok(()) => Check::ok("kvm", "/dev/kvm can be opened"),
        Err((io::ErrorKind::NotFound, _)) => Check::warn(
            "kvm",
            "there is no /dev/kvm: guests run without hardware help, slowly",
            "load kvm-intel or kvm-amd, and allow virtualization in the firmware",
        ),
        Err((io::ErrorKind::PermissionDenied, _)) => Check::warn(
            "kvm",
            "/dev/kvm may not be opened by this user",
            "add the user who runs the virtual machine monitor to the group kvm",
        ),
        Err((_, err)) => {
            Check::warn("kvm", format!("/dev/kvm: {err}"), "guests run without hardware help, slowly")
        }
    }
}

/// `setting` is the content of `kernel.io_uring_disabled`; kernels before 6.6 have none.
fn judge_io_uring(setting: Option<&str>) -> Check {
    match setting.map(str::trim) {
        None | Some("0") => Check::ok("io_uring", "io_uring is allowed"),
        Some("1") => Check::warn(
            "io_uring",
            "only privileged processes and one group may use io_uring",
            "see kernel.io_uring_group; SSD media need io_uring",
        ),
        Some(other) => Check::fail(
            "io_uring",
            format!("io_uring is switched off (kernel.io_uring_disabled = {other}): SSD media cannot work"),
            "sysctl kernel.io_uring_disabled=0",
        ),
    }
}

/// The limit that counts is the daemon's own; this process's stands in for a daemon that does not run.
fn check_memlock(daemon_pid: Option<u32>) -> Check {
    let daemon = daemon_pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/limits")).ok());
    let (whose, limits) = match daemon {
        Some(limits) => ("the daemon", limits),
        None => ("this user", fs::read_to_string("/proc/self/limits").unwrap_or_default()),
    };
    judge_memlock(whose, &limits)
}

fn judge_memlock(whose: &str, limits: &str) -> Check {
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))
        .and_then(|rest| rest.split_whitespace().next());
    match soft {
        Some("unlimited") => Check::ok("memlock", format!("{whose} may lock any amount of memory")),
        Some(text) => match text.parse::<u64>() {
            Ok(bytes) if bytes >= MEMLOCK_WANTED => {
                Check::ok("memlock", format!("{whose} may lock {}", vssd_protocol::units::ByteCount(bytes)))
            }
            Ok(bytes) => Check::warn(
                "memlock",
                format!("{whose} may lock only {} of memory", vssd_protocol::units::ByteCount(bytes)),
                "raise it (LimitMEMLOCK= of the unit, ulimit -l) if the daemon cannot register its I/O buffers",
            ),
            Err(_) => Check::warn("memlock", format!("{whose} has a limit of {text}"), "look at ulimit -l"),
        },
        None => Check::warn(
            "memlock",
            format!("the memory lock limit of {whose} is not known"),
            "look at ulimit -l",
        ),
    }
}

fn report(session: &Session, checks: &[Check]) -> Result<()> {
    let out = &session.out;
    let failed = checks.iter().filter(|check| check.status == Status::Fail).count();
    if out.json {
        let checks: Vec<Value> = checks.iter().map(|check| json!(check)).collect();
        out.object([("healthy", (failed == 0).into()), ("checks", Value::Array(checks))])?;
    } else {
        let is_coloured = has_colour(&io::stdout());
        for check in checks {
            if !(out.quiet && check.status == Status::Ok) {
                out.text(&describe(check, is_coloured))?;
            }
        }
    }
    if failed == 0 { Ok(()) } else { Err(CtlError::Unhealthy { failed, checks: checks.len() }) }
}

fn describe(check: &Check, is_coloured: bool) -> String {
    let (label, colour) = match check.status {
        Status::Ok => ("OK  ", "\x1b[32m"),
        Status::Warn => ("WARN", "\x1b[33m"),
        Status::Fail => ("FAIL", "\x1b[1;31m"),
    };
    let (colour, plain) = if is_coloured { (colour, "\x1b[0m") } else { ("", "") };
    let subject = match &check.device {
        Some(device) => format!("{device} {}", check.check),
        None => check.check.to_owned(),
    };
    let mut text = format!("{colour}{label}{plain}  {}", printable(&format!("{subject}: {}", check.message)));
    if let Some(hint) = check.hint.as_deref().filter(|hint| !hint.is_empty()) {
        text.push_str(&format!("\n      hint: {}", printable(hint)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_is_judged_by_how_it_opens() {
        assert_eq!(judge_kvm(Ok(())).status, Status::Ok);
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied, io::ErrorKind::Other] {
            let check = judge_kvm(Err(kind.into()));
            assert_eq!(check.status, Status::Warn, "{kind}");
            assert!(check.hint.is_some(), "{kind}");
        }
    }

    #[test]
    fn io_uring_setting_decides() {
        for (setting, status) in [
            (None, Status::Ok),
            (Some("0\n"), Status::Ok),
            (Some("1\n"), Status::Warn),
            (Some("2\n"), Status::Fail),
        ] {
            assert_eq!(judge_io_uring(setting).status, status, "{setting:?}");
        }
    }

    #[test]
    fn memlock_is_read_from_the_limits_table() {
        let limits = |soft: &str| {
            format!(
                "Limit                     Soft Limit           Hard Limit           Units\nMax locked memory         {soft}  x  bytes\n"
            )
        };
        assert_eq!(judge_memlock("the daemon", &limits("unlimited")).status, Status::Ok);
        assert_eq!(judge_memlock("the daemon", &limits("67108864")).status, Status::Ok);
        let low = judge_memlock("the daemon", &limits("8388608"));
        assert_eq!(
            (low.status, low.message.as_str()),
            (Status::Warn, "the daemon may lock only 8 MiB of memory")
        );
        assert_eq!(judge_memlock("the daemon", "").status, Status::Warn);
    }

    #[test]
    fn lines_carry_status_subject_and_hint() {
        let check = Check::warn("frontend", "nobody\x1b is there", "start one");
        let check = Check { device: Some("vm1".to_owned()), ..check };
        assert_eq!(
            describe(&check, false),
            "WARN  vm1 frontend: nobody\u{fffd} is there\n      hint: start one"
        );
        assert!(describe(&check, true).starts_with("\x1b[33mWARN\x1b[0m  vm1"));
    }
}
