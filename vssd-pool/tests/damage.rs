// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Damaged media: a clear error or recovery from the other copy, never a guess and never a panic.

// A panic is how a test reports; sizes are small.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::sync::Arc;

use common::*;
use proptest::prelude::*;
use vssd_pool::store::fault::Sim;
use vssd_pool::{CheckReport, Error, MediumKind, Pool, Severity};

const B: u64 = 4096;
const SUPERBLOCK_COPIES: [usize; 2] = [0, 512 << 10];

type Images = Vec<(MediumKind, Vec<u8>)>;

fn check(images: &Images) -> vssd_pool::Result<CheckReport> {
    Pool::check_on(Sim::with_images(images.clone()).stores(), true)
}

fn open(images: &Images) -> vssd_pool::Result<Arc<Pool>> {
    Pool::open_on(&open_options(false), Sim::with_images(images.clone()).stores())
}

/// A pool that has seen some use and was then left without being closed: `blocks` blocks of vSSD "a" hold their
/// number plus one.
fn used_pool(media: &[(MediumKind, usize)], blocks: u32, flushes: usize) -> Images {
    let sim = Sim::new(media);
    Pool::create_on(&create_options(), &sim.stores()).unwrap();
    let pool = Pool::open_on(&open_options(false), sim.stores()).unwrap();
    let vssd = pool.create_vssd(&spec("a", blocks, blocks)).unwrap();
    let mut io = Io::new(&pool);
    for block in 0..blocks {
        io.fill(&vssd, u64::from(block) * B, B, u8::try_from(block % 255).unwrap() + 1).unwrap();
    }
    for _ in 0..flushes {
        io.discard(&vssd, 0, B).unwrap();
        io.flush(&vssd).unwrap();
        io.fill(&vssd, 0, B, 1).unwrap();
        io.flush(&vssd).unwrap();
    }
    io.flush(&vssd).unwrap();
    std::mem::forget((io, pool));
    sim.images()
}

fn expect_contents(pool: &Arc<Pool>, blocks: u32) {
    let vssd = pool.vssd_by_name("a").unwrap();
    let mut io = Io::new(pool);
    for block in 0..blocks {
        let byte = u8::try_from(block % 255).unwrap() + 1;
        assert!(
            io.read_vec(&vssd, u64::from(block) * B, B).unwrap() == vec![byte; B as usize],
            "block {block}"
        );
    }
}

/// Where pages with this magic begin, and the 64-bit number at `at` of each.
fn pages(image: &[u8], magic: &[u8], at: usize) -> Vec<(usize, u64)> {
    (0..image.len() / 4096)
        .map(|page| page * 4096)
        .filter(|&page| image[page..].starts_with(magic))
        .map(|page| (page, u64::from_le_bytes(image[page + at..page + at + 8].try_into().unwrap())))
        .collect()
}

fn small() -> Vec<(MediumKind, usize)> {
    vec![(MediumKind::Nvram, 2 << 20)]
}

#[test]
fn one_damaged_superblock_is_repaired_and_two_are_an_error() {
    let images = used_pool(&small(), 8, 1);
    for copy in SUPERBLOCK_COPIES {
        let mut images = images.clone();
        images[0].1[copy + 40] ^= 1;
        let report = check(&images).unwrap();
        assert!(report.findings.iter().all(|finding| finding.severity == Severity::Repairable));
        assert_eq!(report.findings.len(), 1);
        let sim = Sim::with_images(images);
        let pool = Pool::open_on(&open_options(false), sim.stores()).unwrap();
        expect_contents(&pool, 8);
        drop(pool);
        assert!(check(&sim.images()).unwrap().is_clean(), "opening repaired the copy");
    }
    let mut images = images;
    SUPERBLOCK_COPIES.iter().for_each(|&copy| images[0].1[copy] ^= 1);
    assert_eq!(open(&images).unwrap_err().code(), "E_MEDIUM");
    assert_eq!(check(&images).unwrap_err().code(), "E_MEDIUM");
}

#[test]
fn damaged_newest_checkpoint_is_replaced_by_the_older_and_the_journal() {
    // Some of these numbers of commits lie right before, some right after a checkpoint, and the longer runs
    // have gone round the journal.
    for flushes in [1, 5, 8, 9, 20, 33, 34, 35, 36, 60] {
        let mut images = used_pool(&small(), 8, flushes);
        let newest = *pages(&images[0].1, b"vSSDckpt", 32).iter().max_by_key(|(_, number)| *number).unwrap();
        images[0].1[newest.0 + 4096 + 5] ^= 0x40;
        let report = check(&images).unwrap();
        assert!(!report.is_clean());
        let pool = open(&images).unwrap_or_else(|error| panic!("{flushes} flushes: {error}"));
        expect_contents(&pool, 8);
    }
}

#[test]
fn damaged_journal_before_a_later_commit_is_an_error_and_not_skipped() {
    let images = used_pool(&small(), 8, 3);
    let mut journal = pages(&images[0].1, b"VJPG", 8);
    journal.sort_by_key(|&(_, number)| number);
    let needed = pages(&images[0].1, b"vSSDckpt", 40).iter().map(|&(_, begin)| begin).max().unwrap();
    let mut refused = 0;
    for &(page, number) in &journal {
        let mut images = images.clone();
        images[0].1[page + 64] ^= 0x40;
        let is_last = journal.last().unwrap().1 == number;
        match open(&images) {
            Err(Error::Damaged { .. }) => refused += 1,
            Err(error) => panic!("page {number}: {error}"),
            Ok(_) => assert!(number < needed || is_last, "page {number} of {journal:?} was needed"),
        }
    }
    assert!(refused >= 3, "{refused}");
}

