// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A lane's io_uring: reads, writes and syncs of media that are not memory.
//!
//! A request is made of parts, each one run of bytes on one medium. Parts sit in slots that are reused, so
//! nothing is allocated once the lane has warmed up. It knows media and buffers, neither blocks nor vSSDs.
//!
//! The ring is told what it is for before it runs ([`restrict`]): a filter of system calls does not see what is queued, so
//! it is the ring itself that refuses everything but transfers and syncs of its media.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Once;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

use super::iov;
use crate::sabotage::{Sabotage, active};
use crate::store::{AlignedBuf, RingTarget};
use crate::types::{IoError, MediumKind};

/// Submission queue entries; more parts than that are submitted in several calls.
const ENTRIES: u32 = 256;
/// Prepared entries that are submitted without waiting for the end of the batch: the device works on them meanwhile.
const SUBMIT_AT: usize = 8;
/// Bounce buffers are this long if that will do, and so many of them are kept for later requests. Longer ones, which drivers have no
/// reason to need, are given back at once.
const BOUNCE: usize = 64 << 10;
const KEPT_BOUNCES: usize = 64;
/// Likewise of lists of buffers: as many as the segments of a request, with its header and status.
const KEPT_IOV: usize = 128;
/// The most buffers the kernel takes in one call (IOV_MAX).
const MAX_IOV: usize = 1024;

/// What a lane has room for from the start: how many requests are under way at once depends on the medium's pace, and
/// a list that grows in mid-flight allocates.
pub(super) const WARM: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Transfer(Direction),
    /// A sync, and how many writes had completed when it began.
    Sync(u64),
}

/// One run of bytes under way.
#[derive(Debug)]
struct Part {
    request: u32,
    medium: MediumKind,
    kind: Kind,
    offset: u64,
    left: u64,
    /// Bytes of the whole part.
    total: u64,
    /// What the kernel works on: the guest's buffers, or the bounce buffer.
    iov: Vec<libc::iovec>,
    at: usize,
    bounce: Option<AlignedBuf>,
    /// Of a bounced read: where its bytes go, and how many at the front of the bounce buffer were not asked for.
    copy_to: Vec<libc::iovec>,
    skip: usize,
}

/// A part that is over.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) request: u32,
    pub(super) medium: MediumKind,
    /// Bytes written.
    pub(super) written: u64,
    /// Of a sync, failed or not: the writes it was to cover.
    pub(super) synced: Option<u64>,
    pub(super) result: Result<(), IoError>,
}

pub(super) struct Ring {
    ring: IoUring,
    targets: [Option<Target>; 2],
    parts: Vec<Part>,
    free: Vec<u32>,
    /// Parts whose entry could not be queued yet.
    unqueued: Vec<u32>,
    in_flight: usize,
    /// Bounce buffers that nobody uses.
    spare: Vec<AlignedBuf>,
    #[cfg(test)]
    pub(super) longest: Option<u64>,
    /// What the next completions report instead of what they did; `None` leaves one alone.
    #[cfg(test)]
    results: std::collections::VecDeque<Option<i32>>,
    /// How many submissions the kernel refuses.
    #[cfg(test)]
    refusals: u32,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} in flight)", self.in_flight)
    }
}

#[derive(Clone, Copy, Debug)]
struct Target {
    /// Its place in the ring's table of files.
    index: u32,
    memory_align: u64,
    offset_align: u64,
}

