// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A request queue at work: takes chains, starts what they ask, and answers every one of them exactly once.
//!
//! ```text
//!   ring ► chain::walk ► request::parse ► execute::start ─┬─ done ──► answer
//!                                │                        └─ pending ► slot ► complete(head) ► answer
//!                                └─ guest channel ► GuestCall to the owner ► slot ► reply(head) ► answer
//! ```
//!
//! A malformed chain is answered and the queue goes on. The status byte is written in one place, `ActiveQueue::answer`.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tracing::debug;
use vssd_pool::sabotage::{Sabotage, active};
use vssd_pool::{IoError, Lane, Submitted, Vssd, VssdId};
use vssd_protocol::guest::{self, RequestType};
use vssd_protocol::letter::{Letter, Mailbox, Notice};

use super::chain::{self, Segments};
use super::dirty_log::QueueLog;
use super::memory::GuestMemory;
use super::ring::{Ring, RingError};
use crate::device::execute::{self, Io, S_IOERR, S_OK};
use crate::device::request::{self, Extent, ID_LEN, Limits, Operation, Reject, SEGMENT_LEN};
use crate::device::{DeviceEvent, GuestCall, OwnerHandle, Reply, ReplySink};

/// What one queue may do before others get their turn.
#[derive(Clone, Copy, Debug)]
struct Turn {
    chains: u16,
    /// What is copied or zeroed inline keeps the worker from other queues: about a fifth of a millisecond.
    bytes: u64,
}

/// What looking at a descriptor takes, in bytes copied meanwhile.
const DESCRIPTOR_BYTES: u64 = 64;
/// What a queue may have under way on media that take their time. More would wait in front of others' requests, and a buffer that is
/// not aligned has a copy in the daemon's memory.
const MOST_PENDING: u32 = 128;
const MOST_PENDING_BYTES: u64 = 4 << 20;
/// Guest-channel requests that wait for the owner. A driver sends one after the other, and keeps a WAIT.
const MOST_CALLS: usize = 64;
/// A GET_ID that follows a letter so soon is its writer's.
const ANSWER: Duration = Duration::from_secs(2);

impl Turn {
    const WHOLE: Self = Self { chains: 128, bytes: 2 << 20 };

    fn is_over(self) -> bool {
        self.chains == 0 || self.bytes == 0
    }
}

/// What all queues of a vSSD share.
#[derive(Debug)]
pub struct DeviceContext {
    pub id: VssdId,
    pub vssd: Arc<Vssd>,
    /// Padded with NUL.
    pub serial: [u8; ID_LEN],
    /// Bytes of a logical block.
    pub logical_block: u64,
    /// What an agent hears that asks by a letter.
    pub notice: NoticeCell,
    pub owner: OwnerHandle,
    /// Requests that were refused or failed, but for those that met unplugged blocks.
    pub errors: AtomicU64,
}

/// A notice that the owner changes and workers read.
#[derive(Debug, Default)]
pub struct NoticeCell(AtomicU64);

impl NoticeCell {
    pub fn set(&self, notice: Notice) {
        let Notice { seq, block_shift, has_holes, soft_blocks } = notice;
        let flags = u64::from(soft_blocks.is_some()) << 48 | u64::from(has_holes) << 56;
        let head = u64::from(seq) << 32 | u64::from(block_shift) << 40 | flags;
        self.0.store(head | u64::from(soft_blocks.unwrap_or(0)), Ordering::Relaxed);
    }

    fn get(&self) -> Notice {
        let [holes, wish, block_shift, seq, soft @ ..] = self.0.load(Ordering::Relaxed).to_be_bytes();
        let soft_blocks = (wish != 0).then_some(u32::from_be_bytes(soft));
        Notice { seq, block_shift, has_holes: holes != 0, soft_blocks }
    }
}

