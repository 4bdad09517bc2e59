// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block numbers drawn from a bell curve: a program in a guest reads them, and whoever started the guest knows which they were.
//!
//! The discrete normal distribution on the blocks of a disk: block `x` has the weight exp(-(x - mean)² / 2σ²), and what lies outside of the
//! disk is left out. It is made with additions and multiplications alone, for both sides must agree to the last bit, and guests
//! have no library of mathematical functions. What this does not know: disks, files, what is done to a block.

use anyhow::{Result, ensure};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// A bell curve over the blocks of a disk.
#[derive(Clone, Debug)]
pub struct Bell {
    /// Sum of the weights up to each block.
    cumulative: Vec<f64>,
}

impl Bell {
    /// For a disk of `blocks` blocks; all numbers in blocks. An error unless `sigma` is positive and the middle lies on the disk.
    pub fn new(blocks: u64, mean: u64, sigma: u32) -> Result<Self> {
        ensure!(mean < blocks, "the middle, {mean}, must be below the number of blocks, {blocks}");
        ensure!(sigma > 0, "the standard deviation must not be 0");
        let mut cumulative = vec![0.0; usize::try_from(blocks)?];
        let middle = usize::try_from(mean)?;
        let (below, above) = cumulative.split_at_mut(middle);
        for (place, weight) in above.iter_mut().zip(weights(sigma)) {
            *place = weight;
        }
        for (place, weight) in below.iter_mut().rev().zip(weights(sigma).skip(1)) {
            *place = weight;
        }
        let mut sum = 0.0;
        for weight in &mut cumulative {
            sum += *weight;
            *weight = sum;
        }
        Ok(Self { cumulative })
    }

    fn draw(&self, rng: &mut StdRng) -> u64 {
        let last = self.cumulative.len() - 1;
        let at = rng.random::<f64>() * self.cumulative[last];
        self.cumulative.partition_point(|sum| *sum <= at).min(last) as u64
    }

    /// `count` blocks, in the order in which they are drawn.
    pub fn draws(&self, seed: u64, count: u64) -> impl Iterator<Item = u64> {
        let mut rng = StdRng::seed_from_u64(seed);
        (0..count).map(move |_| self.draw(&mut rng))
    }

    /// `wanted` blocks, at random, of those that `count` draws do not touch.
    pub fn untouched(&self, seed: u64, count: u64, wanted: u64) -> Result<Vec<u64>> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut touched = vec![false; self.cumulative.len()];
        for _ in 0..count {
            touched[usize::try_from(self.draw(&mut rng))?] = true;
        }
        let mut rest: Vec<u64> =
            (0..).zip(&touched).filter(|(_, touched)| !**touched).map(|(block, _)| block).collect();
        ensure!(
            rest.len() as u64 >= wanted,
            "{count} draws leave {} blocks untouched, {wanted} are wanted: draw fewer",
            rest.len()
        );
        let (chosen, _) = rest.partial_shuffle(&mut rng, usize::try_from(wanted)?);
        Ok(chosen.to_vec())
    }
}

/// exp(-d²/2σ²) for d = 0, 1, 2, …: from one to the next it shrinks by a factor that shrinks by a constant one.
fn weights(sigma: u32) -> impl Iterator<Item = f64> {
    let square = f64::from(sigma) * f64::from(sigma);
    let unit = exp_of_minus(0.5 / square);
    let (mut weight, mut factor) = (1.0, unit);
    std::iter::repeat_with(move || {
        let now = weight;
        weight *= factor;
        factor *= unit * unit;
        now
    })
}

/// The series of exp(-x), for x up to 1.
fn exp_of_minus(x: f64) -> f64 {
    let (mut term, mut sum) = (1.0, 1.0);
    for k in 1..=25 {
        term *= -x / f64::from(k);
        sum += term;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_formula_far_out_too() {
        for sigma in [1, 10, 8192] {
            let square = 2.0 * f64::from(sigma) * f64::from(sigma);
            for (d, weight) in weights(sigma).enumerate().take(6 * sigma as usize) {
                let expected = (-((d * d) as f64) / square).exp();
                assert!((weight / expected - 1.0).abs() < 1e-5, "{d} of {sigma}: {weight}, not {expected}");
            }
        }
    }

    #[test]
    fn draws_have_mean_and_deviation_of_the_curve_and_repeat_with_their_seed() {
        let bell = Bell::new(65_536, 30_000, 4_000).unwrap();
        let draws: Vec<u64> = bell.draws(7, 100_000).collect();
        let mean = draws.iter().sum::<u64>() as f64 / 1e5;
        let variance = draws.iter().map(|x| (*x as f64 - mean).powi(2)).sum::<f64>() / 1e5;
        // Five standard errors: 4000 / sqrt(1e5) = 12.6, and 4000 / sqrt(2e5) = 8.9.
        assert!((mean - 30_000.0).abs() < 64.0, "{mean}");
        assert!((variance.sqrt() - 4_000.0).abs() < 45.0, "{}", variance.sqrt());
        assert!(bell.draws(7, 100_000).eq(draws.iter().copied()));
        assert!(!bell.draws(8, 100_000).eq(draws.iter().copied()));
    }

    #[test]
    fn what_lies_outside_of_the_disk_is_never_drawn() {
        let bell = Bell::new(10, 0, 1_000_000).unwrap();
        let mut seen = [0; 10];
        bell.draws(1, 10_000).for_each(|block| seen[usize::try_from(block).unwrap()] += 1);
        assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
        assert!(Bell::new(10, 10, 1).is_err() && Bell::new(10, 3, 0).is_err());
    }

    #[test]
    fn untouched_blocks_are_different_ones_that_the_draws_left_out() {
        let bell = Bell::new(1000, 400, 100).unwrap();
        let chosen = bell.untouched(3, 500, 200).unwrap();
        let mut unique = chosen.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!((chosen.len(), unique.len()), (200, 200));
        assert!(bell.draws(3, 500).all(|block| unique.binary_search(&block).is_err()));
        assert!(bell.untouched(3, 500, 990).is_err());
    }
}
