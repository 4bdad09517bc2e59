// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What of a host's VMs lies on media, as somebody may have left it: the registry of NV-RAM, a slot, an image that was swapped out.
//!
//! The first byte names one of them; the rest is a list of changes to a sound one. Oracles: no panic, bounded memory, and
//!
//! * where the changes are damage, and checksums as they were: what is read is what was once written, or there is an error; a
//!   registry with one good copy opens as if nothing had happened;
//! * where checksums were made right afterwards: an error changes nothing; regions lie apart from each other, in the medium and on their
//!   boundaries, and are the same when it is opened again; what was read is the same when it is written and read again; a saved state is
//!   used for the guest that it names and no other.

#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has failed")]

use std::ops::Range;
use std::sync::OnceLock;

use crc_fast::{CrcAlgorithm, Digest, checksum};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use vm_host::nvram::fuzzing::{ALIGNMENT, Bytes, COPIES, Kind, Opened, REGISTRY, format, open};
use vm_host::nvram::{Error, Purpose, Region, SLOT_HEADER_BYTES, SavedHeader, SavedState, SlotContent};
use vm_host::vm::fuzzing::{PIECE, read_image, usable, write_image};
use vssd_fuzz::{Input, setup};

/// Bits of the first byte.
const FORGED: u8 = 4;
const OTHER_COPY: u8 = 8;

fuzz_target!(|data: &[u8]| {
    setup();
    let mut input = Input(data);
    let choice = input.u8();
    match choice & 3 {
        _ if choice >= 2 * OTHER_COPY => {}
        0 => registry(Kind::Directory, choice, input),
        1 => registry(Kind::Device, choice, input),
        2 => slot(choice & FORGED != 0, input),
        _ => image(choice & FORGED != 0, input),
    }
});

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().unwrap()
}

fn length(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_le_bytes(number(bytes, at))).unwrap_or(usize::MAX)
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// Overwrites up to 16 bytes, but none of `kept`: a fuzzer sees what a checksum is compared with, and so could make it right.
fn change(input: &mut Input<'_>, bytes: &mut [u8], at: usize, kept: &[Range<usize>]) {
    let new = input.u8() & 15;
    for (at, byte) in (at..bytes.len()).zip(input.bytes(usize::from(new) + 1)) {
        if !kept.iter().any(|range| range.contains(&at)) {
            bytes[at] = *byte;
        }
    }
}

fn crc32c(bytes: &[u8]) -> [u8; 4] {
    u32::try_from(checksum(CrcAlgorithm::Crc32Iscsi, bytes)).unwrap().to_le_bytes()
}

// ---- the registry ----

const COPY: [usize; 2] = [COPIES[0] as usize, COPIES[1] as usize];
const UNITS: u64 = 16;
/// Of a copy: what damage reaches, all that its checksum covers in the end; what is forged may go further.
const COVERED: usize = 128 + 3 * 128;
const FORGEABLE: usize = 128 + 5 * 128;
/// What openings may write, and are compared by.
const WRITTEN: usize = 1024;
const CRC: Range<usize> = 12..16;

/// A registry after each of its changes.
struct Registry {
    /// The medium in the end.
    bytes: Vec<u8>,
    /// A copy, and what an opening finds with it.
    history: Vec<(Vec<u8>, Vec<Region>)>,
}

/// Three regions in the end.
fn sound(kind: Kind) -> &'static Registry {
    static SOUND: [OnceLock<Registry>; 2] = [const { OnceLock::new() }; 2];
    SOUND[usize::from(kind == Kind::Device)].get_or_init(|| {
        let room = if kind == Kind::Device { UNITS * ALIGNMENT } else { 0 };
        let medium = Bytes::new(vec![0; usize::try_from(REGISTRY + room).unwrap()]);
        format(&medium, kind).unwrap();
        let opened = open(&medium, kind).unwrap();
        let mut history = Vec::new();
        for (owner, purpose, units) in
            [("a", Purpose::Memory, 2), ("a", Purpose::State, 1), ("b", Purpose::Memory, 3)]
        {
            opened.allocate(owner, purpose, units * ALIGNMENT).unwrap();
            history.push((medium.lock()[..WRITTEN].to_vec(), opened.list()));
        }
        drop(opened);
        let bytes = medium.lock().clone();
        Registry { bytes, history }
    })
}

fn seal_registry(bytes: &mut [u8]) {
    for at in COPY {
        let copy = &mut bytes[at..at + (512 << 10)];
        let length = length(copy, 16);
        if (128..=copy.len()).contains(&length) {
            copy[CRC].fill(0);
            let crc = crc32c(&copy[..length]);
            copy[CRC].copy_from_slice(&crc);
        }
    }
}