impl Ring {
    /// Completions make `event` readable. The thread that calls this must be the one that uses the ring.
    pub(super) fn new(media: [Option<RingTarget<'_>>; 2], event: i32) -> io::Result<Self> {
        let (ring, is_disabled) = build()?;
        ring.submitter().register_eventfd(event)?;
        let mut targets = [None; 2];
        let mut files = Vec::new();
        for (target, medium) in targets.iter_mut().zip(&media) {
            if let Some(medium) = medium {
                *target = Some(Target {
                    // At most two.
                    index: u32::from(!files.is_empty()),
                    memory_align: u64::from(medium.memory_align),
                    offset_align: u64::from(medium.offset_align),
                });
                files.push(medium.fd.as_raw_fd());
            }
        }
        ring.submitter().register_files(&files)?;
        if is_disabled {
            restrict(&ring)?;
        }
        Ok(Self {
            ring,
            targets,
            parts: Vec::with_capacity(WARM),
            free: Vec::with_capacity(WARM),
            unqueued: Vec::with_capacity(WARM),
            in_flight: 0,
            spare: Vec::with_capacity(KEPT_BOUNCES),
            #[cfg(test)]
            longest: None,
            #[cfg(test)]
            results: std::collections::VecDeque::new(),
            #[cfg(test)]
            refusals: 0,
        })
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn slot(&mut self, request: u32, medium: MediumKind, kind: Kind, offset: u64) -> u32 {
        let id = self.free.pop().unwrap_or_else(|| {
            self.parts.push(Part {
                request: 0,
                medium,
                kind,
                offset: 0,
                left: 0,
                total: 0,
                iov: Vec::with_capacity(8),
                at: 0,
                bounce: None,
                copy_to: Vec::new(),
                skip: 0,
            });
            // A lane has at most a few thousand requests.
            u32::try_from(self.parts.len() - 1).unwrap_or(u32::MAX)
        });
        let part = &mut self.parts[id as usize];
        part.request = request;
        part.medium = medium;
        part.kind = kind;
        part.offset = offset;
        part.left = 0;
        part.total = 0;
        part.iov.clear();
        part.at = 0;
        part.copy_to.clear();
        part.skip = 0;
        id
    }

    /// Prepares the transfer of `len` bytes at `offset` of a medium from or to the next bytes of `buffers`.
    /// `parts` is raised by how many parts will be reported, also when it fails half-way.
    pub(super) fn transfer(
        &mut self,
        request: u32,
        (medium, offset, len): (MediumKind, u64, u64),
        direction: Direction,
        buffers: &mut iov::Cursor<'_>,
        parts: &mut u32,
    ) -> Result<(), IoError> {
        let Some(target) = self.targets[medium.index()] else { return Err(IoError::Io(libc::ENODEV)) };
        let align = target.offset_align;
        let mut done = 0;
        while done < len {
            let id = self.slot(request, medium, Kind::Transfer(direction), offset + done);
            let part = &mut self.parts[id as usize];
            let mut is_aligned = true;
            // A part ends on a sector, or it could not be written; then it has too many buffers and is bounced.
            while done < len && (part.iov.len() < MAX_IOV || !(part.offset + part.left).is_multiple_of(align))
            {
                let Some((at, n)) = buffers.take(len - done) else { break };
                // Kernels before 6.18 want whole sectors in every buffer, not only in their sum.
                is_aligned &= (at.addr() as u64).is_multiple_of(target.memory_align)
                    && (n as u64).is_multiple_of(align);
                part.iov.push(libc::iovec { iov_base: at.cast(), iov_len: n });
                part.left += n as u64;
                done += n as u64;
            }
            is_aligned &= (part.offset | part.left).is_multiple_of(align) && part.iov.len() <= MAX_IOV;
            let prepared = if part.left == 0 {
                Err(IoError::Io(libc::EFAULT))
            } else if is_aligned {
                Ok(())
            } else {
                bounce(part, &mut self.spare, target, direction)
            };
            if let Err(error) = prepared {
                self.free.push(id);
                return Err(error);
            }
            part.total = part.left;
            *parts += 1;
            self.queue(id);
        }
        Ok(())
    }

    /// Prepares a sync of a medium's file that covers `writes` completed writes. It belongs to no one request.
    pub(super) fn sync(&mut self, medium: MediumKind, writes: u64) {
        let id = self.slot(u32::MAX, medium, Kind::Sync(writes), 0);
        self.queue(id);
    }

    fn queue(&mut self, id: u32) {
        let Some(entry) = self.entry(id) else {
            self.unqueued.push(id);
            return;
        };
        self.in_flight += 1;
        // SAFETY: the entry names the part's iovec array, or the buffer in it. The array's heap memory stays
        // where it is and is not changed until the part's completion was seen (slots are only reused then);
        // the buffers are the caller's promise to `Lane`, or the part's own bounce buffer, kept as long.
        if unsafe { self.ring.submission().push(&entry) }.is_ok() {
            if self.ring.submission().len() >= SUBMIT_AT {
                self.submit();
            }
            return;
        }
        self.submit();
        // SAFETY: as above.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.in_flight -= 1;
            self.unqueued.push(id);
        }
    }

    fn entry(&self, id: u32) -> Option<squeue::Entry> {
        let part = self.parts.get(id as usize)?;
        let file = types::Fixed(self.targets[part.medium.index()]?.index);
        let entry = match part.kind {
            Kind::Sync(_) => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Kind::Transfer(direction) => {
                let iov = &part.iov[part.at..];
                #[cfg(test)]
                let iov = &iov[..self.longest.map_or(iov.len(), |_| 1)];
                match (direction, iov) {
                    (_, [one]) => {
                        let len = u32::try_from(one.iov_len).unwrap_or(1 << 30);
                        #[cfg(test)]
                        let len = self
                            .longest
                            .map_or(len, |longest| len.min(u32::try_from(longest).unwrap_or(len)));
                        let at = one.iov_base.cast::<u8>();
                        match direction {
                            Direction::Read => opcode::Read::new(file, at, len).offset(part.offset).build(),
                            Direction::Write => opcode::Write::new(file, at, len).offset(part.offset).build(),
                        }
                    }
                    (Direction::Read, many) => {
                        opcode::Readv::new(file, many.as_ptr(), u32::try_from(many.len()).ok()?)
                            .offset(part.offset)
                            .build()
                    }
                    (Direction::Write, many) => {
                        opcode::Writev::new(file, many.as_ptr(), u32::try_from(many.len()).ok()?)
                            .offset(part.offset)
                            .build()
                    }
                }
            }
        };
        Some(entry.user_data(u64::from(id)))
    }

    /// Hands what is prepared to the kernel.
    pub(super) fn submit(&mut self) {
        while !self.ring.submission().is_empty() {
            #[cfg(test)]
            if let Some(left) = self.refusals.checked_sub(1) {
                self.refusals = left;
                break;
            }
            match self.ring.submit() {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // The kernel has no memory for them, or wants completions reaped first. The entries stay queued
                    // and `reap` submits again.
                    if !matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) {
                        tracing::error!(%error, "cannot submit to io_uring");
                    }
                    break;
                }
            }
        }
    }

    /// Whether the kernel has not taken everything: no completion may ever come of it, so someone has to look again.
    pub(super) fn is_stuck(&mut self) -> bool {
        !self.unqueued.is_empty() || !self.ring.submission().is_empty()
    }

    /// Waits until something completes; `false` if that cannot be had.
    pub(super) fn wait(&mut self) -> bool {
        self.in_flight == 0
            || matches!(
                self.ring.submit_and_wait(1).map_err(|error| error.kind()),
                Ok(_) | Err(io::ErrorKind::Interrupted)
            )
    }

    /// Reports parts that are over.
    pub(super) fn reap(&mut self, mut over: impl FnMut(Finished)) {
        if self.in_flight == 0 && self.unqueued.is_empty() {
            return;
        }
        self.run_task_work();
        loop {
            let Some(completion) = self.ring.completion().next() else { break };
            let Ok(id) = u32::try_from(completion.user_data()) else { continue };
            self.in_flight -= 1;
            if let Some(finished) = self.complete(id, completion.result()) {
                over(finished);
            }
        }
        for id in std::mem::take(&mut self.unqueued) {
            self.queue(id);
        }
        self.submit();
    }

    /// Whether something has completed, or will have once the thread runs its deferred work.
    pub(super) fn has_news(&mut self) -> bool {
        self.in_flight > 0 && (!self.ring.completion().is_empty() || self.ring.submission().taskrun())
    }

    /// With deferred task work, completions appear only when the thread asks for them.
    fn run_task_work(&mut self) {
        let (taskrun, overflow) = {
            let submission = self.ring.submission();
            (submission.taskrun(), submission.cq_overflow())
        };
        if taskrun || overflow {
            const GETEVENTS: u32 = 1;
            // SAFETY: no argument pointer is passed; nothing is submitted.
            let entered = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 0, GETEVENTS, None) };
            if let Err(error) = entered
                && !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
            {
                tracing::error!(%error, "cannot run io_uring's deferred work");
            }
        }
    }

    fn complete(&mut self, id: u32, result: i32) -> Option<Finished> {
        #[cfg(test)]
        let result = self.results.pop_front().flatten().unwrap_or(result);
        let part = self.parts.get_mut(id as usize)?;
        let mut finished = Finished {
            request: part.request,
            medium: part.medium,
            written: 0,
            synced: if let Kind::Sync(writes) = part.kind { Some(writes) } else { None },
            result: Ok(()),
        };
        match (part.kind, u64::try_from(result)) {
            (_, Err(_)) if matches!(-result, libc::EAGAIN | libc::EINTR) => {
                self.queue(id);
                return None;
            }
            (_, Err(_)) => {
                finished.result =
                    Err(if -result == libc::ENOSPC { IoError::NoSpace } else { IoError::Io(-result) });
            }
            (Kind::Sync(_), Ok(_)) => {}
            // Nothing more comes: the medium is shorter than it was.
            (Kind::Transfer(_), Ok(0)) => finished.result = Err(IoError::Io(libc::EIO)),
            (Kind::Transfer(direction), Ok(n)) => {
                if n < part.left && !active(Sabotage::TakeShortForWhole) {
                    // A short transfer: go on where it stopped.
                    part.left -= n;
                    part.offset += n;
                    iov::advance(&mut part.iov, &mut part.at, usize::try_from(n).unwrap_or(usize::MAX));
                    self.queue(id);
                    return None;
                }
                finished.result = finish_transfer(part, direction);
                finished.written = if direction == Direction::Write { part.total } else { 0 };
            }
        }
        for list in [&mut part.iov, &mut part.copy_to] {
            list.clear();
            list.shrink_to(KEPT_IOV);
        }
        let bounce = part.bounce.take();
        self.spare.extend(bounce.filter(|buffer| buffer.len() == BOUNCE && self.spare.len() < KEPT_BOUNCES));
        self.free.push(id);
        Some(finished)
    }
}