impl DeviceContext {
    /// One past the last byte that can be addressed, plugged or not.
    pub fn total_bytes(&self) -> u64 {
        self.vssd.block_size().bytes_of(self.vssd.total_blocks())
    }
}

/// Everything a worker needs to run a queue.
#[derive(Debug)]
pub struct QueueStart {
    /// Names this run of the queue: answers to an earlier run find nobody.
    pub key: u32,
    pub device: Arc<DeviceContext>,
    pub limits: Limits,
    pub ring: Ring,
    pub kick: OwnedFd,
    pub call: Option<OwnedFd>,
}

/// Where a queue stood when it stopped.
#[derive(Clone, Copy, Debug)]
pub struct Stopped {
    pub next_avail: u16,
}

/// Where a chain is answered.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Where the status byte goes, the last of what is writable.
    status: *mut u8,
    /// Writable bytes before it.
    room: u32,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    place: Place,
    /// Bytes written to the guest if the request succeeds, status byte not counted.
    data_len: u32,
    /// Bytes under way, either direction.
    moved: u64,
    busy: bool,
}

/// The memory that a guest-channel response will fill.
type ResponseRoom = Vec<libc::iovec>;

/// A running queue. Belongs to one worker.
#[derive(Debug)]
pub struct ActiveQueue {
    key: u32,
    device: Arc<DeviceContext>,
    limits: Limits,
    ring: Ring,
    kick: OwnedFd,
    call: Option<OwnedFd>,
    segments: Segments,
    /// Indexed by the chain's head.
    slots: Vec<Slot>,
    in_flight: u32,
    /// Of all requests in flight.
    bytes_in_flight: u64,
    responses: HashMap<u16, ResponseRoom>,
    /// Memory tables that requests in flight may still point into.
    retired: Vec<Arc<GuestMemory>>,
    body: Vec<u8>,
    /// Requests that a crashed daemon left behind, newest first.
    replay: Vec<u16>,
    stop: Option<mpsc::Sender<Stopped>>,
    turn: Turn,
    /// Whether the driver broke the ring; taken up again at the next kick.
    broken: bool,
    /// Letters of an agent that uses a driver which knows nothing of vSSDs.
    mailbox: Mailbox,
    /// When a letter came that no GET_ID has followed yet.
    letter_at: Option<Instant>,
    /// When its worker gave it a turn last, in the worker's count of turns.
    pub last_turn: u64,
}

// SAFETY: the raw pointers lead into guest memory that `ring` and `retired` keep mapped; one thread uses a queue at a time.
unsafe impl Send for ActiveQueue {}

/// Names the request at `head` of the queue `key`, for the lane and for replies.
fn token(key: u32, head: u16) -> u64 {
    u64::from(key) << 16 | u64::from(head)
}

/// The queue and head that a token names.
pub fn split_token(token: u64) -> (u32, u16) {
    // Exact: `token` was made of a u32 and a u16.
    (u32::try_from(token >> 16).unwrap_or(u32::MAX), u16::try_from(token & 0xffff).unwrap_or(u16::MAX))
}

impl ActiveQueue {
    pub fn new(start: QueueStart) -> Self {
        let QueueStart { key, device, limits, mut ring, kick, call } = start;
        let next_used = ring.next_used();
        let mut replay = ring.inflight_mut().map(|i| i.recover(next_used)).unwrap_or_default();
        if !replay.is_empty() {
            // What was taken and not answered comes first; the ring goes on behind it. Fits: at most the queue's size.
            let taken = u16::try_from(replay.len()).unwrap_or(ring.size());
            ring.set_next_avail(next_used.wrapping_add(taken));
            replay.reverse();
            if active(Sabotage::DropInFlight) {
                replay.pop();
            }
        }
        let place = Place { status: std::ptr::null_mut(), room: 0 };
        let idle = Slot { place, data_len: 0, moved: 0, busy: false };
        Self {
            key,
            device,
            limits,
            slots: vec![idle; usize::from(ring.size())],
            ring,
            kick,
            call,
            segments: Segments::default(),
            in_flight: 0,
            bytes_in_flight: 0,
            responses: HashMap::new(),
            retired: Vec::new(),
            body: Vec::new(),
            replay,
            stop: None,
            turn: Turn::WHOLE,
            broken: false,
            mailbox: Mailbox::default(),
            letter_at: None,
            last_turn: 0,
        }
    }

