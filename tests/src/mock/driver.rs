// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest channel as a driver speaks it, and a driver that follows the host's wishes with a choice of its own.
//!
//! After every answer the model is compared with what the device says of itself.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use vssd_protocol::guest::{
    self, DeclineReason, HelloBody, RangeStatus, Reason, Request, RequestResult, RequestType, Response,
    ResponseBody, Sizes, Urgency,
};
use vssd_protocol::units::BlockRange;

use super::PATIENCE;
use super::operator::Operator;
use super::queue::{Answer, Queue, S_OK};
use super::ring::Segment;

/// Longest response asked for: STATE with this many ranges.
const STATE_RANGES: usize = 8192;
const RESPONSE_ROOM: usize = 32 + 8 * STATE_RANGES;
/// What response memory holds before the device writes it.
const BLANK: u8 = 0xa5;

/// An answer to WAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct News {
    pub sizes: Sizes,
    /// `NEWS_*`.
    pub flags: u32,
    pub reason: Reason,
    pub deadline_ms: u32,
}

/// The device does not know the driver's session, or not any more.
#[derive(Clone, Copy, Debug)]
pub struct Stale;

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request was answered STALE")
    }
}

impl std::error::Error for Stale {}

#[derive(Clone, Copy, Debug)]
struct Area {
    request: u64,
    response: u64,
}

/// A driver with a session.
#[derive(Debug)]
pub struct Driver {
    pub queue: Queue,
    pub hello: HelloBody,
    /// As in the newest answer.
    pub sizes: Sizes,
    /// Which blocks the driver holds for plugged.
    pub plugged: Vec<bool>,
    /// Ranges that STATE may list in one answer.
    pub page: usize,
    /// Ranges in one UNPLUG or PLUG.
    pub batch: usize,
    /// UNPLUG and PLUG requests sent so far.
    pub messages: u64,
    /// The device may be killed at any time. The next one may then give a shorter answer where the one before had written a
    /// longer one.
    pub device_may_crash: bool,
    area: Area,
    wait_area: Area,
    parked: Option<u16>,
    /// An UNPLUG or PLUG was answered BUSY since there was news last: the host moves blocks itself (V-44).
    host_at_work: bool,
}

/// Says which blocks to give up when `count` are asked for.
pub type Choice<'a> = dyn FnMut(&Driver, u32) -> Vec<BlockRange> + 'a;

impl Driver {
    /// Says HELLO on `queue` and reads the plugged set.
    pub fn start(queue: Queue) -> Result<Self> {
        let room = |len: usize| queue.ring.ram.alloc(len as u64, 64);
        let area = Area { request: room(guest::MAX_REQUEST_LEN), response: room(RESPONSE_ROOM) };
        let wait_area = Area { request: room(64), response: room(64) };
        let hello = HelloBody {
            version: 0,
            features: 0,
            epoch: 0,
            block_size: 0,
            total_blocks: 0,
            min_blocks: 0,
            max_ranges: 0,
            name: String::new(),
        };
        let mut driver = Self {
            queue,
            hello,
            sizes: Sizes::default(),
            plugged: Vec::new(),
            page: STATE_RANGES,
            batch: guest::MAX_RANGES as usize,
            messages: 0,
            device_may_crash: false,
            area,
            wait_area,
            parked: None,
            host_at_work: false,
        };
        driver.hello()?;
        Ok(driver)
    }

    /// Begins a session and reads the plugged set (D-6).
    pub fn hello(&mut self) -> Result<()> {
        let request = Request::Hello { version: guest::VERSION, features: 0, driver: "mock 1".into() };
        let response = self.call(&request)?;
        ensure!(response.result != RequestResult::Stale, Stale);
        ensure!(response.result == RequestResult::Ok, "HELLO: {response:?}");
        let ResponseBody::Hello(hello) = response.body else { bail!("HELLO: {response:?}") };
        self.hello = hello;
        if self.parked.is_some() {
            let old = self.wait_answer(PATIENCE)?.context("the WAIT of the session before stays parked")?;
            ensure!(old.result != RequestResult::NoNews, "{old:?}");
        }
        self.refresh()
    }

