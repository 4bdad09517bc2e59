// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A workload that knows what each object must be: gets and puts, some objects far more often than others.
//!
//! Objects come from their key and version, so that what a get gives is judged without keeping a copy.

use std::error::Error;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::cache::SlotCache;

/// One step in so many changes an object.
const CHANGES: u32 = 16;
const ZIPF: f64 = 0.9;
/// As many parts has 1.
const PART: usize = 1 << 20;

/// How often objects are asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Law {
    /// The n-th in inverse proportion to n to the power of 0.9.
    Zipf,
    /// Most often those in the middle; nearly all within a quarter of them to either side.
    Gaussian,
}

#[derive(Debug)]
pub(crate) struct Workload {
    law: Law,
    /// For the first law: the share of all objects up to each.
    shares: Vec<f64>,
    versions: Vec<u32>,
    most: usize,
    random: StdRng,
    expected: Vec<u8>,
}

impl Workload {
    /// On `objects` objects of up to half of `slot_len` bytes.
    pub(crate) fn new(law: Law, objects: u64, slot_len: usize, seed: u64) -> Result<Self, Box<dyn Error>> {
        let count = usize::try_from(objects)?;
        if count == 0 {
            return Err("no objects".into());
        }
        let mut shares = Vec::with_capacity(count);
        let mut sum = 0.0;
        for rank in 1..=count {
            sum += (rank as f64).powf(-ZIPF);
            shares.push(sum);
        }
        shares.iter_mut().for_each(|share| *share /= sum);
        Ok(Self {
            law,
            shares,
            versions: vec![0; count],
            most: slot_len / 2,
            random: StdRng::seed_from_u64(seed),
            expected: Vec::new(),
        })
    }

    /// One get, with a put after a miss, or a change of an object.
    pub(crate) fn step(&mut self, cache: &mut SlotCache) -> Result<(), Box<dyn Error>> {
        let index = self.draw();
        let key = index as u64;
        if self.random.random_range(0..CHANGES) == 0 {
            self.versions[index] += 1;
            self.make(key, self.versions[index]);
            return Ok(cache.put(key, &self.expected)?);
        }
        self.make(key, self.versions[index]);
        match cache.get(key)? {
            Some(found) if found == self.expected => Ok(()),
            Some(_) => Err(format!("object {key} is not as it was put").into()),
            None => Ok(cache.put(key, &self.expected)?),
        }
    }

    fn draw(&mut self) -> usize {
        let count = self.versions.len();
        let index = match self.law {
            Law::Zipf => {
                let point: f64 = self.random.random();
                self.shares.partition_point(|share| *share < point)
            }
            Law::Gaussian => {
                // The sum of twelve numbers below 1 has a variance of 1, and a mean of 6.
                let sum: usize = (0..12).map(|_| self.random.random_range(0..PART)).sum();
                sum.saturating_sub(2 * PART) * count / (8 * PART)
            }
        };
        index.min(count - 1)
    }

    /// The object of `key` in its version `version`, into `expected`.
    fn make(&mut self, key: u64, version: u32) {
        let mut state = mix(key ^ (u64::from(version) << 40));
        let len = 1 + usize::try_from(state >> 8).unwrap_or_default() % self.most;
        self.expected.clear();
        while self.expected.len() < len {
            state = mix(state);
            self.expected.extend_from_slice(&state.to_le_bytes());
        }
        self.expected.truncate(len);
    }
}

/// `SplitMix64`.
fn mix(state: u64) -> u64 {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}
