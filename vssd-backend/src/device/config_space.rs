// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The configuration space of the block device (`struct virtio_blk_config`, virtio 1.3, §5.2.4) and the features that
//! say which of its fields count. Pure.

use vssd_protocol::units::{BlockSize, ByteOffset, SECTOR_SIZE};

use super::request::{MAX_DISCARD_SECTORS, MAX_WRITE_ZEROES_SECTORS, SEG_MAX, SIZE_MAX};

/// Bytes of `struct virtio_blk_config` up to the write-zeroes fields. Front-ends ask for what their version knows, so
/// reads past it give zeroes.
const CONFIG_LEN: usize = 60;

pub const F_SIZE_MAX: u64 = 1 << 1;
pub const F_SEG_MAX: u64 = 1 << 2;
pub const F_RO: u64 = 1 << 5;
pub const F_BLK_SIZE: u64 = 1 << 6;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_TOPOLOGY: u64 = 1 << 10;
pub const F_MQ: u64 = 1 << 12;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// What the configuration space is made of.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    pub block_size: BlockSize,
    pub logical_block_size: u32,
    pub queues: u16,
    pub read_only: bool,
}

impl Geometry {
    /// Features of the block device (§5.2.3).
    pub fn features(&self) -> u64 {
        let common = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ;
        if self.read_only { common | F_RO } else { common | F_DISCARD | F_WRITE_ZEROES }
    }

    /// The configuration space for a device of `capacity` bytes.
    fn bytes(&self, capacity: ByteOffset) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        // Fits: at most 2 MiB / 512.
        let block_sectors = u32::try_from(self.block_size.bytes() / SECTOR_SIZE).unwrap_or(u32::MAX);
        put(0, &(capacity.0 / SECTOR_SIZE).to_le_bytes());
        // 128 is QEMU's default queue size; header and status take a descriptor each.
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &self.logical_block_size.to_le_bytes());
        // Topology: physical blocks of 4 KiB whatever the logical size, and whole blocks as the best I/O size.
        let physical = 4096u32.max(self.logical_block_size);
        put(24, &[u8::try_from((physical / self.logical_block_size).ilog2()).unwrap_or(0)]);
        let physical_units = u16::try_from(physical / self.logical_block_size).unwrap_or(1);
        put(26, &physical_units.to_le_bytes());
        put(28, &(block_sectors * 512 / self.logical_block_size).to_le_bytes());
        // Flushes work, so the cache is write-back.
        put(32, &[1]);
        put(34, &self.queues.to_le_bytes());
        // A discard takes effect on whole blocks only.
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &block_sectors.to_le_bytes());
        put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        config
    }

    /// `len` bytes from `offset` on; what is past the fields we know reads as zero.
    pub fn read(&self, capacity: ByteOffset, offset: usize, len: usize) -> Vec<u8> {
        let config = self.bytes(capacity);
        (offset..offset.saturating_add(len)).map(|at| config.get(at).copied().unwrap_or(0)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let geometry =
            Geometry { block_size: BlockSize::DEFAULT, logical_block_size: 512, queues: 4, read_only: false };
        let config = geometry.read(ByteOffset(1 << 30), 0, 64);
        let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 1 << 21);
        assert_eq!((u32_at(8), u32_at(12)), (64 << 10, 126), "size_max and seg_max");
        assert_eq!(u32_at(20), 512, "blk_size");
        assert_eq!(config[24], 3, "physical_block_exp");
        assert_eq!(u32_at(28), 128, "opt_io_size");
        assert_eq!(u16::from_le_bytes([config[34], config[35]]), 4, "num_queues");
        assert_eq!(u32_at(40), 1, "max_discard_seg");
        assert_eq!(u32_at(44), 128, "discard_sector_alignment");
        assert_eq!(u32_at(52), 1, "max_write_zeroes_seg");
        assert_eq!(config[56], 1, "write_zeroes_may_unmap");
        assert_eq!(&config[60..], [0; 4], "past the end");
        assert_eq!(geometry.read(ByteOffset(0), usize::MAX, 4), [0; 0], "no overflow");
    }
}
