// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the parts of the daemon have to tell, as events for subscribers; and what they ask of vssd-backend.
//!
//! Event names: `vm.state`, `vm.reset`, `vm.panicked`, `vm.disk-error`; `power.state`, `power.source-lost|source-back`, `power.armed|disarmed`,
//! `power.saved`, `power.resumed`, `power.save-incomplete`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use control_client::{Client, Peer, Program};
use control_server::About;
use control_server::blocking::Feed;
use serde_json::{Value, json};
use vssd_protocol::control::ErrorCode;

use crate::definition::Definition;
use crate::fault::Fault;
use crate::guard::{Bell, Report};
use crate::host::Outcome;
use crate::power::Event;
use crate::vm::{Tell, VmNews};
use crate::vmm::News;

/// What vssd-backend's answer may take: a flush of all that its vSSDs were given.
const SYNC_LIMIT: Duration = Duration::from_secs(10);

/// As vssd-backend knows us.
static BACKEND: Program = Program {
    name: "vm-host",
    version: env!("CARGO_PKG_VERSION"),
    schema: "vssd.v1",
    objects: "vSSD",
    full: "the pool is full",
    peer: Peer {
        name: "vssd-backend",
        start: "vssd-backend",
        socket: "/run/vssd/control.sock",
        user_socket: None,
        socket_env: "BALLOON_CTL_SOCKET",
        has_monitor: true,
    },
};

/// Tells subscribers, and the power loop where it matters to it.
#[derive(Debug)]
pub struct Reporter {
    pub feed: Arc<Feed>,
    pub bell: Bell,
    /// vssd-backend's control socket.
    pub backend: PathBuf,
}

impl Reporter {
    fn vm(&self, name: &str, vm: &str, data: Value) {
        self.feed.tell(name, About::object("vm", vm), data);
    }

    fn power(&self, name: &str, data: Value) {
        self.feed.tell(name, About::NOTHING, data);
    }
}

impl Tell for Reporter {
    fn tell(&self, vm: &str, news: VmNews) {
        match news {
            VmNews::State { from, to, why } => {
                self.vm("vm.state", vm, json!({ "from": from, "to": to, "why": why }));
                self.bell.ring();
            }
            VmNews::Guest(News::Reset) => self.vm("vm.reset", vm, Value::Null),
            // A change of state follows.
            VmNews::Guest(News::Shutdown) => {}
            VmNews::Guest(News::Panicked) => self.vm("vm.panicked", vm, Value::Null),
            VmNews::Guest(News::DiskError(what)) => self.vm("vm.disk-error", vm, json!({ "what": what })),
        }
    }

    fn sync_vssds(&self, definition: &Definition) -> Result<(), Fault> {
        if definition.vssd.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = definition.vssd.iter().map(|vssd| vssd.name.as_str()).collect();
        let synced = Client::connect(&BACKEND, &self.backend, SYNC_LIMIT)
            .and_then(|mut backend| backend.call::<Value>("device.sync", &json!({ "names": names })));
        synced.map(drop).map_err(|error| {
            Fault::of(ErrorCode::Media, &error)
                .hint("what the guest's vSSDs have acknowledged must be durable before it counts as saved")
        })
    }
}

impl Report for Reporter {
    fn power(&self, event: &Event, source: Option<&str>) {
        let name = match event {
            Event::StateChanged { .. } => "power.state",
            Event::SourceLost { .. } => "power.source-lost",
            Event::SourceBack { .. } => "power.source-back",
            Event::SaveIncomplete { .. } => "power.save-incomplete",
        };
        let mut data = serde_json::to_value(event).unwrap_or_default();
        if let Some(source) = source {
            data["name"] = source.into();
        }
        self.power(name, data);
    }

    fn over(&self, what: &'static str, outcome: Outcome) {
        let name = if what == "save" { "power.saved" } else { "power.resumed" };
        let took_us = u64::try_from(outcome.took.as_micros()).unwrap_or(u64::MAX);
        self.power(name, json!({ "ok": outcome.ok, "failed": outcome.failed, "took_us": took_us }));
    }

    fn armed(&self, armed: bool) {
        self.power(if armed { "power.armed" } else { "power.disarmed" }, Value::Null);
    }
}
