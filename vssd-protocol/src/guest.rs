// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest channel: request types on a virtio-blk queue that virtio-blk does not define.
//!
//! ```text
//!   device-readable: virtio_blk_outhdr (16 B) │ request body        ──► Request::decode
//!   device-writable: response body │ status byte                    ◄── Response::encode
//! ```
//!
//! Layouts are those of `guest-driver/vssd_abi.h`, all little-endian; requirements are numbered in
//! `protocol.md`. Decoding copies: the bytes come from guest memory, which the guest may change at any
//! time, so every field is read exactly once, from a private copy.
//!
//! This module knows neither rings nor the state of a vSSD.

use crate::units::BlockRange;

/// `"vSSD"` in little-endian order; both HELLO bodies carry it.
pub const MAGIC: u32 = 0x4453_5376;
/// The one version spoken.
pub const VERSION: u16 = 1;
/// Most ranges in one UNPLUG or PLUG.
pub const MAX_RANGES: u32 = 16384;
/// Bytes of a name field, NUL-padded UTF-8.
pub const NAME_LEN: usize = 32;
/// Bytes of `struct virtio_blk_outhdr`.
pub const BLK_HEADER_LEN: usize = 16;
/// The longest request body: UNPLUG or PLUG with [`MAX_RANGES`] ranges.
pub const MAX_REQUEST_LEN: usize = REQ_LEN + MAX_RANGES as usize * RANGE_LEN;

/// Status byte of a read or write that touches an unplugged block; nothing was done.
pub const STATUS_EVICTED: u8 = 0x80;
/// Status byte of a write that the pool has no space for; nothing was written.
pub const STATUS_NOSPACE: u8 = 0x81;

/// STATE lists only plugged blocks that hold no data.
pub const STATE_F_EMPTY: u32 = 1;
/// The host changed the plugged set: read it again.
pub const NEWS_STATE: u32 = 1;
/// `requested_blocks`, deadline or reason changed.
pub const NEWS_TARGET: u32 = 2;

const REQ_LEN: usize = 16;
const RESP_LEN: usize = 24;
const RANGE_LEN: usize = 8;
const HELLO_REQ_LEN: usize = 48;
const HELLO_RESP_LEN: usize = 96;
const STATE_REQ_LEN: usize = REQ_LEN + 8;
const STATE_RESP_LEN: usize = RESP_LEN + 8;
const WAIT_REQ_LEN: usize = REQ_LEN + 8;
const WAIT_RESP_LEN: usize = RESP_LEN + 16;
const DECLINE_REQ_LEN: usize = REQ_LEN + 16;
const PULL_REQ_LEN: usize = REQ_LEN + 8;
const REPORT_REQ_LEN: usize = REQ_LEN + 16;

/// Request types, `virtio_blk_outhdr.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum RequestType {
    Hello = 0x5653_0001,
    State = 0x5653_0002,
    Wait = 0x5653_0003,
    Unplug = 0x5653_0004,
    Plug = 0x5653_0005,
    Decline = 0x5653_0006,
    Pull = 0x5653_0007,
    Report = 0x5653_0008,
}

impl RequestType {
    pub const ALL: [Self; 8] = [
        Self::Hello,
        Self::State,
        Self::Wait,
        Self::Unplug,
        Self::Plug,
        Self::Decline,
        Self::Pull,
        Self::Report,
    ];

    /// `None` for a type that is not of the guest channel.
    pub fn from_wire(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| *t as u32 == value)
    }
}

/// What became of a request as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum RequestResult {
    Ok = 0,
    /// The epoch is not that of the session.
    Stale = 1,
    /// WAIT came back without news.
    NoNews = 2,
    Busy = 3,
    Invalid = 4,
    /// HELLO asked for a version that is not spoken.
    Version = 5,
}

impl RequestResult {
    /// `None` for a value this version does not define.
    pub fn from_wire(value: u32) -> Option<Self> {
        [Self::Ok, Self::Stale, Self::NoNews, Self::Busy, Self::Invalid, Self::Version]
            .into_iter()
            .find(|r| *r as u32 == value)
    }
}

/// What became of one range of an UNPLUG or PLUG.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RangeStatus {
    Ok = 0,
    Already = 1,
    Busy = 2,
    Range = 3,
    Protected = 4,
    Limit = 5,
    NoSpace = 6,
}

