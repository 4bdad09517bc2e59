// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The control channel: JSON-RPC 2.0, one object per line, over a Unix stream socket.
//!
//! ```text
//!   client ── {"jsonrpc":"2.0","id":1,"method":"device.resize","params":{…}} ──► daemon
//!   client ◄── {"jsonrpc":"2.0","id":1,"result":{…}} | {"…","error":{code,message,data}} ── daemon
//!   client ◄── {"jsonrpc":"2.0","method":"event","params":{…}} ── daemon      (after events.subscribe)
//! ```
//!
//! Sizes are integers with the unit in the key (`plugged_bytes`), never strings. Unknown fields of a
//! request are refused, so that a typing error cannot silently do something else; unknown fields of an
//! answer must be ignored, so that the daemon may add some. Long work is a [`JobInfo`].
//!
//! This module knows neither sockets nor devices.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::units::BlockRange;

/// Name and version of this set of messages, in every greeting and every `--json` output.
pub const SCHEMA: &str = "vssd.v1";
/// Longest line, newline included, in bytes; a longer one ends the connection.
pub const MAX_LINE: usize = 1 << 20;
/// Longest name of a vSSD in bytes.
pub const MAX_NAME: usize = 31;

/// Whether `name` may name a vSSD: 1 to [`MAX_NAME`] of `a-z A-Z 0-9 . _ -`, not beginning with `.` or `-`.
/// Names become file names of sockets and words on command lines.
pub fn is_valid_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with(['.', '-'])
}

/// A request line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RpcRequest {
    pub jsonrpc: String,
    /// A number or a string; a line without one is refused, for every method has an answer.
    #[serde(default)]
    pub id: Option<Value>,
    pub method: String,
    #[serde(default)]
    pub params: Option<Value>,
}

/// An answer line: exactly one of `result` and `error`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RpcResponse {
    pub jsonrpc: String,
    pub id: Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<RpcError>,
}

/// The error of an answer: `message` says what and why, `data` carries the stable code and what to do next.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RpcError {
    /// JSON-RPC's number; [`ErrorCode::rpc_code`].
    pub code: i32,
    pub message: String,
    pub data: ErrorData,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorData {
    pub code: ErrorCode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Numbers behind the message, such as the largest shrink possible now.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub detail: Value,
}

/// Stable error codes. Scripts match on them: none changes its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorCode {
    /// The line is no JSON.
    #[serde(rename = "E_PARSE")]
    Parse,
    /// The line is JSON but no request.
    #[serde(rename = "E_INVALID_REQUEST")]
    InvalidRequest,
    #[serde(rename = "E_UNKNOWN_METHOD")]
    UnknownMethod,
    /// A parameter is missing, unknown, of the wrong type or out of bounds.
    #[serde(rename = "E_INVALID_PARAMS")]
    InvalidParams,
    #[serde(rename = "E_NOT_FOUND")]
    NotFound,
    #[serde(rename = "E_EXISTS")]
    Exists,
    /// Below the vSSD's minimum size.
    #[serde(rename = "E_BELOW_MIN")]
    BelowMin,
    /// Above the vSSD's maximum size.
    #[serde(rename = "E_ABOVE_MAX")]
    AboveMax,
    /// The pool cannot honour the promise.
    #[serde(rename = "E_POOL_FULL")]
    PoolFull,
    /// Compare-and-set failed: somebody else changed the size first.
    #[serde(rename = "E_CONFLICT")]
    Conflict,
    /// A front-end is connected, or blocks to be dropped hold data.
    #[serde(rename = "E_IN_USE")]
    InUse,
    /// The guest has no driver that can choose blocks.
    #[serde(rename = "E_NO_DRIVER")]
    NoDriver,
    #[serde(rename = "E_GUEST_REFUSED")]
    GuestRefused,
    /// The deadline passed and the policy is to fail.
    #[serde(rename = "E_TIMED_OUT")]
    TimedOut,
    /// The caller may not do this, or the socket is the monitor socket.
    #[serde(rename = "E_PERMISSION")]
    Permission,
    /// Too many connections, jobs or bytes in a line.
    #[serde(rename = "E_TOO_LARGE")]
    TooLarge,
    #[serde(rename = "E_BUSY")]
    Busy,
    /// A medium failed; see the daemon's log.
    #[serde(rename = "E_MEDIA")]
    Media,
    #[serde(rename = "E_INTERNAL")]
    Internal,
    /// `vm-host`: saving the VM too would take longer than the energy that is left after a power failure.
    #[serde(rename = "E_BUDGET")]
    Budget,
    /// `vm-host`: a saved state, or the memory that it belongs to, is damaged, of another version, or used already.
    #[serde(rename = "E_STATE")]
    State,
    /// `vm-host`: the hypervisor refused what it was asked, or ended.
    #[serde(rename = "E_VMM")]
    Vmm,
    /// `vm-host`: a VM of this definition would not survive a power cut.
    #[serde(rename = "E_LINT")]
    Lint,
    /// `vm-host`: the VM is not in a state in which this can be done.
    #[serde(rename = "E_WRONG_STATE")]
    WrongState,
}

