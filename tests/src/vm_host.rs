// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vm-host` as a process, with all that is durable of it in one folder: killed, restarted, put back to what it was.
//!
//! ```text
//! SCRATCH/live/nv     NV-RAM              ┐ what survives a power cut: kept and put back as a whole
//! SCRATCH/live/state  records and images  ┘
//! SCRATCH/live/run    sockets
//! SCRATCH/kept/NAME   copies of nv and state
//! ```

use std::fmt::Display;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::image::GuestImage;
use crate::paths;
use crate::process::{self, Daemon};
use crate::scratch::Scratch;
use crate::wait::Deadline;
use crate::wire::PORT_NAME;

/// A guest's process that counts, in `/tmp/count`.
pub const COUNT: &str = "(i=0; while :; do i=$((i+1)); echo $i > /tmp/new; mv /tmp/new /tmp/count; sleep 0.1; done) \
                         </dev/null >/dev/null 2>&1 &";

/// What must be found in a guest: data in its memory, and how far it has counted.
#[derive(Debug, Default)]
pub struct Mark {
    sum: String,
    count: u64,
}

impl Mark {
    /// Gives a guest data, has it count, and looks.
    pub fn make(host: &VmHost, vm: &str) -> Result<Self> {
        host.run(vm, COUNT)?;
        host.run(vm, "head -c 4194304 /dev/urandom > /tmp/data && test -s /tmp/data")?;
        host.run(vm, "while ! test -s /tmp/count; do sleep 0.1; done")?;
        Self::look(host, vm)
    }

    fn look(host: &VmHost, vm: &str) -> Result<Self> {
        let said = host.run(vm, "md5sum < /tmp/data; cat /tmp/count")?;
        let (sum, count) = said.split_once('\n').with_context(|| format!("the guest said {said:?}"))?;
        Ok(Self { sum: sum.to_owned(), count: count.trim().parse()? })
    }

    /// That the guest has gone on from here or later; gives where it is now.
    pub fn check(&self, host: &VmHost, vm: &str) -> Result<Self> {
        let now = Self::look(host, vm)?;
        ensure!(now.sum == self.sum, "the memory of {vm} has changed: {now:?} after {self:?}");
        ensure!(now.count >= self.count, "time went backwards in {vm}: {now:?} after {self:?}");
        Ok(now)
    }
}

/// Items of `extra` in a VM's definition: the port of the guest's agent, on a socket of the host.
pub fn agent_port(socket: impl Display) -> String {
    format!(
        "'-device', 'virtio-serial-pci,id=vser', '-chardev', 'socket,id=agent0,path={socket},server=on,wait=off', \
         '-device', 'virtserialport,bus=vser.0,chardev=agent0,name={PORT_NAME}'"
    )
}

/// A FIFO that stands for a line of the power supply.
const POWER_GOOD: &str = "power-good";
/// What survives a power cut.
const DURABLE: [&str; 2] = ["nv", "state"];
/// QEMU is emulated code beside other tests.
const LIMIT: Duration = Duration::from_secs(60);

/// A daemon and its machines.
#[derive(Debug)]
pub struct VmHost {
    scratch: Scratch,
    daemon: Option<Daemon>,
}

/// The end of a command of an operator: its exit code, and what it printed as JSON.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub json: Value,
}

impl Said {
    /// The code of its error, `E_…`.
    pub fn error(&self) -> &str {
        self.json["error"]["code"].as_str().unwrap_or_default()
    }
}

impl VmHost {
    pub fn new() -> Result<Self> {
        Self::with("")
    }

    /// With more tables for its configuration, in which `LIVE` stands for [`VmHost::live`].
    pub fn with(more: &str) -> Result<Self> {
        let host = Self { scratch: Scratch::new()?, daemon: None };
        for dir in ["live/nv", "live/state", "live/run", "live/log", "kept"] {
            fs::create_dir_all(host.scratch.join(dir))?;
        }
        let live = host.live().display().to_string();
        mkfifoat(CWD, host.live().join(POWER_GOOD), Mode::RUSR | Mode::WUSR)?;
        let config = format!(
            "state_dir = '{live}/state'\nruntime_dir = '{live}/run'\nlog_dir = '{live}/log'\n\
             [power]\ndisarm_after_ms = 100\nresume_after_ms = 100\n\
             [[power.source]]\nkind = 'edge'\nname = 'power-good'\npath = '{live}/{POWER_GOOD}'\nlow = 'critical'\n\
             [vssd]\nruntime_dir = '{live}/vssd'\n\
             [[nvram]]\nname = 'nv0'\npath = '{live}/nv'\ndeclared_persistent = true\n"
        );
        let more = more.replace("LIVE", &live);
        fs::write(host.live().join("vm-host.toml"), config + &more)?;
        Ok(host)
    }