fn registry(kind: Kind, choice: u8, mut input: Input<'_>) {
    let sound = sound(kind);
    let forged = choice & FORGED != 0;
    let kept = COPY.map(|at| at + CRC.start..at + CRC.end);
    thread_local!(static MEDIUM: [Bytes; 2] =
        [Kind::Directory, Kind::Device].map(|kind| Bytes::new(self::sound(kind).bytes.clone())));
    let medium = MEDIUM.with(|media| media[usize::from(kind == Kind::Device)].clone());
    let mut bytes = medium.lock();
    for at in COPY {
        bytes[at..at + WRITTEN].copy_from_slice(&sound.bytes[at..at + WRITTEN]);
    }
    // A crash may have left the second copy behind the first.
    let (second, _) = &sound.history[usize::from(if forged { 2 } else { input.u8() }) % 3];
    bytes[COPY[1]..COPY[1] + WRITTEN].copy_from_slice(second);
    // What guests left.
    bytes[REGISTRY as usize..].fill(0xee);
    while !input.is_empty() {
        let at = usize::from(input.u16());
        if !forged {
            let copy = COPY[usize::from(choice & OTHER_COPY != 0)];
            change(&mut input, &mut bytes[..copy + COVERED], copy + at % COVERED, &kept);
            continue;
        }
        let copies = match at >> 14 {
            0 => &COPY[..1],
            1 => &COPY[1..],
            _ => &COPY[..],
        };
        let before = input.clone();
        for copy in copies {
            input = before.clone();
            change(&mut input, &mut bytes, copy + (at & 0x3fff) % FORGEABLE, &[]);
        }
    }
    if forged {
        seal_registry(&mut bytes);
    }
    drop(bytes);
    let before = written(&medium);
    let opened = match open(&medium, kind) {
        Ok(opened) => opened,
        Err(Error::Unformatted { .. }) if before.starts_with(b"vmNVMAKE") => return,
        Err(error) => {
            assert!(forged, "one copy is as it was, but: {error}");
            let may_write = matches!(error, Error::Io { .. });
            assert!(may_write || written(&medium) == before, "refused, but changed: {error}");
            return;
        }
    };
    let list = opened.list();
    if !forged {
        let now = written(&medium);
        let length = length(&now, 16);
        assert!(now[..length] == now[WRITTEN..WRITTEN + length], "the copies differ");
        let is_whole = before[..COVERED] == sound.bytes[..COVERED];
        let expected = sound.history.iter().rfind(|(copy, _)| is_whole || copy == second);
        assert_eq!(list, expected.unwrap().1, "the first copy is whole: {is_whole}");
    }
    check_list(&list, kind);
    drop(opened);
    let mut opened = open_again(&medium, kind, &list);
    match opened.allocate("new", Purpose::Memory, ALIGNMENT) {
        Ok(region) => {
            if kind == Kind::Device {
                let at = usize::try_from(region.offset_bytes).unwrap();
                let bytes = medium.lock();
                assert!(bytes[at..at + ALIGNMENT as usize].iter().all(|byte| *byte == 0));
            }
        }
        Err(Error::NoSpace { .. } | Error::Invalid { .. }) => {}
        // The registry says that it was written as often as it can be.
        Err(Error::Io { .. }) if forged => return,
        Err(error) => panic!("{error}"),
    }
    let list = opened.list();
    check_list(&list, kind);
    drop(opened);
    opened = open_again(&medium, kind, &list);
    if let Some(first) = list.first()
        && opened.free(first.id).is_ok()
    {
        drop(opened);
        open_again(&medium, kind, &list[1..]);
    }
}

/// The beginning of each copy.
fn written(medium: &Bytes) -> Vec<u8> {
    let bytes = medium.lock();
    [&bytes[COPY[0]..][..WRITTEN], &bytes[COPY[1]..][..WRITTEN]].concat()
}

/// An orderly end leaves nothing to do.
fn open_again(medium: &Bytes, kind: Kind, list: &[Region]) -> Opened {
    let before = written(medium);
    let opened = open(medium, kind).expect("it was open before");
    assert_eq!(opened.list(), list);
    assert!(written(medium) == before, "there was nothing to change");
    opened
}

fn check_list(list: &[Region], kind: Kind) {
    let end = REGISTRY + UNITS * ALIGNMENT;
    for (n, region) in list.iter().enumerate() {
        let Region { bytes, alignment_bytes, offset_bytes, .. } = *region;
        assert!(bytes > 0 && bytes % alignment_bytes == 0 && offset_bytes % alignment_bytes == 0);
        if kind == Kind::Device {
            assert!(offset_bytes >= REGISTRY && bytes <= end && offset_bytes <= end - bytes, "{region:?}");
        }
        for other in &list[..n] {
            assert!(other.id < region.id && other.path != region.path);
            assert!((&other.owner, other.purpose) != (&region.owner, region.purpose));
            let apart = other.offset_bytes + other.bytes <= offset_bytes
                || offset_bytes + bytes <= other.offset_bytes;
            assert!(apart || kind == Kind::Directory, "{region:?} and {other:?}");
        }
    }
}