/// The best ring that the kernel makes, and whether it does not run yet and can be restricted.
fn build() -> io::Result<(IoUring, bool)> {
    let mut best = IoUring::builder();
    best.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_cqsize(4 * ENTRIES);
    let mut good = IoUring::builder();
    good.setup_coop_taskrun().setup_taskrun_flag().setup_cqsize(4 * ENTRIES);
    let mut plain = IoUring::builder();
    for builder in [&mut best, &mut good, &mut plain] {
        builder.setup_r_disabled();
    }
    let ring = best
        .build(ENTRIES)
        .or_else(|_| good.build(ENTRIES))
        .or_else(|_| plain.build(ENTRIES))
        .map(|ring| (ring, true));
    ring.or_else(|_| {
        // Before 5.10, or not enough of something; then this fails as well.
        let ring = IoUring::new(ENTRIES)?;
        unrestricted(&io::ErrorKind::Unsupported.into());
        Ok((ring, false))
    })
}

fn unrestricted(error: &io::Error) {
    static LOGGED: Once = Once::new();
    LOGGED.call_once(|| tracing::warn!(%error, "this kernel cannot restrict what an io_uring does"));
}

/// Allows what this file queues and nothing else, for ever, and lets the ring run. Every entry must name a file of the ring's
/// table, which cannot be changed any more.
fn restrict(ring: &IoUring) -> io::Result<()> {
    const OPERATIONS: [u8; 5] = [
        opcode::Read::CODE,
        opcode::Readv::CODE,
        opcode::Write::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
    ];
    let required = [Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits())];
    let mut allowed: Vec<_> = OPERATIONS.into_iter().map(Restriction::sqe_op).chain(required).collect();
    let submitter = ring.submitter();
    if let Err(error) = submitter.register_restrictions(&mut allowed) {
        unrestricted(&error);
    }
    submitter.register_enable_rings()
}

