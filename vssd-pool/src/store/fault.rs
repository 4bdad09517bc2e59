// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Media that fail, for tests: they remember every write and barrier, and can show what a power cut at any
//! moment might have left.
//!
//! Of what was written since a medium's last barrier, each atom (512 bytes of an SSD, 64 bytes of NV-RAM) of
//! each write may have arrived or not, independently. That covers lost, torn and reordered writes.
//!
//! [`Sim::fail_at`] makes the n-th operation from now on fail, once.

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
    fail_in: Option<(u64, i32)>,
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
        let (kinds, images) = media.into_iter().unzip();
        Arc::new(Self { kinds, state: Mutex::new(State { images, ..State::default() }) })
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

    /// The `n`-th operation from now on (0 is the next) fails with `errno`.
    pub fn fail_at(&self, n: u64, errno: i32) {
        lock(&self.state).fail_in = Some((n, errno));
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
            log: state.log.clone(),
            at: 0,
            pending: Vec::new(),
        }
    }

    fn access<T>(
        &self,
        medium: usize,
        offset: u64,
        len: usize,
        operation: impl FnOnce(&mut State, usize) -> T,
    ) -> io::Result<T> {
        let mut state = lock(&self.state);
        if !within(offset, len as u64, state.images[medium].len() as u64) {
            return Err(out_of_bounds());
        }
        if let Some((left, errno)) = state.fail_in {
            state.fail_in = left.checked_sub(1).map(|left| (left, errno));
            if left == 0 {
                return Err(io::Error::from_raw_os_error(errno));
            }
        }
        let offset = usize::try_from(offset).map_err(|_| out_of_bounds())?;
        Ok(operation(&mut state, offset))
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
        self.sim.access(self.medium, offset, buf.len(), |state, at| {
            buf.copy_from_slice(&state.images[self.medium][at..at + buf.len()]);
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
        self.sim.access(medium, offset, len, |state, offset| {
            state.images[medium][offset..offset + len].fill(0);
            state.log(|| Event::Zero { medium, offset, len });
        })
    }

    fn sync(&self) -> io::Result<()> {
        let medium = self.medium;
        self.sim.access(medium, 0, 0, |state, _| {
            if !state.ignores_syncs {
                state.log(|| Event::Sync { medium });
            }
        })
    }

    fn sync_is_instant(&self) -> bool {
        true
    }

    unsafe fn copy_out(&self, offset: u64, to: *mut u8, len: usize) -> io::Result<()> {
        self.sim.access(self.medium, offset, len, |state, at| {
            // SAFETY: `access` checked the bounds of the image; the caller answers for `to`.
            unsafe { std::ptr::copy(state.images[self.medium][at..].as_ptr(), to, len) };
        })
    }

    unsafe fn copy_in(&self, offset: u64, from: *const u8, len: usize) -> io::Result<()> {
        let medium = self.medium;
        self.sim.access(medium, offset, len, |state, offset| {
            // SAFETY: `access` checked the bounds of the image; the caller answers for `from`.
            unsafe { std::ptr::copy(from, state.images[medium][offset..].as_mut_ptr(), len) };
            let bytes = state.images[medium][offset..offset + len].to_vec();
            state.log(|| Event::Write { medium, offset, bytes });
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
                let (arrived, open) = pending.into_iter().partition(|&event| self.medium_of(event) == medium);
                self.pending = open;
                for event in Vec::<usize>::from_iter(arrived) {
                    apply(&self.log[event], &mut self.durable, usize::MAX, &mut || true);
                }
            } else {
                self.pending.push(at);
            }
        }
        self.at = self.at.max(now.min(self.log.len()));
    }

    /// What a power cut at this moment may have left: of the atoms that no barrier covers, `arrives` decides for
    /// each.
    pub fn crash(&self, mut arrives: impl FnMut() -> bool) -> Vec<(MediumKind, Vec<u8>)> {
        let mut images = self.durable.clone();
        for &event in &self.pending {
            let atom = match self.kinds[self.medium_of(event)] {
                MediumKind::Nvram => 64,
                MediumKind::Ssd => 512,
            };
            apply(&self.log[event], &mut images, atom, &mut arrives);
        }
        self.kinds.iter().copied().zip(images).collect()
    }

    fn medium_of(&self, event: usize) -> usize {
        match self.log[event] {
            Event::Write { medium, .. } | Event::Zero { medium, .. } | Event::Sync { medium } => medium,
        }
    }
}

fn apply(event: &Event, images: &mut [Vec<u8>], atom: usize, arrives: &mut impl FnMut() -> bool) {
    let (medium, offset, len) = match event {
        Event::Write { medium, offset, bytes } => (*medium, *offset, bytes.len()),
        Event::Zero { medium, offset, len } => (*medium, *offset, *len),
        Event::Sync { .. } => return,
    };
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
        assert!(replay.crash(|| false)[0].1.iter().all(|&byte| byte == 0));
        replay.advance(sim.now());
        let lost = &replay.crash(|| false)[0].1;
        assert!(lost[..4096].iter().all(|&byte| byte == 1) && lost[4096..].iter().all(|&byte| byte == 0));
        let mut turn = 0;
        let torn = &replay.crash(|| {
            turn += 1;
            turn % 2 == 0
        })[0]
            .1;
        for (i, atom) in torn[4096..8192].chunks(512).enumerate() {
            assert!(atom.iter().all(|&byte| byte == if i % 2 == 0 { 0 } else { 2 }), "atom {i}");
        }
        assert_eq!(torn[0], 1, "the ninth atom, the zeroes, was lost");
        assert_eq!(replay.crash(|| true)[0].1, sim.images()[0].1);
    }

    #[test]
    fn ordered_operation_fails_once() {
        let sim = Sim::new(&[(MediumKind::Nvram, 4096)]);
        let store = &sim.stores()[0];
        sim.fail_at(1, libc::EIO);
        store.write_at(0, &[1; 64]).unwrap();
        assert_eq!(store.sync().unwrap_err().raw_os_error(), Some(libc::EIO));
        store.sync().unwrap();
        assert!(!sim.will_fail());
    }
}