impl RangeStatus {
    /// `None` for a value this version does not define.
    pub fn from_wire(value: u8) -> Option<Self> {
        [Self::Ok, Self::Already, Self::Busy, Self::Range, Self::Protected, Self::Limit, Self::NoSpace]
            .into_iter()
            .find(|s| *s as u8 == value)
    }
}

/// Why the host asks for another size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Reason {
    #[default]
    None = 0,
    Operator = 1,
    Pressure = 2,
    Pull = 3,
}

/// Why a guest declines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum DeclineReason {
    Nothing = 1,
    Busy = 2,
    Policy = 3,
    Error = 4,
}

/// How much a guest wants what it pulls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Urgency {
    Wish = 0,
    Pressure = 1,
    Critical = 2,
}

/// How much a guest could give up now, in blocks, by what that would cost it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Estimate {
    /// Nothing lies there.
    pub free: u32,
    /// Copies of what is elsewhere, not asked for lately.
    pub clean_cold: u32,
    /// Copies of what is elsewhere, in use.
    pub clean_hot: u32,
    /// Must be written elsewhere first.
    pub dirty: u32,
}

impl Estimate {
    /// All of them, whatever they cost. A guest may say anything: this fits.
    pub fn sum(&self) -> u64 {
        let Self { free, clean_cold, clean_hot, dirty } = *self;
        [free, clean_cold, clean_hot, dirty].into_iter().map(u64::from).sum()
    }
}

/// Why bytes are no request. The chain is answered `VIRTIO_BLK_S_IOERR`; nothing has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("{kind:?} request body has {actual} bytes, needs {needed}")]
    Length { kind: RequestType, needed: usize, actual: usize },
    #[error("HELLO carries magic {0:#010x}, not {MAGIC:#010x}")]
    Magic(u32),
    #[error("{requested} ranges in one request, at most {MAX_RANGES} are allowed")]
    TooManyRanges { requested: u32 },
    #[error("{kind:?} has no value {value} in field {field}")]
    Value { kind: RequestType, field: &'static str, value: u32 },
}

/// A decoded request. Fields are as the guest sent them: bounds against the device are the owner's work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    Hello { version: u16, features: u64, driver: String },
    State { epoch: u64, flags: u32, start: u32 },
    Wait { epoch: u64, seq_seen: u64 },
    Unplug { epoch: u64, ranges: Vec<BlockRange> },
    Plug { epoch: u64, ranges: Vec<BlockRange> },
    Decline { epoch: u64, seq: u64, could_give: u32, reason: DeclineReason },
    Pull { epoch: u64, want_blocks: u32, urgency: Urgency },
    Report { epoch: u64, estimate: Estimate },
}

impl Request {
    /// Decodes the body that follows the virtio-blk header. Bytes past the body are ignored.
    pub fn decode(kind: RequestType, body: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader { kind, body, at: 0 };
        let fixed = match kind {
            RequestType::Hello => HELLO_REQ_LEN,
            RequestType::State => STATE_REQ_LEN,
            RequestType::Wait => WAIT_REQ_LEN,
            RequestType::Unplug | RequestType::Plug => REQ_LEN,
            RequestType::Decline => DECLINE_REQ_LEN,
            RequestType::Pull => PULL_REQ_LEN,
            RequestType::Report => REPORT_REQ_LEN,
        };
        r.need(fixed)?;
        if kind == RequestType::Hello {
            let magic = r.u32()?;
            if magic != MAGIC {
                return Err(DecodeError::Magic(magic));
            }
            let version = r.u16()?;
            let _reserved = r.u16()?;
            let features = r.u64()?;
            return Ok(Self::Hello { version, features, driver: r.name()? });
        }
        let epoch = r.u64()?;
        let count = r.u32()?;
        let flags = r.u32()?;
        Ok(match kind {
            RequestType::Hello => unreachable!("decoded above"),
            RequestType::State => Self::State { epoch, flags, start: r.u32()? },
            RequestType::Wait => Self::Wait { epoch, seq_seen: r.u64()? },
            RequestType::Unplug => Self::Unplug { epoch, ranges: r.ranges(count)? },
            RequestType::Plug => Self::Plug { epoch, ranges: r.ranges(count)? },
            RequestType::Decline => {
                let seq = r.u64()?;
                let could_give = r.u32()?;
                let reason = match r.u32()? {
                    1 => DeclineReason::Nothing,
                    2 => DeclineReason::Busy,
                    3 => DeclineReason::Policy,
                    4 => DeclineReason::Error,
                    value => {
                        return Err(DecodeError::Value { kind, field: "reason", value });
                    }
                };
                Self::Decline { epoch, seq, could_give, reason }
            }
            RequestType::Pull => {
                let want_blocks = r.u32()?;
                let urgency = match r.u32()? {
                    0 => Urgency::Wish,
                    1 => Urgency::Pressure,
                    2 => Urgency::Critical,
                    value => {
                        return Err(DecodeError::Value { kind, field: "urgency", value });
                    }
                };
                Self::Pull { epoch, want_blocks, urgency }
            }
            RequestType::Report => {
                let estimate =
                    Estimate { free: r.u32()?, clean_cold: r.u32()?, clean_hot: r.u32()?, dirty: r.u32()? };
                Self::Report { epoch, estimate }
            }
        })
    }