// ---- a slot ----

const ATOM: usize = 512;
const SLOT: usize = SLOT_HEADER_BYTES as usize + 8192;
const OWNER: [&str; 3] = ["db", "pc-q35-10.0", "10.0.2"];
const MEMORY: u64 = 64 << 20;

fn state(seed: u8, payload: usize) -> SavedState {
    let [name, machine, version] = OWNER;
    // Longer than a sector, so that a header can be torn.
    let metadata = json!({ "name": name, "machine": machine, "version": version, "memory_bytes": MEMORY,
        "memory_region": seed, "pad": "x".repeat(600) });
    let header = SavedHeader {
        incarnation: [seed; 16],
        generation: u64::from(seed),
        saved_at_unix_ms: 1_700_000_000_000 + i64::from(seed),
        metadata: metadata.to_string().into_bytes(),
    };
    SavedState { header, payload: (0..payload).map(|at| (at as u8).wrapping_mul(seed)).collect() }
}

/// States that were saved one after the other, and the slot after each; then cleared.
fn saves() -> &'static (Vec<SavedState>, Vec<Vec<u8>>) {
    static SAVES: OnceLock<(Vec<SavedState>, Vec<Vec<u8>>)> = OnceLock::new();
    SAVES.get_or_init(|| {
        let medium = Bytes::new(vec![0; SLOT]);
        let states = vec![state(1, 5000), state(2, 3000), state(3, 6000)];
        let mut images = Vec::new();
        for state in &states {
            medium.slot().commit(&state.header, &state.payload).unwrap();
            images.push(medium.lock().clone());
        }
        medium.slot().clear().unwrap();
        images.push(medium.lock().clone());
        (states, images)
    })
}

fn slot(forged: bool, mut input: Input<'_>) {
    let (states, images) = saves();
    let mut bytes = images[usize::from(input.u8() & 3)].clone();
    while !input.is_empty() {
        let choice = input.u8();
        if choice & 4 == 0 {
            // Of a write that was interrupted, any sector may have arrived.
            let atom = usize::from(input.u8()) * ATOM % SLOT;
            let other = &images[usize::from(choice & 3)];
            bytes[atom..atom + ATOM].copy_from_slice(&other[atom..atom + ATOM]);
        } else {
            let part = [1024, SLOT][usize::from(choice & 1)];
            let at = usize::from(input.u16()) % part;
            change(&mut input, &mut bytes, at, if forged { &[] } else { &[CRC] });
        }
    }
    if forged {
        seal_slot(&mut bytes);
    }
    let content = Bytes::new(bytes).slot().read().unwrap();
    match &content {
        SlotContent::Empty | SlotContent::Torn { .. } => {}
        SlotContent::NewerVersion { .. } => assert!(forged),
        SlotContent::Saved(saved) => {
            assert!(forged || states.contains(saved), "nobody has ever saved {saved:?}");
            let other = Bytes::new(vec![0; SLOT]).slot();
            other.commit(&saved.header, &saved.payload).unwrap();
            assert_eq!(other.read().unwrap(), content);
        }
    }
    for seed in 1..=3 {
        let [name, machine, version] = OWNER;
        for (run, owner, memory, region) in [
            (seed, OWNER, MEMORY, seed),
            (seed + 1, OWNER, MEMORY, seed),
            (seed, ["other", machine, version], MEMORY, seed),
            (seed, [name, "other", version], MEMORY, seed),
            (seed, [name, machine, "other"], MEMORY, seed),
            (seed, OWNER, 2 * MEMORY, seed),
            (seed, OWNER, MEMORY, seed + 1),
        ] {
            check_use(&content, [run; 16], owner, memory, region);
        }
    }
}

fn check_use(content: &SlotContent, incarnation: [u8; 16], owner: [&str; 3], memory: u64, region: u8) {
    let Some(used) = usable(content.clone(), incarnation, owner, memory, region.into()) else { return };
    assert_eq!(used.header.incarnation, incarnation);
    // A key that is not looked at may have any value, and be no text.
    let said: Value = serde_json::from_str(&String::from_utf8_lossy(&used.header.metadata)).unwrap();
    let [name, machine, version] = owner;
    let expected = [json!(name), json!(machine), json!(version), json!(memory), json!(region)];
    let keys = ["name", "machine", "version", "memory_bytes", "memory_region"];
    assert_eq!(keys.map(|key| said[key].clone()), expected, "used for another guest");
}

