// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An operator's program on the control channel: JSON-RPC, one object per line.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use vssd_protocol::control::{
    DeviceInfo, ErrorCode, EvictedRanges, JobInfo, PoolStatus, ResizeAnswer, RpcError, method,
};
use vssd_protocol::units::BlockRange;

use super::PATIENCE;

/// A refusal by the daemon.
#[derive(Debug)]
pub struct Refused(pub RpcError);

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.data.code.as_str(), self.0.message)
    }
}

impl std::error::Error for Refused {}

/// The newest events that a daemon keeps, at most.
pub const KEPT_EVENTS: u64 = 4096;

/// A connection to the control socket.
#[derive(Debug)]
pub struct Operator {
    lines: BufReader<UnixStream>,
    next_id: u64,
}

impl Operator {
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
        // Longer than the longest wait for a job.
        stream.set_read_timeout(Some(Duration::from_secs(70)))?;
        Ok(Self { lines: BufReader::new(stream), next_id: 0 })
    }

    /// Calls a method; a refusal is a [`Refused`].
    pub fn call<T: DeserializeOwned>(&mut self, method: &str, params: &Value) -> Result<T> {
        self.next_id += 1;
        let mut line =
            json!({ "jsonrpc": "2.0", "id": self.next_id, "method": method, "params": params }).to_string();
        line.push('\n');
        self.lines.get_mut().write_all(line.as_bytes()).with_context(|| format!("call {method}"))?;
        let mut line = String::new();
        self.lines.read_line(&mut line).with_context(|| format!("answer to {method}"))?;
        ensure!(!line.is_empty(), "the daemon closed the control connection");
        let answer: Value = serde_json::from_str(&line).with_context(|| format!("{method}: {line}"))?;
        if let Some(error) = answer.get("error") {
            return Err(Refused(serde_json::from_value(error.clone())?).into());
        }
        serde_json::from_value(answer["result"].clone()).with_context(|| format!("{method}: {line}"))
    }

    /// Calls what must be refused with `code`; gives what was said.
    pub fn refused(&mut self, code: ErrorCode, method: &str, params: &Value) -> Result<RpcError> {
        match self.call::<Value>(method, params) {
            Ok(answer) => bail!("{method} {params} should have been refused and gave {answer}"),
            Err(error) => {
                let Refused(error) = error.downcast::<Refused>()?;
                ensure!(error.data.code == code, "{method} {params}: {error:?}");
                Ok(error)
            }
        }
    }

    pub fn show(&mut self, name: &str) -> Result<DeviceInfo> {
        self.call(method::DEVICE_SHOW, &json!({ "name": name }))
    }

    pub fn pool(&mut self) -> Result<PoolStatus> {
        self.call(method::POOL_STATUS, &json!({}))
    }

    /// The blocks that the daemon holds for unplugged.
    pub fn evicted(&mut self, name: &str) -> Result<Vec<BlockRange>> {
        let (mut ranges, mut next) = (Vec::new(), Some(0));
        while let Some(start) = next {
            let params = json!({ "name": name, "start": start });
            let mut answer: EvictedRanges = self.call(method::DEVICE_EVICTED, &params)?;
            ranges.append(&mut answer.ranges);
            next = answer.next;
        }
        Ok(ranges)
    }

    /// Makes a vSSD; `more` is added to the parameters.
    pub fn create(&mut self, name: &str, size: u64, more: &Value) -> Result<DeviceInfo> {
        self.call(method::DEVICE_CREATE, &merged(json!({ "name": name, "size_bytes": size }), more))
    }

    /// Asks for another size; `more` is added to the parameters.
    pub fn resize(&mut self, name: &str, size: u64, more: &Value) -> Result<JobInfo> {
        let params = merged(json!({ "name": name, "size_bytes": size }), more);
        let answer: ResizeAnswer = self.call(method::DEVICE_RESIZE, &params)?;
        answer.job.context("no job")
    }

    pub fn limits(&mut self, name: &str, more: &Value) -> Result<DeviceInfo> {
        self.call(method::DEVICE_LIMITS, &merged(json!({ "name": name }), more))
    }

    pub fn job(&mut self, id: u64) -> Result<JobInfo> {
        self.call(method::JOB_SHOW, &json!({ "id": id }))
    }

    pub fn cancel(&mut self, id: u64) -> Result<JobInfo> {
        self.call(method::JOB_CANCEL, &json!({ "id": id }))
    }

    /// Waits until a job is final. A job that is not within [`PATIENCE`] hangs.
    pub fn finish(&mut self, id: u64) -> Result<JobInfo> {
        let start = std::time::Instant::now();
        loop {
            let job: JobInfo = self.call(method::JOB_WAIT, &json!({ "id": id, "timeout_ms": 1000 }))?;
            if job.state.is_final() {
                return Ok(job);
            }
            ensure!(start.elapsed() < PATIENCE, "job {id} hangs: {job:?}");
        }
    }
}

fn merged(mut params: Value, more: &Value) -> Value {
    if let (Some(params), Some(more)) = (params.as_object_mut(), more.as_object()) {
        params.extend(more.clone());
    }
    params
}