    /// The epoch the request carries; `None` for HELLO, which begins one.
    pub fn epoch(&self) -> Option<u64> {
        match self {
            Self::Hello { .. } => None,
            Self::State { epoch, .. }
            | Self::Wait { epoch, .. }
            | Self::Unplug { epoch, .. }
            | Self::Plug { epoch, .. }
            | Self::Decline { epoch, .. }
            | Self::Pull { epoch, .. }
            | Self::Report { epoch, .. } => Some(*epoch),
        }
    }

    pub fn kind(&self) -> RequestType {
        match self {
            Self::Hello { .. } => RequestType::Hello,
            Self::State { .. } => RequestType::State,
            Self::Wait { .. } => RequestType::Wait,
            Self::Unplug { .. } => RequestType::Unplug,
            Self::Plug { .. } => RequestType::Plug,
            Self::Decline { .. } => RequestType::Decline,
            Self::Pull { .. } => RequestType::Pull,
            Self::Report { .. } => RequestType::Report,
        }
    }

    /// The body as a driver sends it, without the virtio-blk header.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Self::Hello { version, features, driver } => {
                w.u32(MAGIC).u16(*version).u16(0).u64(*features).name(driver);
            }
            Self::State { epoch, flags, start } => {
                w.req(*epoch, 0, *flags).u32(*start).u32(0);
            }
            Self::Wait { epoch, seq_seen } => {
                w.req(*epoch, 0, 0).u64(*seq_seen);
            }
            Self::Unplug { epoch, ranges } | Self::Plug { epoch, ranges } => {
                w.req(*epoch, len_u32(ranges.len()), 0).ranges(ranges);
            }
            Self::Decline { epoch, seq, could_give, reason } => {
                w.req(*epoch, 0, 0).u64(*seq).u32(*could_give).u32(*reason as u32);
            }
            Self::Pull { epoch, want_blocks, urgency } => {
                w.req(*epoch, 0, 0).u32(*want_blocks).u32(*urgency as u32);
            }
            Self::Report { epoch, estimate } => {
                let Estimate { free, clean_cold, clean_hot, dirty } = *estimate;
                w.req(*epoch, 0, 0).u32(free).u32(clean_cold).u32(clean_hot).u32(dirty);
            }
        }
        w.bytes
    }
}

/// The response bytes that a driver must provide room for, status byte not counted. A shorter buffer
/// makes the chain malformed. STATE takes more and fills it with ranges.
pub fn min_response_len(kind: RequestType, ranges: u32) -> usize {
    match kind {
        RequestType::Hello => HELLO_RESP_LEN,
        RequestType::State => STATE_RESP_LEN,
        RequestType::Wait => WAIT_RESP_LEN,
        RequestType::Unplug | RequestType::Plug => RESP_LEN + ranges as usize,
        RequestType::Decline | RequestType::Pull | RequestType::Report => RESP_LEN,
    }
}

/// How many ranges a STATE response can carry in `len` bytes (status byte not counted).
pub fn state_capacity(len: usize) -> usize {
    len.saturating_sub(STATE_RESP_LEN) / RANGE_LEN
}

/// The sizes that every response carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    pub seq: u64,
    pub requested_blocks: u32,
    pub plugged_blocks: u32,
}