impl ErrorCode {
    /// The number JSON-RPC 2.0 wants; the specification's own where it has one.
    pub fn rpc_code(self) -> i32 {
        match self {
            Self::Parse => -32700,
            Self::InvalidRequest => -32600,
            Self::UnknownMethod => -32601,
            Self::InvalidParams => -32602,
            Self::Internal => -32603,
            Self::NotFound => -32001,
            Self::Exists => -32002,
            Self::BelowMin => -32003,
            Self::AboveMax => -32004,
            Self::PoolFull => -32005,
            Self::Conflict => -32006,
            Self::InUse => -32007,
            Self::NoDriver => -32008,
            Self::GuestRefused => -32009,
            Self::TimedOut => -32010,
            Self::Permission => -32011,
            Self::TooLarge => -32012,
            Self::Busy => -32013,
            Self::Media => -32014,
            Self::Budget => -32015,
            Self::State => -32016,
            Self::Vmm => -32017,
            Self::Lint => -32018,
            Self::WrongState => -32019,
        }
    }

    /// The code as people see it, `E_NOT_FOUND`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Parse => "E_PARSE",
            Self::InvalidRequest => "E_INVALID_REQUEST",
            Self::UnknownMethod => "E_UNKNOWN_METHOD",
            Self::InvalidParams => "E_INVALID_PARAMS",
            Self::NotFound => "E_NOT_FOUND",
            Self::Exists => "E_EXISTS",
            Self::BelowMin => "E_BELOW_MIN",
            Self::AboveMax => "E_ABOVE_MAX",
            Self::PoolFull => "E_POOL_FULL",
            Self::Conflict => "E_CONFLICT",
            Self::InUse => "E_IN_USE",
            Self::NoDriver => "E_NO_DRIVER",
            Self::GuestRefused => "E_GUEST_REFUSED",
            Self::TimedOut => "E_TIMED_OUT",
            Self::Permission => "E_PERMISSION",
            Self::TooLarge => "E_TOO_LARGE",
            Self::Busy => "E_BUSY",
            Self::Media => "E_MEDIA",
            Self::Internal => "E_INTERNAL",
            Self::Budget => "E_BUDGET",
            Self::State => "E_STATE",
            Self::Vmm => "E_VMM",
            Self::Lint => "E_LINT",
            Self::WrongState => "E_WRONG_STATE",
        }
    }
}

