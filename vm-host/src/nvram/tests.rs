// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Power cuts at every step, damage to every byte, and the allocator against a naive oracle.

use std::io;
use std::path::Path;

use proptest::prelude::*;

use super::error::{Error, Result};
use super::place::{Extents, Place, Progress};
use super::regions::Regions;
use super::registry::{self, Identity, REGISTRY_BYTES, crc32c};
use super::slot::{SLOT_HEADER_BYTES, SavedHeader, SavedState, Slot, SlotContent};
use super::store::Store;
use super::table::{Entry, Limits, Phase, Purpose, RegionId, Room, Span, Table};
use super::testkit::{Image, Sim, SimDirectory};

const UNIT: u64 = 4096;
const SPAN: Span = Span { start: REGISTRY_BYTES, end: REGISTRY_BYTES + 12 * UNIT };

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    Device,
}

fn path() -> &'static Path {
    Path::new("simulated")
}

fn identity(kind: Kind) -> Identity {
    let device = (kind == Kind::Device).then_some((SPAN.end, SPAN));
    Identity { name: "test".to_owned(), medium: [7; 16], device }
}

fn formatted(kind: Kind) -> Sim {
    let sim = Sim::blank(if kind == Kind::Device { SPAN.end } else { REGISTRY_BYTES });
    registry::format(&*sim.store(0, REGISTRY_BYTES), path(), &identity(kind)).unwrap();
    sim
}

/// With so many regions that the registry can be torn at a sector's boundary.
fn populated(kind: Kind) -> Sim {
    let sim = formatted(kind);
    let regions = open(&sim, kind).unwrap();
    for owner in ["d", "e"] {
        for purpose in Purpose::ALL {
            run(&regions, Step::Allocate(owner, purpose, 1)).unwrap();
        }
    }
    sim
}

