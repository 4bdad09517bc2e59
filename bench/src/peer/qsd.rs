// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which storage daemons there are to compare with: Debian's own and the one of its backports, unpacked and not installed.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use vssd_tests::apt::{self, PrivateApt};
use vssd_tests::{paths, process};

/// How the storage daemon waits for work: its `poll-max-ns`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polling {
    Default,
    Never,
}

/// A program that can be run.
#[derive(Clone, Debug)]
pub struct Build {
    program: PathBuf,
    libraries: Option<PathBuf>,
    /// `7.2.22`.
    pub version: String,
}

impl Build {
    fn probe(program: PathBuf, libraries: Option<PathBuf>) -> Result<Self> {
        let mut build = Self { program, libraries, version: String::new() };
        let said = process::run(build.command().arg("--version"))?;
        let version = said.split_whitespace().nth(2).with_context(|| format!("no version in {said:?}"))?;
        version.clone_into(&mut build.version);
        Ok(build)
    }

    /// A command that runs it.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries).env("QEMU_MODULE_DIR", libraries.join("qemu"));
        }
        command
    }
}

fn backports() -> Result<Build> {
    let root = apt::cached_tree("qemu-utils-backports", |into| {
        let apt = PrivateApt::open()?;
        // What else would be installed are machines and firmware.
        let is_needed =
            |package: &String| !package.starts_with("qemu-system") && !package.starts_with("seabios");
        let packages = apt.missing_closure("qemu-utils", apt::BACKPORTS)?;
        apt.unpack(&packages.into_iter().filter(is_needed).collect::<Vec<_>>(), into)
    })?;
    Build::probe(root.join("usr/bin/qemu-storage-daemon"), Some(root.join("usr/lib/x86_64-linux-gnu")))
}

/// All that this machine has or can get.
pub fn builds() -> Result<Vec<Build>> {
    let mut builds = vec![Build::probe(paths::tool("qemu-storage-daemon")?, None)?];
    match backports() {
        Ok(newer) if newer.version != builds[0].version => builds.push(newer),
        Ok(_) => {}
        Err(error) => eprintln!("no newer qemu-storage-daemon to compare with: {error:#}"),
    }
    Ok(builds)
}

/// One way to run it.
#[derive(Clone, Debug)]
pub struct Way {
    pub build: Build,
    pub polling: Polling,
}

impl Way {
    /// In words.
    pub fn name(&self) -> String {
        let polling = match self.polling {
            Polling::Default => "default polling",
            Polling::Never => "poll-max-ns=0",
        };
        format!("version {} with {polling}", self.build.version)
    }
}
