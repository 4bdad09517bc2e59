// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs in the guest: executes the host's shell commands, any number at a time, and sends back what they print.
//!
//! Knows nothing of vSSDs. Frames are those of [`vssd_tests::wire`].

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};
use vssd_tests::wait::Deadline;
use vssd_tests::wire::{Frame, FrameReader, Kind, MAX_PAYLOAD, PORT_NAME};

/// The port, shared by everything that sends; a frame is written under the lock so that frames do not mix.
type Port = Arc<Mutex<File>>;

/// The running jobs: where their standard input goes, and their process group.
type Jobs = Arc<Mutex<HashMap<u32, Running>>>;

struct Running {
    /// `None` closes the pipe.
    stdin: Option<Sender<Vec<u8>>>,
    group: Pid,
}

fn main() -> Result<()> {
    let device = Deadline::secs(20).poll("the agent's virtio port", find_port)?;
    let file =
        File::options().read(true).write(true).open(&device).with_context(|| format!("open {device}"))?;
    let port: Port = Arc::new(Mutex::new(file.try_clone()?));
    let jobs = Jobs::default();

    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    send(&port, &Frame::new(Kind::Hello, 0, release.trim()));

    let mut frames = FrameReader::new(PatientReader(file));
    while let Some(frame) = frames.read()? {
        serve(&frame, &port, &jobs);
    }
    Ok(())
}

/// The port reads as ended while no host is connected; the agent outlives that.
struct PatientReader(File);

impl Read for PatientReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(into)? {
                0 => thread::sleep(Duration::from_millis(20)),
                some => return Ok(some),
            }
        }
    }
}

fn find_port() -> Result<Option<String>> {
    let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else {
        return Ok(None);
    };
    for port in ports {
        let port = port?;
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        let device = format!("/dev/{}", port.file_name().to_string_lossy());
        if name.trim() == PORT_NAME && fs::exists(&device)? {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

fn send(port: &Port, frame: &Frame) {
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    if let Err(error) = frame.write_to(&mut *port) {
        eprintln!("guest agent: cannot send {:?}: {error}", frame.kind);
    }
}

fn serve(frame: &Frame, port: &Port, jobs: &Jobs) {
    let mut running = jobs.lock().unwrap_or_else(PoisonError::into_inner);
    match frame.kind {
        Kind::Run => match start(frame) {
            Ok(child) => {
                let job = attend(child, frame.job, port, jobs);
                running.insert(frame.job, job);
            }
            Err(error) => {
                send(port, &Frame::new(Kind::Stderr, frame.job, error.to_string()));
                send(port, &Frame::new(Kind::Exit, frame.job, 127i32.to_le_bytes()));
            }
        },
        Kind::Stdin => {
            if let Some(stdin) = running.get(&frame.job).and_then(|job| job.stdin.as_ref()) {
                let _ = stdin.send(frame.payload.clone());
            }
        }
        Kind::StdinEnd => {
            if let Some(job) = running.get_mut(&frame.job) {
                job.stdin = None;
            }
        }
        Kind::Kill => {
            if let Some(job) = running.get(&frame.job) {
                let _ = rustix::process::kill_process_group(job.group, Signal::KILL);
            }
        }
        Kind::Hello | Kind::Stdout | Kind::Stderr | Kind::Exit => {}
    }
}

fn start(frame: &Frame) -> io::Result<Child> {
    Command::new("/bin/sh")
        .arg("-c")
        .arg(String::from_utf8_lossy(&frame.payload).into_owned())
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

/// Starts the threads that carry a job's three streams and report its end.
fn attend(mut child: Child, job: u32, port: &Port, jobs: &Jobs) -> Running {
    let (stdin, bytes) = channel::<Vec<u8>>();
    if let Some(mut pipe) = child.stdin.take() {
        thread::spawn(move || {
            // Ends when the sender is dropped or the job closes its end.
            while let Ok(bytes) = bytes.recv() {
                if pipe.write_all(&bytes).is_err() {
                    break;
                }
            }
        });
    }
    let out = child.stdout.take().map(|pipe| forward(pipe, Kind::Stdout, job, port));
    let err = child.stderr.take().map(|pipe| forward(pipe, Kind::Stderr, job, port));
    let group = Pid::from_child(&child);
    let (port, jobs) = (Arc::clone(port), Arc::clone(jobs));
    thread::spawn(move || {
        // All output precedes the exit frame. Like ssh, this waits for background children that kept the pipes.
        for pump in [out, err].into_iter().flatten() {
            let _ = pump.join();
        }
        let code = child.wait().map_or(126, exit_code);
        jobs.lock().unwrap_or_else(PoisonError::into_inner).remove(&job);
        send(&port, &Frame::new(Kind::Exit, job, code.to_le_bytes()));
    });
    Running { stdin: Some(stdin), group }
}

fn forward(
    mut pipe: impl Read + Send + 'static,
    kind: Kind,
    job: u32,
    port: &Port,
) -> thread::JoinHandle<()> {
    let port = Arc::clone(port);
    thread::spawn(move || {
        let mut chunk = vec![0; MAX_PAYLOAD / 2];
        loop {
            match pipe.read(&mut chunk) {
                Ok(0) => break,
                Ok(got) => send(&port, &Frame::new(kind, job, &chunk[..got])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    })
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