    /// Reads the plugged set anew.
    pub fn refresh(&mut self) -> Result<()> {
        let mut plugged = vec![false; self.hello.total_blocks as usize];
        for range in self.state(0)? {
            ensure!(range.is_within(self.hello.total_blocks), "STATE lists {range:?}");
            plugged[range.start as usize..][..range.count as usize].fill(true);
        }
        self.plugged = plugged;
        self.check_count()
    }

    pub fn epoch(&self) -> u64 {
        self.hello.epoch
    }

    pub fn block_size(&self) -> u64 {
        u64::from(self.hello.block_size)
    }

    /// How many blocks the driver holds for plugged.
    pub fn count(&self) -> u32 {
        u32::try_from(self.plugged.iter().filter(|plugged| **plugged).count()).unwrap_or(u32::MAX)
    }

    fn check_count(&self) -> Result<()> {
        let (device, model) = (self.sizes.plugged_blocks, self.count());
        ensure!(device == model, "the device says {device} blocks are plugged, the driver {model}");
        Ok(())
    }

    /// Sends bytes as the body of a request, with `room` bytes for the response. Gives what was written there.
    pub fn raw(&mut self, kind: u32, body: &[u8], room: usize) -> Result<(Answer, Vec<u8>)> {
        let head = self.send(self.area, kind, body, room)?;
        let answer = self.queue.wait(head, PATIENCE)?;
        Ok((answer, self.response(self.area, answer, room)?))
    }

    fn send(&mut self, area: Area, kind: u32, body: &[u8], room: usize) -> Result<u16> {
        let ram = &self.queue.ring.ram;
        ram.write(area.request, body);
        ram.fill(area.response, room, BLANK);
        let mut data = Vec::new();
        if !body.is_empty() {
            data.push(Segment::out(area.request, u32::try_from(body.len())?));
        }
        if room > 0 {
            data.push(Segment::into(area.response, u32::try_from(room)?));
        }
        self.queue.submit(kind, 0, &data)
    }