/// Method names. Those that change nothing are also served on the monitor socket.
pub mod method {
    pub const HELLO: &str = "server.hello";
    pub const DEVICE_LIST: &str = "device.list";
    pub const DEVICE_SHOW: &str = "device.show";
    pub const DEVICE_EVICTED: &str = "device.evicted";
    pub const DEVICE_ESTIMATE: &str = "device.estimate";
    pub const DEVICE_CREATE: &str = "device.create";
    pub const DEVICE_DELETE: &str = "device.delete";
    pub const DEVICE_RESIZE: &str = "device.resize";
    pub const DEVICE_LIMITS: &str = "device.limits";
    pub const DEVICE_RECLAIM: &str = "device.reclaim";
    pub const DEVICE_SYNC: &str = "device.sync";
    pub const JOB_LIST: &str = "job.list";
    pub const JOB_SHOW: &str = "job.show";
    pub const JOB_WAIT: &str = "job.wait";
    pub const JOB_CANCEL: &str = "job.cancel";
    pub const POOL_STATUS: &str = "pool.status";
    pub const EVENTS_SUBSCRIBE: &str = "events.subscribe";
    /// The notification that carries an [`Event`](super::Event).
    pub const EVENT: &str = "event";

    /// Whether a method only reads, so that the monitor socket serves it.
    pub fn is_read_only(method: &str) -> bool {
        matches!(
            method,
            HELLO
                | DEVICE_LIST
                | DEVICE_SHOW
                | DEVICE_EVICTED
                | DEVICE_ESTIMATE
                | JOB_LIST
                | JOB_SHOW
                | JOB_WAIT
                | POOL_STATUS
                | EVENTS_SUBSCRIBE
        )
    }
}

/// `server.hello`: who are you? Answer: [`ServerInfo`].
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HelloParams {
    /// Name and version of the client, for the log.
    #[serde(default)]
    pub client: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerInfo {
    pub server: String,
    pub version: String,
    pub schema: String,
    pub pool: String,
    pub pid: u32,
    pub uptime_ms: u64,
    /// `control` or `monitor`: which of the two sockets this is.
    pub socket: String,
    pub max_line_bytes: u64,
}

/// `device.show` and whatever else takes just a name.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NameParams {
    pub name: String,
}

/// Answer to `device.list`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceList {
    pub devices: Vec<DeviceInfo>,
}

/// What a vSSD is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceState {
    /// No front-end is connected.
    Detached,
    Online,
    Shrinking,
    Growing,
    /// The guest made no progress towards the requested size for 20 s.
    Uncooperative,
    /// A medium failed: reads may work, nothing new is acknowledged.
    Failed,
}

/// Which driver the guest uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriverKind {
    /// No driver runs.
    None,
    /// `virtio_blk` or another that does not know the guest channel.
    Stock,
    /// A driver that said HELLO.
    Vssd,
}

/// Which media a vSSD's blocks may come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// NV-RAM while there is some, then SSD.
    #[default]
    Any,
    Nvram,
    Ssd,
}

/// What happens when a shrink's deadline passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// The job ends `expired`; the guest goes on being asked.
    #[default]
    Wait,
    /// The job ends `expired`; the request is withdrawn.
    Fail,
    /// The host takes blocks itself: empty ones first, then those unused longest. Data is lost.
    Force,
}

/// What happens when a guest asks for more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PullPolicy {
    /// An event tells the operator.
    #[default]
    Notify,
    /// Granted within the maximum size and what the pool has.
    Grant,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    pub on_timeout: OnTimeout,
    /// Of a shrink that names none; 0: no deadline.
    pub deadline_ms: u64,
    pub pull: PullPolicy,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DriverInfo {
    pub kind: DriverKind,
    /// As the driver names itself in HELLO.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Of the last DECLINE or of nothing yet: what the guest said it could give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub could_give_bytes: Option<u64>,
}

/// The agent of a guest whose driver knows nothing of vSSDs, by what it says itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AgentInfo {
    /// How long ago it was heard of.
    pub heard_ms: u64,
    /// What it keeps the guest from using.
    pub held_bytes: u64,
    /// Why it keeps less than it was asked to: `nothing`, `busy`, `policy`, `error`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shortfall: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FrontendInfo {
    pub connected: bool,
    /// Of the process at the other end of the socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    pub queues: u32,
    /// How often a front-end has connected since the daemon started.
    pub connections: u64,
}

