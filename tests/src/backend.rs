// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disk servers as processes: our `vssd-backend`, and QEMU's storage daemon as the peer to compare it with.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::paths;
use crate::process::{self, Daemon, tail};
use crate::qemu::listening;
use crate::wait::Deadline;

/// How long a daemon may take to open its sockets: it may have a journal to replay.
const READY: Duration = Duration::from_secs(20);
/// How long it may take to end when asked.
const END: Duration = Duration::from_secs(10);

/// What the daemon logs of a system call that its sandbox refused.
pub const REFUSED: &str = "a system call was refused";

/// A daemon with the means to start it again.
#[derive(Debug)]
pub struct Backend {
    name: &'static str,
    program: PathBuf,
    args: Vec<String>,
    envs: Vec<(String, String)>,
    sockets: Vec<PathBuf>,
    log: PathBuf,
    process: Option<Daemon>,
}

impl Backend {
    /// `vssd-backend` with `args`, not started; its log goes to `log`, appended at each start.
    pub fn vssd<S: Into<String>>(args: impl IntoIterator<Item = S>, log: &Path) -> Result<Self> {
        Ok(Self::new(
            "vssd-backend",
            paths::artifact("vssd-backend", "vssd-backend")?,
            args.into_iter().map(Into::into).collect(),
            log,
        ))
    }

    /// `vssd-backend` serving the one vSSD in `file` on `socket`, the form a newcomer uses. The file is made at the
    /// first start, with `size`.
    pub fn single(socket: &Path, file: &Path, size: &str, log: &Path) -> Result<Self> {
        let args = [
            format!("--socket-path={}", socket.display()),
            format!("--blk-file={}", file.display()),
            format!("--size={size}"),
        ];
        Ok(Self::vssd(args, log)?.expect_socket(socket))
    }

    /// `vssd-backend` serving the pool on `media`, with its sockets in `runtime`.
    pub fn pool(media: &[&Path], runtime: &Path, log: &Path) -> Result<Self> {
        fs::create_dir_all(runtime)?;
        let mut args = vec![format!("--runtime-dir={}", runtime.display())];
        args.extend(media.iter().map(|medium| format!("--pool={}", medium.display())));
        Ok(Self::vssd(args, log)?.expect_socket(&control_socket(runtime)))
    }

    /// QEMU's storage daemon exporting `image` on `socket`.
    pub fn storage_daemon(socket: &Path, image: &Path, queues: u16, log: &Path) -> Result<Self> {
        let args = [
            "--blockdev".to_owned(),
            format!("driver=file,node-name=f0,filename={},discard=unmap", image.display()),
            "--blockdev".to_owned(),
            "driver=raw,node-name=d0,file=f0,discard=unmap".to_owned(),
            "--export".to_owned(),
            format!(
                "type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
                socket.display()
            ),
        ];
        let program = paths::tool("qemu-storage-daemon")?;
        Ok(Self::new("qemu-storage-daemon", program, args.to_vec(), log).expect_socket(socket))
    }

    fn new(name: &'static str, program: PathBuf, args: Vec<String>, log: &Path) -> Self {
        Self {
            name,
            program,
            args,
            envs: Vec::new(),
            sockets: Vec::new(),
            log: log.to_path_buf(),
            process: None,
        }
    }

    /// A start waits until this socket accepts connections.
    #[must_use]
    pub fn expect_socket(mut self, socket: &Path) -> Self {
        self.sockets.push(socket.to_path_buf());
        self
    }

    /// Notes every system call of the daemon in `file`, with `strace`.
    pub fn traced(mut self, file: &Path) -> Result<Self> {
        let daemon = std::mem::replace(&mut self.program, paths::tool("strace")?);
        // With -D the tracer is the grandchild, and the process that is waited for and signalled is the daemon.
        let file = file.to_string_lossy().into_owned();
        let tracer = ["-D", "-f", "-qq", "-o", &file, &daemon.to_string_lossy()].map(str::to_owned);
        self.args.splice(0..0, tracer);
        Ok(self)
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable for the daemon.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.envs.push((name.to_owned(), value.to_owned()));
        self
    }

    /// As [`Backend::start`], for the end of a chain of settings.
    pub fn started(mut self) -> Result<Self> {
        self.start()?;
        Ok(self)
    }

    /// Starts the daemon and waits for its sockets.
    pub fn start(&mut self) -> Result<()> {
        self.launch()?;
        let sockets = self.sockets.clone();
        let deadline = Deadline::after(READY);
        for socket in &sockets {
            let what = format!("{} to listen on {}", self.name, socket.display());
            let ready = deadline.until(&what, || {
                self.expect_running()?;
                listening(socket)
            });
            ready.with_context(|| self.log_tail())?;
        }
        Ok(())
    }

    /// Starts the daemon without waiting for anything: for one that is expected to refuse.
    pub fn launch(&mut self) -> Result<()> {
        if self.process.is_some() {
            bail!("{} is already running", self.name);
        }
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("open {}", self.log.display()))?;
        let mut command = Command::new(&self.program);
        command.args(&self.args);
        command.envs(self.envs.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.process = Some(Daemon::spawn(self.name, command)?);
        Ok(())
    }

    fn process(&mut self) -> Result<&mut Daemon> {
        let name = self.name;
        self.process.as_mut().with_context(|| format!("{name} is not running"))
    }

    /// The process id.
    pub fn pid(&mut self) -> Result<u32> {
        Ok(self.process()?.pid())
    }

    /// An error if it has ended by itself.
    pub fn expect_running(&mut self) -> Result<()> {
        self.process()?.expect_running()
    }

    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        self.process()?.kill()?;
        self.process = None;
        Ok(())
    }

    /// `SIGTERM`, and waits for its end.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        let status = self.process()?.terminate(END)?;
        self.process = None;
        Ok(status)
    }

    /// Waits for its end by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let status = self.process()?.wait(limit)?;
        self.process = None;
        Ok(status)
    }

    /// `SIGTERM`, wait, start.
    pub fn restart(&mut self) -> Result<()> {
        let status = self.terminate()?;
        if !status.success() {
            bail!("{} ended with {status}; {}", self.name, self.log_tail());
        }
        self.start()
    }

    /// All that it has logged.
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        format!("its log ends with:\n{}", tail(&self.log(), 20))
    }

    /// An error if it has ever logged a panic, also one that ended only a thread, or a system call that its sandbox refused.
    pub fn expect_clean_log(&self) -> Result<()> {
        let bad = ["panicked at", REFUSED];
        match self.log().lines().find(|line| bad.iter().any(|words| line.contains(words))) {
            Some(line) => bail!("{}: {line}", self.name),
            None => Ok(()),
        }
    }
}

/// The control socket of a pool daemon.
pub fn control_socket(runtime: &Path) -> PathBuf {
    runtime.join("control.sock")
}

/// `vssd-backend pool …`; gives what it printed.
pub fn pool_command(args: &[&str]) -> Result<String> {
    let program = paths::artifact("vssd-backend", "vssd-backend")?;
    process::run(Command::new(program).arg("pool").args(args))
}

/// The vhost-user socket of one vSSD of a pool daemon.
pub fn device_socket(runtime: &Path, name: &str) -> PathBuf {
    runtime.join("dev").join(format!("{name}.sock"))
}
