// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A daemon without its vhost-user side: a real pool, real sockets, real threads; the front-ends are recorded, and a
//! test plays the guest.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use serde_json::{Value, json};
use tempfile::TempDir;
use vssd_pool::{CreateOptions, MediumKind, MediumSpec, OpenOptions, Pool, Vssd, VssdId};
use vssd_protocol::control::ErrorCode;
use vssd_protocol::guest::{MAX_RANGES, Request, Response, min_response_len};
use vssd_protocol::letter::Notice;
use vssd_protocol::units::ByteOffset;

use super::server::{Server, ServerError, ServerOptions};
use crate::device::{
    DeviceEvent, FrontendError, FrontendStatus, Frontends, GuestCall, OwnerHandle, Reply, ReplySink,
};

pub(crate) const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// What the owner asked of the front-ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Open(String, u64),
    Close(u32),
    Capacity(u32, u64),
}

#[derive(Debug, Default)]
pub(crate) struct Recorded {
    pub(crate) asked: Vec<Asked>,
    pub(crate) status: HashMap<u32, FrontendStatus>,
    pub(crate) refuse_open: bool,
}

struct FakeFrontends {
    recorded: Arc<Mutex<Recorded>>,
    owner: OwnerHandle,
    /// What is told once nothing is parked any more, and until when that may take.
    closing: Option<(mpsc::Receiver<()>, Instant)>,
}

impl Frontends for FakeFrontends {
    fn open(&mut self, vssd: &Arc<Vssd>, capacity: ByteOffset) -> Result<(), FrontendError> {
        let mut recorded = self.recorded.lock().unwrap();
        if recorded.refuse_open {
            let source = std::io::ErrorKind::AddrInUse.into();
            return Err(FrontendError::Listen { path: PathBuf::from("/nowhere"), source });
        }
        recorded.asked.push(Asked::Open(vssd.name().to_owned(), capacity.0));
        let socket_path = PathBuf::from(format!("/run/{}.sock", vssd.name()));
        recorded.status.insert(vssd.id().0, FrontendStatus { socket_path, ..FrontendStatus::default() });
        Ok(())
    }

    /// Like the real one it stops queues, which wait for the owner to give back what is parked.
    fn close(&mut self, device: VssdId) -> Result<(), FrontendError> {
        let (done, stopped) = mpsc::channel();
        self.owner.send(DeviceEvent::Quiesce { device, done });
        self.closing = Some((stopped, Instant::now() + PATIENCE));
        Ok(())
    }

    fn is_closed(&mut self, device: VssdId) -> bool {
        let Some((stopped, give_up)) = &self.closing else { return true };
        if stopped.try_recv().is_err() {
            assert!(Instant::now() < *give_up, "the owner must go on serving while it closes a front-end");
            return false;
        }
        self.closing = None;
        self.recorded.lock().unwrap().asked.push(Asked::Close(device.0));
        true
    }

    fn set_notice(&mut self, _: VssdId, _: Notice) {}

    fn set_capacity(&mut self, device: VssdId, capacity: ByteOffset) {
        self.recorded.lock().unwrap().asked.push(Asked::Capacity(device.0, capacity.0));
    }

    fn status(&self, device: VssdId) -> FrontendStatus {
        self.recorded.lock().unwrap().status.get(&device.0).cloned().unwrap_or_default()
    }
}

/// Where a guest's answers arrive.
#[derive(Default)]
struct Mailbox {
    answers: Mutex<HashMap<u64, Vec<u8>>>,
    arrived: Condvar,
}

impl ReplySink for Mailbox {
    fn complete(&self, ticket: u64, response: Vec<u8>) {
        let old = self.answers.lock().unwrap().insert(ticket, response);
        assert!(old.is_none(), "answered twice");
        self.arrived.notify_all();
    }
}

/// The media of a pool that outlive a daemon.
pub(crate) struct Disks {
    dir: TempDir,
}

