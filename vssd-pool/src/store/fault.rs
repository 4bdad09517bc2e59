// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Media that fail, for tests: they remember every write and barrier, and can show what a power cut at any
//! moment might have left.
//!
//! Of what was written since a medium's last barrier, each write may have arrived or not, whole or in pieces
//! ([`Tear`]), whatever became of the others. That covers lost, torn and reordered writes.
//!
//! [`Sim::fail_at`] makes the n-th operation from now on fail, once. [`Sim::set_power`] takes the media away
//! altogether, which ends a pool on them without a trace, as the end of its process would.
//!
//! To look at many moments quickly, [`Replay::crash_into`] only rewrites those pages of a `Sim` that differ.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::{Store, out_of_bounds, within};
use crate::lock;
use crate::types::MediumKind;

/// Something that happened on a medium.
#[derive(Clone, Debug)]
enum Event {
    Write { medium: usize, offset: usize, bytes: Vec<u8> },
    Zero { medium: usize, offset: usize, len: usize },
    Sync { medium: usize },
}

#[derive(Debug, Default)]
struct State {
    images: Vec<Vec<u8>>,
    /// What was on the media when recording began, and what happened since.
    base: Vec<Vec<u8>>,
    log: Vec<Event>,
    is_recording: bool,
    /// The media claim to have flushed but did not.
    ignores_syncs: bool,
    fail_in: Option<(u64, Failure)>,
    operations: u64,
    is_off: bool,
    /// Pages that changed since a replay last looked.
    touched: Vec<Pages>,
}

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It does nothing and reports this errno.
    Errno(i32),
    /// Half of it happens, then it reports that no more came. A barrier does nothing.
    Short,
}

/// In which pieces an unflushed write may arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tear {
    /// Each write wholly or not at all.
    Whole,
    /// A page of an SSD, a cache line of NV-RAM.
    Coarse,
    /// A sector of an SSD, a word of NV-RAM.
    Fine,
}

impl Tear {
    fn atom(self, kind: MediumKind) -> usize {
        match (self, kind) {
            (Self::Whole, _) => usize::MAX,
            (Self::Coarse, MediumKind::Ssd) => 4096,
            (Self::Fine, MediumKind::Ssd) => 512,
            (Self::Coarse, MediumKind::Nvram) => 64,
            (Self::Fine, MediumKind::Nvram) => 8,
        }
    }
}

const PAGE: usize = 4096;

/// A set of pages of one medium that is cheap to go through.
#[derive(Clone, Debug, Default)]
struct Pages {
    seen: Vec<bool>,
    list: Vec<usize>,
}

impl Pages {
    fn add(&mut self, offset: usize, len: usize) {
        for page in offset / PAGE..(offset + len).div_ceil(PAGE) {
            if self.seen.len() <= page {
                self.seen.resize(page + 1, false);
            }
            if !std::mem::replace(&mut self.seen[page], true) {
                self.list.push(page);
            }
        }
    }

    fn drain(&mut self) -> Vec<usize> {
        for &page in &self.list {
            self.seen[page] = false;
        }
        std::mem::take(&mut self.list)
    }
}

/// Simulated media that share one timeline.
#[derive(Debug)]
pub struct Sim {
    kinds: Vec<MediumKind>,
    state: Mutex<State>,
}

impl Sim {
    /// Media of zero bytes.
    pub fn new(media: &[(MediumKind, usize)]) -> Arc<Self> {
        Self::with_images(media.iter().map(|&(kind, size)| (kind, vec![0; size])).collect())
    }

    /// Media with the given contents.
    pub fn with_images(media: Vec<(MediumKind, Vec<u8>)>) -> Arc<Self> {
        let (kinds, images): (Vec<_>, Vec<_>) = media.into_iter().unzip();
        let touched = vec![Pages::default(); images.len()];
        Arc::new(Self { kinds, state: Mutex::new(State { images, touched, ..State::default() }) })
    }

    /// The media as stores.
    pub fn stores(self: &Arc<Self>) -> Vec<Arc<dyn Store>> {
        (0..self.kinds.len())
            .map(|medium| {
                Arc::new(SimStore {
                    sim: Arc::clone(self),
                    medium,
                    path: PathBuf::from(format!("sim:{}", self.kinds[medium])),
                }) as Arc<dyn Store>
            })
            .collect()
    }

    /// What the media hold now.
    pub fn images(&self) -> Vec<(MediumKind, Vec<u8>)> {
        self.kinds.iter().copied().zip(lock(&self.state).images.iter().cloned()).collect()
    }

