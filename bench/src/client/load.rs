// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which requests a client makes.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Serialize;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Read,
    Write,
    /// Reads and writes; so many reads in a hundred.
    Mixed(u8),
    /// Each write is followed by a FLUSH and counts once that is answered.
    DurableWrite,
}

impl Kind {
    pub fn name(self) -> String {
        match self {
            Self::Read => "read".into(),
            Self::Write => "write".into(),
            Self::Mixed(reads) => format!("{reads} % read"),
            Self::DurableWrite => "write+flush".into(),
        }
    }
}

/// Where requests go.
#[derive(Clone, Debug)]
pub enum Addresses {
    /// Anywhere within the span.
    Random,
    /// One after the other, from the beginning again at the end of the span.
    Sequential,
    /// These, once.
    List(Arc<[u64]>),
}

/// The load on one session.
#[derive(Clone, Debug)]
pub struct Load {
    pub kind: Kind,
    /// Bytes of a request.
    pub block: usize,
    /// Requests in flight on each queue.
    pub depth: usize,
    pub queues: usize,
    /// Buffers that each queue's requests use in turn; at least one for each request in flight.
    pub buffers: usize,
    /// Bytes of the disk that are used, from its beginning.
    pub span: u64,
    pub addresses: Addresses,
}

impl Load {
    pub fn random(kind: Kind, block: usize, depth: usize, span: u64) -> Self {
        Self { kind, block, depth, queues: 1, buffers: depth, span, addresses: Addresses::Random }
    }

    /// Writes the whole span once, in order.
    pub fn fill(block: usize, depth: usize, span: u64) -> Self {
        let offsets = (0..span).step_by(block).collect();
        Self { addresses: Addresses::List(offsets), ..Self::random(Kind::Write, block, depth, span) }
    }
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub offset: u64,
    pub is_read: bool,
    pub flushed: bool,
}

/// Gives a queue its requests.
#[derive(Debug)]
pub(super) struct Source {
    kind: Kind,
    block: u64,
    blocks: u64,
    addresses: Addresses,
    /// Where the next request of a list or a sequence is, and how far the one after it.
    next: usize,
    step: usize,
    rng: StdRng,
}

impl Source {
    /// Queue `index` of `load`. The same one gives the same requests each time.
    pub(super) fn new(load: &Load, index: usize, seed: u64) -> Self {
        let block = load.block as u64;
        Self {
            kind: load.kind,
            block,
            blocks: (load.span / block).max(1),
            addresses: load.addresses.clone(),
            next: index,
            step: load.queues,
            rng: StdRng::seed_from_u64(seed.wrapping_mul(0x9e37_79b9).wrapping_add(index as u64)),
        }
    }

    /// The next request; `None` at the end of a list.
    pub(super) fn next(&mut self) -> Option<Request> {
        let at = self.next;
        let offset = match &self.addresses {
            Addresses::Random => self.rng.random_range(0..self.blocks) * self.block,
            Addresses::Sequential => {
                self.next += self.step;
                at as u64 % self.blocks * self.block
            }
            Addresses::List(offsets) => {
                self.next += self.step;
                *offsets.get(at)?
            }
        };
        let is_read = match self.kind {
            Kind::Read => true,
            Kind::Write | Kind::DurableWrite => false,
            Kind::Mixed(reads) => self.rng.random_range(0..100) < reads,
        };
        Some(Request { offset, is_read, flushed: self.kind == Kind::DurableWrite })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_queues_share_a_list_and_end_with_it() {
        let load = Load { queues: 2, ..Load::fill(4096, 1, 5 * 4096) };
        let mut offsets = Vec::new();
        for queue in 0..2 {
            let mut source = Source::new(&load, queue, 1);
            offsets.extend(std::iter::from_fn(|| source.next()).map(|request| request.offset / 4096));
        }
        assert_eq!(offsets, [0, 2, 4, 1, 3]);
    }

    #[test]
    fn random_requests_are_aligned_within_the_span_and_replay() {
        let load = Load::random(Kind::Mixed(70), 4096, 1, 1 << 20);
        let take = |seed| {
            let mut source = Source::new(&load, 0, seed);
            (0..1000).filter_map(|_| source.next()).collect::<Vec<_>>()
        };
        let requests = take(7);
        assert!(requests.iter().all(|r| r.offset % 4096 == 0 && r.offset < 1 << 20));
        let reads = requests.iter().filter(|r| r.is_read).count();
        assert!((600..800).contains(&reads), "{reads} reads in 1000");
        assert_eq!(requests, take(7));
        assert_ne!(requests, take(8));
    }
}