/// Replaces the part's buffers by an aligned one of its own.
fn bounce(
    part: &mut Part,
    spare: &mut Vec<AlignedBuf>,
    target: Target,
    direction: Direction,
) -> Result<(), IoError> {
    let align = target.offset_align;
    let start = part.offset & !(align - 1);
    let end = (part.offset + part.left).next_multiple_of(align);
    let is_whole = start == part.offset && end == part.offset + part.left;
    if direction == Direction::Write && !is_whole {
        // Less than the medium's sector: would have to read and write back what others may be writing.
        return Err(IoError::OutOfRange);
    }
    // Both are bounded by the request's length, which fits in memory.
    let len = usize::try_from(end - start).map_err(|_| IoError::OutOfRange)?;
    part.skip = usize::try_from(part.offset - start).map_err(|_| IoError::OutOfRange)?;
    let buffer = if len <= BOUNCE {
        spare.pop().unwrap_or_else(|| AlignedBuf::zeroed(BOUNCE))
    } else {
        AlignedBuf::zeroed(len)
    };
    if direction == Direction::Write {
        let mut at = buffer.as_mut_ptr();
        for piece in &part.iov {
            // SAFETY: the caller of `Lane::write` keeps the guest's buffers readable; the bounce buffer is at
            // least as long as their sum, and no slice of it exists.
            unsafe {
                std::ptr::copy(piece.iov_base.cast::<u8>(), at, piece.iov_len);
                at = at.add(piece.iov_len);
            }
        }
    }
    std::mem::swap(&mut part.copy_to, &mut part.iov);
    part.iov.clear();
    part.iov.push(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: len });
    part.bounce = Some(buffer);
    part.offset = start;
    part.left = end - start;
    Ok(())
}

