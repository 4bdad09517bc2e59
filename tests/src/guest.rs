// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A booted guest: run commands in it, reboot it, stop it, read its console.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::agent::{Agent, Job, Output};
use crate::process::{Daemon, tail};
use crate::qemu::{Accel, Qemu};
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::wait::Deadline;

/// The time a command gets when the caller does not say.
const COMMAND: Duration = Duration::from_secs(120);
/// A move of a guest that runs takes seconds.
const MOVE: Duration = Duration::from_secs(60);

/// What a guest is put together from.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) process: Daemon,
    pub(crate) qmp: Qmp,
    pub(crate) agent: Agent,
    pub(crate) scratch: Scratch,
    pub(crate) console: PathBuf,
    pub(crate) boot_limit: Duration,
    pub(crate) accel: Accel,
}

/// A running guest. Dropping it kills the machine.
#[derive(Debug)]
pub struct Guest {
    parts: Parts,
    started: Instant,
    boot_time: Duration,
    moves: u32,
}

impl Guest {
    pub(crate) fn new(parts: Parts) -> Self {
        Self { parts, started: Instant::now(), boot_time: Duration::ZERO, moves: 0 }
    }

    /// Waits until boot number `boot` has reported ready.
    pub(crate) fn wait_ready(&mut self, boot: u32) -> Result<()> {
        let deadline = Deadline::after(self.parts.boot_limit);
        let agent = self.parts.agent.clone();
        let waited = deadline.until("the guest to boot", || {
            self.alive()?;
            Ok(agent.boots() >= boot)
        });
        self.boot_time = self.started.elapsed();
        waited.with_context(|| self.console_tail(30))
    }

    /// An error if the machine has ended or its kernel has panicked.
    fn alive(&mut self) -> Result<()> {
        if let Err(error) = self.parts.process.expect_running() {
            let said = fs::read_to_string(self.parts.scratch.join("qemu.stderr")).unwrap_or_default();
            bail!("{error}: {}", tail(&said, 10));
        }
        if self.console().contains("Kernel panic") {
            // Its report takes a moment on an emulated serial port; without its end it is still worth showing.
            let _ = Deadline::secs(3).until("the report", || Ok(self.console().contains("end Kernel panic")));
            bail!("the guest's kernel panicked: {}", self.console_tail(50));
        }
        Ok(())
    }

    /// Moves the guest, while it runs, to another QEMU made as `machine`, and ends the one it came from. Gives what QEMU
    /// says of the move.
    pub fn migrate(&mut self, machine: &Qemu) -> Result<Value> {
        // What was sent to the guest must have reached it.
        self.ok("true")?;
        self.moves += 1;
        let parts = &mut self.parts;
        let socket = parts.scratch.join(format!("move{}", self.moves));
        let target = machine.start(parts.accel, &parts.scratch, &parts.console, Some(&socket))?;
        let parameters = json!({ "max-bandwidth": 4u64 << 30, "downtime-limit": 3000 });
        parts.qmp.execute("migrate-set-parameters", parameters)?;
        parts.qmp.execute("migrate", json!({ "uri": format!("unix:{}", socket.display()) }))?;
        let moved = Deadline::after(MOVE).poll("QEMU to move the guest", || {
            let said = parts.qmp.execute("query-migrate", json!({}))?;
            match said["status"].as_str() {
                Some("completed") => Ok(Some(said)),
                Some("failed" | "cancelled") => bail!("the move failed: {said}"),
                _ => Ok(None),
            }
        })?;
        parts.agent.move_to(target.agent)?;
        parts.qmp = target.qmp;
        // Dropped, and with that killed: the guest does not need it any more.
        drop(std::mem::replace(&mut parts.process, target.process));
        Deadline::secs(30).until("the guest to run where it was moved to", || {
            Ok(parts.qmp.execute("query-status", json!({}))?["status"] == "running")
        })?;
        Ok(moved)
    }

    /// How long the last boot took, from start or reset to a ready agent.
    pub fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// How its processors run.
    pub fn accel(&self) -> Accel {
        self.parts.accel
    }

    /// The release of the running kernel.
    pub fn release(&self) -> String {
        self.parts.agent.release()
    }

    /// The process id of its QEMU.
    pub fn pid(&self) -> u32 {
        self.parts.process.pid()
    }