/// A power cut within a commit of several pages leaves later ones without the first. After recovery those must not
/// come back to life as successors of the page that is then written in the first one's place.
#[test]
fn pages_of_a_commit_cut_short_never_come_back() {
    const BLOCKS: u32 = 600;
    let sim = Sim::with_images(used_pool(&[(MediumKind::Nvram, 4 << 20)], BLOCKS, 0));
    let pool = Pool::open_on(&open_options(false), sim.stores()).unwrap();
    let vssd = pool.vssd_by_name("a").unwrap();
    let mut io = Io::new(&pool);
    // As one batch, for each batch writes its records: the flush then makes them durable in one commit.
    io.lane.begin_batch();
    for block in 0..u64::from(BLOCKS) {
        io.discard(&vssd, block * B, B).unwrap();
    }
    io.lane.end_batch();
    io.flush(&vssd).unwrap();
    std::mem::forget((io, pool));
    let mut images = sim.images();
    let journal = pages(&images[0].1, b"VJPG", 8);
    let groups = pages(&images[0].1, b"VJPG", 16);
    let last_group = groups.iter().map(|&(_, group)| group).max().unwrap();
    assert!(groups.iter().filter(|&&(_, group)| group == last_group).count() >= 4, "{groups:?}");
    let first = journal.iter().find(|&&(_, number)| number == last_group).unwrap().0;
    images[0].1[first..first + 4096].fill(0);
    assert!(check(&images).unwrap().is_clean(), "a torn commit is no damage");

    let sim = Sim::with_images(images);
    let pool = Pool::open_on(&open_options(false), sim.stores()).unwrap();
    expect_contents(&pool, BLOCKS);
    let vssd = pool.vssd_by_name("a").unwrap();
    let mut io = Io::new(&pool);
    // One page is written: not so many that they would overwrite all of the torn commit anyway.
    io.discard(&vssd, u64::from(BLOCKS - 1) * B, B).unwrap();
    io.flush(&vssd).unwrap();
    std::mem::forget((io, pool));
    assert!(check(&sim.images()).unwrap().is_clean());
    let pool = open(&sim.images()).unwrap();
    expect_contents(&pool, BLOCKS - 1);
    assert_eq!(pool.vssd_by_name("a").unwrap().allocated_blocks(), BLOCKS - 1);
}

#[test]
fn truncated_missing_and_foreign_media_are_named() {
    let both = [(MediumKind::Nvram, 2 << 20), (MediumKind::Ssd, 2 << 20)];
    let images = used_pool(&both, 8, 1);
    let other = used_pool(&both, 8, 1);
    open(&images).unwrap();
    for medium in 0..2 {
        for len in [0, 4095, 4096, 1 << 20, (2 << 20) - 4096] {
            let mut images = images.clone();
            images[medium].1.truncate(len);
            let error = open(&images).unwrap_err();
            assert!(matches!(error.code(), "E_MEDIUM"), "{len}: {error}");
            assert!(check(&images).is_err());
        }
        let mut mixed = images.clone();
        mixed[medium] = other[medium].clone();
        assert_eq!(open(&mixed).unwrap_err().code(), "E_MEDIUM");
        let mut one = images.clone();
        one.remove(medium);
        assert_eq!(open(&one).unwrap_err().code(), "E_NOT_FOUND");
        let mut swapped = images.clone();
        swapped[medium].0 = both[1 - medium].0;
        assert!(open(&swapped).is_err());
    }
    assert_eq!(open(&Vec::new()).unwrap_err().code(), "E_INVALID");
}

fn used_once() -> &'static Images {
    static IMAGES: std::sync::OnceLock<Images> = std::sync::OnceLock::new();
    IMAGES.get_or_init(|| used_pool(&small(), 16, 12))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Random bytes anywhere in the metadata: opening and checking return, and what opens holds the data or says
    /// in the check that something was wrong.
    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((0usize..1_500_000, 1u8..), 1..30)) {
        let mut images = used_once().clone();
        for &(at, bits) in &flips {
            // Half of them right at the start of a page, where the headers are.
            let at = if bits % 2 == 0 { at / 4096 * 4096 + at % 64 } else { at };
            images[0].1[at] ^= bits;
        }
        let report = check(&images);
        match (open(&images), report) {
            (Ok(pool), Ok(report)) => {
                prop_assert!(report.findings.iter().all(|finding| finding.severity == Severity::Repairable));
                drop(pool.vssds());
            }
            (Ok(_), Err(error)) => prop_assert!(false, "opened although the check says {error}"),
            (Err(_), Err(_)) => {}
            (Err(error), Ok(report)) => prop_assert!(!report.is_clean(), "clean, but {error}"),
        }
    }

    /// Garbage behind a valid checksum cannot be had by accident, but a superblock can be forged.
    #[test]
    fn arbitrary_pages_never_panic(page in prop::collection::vec(any::<u8>(), 4096), at in 0usize..366) {
        let mut images = used_once().clone();
        images[0].1[at * 4096..(at + 1) * 4096].copy_from_slice(&page);
        let _ = check(&images);
        let _ = open(&images);
    }
}
