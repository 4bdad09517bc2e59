// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A client's lines, over a real control socket into the running control loop.
//!
//! Oracles: no panic; every line that comes back is JSON-RPC; a good request behind the input is answered, or the connection was ended for
//! a line that is too long; what was opened is closed again.

#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has failed")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use vssd_backend::control::{Server, ServerOptions};
use vssd_backend::device::{DeviceEvent, FrontendError, FrontendStatus, Frontends, OwnerHandle};
use vssd_fuzz::{event, medium, open, setup, vssd};
use vssd_pool::store::Store;
use vssd_pool::{Vssd, VssdId};
use vssd_protocol::letter::Notice;
use vssd_protocol::units::ByteOffset;

/// Front-ends that nobody connects to.
struct Nobody(OwnerHandle, Mutex<HashMap<u32, FrontendStatus>>, Option<mpsc::Receiver<()>>);

impl Frontends for Nobody {
    fn open(&mut self, vssd: &Arc<Vssd>, _: ByteOffset) -> Result<(), FrontendError> {
        self.1.lock().unwrap().insert(vssd.id().0, FrontendStatus::default());
        Ok(())
    }

    fn close(&mut self, device: VssdId) -> Result<(), FrontendError> {
        let (done, stopped) = mpsc::channel();
        self.0.send(DeviceEvent::Quiesce { device, done });
        self.2 = Some(stopped);
        Ok(())
    }

    fn is_closed(&mut self, _: VssdId) -> bool {
        !matches!(self.2.as_ref().map(mpsc::Receiver::try_recv), Some(Err(mpsc::TryRecvError::Empty)))
    }

    fn set_capacity(&mut self, _: VssdId, _: ByteOffset) {}
    fn set_notice(&mut self, _: VssdId, _: Notice) {}

    fn status(&self, device: VssdId) -> FrontendStatus {
        self.1.lock().unwrap().get(&device.0).cloned().unwrap_or_default()
    }
}

struct Daemon {
    sockets: [PathBuf; 2],
    _dir: tempfile::TempDir,
}

fn daemon() -> &'static Daemon {
    static DAEMON: OnceLock<Daemon> = OnceLock::new();
    DAEMON.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let sockets = ["control", "monitor"].map(|name| dir.path().join(name));
        let [control, monitor] = [0, 1].map(|n| Some(UnixListener::bind(&sockets[n]).unwrap()));
        let pool = open(medium(256) as Arc<dyn Store>, true).unwrap();
        vssd(&pool, "one", 32);
        let (owner, events, wake) = OwnerHandle::new().unwrap();
        let server = Server::new(ServerOptions {
            pool,
            frontends: Box::new(Nobody(owner, Mutex::default(), None)),
            events,
            wake,
            control,
            monitor,
            shutdown: event(),
            refusals: None,
        })
        .unwrap();
        std::thread::spawn(move || server.run().unwrap());
        Daemon { sockets, _dir: dir }
    })
}

fuzz_target!(|data: &[u8]| {
    setup();
    let Some((choice, lines)) = data.split_first() else { return };
    let daemon = daemon();
    let mut socket = UnixStream::connect(&daemon.sockets[usize::from(choice & 1)]).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut bytes = lines.to_vec();
    let probe = json!({ "jsonrpc": "2.0", "id": "last", "method": "server.hello" });
    bytes.extend_from_slice(format!("\n{probe}\n").as_bytes());
    if socket.write_all(&bytes).is_err() {
        return; // ended for a line that is too long
    }
    let mut reader = BufReader::new(socket);
    let mut line = String::new();
    loop {
        line.clear();
        let read = match reader.read_line(&mut line) {
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("no answer: {error}"),
        };
        if read == 0 {
            assert!(lines.len() > 60_000, "ended without a reason");
            break;
        }
        let answer: Value = serde_json::from_str(&line).expect("an answer that is no JSON");
        assert_eq!(answer["jsonrpc"], "2.0");
        if answer["id"] == "last" {
            break;
        }
    }
});