impl Disks {
    /// A pool of about `mib` MiB of emulated NV-RAM.
    pub(crate) fn new(mib: u64) -> Self {
        let dir = tempfile::Builder::new().prefix("vssd-control-").tempdir_in("/dev/shm").unwrap();
        let disks = Self { dir };
        let medium = MediumSpec::new(MediumKind::Nvram, disks.path("pool"), Some(mib * MIB));
        Pool::create(&CreateOptions::new("test", vec![medium])).unwrap();
        disks
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn open(&self) -> Arc<Pool> {
        Pool::open(&OpenOptions::new([self.path("pool")])).unwrap()
    }
}

/// A running control loop.
pub(crate) struct Daemon {
    pub(crate) pool: Arc<Pool>,
    pub(crate) owner: OwnerHandle,
    pub(crate) recorded: Arc<Mutex<Recorded>>,
    pub(crate) thread_id: rustix::thread::Pid,
    control: PathBuf,
    monitor: PathBuf,
    shutdown: OwnedFd,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Daemon {
    pub(crate) fn start(disks: &Disks) -> Self {
        Self::over(disks.open(), disks)
    }

    pub(crate) fn over(pool: Arc<Pool>, disks: &Disks) -> Self {
        Self::with_max_ranges(pool, disks, MAX_RANGES)
    }

    pub(crate) fn with_max_ranges(pool: Arc<Pool>, disks: &Disks, max_ranges: u32) -> Self {
        let (control, monitor) = (disks.path("control.sock"), disks.path("monitor.sock"));
        let listen = |path: &Path| {
            let _ = std::fs::remove_file(path);
            Some(UnixListener::bind(path).unwrap())
        };
        let (owner, events, wake) = OwnerHandle::new().unwrap();
        let recorded = Arc::new(Mutex::new(Recorded::default()));
        let frontends =
            FakeFrontends { recorded: Arc::clone(&recorded), owner: owner.clone(), closing: None };
        let shutdown = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let server = Server::new(ServerOptions {
            pool: Arc::clone(&pool),
            frontends: Box::new(frontends),
            events,
            wake,
            control: listen(&control),
            monitor: listen(&monitor),
            shutdown: shutdown.try_clone().unwrap(),
            refusals: None,
        })
        .unwrap()
        .with_max_ranges(max_ranges);
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            sender.send(rustix::thread::gettid()).unwrap();
            server.run()
        });
        let thread_id = receiver.recv().unwrap();
        Self { pool, owner, recorded, thread_id, control, monitor, shutdown, thread: Some(thread) }
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.control)
    }

    pub(crate) fn watcher(&self) -> Client {
        Client::connect(&self.monitor)
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.recorded.lock().unwrap().asked.clone()
    }

    pub(crate) fn create(&self, name: &str, size: u64, max: u64) -> VssdId {
        let params = json!({ "name": name, "size_bytes": size, "max_bytes": max });
        let info = self.client().ok("device.create", params);
        VssdId(u32::try_from(info["id"].as_u64().unwrap()).unwrap())
    }

    /// Ends the control loop and returns what it returned.
    pub(crate) fn stop(mut self) -> Result<(), ServerError> {
        self.end().unwrap()
    }

    fn end(&mut self) -> Option<Result<(), ServerError>> {
        let thread = self.thread.take()?;
        rustix::io::write(&self.shutdown, &1u64.to_ne_bytes()).unwrap();
        Some(thread.join().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            drop(self.end());
        }
    }
}

/// A client of a control socket.
pub(crate) struct Client {
    pub(crate) stream: UnixStream,
    pub(crate) reader: BufReader<UnixStream>,
    next_id: u64,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let reader = BufReader::new(stream.try_clone().unwrap());
        Self { stream, reader, next_id: 0 }
    }

    pub(crate) fn send_line(&mut self, line: &[u8]) {
        self.stream.write_all(line).unwrap();
        self.stream.write_all(b"\n").unwrap();
    }

    /// The next line, or `None` at the end of the connection.
    pub(crate) fn read(&mut self) -> Option<Value> {
        let mut line = String::new();
        let n = self.reader.read_line(&mut line).unwrap();
        (n > 0).then(|| serde_json::from_str(&line).unwrap())
    }

    pub(crate) fn request(&mut self, method: &str, params: Value) -> u64 {
        self.next_id += 1;
        let mut request = json!({ "jsonrpc": "2.0", "id": self.next_id, "method": method });
        request["params"] = params;
        self.send_line(request.to_string().as_bytes());
        self.next_id
    }

    /// The answer to a call; events in between are passed over.
    pub(crate) fn call(&mut self, method: &str, params: Value) -> Value {
        let id = self.request(method, params);
        loop {
            let answer = self.read().expect("an answer");
            if answer.get("id").is_some() {
                assert_eq!(answer["id"], id);
                return answer;
            }
        }
    }

    pub(crate) fn ok(&mut self, method: &str, params: Value) -> Value {
        let mut answer = self.call(method, params);
        assert!(answer.get("error").is_none(), "{method}: {answer}");
        answer["result"].take()
    }

    /// The error of a call: its stable code and all of it.
    pub(crate) fn err(&mut self, method: &str, params: Value) -> (String, Value) {
        let mut answer = self.call(method, params);
        let error = answer["error"].take();
        assert!(error.is_object(), "{method}: {answer}");
        (error["data"]["code"].as_str().unwrap().to_owned(), error)
    }

    pub(crate) fn fails_with(&mut self, code: ErrorCode, method: &str, params: Value) {
        assert_eq!(self.err(method, params).0, code.as_str());
    }

    /// Events until one has this name.
    pub(crate) fn events_until(&mut self, name: &str) -> Vec<Value> {
        let mut events = Vec::new();
        loop {
            let mut line = self.read().expect("an event");
            if line["method"] == "event" {
                let event = line["params"].take();
                let last = event["event"] == name;
                events.push(event);
                if last {
                    return events;
                }
            }
        }
    }
}