/// Counters since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IoCounters {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub errors: u64,
    /// Requests that met an unplugged block.
    pub evicted: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceInfo {
    pub name: String,
    pub id: u32,
    pub state: DeviceState,
    /// What a driver without the guest channel sees as the size of the disk.
    pub capacity_bytes: u64,
    pub requested_bytes: u64,
    pub plugged_bytes: u64,
    /// Blocks that hold data.
    pub allocated_bytes: u64,
    pub min_bytes: u64,
    pub max_bytes: u64,
    pub block_size_bytes: u64,
    pub class: Class,
    pub policy: Policy,
    pub socket_path: String,
    pub serial: String,
    /// How much of the disk the guest is asked to use at most, where its driver cannot give blocks up. A wish: nothing enforces
    /// it, and what the pool promises stays `requested_bytes`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft_bytes: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<AgentInfo>,
    pub driver: DriverInfo,
    pub frontend: FrontendInfo,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<u64>,
    pub io: IoCounters,
}

/// `device.evicted`. Answer: [`EvictedRanges`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvictedParams {
    pub name: String,
    /// The first block to look at.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub start: u32,
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}

/// Unplugged blocks, ascending, at most [`MAX_EVICTED`] ranges.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EvictedRanges {
    pub name: String,
    pub block_size_bytes: u64,
    pub ranges: Vec<BlockRange>,
    /// Where to go on; absent once the list is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u32>,
}

/// Ranges in one answer to `device.evicted`: what fits a line with room to spare.
pub const MAX_EVICTED: usize = 16384;

/// Answer to `device.estimate` (a [`NameParams`]): what the guest said last that it could give up now, by what that would cost
/// it. Nothing is promised: the guest may use any of it meanwhile.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EstimateAnswer {
    pub name: String,
    /// How old it is.
    pub age_ms: u64,
    /// Nothing lies there.
    pub free_bytes: u64,
    /// Copies of what is elsewhere, not asked for lately.
    pub clean_cold_bytes: u64,
    /// Copies of what is elsewhere, in use.
    pub clean_hot_bytes: u64,
    /// Must be written elsewhere first.
    pub dirty_bytes: u64,
    /// Plugged blocks that hold no data, as the host sees it: these the pool has not spent.
    pub unwritten_bytes: u64,
}

/// `device.reclaim`: asks the agent of a guest whose driver cannot give blocks up to keep all but so much of the disk unused.
/// Answer: [`ReclaimAnswer`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReclaimParams {
    pub name: String,
    /// How much the guest may go on using; `null` takes the wish back.
    pub soft_bytes: Option<u64>,
    /// Of the job; the vSSD's policy if absent, two minutes if that has none.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    #[serde(default)]
    pub dry_run: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReclaimAnswer {
    /// Absent for a dry run, and where a wish is taken back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobInfo>,
    pub allocated_bytes: u64,
    #[serde(default)]
    pub soft_bytes: Option<u64>,
    /// What will happen and what is not promised, for people.
    pub plan: String,
}

/// `device.sync`: makes durable what vSSDs have acknowledged before the call, flushed or not. Answered when it is: [`SyncAnswer`].
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SyncParams {
    /// Of these vSSDs, or of all if there are none.
    #[serde(default)]
    pub names: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SyncAnswer {
    /// How many vSSDs were meant.
    pub devices: u32,
    /// From the call to the end, as the daemon saw it.
    pub took_us: u64,
}

/// `device.create`. Answer: [`DeviceInfo`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateParams {
    pub name: String,
    pub size_bytes: u64,
    /// The host never asks for less than this; one block if absent.
    #[serde(default)]
    pub min_bytes: Option<u64>,
    /// Address space of the vSSD; `size_bytes` if absent.
    #[serde(default)]
    pub max_bytes: Option<u64>,
    #[serde(default)]
    pub class: Class,
    #[serde(default)]
    pub policy: Policy,
    #[serde(default)]
    pub dry_run: bool,
}