/// A response: the common part and what the request's type adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub result: RequestResult,
    pub sizes: Sizes,
    pub body: ResponseBody,
}

/// What a response adds to its common part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResponseBody {
    /// DECLINE, PULL, REPORT, and every request that was not carried out.
    Plain,
    Hello(HelloBody),
    State {
        next: u32,
        ranges: Vec<BlockRange>,
    },
    Wait {
        flags: u32,
        reason: Reason,
        deadline_ms: u32,
    },
    /// UNPLUG and PLUG, one status a range in the request's order.
    Ranges(Vec<RangeStatus>),
}

/// What HELLO tells the driver about its vSSD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelloBody {
    pub version: u16,
    pub features: u64,
    pub epoch: u64,
    pub block_size: u32,
    pub total_blocks: u32,
    pub min_blocks: u32,
    pub max_ranges: u32,
    pub name: String,
}

/// Why bytes are no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResponseError {
    #[error("response to {kind:?} has {actual} bytes, needs {needed}")]
    Length { kind: RequestType, needed: usize, actual: usize },
    #[error("response to {kind:?} has no value {value} in field {field}")]
    Value { kind: RequestType, field: &'static str, value: u32 },
}

impl Response {
    /// A response that says only what became of the request.
    pub fn plain(result: RequestResult, sizes: Sizes) -> Self {
        Self { result, sizes, body: ResponseBody::Plain }
    }

    /// The body as a device sends it, without the status byte, at least as long as the type's fixed part:
    /// what a refused request does not fill is zero.
    pub fn encode(&self, kind: RequestType) -> Vec<u8> {
        let count = match &self.body {
            ResponseBody::State { ranges, .. } => ranges.len(),
            ResponseBody::Ranges(statuses) => statuses.len(),
            _ => 0,
        };
        let mut w = Writer::default();
        w.u32(self.result as u32).u32(len_u32(count)).u64(self.sizes.seq);
        w.u32(self.sizes.requested_blocks).u32(self.sizes.plugged_blocks);
        match &self.body {
            ResponseBody::Plain => {}
            ResponseBody::Hello(hello) => {
                w.u32(MAGIC).u16(hello.version).u16(0).u64(hello.features).u64(hello.epoch);
                w.u32(hello.block_size).u32(hello.total_blocks).u32(hello.min_blocks).u32(hello.max_ranges);
                w.name(&hello.name);
            }
            ResponseBody::State { next, ranges } => {
                w.u32(*next).u32(0).ranges(ranges);
            }
            ResponseBody::Wait { flags, reason, deadline_ms } => {
                w.u32(*flags).u32(*reason as u32).u32(*deadline_ms).u32(0);
            }
            ResponseBody::Ranges(statuses) => w.bytes.extend(statuses.iter().map(|s| *s as u8)),
        }
        let fixed = min_response_len(kind, 0);
        if w.bytes.len() < fixed {
            w.bytes.resize(fixed, 0);
        }
        w.bytes
    }

    /// Decodes what a device answered to a request of type `kind`: the driver's side, used by tests and tools.
    pub fn decode(kind: RequestType, bytes: &[u8]) -> Result<Self, ResponseError> {
        let mut r = Reader { kind, body: bytes, at: 0 };
        let short = |e: DecodeError| match e {
            DecodeError::Length { kind, needed, actual } => ResponseError::Length { kind, needed, actual },
            DecodeError::Magic(value) => ResponseError::Value { kind, field: "magic", value },
            DecodeError::TooManyRanges { requested } => {
                ResponseError::Value { kind, field: "count", value: requested }
            }
            DecodeError::Value { kind, field, value } => ResponseError::Value { kind, field, value },
        };
        r.need(min_response_len(kind, 0)).map_err(short)?;
        let value = r.u32().map_err(short)?;
        let result =
            RequestResult::from_wire(value).ok_or(ResponseError::Value { kind, field: "result", value })?;
        let count = r.u32().map_err(short)?;
        let sizes = Sizes {
            seq: r.u64().map_err(short)?,
            requested_blocks: r.u32().map_err(short)?,
            plugged_blocks: r.u32().map_err(short)?,
        };
        // Only these carry a body: everything else was refused as a whole.
        let with_body =
            result == RequestResult::Ok || (result == RequestResult::Version && kind == RequestType::Hello);
        let body =
            if with_body { Self::decode_body(&mut r, count).map_err(short)? } else { ResponseBody::Plain };
        Ok(Self { result, sizes, body })
    }