fn seal_slot(bytes: &mut [u8]) {
    let payload = length(bytes, 56);
    let room = &bytes[SLOT_HEADER_BYTES as usize..];
    if let Some(payload) = room.get(..payload) {
        let sum = checksum(CrcAlgorithm::Crc64Nvme, payload);
        put(bytes, 64, &sum.to_le_bytes());
    }
    let header = u32::from_le_bytes(number(bytes, 16)) as usize;
    if (96..=SLOT_HEADER_BYTES as usize).contains(&header) {
        bytes[CRC].fill(0);
        let crc = crc32c(&bytes[..header]);
        put(bytes, CRC.start, &crc);
    }
}

// ---- an image ----

const HEAD: usize = 128;
const LABEL: usize = 16;
/// The bytes of the last piece.
const SHORT: usize = 512;

struct Image {
    saved: SavedState,
    memory: Vec<u8>,
    bytes: Vec<u8>,
    /// Where the labels of the pieces are.
    labels: [usize; 3],
}

/// Four pieces of memory, of which the second is zero and the last is short.
fn swapped_out() -> &'static Image {
    static IMAGE: OnceLock<Image> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let saved = state(1, 200);
        let mut memory = vec![0; 3 * PIECE + SHORT];
        for (at, byte) in memory.iter_mut().enumerate() {
            if at / PIECE != 1 {
                *byte = (at % 251) as u8;
            }
        }
        let bytes = write_image(&memory, &saved).unwrap();
        let first = HEAD + saved.header.metadata.len() + saved.payload.len();
        let labels = [0, 1, 2].map(|n| first + n * (LABEL + PIECE));
        Image { saved, memory, bytes, labels }
    })
}

fn image(forged: bool, mut input: Input<'_>) {
    let image = swapped_out();
    let [first, second, third] = image.labels;
    let kept = [16..24, first + 8..first + LABEL, second + 8..second + LABEL, third + 8..third + LABEL];
    let mut bytes = image.bytes.clone();
    while !input.is_empty() {
        let choice = input.u8();
        let far = usize::from(input.u16());
        let at = match choice & 7 {
            0 | 1 => far % HEAD,
            2 => far % first,
            3 => first + far % LABEL,
            4 => second + far % LABEL,
            5 => far,
            6 => {
                bytes.truncate(first.max(bytes.len().saturating_sub(far)));
                continue;
            }
            _ => {
                bytes.extend_from_slice(input.bytes(far & 63));
                continue;
            }
        };
        change(&mut input, &mut bytes, at, if forged { &[] } else { &kept });
    }
    if forged {
        seal_image(&mut bytes);
    }
    let mut memory = vec![0; image.memory.len()];
    let Ok(saved) = read_image(&bytes, &mut memory) else { return };
    if !forged {
        assert!(bytes == image.bytes, "damage was not noticed");
        assert_eq!(saved, image.saved);
        assert!(memory == image.memory);
        return;
    }
    let written = write_image(&memory, &saved).unwrap();
    let mut again = vec![0; memory.len()];
    assert_eq!(read_image(&written, &mut again).unwrap(), saved);
    assert!(again == memory);
    // There is one image of a VM, but for zeroes that need not be there.
    let pieces = HEAD + saved.header.metadata.len() + saved.payload.len();
    let has_zeroes = pieces_of(&bytes[pieces..]).any(|piece| piece.iter().all(|byte| *byte == 0));
    assert!(has_zeroes || written == bytes, "another image is the same VM");
}

/// The memory of each piece.
fn pieces_of(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let piece = rest.get(LABEL..)?;
        let (piece, behind) = piece.split_at(piece.len().min(if rest[0] == 3 { SHORT } else { PIECE }));
        rest = behind;
        Some(piece)
    })
}

fn seal_image(bytes: &mut [u8]) {
    let (metadata, payload) = (length(bytes, 56), length(bytes, 64));
    let end = HEAD.checked_add(metadata).and_then(|end| end.checked_add(payload));
    let Some(end) = end.filter(|end| *end <= bytes.len()) else { return };
    bytes[16..24].fill(0);
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&bytes[..end]);
    let sum = digest.finalize();
    put(bytes, 16, &sum.to_le_bytes());
    let mut at = end;
    while at + LABEL < bytes.len() {
        let piece = if bytes[at] == 3 { SHORT } else { PIECE };
        let Some(label) = bytes.get(at..(at + LABEL + piece).min(bytes.len())) else { return };
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        digest.update(&label[..8]);
        digest.update(&label[LABEL..]);
        let sum = digest.finalize();
        put(bytes, at + 8, &sum.to_le_bytes());
        at += LABEL + piece;
    }
}
