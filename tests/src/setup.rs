// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What must be installed on a Debian 12 machine that has cargo and gcc, and nothing else.
//!
//! This is the only list of system packages. Kernels, kernel headers, busybox, QEMU's guest agent and the second QEMU are not in it:
//! they are unpacked into the cache ([`crate::kernel`], [`crate::image`], [`crate::qemu`]) and never become part of the system.

use std::io::{IsTerminal, stdin};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{paths, process};

struct Need {
    package: &'static str,
    /// An executable's name, or an absolute path: its presence proves the package.
    proof: &'static str,
}

const fn need(package: &'static str, proof: &'static str) -> Need {
    Need { package, proof }
}

const NEEDS: &[Need] = &[
    need("qemu-system-x86", "qemu-system-x86_64"),
    need("qemu-system-common", "qemu-storage-daemon"),
    need("fio", "fio"),
    need("strace", "strace"),
    // QEMU's guest agent is linked with these.
    need("libglib2.0-0", "/usr/lib/x86_64-linux-gnu/libglib-2.0.so.0"),
    need("liburing2", "/usr/lib/x86_64-linux-gnu/liburing.so.2"),
    need("libnuma1", "/usr/lib/x86_64-linux-gnu/libnuma.so.1"),
    need("e2fsprogs", "mkfs.ext4"),
    need("fdisk", "sfdisk"),
    need("dmsetup", "dmsetup"),
    need("xfsprogs", "mkfs.xfs"),
    need("kmod", "depmod"),
    need("systemd", "/lib/systemd/systemd"),
    // The UPS server, its driver for tests and its command; a message bus.
    need("nut-server", "/lib/nut/dummy-ups"),
    need("nut-client", "upsc"),
    need("dbus-daemon", "dbus-daemon"),
    // The system bus's units and configuration, for guests.
    need("dbus", "/lib/systemd/system/dbus.socket"),
    need("make", "make"),
    need("gcc-12", "gcc-12"),
    need("binutils", "strip"),
    // The fuzz targets' engine is C++.
    need("g++", "c++"),
    need("xz-utils", "xz"),
    // The kernel's W=1 also checks comments, with a perl script.
    need("perl", "pod2usage"),
    // objtool, part of the unpacked kernel build tools, is linked with it.
    need("libelf1", "/usr/lib/x86_64-linux-gnu/libelf.so.1"),
];

/// The packages that are not there.
pub fn missing() -> Vec<&'static str> {
    NEEDS
        .iter()
        .filter(|need| {
            if need.proof.starts_with('/') {
                !Path::new(need.proof).exists()
            } else {
                paths::find_tool(need.proof).is_none()
            }
        })
        .map(|need| need.package)
        .collect()
}

/// Installs what is missing; without the right to do so, says what to install.
pub fn ensure() -> Result<()> {
    if cfg!(not(target_arch = "x86_64")) {
        bail!("the guests of these tests are x86-64 machines and need an x86-64 host");
    }
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    if paths::find_tool("apt-get").is_none() {
        bail!(
            "this is not a Debian machine; the counterparts of these packages are needed: {}",
            missing.join(" ")
        );
    }
    let known = missing.iter().all(|package| has_candidate(package));
    let line = format!(
        "{}apt-get install --yes --no-install-recommends {}",
        if known { "" } else { "apt-get update && " },
        missing.join(" ")
    );
    let Some(root) = root_prefix() else {
        bail!("packages are missing and this user may not install them; run as root:\n  {line}");
    };
    eprintln!("installing: {}", missing.join(" "));
    let apt = |args: &[&str]| -> Result<()> {
        let mut command = match root {
            [] => Command::new("apt-get"),
            [program, rest @ ..] => {
                let mut command = Command::new(program);
                command.args(rest).args(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
                command
            }
        };
        command.env("DEBIAN_FRONTEND", "noninteractive").args(args);
        if stdin().is_terminal() {
            // sudo may ask for a password.
            let status = command.status().context("start apt-get")?;
            if !status.success() {
                bail!("`{}` ended with {status}", process::describe(&command));
            }
            return Ok(());
        }
        process::run(&mut command).map(drop)
    };
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(&missing);
    if !known || apt(&install).is_err() {
        // No lists yet (a fresh container), or lists older than the mirror.
        apt(&["update", "-q"])?;
        apt(&install).with_context(|| format!("to do this by hand, run as root:\n  {line}"))?;
    }
    match self::missing().as_slice() {
        [] => Ok(()),
        still => bail!("installed, but still not found: {}", still.join(" ")),
    }
}

fn has_candidate(package: &str) -> bool {
    process::run(Command::new("apt-cache").env("LC_ALL", "C").args(["policy", package])).is_ok_and(|text| {
        text.lines().any(|line| line.trim().starts_with("Candidate:") && !line.contains("(none)"))
    })
}

/// How to become root: not at all, through sudo, or (`None`) impossible.
fn root_prefix() -> Option<&'static [&'static str]> {
    if rustix::process::geteuid().is_root() {
        return Some(&[]);
    }
    paths::find_tool("sudo")?;
    let silent = Command::new("sudo")
        .args(["-n", "true"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if silent {
        Some(&["sudo", "-n"])
    } else if stdin().is_terminal() {
        Some(&["sudo"])
    } else {
        None
    }
}