    /// From now on everything is remembered. What is on the media counts as durable.
    pub fn record(&self) {
        let mut state = lock(&self.state);
        state.base = state.images.clone();
        state.log.clear();
        state.is_recording = true;
    }

    /// How many events were recorded so far: the present moment of the timeline.
    pub fn now(&self) -> usize {
        lock(&self.state).log.len()
    }

    /// Makes barriers do nothing, as some drives do. For showing that a test would notice.
    pub fn ignore_syncs(&self) {
        lock(&self.state).ignores_syncs = true;
    }

    /// The `n`-th operation from now on (0 is the next) fails.
    pub fn fail_at(&self, n: u64, failure: Failure) {
        lock(&self.state).fail_in = Some((n, failure));
    }

    /// How many operations there were so far.
    pub fn operations(&self) -> u64 {
        lock(&self.state).operations
    }

    /// Without power every operation fails and nothing changes.
    pub fn set_power(&self, is_on: bool) {
        lock(&self.state).is_off = !is_on;
    }

    /// Whether an ordered failure is still to come.
    pub fn will_fail(&self) -> bool {
        lock(&self.state).fail_in.is_some()
    }

    /// Goes through the timeline.
    pub fn replay(&self) -> Replay {
        let state = lock(&self.state);
        Replay {
            kinds: self.kinds.clone(),
            durable: state.base.clone(),
            changed: vec![Pages::default(); self.kinds.len()],
            log: state.log.clone(),
            at: 0,
            pending: Vec::new(),
        }
    }

    /// `operation` is told how much of it happens.
    fn access(
        &self,
        medium: usize,
        offset: u64,
        len: usize,
        operation: impl FnOnce(&mut State, usize, usize),
    ) -> io::Result<()> {
        let mut state = lock(&self.state);
        if !within(offset, len as u64, state.images[medium].len() as u64) {
            return Err(out_of_bounds());
        }
        if state.is_off {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        state.operations += 1;
        let offset = usize::try_from(offset).map_err(|_| out_of_bounds())?;
        match state.fail_in {
            Some((0, failure)) => {
                state.fail_in = None;
                match failure {
                    Failure::Errno(errno) => Err(io::Error::from_raw_os_error(errno)),
                    Failure::Short => {
                        if len > 1 {
                            operation(&mut state, offset, len / 2);
                        }
                        Err(io::ErrorKind::UnexpectedEof.into())
                    }
                }
            }
            other => {
                state.fail_in = other.map(|(left, failure)| (left - 1, failure));
                operation(&mut state, offset, len);
                Ok(())
            }
        }
    }
}

impl State {
    fn log(&mut self, event: impl FnOnce() -> Event) {
        if self.is_recording {
            self.log.push(event());
        }
    }
}

/// One of a [`Sim`]'s media.
#[derive(Debug)]
struct SimStore {
    sim: Arc<Sim>,
    medium: usize,
    path: PathBuf,
}

impl Store for SimStore {
    fn kind(&self) -> MediumKind {
        self.sim.kinds[self.medium]
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn size(&self) -> u64 {
        lock(&self.sim.state).images[self.medium].len() as u64
    }

    fn is_fresh(&self) -> bool {
        lock(&self.sim.state).images[self.medium].iter().all(|&byte| byte == 0)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.sim.access(self.medium, offset, buf.len(), |state, at, len| {
            buf[..len].copy_from_slice(&state.images[self.medium][at..at + len]);
        })
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let align = u64::from(self.write_align());
        if !(offset | buf.len() as u64).is_multiple_of(align) {
            return Err(out_of_bounds());
        }
        // SAFETY: buf is buf.len() readable bytes.
        unsafe { self.copy_in(offset, buf.as_ptr(), buf.len()) }
    }

    fn write_align(&self) -> u32 {
        match self.kind() {
            MediumKind::Nvram => 64,
            MediumKind::Ssd => 4096,
        }
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let medium = self.medium;
        let len = usize::try_from(len).map_err(|_| out_of_bounds())?;
        self.sim.access(medium, offset, len, |state, offset, len| {
            state.images[medium][offset..offset + len].fill(0);
            state.touched[medium].add(offset, len);
            state.log(|| Event::Zero { medium, offset, len });
        })
    }

    fn sync(&self) -> io::Result<()> {
        let medium = self.medium;
        self.sim.access(medium, 0, 0, |state, _, _| {
            if !state.ignores_syncs {
                state.log(|| Event::Sync { medium });
            }
        })
    }

    fn sync_is_instant(&self) -> bool {
        true
    }

    unsafe fn copy_out(&self, offset: u64, to: *mut u8, len: usize) -> io::Result<()> {
        self.sim.access(self.medium, offset, len, |state, at, len| {
            // SAFETY: `access` checked the bounds of the image; the caller answers for `to`.
            unsafe { std::ptr::copy(state.images[self.medium][at..].as_ptr(), to, len) };
        })
    }

    unsafe fn copy_in(&self, offset: u64, from: *const u8, len: usize) -> io::Result<()> {
        let medium = self.medium;
        self.sim.access(medium, offset, len, |state, offset, len| {
            // SAFETY: `access` checked the bounds of the image; the caller answers for `from`.
            unsafe { std::ptr::copy(from, state.images[medium][offset..].as_mut_ptr(), len) };
            state.touched[medium].add(offset, len);
            if state.is_recording {
                let bytes = state.images[medium][offset..offset + len].to_vec();
                state.log.push(Event::Write { medium, offset, bytes });
            }
        })
    }

    fn bytes_written(&self) -> u64 {
        0
    }
}

/// A walk along the timeline of a [`Sim`].
#[derive(Debug)]
pub struct Replay {
    kinds: Vec<MediumKind>,
    /// What is there in any case.
    durable: Vec<Vec<u8>>,
    /// What of it changed since `crash_into` last looked.
    changed: Vec<Pages>,
    log: Vec<Event>,
    at: usize,
    /// Events that may or may not have reached the medium.
    pending: Vec<usize>,
}

impl Replay {
    /// Goes forward to the moment after `now` events.
    pub fn advance(&mut self, now: usize) {
        for at in self.at..now.min(self.log.len()) {
            if let Event::Sync { medium } = self.log[at] {
                let pending = std::mem::take(&mut self.pending);
                let (arrived, open): (Vec<_>, Vec<_>) =
                    pending.into_iter().partition(|&event| self.medium_of(event) == medium);
                self.pending = open;
                for event in arrived {
                    let event = &self.log[event];
                    apply(event, &mut self.durable, &mut self.changed, usize::MAX, &mut || true);
                }
            } else {
                self.pending.push(at);
            }
        }
        self.at = self.at.max(now.min(self.log.len()));
    }