/// A guest that speaks to the owner as a queue's worker would.
pub(crate) struct Guest {
    device: VssdId,
    owner: OwnerHandle,
    mailbox: Arc<Mailbox>,
    kinds: HashMap<u64, vssd_protocol::guest::RequestType>,
    next: u64,
}

impl Guest {
    /// A front-end connects and a driver starts its queue.
    pub(crate) fn boot(daemon: &Daemon, device: VssdId) -> Self {
        if let Some(status) = daemon.recorded.lock().unwrap().status.get_mut(&device.0) {
            status.connected = true;
        }
        daemon.owner.send(DeviceEvent::Connected { device, pid: Some(7) });
        daemon.owner.send(DeviceEvent::QueueStarted { device, queue: 0, fresh: true });
        let owner = daemon.owner.clone();
        Self { device, owner, mailbox: Arc::default(), kinds: HashMap::new(), next: 0 }
    }

    pub(crate) fn send_with_room(&mut self, request: Request, response_room: usize) -> u64 {
        self.next += 1;
        self.kinds.insert(self.next, request.kind());
        let sink: Arc<dyn ReplySink> = Arc::<Mailbox>::clone(&self.mailbox);
        let reply = Reply::new(sink, self.next);
        let device = self.device;
        self.owner.send(DeviceEvent::Guest(GuestCall { device, request, response_room, reply }));
        self.next
    }

    pub(crate) fn send(&mut self, request: Request) -> u64 {
        let ranges = match &request {
            Request::Unplug { ranges, .. } | Request::Plug { ranges, .. } => {
                u32::try_from(ranges.len()).unwrap()
            }
            _ => 0,
        };
        let room = min_response_len(request.kind(), ranges);
        self.send_with_room(request, room)
    }

    /// The answer to `ticket`; `None` if it was answered IOERR.
    pub(crate) fn answer(&self, ticket: u64) -> Option<Response> {
        let end = Instant::now() + PATIENCE;
        let mut answers = self.mailbox.answers.lock().unwrap();
        loop {
            if let Some(bytes) = answers.remove(&ticket) {
                return (!bytes.is_empty()).then(|| Response::decode(self.kinds[&ticket], &bytes).unwrap());
            }
            let left =
                end.checked_duration_since(Instant::now()).expect("a guest's request was not answered");
            answers = self.mailbox.arrived.wait_timeout(answers, left).unwrap().0;
        }
    }

    pub(crate) fn is_answered(&self, ticket: u64) -> bool {
        self.mailbox.answers.lock().unwrap().contains_key(&ticket)
    }

    pub(crate) fn call(&mut self, request: Request) -> Response {
        let ticket = self.send(request);
        self.answer(ticket).unwrap()
    }

    /// Begins a session and returns its epoch.
    pub(crate) fn hello(&mut self) -> u64 {
        let answer = self.call(Request::Hello { version: 1, features: 0, driver: "vssd test".into() });
        match answer.body {
            vssd_protocol::guest::ResponseBody::Hello(hello) => hello.epoch,
            other => panic!("{other:?}"),
        }
    }
}