    /// Its QEMU's control connection.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.parts.qmp
    }

    /// Runs a shell command and waits for its end; the exit code is the caller's to judge.
    pub fn sh(&mut self, command: &str) -> Result<Output> {
        self.sh_within(command, COMMAND)
    }

    /// As [`Guest::sh`] with a limit.
    pub fn sh_within(&mut self, command: &str, limit: Duration) -> Result<Output> {
        let job = self.spawn(command)?;
        job.close_stdin()?;
        self.wait(&job, limit)
    }

    /// Waits for a job and notices a dead machine or kernel meanwhile.
    pub fn wait(&mut self, job: &Job, limit: Duration) -> Result<Output> {
        let outcome = job.wait_watching(limit, || self.alive());
        if outcome.is_err() && !job.ended() && self.alive().is_ok() {
            // It hangs. The kernel knows where.
            let dump = self.spawn("echo w > /proc/sysrq-trigger");
            let _ = dump.and_then(|dump| dump.wait(Duration::from_secs(5)));
            return outcome.with_context(|| self.console_tail(60));
        }
        outcome
    }

    /// Runs a command that must succeed and gives its trimmed output.
    pub fn ok(&mut self, command: &str) -> Result<String> {
        Ok(self.sh(command)?.check()?.text())
    }

    /// Starts a command in the background.
    pub fn spawn(&self, command: &str) -> Result<Job> {
        self.parts.agent.spawn(command)
    }

    /// Writes a file in the guest.
    pub fn write_file(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        let job = self.spawn(&format!("cat > '{path}'"))?;
        job.write_stdin(bytes)?;
        job.close_stdin()?;
        self.wait(&job, COMMAND)?.check().map(drop)
    }

    /// The guest's name (`vda`) of machine disk number `index`, in the order of [`crate::qemu::Qemu::disk`], whichever
    /// driver serves it.
    pub fn disk(&mut self, index: usize) -> Result<String> {
        // The bus address of `disk<index>` is QEMU's to choose; it can be asked for.
        let address = self.pci_address(&format!("disk{index}"))?;
        let name =
            self.ok(&format!("ls /sys/bus/pci/devices/{address}/virtio*/block/ 2>/dev/null | head -n 1"))?;
        if name.is_empty() {
            bail!("no block device at {address} for disk {index}");
        }
        Ok(name)
    }

    /// The virtio device (`virtio3`) of machine disk number `index`.
    pub fn virtio_device(&mut self, index: usize) -> Result<String> {
        let address = self.pci_address(&format!("disk{index}"))?;
        self.ok(&format!("basename /sys/bus/pci/devices/{address}/virtio*"))
    }

    fn pci_address(&mut self, id: &str) -> Result<String> {
        let buses = self.parts.qmp.execute("query-pci", json!({}))?;
        let device = buses
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|bus| bus["devices"].as_array())
            .flatten()
            .find(|device| device["qdev_id"] == id)
            .with_context(|| format!("QEMU has no device {id} on its first bus"))?;
        let number = |name: &str| device[name].as_u64().unwrap_or_default();
        Ok(format!("0000:{:02x}:{:02x}.{}", number("bus"), number("slot"), number("function")))
    }

    /// Resets the machine as its reset button would and waits for the next boot.
    pub fn reset(&mut self) -> Result<()> {
        let next = self.parts.agent.boots() + 1;
        self.started = Instant::now();
        self.parts.qmp.execute("system_reset", json!({}))?;
        self.wait_ready(next)
    }

    /// Reboots from inside (without stopping services: there are none) and waits for the next boot.
    pub fn reboot(&mut self) -> Result<()> {
        let next = self.parts.agent.boots() + 1;
        self.started = Instant::now();
        // The job cannot answer: the machine is reset under it.
        let _job = self.spawn("sync; reboot -f")?;
        self.wait_ready(next)
    }

    /// Powers off from inside and waits for QEMU to end.
    pub fn power_off(&mut self) -> Result<()> {
        let _job = self.spawn("sync; poweroff -f")?;
        let status = self.parts.process.wait(Duration::from_secs(30))?;
        if !status.success() {
            bail!("QEMU ended with {status} at power off");
        }
        Ok(())
    }

    /// Waits until a shutdown that was asked for has ended QEMU.
    pub fn wait_off(mut self, limit: Duration) -> Result<()> {
        let status = self.parts.process.wait(limit).with_context(|| self.console_tail(40))?;
        ensure!(status.success(), "QEMU ended with {status}");
        Ok(())
    }

    /// Pulls the plug.
    pub fn kill(&mut self) -> Result<()> {
        self.parts.process.kill()
    }

    /// Everything the kernel has printed on the console.
    pub fn console(&self) -> String {
        fs::read(self.console_path())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Where the console is logged; the file outlives the guest.
    pub fn console_path(&self) -> &Path {
        &self.parts.console
    }

    fn console_tail(&self, lines: usize) -> String {
        let path = self.parts.console.display();
        format!("the console ({path}) ends with:\n{}", tail(&self.console(), lines))
    }

    /// Lines of the console in which the kernel complains about itself, or about a task that hangs. A disk's I/O
    /// errors are not among them: some tests provoke those.
    pub fn kernel_complaints(&self) -> Vec<String> {
        complaints(&self.console())
    }

    /// An error that shows the kernel's complaints, if there are any.
    pub fn expect_quiet_kernel(&self) -> Result<()> {
        let found = self.kernel_complaints();
        if found.is_empty() {
            return Ok(());
        }
        bail!("the guest's kernel complained: {}\n{}", found.join("; "), self.console_tail(60));
    }
}

fn complaints(console: &str) -> Vec<String> {
    const SIGNS: &[&str] = &[
        "Kernel panic",
        "BUG:",
        "kernel BUG at",
        "WARNING: CPU",
        "WARNING: possible",
        "WARNING: suspicious",
        "INFO: task ",
        "INFO: rcu",
        "INFO: possible",
        "Oops:",
        "general protection fault",
        "unable to handle",
        "Call Trace:",
        "refcount_t:",
        "UBSAN:",
        "list_add corruption",
        "list_del corruption",
        "scheduling while atomic",
        "sleeping function called",
    ];
    console.lines().filter(|line| SIGNS.iter().any(|sign| line.contains(sign))).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_found_and_chatter_is_not() {
        let console = "[ 1.0] virtio_blk virtio1: 2/0/0 default/read/poll queues\n\
                       [ 2.0] WARNING: CPU: 0 PID: 1 at drivers/virtio/virtio.c:302\n\
                       [ 2.1] Call Trace:\n\
                       [ 3.0] I/O error, dev vdb, sector 8 op 0x0:(READ)\n\
                       [ 4.0] INFO: task fio:99 blocked for more than 120 seconds.\n";
        let found = complaints(console);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[2].contains("fio"));
    }
}