    /// How many writes no barrier covers at this moment.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Whether the next event makes some of them durable, or there is none: every state that the moments before could
    /// have left is then among those of this one.
    pub fn is_before_barrier(&self) -> bool {
        matches!(self.log.get(self.at), None | Some(Event::Sync { .. }))
    }

    /// What a power cut at this moment may have left: of the pieces that no barrier covers, `arrives` decides for
    /// each, in the order of the writes.
    pub fn crash(&self, tear: Tear, arrives: impl FnMut() -> bool) -> Vec<(MediumKind, Vec<u8>)> {
        let mut images = self.durable.clone();
        self.apply_pending(&mut images, &mut vec![Pages::default(); self.kinds.len()], tear, arrives);
        self.kinds.iter().copied().zip(images).collect()
    }

    /// Makes of `sim` what [`Replay::crash`] describes. The same `sim` at each call; it was made from what the media held when
    /// recording began.
    pub fn crash_into(&mut self, sim: &Sim, tear: Tear, arrives: impl FnMut() -> bool) {
        let mut state = lock(&sim.state);
        let State { images, touched, log, is_recording, fail_in, is_off, .. } = &mut *state;
        log.clear();
        (*is_recording, *fail_in, *is_off) = (false, None, false);
        for (medium, (changed, touched)) in self.changed.iter_mut().zip(touched.iter_mut()).enumerate() {
            for page in changed.drain().into_iter().chain(touched.drain()) {
                let end = images[medium].len().min((page + 1) * PAGE);
                images[medium][page * PAGE..end].copy_from_slice(&self.durable[medium][page * PAGE..end]);
            }
        }
        self.apply_pending(images, touched, tear, arrives);
    }

    fn apply_pending(
        &self,
        images: &mut [Vec<u8>],
        touched: &mut [Pages],
        tear: Tear,
        mut arrives: impl FnMut() -> bool,
    ) {
        for &event in &self.pending {
            let atom = tear.atom(self.kinds[self.medium_of(event)]);
            apply(&self.log[event], images, touched, atom, &mut arrives);
        }
    }

