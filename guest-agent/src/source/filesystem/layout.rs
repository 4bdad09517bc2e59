// SPDX-License-Identifier: Apache-2.0 OR MIT

//! From extents of the balloon file to blocks of the vSSD and back. Pure.

use vssd_protocol::units::BlockRange;

use super::ioctl::Extent;
use crate::blocks::BlockSet;

/// How a file system lies on its vSSD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Where the file system begins, in bytes.
    pub(crate) offset: u64,
    /// Where it ends.
    pub(crate) end: u64,
    /// How long each of an XFS's allocation groups is.
    pub(crate) group: Option<u64>,
    /// Of the vSSD's blocks.
    pub(crate) block_size: u64,
    pub(crate) total_blocks: u32,
    /// In which the file system allocates.
    pub(crate) grain: u64,
}

/// So much at either end of a file system is never given. XFS reads its last block at each mount, and whoever looks for
/// superblocks looks at both ends.
const EDGE: u64 = 1 << 20;
/// So much at the beginning of each allocation group neither: xfs_repair reads it at once, to be safe from large sectors.
const GROUP_HEAD: u64 = 512 << 10;

/// A stretch of the balloon file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) at: u64,
    pub(crate) len: u64,
}

/// The blocks that lie wholly in the file. Extents that touch count together, however the file is put together of them.
pub(crate) fn whole_blocks(extents: &[Extent], geometry: Geometry) -> BlockSet {
    let mut spans: Vec<(u64, u64)> = extents
        .iter()
        .filter(|extent| extent.is_idle)
        .filter_map(|extent| {
            let start = geometry.offset.checked_add(extent.physical)?;
            Some((start, start.checked_add(extent.len)?))
        })
        .collect();
    spans.sort_unstable();
    let mut set = BlockSet::new(geometry.total_blocks);
    let inner = geometry.offset.saturating_add(EDGE)..geometry.end.saturating_sub(EDGE);
    let mut add = |(start, end): (u64, u64)| {
        let (start, end) = (start.max(inner.start), end.min(inner.end));
        let (first, last) = (start.div_ceil(geometry.block_size), end / geometry.block_size);
        if let (Ok(first), Some(count)) = (u32::try_from(first), last.checked_sub(first)) {
            set.insert(BlockRange::new(first, u32::try_from(count).unwrap_or(u32::MAX)));
        }
    };
    let mut run: Option<(u64, u64)> = None;
    for (start, end) in spans {
        run = match run {
            Some((first, last)) if start <= last => Some((first, last.max(end))),
            other => {
                other.into_iter().for_each(&mut add);
                Some((start, end))
            }
        };
    }
    run.into_iter().for_each(add);
    set.without(&group_heads(geometry))
}

fn group_heads(geometry: Geometry) -> BlockSet {
    let Geometry { offset, end, block_size, total_blocks, group, .. } = geometry;
    let heads = group.filter(|len| *len > 0).into_iter().flat_map(|len| {
        let starts = (offset..end.min(u64::from(total_blocks) * block_size))
            .step_by(usize::try_from(len).unwrap_or(usize::MAX));
        starts.filter_map(|start| {
            let first = u32::try_from(start / block_size).ok()?;
            let last = u32::try_from((start + GROUP_HEAD - 1) / block_size).ok()?;
            Some(BlockRange::new(first, last - first + 1))
        })
    });
    BlockSet::of(total_blocks, heads)
}

/// What of the file holds no part of a block in `keep`, and can be given back to the file system.
pub(crate) fn surplus(extents: &[Extent], keep: &BlockSet, geometry: Geometry) -> Vec<Stretch> {
    let Geometry { offset, block_size, grain, .. } = geometry;
    let mut found: Vec<Stretch> = Vec::new();
    for extent in extents {
        let (start, end) = (offset + extent.physical, offset + extent.physical + extent.len);
        let mut at = start;
        while at < end {
            // A stretch of blocks that are all kept, or all not.
            let is_kept = |at: u64| u32::try_from(at / block_size).is_ok_and(|block| keep.contains(block));
            let kept = is_kept(at);
            let mut next = at;
            while next < end && is_kept(next) == kept {
                next = (next / block_size + 1) * block_size;
            }
            let next = next.min(end);
            if !kept {
                // Only whole grains can go, counted from where the extent begins.
                let from = (at - start).next_multiple_of(grain);
                let to = if next == end { extent.len } else { (next - start) / grain * grain };
                if from < to {
                    push(&mut found, Stretch { at: extent.logical + from, len: to - from });
                }
            }
            at = next;
        }
    }
    found
}

fn push(list: &mut Vec<Stretch>, stretch: Stretch) {
    match list.last_mut() {
        Some(last) if last.at + last.len == stretch.at => last.len += stretch.len,
        _ => list.push(stretch),
    }
}