/// After the last byte: a bounced read is copied to where it was wanted.
fn finish_transfer(part: &Part, direction: Direction) -> Result<(), IoError> {
    let (Direction::Read, Some(buffer), false) = (direction, &part.bounce, part.copy_to.is_empty()) else {
        return Ok(());
    };
    let mut from = part.skip;
    for piece in &part.copy_to {
        if from + piece.iov_len > buffer.len() {
            return Err(IoError::Io(libc::EIO));
        }
        // SAFETY: the range was just checked to lie in the bounce buffer; the caller of `Lane::read` keeps the
        // guest's buffers writable until the request is reported, which is after this.
        unsafe { std::ptr::copy(buffer.as_mut_ptr().add(from), piece.iov_base.cast::<u8>(), piece.iov_len) };
        from += piece.iov_len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    const LEN: usize = 64 << 10;

    fn ring(file: &std::fs::File, align: u32) -> (Ring, std::os::fd::OwnedFd) {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let target = RingTarget { fd: file.as_fd(), data: true, memory_align: align, offset_align: align };
        (Ring::new([None, Some(target)], event.as_raw_fd()).unwrap(), event)
    }

    fn finish(ring: &mut Ring, parts: u32) -> Vec<Finished> {
        let mut finished = Vec::new();
        ring.submit();
        while finished.len() < parts as usize {
            assert!(ring.wait());
            ring.reap(|part| finished.push(part));
        }
        assert_eq!(ring.in_flight(), 0);
        finished
    }

    fn iov(memory: &mut [u8], piece: usize) -> Vec<libc::iovec> {
        let pieces = memory.chunks_mut(piece);
        pieces
            .map(|piece| libc::iovec { iov_base: piece.as_mut_ptr().cast(), iov_len: piece.len() })
            .collect()
    }

    fn transfer(
        ring: &mut Ring,
        offset: u64,
        direction: Direction,
        buffers: &[libc::iovec],
    ) -> Vec<Finished> {
        let len = iov::total_len(buffers).unwrap();
        let mut parts = 0;
        let place = (MediumKind::Ssd, offset, len);
        ring.transfer(5, place, direction, &mut iov::Cursor::new(buffers), &mut parts).unwrap();
        finish(ring, parts)
    }

    /// The kernel may do less than it was asked for; here it is asked for less than what is left, which looks
    /// the same.
    #[test]
    fn short_transfers_are_continued() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let (mut ring, _event) = ring(&file, 1);
        for longest in [1, 700, 4096, 5000] {
            ring.longest = Some(longest);
            let len = if longest == 1 { 300 } else { LEN };
            let pattern: Vec<u8> = (0..len).map(|i| u8::try_from((i + 3) % 253).unwrap()).collect();
            let mut memory = pattern.clone();
            let written = transfer(&mut ring, 77, Direction::Write, &iov(&mut memory, 1000));
            assert!(written.iter().all(|part| part.result == Ok(()) && part.request == 5));
            assert_eq!(written.iter().map(|part| part.written).sum::<u64>(), len as u64);
            let mut memory = vec![0; len];
            let read = transfer(&mut ring, 77, Direction::Read, &iov(&mut memory, 900));
            assert!(read.iter().all(|part| part.result == Ok(())));
            assert!(memory == pattern, "at most {longest} bytes at a time");
        }
    }

    /// Eight transfers, of which one completion, each in turn, reports something else than it did.
    #[test]
    fn failed_and_short_completions_concern_their_request_alone() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let (mut ring, _event) = ring(&file, 1);
        let mut failures = 0;
        for direction in [Direction::Write, Direction::Read] {
            for nth in 0..8 {
                let errors = [libc::EIO, libc::ENOSPC, libc::ENOMEM, libc::EAGAIN, libc::EINTR].map(|e| -e);
                for reported in errors.into_iter().chain([0, 1, 513, 4095]) {
                    let byte = u8::try_from(reported.unsigned_abs() % 97).unwrap() + 1;
                    file.write_all_at(&[byte; 8 * 4096], 0).unwrap();
                    let fill = if direction == Direction::Write { byte + 1 } else { 0 };
                    let mut memory = vec![vec![fill; 4096]; 8];
                    let mut parts = 0;
                    for (i, buffer) in (0u32..).zip(&mut memory) {
                        let buffers = iov(buffer, 1000);
                        let place = (MediumKind::Ssd, u64::from(i) * 4096, 4096);
                        let cursor = &mut iov::Cursor::new(&buffers);
                        ring.transfer(i, place, direction, cursor, &mut parts).unwrap();
                    }
                    ring.results = std::iter::repeat_n(None, nth).chain([Some(reported)]).collect();
                    let finished = finish(&mut ring, parts);
                    assert!(ring.results.is_empty());
                    let failed: Vec<_> = finished.iter().filter(|part| part.result.is_err()).collect();
                    let expected = match -reported {
                        libc::ENOSPC => Some(IoError::NoSpace),
                        libc::EIO | libc::ENOMEM => Some(IoError::Io(-reported)),
                        // Nothing came and nothing will.
                        0 => Some(IoError::Io(libc::EIO)),
                        // Done over, or gone on with.
                        _ => None,
                    };
                    let seen: Vec<_> = failed.iter().map(|part| part.result.unwrap_err()).collect();
                    assert_eq!(seen, Vec::from_iter(expected), "{reported} as completion {nth}");
                    failures += 1;
                    let now = if direction == Direction::Write { byte + 1 } else { byte };
                    let mut held = vec![0; 8 * 4096];
                    file.read_exact_at(&mut held, 0).unwrap();
                    for part in finished.iter().filter(|part| part.result.is_ok()) {
                        let i = part.request as usize;
                        assert!(held[i * 4096..(i + 1) * 4096].iter().all(|&byte| byte == now));
                        assert!(memory[i].iter().all(|&byte| byte == now), "{reported} as completion {nth}");
                        assert_eq!(part.written, if direction == Direction::Write { 4096 } else { 0 });
                    }
                }
            }
        }
        println!("{failures} failed or short completions");
    }

    #[test]
    fn refused_submission_is_made_good_at_the_next_look() {
        let file = tempfile::tempfile().unwrap();
        let (mut ring, _event) = ring(&file, 1);
        let mut memory = vec![3; 4096];
        let buffers = iov(&mut memory, 4096);
        let mut parts = 0;
        ring.refusals = 3;
        let place = (MediumKind::Ssd, 0, 4096);
        ring.transfer(1, place, Direction::Write, &mut iov::Cursor::new(&buffers), &mut parts).unwrap();
        let mut finished = Vec::new();
        for _ in 0..3 {
            ring.submit();
            assert!(ring.is_stuck());
        }
        ring.reap(|part| finished.push(part));
        assert!(!ring.is_stuck());
        while finished.is_empty() {
            assert!(ring.wait());
            ring.reap(|part| finished.push(part));
        }
        assert_eq!((finished[0].result, finished[0].written), (Ok(()), 4096));
    }

    #[test]
    fn more_buffers_and_parts_than_the_kernel_takes_at_once_go_in_turns() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        let (mut ring, _event) = ring(&file, 1);
        let mut memory: Vec<u8> = (0..LEN).map(|i| u8::try_from(i % 249).unwrap()).collect();
        let expected = memory.clone();
        assert!(transfer(&mut ring, 0, Direction::Write, &iov(&mut memory, 16)).len() > 1);
        let mut parts = 0;
        let mut copies: Vec<Vec<u8>> = (0..2000).map(|_| vec![0; 32]).collect();
        for (i, copy) in (0u64..).zip(&mut copies) {
            let buffers = iov(copy, 32);
            let mut cursor = iov::Cursor::new(&buffers);
            ring.transfer(1, (MediumKind::Ssd, i * 32, 32), Direction::Read, &mut cursor, &mut parts)
                .unwrap();
        }
        assert_eq!(finish(&mut ring, parts).len(), 2000);
        assert!(copies.concat() == expected[..2000 * 32]);
    }

    #[test]
    fn unaligned_reads_go_around_and_unaligned_writes_are_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        // As on a medium with sectors of 4 KiB.
        let (mut ring, _event) = ring(&file, 4096);
        let mut memory: Vec<u8> = (0..8192).map(|i| u8::try_from(i % 249).unwrap()).collect();
        let expected = memory.clone();
        let written = transfer(&mut ring, 4096, Direction::Write, &iov(&mut memory, 100));
        assert!(written.iter().all(|part| part.result == Ok(())));
        let mut memory = vec![0; 3000];
        transfer(&mut ring, 4096 + 1536, Direction::Read, &iov(&mut memory, 700));
        assert!(memory == expected[1536..4536]);
        let buffers = iov(&mut memory, 3000);
        let mut parts = 0;
        let place = (MediumKind::Ssd, 512, 3000);
        let refused = ring.transfer(5, place, Direction::Write, &mut iov::Cursor::new(&buffers), &mut parts);
        assert_eq!((refused, parts), (Err(IoError::OutOfRange), 0));
    }

    #[test]
    fn reading_past_the_end_of_a_truncated_file_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let (mut ring, _event) = ring(&file, 1);
        let mut memory = vec![0; 4096];
        let read = transfer(&mut ring, 2048, Direction::Read, &iov(&mut memory, 4096));
        assert_eq!(read[0].result, Err(IoError::Io(libc::EIO)));
    }

    /// Not for kernels before 5.10, on which a ring cannot be restricted.
    #[test]
    fn ring_does_nothing_but_transfers_and_syncs_of_its_media() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let (mut ring, _event) = ring(&file, 1);
        let mut memory = vec![5; 512];
        let done = transfer(&mut ring, 0, Direction::Write, &iov(&mut memory, 512));
        assert_eq!(done[0].result, Ok(()));
        let own = types::Fixed(0);
        let other = types::Fd(file.as_raw_fd());
        let at = memory.as_mut_ptr();
        let root = c"/".as_ptr();
        let forbidden = [
            ("nop", opcode::Nop::new().build()),
            ("open", opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), root).flags(libc::O_RDONLY).build()),
            ("socket", opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build()),
            ("close", opcode::Close::new(other).build()),
            ("another file", opcode::Read::new(other, at, 512).build()),
            ("allocate", opcode::Fallocate::new(own, 4096).build()),
            ("linked", opcode::Read::new(own, at, 512).build().flags(squeue::Flags::IO_LINK)),
            ("receive", opcode::Recv::new(own, at, 512).build()),
        ];
        let count = forbidden.len();
        for (what, entry) in forbidden {
            // SAFETY: should the entry be carried out after all, its memory lives until the completion is seen here.
            unsafe { ring.ring.submission().push(&entry).unwrap() };
            ring.ring.submit_and_wait(1).unwrap();
            let result = ring.ring.completion().next().unwrap().result();
            assert_eq!(result, -libc::EACCES, "{what}");
        }
        let submitter = ring.ring.submitter();
        let registrations = [
            ("files", submitter.register_files_update(0, &[file.as_raw_fd()]).map(drop)),
            ("no files", submitter.unregister_files()),
            ("personality", submitter.register_personality().map(drop)),
            ("restrictions", submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::Nop::CODE)])),
        ];
        for (what, result) in registrations {
            let error = result.unwrap_err().raw_os_error().unwrap();
            assert!([libc::EACCES, libc::EBADFD].contains(&error), "{what}: {error}");
        }
        println!("{count} operations and 4 registrations are refused");
        let done = transfer(&mut ring, 0, Direction::Read, &iov(&mut memory, 512));
        assert_eq!(done[0].result, Ok(()));
    }

    #[test]
    fn failed_sync_is_reported_as_a_sync() {
        let file = tempfile::tempfile().unwrap();
        let (mut good, _event) = ring(&file, 1);
        good.sync(MediumKind::Ssd, 42);
        let synced = finish(&mut good, 1);
        assert_eq!((synced[0].synced, synced[0].result), (Some(42), Ok(())));
        // A pipe cannot be flushed.
        let (_read, write) = std::io::pipe().unwrap();
        let (mut bad, _event) = ring(&std::fs::File::from(std::os::fd::OwnedFd::from(write)), 1);
        bad.sync(MediumKind::Ssd, 42);
        let synced = finish(&mut bad, 1);
        assert_eq!((synced[0].synced, synced[0].result), (Some(42), Err(IoError::Io(libc::EINVAL))));
    }
}