    fn medium_of(&self, event: usize) -> usize {
        match self.log[event] {
            Event::Write { medium, .. } | Event::Zero { medium, .. } | Event::Sync { medium } => medium,
        }
    }
}

fn apply(
    event: &Event,
    images: &mut [Vec<u8>],
    touched: &mut [Pages],
    atom: usize,
    arrives: &mut impl FnMut() -> bool,
) {
    let (medium, offset, len) = match event {
        Event::Write { medium, offset, bytes } => (*medium, *offset, bytes.len()),
        Event::Zero { medium, offset, len } => (*medium, *offset, *len),
        Event::Sync { .. } => return,
    };
    touched[medium].add(offset, len);
    let mut at = 0;
    while at < len {
        // Up to the next boundary between atoms.
        let piece = (len - at).min(atom - (offset + at) % atom);
        if arrives() {
            let to = &mut images[medium][offset + at..offset + at + piece];
            match event {
                Event::Write { bytes, .. } => to.copy_from_slice(&bytes[at..at + piece]),
                _ => to.fill(0),
            }
        }
        at += piece;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unflushed_atoms_may_be_lost_one_by_one_and_flushed_ones_not() {
        let sim = Sim::new(&[(MediumKind::Ssd, 1 << 14)]);
        let store = &sim.stores()[0];
        sim.record();
        store.write_at(0, &[1; 4096]).unwrap();
        store.sync().unwrap();
        store.write_at(4096, &[2; 4096]).unwrap();
        store.zero(0, 512).unwrap();
        let mut replay = sim.replay();
        replay.advance(1);
        assert!(replay.crash(Tear::Fine, || false)[0].1.iter().all(|&byte| byte == 0));
        replay.advance(sim.now());
        let lost = &replay.crash(Tear::Fine, || false)[0].1;
        assert!(lost[..4096].iter().all(|&byte| byte == 1) && lost[4096..].iter().all(|&byte| byte == 0));
        let mut turn = 0;
        let torn = &replay.crash(Tear::Fine, || {
            turn += 1;
            turn % 2 == 0
        })[0]
            .1;
        for (i, atom) in torn[4096..8192].chunks(512).enumerate() {
            assert!(atom.iter().all(|&byte| byte == if i % 2 == 0 { 0 } else { 2 }), "atom {i}");
        }
        assert_eq!(torn[0], 1, "the ninth atom, the zeroes, was lost");
        assert_eq!(replay.crash(Tear::Fine, || true)[0].1, sim.images()[0].1);
    }

    #[test]
    fn ordered_operation_fails_once() {
        let sim = Sim::new(&[(MediumKind::Nvram, 4096)]);
        let store = &sim.stores()[0];
        sim.fail_at(1, Failure::Errno(libc::EIO));
        store.write_at(0, &[1; 64]).unwrap();
        assert_eq!(store.sync().unwrap_err().raw_os_error(), Some(libc::EIO));
        store.sync().unwrap();
        assert!(!sim.will_fail());
    }

    #[test]
    fn short_operation_does_half_of_it() {
        let sim = Sim::new(&[(MediumKind::Nvram, 4096)]);
        let store = &sim.stores()[0];
        sim.fail_at(0, Failure::Short);
        store.write_at(0, &[1; 128]).unwrap_err();
        let image = &sim.images()[0].1;
        assert!(image[..64].iter().all(|&byte| byte == 1) && image[64..].iter().all(|&byte| byte == 0));
        sim.set_power(false);
        store.write_at(0, &[2; 128]).unwrap_err();
        sim.set_power(true);
        assert_eq!(sim.images()[0].1[0], 1);
    }

    #[test]
    fn crashing_into_media_that_changed_shows_the_same_as_crashing_anew() {
        let sim = Sim::new(&[(MediumKind::Ssd, 1 << 15), (MediumKind::Nvram, 1 << 14)]);
        let stores = sim.stores();
        sim.record();
        let scratch = Sim::with_images(sim.images());
        for i in 0..24u8 {
            let (store, at) = (&stores[usize::from(i % 2)], u64::from(i / 2 % 4) * 4096);
            store.write_at(at, &[i + 1; 4096]).unwrap();
            if i % 5 == 4 {
                store.sync().unwrap();
            }
        }
        let mut replay = sim.replay();
        for moment in 0..=sim.now() {
            replay.advance(moment);
            for tear in [Tear::Whole, Tear::Coarse, Tear::Fine] {
                let pattern = |turn: &mut usize| {
                    *turn += 1;
                    turn.is_multiple_of(3)
                };
                let (mut one, mut other) = (0, 0);
                let expected = replay.crash(tear, || pattern(&mut one));
                replay.crash_into(&scratch, tear, || pattern(&mut other));
                assert!(scratch.images() == expected, "{tear:?} after {moment}");
                // What is done to them afterwards is gone the next time.
                scratch.stores()[1].zero(64, 64).unwrap();
            }
        }
    }
}