    pub fn key(&self) -> u32 {
        self.key
    }

    pub fn kick(&self) -> &OwnedFd {
        &self.kick
    }

    pub fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call;
    }

    /// Notes its writes to guest memory as told, from the answers on that are not published yet.
    pub fn set_log(&mut self, log: Option<QueueLog>) {
        self.ring.set_log(log);
    }

    /// Goes on with another memory table. Requests under way end in the old one. Those that wait for the owner may wait for
    /// ever, and a front-end may change its memory as often: they are found anew, so that no table is kept for them.
    pub fn set_memory(&mut self, mem: Arc<GuestMemory>) -> Result<(), RingError> {
        let old = Arc::clone(self.ring.memory());
        let moved = self.ring.set_memory(mem);
        if moved.is_ok() {
            self.find_responses_anew();
        }
        // Waiting for the owner alone holds no table, unless the ring is not in the new one.
        if moved.is_err() || self.in_flight as usize > self.responses.len() {
            self.retired.push(old);
        }
        moved
    }

    /// Where the guest-channel requests under way are to be answered in the memory table of now. One whose chain is not in it
    /// any more is given back empty.
    fn find_responses_anew(&mut self) {
        let heads: Vec<u16> = self.responses.keys().copied().collect();
        for head in heads {
            let found = chain::walk(self.ring.table(), head, &mut self.segments).ok();
            match found.and_then(|()| self.take_place()) {
                Some(place) => {
                    self.slots[usize::from(head)].place = place;
                    self.responses.insert(head, self.segments.writable.clone());
                }
                None => {
                    self.responses.remove(&head);
                    self.release(head);
                    self.ring.push_used(head, 0);
                }
            }
        }
    }

    /// Takes no more chains; `done` hears where the queue stands once every chain taken is answered.
    pub fn stop(&mut self, done: mpsc::Sender<Stopped>) {
        self.stop = Some(done);
    }

    /// Whether the queue has been asked to stop and is idle. Then it says so and can be dropped.
    pub fn finish_stop(&mut self) -> bool {
        if self.in_flight > 0 || self.stop.is_none() {
            return false;
        }
        if let Some(done) = self.stop.take() {
            // A replay that was not begun stays marked in flight; the avail index goes back behind it.
            let unbegun = u16::try_from(self.replay.len()).unwrap_or(0);
            let _ = done.send(Stopped { next_avail: self.ring.next_avail().wrapping_sub(unbegun) });
        }
        true
    }

    /// Takes and starts up to a batch of chains. True if more may wait; else the driver is still to be asked for a kick.
    pub fn process(&mut self, lane: &mut Lane, sink: &Arc<dyn ReplySink>, kicked: bool) -> bool {
        if self.stop.is_some() || (self.broken && !kicked) {
            return false;
        }
        // The session is about to end.
        self.broken = self.ring.memory().is_lost();
        if self.broken {
            return false;
        }
        // The operator may raise a vSSD's maximum at any time.
        self.limits.total_bytes = self.device.total_bytes();
        self.ring.disable_kick();
        self.turn = Turn::WHOLE;
        loop {
            let first = self.ring.unpublished();
            lane.begin_batch();
            self.take_batch(lane, sink);
            // Answers are published by the batch: no sooner than the lane says that what they tell outlives this process.
            if lane.end_batch() {
                break;
            }
            // A medium lost part of what it held: the answers may be wrong, so the requests are done over, and then fail.
            let replay = &mut self.replay;
            replay.extend(self.ring.take_back(first).rev());
            self.turn.chains = self.turn.chains.max(u16::try_from(replay.len()).unwrap_or(u16::MAX));
            self.turn.bytes = u64::MAX;
        }
        let more = self.turn.is_over() || self.ring.is_batch_full();
        self.ring.publish();
        more && !self.broken && !self.is_full()
    }

    /// Whether so much is under way that chains wait until some of it has ended.
    pub fn is_full(&self) -> bool {
        let pending = self.in_flight.saturating_sub(u32::try_from(self.responses.len()).unwrap_or(u32::MAX));
        pending >= MOST_PENDING || self.bytes_in_flight >= MOST_PENDING_BYTES
    }

    fn take_batch(&mut self, lane: &mut Lane, sink: &Arc<dyn ReplySink>) {
        while !self.turn.is_over() && !self.ring.is_batch_full() && !self.is_full() {
            let head = match self.replay.pop() {
                Some(head) => head,
                None => match self.ring.available() {
                    Ok(0) => break,
                    Ok(_) => self.ring.pop(),
                    Err(error) => {
                        debug!(device = self.device.vssd.name(), %error, "broken ring");
                        self.broken = true;
                        break;
                    }
                },
            };
            self.take(head, lane, sink);
            self.turn.chains -= 1;
        }
    }

    /// Whether chains wait that a look, not a kick, has found.
    pub fn has_chains(&self) -> bool {
        self.stop.is_none() && !self.broken && !self.is_full() && matches!(self.ring.available(), Ok(1..))
    }

    /// Asks the driver for a kick at the next chain. True if one came meanwhile, which may bring none.
    pub fn ask_for_kick(&mut self) -> bool {
        self.stop.is_none() && self.ring.enable_kick() && !self.broken && !self.is_full()
    }

    fn take(&mut self, head: u16, lane: &mut Lane, sink: &Arc<dyn ReplySink>) {
        let Some(slot) = self.slots.get(usize::from(head)) else {
            // A head outside the ring has no used entry that could answer it.
            debug!(device = self.device.vssd.name(), head, "head outside the ring");
            return;
        };
        if slot.busy {
            debug!(device = self.device.vssd.name(), head, "head made available twice");
            self.ring.push_used(head, 0);
            return;
        }
        let walked = chain::walk(self.ring.table(), head, &mut self.segments);
        let looking = u64::from(self.segments.descriptors) * DESCRIPTOR_BYTES;
        self.turn.bytes = self.turn.bytes.saturating_sub(looking);
        if let Err(error) = walked {
            debug!(device = self.device.vssd.name(), head, %error, "malformed chain");
            self.count_error();
            self.ring.push_used(head, 0);
            return;
        }
        let Some(place) = self.take_place() else {
            debug!(device = self.device.vssd.name(), head, "chain without room for a status");
            self.ring.push_used(head, 0);
            return;
        };
        if let Err(reject) = self.begin(head, place, lane, sink) {
            debug!(device = self.device.vssd.name(), head, %reject, "request refused");
            self.count_error();
            self.answer(head, place, execute::status_of_reject(reject), 0);
        }
    }

    /// Removes the place of the answer from the chain in `segments`.
    fn take_place(&mut self) -> Option<Place> {
        let status = self.segments.take_status()?;
        Some(Place { status, room: self.segments.writable_len })
    }

    /// Parses and starts the request in `segments`.
    fn begin(
        &mut self,
        head: u16,
        place: Place,
        lane: &mut Lane,
        sink: &Arc<dyn ReplySink>,
    ) -> Result<(), Reject> {
        let mut header = [0; guest::BLK_HEADER_LEN];
        // SAFETY: `walk` found the segments in memory that the ring keeps mapped.
        if !unsafe { self.segments.take_readable(&mut header) } {
            return Err(Reject::Malformed("less than 16 bytes of header"));
        }
        let (readable, writable) = (self.segments.readable_len, self.segments.writable_len);
        let io = match request::parse(header, readable, writable, &self.limits)? {
            Operation::Read(extent) => {
                if extent.len == self.device.logical_block {
                    self.read_letter(extent);
                }
                Io::Read(extent)
            }
            Operation::Write(extent) => Io::Write(extent),
            Operation::Flush => Io::Flush,
            Operation::Discard => Io::Discard(request::parse_discard(self.segment()?, &self.limits)?),
            Operation::WriteZeroes => {
                let (extent, unmap) = request::parse_write_zeroes(self.segment()?, &self.limits)?;
                Io::WriteZeroes(extent, unmap)
            }
            Operation::GetId => {
                let answers_letter = self.letter_at.take().is_some_and(|at| at.elapsed() < ANSWER);
                let id = if answers_letter { self.device.notice.get().encode() } else { self.device.serial };
                // SAFETY: as above.
                let written = unsafe { Segments::write(&self.segments.writable, &id) };
                self.answer(head, place, S_OK, u32::try_from(written).unwrap_or(0));
                return Ok(());
            }
            Operation::Guest(kind) => return self.begin_guest_call(kind, head, place, sink),
        };
        let moved = io.bytes_moved();
        self.turn.bytes = self.turn.bytes.saturating_sub(moved);
        let (segments, data_len) = match io {
            Io::Read(_) => (&self.segments.writable, writable),
            _ => (&self.segments.readable, 0),
        };
        // SAFETY: the memory stays mapped: the ring holds its table, and `set_memory` retires it while requests fly.
        match unsafe { execute::start(lane, &self.device.vssd, io, segments, token(self.key, head)) } {
            Submitted::Done(result) => self.answer_io(head, place, data_len, result),
            Submitted::Pending => self.occupy(head, Slot { place, data_len, moved, busy: true }),
        }
        Ok(())
    }

    /// A single logical block is read: it may be a piece of a letter.
    fn read_letter(&mut self, extent: Extent) {
        let Some(letter) = self.mailbox.take(extent.offset.0 / extent.len) else { return };
        self.letter_at = Some(Instant::now());
        if let Letter::Report(report) = letter {
            self.device.owner.send(DeviceEvent::Report { device: self.device.id, report });
        }
    }

    /// Copies the one segment of a discard or write-zeroes. `parse` made sure of its length.
    fn segment(&mut self) -> Result<[u8; SEGMENT_LEN], Reject> {
        let mut segment = [0; SEGMENT_LEN];
        // SAFETY: `walk` found the segments in memory that the ring keeps mapped.
        if unsafe { self.segments.take_readable(&mut segment) } {
            Ok(segment)
        } else {
            Err(Reject::Malformed("not exactly one segment"))
        }
    }

    fn begin_guest_call(
        &mut self,
        kind: RequestType,
        head: u16,
        place: Place,
        sink: &Arc<dyn ReplySink>,
    ) -> Result<(), Reject> {
        if self.responses.len() >= MOST_CALLS {
            return Err(Reject::Malformed("more guest-channel requests at a time than a driver sends"));
        }
        self.body.resize(self.segments.readable_len as usize, 0);
        // SAFETY: `walk` found the segments in memory that the ring keeps mapped.
        unsafe { self.segments.take_readable(&mut self.body) };
        let request = guest::Request::decode(kind, &self.body).map_err(|error| {
            debug!(device = self.device.vssd.name(), %error, "guest-channel request does not decode");
            Reject::Malformed("guest-channel request does not decode")
        })?;
        let ranges = match &request {
            guest::Request::Unplug { ranges, .. } | guest::Request::Plug { ranges, .. } => ranges.len(),
            _ => 0,
        };
        let room = self.segments.writable_len as usize;
        let ranges = u32::try_from(ranges).unwrap_or(u32::MAX);
        if room < guest::min_response_len(kind, ranges) {
            return Err(Reject::Malformed("no room for the guest-channel response"));
        }
        self.responses.insert(head, self.segments.writable.clone());
        self.occupy(head, Slot { place, data_len: 0, moved: 0, busy: true });
        let reply = Reply::new(Arc::clone(sink), token(self.key, head));
        let call = GuestCall { device: self.device.id, request, response_room: room, reply };
        self.device.owner.send(DeviceEvent::Guest(call));
        Ok(())
    }

    fn occupy(&mut self, head: u16, slot: Slot) {
        self.slots[usize::from(head)] = slot;
        self.in_flight += 1;
        self.bytes_in_flight += slot.moved;
    }

    fn release(&mut self, head: u16) -> Option<Slot> {
        let slot = self.slots.get_mut(usize::from(head)).filter(|slot| slot.busy)?;
        slot.busy = false;
        let slot = *slot;
        self.in_flight -= 1;
        self.bytes_in_flight -= slot.moved;
        Some(slot)
    }

    /// A pending operation ended.
    pub fn complete(&mut self, head: u16, result: Result<(), IoError>) {
        if let Some(slot) = self.release(head) {
            self.answer_io(head, slot.place, slot.data_len, result);
        }
        self.drop_retired();
    }

    /// The owner answers a guest-channel request; an empty response means that it could not.
    pub fn reply(&mut self, head: u16, response: &[u8]) {
        let room = self.responses.remove(&head);
        if let (Some(slot), Some(room)) = (self.release(head), room) {
            // SAFETY: the room was found in memory that `ring` or `retired` keeps mapped.
            let written = unsafe { Segments::write(&room, response) };
            let status = if response.is_empty() || written < response.len() { S_IOERR } else { S_OK };
            self.answer(head, slot.place, status, u32::try_from(written).unwrap_or(0));
        }
        self.drop_retired();
    }

    /// Forgets the guest-channel requests in flight. They stay marked in the inflight region, so that the next daemon, or
    /// this one after a reconnect, finds and answers them.
    pub fn abandon_guest_calls(&mut self) {
        for (head, _) in std::mem::take(&mut self.responses) {
            self.release(head);
        }
        self.drop_retired();
    }

    fn drop_retired(&mut self) {
        // Requests that wait for the owner were found anew in the table of now, except where the queue had to stop.
        let waiting = if self.stop.is_none() { self.responses.len() } else { 0 };
        if self.in_flight as usize <= waiting {
            self.retired.clear();
        }
    }

    fn answer_io(&mut self, head: u16, place: Place, data_len: u32, result: Result<(), IoError>) {
        if let Err(error) = result {
            debug!(device = self.device.vssd.name(), head, ?error, "request failed");
            if error != IoError::Evicted {
                self.count_error();
            }
        }
        let written = if result.is_ok() { data_len } else { 0 };
        self.answer(head, place, execute::status(result), written);
    }

    fn count_error(&self) {
        self.device.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Answers the chain `head`, to the front of which `written` bytes were written: the one place where a status byte is
    /// written. `used.len` counts from the first writable byte on, and the driver takes nothing behind it for written (virtio
    /// 1.3, §2.7.8.2): the status byte is counted only where all before it was written too.
    fn answer(&mut self, head: u16, place: Place, status: u8, written: u32) {
        // SAFETY: `walk` found the status byte in memory that `ring` or `retired` keeps mapped.
        unsafe { place.status.write_volatile(status) };
        self.ring.push_used(head, if written == place.room { written.saturating_add(1) } else { written });
    }

    /// Publishes answers and interrupts the driver if it wants to know.
    pub fn flush_used(&mut self) {
        self.ring.publish();
        if self.ring.needs_signal() {
            self.signal();
        }
    }

    /// Interrupts the driver. The descriptor does not block: a counter at its limit is an interrupt that is pending.
    pub fn signal(&self) {
        if let Some(call) = &self.call {
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }
}
