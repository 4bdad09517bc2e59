// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest image with Debian's PostgreSQL, unpacked and never installed, and the script that serves it.

use std::process::Command;

use anyhow::{Context, Result};
use vssd_tests::apt::{self, PrivateApt};
use vssd_tests::image::{GuestImage, ImageBuilder};
use vssd_tests::kernel::Kernel;
use vssd_tests::{paths, process};

/// Server with contrib and pgbench, client programs, client library.
const PACKAGES: [&str; 3] = ["postgresql-15", "postgresql-client-15", "libpq5"];
const PROGRAMS: [&str; 5] = ["postgres", "initdb", "pg_ctl", "psql", "pgbench"];
/// What initdb and the load have the server open.
const MODULES: [&str; 3] = ["plpgsql", "dict_snowball", "pg_prewarm"];
/// Only compiled queries need these, and they are larger than all the rest.
const UNUSED: [&str; 3] = ["libllvm", "libz3", "libperl"];

/// The script's place in the guest.
pub(super) const SCRIPT: &str = "/tools/database";

/// An image and what is in it.
#[derive(Debug)]
pub(super) struct Database {
    pub(super) image: GuestImage,
    /// As PostgreSQL says it.
    pub(super) version: String,
}

impl Database {
    pub(super) fn open() -> Result<Self> {
        let root = apt::cached_tree("postgresql-15", |into| {
            let apt = PrivateApt::open()?;
            let mut packages: Vec<String> = PACKAGES.map(str::to_owned).to_vec();
            // Libraries of theirs that this machine lacks; the others are its own.
            packages.extend(apt.lacking(PACKAGES[0], apt::RELEASE)?.into_iter().filter(|package| {
                package.starts_with("lib")
                    && !package.starts_with("libpq5=")
                    && !UNUSED.iter().any(|name| package.starts_with(name))
            }));
            apt.unpack(&packages, into)
        })?;
        let mut image = ImageBuilder::small(&Kernel::debian()?)
            .kernel_module("ext4")
            .kernel_module("crc32c_generic")
            .tool("mkfs.ext4")
            .unpacked_dir(&root, "usr/share/postgresql/15")?
            .file(SCRIPT, &paths::repo_root().join("bench/src/nv_hypervisor/guest.sh"));
        for name in PROGRAMS {
            image = image.unpacked(&root, &format!("usr/lib/postgresql/15/bin/{name}"));
        }
        for name in MODULES {
            image = image.unpacked(&root, &format!("usr/lib/postgresql/15/lib/{name}.so"));
        }
        let mut postgres = Command::new(root.join("usr/lib/postgresql/15/bin/postgres"));
        let said = process::run(
            postgres.arg("--version").env("LD_LIBRARY_PATH", root.join("usr/lib/x86_64-linux-gnu")),
        )
        .context("ask PostgreSQL for its version")?;
        // postgres (PostgreSQL) 15.18 (Debian …)
        let version = said.split_once(") ").map_or(said.as_str(), |(_, rest)| rest).trim().to_owned();
        Ok(Self { image: image.build()?, version })
    }
}
