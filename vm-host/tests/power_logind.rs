// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The logind source on a real bus of its own, with a stand-in for logind that does what its interface says: it hands out locks, waits for
//! them, and tells of shutdowns.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;
use std::future::poll_fn;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use futures_core::Stream;
use vm_host::power::{Effect, Input, Kind, Machine, Monitor, Observation, PowerConfig, State};
use zbus::message::Type;
use zbus::{Connection, MessageStream, Variant, connection};

const SERVICE: &str = "org.freedesktop.login1";
const PATH: &str = "/org/freedesktop/login1";
const INTERFACE: &str = "org.freedesktop.login1.Manager";

/// A bus.
struct Bus {
    dir: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Bus {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            "<!DOCTYPE busconfig PUBLIC \"-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN\"\n \
             \"http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd\">\n\
             <busconfig><listen>unix:path={}</listen><auth>EXTERNAL</auth><policy context=\"default\">\
             <allow user=\"*\"/><allow own=\"*\"/><allow send_destination=\"*\"/><allow receive_sender=\"*\"/>\
             </policy></busconfig>",
            dir.path().join("bus").display()
        );
        fs::write(dir.path().join("bus.conf"), config).unwrap();
        let mut bus = Self { dir, daemon: None };
        bus.run();
        bus
    }

    fn run(&mut self) {
        let socket = self.dir.path().join("bus");
        let _ = fs::remove_file(&socket);
        let daemon = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", self.dir.path().join("bus.conf").display()))
            .args(["--nofork", "--nopidfile", "--nosyslog"])
            .stdin(Stdio::null())
            .spawn()
            .expect("install dbus-daemon");
        self.daemon = Some(daemon);
        // The socket is there a moment before it is listened on.
        until("the bus", || UnixStream::connect(&socket).is_ok());
    }

    fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    fn address(&self) -> String {
        format!("unix:path={}", self.dir.path().join("bus").display())
    }

    fn monitor(&self) -> (Monitor, Receiver<Observation>) {
        let config =
            format!("[[source]]\nkind = \"logind\"\nname = \"host\"\naddress = \"{}\"", self.address());
        let config: PowerConfig = toml::from_str(&config).unwrap();
        Monitor::start(&config).unwrap()
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A stand-in for logind.
struct Logind {
    connection: Connection,
    /// The other end of each lock that was handed out, with what it was asked for.
    locks: Receiver<(OwnedFd, [String; 4])>,
}

impl Logind {
    fn start(address: &str) -> Self {
        Self::start_while(address, false)
    }

    /// One that is shutting down already, or not.
    fn start_while(address: &str, preparing: bool) -> Self {
        let (sender, locks) = channel();
        let (tell, told) = channel();
        let address = address.to_owned();
        thread::spawn(move || {
            zbus::block_on(async {
                let connection = connection::Builder::address(address.as_str()).build().await.unwrap();
                let calls = MessageStream::from(&connection);
                connection.request_name(SERVICE).await.unwrap();
                tell.send(connection.clone()).unwrap();
                answer(&connection, calls, &sender, preparing).await;
            });
        });
        Self { connection: told.recv().unwrap(), locks }
    }

    fn prepare_for_shutdown(&self, begins: bool) {
        let signal =
            self.connection.emit_signal(None::<&str>, PATH, INTERFACE, "PrepareForShutdown", &(begins));
        zbus::block_on(signal).unwrap();
    }

    fn lock(&self) -> fs::File {
        let (lock, asked) = self.locks.recv_timeout(Duration::from_secs(20)).unwrap();
        let why = "Virtual machines are being saved";
        assert_eq!(asked, ["shutdown", "vm-host", why, "delay"]);
        fs::File::from(lock)
    }
}

async fn answer(
    connection: &Connection,
    mut calls: MessageStream,
    locks: &Sender<(OwnedFd, [String; 4])>,
    preparing: bool,
) {
    while let Some(Ok(message)) = poll_fn(|context| Pin::new(&mut calls).poll_next(context)).await {
        if message.message_type() != Type::MethodCall {
            continue;
        }
        let header = message.header();
        let member = header.member().map(|member| member.to_string());
        let body = message.body();
        let done = match member.as_deref() {
            Some("Inhibit") if preparing => {
                let error = "org.freedesktop.login1.OperationInProgress";
                connection.reply_error(&header, error, &"it is already running").await
            }
            Some("Inhibit") => {
                let (what, who, why, mode) = body.deserialize::<(String, String, String, String)>().unwrap();
                let (ours, theirs) = rustix::pipe::pipe().unwrap();
                let reply = connection.reply(&header, &zbus::Fd::from(theirs)).await;
                locks.send((ours, [what, who, why, mode])).unwrap();
                reply
            }
            Some("Get") => match body.deserialize::<(String, String)>().unwrap().1.as_str() {
                "InhibitDelayMaxUSec" => connection.reply(&header, &Variant::from(5_000_000u64)).await,
                _ => connection.reply(&header, &Variant::from(preparing)).await,
            },
            _ => Ok(()),
        };
        done.unwrap();
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited for: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn next(receiver: &Receiver<Observation>) -> Kind {
    receiver.recv_timeout(Duration::from_secs(20)).unwrap().kind
}

/// Whether nobody holds the lock any more: its pipe has no writer.
fn is_released(lock: &mut fs::File) -> bool {
    let mut poll = [rustix::event::PollFd::new(&*lock, rustix::event::PollFlags::IN)];
    let ready = rustix::event::poll(&mut poll, Some(&rustix::time::Timespec::default())).unwrap();
    ready > 0 && lock.read(&mut [0]).unwrap() == 0
}

const PLANNED: Kind = Kind::ShutdownPlanned { within_ms: Some(5_000) };

#[test]
fn shutdown_waits_until_all_is_saved() {
    let bus = Bus::start();
    let logind = Logind::start(&bus.address());
    let (monitor, receiver) = bus.monitor();
    // Held when the monitor has started, not some time later.
    assert!(monitor.delays_shutdown());
    let mut lock = logind.lock();
    assert_eq!(next(&receiver), Kind::Online);
    assert_eq!(monitor.health()[0].detail.as_deref(), Some("a shutdown waits for up to 5000 ms"));

    let mut machine = Machine::new(PowerConfig::default().policy(10), &[vm_host::power::Role::Host], 0);
    logind.prepare_for_shutdown(true);
    let observation = receiver.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(observation.kind, PLANNED);
    let effects = machine.apply(Input::Observed(observation), 100);
    let Effect::SaveAll { ticket, deadline_ms, .. } = effects[0] else { panic!("{effects:?}") };
    assert_eq!(deadline_ms, 5_100);
    thread::sleep(Duration::from_millis(100));
    assert!(!is_released(&mut lock), "while it is saved, the shutdown waits");
    let effects = machine.apply(Input::SaveFinished { ticket, ok: 1, failed: 0 }, 200);
    assert_eq!(machine.state(), State::Saved);
    assert!(effects.contains(&Effect::AllowShutdown));
    monitor.allow_shutdown();
    until("the lock's release", || is_released(&mut lock));

    // It does not happen after all: the next one has to wait again.
    logind.prepare_for_shutdown(false);
    assert_eq!([next(&receiver), next(&receiver)], [Kind::ShutdownCancelled, Kind::Online]);
    let mut lock = logind.lock();
    assert!(!is_released(&mut lock) && monitor.delays_shutdown());
    drop(monitor);
    until("the end of the lock with its holder", || is_released(&mut lock));
}

#[test]
fn stranger_cannot_announce_a_shutdown() {
    let bus = Bus::start();
    let logind = Logind::start(&bus.address());
    let (_monitor, receiver) = bus.monitor();
    assert_eq!(next(&receiver), Kind::Online);
    zbus::block_on(async {
        let stranger = connection::Builder::address(&*bus.address()).build().await.unwrap();
        let signal = stranger.emit_signal(None::<&str>, PATH, INTERFACE, "PrepareForShutdown", &(true));
        signal.await.unwrap();
        stranger.graceful_shutdown().await;
    });
    assert!(receiver.recv_timeout(Duration::from_millis(300)).is_err());
    logind.prepare_for_shutdown(true);
    assert_eq!(next(&receiver), PLANNED);
}

#[test]
fn bus_that_dies_is_lost_and_its_lock_is_kept_until_there_is_a_new_one() {
    let mut bus = Bus::start();
    let logind = Logind::start(&bus.address());
    let (monitor, receiver) = bus.monitor();
    assert_eq!(next(&receiver), Kind::Online);
    let mut lock = logind.lock();
    bus.kill();
    assert_eq!(next(&receiver), Kind::Lost);
    assert!(!is_released(&mut lock));
    bus.run();
    let logind = Logind::start(&bus.address());
    assert_eq!(next(&receiver), Kind::Online);
    let mut new = logind.lock();
    until("the old lock's end", || is_released(&mut lock));
    assert!(!is_released(&mut new));
    let start = Instant::now();
    drop(monitor);
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn shutdown_that_is_under_way_at_the_start_is_heard_although_it_does_not_wait() {
    let bus = Bus::start();
    let _logind = Logind::start_while(&bus.address(), true);
    let (monitor, receiver) = bus.monitor();
    assert_eq!(next(&receiver), PLANNED);
    assert!(!monitor.delays_shutdown());
}

#[test]
fn bus_without_logind_says_so() {
    let bus = Bus::start();
    let (monitor, receiver) = bus.monitor();
    assert_eq!(next(&receiver), Kind::NotAvailable);
    assert!(!monitor.delays_shutdown());
}

#[test]
fn bus_that_does_not_answer_holds_up_nothing_for_long() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("silent");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let config =
        format!("[[source]]\nkind = \"logind\"\nname = \"host\"\naddress = \"unix:path={}\"", path.display());
    let start = Instant::now();
    let (monitor, receiver) = Monitor::start(&toml::from_str(&config).unwrap()).unwrap();
    assert_eq!(next(&receiver), Kind::Lost);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert!(monitor.health()[0].error.as_deref().unwrap().contains("in time"));
    drop(monitor);
}

/// The source's thread sleeps while there is nothing to hear, and so does whatever the library started for it.
#[test]
fn idle_source_does_not_wake_up() {
    const MARK: &str = "VM_HOST_TEST_IDLE_BUS";
    // In a process of its own, where all threads are this source's.
    let Some(address) = std::env::var_os(MARK) else {
        let bus = Bus::start();
        let _logind = Logind::start(&bus.address());
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "idle_source_does_not_wake_up", "--nocapture"])
            .env(MARK, bus.address())
            .status()
            .unwrap();
        assert!(status.success());
        return;
    };
    let config = format!(
        "[[source]]\nkind = \"logind\"\nname = \"idle\"\naddress = \"{}\"",
        address.to_string_lossy()
    );
    let (_monitor, receiver) = Monitor::start(&toml::from_str(&config).unwrap()).unwrap();
    assert_eq!(next(&receiver), Kind::Online);
    thread::sleep(Duration::from_millis(300));
    let own = rustix::thread::gettid().as_raw_nonzero().to_string();
    let switches = || {
        let mut found = Vec::new();
        for task in fs::read_dir("/proc/self/task").unwrap() {
            let path = task.unwrap().path();
            if path.file_name() == Path::new(&own).file_name() {
                continue;
            }
            let status = fs::read_to_string(path.join("status")).unwrap_or_default();
            let lines =
                status.lines().filter(|line| line.starts_with("Name:") || line.starts_with("voluntary"));
            found.push(lines.collect::<Vec<_>>().join(" "));
        }
        found.sort();
        found
    };
    let before = switches();
    println!("threads: {before:?}");
    thread::sleep(Duration::from_secs(1));
    assert_eq!(switches(), before);
    assert!(before.iter().any(|line| line.contains("power-idle")), "{before:?}");
}
