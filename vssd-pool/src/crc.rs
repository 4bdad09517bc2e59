// SPDX-License-Identifier: Apache-2.0 OR MIT

//! CRC-32C, the checksum of everything the pool writes about itself.

use crc_fast::{CrcAlgorithm, Digest};

/// A checksum under way.
pub(crate) struct Crc(Digest);

impl Crc {
    pub(crate) fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(&self) -> u32 {
        // A 32-bit checksum in a u64.
        u32::try_from(self.0.finalize()).unwrap_or(0)
    }
}

pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.finish()
}

#[cfg(test)]
mod tests {
    #[test]
    fn checksum_is_castagnoli() {
        // The check value of RFC 3720, appendix B.4, and of the usual catalogue.
        assert_eq!(super::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(super::crc32c(&[0; 32]), 0x8a91_36aa);
    }
}