/// `device.delete`. Answer: `{}`. Refused while a front-end is connected unless forced.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteParams {
    pub name: String,
    #[serde(default)]
    pub force: bool,
    #[serde(default)]
    pub dry_run: bool,
}

/// `device.resize`. Answer: [`ResizeAnswer`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeParams {
    pub name: String,
    pub size_bytes: u64,
    /// Compare-and-set: refused with `E_CONFLICT` unless `requested_bytes` is still this.
    #[serde(default)]
    pub expected_bytes: Option<u64>,
    /// Of this job; the vSSD's policy if absent, 0 for none.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    #[serde(default)]
    pub on_timeout: Option<OnTimeout>,
    /// Take blocks without asking, data or not.
    #[serde(default)]
    pub force: bool,
    #[serde(default)]
    pub dry_run: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ResizeAnswer {
    /// Absent for a dry run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobInfo>,
    pub from_bytes: u64,
    pub to_bytes: u64,
    /// What will happen, for people: who is asked, what is lost.
    pub plan: String,
}

/// `device.limits`: what is absent stays. Answer: [`DeviceInfo`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsParams {
    pub name: String,
    #[serde(default)]
    pub min_bytes: Option<u64>,
    /// May only be raised.
    #[serde(default)]
    pub max_bytes: Option<u64>,
    #[serde(default)]
    pub on_timeout: Option<OnTimeout>,
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    #[serde(default)]
    pub pull: Option<PullPolicy>,
}

/// States of a job. The last six are final.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// Accepted; the guest was not told yet (no driver is there).
    Created,
    /// The guest was told.
    Offered,
    /// The guest gives or takes blocks.
    Evacuating,
    /// The last blocks are being committed.
    Committing,
    Done,
    /// The guest gave some and declined the rest.
    Partial,
    /// The guest declined.
    Refused,
    /// The deadline passed.
    Expired,
    /// An operator cancelled it.
    Cancelled,
    /// A newer resize of the same vSSD took its place.
    Superseded,
}

impl JobState {
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Created | Self::Offered | Self::Evacuating | Self::Committing)
    }
}

/// What a job is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobKind {
    /// Its sizes are of plugged blocks.
    #[default]
    Resize,
    /// Its sizes are of blocks that hold data.
    Reclaim,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobInfo {
    pub id: u64,
    #[serde(default)]
    pub kind: JobKind,
    pub device: String,
    pub state: JobState,
    /// When the job began.
    pub from_bytes: u64,
    pub target_bytes: u64,
    /// Now, or when the job ended.
    pub plugged_bytes: u64,
    pub started_ms: u64,
    pub elapsed_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Why it ended as it did, or what it waits for.
    pub message: String,
    /// Of a final state that is not `done`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorCode>,
    pub requested_by_uid: u32,
    pub requested_by_pid: i32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobList {
    pub jobs: Vec<JobInfo>,
}

/// `job.show`, `job.cancel`. Answer: [`JobInfo`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobParams {
    pub id: u64,
}

/// `job.wait`: answered when the job is final or changed in a way worth showing. Answer: [`JobInfo`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobWaitParams {
    pub id: u64,
    /// Answer after this time at the latest, whatever the state; at most 60 000.
    pub timeout_ms: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MediumInfo {
    pub kind: String,
    pub path: String,
    pub size_bytes: u64,
    pub written_bytes: u64,
    /// How writes reach the persistence domain: `map-sync`, `battery`, `msync`, `direct`, `buffered`.
    pub persistence: String,
}

