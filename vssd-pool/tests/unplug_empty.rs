// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Taking only blocks that hold no data, while somebody may be writing to them.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{Io, MIB, mem_pool, spec};
use vssd_pool::{BlockRange, IoError, MediumKind, Pool, RangeStatus, VssdId};

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
    const ROUNDS: u8 = 40;
    let (pool, _stores) = mem_pool(&[(MediumKind::Nvram, 16 * MIB)], true);
    let vssd = pool.create_vssd(&spec("a", BLOCKS, BLOCKS)).expect("create");
    let (under_way, stop) = (AtomicBool::new(false), AtomicBool::new(false));
    let (written, taken) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut io = Io::new(&pool);
            let mut total = 0;
            while !under_way.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            for round in 1..=ROUNDS {
                let mut written = Vec::new();
                for block in (0..BLOCKS).rev() {
                    match io.fill(&vssd, u64::from(block) * BLOCK, BLOCK, round) {
                        Ok(()) => written.push(block),
                        Err(error) => assert_eq!(error, IoError::Evicted),
                    }
                }
                for block in &written {
                    let offset = u64::from(*block) * BLOCK;
                    let data = io.read_vec(&vssd, offset, BLOCK);
                    let shown = data.as_ref().map(|data| data[0]);
                    assert!(data == Ok(vec![round; 4096]), "block {block} in round {round}: {shown:?}");
                    io.discard(&vssd, offset, BLOCK).expect("discard");
                }
                total += written.len();
            }
            stop.store(true, Ordering::Release);
            total
        });
        let mut taken = 0;
        let end = Instant::now() + Duration::from_secs(60);
        while !stop.load(Ordering::Acquire) && !writer.is_finished() {
            assert!(Instant::now() < end, "the writer hangs");
            // Every block but the first is wanted, one by one, from the end where the writer begins.
            let ranges = (1..BLOCKS).rev().map(|block| BlockRange::new(block, 1)).collect();
            let statuses = unplug_empty(&pool, vssd.id(), ranges);
            taken += statuses.iter().filter(|status| **status == RangeStatus::Ok).count();
            under_way.store(true, Ordering::Release);
            let back = (1..BLOCKS).map(|block| BlockRange::new(block, 1)).collect();
            pool.plug_wait(vssd.id(), back, BLOCKS).expect("plug");
        }
        (writer.join().expect("writer"), taken)
    });
    assert!(taken > 0 && written > 0, "taken {taken}, written {written}");
}
