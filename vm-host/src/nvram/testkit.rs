// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A medium that loses power, for tests: it can stop after any number of operations, and shows everything that a cut
//! may have left.
//!
//! Of what was written since the last barrier each atom (512 bytes, say) may have arrived or not, whatever became of
//! the others. A process that is killed leaves all of it, but not yet durable: [`Sim::restart`].

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::place::{Device, Place, Progress};
use super::store::{Store, out_of_bounds};
use super::table::Entry;

/// What outlives power: the bytes of a device (or of a registry's file), and files by name with their length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) bytes: Vec<u8>,
    pub(super) files: BTreeMap<String, u64>,
}

#[derive(Clone, Debug)]
enum Op {
    Write { offset: usize, bytes: Vec<u8> },
    File { name: String, len: Option<u64> },
}

impl Op {
    fn apply(&self, image: &mut Image) {
        match self {
            Self::Write { offset, bytes } => {
                image.bytes[*offset..*offset + bytes.len()].copy_from_slice(bytes);
            }
            Self::File { name, len: Some(len) } => drop(image.files.insert(name.clone(), *len)),
            Self::File { name, len: None } => drop(image.files.remove(name)),
        }
    }

    /// The pieces that arrive alone.
    fn pieces(&self, atom: usize) -> Vec<Self> {
        let Self::Write { offset, bytes } = self else { return vec![self.clone()] };
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let end = ((offset + at) / atom * atom + atom - offset).min(bytes.len());
            pieces.push(Self::Write { offset: offset + at, bytes: bytes[at..end].to_vec() });
            at = end;
        }
        pieces
    }
}

#[derive(Debug, Default)]
struct State {
    durable: Image,
    pending: Vec<Op>,
    /// What processes see: the durable image with all that is pending.
    seen: Image,
    /// Operations until the power goes.
    left: Option<usize>,
    operations: usize,
}

#[derive(Clone, Debug)]
pub(super) struct Sim(Arc<Mutex<State>>);

impl Sim {
    pub(super) fn new(image: Image) -> Self {
        let state = State { durable: image.clone(), seen: image, ..State::default() };
        Self(Arc::new(Mutex::new(state)))
    }

    pub(super) fn blank(bytes: u64) -> Self {
        let bytes = vec![0; usize::try_from(bytes).unwrap()];
        Self::new(Image { bytes, files: BTreeMap::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// After so many operations from now on the power goes: the one in progress may happen in part, later ones not at all.
    pub(super) fn cut_after(&self, operations: usize) {
        self.lock().left = Some(operations);
    }

    /// The process has died and a new one begins, on power that never failed: what was not durable still is not.
    pub(super) fn restart(&self) {
        self.lock().left = None;
    }

    pub(super) fn is_off(&self) -> bool {
        self.lock().left == Some(0)
    }

    pub(super) fn operations(&self) -> usize {
        self.lock().operations
    }

    pub(super) fn seen(&self) -> Image {
        self.lock().seen.clone()
    }

    /// What a power cut now may leave: everything, where that is few; else all prefixes, all suffixes, nothing, and
    /// some by lot.
    pub(super) fn cuts(&self, atom: usize) -> Vec<Image> {
        let state = self.lock();
        let pieces: Vec<Op> = state.pending.iter().flat_map(|op| op.pieces(atom)).collect();
        let n = pieces.len();
        let choices: Vec<Vec<bool>> = if n <= 6 {
            (0..1usize << n).map(|mask| (0..n).map(|i| mask >> i & 1 == 1).collect()).collect()
        } else {
            let mut lot = StdRng::seed_from_u64(n as u64);
            let step = n.div_ceil(8);
            (0..=n)
                .step_by(step)
                .flat_map(|k| [(0..n).map(|i| i < k).collect(), (0..n).map(|i| i >= k).collect()])
                .chain((0..16).map(|_| (0..n).map(|_| lot.random()).collect()))
                .collect()
        };
        choices
            .into_iter()
            .map(|arrived| {
                let mut image = state.durable.clone();
                pieces.iter().zip(arrived).filter(|(_, here)| *here).for_each(|(op, _)| op.apply(&mut image));
                image
            })
            .collect()
    }

    fn spend(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        match &mut state.left {
            Some(0) => return Err(io::ErrorKind::BrokenPipe.into()),
            Some(left) => *left -= 1,
            None => {}
        }
        state.operations += 1;
        Ok(state)
    }

    fn push(&self, op: Op) -> io::Result<()> {
        let mut state = self.spend()?;
        op.apply(&mut state.seen);
        state.pending.push(op);
        // Of the last operation nobody hears that it was done.
        if state.left == Some(0) { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    pub(super) fn set_file(&self, name: String, len: Option<u64>) -> io::Result<()> {
        self.push(Op::File { name, len })
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        let mut state = self.spend()?;
        // A barrier in which the power goes has not happened.
        if state.left == Some(0) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let State { durable, pending, .. } = &mut *state;
        pending.drain(..).for_each(|op| op.apply(durable));
        Ok(())
    }

    pub(super) fn store(&self, start: u64, len: u64) -> Box<dyn Store> {
        Box::new(SimStore { sim: self.clone(), start, len })
    }
}

#[derive(Debug)]
struct SimStore {
    sim: Sim,
    start: u64,
    len: u64,
}

impl SimStore {
    fn at(&self, offset: u64, n: usize) -> io::Result<usize> {
        if offset + n as u64 > self.len {
            return Err(out_of_bounds());
        }
        Ok(usize::try_from(self.start + offset).unwrap())
    }
}

impl Store for SimStore {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let at = self.at(offset, buf.len())?;
        buf.copy_from_slice(&self.sim.lock().seen.bytes[at..at + buf.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let offset = self.at(offset, bytes.len())?;
        self.sim.push(Op::Write { offset, bytes: bytes.to_vec() })
    }

    fn sync(&self) -> io::Result<()> {
        self.sim.sync()
    }
}

impl Device for Sim {
    fn window(&self, offset: u64, len: u64) -> io::Result<Box<dyn Store>> {
        Ok(self.store(offset, len))
    }

    fn flush(&self, _offset: u64, _len: u64) -> io::Result<()> {
        self.sync()
    }
}

/// Regions as files of a directory, of which only the lengths are kept.
#[derive(Debug)]
pub(super) struct SimDirectory(pub(super) Sim);

impl Place for SimDirectory {
    fn make(&self, entry: &Entry, progress: Progress<'_>) -> io::Result<()> {
        if self.0.seen().files.contains_key(&entry.file_name()) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        for len in [0, entry.bytes / 2, entry.bytes] {
            self.0.set_file(entry.file_name(), Some(len))?;
        }
        progress(entry.bytes, entry.bytes)?;
        self.0.sync()
    }

    fn unmake(&self, entry: &Entry) -> io::Result<()> {
        self.0.set_file(entry.file_name(), None)?;
        self.0.sync()
    }

    fn check(&self, entry: &Entry) -> io::Result<Option<String>> {
        let found = self.0.seen().files.get(&entry.file_name()).copied();
        Ok((found != Some(entry.bytes)).then(|| format!("{found:?}")))
    }

    fn open(&self, _entry: &Entry) -> io::Result<Box<dyn Store>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&self, _entry: &Entry) -> io::Result<()> {
        Ok(())
    }

    fn free(&self) -> io::Result<Option<u64>> {
        Ok(Some(1 << 40))
    }
}
