// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Clients that say nothing cost nothing. Alone in its process, since it looks at all threads there are.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod lamp;

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::Duration;

use control_server::Door::{Control, Monitor};
use lamp::{Client, Daemon};
use serde_json::json;

/// How often each of the server's threads has gone to sleep.
fn sleeps() -> BTreeMap<String, u64> {
    let mut sleeps = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let path = task.unwrap().path();
        let status = fs::read_to_string(path.join("status")).unwrap();
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        if field("Name:") == "client" {
            let id = path.file_name().unwrap().to_string_lossy().into_owned();
            sleeps.insert(id, field("voluntary_ctxt_switches:").parse().unwrap());
        }
    }
    sleeps
}

#[test]
fn idle_connections_are_never_woken() {
    let daemon = Daemon::start();
    let mut clients: Vec<Client> = (0..20).map(|_| daemon.client(Control)).collect();
    clients.extend((0..20).map(|_| daemon.client(Monitor)));
    for client in &mut clients {
        client.subscribe(&json!({}));
    }
    daemon.lamp.tell(1);
    clients.iter_mut().for_each(|client| assert_eq!(client.event().1, 1));
    // One whose line has not ended, and one that does not read: until it has settled, it is not idle.
    clients[0].say(b"{");
    (0..50).for_each(|_| clients[1].ask("lamp.big", &json!({})));
    thread::sleep(Duration::from_millis(500));
    let before = sleeps();
    assert_eq!(before.len(), 40);
    thread::sleep(Duration::from_secs(1));
    assert_eq!(sleeps(), before);
    daemon.lamp.tell(1);
    clients[2].event();
    assert_ne!(sleeps(), before, "it can be seen");
}
