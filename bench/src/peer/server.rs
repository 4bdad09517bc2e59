// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The two daemons as processes, bound to a processor.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;
use vssd_tests::backend::{control_socket, device_socket, pool_command};
use vssd_tests::mock::operator::Operator;
use vssd_tests::paths;
use vssd_tests::process::{self, Daemon, tail};
use vssd_tests::qemu::listening;
use vssd_tests::wait::Deadline;

use super::Medium;
use super::qsd::{Polling, Way};
use crate::placement::{Cpu, pin_command};

const READY: Duration = Duration::from_secs(30);
const END: Duration = Duration::from_secs(20);

/// A daemon that serves vhost-user sockets.
#[derive(Debug)]
pub struct Server {
    process: Daemon,
    /// Of the disk, or of the operator if there may be several disks.
    socket: PathBuf,
    log: PathBuf,
    /// Ours must end in order. A peer that once in a while does not end at all must not cost the results of an hour.
    is_peer: bool,
}

const OURS: &str = "vssd-backend";

/// How `vssd-backend` is run.
#[derive(Clone, Copy, Debug)]
pub struct VssdOptions {
    pub build: VssdBuild,
    pub workers: usize,
    pub queues: usize,
    /// How long a worker looks for work before it sleeps.
    pub poll_us: u16,
}

/// Which `vssd-backend`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VssdBuild {
    /// The product.
    #[default]
    Product,
    /// One that does not ask its map.
    IdentityMap,
}

impl VssdBuild {
    fn program(self) -> Result<PathBuf> {
        if self == Self::Product {
            return paths::artifact("vssd-backend", "vssd-backend");
        }
        // Built once, and not while a daemon of it runs.
        static BUILT: OnceLock<PathBuf> = OnceLock::new();
        if let Some(program) = BUILT.get() {
            return Ok(program.clone());
        }
        let profile = paths::profile_dir()?;
        let target = profile.parent().context("a profile folder has a parent")?.join("identity-map");
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(paths::repo_root()).args(["build", "--quiet", "--release"]);
        cargo.args(["--package", "vssd-backend", "--features", "vssd-pool/identity-map"]);
        process::run(cargo.arg("--target-dir").arg(&target))?;
        Ok(BUILT.get_or_init(|| target.join("release/vssd-backend")).clone())
    }
}

impl Server {
    /// Starts `command` on `cpus` (anywhere if `None`) and waits until it listens on `socket`.
    fn start(
        name: &str,
        mut command: Command,
        cpu: Option<Cpu>,
        socket: PathBuf,
        log: &Path,
    ) -> Result<Self> {
        let out = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        if let Some(cpu) = cpu {
            pin_command(&mut command, cpu);
        }
        let _ = fs::remove_file(&socket);
        let process = Daemon::spawn(name, command)?;
        let mut server = Self { process, socket, log: log.to_owned(), is_peer: name != OURS };
        server.wait_ready().with_context(|| server.log_tail())?;
        Ok(server)
    }

    fn wait_ready(&mut self) -> Result<()> {
        Deadline::after(READY).until(&format!("a listener on {}", self.socket.display()), || {
            self.process.expect_running()?;
            listening(&self.socket)
        })
    }

    /// `vssd-backend` serving all vSSDs of the pool on `file`; sockets lie in `runtime`.
    pub fn vssd(file: &Path, options: VssdOptions, cpu: Option<Cpu>, runtime: &Path) -> Result<Self> {
        let mut command = Command::new(options.build.program()?);
        command.arg(format!("--runtime-dir={}", runtime.display()));
        command.arg(format!("--pool={}", file.display()));
        command.arg(format!("--workers={}", options.workers));
        command.arg(format!("--queues={}", options.queues));
        if options.poll_us > 0 {
            command.arg(format!("--poll-us={}", options.poll_us));
        }
        command.arg("--log-level=warn");
        Self::start(OURS, command, cpu, control_socket(runtime), &runtime.join("vssd.log"))
    }

    /// As [`Server::vssd`] on a new pool in `file`, with vSSDs of `bytes` and these names.
    pub fn new_vssd(
        file: &Path,
        medium: Medium,
        vssds: &[&str],
        bytes: u64,
        options: VssdOptions,
        cpu: Option<Cpu>,
        runtime: &Path,
    ) -> Result<Self> {
        let kind = match medium {
            Medium::Nvram => "--nvram",
            Medium::Ssd => "--ssd",
        };
        pool_command(&["create", kind, &file.to_string_lossy()])?;
        let server = Self::vssd(file, options, cpu, runtime)?;
        server.create(vssds.iter().copied(), bytes)?;
        Ok(server)
    }

    /// Makes vSSDs of `bytes`.
    pub fn create<'a>(&self, names: impl Iterator<Item = &'a str>, bytes: u64) -> Result<()> {
        let mut operator = Operator::connect(&self.socket)?;
        for name in names {
            operator.create(name, bytes, &json!({}))?;
        }
        Ok(())
    }

    /// The operator's socket of `vssd-backend`.
    pub fn control(&self) -> &Path {
        &self.socket
    }

    /// `qemu-storage-daemon` serving `file`: direct I/O by io_uring, one I/O thread for all queues.
    pub fn qsd(file: &Path, way: &Way, queues: usize, cpu: Option<Cpu>, runtime: &Path) -> Result<Self> {
        let socket = runtime.join("q.sock");
        let mut command = way.build.command();
        let poll = match way.polling {
            Polling::Default => "",
            Polling::Never => ",poll-max-ns=0",
        };
        command.args(["--object", &format!("iothread,id=i0{poll}")]);
        command.args([
            "--blockdev",
            &format!(
                "driver=file,node-name=f0,filename={},aio=io_uring,cache.direct=on,discard=unmap",
                file.display()
            ),
        ]);
        command.args(["--blockdev", "driver=raw,node-name=d0,file=f0"]);
        command.args([
            "--export",
            &format!(
                "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={},writable=on,\
                 num-queues={queues},iothread=i0",
                socket.display()
            ),
        ]);
        Self::start("qemu-storage-daemon", command, cpu, socket, &runtime.join("qsd.log"))
    }

    /// The vhost-user socket of a vSSD, or of the only disk.
    pub fn disk(&self, vssd: &str) -> PathBuf {
        match self.socket.parent() {
            Some(runtime) if self.socket.ends_with("control.sock") => device_socket(runtime, vssd),
            _ => self.socket.clone(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        format!("its log ends with:\n{}", tail(&log, 20))
    }

    /// Ends it in order.
    pub fn stop(mut self) -> Result<()> {
        let status = match self.process.terminate(END) {
            Err(_) if self.is_peer => return self.process.kill(),
            ended => ended?,
        };
        if !status.success() {
            bail!("the daemon ended with {status}; {}", self.log_tail());
        }
        Ok(())
    }
}