    fn decode_body(r: &mut Reader<'_>, count: u32) -> Result<ResponseBody, DecodeError> {
        let kind = r.kind;
        Ok(match kind {
            RequestType::Hello => {
                let magic = r.u32()?;
                if magic != MAGIC {
                    return Err(DecodeError::Magic(magic));
                }
                let version = r.u16()?;
                let _reserved = r.u16()?;
                ResponseBody::Hello(HelloBody {
                    version,
                    features: r.u64()?,
                    epoch: r.u64()?,
                    block_size: r.u32()?,
                    total_blocks: r.u32()?,
                    min_blocks: r.u32()?,
                    max_ranges: r.u32()?,
                    name: r.name()?,
                })
            }
            RequestType::State => {
                let next = r.u32()?;
                let _reserved = r.u32()?;
                ResponseBody::State { next, ranges: r.ranges(count)? }
            }
            RequestType::Wait => {
                let flags = r.u32()?;
                let reason = match r.u32()? {
                    0 => Reason::None,
                    1 => Reason::Operator,
                    2 => Reason::Pressure,
                    3 => Reason::Pull,
                    value => {
                        return Err(DecodeError::Value { kind, field: "reason", value });
                    }
                };
                ResponseBody::Wait { flags, reason, deadline_ms: r.u32()? }
            }
            RequestType::Unplug | RequestType::Plug => {
                let statuses = r.take(count as usize)?;
                let statuses = statuses.iter().map(|value| {
                    RangeStatus::from_wire(*value).ok_or(DecodeError::Value {
                        kind,
                        field: "range status",
                        value: u32::from(*value),
                    })
                });
                ResponseBody::Ranges(statuses.collect::<Result<_, _>>()?)
            }
            RequestType::Decline | RequestType::Pull | RequestType::Report => ResponseBody::Plain,
        })
    }
}

fn len_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Reads little-endian fields in order; never past the end.
struct Reader<'a> {
    kind: RequestType,
    body: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn need(&self, len: usize) -> Result<(), DecodeError> {
        if self.body.len() - self.at < len {
            let needed = self.at.saturating_add(len);
            return Err(DecodeError::Length { kind: self.kind, needed, actual: self.body.len() });
        }
        Ok(())
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        self.need(len)?;
        let bytes = &self.body[self.at..self.at + len];
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A NUL-padded name; what is no UTF-8 or a control character is replaced, for it ends up in logs.
    fn name(&mut self) -> Result<String, DecodeError> {
        let bytes: [u8; NAME_LEN] = self.array()?;
        let len = bytes.iter().position(|b| *b == 0).unwrap_or(NAME_LEN);
        let text = String::from_utf8_lossy(&bytes[..len]);
        Ok(text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect())
    }

    fn ranges(&mut self, count: u32) -> Result<Vec<BlockRange>, DecodeError> {
        if count > MAX_RANGES && self.kind != RequestType::State {
            return Err(DecodeError::TooManyRanges { requested: count });
        }
        let bytes = self.take((count as usize).saturating_mul(RANGE_LEN))?;
        let (pairs, _) = bytes.as_chunks::<RANGE_LEN>();
        Ok(pairs
            .iter()
            .map(|b| BlockRange {
                start: u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
                count: u32::from_le_bytes([b[4], b[5], b[6], b[7]]),
            })
            .collect())
    }
}

