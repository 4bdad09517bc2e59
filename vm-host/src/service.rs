// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The verbs of the control channel: parameters in, answers out.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use control_server::blocking::{Access, Feed, Service};
use control_server::{Door, Fault, Peer, rpc};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tracing::info;
use vssd_protocol::control::ErrorCode;

use crate::guard::Guard;
use crate::host::Host;
use crate::nvram::{self, MediumConfig};
use crate::vm::{Order, Status};
use crate::wire::{
    DefineParams, HelloParams, LintAnswer, LintParams, NameParams, NvramList, PowerAnswer, PowerTestParams,
    ProbeAnswer, ProbeParams, SCHEMA, ServerInfo, StopParams, VmList, method,
};

/// What the daemon does for its clients.
#[derive(Debug)]
pub struct Verbs {
    host: Arc<Host>,
    guard: Guard,
    feed: Arc<Feed>,
    log_dir: PathBuf,
}

impl Verbs {
    pub fn new(host: Arc<Host>, guard: Guard, feed: Arc<Feed>, log_dir: PathBuf) -> Self {
        Self { host, guard, feed, log_dir }
    }

    fn hello(&self, door: Door) -> ServerInfo {
        ServerInfo {
            server: "vm-host".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            schema: SCHEMA.to_owned(),
            pid: std::process::id(),
            uptime_ms: self.feed.clock().now_ms(),
            socket: door.name().to_owned(),
            max_line_bytes: u64::try_from(door.max_line()).unwrap_or(u64::MAX),
            log_dir: self.log_dir.clone(),
        }
    }

    fn order(&self, params: Map<String, Value>, order: Order) -> Result<Status, Fault> {
        let NameParams { name } = rpc::read(params)?;
        self.host.order(&name, order)
    }
}

impl Service for Verbs {
    fn access(&self, method: &str) -> Option<Access> {
        method::access(method)
    }

    fn call(&self, door: Door, peer: Peer, method: &str, params: Map<String, Value>) -> Result<Value, Fault> {
        if method::access(method) == Some(Access::Change) {
            let vm = params.get("name").and_then(Value::as_str);
            info!(method, vm, uid = peer.uid, pid = peer.pid, "asked");
        }
        match method {
            method::HELLO => {
                let _: HelloParams = rpc::read(params)?;
                answer(&self.hello(door))
            }
            method::VM_LIST => {
                rpc::nothing(params)?;
                answer(&VmList::of(&self.host))
            }
            method::VM_SHOW => {
                let NameParams { name } = rpc::read(params)?;
                answer(&self.host.show(&name)?)
            }
            method::VM_DEFINE => {
                let DefineParams { definition, replace } = rpc::read(params)?;
                answer(&self.host.define(&definition, replace)?)
            }
            method::VM_UNDEFINE => {
                let NameParams { name } = rpc::read(params)?;
                self.host.undefine(&name)?;
                Ok(json!({}))
            }
            method::VM_START => {
                let NameParams { name } = rpc::read(params)?;
                answer(&self.host.start(&name)?)
            }
            method::VM_STOP => {
                let stop: StopParams = rpc::read(params)?;
                let grace = Duration::from_millis(stop.grace_ms());
                answer(&self.host.order(&stop.name, Order::Stop { grace })?)
            }
            method::VM_SAVE => answer(&self.order(params, Order::Save)?),
            method::VM_RESTORE => answer(&self.order(params, Order::Resume)?),
            method::VM_SWAP_OUT => answer(&self.order(params, Order::SwapOut)?),
            method::VM_SWAP_IN => answer(&self.order(params, Order::SwapIn)?),
            method::VM_DISCARD => answer(&self.order(params, Order::Discard)?),
            method::VM_LINT => {
                let LintParams { definition } = rpc::read(params)?;
                answer(&LintAnswer { findings: self.host.lint(&definition)? })
            }
            method::NVRAM_LIST => {
                rpc::nothing(params)?;
                answer(&NvramList::of(self.host.media()))
            }
            method::NVRAM_PROBE => {
                let ProbeParams { path, declared_persistent } = rpc::read(params)?;
                let config = MediumConfig { declared_persistent, ..MediumConfig::new("probe", path) };
                answer(&ProbeAnswer::of(&nvram::probe(&config)?))
            }
            method::POWER_STATUS => {
                rpc::nothing(params)?;
                answer(&PowerAnswer { power: self.guard.status(), plan: self.host.plan() })
            }
            method::POWER_TEST => {
                let PowerTestParams { stage } = rpc::read(params)?;
                self.guard
                    .pretend(stage.into())
                    .map_err(|error| Fault::new(ErrorCode::Internal, format!("cannot pretend: {error}")))?;
                Ok(json!({}))
            }
            _ => Err(rpc::unknown_method(method)),
        }
    }

    fn feed(&self) -> &Feed {
        &self.feed
    }
}

fn answer(value: &impl Serialize) -> Result<Value, Fault> {
    serde_json::to_value(value).map_err(|error| Fault::new(ErrorCode::Internal, error.to_string()))
}
