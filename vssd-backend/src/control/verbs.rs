// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The methods of the control channel: from a call to its outcome. What a client sends can be anything at all.

use control_server::rpc::{self, failure, nothing, read, shorten};
use control_server::{Call, Door};
use serde::Serialize;
use serde_json::{Value, json};
use vssd_protocol::control::{
    DeviceList, ErrorCode, EvictedParams, HelloParams, JobList, JobParams, JobWaitParams, NameParams, SCHEMA,
    ServerInfo, SubscribeParams, SyncAnswer, method,
};

use super::fault::Fault;
use super::negotiation::Actor;
use crate::device::owner::Owner;

/// Longest time that `job.wait` may take.
const MAX_WAIT_MS: u64 = 60_000;

/// What an answer waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Awaited {
    /// That the job changes, until `until_ms`.
    Job { job: u64, until_ms: u64 },
    /// That a sync ends.
    Sync { ticket: u64 },
}

/// What a line comes to.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The answer, with its newline.
    Answer(String),
    /// Answer when it has come.
    Wait { id: Value, what: Awaited },
    /// Answer, then events.
    Subscribe { answer: String, filter: Vec<String>, since: u64 },
}

/// Carries out one line (without its newline).
pub(super) fn handle(owner: &mut Owner, door: Door, actor: Actor, line: &[u8]) -> Outcome {
    let call = match rpc::parse(line) {
        Ok(call) => call,
        Err((id, fault)) => return Outcome::Answer(failure(&id, fault)),
    };
    let id = call.id.clone();
    match dispatch(owner, door, actor, call) {
        Ok(outcome) => outcome,
        Err(fault) => Outcome::Answer(failure(&id, fault)),
    }
}

/// The answer to a `device.sync`.
pub(super) fn synced(id: &Value, result: Result<SyncAnswer, Fault>) -> String {
    match result {
        Ok(answer) => success(id, &answer),
        Err(fault) => failure(id, fault),
    }
}

/// The answer to a `job.wait`.
pub(super) fn waited(owner: &Owner, id: &Value, job: u64) -> String {
    match owner.job(job) {
        Ok(info) => success(id, &info),
        Err(fault) => failure(id, fault),
    }
}

fn dispatch(owner: &mut Owner, door: Door, actor: Actor, call: Call) -> Result<Outcome, Fault> {
    let Call { id, method, params } = call;
    let known = is_known(&method);
    if known && door == Door::Monitor && !method::is_read_only(&method) {
        return Err(rpc::not_on_monitor(&method));
    }
    let answer = match method.as_str() {
        method::HELLO => {
            let HelloParams { client } = read(params)?;
            tracing::debug!(client = shorten(&client), uid = actor.uid, pid = actor.pid, "hello");
            success(&id, &server_info(owner, door))
        }
        method::DEVICE_LIST => {
            nothing(params)?;
            success(&id, &DeviceList { devices: owner.list() })
        }
        method::DEVICE_SHOW => {
            let NameParams { name } = read(params)?;
            success(&id, &owner.show(&name)?)
        }
        method::DEVICE_EVICTED => {
            let EvictedParams { name, start } = read(params)?;
            success(&id, &owner.evicted(&name, start)?)
        }
        method::DEVICE_CREATE => success(&id, &owner.create(&read(params)?, actor)?),
        method::DEVICE_DELETE => {
            owner.delete(&read(params)?, actor)?;
            success(&id, &json!({}))
        }
        method::DEVICE_RESIZE => success(&id, &owner.resize(&read(params)?, actor)?),
        method::DEVICE_ESTIMATE => {
            let NameParams { name } = read(params)?;
            success(&id, &owner.estimate(&name)?)
        }
        method::DEVICE_RECLAIM => success(&id, &owner.wish_reclaim(&read(params)?, actor)?),
        method::DEVICE_LIMITS => success(&id, &owner.limits(&read(params)?, actor)?),
        method::DEVICE_SYNC => {
            let ticket = owner.sync(read(params)?, actor)?;
            return Ok(Outcome::Wait { id, what: Awaited::Sync { ticket } });
        }
        method::JOB_LIST => {
            nothing(params)?;
            success(&id, &JobList { jobs: owner.job_list() })
        }
        method::JOB_SHOW => {
            let JobParams { id: job } = read(params)?;
            success(&id, &owner.job(job)?)
        }
        method::JOB_CANCEL => {
            let JobParams { id: job } = read(params)?;
            success(&id, &owner.cancel(job, actor)?)
        }
        method::JOB_WAIT => {
            let JobWaitParams { id: job, timeout_ms } = read(params)?;
            if timeout_ms > MAX_WAIT_MS {
                let message = format!("timeout_ms is {timeout_ms}, at most {MAX_WAIT_MS} is allowed");
                return Err(Fault::new(ErrorCode::InvalidParams, message));
            }
            let info = owner.job(job)?;
            if !info.state.is_final() && timeout_ms > 0 {
                let until_ms = owner.clock().now_ms() + timeout_ms;
                return Ok(Outcome::Wait { id, what: Awaited::Job { job, until_ms } });
            }
            success(&id, &info)
        }
        method::POOL_STATUS => {
            nothing(params)?;
            success(&id, &owner.pool_status())
        }
        method::EVENTS_SUBSCRIBE => {
            let SubscribeParams { filter, since_seq } = rpc::subscription(params)?;
            let newest = owner.log().newest();
            let answer = success(&id, &json!({ "seq": newest }));
            return Ok(Outcome::Subscribe { answer, filter, since: since_seq.unwrap_or(newest) });
        }
        _ => return Err(rpc::unknown_method(&method)),
    };
    Ok(Outcome::Answer(answer))
}

fn is_known(method: &str) -> bool {
    method::is_read_only(method)
        || matches!(
            method,
            method::DEVICE_CREATE
                | method::DEVICE_DELETE
                | method::DEVICE_RESIZE
                | method::DEVICE_LIMITS
                | method::DEVICE_RECLAIM
                | method::DEVICE_SYNC
                | method::JOB_CANCEL
        )
}

fn server_info(owner: &Owner, door: Door) -> ServerInfo {
    ServerInfo {
        server: "vssd-backend".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        schema: SCHEMA.to_owned(),
        pool: owner.pool_name(),
        pid: std::process::id(),
        uptime_ms: owner.clock().now_ms(),
        socket: door.name().to_owned(),
        max_line_bytes: door.max_line() as u64,
    }
}

fn success<T: Serialize>(id: &Value, result: &T) -> String {
    rpc::success(id, result, "ask for less, or look from inside the guest")
}
