// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Taking only blocks that hold no data, while somebody may be writing to them.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{Io, MIB, mem_pool, spec};
use vssd_pool::{BlockIndex, BlockRange, IoError, MediumKind, Pool, RangeStatus, VssdId};

const BLOCK: u64 = 4096;

fn unplug_empty(pool: &Arc<Pool>, id: VssdId, ranges: Vec<BlockRange>) -> Vec<RangeStatus> {
    let (sender, receiver) = mpsc::channel();
    pool.unplug_empty(id, ranges, Box::new(move |result| sender.send(result).expect("received")));
    receiver.recv_timeout(Duration::from_secs(20)).expect("ends").expect("no error")
}

#[test]
fn range_with_a_block_that_holds_data_stays_whole() {
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 8 * MIB)], true);
    let vssd = pool.create_vssd(&spec("a", 16, 16)).expect("create");
    let mut io = Io::new(&pool);
    io.fill(&vssd, 5 * BLOCK, BLOCK, 0x5a).expect("write");

    let ranges =
        vec![BlockRange::new(0, 4), BlockRange::new(4, 4), BlockRange::new(14, 2), BlockRange::new(0, 2)];
    let statuses = unplug_empty(&pool, vssd.id(), ranges);

    let expected = [RangeStatus::Ok, RangeStatus::Busy, RangeStatus::Ok, RangeStatus::Already];
    assert_eq!(statuses, expected);
    assert_eq!(vssd.plugged_blocks(), 10);
    assert_eq!(io.read_vec(&vssd, 5 * BLOCK, BLOCK), Ok(vec![0x5a; 4096]));
    assert_eq!(io.fill(&vssd, 4 * BLOCK, BLOCK, 1), Ok(()), "the fence is gone");
    io.discard(&vssd, 4 * BLOCK, 4 * BLOCK).expect("discard");
    assert_eq!(unplug_empty(&pool, vssd.id(), vec![BlockRange::new(4, 4)]), [RangeStatus::Ok]);
}

/// Writes race with unplugs of the same blocks: what was acknowledged is never lost.
#[test]
fn acknowledged_write_is_never_taken() {
    const BLOCKS: u32 = 512;
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 16 * MIB)], true);
    let vssd = pool.create_vssd(&spec("a", BLOCKS, BLOCKS)).expect("create");
    let stop = AtomicBool::new(false);
    let (written, taken) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut io = Io::new(&pool);
            let mut written = Vec::new();
            for block in (0..BLOCKS).rev() {
                match io.fill(&vssd, u64::from(block) * BLOCK, BLOCK, 0x5a) {
                    Ok(()) => written.push(block),
                    Err(error) => assert_eq!(error, IoError::Evicted),
                }
            }
            stop.store(true, Ordering::Release);
            written
        });
        let mut taken = 0;
        let end = Instant::now() + Duration::from_secs(20);
        while !stop.load(Ordering::Acquire) && Instant::now() < end {
            // Every block but the last is wanted, one by one, from the end where the writer is at work.
            let ranges = (1..BLOCKS).rev().map(|block| BlockRange::new(block, 1)).collect();
            let statuses = unplug_empty(&pool, vssd.id(), ranges);
            taken += statuses.iter().filter(|status| **status == RangeStatus::Ok).count();
            let back = (1..BLOCKS).map(|block| BlockRange::new(block, 1)).collect();
            pool.plug_wait(vssd.id(), back, BLOCKS).expect("plug");
        }
        (writer.join().expect("writer"), taken)
    });
    assert!(taken > 0 && !written.is_empty(), "taken {taken}, written {}", written.len());
    let mut io = Io::new(&pool);
    for block in written {
        assert!(vssd.is_plugged(BlockIndex(block)));
        let data = io.read_vec(&vssd, u64::from(block) * BLOCK, BLOCK);
        assert_eq!(data, Ok(vec![0x5a; 4096]), "block {block}");
    }
}
