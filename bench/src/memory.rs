// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How fast this machine copies memory: what bounds requests on NV-RAM.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::mm::{Advice, madvise};

use crate::client::Kind;
use crate::peer::Pages;

/// As much as a steady case's disk.
const DISK: usize = 1 << 30;
/// A huge page.
const HUGE: usize = 2 << 20;
/// As many as a client has requests in flight.
const BUFFERS: usize = 16;

/// Copies like those of a backend: between random places of a large area and a few small buffers.
#[derive(Debug)]
pub struct Copies {
    kind: Kind,
    block: usize,
    disk: Vec<u8>,
    buffers: Vec<u8>,
    rng: StdRng,
}

impl Copies {
    pub fn new(kind: Kind, block: usize, pages: Pages) -> Self {
        let mut disk: Vec<u8> = Vec::with_capacity(DISK);
        if pages == Pages::Huge {
            let start = disk.as_ptr().align_offset(HUGE);
            let from = disk.as_mut_ptr().wrapping_add(start);
            // SAFETY: advice on memory that the vector owns.
            let _ = unsafe { madvise(from.cast(), DISK - start, Advice::LinuxHugepage) };
        }
        // Not zero: such pages might all be one.
        disk.resize(DISK, 1);
        Self { kind, block, disk, buffers: vec![2; BUFFERS * block], rng: StdRng::seed_from_u64(1) }
    }

    /// Bytes a second on the calling thread.
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    pub fn bandwidth(&mut self, measured: Duration) -> f64 {
        let (start, mut bytes) = (Instant::now(), 0);
        while start.elapsed() < measured {
            for buffer in self.buffers.chunks_exact_mut(self.block) {
                let at = self.rng.random_range(0..DISK / self.block) * self.block;
                let place = &mut self.disk[at..at + self.block];
                match self.kind {
                    Kind::Read => buffer.copy_from_slice(place),
                    _ => place.copy_from_slice(buffer),
                }
                bytes += self.block;
            }
        }
        std::hint::black_box((&self.disk, &self.buffers));
        bytes as f64 / start.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copying_moves_bytes_at_some_rate() {
        let mut copies = Copies::new(Kind::Read, 128 << 10, Pages::Huge);
        assert!(copies.bandwidth(Duration::from_millis(20)) > 1e7);
        assert!(copies.buffers.iter().all(|byte| *byte == 1), "the disk's content is in the buffers");
    }
}