#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn req(&mut self, epoch: u64, count: u32, flags: u32) -> &mut Self {
        self.u64(epoch).u32(count).u32(flags)
    }

    /// Cut at a character border so that the field stays UTF-8.
    fn name(&mut self, name: &str) -> &mut Self {
        let mut len = name.len().min(NAME_LEN);
        while !name.is_char_boundary(len) {
            len -= 1;
        }
        self.bytes.extend(&name.as_bytes()[..len]);
        self.bytes.resize(self.bytes.len() + NAME_LEN - len, 0);
        self
    }

    fn ranges(&mut self, ranges: &[BlockRange]) -> &mut Self {
        for range in ranges {
            self.u32(range.start).u32(range.count);
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEADER: &str = include_str!("../../guest-driver/vssd_abi.h");

    fn define(name: &str) -> u64 {
        let line = HEADER
            .lines()
            .find(|l| l.split_whitespace().nth(1) == Some(name) && l.starts_with("#define"))
            .unwrap_or_else(|| panic!("vssd_abi.h does not define {name}"));
        let value = line.split_whitespace().nth(2).unwrap();
        match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
            None => value.parse().unwrap(),
        }
    }

    #[test]
    fn constants_equal_those_of_the_c_header() {
        for (name, value) in [
            ("VSSD_MAGIC", u64::from(MAGIC)),
            ("VSSD_VERSION", u64::from(VERSION)),
            ("VSSD_MAX_RANGES", u64::from(MAX_RANGES)),
            ("VSSD_NAME_LEN", NAME_LEN as u64),
            ("VSSD_S_EVICTED", u64::from(STATUS_EVICTED)),
            ("VSSD_S_NOSPACE", u64::from(STATUS_NOSPACE)),
            ("VSSD_STATE_F_EMPTY", u64::from(STATE_F_EMPTY)),
            ("VSSD_NEWS_STATE", u64::from(NEWS_STATE)),
            ("VSSD_NEWS_TARGET", u64::from(NEWS_TARGET)),
            ("VSSD_T_HELLO", RequestType::Hello as u64),
            ("VSSD_T_STATE", RequestType::State as u64),
            ("VSSD_T_WAIT", RequestType::Wait as u64),
            ("VSSD_T_UNPLUG", RequestType::Unplug as u64),
            ("VSSD_T_PLUG", RequestType::Plug as u64),
            ("VSSD_T_DECLINE", RequestType::Decline as u64),
            ("VSSD_T_PULL", RequestType::Pull as u64),
            ("VSSD_T_REPORT", RequestType::Report as u64),
            ("VSSD_RES_OK", RequestResult::Ok as u64),
            ("VSSD_RES_STALE", RequestResult::Stale as u64),
            ("VSSD_RES_NO_NEWS", RequestResult::NoNews as u64),
            ("VSSD_RES_BUSY", RequestResult::Busy as u64),
            ("VSSD_RES_INVALID", RequestResult::Invalid as u64),
            ("VSSD_RES_VERSION", RequestResult::Version as u64),
            ("VSSD_R_OK", RangeStatus::Ok as u64),
            ("VSSD_R_ALREADY", RangeStatus::Already as u64),
            ("VSSD_R_BUSY", RangeStatus::Busy as u64),
            ("VSSD_R_RANGE", RangeStatus::Range as u64),
            ("VSSD_R_PROTECTED", RangeStatus::Protected as u64),
            ("VSSD_R_LIMIT", RangeStatus::Limit as u64),
            ("VSSD_R_NOSPACE", RangeStatus::NoSpace as u64),
            ("VSSD_REASON_OPERATOR", Reason::Operator as u64),
            ("VSSD_REASON_PRESSURE", Reason::Pressure as u64),
            ("VSSD_REASON_PULL", Reason::Pull as u64),
            ("VSSD_DECLINE_NOTHING", DeclineReason::Nothing as u64),
            ("VSSD_DECLINE_ERROR", DeclineReason::Error as u64),
            ("VSSD_PULL_CRITICAL", Urgency::Critical as u64),
        ] {
            assert_eq!(define(name), value, "{name}");
        }
    }

    /// HELLO is what an old driver and a new device must both understand for ever: its bytes are pinned.
    #[test]
    fn hello_bytes_never_change() {
        let hello = Request::Hello { version: 1, features: 0, driver: "vssd 0.1.0".into() };
        let bytes = hello.encode();
        assert_eq!(bytes.len(), HELLO_REQ_LEN);
        assert_eq!(&bytes[..16], b"vSSD\x01\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(&bytes[16..27], b"vssd 0.1.0\0");
        let answer = Response {
            result: RequestResult::Ok,
            sizes: Sizes { seq: 7, requested_blocks: 3, plugged_blocks: 4 },
            body: ResponseBody::Hello(HelloBody {
                version: 1,
                features: 0,
                epoch: 0x0102_0304_0506_0708,
                block_size: 65536,
                total_blocks: 5,
                min_blocks: 2,
                max_ranges: 16384,
                name: "vm1".into(),
            }),
        };
        let bytes = answer.encode(RequestType::Hello);
        assert_eq!(bytes.len(), HELLO_RESP_LEN);
        assert_eq!(&bytes[..24], b"\0\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0\x03\0\0\0\x04\0\0\0");
        assert_eq!(&bytes[24..48], b"vSSD\x01\0\0\0\0\0\0\0\0\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01");
        assert_eq!(&bytes[48..68], b"\0\0\x01\0\x05\0\0\0\x02\0\0\0\0\x40\0\0vm1\0");
    }

    fn ranges() -> impl Strategy<Value = Vec<BlockRange>> {
        prop::collection::vec(
            (any::<u32>(), any::<u32>()).prop_map(|(start, count)| BlockRange { start, count }),
            0..40,
        )
    }

    fn requests() -> impl Strategy<Value = Request> {
        prop_oneof![
            (any::<u16>(), any::<u64>(), "[a-z0-9 .]{0,32}")
                .prop_map(|(version, features, driver)| { Request::Hello { version, features, driver } }),
            any::<(u64, u32, u32)>().prop_map(|(epoch, flags, start)| Request::State { epoch, flags, start }),
            any::<(u64, u64)>().prop_map(|(epoch, seq_seen)| Request::Wait { epoch, seq_seen }),
            (any::<u64>(), ranges()).prop_map(|(epoch, ranges)| Request::Unplug { epoch, ranges }),
            (any::<u64>(), ranges()).prop_map(|(epoch, ranges)| Request::Plug { epoch, ranges }),
            any::<(u64, u64, u32)>().prop_map(|(epoch, seq, could_give)| Request::Decline {
                epoch,
                seq,
                could_give,
                reason: DeclineReason::Busy
            }),
            any::<(u64, u32)>().prop_map(|(epoch, want_blocks)| Request::Pull {
                epoch,
                want_blocks,
                urgency: Urgency::Pressure
            }),
            any::<(u64, u32, u32, u32, u32)>().prop_map(|(epoch, free, clean_cold, clean_hot, dirty)| {
                Request::Report { epoch, estimate: Estimate { free, clean_cold, clean_hot, dirty } }
            }),
        ]
    }

    proptest! {
        #[test]
        fn request_survives_the_wire_and_every_shorter_body_is_refused(request in requests()) {
            let bytes = request.encode();
            prop_assert_eq!(Request::decode(request.kind(), &bytes), Ok(request.clone()));
            for len in 0..bytes.len() {
                prop_assert!(Request::decode(request.kind(), &bytes[..len]).is_err());
            }
        }

        #[test]
        fn decoding_any_bytes_returns(kind in 0usize..8, bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let kind = RequestType::ALL[kind];
            let _ = Request::decode(kind, &bytes);
            let _ = Response::decode(kind, &bytes);
        }

        #[test]
        fn response_survives_the_wire(seq: u64, requested_blocks: u32, plugged_blocks: u32, ranges in ranges(), next: u32) {
            let sizes = Sizes { seq, requested_blocks, plugged_blocks };
            let statuses = vec![RangeStatus::Ok, RangeStatus::NoSpace, RangeStatus::Busy];
            for (kind, body) in [
                (RequestType::State, ResponseBody::State { next, ranges }),
                (RequestType::Wait, ResponseBody::Wait { flags: 3, reason: Reason::Pull, deadline_ms: 9 }),
                (RequestType::Unplug, ResponseBody::Ranges(statuses)),
                (RequestType::Decline, ResponseBody::Plain),
            ] {
                let response = Response { result: RequestResult::Ok, sizes, body };
                let bytes = response.encode(kind);
                prop_assert_eq!(Response::decode(kind, &bytes), Ok(response));
                let stale = Response::plain(RequestResult::Stale, sizes);
                prop_assert_eq!(Response::decode(kind, &stale.encode(kind)), Ok(stale));
            }
        }
    }

    #[test]
    fn a_lying_range_count_is_refused_before_anything_is_allocated() {
        let mut bytes = Request::Unplug { epoch: 1, ranges: vec![] }.encode();
        bytes[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(
            Request::decode(RequestType::Unplug, &bytes),
            Err(DecodeError::TooManyRanges { requested: u32::MAX })
        );
        bytes[8..12].copy_from_slice(&2u32.to_le_bytes());
        assert!(matches!(Request::decode(RequestType::Unplug, &bytes), Err(DecodeError::Length { .. })));
    }
}