    /// What the device wrote, and a check that it wrote no more (V-4, V-35).
    fn response(&self, area: Area, answer: Answer, room: usize) -> Result<Vec<u8>> {
        // The status byte counts where all the room before it was filled.
        let len = usize::try_from(answer.written)?.min(room);
        let mut bytes = self.queue.ring.ram.read(area.response, room);
        let is_blank = bytes[len..].iter().all(|byte| *byte == BLANK);
        ensure!(is_blank || self.device_may_crash, "more was written than `used.len` says");
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Sends a request and decodes the answer.
    pub fn call(&mut self, request: &Request) -> Result<Response> {
        let kind = request.kind();
        let room = match request {
            Request::State { .. } => 32 + 8 * self.page,
            Request::Unplug { ranges, .. } | Request::Plug { ranges, .. } => {
                guest::min_response_len(kind, u32::try_from(ranges.len())?)
            }
            _ => guest::min_response_len(kind, 0),
        };
        let (answer, bytes) = self.raw(kind as u32, &request.encode(), room)?;
        ensure!(answer.status == S_OK, "{kind:?} was answered with status {:#x}", answer.status);
        let response = Response::decode(kind, &bytes)?;
        if response.result != RequestResult::Stale {
            self.sizes = response.sizes;
        }
        Ok(response)
    }

    /// As [`Driver::call`] for what must be carried out.
    pub fn ok(&mut self, request: &Request) -> Result<ResponseBody> {
        let response = self.call(request)?;
        ensure!(response.result != RequestResult::Stale, Stale);
        ensure!(response.result == RequestResult::Ok, "{:?}: {:?}", request.kind(), response.result);
        Ok(response.body)
    }

    /// All ranges that STATE lists, page by page, each checked (V-18).
    pub fn state(&mut self, flags: u32) -> Result<Vec<BlockRange>> {
        let total = self.hello.total_blocks;
        let (mut all, mut start) = (Vec::new(), 0);
        loop {
            let body = self.ok(&Request::State { epoch: self.epoch(), flags, start })?;
            let ResponseBody::State { next, ranges } = body else { bail!("STATE: {body:?}") };
            ensure!(ranges.len() <= self.page, "{} ranges in room for {}", ranges.len(), self.page);
            let mut end = start;
            for range in &ranges {
                ensure!(range.count > 0 && range.start >= end, "{range:?} after {end}");
                end = range.end().context("a range wraps around")?;
            }
            ensure!(end <= next && next <= total, "ranges up to {end}, next is {next} of {total}");
            all.extend(ranges);
            if next == total {
                return Ok(all);
            }
            ensure!(next > start, "STATE does not go on from {start}");
            start = next;
        }
    }

    /// Gives ranges up and keeps the model right (D-12). `None` if the session is over.
    pub fn unplug(&mut self, ranges: &[BlockRange]) -> Result<Option<Vec<RangeStatus>>> {
        self.change(ranges, false)
    }

    /// Takes ranges and keeps the model right. `None` if the session is over.
    pub fn plug(&mut self, ranges: &[BlockRange]) -> Result<Option<Vec<RangeStatus>>> {
        self.change(ranges, true)
    }

    fn change(&mut self, ranges: &[BlockRange], to: bool) -> Result<Option<Vec<RangeStatus>>> {
        let mut all = Vec::with_capacity(ranges.len());
        for batch in ranges.chunks(self.batch) {
            let (epoch, ranges) = (self.epoch(), batch.to_vec());
            let request =
                if to { Request::Plug { epoch, ranges } } else { Request::Unplug { epoch, ranges } };
            self.messages += 1;
            let response = self.call(&request)?;
            if response.result == RequestResult::Stale {
                return Ok(None);
            }
            if response.result == RequestResult::Busy && self.device_may_crash {
                self.host_at_work = true;
                break;
            }
            let ResponseBody::Ranges(statuses) = response.body else { bail!("{response:?}") };
            ensure!(statuses.len() == batch.len(), "{} statuses for {}", statuses.len(), batch.len());
            for (range, status) in batch.iter().zip(&statuses) {
                if matches!(status, RangeStatus::Ok | RangeStatus::Already) {
                    let blocks = &mut self.plugged[range.start as usize..][..range.count as usize];
                    ensure!(
                        *status != RangeStatus::Already || blocks.iter().all(|plugged| *plugged == to),
                        "{range:?} is said to have been so already"
                    );
                    blocks.fill(to);
                }
            }
            all.extend(statuses);
            self.check_count()?;
        }
        Ok(Some(all))
    }

    /// As [`Driver::unplug`] for what must go.
    pub fn give(&mut self, ranges: &[BlockRange]) -> Result<()> {
        let statuses = self.unplug(ranges)?.context("STALE")?;
        ensure!(statuses.iter().all(|status| *status == RangeStatus::Ok), "{statuses:?}");
        Ok(())
    }

    pub fn decline(&mut self, could_give: u32, reason: DeclineReason) -> Result<RequestResult> {
        let seq = self.sizes.seq;
        let request = Request::Decline { epoch: self.epoch(), seq, could_give, reason };
        Ok(self.call(&request)?.result)
    }

    pub fn pull(&mut self, want_blocks: u32, urgency: Urgency) -> Result<RequestResult> {
        let request = Request::Pull { epoch: self.epoch(), want_blocks, urgency };
        Ok(self.call(&request)?.result)
    }

    /// Leaves a WAIT with the device.
    pub fn park(&mut self, seq_seen: u64) -> Result<u16> {
        let request = Request::Wait { epoch: self.epoch(), seq_seen };
        let room = guest::min_response_len(RequestType::Wait, 0);
        let head = self.send(self.wait_area, RequestType::Wait as u32, &request.encode(), room)?;
        self.parked = Some(head);
        Ok(head)
    }

    /// Whether the device has a WAIT.
    pub fn is_parked(&self) -> bool {
        self.parked.is_some()
    }

    /// The answer to the WAIT, whatever it is. `None` if there is none within `limit`.
    pub fn wait_answer(&mut self, limit: Duration) -> Result<Option<Response>> {
        let head = self.parked.context("no WAIT is with the device")?;
        let answer = if limit.is_zero() {
            self.queue.answered(head)?
        } else {
            match self.queue.wait(head, limit) {
                Ok(answer) => Some(answer),
                Err(error) if format!("{error:#}").contains("nothing was used") => None,
                Err(error) => return Err(error),
            }
        };
        let Some(answer) = answer else { return Ok(None) };
        self.parked = None;
        ensure!(answer.status == S_OK, "WAIT was answered with status {:#x}", answer.status);
        let room = guest::min_response_len(RequestType::Wait, 0);
        let bytes = self.response(self.wait_area, answer, room)?;
        Ok(Some(Response::decode(RequestType::Wait, &bytes)?))
    }

    /// Waits for news beyond what the driver has seen, with a WAIT as D-8 says. `None` if there is none within `limit`.
    pub fn news(&mut self, limit: Duration) -> Result<Option<News>> {
        if self.parked.is_none() {
            self.park(self.sizes.seq)?;
        }
        let Some(response) = self.wait_answer(limit)? else { return Ok(None) };
        ensure!(response.result == RequestResult::Ok, "WAIT: {:?}", response.result);
        let ResponseBody::Wait { flags, reason, deadline_ms } = response.body else { bail!("{response:?}") };
        self.sizes = response.sizes;
        Ok(Some(News { sizes: response.sizes, flags, reason, deadline_ms }))
    }

    /// News that must come.
    pub fn expect_news(&mut self) -> Result<News> {
        self.news(PATIENCE)?.context("no news")
    }

    /// Follows the target as it is now: gives what `choose` says, takes the lowest blocks. Declines the rest. Returns
    /// whether the target is reached. Says HELLO again where the session is over.
    pub fn follow(&mut self, choose: &mut Choice<'_>) -> Result<bool> {
        loop {
            let (requested, plugged) = (self.sizes.requested_blocks, self.count());
            let done = match plugged.cmp(&requested) {
                std::cmp::Ordering::Equal => return Ok(true),
                std::cmp::Ordering::Greater => {
                    let ranges = choose(self, plugged - requested);
                    if ranges.is_empty() {
                        self.decline(0, DeclineReason::Nothing)?;
                        return Ok(false);
                    }
                    self.unplug(&ranges)?
                }
                std::cmp::Ordering::Less => {
                    let ranges = pick(self.absent(), requested - plugged);
                    self.plug(&ranges)?
                }
            };
            match done {
                None => self.hello()?,
                Some(_) if self.count() == plugged => return Ok(false),
                Some(_) => {}
            }
        }
    }

    /// Waits for the target to differ from what is plugged, and follows it.
    pub fn attend(&mut self, choose: &mut Choice<'_>) -> Result<bool> {
        while self.sizes.requested_blocks == self.count() {
            let news = self.expect_news()?;
            if news.flags & guest::NEWS_STATE != 0 {
                self.refresh()?;
            }
        }
        self.follow(choose)
    }

    /// One round of a driver whose device may crash at any time: hears news for at most `limit` and follows the target.
    /// Where the session is over, begins another. Returns whether the target is reached.
    pub fn live(&mut self, choose: &mut Choice<'_>, limit: Duration) -> Result<bool> {
        match self.hear_and_follow(choose, limit) {
            Err(error) if error.is::<Stale>() => {
                self.rejoin()?;
                Ok(false)
            }
            other => other,
        }
    }

    fn hear_and_follow(&mut self, choose: &mut Choice<'_>, limit: Duration) -> Result<bool> {
        if self.sizes.requested_blocks == self.count() || self.host_at_work {
            if self.parked.is_none() {
                self.park(self.sizes.seq)?;
            }
            // A host that is done without having moved anything brings no news.
            let was_at_work = std::mem::take(&mut self.host_at_work);
            let Some(response) = self.wait_answer(limit)? else { return Ok(!was_at_work) };
            ensure!(response.result == RequestResult::Ok, Stale);
            let ResponseBody::Wait { flags, .. } = response.body else { bail!("{response:?}") };
            self.sizes = response.sizes;
            if flags & guest::NEWS_STATE != 0 {
                self.refresh()?;
            }
        }
        self.follow(choose)
    }

    /// Says HELLO until a session lasts long enough to read the plugged set.
    fn rejoin(&mut self) -> Result<()> {
        for _ in 0..100 {
            match self.hello() {
                Err(error) if error.is::<Stale>() => {}
                other => return other,
            }
        }
        bail!("a hundred sessions were over at once")
    }

    /// The plugged blocks, ascending.
    pub fn present(&self) -> impl DoubleEndedIterator<Item = u32> {
        (0..self.hello.total_blocks).filter(|block| self.plugged[*block as usize])
    }

    /// The unplugged blocks, ascending.
    pub fn absent(&self) -> impl DoubleEndedIterator<Item = u32> {
        (0..self.hello.total_blocks).filter(|block| !self.plugged[*block as usize])
    }

    /// Checks that the driver, STATE and the operator's view name the same blocks.
    pub fn agree(&mut self, operator: &mut Operator, name: &str) -> Result<()> {
        let model = self.plugged.clone();
        self.refresh()?;
        ensure!(self.plugged == model, "STATE and the driver's model differ");
        let mut evicted = vec![false; model.len()];
        for range in operator.evicted(name)? {
            evicted[range.start as usize..][..range.count as usize].fill(true);
        }
        ensure!(
            evicted.iter().zip(&model).all(|(evicted, plugged)| evicted != plugged),
            "device.evicted is not the complement of what the driver holds"
        );
        let shown = operator.show(name)?;
        let blocks = |bytes: u64| bytes / self.block_size();
        ensure!(
            blocks(shown.plugged_bytes) == u64::from(self.count())
                && blocks(shown.requested_bytes) == u64::from(self.sizes.requested_blocks),
            "the operator sees {shown:?}, the driver {:?}",
            self.sizes
        );
        Ok(())
    }
}

/// The first `count` of `blocks`, as ranges.
pub fn pick(blocks: impl Iterator<Item = u32>, count: u32) -> Vec<BlockRange> {
    let mut blocks: Vec<u32> = blocks.take(count as usize).collect();
    blocks.sort_unstable();
    let mut ranges: Vec<BlockRange> = Vec::new();
    for block in blocks {
        match ranges.last_mut() {
            Some(range) if range.end() == Some(block) => range.count += 1,
            _ => ranges.push(BlockRange::new(block, 1)),
        }
    }
    ranges
}

/// Gives the lowest blocks.
pub fn lowest(driver: &Driver, count: u32) -> Vec<BlockRange> {
    pick(driver.present(), count)
}

/// Gives the highest blocks.
pub fn highest(driver: &Driver, count: u32) -> Vec<BlockRange> {
    pick(driver.present().rev(), count)
}

/// Gives blocks from all over, one by one.
pub fn anywhere(rng: &mut StdRng) -> impl FnMut(&Driver, u32) -> Vec<BlockRange> + '_ {
    |driver, count| {
        let mut blocks: Vec<u32> = driver.present().collect();
        for i in 0..blocks.len().min(count as usize) {
            let other = rng.random_range(i..blocks.len());
            blocks.swap(i, other);
        }
        blocks.truncate(count as usize);
        blocks.into_iter().map(|block| BlockRange::new(block, 1)).collect()
    }
}
