// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What tests write: contents that say which block of which disk they are, so that a byte in the wrong place is noticed.

/// Fills `block` with what block `index` holds under `seed`. Never all zero.
pub fn fill(block: &mut [u8], seed: u64, index: u64) {
    let mut word = splitmix(seed ^ splitmix(index)) | 1;
    for bytes in block.chunks_mut(8) {
        bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
}

/// What a block was found to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// What was written.
    Intact,
    Zero,
    /// Neither: lost, torn or somebody else's.
    Wrong,
}

/// Judges a block that should hold what [`fill`] writes.
pub fn judge(block: &[u8], seed: u64, index: u64) -> Found {
    if block.iter().all(|byte| *byte == 0) {
        return Found::Zero;
    }
    let mut word = splitmix(seed ^ splitmix(index)) | 1;
    for bytes in block.chunks(8) {
        if bytes != &word.to_le_bytes()[..bytes.len()] {
            return Found::Wrong;
        }
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
    Found::Intact
}

/// The mixing function of the SplitMix64 generator.
fn splitmix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_told_from_its_neighbour_from_another_disk_and_from_a_torn_one() {
        let mut block = vec![0; 4096];
        assert_eq!(judge(&block, 1, 7), Found::Zero);
        fill(&mut block, 1, 7);
        assert_eq!(judge(&block, 1, 7), Found::Intact);
        assert_eq!(judge(&block, 1, 8), Found::Wrong);
        assert_eq!(judge(&block, 2, 7), Found::Wrong);
        block[2048..].fill(0);
        assert_eq!(judge(&block, 1, 7), Found::Wrong);
    }
}