    /// Where all of it is.
    pub fn live(&self) -> PathBuf {
        self.scratch.join("live")
    }

    /// Where a vssd-backend has its sockets for this host's VMs.
    pub fn vssd_runtime(&self) -> PathBuf {
        self.live().join("vssd")
    }

    /// A VM with its memory in NV-RAM that boots `image`.
    pub fn definition(&self, name: &str, image: &GuestImage, memory: &str) -> String {
        format!(
            "name = '{name}'\nmemory = '{memory}'\nnvram = 'nv0'\naccel = 'tcg'\ncpu = 'max,cx16=off'\n\
             kernel = '{}'\ninitrd = '{}'\ncmdline = '{}'\n\
             extra = [{}]\n",
            image.kernel().image().display(),
            image.initramfs().display(),
            crate::qemu::CMDLINE,
            agent_port(self.agent(name).display()),
        )
    }

    /// Where the QEMU of a VM defined by [`VmHost::definition`] serves the port of its agent; what is defined otherwise must, too, for
    /// [`VmHost::run`].
    pub fn agent(&self, name: &str) -> PathBuf {
        self.live().join(format!("{name}.agent"))
    }

    // ---- the daemon ----

    /// Starts the daemon; when this returns it has recovered what it found.
    pub fn start(&mut self) -> Result<()> {
        self.begin()?;
        self.serves()
    }

