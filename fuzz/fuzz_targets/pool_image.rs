// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A pool's medium: superblocks, checkpoints, journal, as somebody may have left them.
//!
//! The input is a list of changes to a sound image; checksums are made right afterwards, so that what lies behind them is reached.
//! Oracles: no panic, no hang, bounded memory; a pool that opens can be read, and once closed is clean.

#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has failed")]

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

use crc_fast::{CrcAlgorithm, checksum};
use libfuzzer_sys::fuzz_target;
use vssd_fuzz::watched::Watched;
use vssd_fuzz::{BLOCK, Input, medium, open, setup, vssd};
use vssd_pool::store::Store;
use vssd_pool::{BlockRange, MediumKind, Pool, Severity};

const PAGE: usize = 4096;
/// Few: a vSSD in an image may claim to be 4096 times as large as its pool, and then each of its blocks is looked at.
const BLOCKS: usize = 16;

struct Image {
    bytes: Vec<u8>,
    /// Pages that hold metadata: where changes go.
    pages: Vec<usize>,
}

/// What is kept from one input to the next, since most of it stays as it is.
struct Kept {
    /// The image with the changes of an input.
    bytes: Vec<u8>,
    store: Arc<Watched>,
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap_or(usize::MAX)
}

/// A pool with a checkpoint and a journal that is longer than that.
fn image() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let store = medium(BLOCKS);
        let pool = open(Arc::clone(&store) as Arc<dyn Store>, false).unwrap();
        let (one, _two) = (vssd(&pool, "one", 8), vssd(&pool, "two", 4));
        pool.checkpoint().unwrap();
        let mut lane = pool.lane().unwrap();
        lane.begin_batch();
        let _ = lane.discard(&one, 0, u64::from(BLOCK), 1);
        lane.end_batch();
        pool.unplug_wait(one.id(), vec![BlockRange::new(1, 2)]).unwrap();
        pool.plug_wait(one.id(), vec![BlockRange::new(5, 2)], 8).unwrap();
        let _three = vssd(&pool, "three", 2);
        pool.run_background();
        let mut bytes = vec![0; usize::try_from(store.size()).unwrap()];
        store.read_at(0, &mut bytes).unwrap();
        let blocks_at = u64_at(&bytes, 96);
        let pages = (0..blocks_at / PAGE)
            .filter(|page| bytes[page * PAGE..][..PAGE].iter().any(|byte| *byte != 0))
            .collect();
        Image { bytes, pages }
    })
}

/// Makes a medium of the image and the input's changes.
fn changed(image: &Image, mut input: Input<'_>, kept: &mut Kept) {
    for page in &image.pages {
        let page = page * PAGE..(page + 1) * PAGE;
        kept.bytes[page.clone()].copy_from_slice(&image.bytes[page]);
    }
    let keep_sums = input.u8() & 7 == 7;
    while !input.is_empty() {
        let page = image.pages[usize::from(input.u8()) % image.pages.len()];
        let at = page * PAGE + usize::from(input.u16()) % PAGE;
        let len = (usize::from(input.u8() & 15) + 1).min((page + 1) * PAGE - at);
        let new = input.bytes(len);
        kept.bytes[at..at + new.len()].copy_from_slice(new);
        if page == 0 {
            // The copy of the superblock, or one would stand in for the other.
            let copy = at + (512 << 10);
            kept.bytes[copy..copy + new.len()].copy_from_slice(new);
        }
    }
    if !keep_sums {
        seal(&mut kept.bytes, &image.pages);
    }
    kept.store.restore(&image.bytes);
    for page in &image.pages {
        kept.store.write_at((page * PAGE) as u64, &kept.bytes[page * PAGE..][..PAGE]).unwrap();
    }
}

/// Makes every checksum right that can be found.
fn seal(bytes: &mut [u8], pages: &[usize]) {
    let crc = |bytes: &[u8]| u32::try_from(checksum(CrcAlgorithm::Crc32Iscsi, bytes)).unwrap();
    for page in pages {
        let at = page * PAGE;
        let (head, field, covered) = match &bytes[at..at + 8] {
            b"vSSDpool" => (at, 12, PAGE),
            b"vSSDckpt" => {
                let len = u64_at(bytes, at + 48);
                if let Some(body) = (at + PAGE).checked_add(len).and_then(|end| bytes.get(at + PAGE..end)) {
                    let body = crc(body);
                    bytes[at + 12..at + 16].copy_from_slice(&body.to_le_bytes());
                }
                (at, 8, PAGE)
            }
            magic if magic.starts_with(b"VJPG") => {
                let used = u32::from_le_bytes(bytes[at + 40..at + 44].try_into().unwrap()) as usize;
                (at, 4, (64 + used).min(PAGE))
            }
            _ => continue,
        };
        bytes[head + field..head + field + 4].fill(0);
        let sum = crc(&bytes[head..head + covered]);
        bytes[head + field..head + field + 4].copy_from_slice(&sum.to_le_bytes());
    }
}

fuzz_target!(|data: &[u8]| {
    setup();
    let image = image();
    thread_local!(static KEPT: RefCell<Kept> = {
        let bytes = self::image().bytes.clone();
        let store = Watched::new(MediumKind::Nvram, &bytes);
        RefCell::new(Kept { bytes, store: Arc::new(store) })
    });
    let store = KEPT.with_borrow_mut(|kept| {
        changed(image, Input(data), kept);
        Arc::clone(&kept.store)
    });
    let stores = || vec![Arc::clone(&store) as Arc<dyn Store>];
    let checked = Pool::check_on(stores(), false);

    let Ok(pool) = open(Arc::clone(&store) as Arc<dyn Store>, false) else { return };
    assert!(checked.is_ok(), "opens, but cannot be checked: {checked:?}");
    let info = pool.info();
    assert!(info.leased_blocks <= info.total_blocks);
    for vssd in pool.vssds() {
        assert!(vssd.plugged_blocks() <= vssd.total_blocks());
        let mut ranges = Vec::new();
        let _ = vssd.plugged_ranges(vssd_pool::BlockIndex(0), false, 4096, &mut ranges);
        let plugged: u32 = ranges.iter().map(|range| range.count).sum();
        assert_eq!(plugged, vssd.plugged_blocks(), "count and map differ");
    }
    pool.run_background();
    if pool.close().is_err() {
        return;
    }
    drop(pool);
    let report = Pool::check_on(stores(), false).expect("closed in peace, but cannot be checked");
    let errors: Vec<_> =
        report.findings.iter().filter(|finding| finding.severity == Severity::Fatal).collect();
    assert!(errors.is_empty(), "closed in peace, but: {errors:?}");
});
