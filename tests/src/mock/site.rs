// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What most scenarios without a virtual machine begin with: a pool, a daemon that serves it, and an operator.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::driver::Driver;
use super::machine::{Machine, Options};
use super::operator::Operator;
use crate::backend::{Backend, control_socket, device_socket, pool_command};
use crate::scenario::Medium;
use crate::scratch::Scratch;

/// Bytes of a block unless a pool is made with another size.
pub const BLOCK: u64 = 64 << 10;
pub const MIB: u64 = 1 << 20;

/// A daemon with a pool of its own.
#[derive(Debug)]
pub struct Site {
    pub daemon: Backend,
    pub operator: Operator,
    pub media: PathBuf,
    runtime: PathBuf,
    scratch: Scratch,
}

fn daemon(media: &Path, runtime: &Path, log: &Path, serve: &[&str]) -> Result<Backend> {
    let daemon = Backend::pool(&[media], runtime, log)?.args(serve.iter().copied());
    Ok(daemon.env("VSSD_LOG", "debug"))
}

impl Site {
    /// A pool of `mib` MiB.
    pub fn new(medium: Medium, mib: u64) -> Result<Self> {
        Self::with(medium, mib, &[], &[])
    }

    /// As [`Site::new`], with further arguments for `pool create` and the daemon.
    pub fn with(medium: Medium, mib: u64, create: &[&str], serve: &[&str]) -> Result<Self> {
        let scratch = match medium {
            Medium::Nvram => Scratch::new()?,
            Medium::Ssd => Scratch::on_disk()?,
        };
        let media = scratch.join("pool");
        // Made beforehand, so that a large pool takes no more memory than what is written to it.
        File::create(&media)?.set_len(mib * MIB)?;
        pool_command(&[&["create", medium.option(), &media.to_string_lossy()], create].concat())?;
        let runtime = scratch.join("run");
        let daemon = daemon(&media, &runtime, &scratch.join("log"), serve)?.started()?;
        let operator = Operator::connect(&control_socket(&runtime))?;
        Ok(Self { daemon, operator, media, runtime, scratch })
    }

    pub fn control_socket(&self) -> PathBuf {
        control_socket(&self.runtime)
    }

    /// Another operator's program.
    pub fn another_operator(&self) -> Result<Operator> {
        Operator::connect(&self.control_socket())
    }

    /// The vhost-user socket of a vSSD.
    pub fn socket(&self, name: &str) -> PathBuf {
        device_socket(&self.runtime, name)
    }

    /// Makes a vSSD of `bytes` and starts a machine with it.
    pub fn machine(&mut self, name: &str, bytes: u64, options: Options) -> Result<Machine> {
        self.operator.create(name, bytes, &json!({}))?;
        Machine::start(&self.socket(name), options)
    }

    /// Makes a vSSD of `bytes` and starts a machine whose driver knows the guest channel, on queue 0.
    pub fn driver(&mut self, name: &str, bytes: u64) -> Result<(Machine, Driver)> {
        let mut machine = self.machine(name, bytes, Options::default())?;
        let driver = Driver::start(machine.take_queue(0)?)?;
        Ok((machine, driver))
    }

    /// `kill -9`, and a new daemon on the same pool.
    pub fn kill_and_restart(&mut self) -> Result<()> {
        self.daemon.kill()?;
        self.revive()
    }

    /// Ends the daemon in order and starts another on the same pool with other arguments.
    pub fn restart_with(&mut self, serve: &[&str]) -> Result<()> {
        let status = self.daemon.terminate()?;
        ensure!(status.success(), "the daemon ended with {status}");
        self.daemon = daemon(&self.media, &self.runtime, &self.scratch.join("log"), serve)?;
        self.revive()
    }

    /// Starts the daemon again after it ended.
    pub fn revive(&mut self) -> Result<()> {
        self.daemon.start()?;
        self.operator = self.another_operator()?;
        Ok(())
    }

    /// Open descriptors of the daemon.
    pub fn descriptors(&mut self) -> Result<usize> {
        let dir = PathBuf::from(format!("/proc/{}/fd", self.daemon.pid()?));
        Ok(fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))?.count())
    }

    /// Processor time that the daemon has used, in ticks of 10 ms.
    pub fn cpu_ticks(&mut self) -> Result<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.daemon.pid()?))?;
        let (_, rest) = stat.rsplit_once(')').context("stat has no name")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |at: usize| -> Result<u64> { Ok(fields.get(at).context("stat is short")?.parse()?) };
        Ok(field(11)? + field(12)?)
    }

    /// Ends the daemon in order and checks its pool: sound, nothing owned twice, nothing lost.
    pub fn finish(mut self) -> Result<()> {
        let status = self.daemon.terminate()?;
        ensure!(status.success(), "the daemon ended with {status}");
        self.daemon.expect_clean_log()?;
        let media = self.media.to_string_lossy();
        let verdict = pool_command(&["check", &media])?;
        ensure!(verdict.contains("the pool is sound"), "{verdict}");
        Ok(())
    }
}
