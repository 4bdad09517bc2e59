// SPDX-License-Identifier: Apache-2.0 OR MIT

//! JSON-RPC: from a line to a call and from its outcome to a line. What a client sends can be anything at all.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use vssd_protocol::control::{
    DeviceList, ErrorCode, EvictedParams, HelloParams, JobList, JobParams, JobWaitParams, MAX_LINE,
    NameParams, SCHEMA, ServerInfo, SubscribeParams, method,
};

use super::fault::Fault;
use super::negotiation::Actor;
use crate::device::owner::Owner;

/// Longest time that `job.wait` may take.
const MAX_WAIT_MS: u64 = 60_000;
/// An id is sent back as it came; a client that needs a longer one does not need an id.
const MAX_ID_LEN: usize = 256;
const MAX_FILTERS: usize = 32;

/// Which socket a client came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Door {
    Control,
    /// Reads and events only.
    Monitor,
}

impl Door {
    /// Longest line, newline included. Anybody may come through the monitor socket, and many at a time: what is kept
    /// of each is small, and so is everything there is to ask.
    pub(super) fn max_line(self) -> usize {
        match self {
            Self::Control => MAX_LINE,
            Self::Monitor => MAX_LINE / 16,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Monitor => "monitor",
        }
    }
}

/// What a line comes to.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The answer, with its newline.
    Answer(String),
    /// Answer when the job changes or at `until_ms`.
    Wait { id: Value, job: u64, until_ms: u64 },
    /// Answer, then events.
    Subscribe { answer: String, filter: Vec<String>, since: u64 },
}

/// A request that is well-formed as JSON-RPC.
struct Call {
    id: Value,
    method: String,
    params: Map<String, Value>,
}

/// Carries out one line (without its newline).
pub(super) fn handle(owner: &mut Owner, door: Door, actor: Actor, line: &[u8]) -> Outcome {
    let call = match parse(line) {
        Ok(call) => call,
        Err((id, fault)) => return Outcome::Answer(failure(&id, fault)),
    };
    let id = call.id.clone();
    match dispatch(owner, door, actor, call) {
        Ok(outcome) => outcome,
        Err(fault) => Outcome::Answer(failure(&id, fault)),
    }
}

/// The answer to a `job.wait`.
pub(super) fn waited(owner: &Owner, id: &Value, job: u64) -> String {
    match owner.job(job) {
        Ok(info) => success(id, &info),
        Err(fault) => failure(id, fault),
    }
}

/// Refuses a request for a reason of the connection's own.
pub(super) fn refusal(id: &Value, code: ErrorCode, message: &str) -> String {
    failure(id, Fault::new(code, message))
}

/// An error that answers no particular request.
pub(super) fn complaint(code: ErrorCode, message: &str) -> String {
    failure(&Value::Null, Fault::new(code, message))
}

fn parse(line: &[u8]) -> Result<Call, (Value, Fault)> {
    let invalid = |id: &Value, message: &str| (id.clone(), Fault::new(ErrorCode::InvalidRequest, message));
    let value: Value = serde_json::from_slice(line).map_err(|error| {
        (Value::Null, Fault::new(ErrorCode::Parse, format!("the line is no JSON: {error}")))
    })?;
    let none = Value::Null;
    let mut object = match value {
        Value::Object(object) => object,
        Value::Array(_) => return Err(invalid(&none, "batches are not served: send one request a line")),
        _ => return Err(invalid(&none, "a request is a JSON object")),
    };
    let id = match object.remove("id") {
        Some(id @ Value::Number(_)) => id,
        Some(Value::String(id)) if id.len() <= MAX_ID_LEN => Value::String(id),
        Some(Value::String(_)) => return Err(invalid(&none, "the id is too long")),
        Some(Value::Null) | None => {
            return Err(invalid(&none, "a request needs an id: every method has an answer"));
        }
        Some(_) => return Err(invalid(&none, "an id is a number or a string")),
    };
    if object.remove("jsonrpc").as_ref().and_then(Value::as_str) != Some("2.0") {
        return Err(invalid(&id, "field jsonrpc must be \"2.0\""));
    }
    let Some(Value::String(method)) = object.remove("method") else {
        return Err(invalid(&id, "field method must be a string"));
    };
    let params = match object.remove("params") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(params)) => params,
        Some(_) => {
            let fault = Fault::new(ErrorCode::InvalidParams, "params must be an object with named fields");
            return Err((id, fault));
        }
    };
    if let Some(field) = object.keys().next() {
        return Err(invalid(&id, &format!("unknown field {:?} in the request", shorten(field))));
    }
    Ok(Call { id, method, params })
}

fn dispatch(owner: &mut Owner, door: Door, actor: Actor, call: Call) -> Result<Outcome, Fault> {
    let Call { id, method, params } = call;
    let known = is_known(&method);
    if known && door == Door::Monitor && !method::is_read_only(&method) {
        return Err(Fault::new(
            ErrorCode::Permission,
            format!("{method} is not served on the monitor socket"),
        )
        .hint("use the control socket"));
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
                return Ok(Outcome::Wait { id, job, until_ms });
            }
            success(&id, &info)
        }
        method::POOL_STATUS => {
            nothing(params)?;
            success(&id, &owner.pool_status())
        }
        method::EVENTS_SUBSCRIBE => {
            let SubscribeParams { filter, since_seq } = read(params)?;
            if filter.len() > MAX_FILTERS {
                let message = format!("{} filters, at most {MAX_FILTERS} are allowed", filter.len());
                return Err(Fault::new(ErrorCode::TooLarge, message));
            }
            let newest = owner.log().newest();
            let answer = success(&id, &json!({ "seq": newest }));
            return Ok(Outcome::Subscribe { answer, filter, since: since_seq.unwrap_or(newest) });
        }
        _ => {
            let message = format!("there is no method {:?}", shorten(&method));
            return Err(Fault::new(ErrorCode::UnknownMethod, message));
        }
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

fn read<T: DeserializeOwned>(params: Map<String, Value>) -> Result<T, Fault> {
    serde_json::from_value(Value::Object(params))
        .map_err(|error| Fault::new(ErrorCode::InvalidParams, shorten(&error.to_string())))
}

fn nothing(params: Map<String, Value>) -> Result<(), Fault> {
    match params.into_iter().next() {
        None => Ok(()),
        Some((field, _)) => {
            let message = format!("unknown field {:?}: this method takes no parameters", shorten(&field));
            Err(Fault::new(ErrorCode::InvalidParams, message))
        }
    }
}

fn success<T: Serialize>(id: &Value, result: &T) -> String {
    let line = format!("{}\n", json!({ "jsonrpc": "2.0", "id": id, "result": result }));
    if line.len() <= MAX_LINE {
        return line;
    }
    let message = format!("the answer has {} bytes, a line has at most {MAX_LINE}", line.len());
    failure(id, Fault::new(ErrorCode::TooLarge, message).hint("ask for less, or look from inside the guest"))
}

fn failure(id: &Value, fault: Fault) -> String {
    format!("{}\n", json!({ "jsonrpc": "2.0", "id": id, "error": fault.into_rpc() }))
}

/// What a client sent, short enough for an answer or a log.
fn shorten(text: &str) -> String {
    const MOST: usize = 200;
    if text.chars().count() <= MOST {
        return text.to_owned();
    }
    text.chars().take(MOST).chain("…".chars()).collect()
}