fn open(sim: &Sim, kind: Kind) -> Result<Regions> {
    let place: Box<dyn Place> = match kind {
        Kind::Directory => Box::new(SimDirectory(sim.clone())),
        Kind::Device => Box::new(Extents { device: sim.clone() }),
    };
    Regions::open(path(), sim.store(0, REGISTRY_BYTES), place, Limits::default(), |_| Ok(()))
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Allocate(&'static str, Purpose, u64),
    Free(&'static str, Purpose),
}

const SCRIPT: &[Step] = &[
    Step::Allocate("a", Purpose::Memory, 2),
    Step::Allocate("a", Purpose::State, 1),
    Step::Allocate("b", Purpose::Memory, 3),
    Step::Free("a", Purpose::Memory),
    Step::Allocate("c", Purpose::Memory, 2),
    Step::Free("a", Purpose::State),
    Step::Free("b", Purpose::Memory),
    Step::Allocate("b", Purpose::Memory, 4),
];

/// Does a step, and then fills a new extent as its guest would.
fn run(regions: &Regions, step: Step) -> Result<()> {
    let find = |owner, purpose| {
        let all = regions.ready();
        all.into_iter().find(|e| e.owner == owner && e.purpose == purpose).unwrap().id
    };
    match step {
        Step::Allocate(owner, purpose, units) => {
            let entry = regions.allocate(owner, purpose, units * UNIT, UNIT, &mut |_, _| Ok(()))?;
            if entry.offset != 0 {
                let (_, store) = regions.open_store(entry.id)?;
                // A guest stores without waiting for anybody.
                let _ = store.write_at(0, &vec![owner.as_bytes()[0]; usize::try_from(entry.bytes).unwrap()]);
                let _ = store.sync();
            }
            Ok(())
        }
        Step::Free(owner, purpose) => regions.free(find(owner, purpose)),
    }
}

/// What was ready before the script, and after each of its steps; and how many operations it takes.
fn reference(kind: Kind) -> (Vec<Vec<Entry>>, usize) {
    let sim = populated(kind);
    let regions = open(&sim, kind).unwrap();
    let before = sim.operations();
    let mut seen = vec![regions.ready()];
    for &step in SCRIPT {
        run(&regions, step).unwrap();
        seen.push(regions.ready());
    }
    (seen, sim.operations() - before)
}

/// Runs the script until the power goes; returns how many steps were answered.
fn run_until_cut(sim: &Sim, kind: Kind, operations: usize) -> usize {
    let regions = open(sim, kind).unwrap();
    sim.cut_after(operations);
    for (i, &step) in SCRIPT.iter().enumerate() {
        if run(&regions, step).is_err() {
            return i;
        }
    }
    SCRIPT.len()
}

/// Everything that must hold of a medium after a crash.
fn check(sim: &Sim, kind: Kind, allowed: &[&Vec<Entry>], what: &str) -> Vec<Entry> {
    let regions = open(sim, kind).unwrap_or_else(|error| panic!("{what}: {error}"));
    let found = regions.ready();
    assert!(allowed.contains(&&found), "{what}: {found:#?} is none of {allowed:#?}");
    match kind {
        Kind::Directory => {
            let files: Vec<_> = found.iter().map(|e| (e.file_name(), e.bytes)).collect();
            let mut expected = std::collections::BTreeMap::new();
            expected.extend(files);
            assert_eq!(sim.seen().files, expected, "{what}");
        }
        Kind::Device => {
            for entry in &found {
                let bytes = content(&regions, entry.id);
                let own = entry.owner.as_bytes()[0];
                assert!(bytes.iter().all(|&b| b == 0 || b == own), "{what}: {entry:?} holds another's bytes");
            }
        }
    }
    found
}

fn content(regions: &Regions, id: RegionId) -> Vec<u8> {
    let (entry, store) = regions.open_store(id).unwrap();
    let mut bytes = vec![0; usize::try_from(entry.bytes).unwrap()];
    store.read_at(0, &mut bytes).unwrap();
    bytes
}

/// The next tenant of whatever is free must find zeroes.
fn check_free_space(sim: &Sim) {
    let regions = open(sim, Kind::Device).unwrap();
    for i in 0.. {
        match regions.allocate(&format!("z{i}"), Purpose::Memory, UNIT, UNIT, &mut |_, _| Ok(())) {
            Ok(entry) => assert!(content(&regions, entry.id).iter().all(|&b| b == 0)),
            Err(Error::NoSpace { .. }) => break,
            Err(error) => panic!("{error}"),
        }
    }
}

fn cut_everywhere(kind: Kind, atom: usize) {
    let (seen, operations) = reference(kind);
    for k in 1..=operations + 1 {
        let sim = populated(kind);
        let done = run_until_cut(&sim, kind, k);
        let allowed = [&seen[done], &seen[(done + 1).min(SCRIPT.len())]];
        for (i, image) in sim.cuts(atom).into_iter().enumerate() {
            let what = format!("{kind:?}, power cut in operation {k} (step {done}), image {i}");
            let after = Sim::new(image);
            let first = check(&after, kind, &allowed, &what);
            let again = check(&after, kind, &[&first], &what);
            assert_eq!(first, again, "{what}");
            if kind == Kind::Device && i % 8 == 0 {
                check_free_space(&after);
            }
        }
    }
}

#[test]
fn device_after_a_power_cut_is_as_before_or_as_after() {
    cut_everywhere(Kind::Device, 512);
}

#[test]
fn device_after_a_power_cut_that_tears_cache_lines_is_as_before_or_as_after() {
    cut_everywhere(Kind::Device, 64);
}

#[test]
fn directory_after_a_power_cut_is_as_before_or_as_after() {
    cut_everywhere(Kind::Directory, 512);
}

/// The daemon is killed, what it wrote is still in the page cache; a second one opens the medium, and the power goes.
fn kill_then_cut(kind: Kind, atom: usize) {
    let (seen, operations) = reference(kind);
    for k in 1..=operations {
        let dead = |sim: &Sim| run_until_cut(sim, kind, k);
        for j in 1.. {
            let sim = populated(kind);
            let done = dead(&sim);
            let allowed = [&seen[done], &seen[(done + 1).min(SCRIPT.len())]];
            sim.restart();
            sim.cut_after(j);
            // What the second daemon said counts from then on.
            let said = open(&sim, kind).map(|regions| regions.ready());
            let is_complete = !sim.is_off();
            for (i, image) in sim.cuts(atom).into_iter().enumerate() {
                let what = format!(
                    "{kind:?}, killed in operation {k}, power cut {j} operations into opening, image {i}"
                );
                let found = check(&Sim::new(image), kind, &allowed, &what);
                if let Ok(said) = &said {
                    assert_eq!(&found, said, "{what}");
                }
            }
            if is_complete {
                break;
            }
        }
    }
}

#[test]
fn device_of_a_killed_daemon_survives_a_power_cut_while_it_is_opened() {
    kill_then_cut(Kind::Device, 512);
}

#[test]
fn directory_of_a_killed_daemon_survives_a_power_cut_while_it_is_opened() {
    kill_then_cut(Kind::Directory, 512);
}

#[test]
fn interrupted_formatting_can_be_started_again() {
    let identity = identity(Kind::Device);
    let mut formatted = 0;
    for k in 1..=12 {
        let sim = Sim::blank(SPAN.end);
        sim.cut_after(k);
        let result = registry::format(&*sim.store(0, REGISTRY_BYTES), path(), &identity);
        for image in [64, 512].into_iter().flat_map(|atom| sim.cuts(atom)) {
            let after = Sim::new(image);
            let store = after.store(0, REGISTRY_BYTES);
            match open(&after, Kind::Device) {
                Ok(regions) => {
                    assert!(regions.ready().is_empty());
                    formatted += 1;
                }
                Err(Error::Unformatted { .. }) => {
                    assert!(result.is_err());
                    assert!(registry::is_blank(&*store, path()).unwrap());
                    registry::format(&*store, path(), &identity).unwrap();
                    open(&after, Kind::Device).unwrap();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    assert!(formatted > 0);
}

/// A medium with some regions in all phases but the passing ones.
fn in_use() -> (Image, Vec<Entry>) {
    let sim = formatted(Kind::Device);
    let regions = open(&sim, Kind::Device).unwrap();
    for &step in &SCRIPT[..3] {
        run(&regions, step).unwrap();
    }
    (sim.seen(), regions.ready())
}

const COPIES: [usize; 2] = [0, 512 << 10];
const LENGTH: usize = 128 + 3 * 128;

#[test]
fn damage_to_any_byte_of_one_copy_is_repaired() {
    let (good, ready) = in_use();
    for copy in COPIES {
        for at in 0..LENGTH {
            for mask in [0xff, 0x01, 0x80] {
                let mut image = good.clone();
                image.bytes[copy + at] ^= mask;
                let sim = Sim::new(image);
                let regions = open(&sim, Kind::Device).unwrap_or_else(|e| panic!("byte {at}: {e}"));
                assert_eq!(regions.ready(), ready, "byte {at}");
                assert_eq!(sim.seen(), good, "byte {at}");
            }
        }
    }
}

#[test]
fn damage_to_any_byte_of_both_copies_is_refused_and_kept() {
    let (good, _) = in_use();
    for at in 0..LENGTH {
        for masks in [[0xff, 0xff], [0x01, 0x80], [0x01, 0x01]] {
            let mut image = good.clone();
            for (copy, mask) in COPIES.into_iter().zip(masks) {
                image.bytes[copy + at] ^= mask;
            }
            let sim = Sim::new(image.clone());
            let refused = open(&sim, Kind::Device);
            assert!(matches!(refused, Err(Error::Damaged { .. })), "byte {at}: {refused:?}");
            assert_eq!(sim.seen(), image, "byte {at}");
        }
    }
}

fn reseal(bytes: &mut [u8], length: usize) {
    bytes[12..16].fill(0);
    let crc = crc32c(&bytes[..length]);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn registry_of_a_newer_version_is_refused_and_kept() {
    let (good, _) = in_use();
    for copies in [&COPIES[..], &COPIES[..1], &COPIES[1..]] {
        let mut image = good.clone();
        for &copy in copies {
            image.bytes[copy + 8] = 9;
            // What else is in it is for that version to say.
            image.bytes[copy + 200..copy + 300].fill(0xab);
            reseal(&mut image.bytes[copy..], LENGTH);
        }
        let sim = Sim::new(image.clone());
        let refused = open(&sim, Kind::Device);
        assert!(matches!(refused, Err(Error::NewerVersion { found: 9, known: 1, .. })), "{refused:?}");
        assert_eq!(sim.seen(), image);
    }
}

#[test]
fn registry_that_contradicts_itself_under_a_good_checksum_is_refused() {
    let (good, _) = in_use();
    let entry = 128;
    // (where, what): overlap, bad alignment, out of the medium, wild length, unknown purpose and phase, bad owner,
    // bad id, bad kind
    let lies: [(usize, &[u8]); 9] = [
        (entry + 128 + 16, &SPAN.start.to_le_bytes()),
        (entry + 24, &3u64.to_le_bytes()),
        (entry + 16, &SPAN.end.to_le_bytes()),
        (entry + 8, &(u64::MAX - 4095).to_le_bytes()),
        (entry + 40, &[3]),
        (entry + 41, &[0]),
        (entry + 48, b"/"),
        (entry, &77u64.to_le_bytes()),
        (76, &[3]),
    ];
    for (at, lie) in lies {
        let mut image = good.clone();
        for copy in COPIES {
            image.bytes[copy + at..copy + at + lie.len()].copy_from_slice(lie);
            reseal(&mut image.bytes[copy..], LENGTH);
        }
        let refused = open(&Sim::new(image), Kind::Device);
        assert!(matches!(refused, Err(Error::Damaged { .. })), "byte {at}: {refused:?}");
    }
}

#[test]
fn regions_that_are_larger_together_than_any_medium_are_refused() {
    let sim = formatted(Kind::Directory);
    let regions = open(&sim, Kind::Directory).unwrap();
    run(&regions, SCRIPT[0]).unwrap();
    run(&regions, SCRIPT[1]).unwrap();
    let mut image = sim.seen();
    for copy in COPIES {
        for entry in [copy + 128, copy + 256] {
            image.bytes[entry + 8..entry + 16].copy_from_slice(&(1u64 << 63).to_le_bytes());
        }
        reseal(&mut image.bytes[copy..], 128 + 2 * 128);
    }
    assert!(matches!(open(&Sim::new(image), Kind::Directory), Err(Error::Damaged { .. })));
}

#[test]
fn copies_of_two_media_are_refused() {
    let (mut image, _) = in_use();
    image.bytes[COPIES[1] + 32] ^= 1;
    reseal(&mut image.bytes[COPIES[1]..], LENGTH);
    assert!(matches!(open(&Sim::new(image), Kind::Device), Err(Error::Damaged { .. })));
}

#[test]
fn after_a_failed_write_nothing_more_is_changed() {
    let sim = formatted(Kind::Device);
    let regions = open(&sim, Kind::Device).unwrap();
    run(&regions, SCRIPT[0]).unwrap();
    sim.cut_after(2);
    let id = regions.ready()[0].id;
    assert!(matches!(regions.free(id), Err(Error::Io { .. })));
    sim.restart();
    let seen = sim.seen();
    assert!(matches!(regions.free(id), Err(Error::Io { .. })));
    assert_eq!(sim.seen(), seen);
    assert_eq!(regions.get(id).unwrap().phase, Phase::Ready);
}

fn saved(generation: u64, payload: &[u8]) -> SavedState {
    let header = SavedHeader {
        incarnation: [u8::try_from(generation).unwrap(); 16],
        generation,
        saved_at_unix_ms: 1_700_000_000_000,
        metadata: format!("{{\"n\":{generation},\"pad\":\"{}\"}}", "x".repeat(600)).into_bytes(),
    };
    SavedState { header, payload: payload.to_vec() }
}

const SLOT: u64 = SLOT_HEADER_BYTES + 8192;

fn slot(sim: &Sim) -> Slot {
    Slot::new(sim.store(0, SLOT), SLOT)
}

fn commit(slot: &Slot, state: &SavedState) -> Result<()> {
    slot.commit(&state.header, &state.payload)
}

#[test]
fn slot_gives_back_what_was_saved() {
    let sim = Sim::blank(SLOT);
    let slot = slot(&sim);
    assert_eq!(slot.read().unwrap(), SlotContent::Empty);
    assert_eq!(slot.capacity(), 8192);
    for payload in [&b""[..], b"x", &[9; 8192]] {
        commit(&slot, &saved(3, payload)).unwrap();
        assert_eq!(slot.read().unwrap(), SlotContent::Saved(saved(3, payload)));
    }
    assert!(matches!(commit(&slot, &saved(4, &[9; 8193])), Err(Error::Invalid { .. })));
    let mut large = saved(4, b"");
    large.header.metadata = vec![b' '; super::MAX_METADATA + 1];
    assert!(matches!(commit(&slot, &large), Err(Error::Invalid { .. })));
    assert_eq!(slot.read().unwrap(), SlotContent::Saved(saved(3, &[9; 8192])));
    slot.clear().unwrap();
    assert_eq!(slot.read().unwrap(), SlotContent::Empty);
}

#[test]
fn slot_after_a_power_cut_is_old_new_or_torn() {
    // Payloads of equal and of different length, and some that differ in one sector only.
    let mut similar = vec![1; 2000];
    similar[600] = 7;
    let pairs = [(vec![1; 2000], vec![2; 2000]), (vec![1; 2000], vec![2; 300]), (vec![1; 2000], similar)];
    for (old, new) in pairs {
        let [old, new] = [saved(1, &old), saved(2, &new)];
        let mut torn = 0;
        for k in 1..=4 {
            let sim = Sim::blank(SLOT);
            commit(&slot(&sim), &old).unwrap();
            sim.cut_after(k);
            let result = commit(&slot(&sim), &new);
            for image in sim.cuts(512) {
                match slot(&Sim::new(image)).read().unwrap() {
                    SlotContent::Saved(found) => {
                        assert!(found == new || (found == old && result.is_err()), "operation {k}");
                    }
                    SlotContent::Torn { .. } if result.is_err() => torn += 1,
                    other => panic!("operation {k}: {other:?}"),
                }
            }
        }
        assert!(torn > 0);
    }
}

#[test]
fn slot_that_was_empty_is_empty_new_or_torn_after_a_power_cut() {
    let new = saved(1, &[5; 1500]);
    for k in 1..=4 {
        let sim = Sim::blank(SLOT);
        sim.cut_after(k);
        let result = commit(&slot(&sim), &new);
        for image in sim.cuts(512) {
            match slot(&Sim::new(image)).read().unwrap() {
                SlotContent::Saved(found) => assert_eq!(found, new),
                _ if result.is_err() => {}
                other => panic!("operation {k}: {other:?}"),
            }
        }
    }
}

#[test]
fn slot_being_cleared_is_old_empty_or_torn_after_a_power_cut() {
    let old = saved(1, &[5; 1500]);
    for atom in [8, 64, 512] {
        for k in 1..=3 {
            let sim = Sim::blank(SLOT);
            commit(&slot(&sim), &old).unwrap();
            sim.cut_after(k);
            let result = slot(&sim).clear();
            for image in sim.cuts(atom) {
                match slot(&Sim::new(image)).read().unwrap() {
                    SlotContent::Saved(found) => assert!(found == old && result.is_err()),
                    SlotContent::Torn { .. } => assert!(result.is_err()),
                    SlotContent::Empty => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

#[test]
fn damage_to_any_byte_of_a_saved_state_is_noticed() {
    let sim = Sim::blank(SLOT);
    let state = saved(1, &[5; 700]);
    commit(&slot(&sim), &state).unwrap();
    let good = sim.seen();
    let header = 0..96 + state.header.metadata.len();
    let start = usize::try_from(SLOT_HEADER_BYTES).unwrap();
    for at in header.chain(start..start + 700) {
        for mask in [0xff, 0x01, 0x80] {
            let mut image = good.clone();
            image.bytes[at] ^= mask;
            let found = slot(&Sim::new(image)).read().unwrap();
            assert!(matches!(found, SlotContent::Torn { .. }), "byte {at}: {found:?}");
        }
    }
    // Beyond what the header counts nothing is read.
    let mut image = good;
    image.bytes[start + 700] ^= 0xff;
    assert_eq!(slot(&Sim::new(image)).read().unwrap(), SlotContent::Saved(state));
}

#[test]
fn slot_of_a_newer_version_is_told_from_damage() {
    let sim = Sim::blank(SLOT);
    commit(&slot(&sim), &saved(1, b"state")).unwrap();
    let mut image = sim.seen();
    image.bytes[8] = 2;
    image.bytes[20..90].fill(0x77);
    let length = usize::try_from(u32::from_le_bytes(image.bytes[16..20].try_into().unwrap())).unwrap();
    reseal(&mut image.bytes, length);
    let found = slot(&Sim::new(image)).read().unwrap();
    assert_eq!(found, SlotContent::NewerVersion { found: 2, known: 1 });
}

#[test]
fn slot_with_wild_lengths_under_a_good_checksum_is_torn() {
    let sim = Sim::blank(SLOT);
    commit(&slot(&sim), &saved(1, b"state")).unwrap();
    let good = sim.seen();
    let length = usize::try_from(u32::from_le_bytes(good.bytes[16..20].try_into().unwrap())).unwrap();
    for (at, wild) in [(56, u64::MAX), (56, 8193), (56, 1 << 40), (20, u64::MAX)] {
        let mut image = good.clone();
        let n = if at == 20 { 4 } else { 8 };
        image.bytes[at..at + n].copy_from_slice(&wild.to_le_bytes()[..n]);
        reseal(&mut image.bytes, length);
        let found = slot(&Sim::new(image)).read().unwrap();
        assert!(matches!(found, SlotContent::Torn { .. }), "{at} {wild}: {found:?}");
    }
}

/// Cells of a unit each, and who has them.
struct Oracle {
    cells: Vec<Option<RegionId>>,
    reserve: usize,
}

impl Oracle {
    /// Where a region of so many cells goes, or the largest that would.
    fn place(&self, len: usize, align: usize) -> std::result::Result<usize, usize> {
        let free = self.cells.iter().filter(|cell| cell.is_none()).count().saturating_sub(self.reserve);
        let fits = |at: usize, len: usize| {
            at + len <= self.cells.len() && self.cells[at..at + len].iter().all(Option::is_none)
        };
        let starts = || (0..self.cells.len()).filter(|at| at % align == 0);
        match starts().find(|&at| fits(at, len)) {
            Some(at) if len <= free => Ok(at),
            _ => {
                let largest =
                    starts().flat_map(|at| (0..=self.cells.len()).filter(move |&n| fits(at, n))).max();
                Err(largest.unwrap_or(0).min(free))
            }
        }
    }
}

proptest! {
    #[test]
    fn allocator_does_what_a_naive_one_does(
        cells in 1usize..24, reserve in 0usize..6, quota in prop::option::of(1u64..12),
        steps in prop::collection::vec((any::<bool>(), 0usize..40, 1usize..7, 0u32..3), 1..60),
    ) {
        let cell_count = u64::try_from(cells).unwrap();
        let span = Span { start: 4 * UNIT, end: (4 + cell_count) * UNIT };
        let mut quotas = std::collections::BTreeMap::new();
        if let Some(quota) = quota {
            quotas.insert("o1".to_owned(), quota * UNIT);
        }
        let limits = Limits { reserve: u64::try_from(reserve).unwrap() * UNIT, quotas, default_quota: None };
        let mut oracle = Oracle { cells: vec![None; cells], reserve };
        let mut table = Table::default();
        for (is_allocation, who, len, align) in steps {
            if !is_allocation {
                if let Some(entry) = table.entries.get(who % table.entries.len().max(1)).cloned() {
                    table.release(entry.id).unwrap();
                    prop_assert!(oracle.cells.contains(&Some(entry.id)), "a dropping region keeps its place");
                    table.dropped(entry.id);
                    oracle.cells.iter_mut().filter(|cell| **cell == Some(entry.id)).for_each(|cell| *cell = None);
                }
                continue;
            }
            let (owner, purpose) = (format!("o{}", who / 2), Purpose::ALL[who % 2]);
            let has = table.entries.iter().any(|e| e.owner == owner && e.purpose == purpose);
            let align = 1 << align;
            let units = len.next_multiple_of(align);
            let used: u64 = table.entries.iter().filter(|e| e.owner == owner).map(|e| e.bytes / UNIT).sum();
            let left = quota.filter(|_| owner == "o1").map(|quota| quota.saturating_sub(used));
            let before = table.clone();
            let bytes = u64::try_from(len).unwrap() * UNIT - 1;
            let align_bytes = u64::try_from(align).unwrap() * UNIT;
            let result = table.begin(&owner, purpose, bytes, align_bytes, Room::Extents(span), &limits);
            let units_bytes = u64::try_from(units).unwrap() * UNIT;
            match result {
                Ok(entry) => {
                    prop_assert!(!has && left.is_none_or(|left| units_bytes <= left * UNIT));
                    let at = usize::try_from((entry.offset - span.start) / UNIT).unwrap();
                    prop_assert_eq!(oracle.place(units, align), Ok(at));
                    prop_assert_eq!(entry.bytes, units_bytes);
                    oracle.cells[at..at + units].fill(Some(entry.id));
                    table.made(entry.id).unwrap();
                    prop_assert_eq!(table.validate(Some(span)), Ok(()));
                }
                Err(Error::Invalid { .. }) => prop_assert!(has),
                Err(Error::OverQuota { requested_bytes, available_bytes, .. }) => {
                    prop_assert!(!has);
                    prop_assert_eq!((requested_bytes, Some(available_bytes / UNIT)), (units_bytes, left));
                    prop_assert!(units_bytes > available_bytes);
                    prop_assert_eq!(&table, &before);
                }
                Err(Error::NoSpace { requested_bytes, available_bytes }) => {
                    prop_assert!(!has);
                    let available = usize::try_from(available_bytes / UNIT).unwrap();
                    prop_assert_eq!((requested_bytes, oracle.place(units, align)), (units_bytes, Err(available)));
                    prop_assert_eq!(&table, &before);
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}

#[test]
fn files_are_counted_against_what_the_file_system_has() {
    let mut table = Table::default();
    let limits = Limits { reserve: 3 * UNIT, ..Limits::default() };
    let mut begin = |owner: &str, units: u64| {
        table.begin(owner, Purpose::Memory, units * UNIT, UNIT, Room::Files { free: 10 * UNIT }, &limits)
    };
    begin("a", 4).unwrap();
    // The first is being made: the file system does not count it yet.
    let refused = begin("b", 4);
    assert!(
        matches!(refused, Err(Error::NoSpace { requested_bytes, available_bytes })
            if requested_bytes == 4 * UNIT && available_bytes == 3 * UNIT),
        "{refused:?}"
    );
    begin("b", 3).unwrap();
}

/// A directory whose file system gets full.
#[derive(Debug)]
struct Full(SimDirectory);

impl Place for Full {
    fn make(&self, entry: &Entry, _progress: Progress<'_>) -> io::Result<()> {
        self.0.0.set_file(entry.file_name(), Some(entry.bytes / 2))?;
        Err(io::ErrorKind::StorageFull.into())
    }

    fn unmake(&self, entry: &Entry) -> io::Result<()> {
        self.0.unmake(entry)
    }

    fn check(&self, entry: &Entry) -> io::Result<Option<String>> {
        self.0.check(entry)
    }

    fn open(&self, entry: &Entry) -> io::Result<Box<dyn Store>> {
        self.0.open(entry)
    }

    fn flush(&self, entry: &Entry) -> io::Result<()> {
        self.0.flush(entry)
    }

    fn free(&self) -> io::Result<Option<u64>> {
        Ok(Some(5 * UNIT))
    }
}

#[test]
fn region_that_found_no_space_leaves_nothing() {
    let sim = formatted(Kind::Directory);
    let place = Box::new(Full(SimDirectory(sim.clone())));
    let store = sim.store(0, REGISTRY_BYTES);
    let regions = Regions::open(path(), store, place, Limits::default(), |_| Ok(())).unwrap();
    for _ in 0..2 {
        let refused = regions.allocate("a", Purpose::Memory, 4 * UNIT, UNIT, &mut |_, _| Ok(()));
        assert!(
            matches!(refused, Err(Error::NoSpace { requested_bytes, available_bytes })
                if requested_bytes == 4 * UNIT && available_bytes == 5 * UNIT),
            "{refused:?}"
        );
        assert!(sim.seen().files.is_empty());
        assert!(regions.ready().is_empty());
    }
}

#[test]
fn region_numbers_are_never_used_twice() {
    let sim = formatted(Kind::Directory);
    let regions = open(&sim, Kind::Directory).unwrap();
    for _ in 0..3 {
        run(&regions, SCRIPT[0]).unwrap();
        run(&regions, Step::Free("a", Purpose::Memory)).unwrap();
    }
    drop(regions);
    let regions = open(&sim, Kind::Directory).unwrap();
    run(&regions, SCRIPT[0]).unwrap();
    assert_eq!(regions.ready()[0].id, RegionId(4));
    assert_eq!(regions.ready()[0].phase, Phase::Ready);
}

#[test]
fn owners_that_are_no_plain_names_are_refused() {
    let long = "x".repeat(65);
    for owner in ["", ".", "..", ".hidden", "-x", "a/b", "a b", "a\0", "ä", &long] {
        assert!(super::table::check_owner(owner).is_err(), "{owner:?}");
    }
    for owner in ["a", "web-1.example_2", &long[1..]] {
        assert!(super::table::check_owner(owner).is_ok(), "{owner:?}");
    }
}
