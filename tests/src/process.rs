// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Child processes that never outlive the test: killed on drop, and by the kernel if the test process dies.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};

use crate::wait::Deadline;

/// Runs a command to its end and gives its standard output; a failure carries what it printed.
pub fn run(command: &mut Command) -> Result<String> {
    let line = describe(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start `{line}`"))?;
    if !output.status.success() {
        let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.trim().is_empty() {
            said = String::from_utf8_lossy(&output.stdout).into_owned();
        }
        bail!("`{line}` ended with {}:\n{}", output.status, tail(&said, 40));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Lets the calling thread, and all that it starts from now on, run only while nothing else wants a processor. Without
/// privileges there is no way back.
pub fn idle_priority() -> Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the structure is valid for the call, which changes the calling thread's scheduling and nothing else.
    let outcome = unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) };
    if outcome != 0 {
        bail!("idle priority: {}", io::Error::last_os_error());
    }
    Ok(())
}

/// The command line, for messages.
pub fn describe(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// The last `lines` lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A background process of a test.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    name: String,
    ended: Option<ExitStatus>,
}

type Order = (Command, Sender<io::Result<Child>>);

/// The parent-death signal follows the *thread* that forked, and test threads come and go. One thread
/// that lives as long as the process forks for all of them.
fn spawn_tied(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Sender<Order>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in inbox {
                let _ = reply.send(command.spawn());
            }
        });
        orders
    });
    let (reply, answer) = channel();
    spawner.send((command, reply)).map_err(|_| io::Error::other("the spawner thread has ended"))?;
    answer.recv().map_err(io::Error::other)?
}

impl Daemon {
    /// Starts `command`; `name` appears in messages.
    pub fn spawn(name: &str, mut command: Command) -> Result<Self> {
        let line = describe(&command);
        // SAFETY: the closure runs between fork and exec and makes one prctl system call: it allocates nothing
        // and takes no lock, which is all that is allowed there.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into)
            });
        }
        let child = spawn_tied(command).with_context(|| format!("start `{line}`"))?;
        Ok(Self { child, name: name.to_owned(), ended: None })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status if the process has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().with_context(|| format!("wait for {}", self.name))?;
        }
        Ok(self.ended)
    }

    /// Fails if the process has ended.
    pub fn expect_running(&mut self) -> Result<()> {
        match self.ended()? {
            Some(how) => bail!("{} ended with {how}", self.name),
            None => Ok(()),
        }
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        Deadline::after(limit).poll(&format!("{name} to end"), || self.ended())
    }

    /// Sends a signal; a process that has ended is left alone.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended()?.is_some() {
            return Ok(());
        }
        // The process is not yet reaped, so its id cannot belong to another.
        rustix::process::kill_process(Pid::from_child(&self.child), signal)
            .with_context(|| format!("signal {}", self.name))
    }

    /// `SIGKILL`, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.wait(Duration::from_secs(10)).map(drop)
    }

    /// `SIGTERM`, and waits for a clean end.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(limit)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