/// Answer to `pool.status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PoolStatus {
    pub name: String,
    pub uuid: String,
    pub block_size_bytes: u64,
    /// All that can be given to vSSDs.
    pub size_bytes: u64,
    /// Blocks that hold data.
    pub allocated_bytes: u64,
    /// Given back and not yet zeroed.
    pub scrubbing_bytes: u64,
    pub free_bytes: u64,
    /// Sum over all vSSDs of the larger of requested and plugged.
    pub promised_bytes: u64,
    /// What can still be promised.
    pub available_bytes: u64,
    pub overcommit_percent: u32,
    /// `ok`, `low` or `failed`.
    pub health: String,
    /// Of a pool that failed: what happened and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    pub media: Vec<MediumInfo>,
    pub devices: u32,
    /// System calls that the daemon's sandbox refused since it started. Anything but 0 is a mistake in it or an attack; its
    /// log says which.
    #[serde(default)]
    pub refused_calls: u64,
}

/// `events.subscribe`. Answer: [`Subscribed`], then [`method::EVENT`] notifications.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubscribeParams {
    /// Prefixes of event names (`shrink.`); all events if empty.
    #[serde(default)]
    pub filter: Vec<String>,
    /// Send what is kept from after this number on; absent: only what is new.
    #[serde(default)]
    pub since_seq: Option<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Subscribed {
    /// The newest event so far.
    pub seq: u64,
}

/// Parameters of an `event` notification. Names: `device.created|deleted|connected|disconnected|driver|synced`,
/// `shrink.requested|progress|done|partial|refused|expired|forced|cancelled`, `grow.*` likewise,
/// `guest.inactive|uncooperative|pull|pressure`, `pool.low|ok|full|failed`, `events.lost`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    pub seq: u64,
    /// RFC 3339, UTC, milliseconds.
    pub time: String,
    pub event: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<u64>,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub data: Value,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_codes_have_one_spelling_and_a_number_each() {
        // As a set of scripts may know them: neither the words nor the numbers change.
        let codes = [
            ("E_PARSE", -32700),
            ("E_INVALID_REQUEST", -32600),
            ("E_UNKNOWN_METHOD", -32601),
            ("E_INVALID_PARAMS", -32602),
            ("E_INTERNAL", -32603),
            ("E_NOT_FOUND", -32001),
            ("E_EXISTS", -32002),
            ("E_BELOW_MIN", -32003),
            ("E_ABOVE_MAX", -32004),
            ("E_POOL_FULL", -32005),
            ("E_CONFLICT", -32006),
            ("E_IN_USE", -32007),
            ("E_NO_DRIVER", -32008),
            ("E_GUEST_REFUSED", -32009),
            ("E_TIMED_OUT", -32010),
            ("E_PERMISSION", -32011),
            ("E_TOO_LARGE", -32012),
            ("E_BUSY", -32013),
            ("E_MEDIA", -32014),
            ("E_BUDGET", -32015),
            ("E_STATE", -32016),
            ("E_VMM", -32017),
            ("E_LINT", -32018),
            ("E_WRONG_STATE", -32019),
        ];
        for (word, number) in codes {
            let code: ErrorCode = serde_json::from_value(word.into()).unwrap();
            assert_eq!((code.as_str(), code.rpc_code()), (word, number));
            assert_eq!(serde_json::to_value(code).unwrap(), word);
        }
    }

    #[test]
    fn unknown_request_field_is_refused_unknown_answer_field_is_not() {
        let typo = serde_json::json!({"name": "vm1", "size_bytes": 1, "dead_line": 3});
        assert!(serde_json::from_value::<ResizeParams>(typo).is_err());
        let newer = serde_json::json!({"seq": 3, "later_field": true});
        assert_eq!(serde_json::from_value::<Subscribed>(newer).unwrap().seq, 3);
    }

    #[test]
    fn names_that_could_leave_the_socket_folder_are_refused() {
        for name in ["vm1", "vm1-data", "a.b_c", "A"] {
            assert!(is_valid_name(name), "{name}");
        }
        for name in ["", ".", "..", "a/b", "-v", "a b", "ä", "a\0b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"] {
            assert!(!is_valid_name(name), "{name}");
        }
    }
}
