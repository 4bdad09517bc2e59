// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A daemon with one lamp, and clients that say what they like to it.

// Not every test needs everything.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use control_server::blocking::{Access, Feed, Listeners, Service, serve};
use control_server::{About, Clock, Door, Fault, Peer, bind, rpc};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use vssd_protocol::control::ErrorCode;

/// Longer than anything here takes.
pub(crate) const LONG: Duration = Duration::from_secs(20);

pub(crate) struct Lamp {
    feed: Feed,
    is_on: AtomicBool,
    pub(crate) calls: AtomicUsize,
    /// How many calls of `lamp.wait` are under way, and whether they may end.
    waiting: Mutex<(usize, bool)>,
    change: Condvar,
}

impl Service for Lamp {
    fn access(&self, method: &str) -> Option<Access> {
        match method {
            "lamp.show" | "lamp.big" | "lamp.wait" => Some(Access::Read),
            "lamp.switch" => Some(Access::Change),
            _ => None,
        }
    }

    fn call(&self, door: Door, peer: Peer, method: &str, params: Map<String, Value>) -> Result<Value, Fault> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        rpc::nothing(params)?;
        match method {
            "lamp.show" => {
                let on = self.is_on.load(Ordering::Relaxed);
                Ok(json!({ "on": on, "door": door.name(), "uid": peer.uid }))
            }
            "lamp.big" => Ok(Value::String("x".repeat(100_000))),
            "lamp.switch" => {
                self.is_on.fetch_xor(true, Ordering::Relaxed);
                self.tell(1);
                Ok(json!({}))
            }
            "lamp.wait" => {
                let mut waiting = self.waiting.lock().unwrap();
                waiting.0 += 1;
                self.change.notify_all();
                let mut waiting = self.change.wait_while(waiting, |waiting| !waiting.1).unwrap();
                waiting.0 -= 1;
                Err(Fault::new(ErrorCode::Busy, "it took long").hint("wait no more"))
            }
            other => Err(rpc::unknown_method(other)),
        }
    }

    fn feed(&self) -> &Feed {
        &self.feed
    }
}

impl Lamp {
    pub(crate) fn tell(&self, n: usize) {
        for _ in 0..n {
            self.feed.tell("lamp.switched", About::object("lamp", "one"), json!({ "by": "somebody" }));
        }
    }

    pub(crate) fn newest(&self) -> u64 {
        self.feed.newest()
    }

    pub(crate) fn tell_other(&self) {
        self.feed.tell("power.lost", About::NOTHING, Value::Null);
    }

    /// Until `n` calls of `lamp.wait` are under way.
    pub(crate) fn await_waiting(&self, n: usize) {
        let waiting = self.waiting.lock().unwrap();
        let (waiting, late) =
            self.change.wait_timeout_while(waiting, LONG, |waiting| waiting.0 != n).unwrap();
        assert!(!late.timed_out(), "{} wait", waiting.0);
    }

    pub(crate) fn let_go(&self) {
        self.waiting.lock().unwrap().1 = true;
        self.change.notify_all();
    }
}

pub(crate) struct Daemon {
    dir: TempDir,
    pub(crate) lamp: Arc<Lamp>,
    shutdown: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        Self::start_with(LONG)
    }

    pub(crate) fn start_with(patience: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lamp = Arc::new(Lamp {
            feed: Feed::new(Clock::start()),
            is_on: AtomicBool::default(),
            calls: AtomicUsize::default(),
            waiting: Mutex::default(),
            change: Condvar::new(),
        });
        let shutdown = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let open = |name: &str| Some(bind(&dir.path().join(name), 0o600, None).unwrap());
        let listeners = Listeners { control: open("control.sock"), monitor: open("monitor.sock") };
        let (service, end): (Arc<dyn Service>, _) = (lamp.clone(), shutdown.try_clone().unwrap());
        let thread = std::thread::spawn(move || serve(listeners, service, end, patience).unwrap());
        Self { dir, lamp, shutdown, thread: Some(thread) }
    }

    pub(crate) fn path(&self, door: Door) -> PathBuf {
        self.dir.path().join(format!("{}.sock", door.name()))
    }

    pub(crate) fn client(&self, door: Door) -> Client {
        Client::connect(&self.path(door))
    }

    pub(crate) fn begin_to_end(&self) {
        rustix::io::write(&self.shutdown, &1u64.to_ne_bytes()).unwrap();
    }

    /// How long it took.
    pub(crate) fn end(&mut self) -> Duration {
        let start = Instant::now();
        self.begin_to_end();
        self.thread.take().unwrap().join().unwrap();
        start.elapsed()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.lamp.let_go();
        if self.thread.is_some() {
            self.end();
        }
    }
}

pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_write_timeout(Some(LONG)).unwrap();
        Self { lines: BufReader::new(stream.try_clone().unwrap()), stream }
    }

    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// The next line; `None` at the end.
    pub(crate) fn hear(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
            // Closed with something of ours unread.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn ask(&mut self, method: &str, params: &Value) {
        let line = json!({ "jsonrpc": "2.0", "id": method, "method": method, "params": params });
        self.say(format!("{line}\n").as_bytes());
    }

    pub(crate) fn call(&mut self, method: &str) -> Value {
        self.ask(method, &Value::Null);
        self.hear().unwrap()
    }

    pub(crate) fn code(&mut self, method: &str) -> Value {
        self.call(method)["error"]["data"]["code"].clone()
    }

    pub(crate) fn subscribe(&mut self, params: &Value) -> Value {
        self.ask("events.subscribe", params);
        self.hear().unwrap()
    }

    /// Name and number of the next event.
    pub(crate) fn event(&mut self) -> (String, u64) {
        let event = self.hear().unwrap();
        let params = &event["params"];
        (params["event"].as_str().unwrap().to_owned(), params["seq"].as_u64().unwrap())
    }

    /// All that comes until the daemon hangs up.
    pub(crate) fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        let _ = self.lines.read_to_end(&mut rest);
        rest
    }
}