/// Where in the file the next `want` bytes go: the first hole of that size, or the file's end.
pub(crate) fn hole(extents: &[Extent], want: u64) -> u64 {
    let mut at = 0;
    for extent in extents {
        if extent.logical.saturating_sub(at) >= want {
            return at;
        }
        at = extent.end();
    }
    at
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GRAIN: u64 = 4096;

    fn extent(logical: u64, physical: u64, len: u64) -> Extent {
        Extent { logical, physical, len, is_idle: true }
    }

    fn geometry(offset: u64, block_size: u64) -> Geometry {
        Geometry { offset, end: u64::MAX, group: None, block_size, total_blocks: 256, grain: GRAIN }
    }

    #[test]
    fn blocks_count_only_when_they_are_whole() {
        const AT: u64 = 2 << 20;
        let of = |extents: &[Extent]| whole_blocks(extents, geometry(0, 65536)).ranges().collect::<Vec<_>>();
        assert_eq!(of(&[extent(0, AT + 4096, 65536)]), []);
        assert_eq!(of(&[extent(0, AT, 65536)]), [BlockRange::new(32, 1)]);
        assert_eq!(of(&[extent(0, AT - 4096, 3 * 65536)]), [BlockRange::new(32, 2)]);
        // Halves that touch on the disk, in either order in the file.
        assert_eq!(of(&[extent(0, AT + 32768, 32768), extent(1 << 20, AT, 32768)]), [BlockRange::new(32, 1)]);
        let written = Extent { is_idle: false, ..extent(0, AT, 65536) };
        assert_eq!(of(&[written]), [], "what was written may be read");
        assert_eq!(of(&[extent(0, u64::MAX - 4096, 65536)]), [], "nonsense is left alone");
    }

    #[test]
    fn both_ends_of_a_file_system_stay() {
        let all = [extent(0, 0, 8 << 20)];
        for (offset, end, range) in [
            (0, 8 << 20, Some(BlockRange::new(16, 96))),
            (65536, 8 << 20, Some(BlockRange::new(17, 95))),
            (512, (8 << 20) - 512, Some(BlockRange::new(17, 94))),
            (0, EDGE, None),
            (0, 0, None),
        ] {
            let held = whole_blocks(&all, Geometry { end, ..geometry(offset, 65536) });
            assert_eq!(held.ranges().next(), range, "from {offset} to {end}");
        }
    }

    #[test]
    fn the_beginning_of_each_group_stays() {
        let geometry = Geometry { end: 9 << 20, group: Some((3 << 20) - 4096), ..geometry(0, 65536) };
        let held: Vec<_> = whole_blocks(&[extent(0, 0, 9 << 20)], geometry).ranges().collect();
        // Groups from 3 MiB - 4 KiB, 6 MiB - 8 KiB and 9 MiB - 12 KiB on; the last one lies in the edge.
        assert_eq!(held, [BlockRange::new(16, 31), BlockRange::new(56, 39), BlockRange::new(104, 24)]);
    }

    #[test]
    fn a_hole_is_used_before_the_end() {
        let extents = [extent(8192, 0, 4096), extent(20480, 0, 4096)];
        assert_eq!((hole(&extents, 8192), hole(&extents, 12288), hole(&[], 4096)), (0, 24576, 0));
    }

    /// Disjoint pieces of a disk, as a file's extents in some order.
    fn file() -> impl Strategy<Value = Vec<Extent>> {
        prop::collection::vec((0u64..6, 1u64..40, any::<bool>()), 0..12).prop_map(|pieces| {
            let (mut physical, mut logical, mut extents) = (EDGE - 8 * GRAIN, 0, Vec::new());
            for (gap, len, jump) in pieces {
                physical += gap * GRAIN;
                logical += u64::from(jump) * GRAIN;
                extents.push(extent(logical, physical, len * GRAIN));
                physical += len * GRAIN;
                logical += len * GRAIN;
            }
            extents
        })
    }

    proptest! {
        /// Against an oracle that looks at each grain by itself.
        #[test]
        fn what_is_kept_stays_whole_and_the_rest_goes(
            extents in file(), misaligned in any::<bool>(), kept in prop::collection::vec(any::<bool>(), 256)
        ) {
            // An old partition begins at sector 63.
            let geometry = geometry(if misaligned { 63 * 512 } else { 1 << 16 }, 16384);
            let held = whole_blocks(&extents, geometry);
            let keep = BlockSet::of(256, held.ranges()
                .flat_map(|range| range.start..range.start + range.count)
                .filter(|block| kept[*block as usize])
                .map(|block| BlockRange::new(block, 1)));
            let surplus = surplus(&extents, &keep, geometry);
            let goes = |at: u64| surplus.iter().any(|s| s.at <= at && at < s.at + s.len);
            prop_assert!(surplus.iter().all(|s| s.len > 0 && s.at % GRAIN == 0 && s.len % GRAIN == 0));
            for extent in &extents {
                for at in (0..extent.len).step_by(usize::try_from(GRAIN).unwrap()) {
                    let start = geometry.offset + extent.physical + at;
                    let mut blocks = start / geometry.block_size..=(start + GRAIN - 1) / geometry.block_size;
                    let needed = blocks.any(|block| u32::try_from(block).is_ok_and(|block| keep.contains(block)));
                    prop_assert_eq!(goes(extent.logical + at), !needed, "{:?} at {}", extent, at);
                }
            }
        }
    }
}