    /// Starts the daemon and does not wait.
    pub fn begin(&mut self) -> Result<()> {
        let _ = fs::remove_file(self.socket());
        let log = File::options().create(true).append(true).open(self.live().join("daemon.log"))?;
        let mut command = Command::new(paths::artifact("vm-host", "vm-host")?);
        command.arg("serve").arg("--config").arg(self.live().join("vm-host.toml"));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // SAFETY: the closure runs between fork and exec and makes one prctl system call: it allocates nothing and takes no lock.
        unsafe {
            command.pre_exec(|| {
                // A tracer is no ancestor of it. Where nobody restricts tracing this is refused, and not needed.
                libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY);
                Ok(())
            });
        }
        self.daemon = Some(Daemon::spawn("vm-host", command)?);
        Ok(())
    }

    /// Waits until it serves: it has recovered what it found.
    pub fn serves(&mut self) -> Result<()> {
        let socket = self.socket();
        let daemon = self.daemon()?;
        let ready = Deadline::after(LIMIT).until("vm-host to serve", || {
            daemon.expect_running()?;
            crate::qemu::listening(&socket)
        });
        ready.with_context(|| self.log())
    }

    fn socket(&self) -> PathBuf {
        self.live().join("run/control.sock")
    }

    /// Says that the power is good or fails, which a daemon hears from soon after its beginning on.
    pub fn power(&mut self, good: bool) -> Result<()> {
        let path = self.live().join(POWER_GOOD);
        let daemon = self.daemon()?;
        let mut line = Deadline::after(LIMIT).poll("vm-host to watch the power", || {
            daemon.expect_running()?;
            // A FIFO that nobody reads is not opened so.
            match File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&path) {
                Ok(line) => Ok(Some(line)),
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })?;
        Ok(line.write_all(if good { b"1" } else { b"0" })?)
    }

    /// What the daemon has logged last.
    pub fn log(&self) -> String {
        process::tail(&self.whole_log(), 30)
    }

    /// All that daemons here have logged.
    pub fn whole_log(&self) -> String {
        fs::read_to_string(self.live().join("daemon.log")).unwrap_or_default()
    }

    fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("vm-host does not run")
    }

    /// Whether it runs.
    pub fn runs(&mut self) -> Result<bool> {
        Ok(self.daemon()?.ended()?.is_none())
    }

    /// `kill -9` of the daemon; its machines run on.
    pub fn kill(&mut self) -> Result<()> {
        match self.daemon.take() {
            Some(mut daemon) => daemon.kill(),
            None => Ok(()),
        }
    }

    /// `kill -9` of the daemon and of every machine, as a power cut does it. Gives how many machines there were.
    pub fn power_cut(&mut self) -> Result<usize> {
        self.kill()?;
        let found = self.machines()?;
        for &pid in &found {
            kill(pid)?;
        }
        Ok(found.len())
    }

    /// `kill -9` of every machine alone.
    pub fn kill_machines(&self) -> Result<()> {
        self.machines()?.into_iter().try_for_each(kill)
    }

    /// The QEMUs of this host that there are.
    pub fn machines(&self) -> Result<Vec<i32>> {
        let live = self.live().display().to_string();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            // One that has ended in between, or has ended and is not yet taken away, has none.
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let program = line.split('\0').next().unwrap_or_default();
            if program.contains("qemu-system") && line.contains(&live) {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// The thread of the daemon that takes care of a VM.
    pub fn thread_of(&mut self, vm: &str) -> Result<u32> {
        let dir = format!("/proc/{}/task", self.daemon()?.pid());
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            if name.trim() == format!("vm {vm}") {
                return Ok(entry.file_name().to_string_lossy().parse()?);
            }
        }
        bail!("the daemon has no thread for {vm}")
    }

    // ---- operators ----

    fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(paths::artifact("vm-host", "vm-host")?);
        command.arg("--socket").arg(self.socket());
        command.args(["--json", "--timeout", "60s"]).args(words).stdin(Stdio::null());
        Ok(command)
    }

    /// A command of an operator, whatever comes of it.
    pub fn call(&self, words: &[&str]) -> Result<Said> {
        let output = self.command(words)?.output()?;
        let text = if output.stdout.is_empty() { &output.stderr } else { &output.stdout };
        let json = serde_json::from_slice(text)
            .with_context(|| format!("{words:?} said {}", String::from_utf8_lossy(text)))?;
        Ok(Said { code: output.status.code().unwrap_or(-1), json })
    }

    /// One that must go well.
    pub fn ok(&self, words: &[&str]) -> Result<Value> {
        let said = self.call(words)?;
        ensure!(said.code == 0, "{words:?}: {}\n{}", said.json, self.log());
        Ok(said.json)
    }

    pub fn define(&self, text: &str) -> Result<()> {
        let path = self.live().join("definition.toml");
        fs::write(&path, text)?;
        self.ok(&["define", &path.to_string_lossy()]).map(drop)
    }

    /// `vm-host show --json`
    pub fn show(&self, vm: &str) -> Result<Value> {
        Ok(self.ok(&["show", vm])?["vm"].clone())
    }

    pub fn state(&self, vm: &str) -> Result<String> {
        Ok(self.show(vm)?["state"].as_str().unwrap_or_default().to_owned())
    }

    pub fn wait_state(&self, vm: &str, state: &str) -> Result<()> {
        Deadline::after(LIMIT)
            .until(&format!("{vm} to be {state}"), || Ok(self.state(vm)? == state))
            .with_context(|| self.log())
    }

    /// Runs a command in a guest, once it is up. A process of its own, for the port of a guest serves one at a time.
    pub fn run(&self, vm: &str, command: &str) -> Result<String> {
        let mut run = Command::new(paths::artifact("vssd-tests", "guest_run")?);
        run.arg(self.agent(vm)).arg("60").arg(command);
        Ok(process::run(&mut run)?.trim().to_owned())
    }

    // ---- what is durable ----

    /// The place of a copy.
    pub fn kept(&self, name: &str) -> PathBuf {
        self.scratch.join("kept").join(name)
    }

    /// Keeps a copy of what is durable. Nothing may run.
    pub fn keep(&self, name: &str) -> Result<()> {
        copy(&self.live(), &self.kept(name))
    }

    /// Ends all that runs and puts a copy back.
    pub fn put_back(&mut self, name: &str) -> Result<()> {
        self.power_cut()?;
        copy(&self.kept(name), &self.live())
    }

    /// What differs from a copy, for people; nothing where nothing does.
    pub fn differences(&self, name: &str) -> Result<String> {
        let mut differs = String::new();
        for dir in DURABLE {
            let mut command = Command::new(paths::tool("diff")?);
            command.args(["-rq", "--exclude=lock", "--exclude=vm-nvram.lock"]);
            let output = command.arg(self.kept(name).join(dir)).arg(self.live().join(dir)).output()?;
            differs.push_str(&String::from_utf8_lossy(&output.stdout));
        }
        Ok(differs)
    }
}

impl Drop for VmHost {
    fn drop(&mut self) {
        if let Err(error) = self.power_cut() {
            eprintln!("machines may be left: {error:#}");
        }
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for dir in DURABLE {
        let _ = fs::remove_dir_all(to.join(dir));
        process::run(Command::new("cp").arg("-a").arg(from.join(dir)).arg(to.join(dir)))?;
    }
    Ok(())
}

fn kill(pid: i32) -> Result<()> {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
    // The memory is a mapping: it is stored to until the last thread has gone.
    Deadline::after(LIMIT).until("a machine to end", || {
        Ok(fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default().is_empty())
    })
}
