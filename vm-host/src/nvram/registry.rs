// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The registry: which regions a medium has, on the medium itself.
//!
//! ```text
//! device:     copy A ·· copy B ·· 1 MiB │ regions, from the first aligned byte on …
//!             at 0      at 512 KiB
//! directory:  the same 1 MiB in the file `vm-nvram.registry`, each region in a file beside it
//! ```
//!
//! Little-endian; of each copy the first `length` bytes count:
//!
//! ```text
//! 0    [u8;8]   magic "vmNVRAM\0"
//! 8    u32      version (1)
//! 12   u32      CRC-32C of `length` bytes with this field as zero
//! 16   u64      length: 128 and 128 for each region. The fields up to here are the same in every version, so that a
//!               later version is told from damage
//! 24   u64      generation: how many times the registry was written
//! 32   [u8;16]  medium: random, the same in both copies
//! 48   u64      bytes of the device when it was formatted, in whole units of its alignment; 0 of a directory
//! 56   u64      first byte of the regions on it; 0 of a directory
//! 64   u64      the next region's id: ids, and with them file names, are never used twice
//! 72   u32      regions
//! 76   u8       1 directory, 2 device
//! 77   u8       bytes of name; 78 … the medium's name in the configuration
//!
//! each region, by ascending id:
//! 0    u64      id
//! 8    u64      bytes
//! 16   u64      first byte on the device; 0 in a directory
//! 24   u64      alignment
//! 32   u64      0
//! 40   u8       1 memory, 2 state
//! 41   u8       1 making, 2 ready, 3 dropping
//! 42   u8       bytes of owner; 48 … the owner
//! ```
//!
//! **A change is written to A, made durable, then written to B, made durable, and only then answered.** A power cut
//! leaves one whole copy, the old one or the new one. When nothing is being written the two are the same, so damage to
//! one copy never takes back what was answered: the other is as new. (Two slots written by turns would also survive a torn
//! write, but one bad byte in the newer would silently bring back the older, and with it forget a region.)
//!
//! **At opening, the newest good copy is made durable before the other is rewritten from it.** It may have come from
//! the page cache of a daemon that died before its sync: without the barrier a power cut could tear both.
//!
//! **A region is *making* in the registry before its bytes are touched, and *ready* after they are zero and durable; it
//! is *dropping* before its bytes go.** So after a crash the registry itself says whose bytes are to be taken away, and a
//! file that it does not know is left alone.
//!
//! **Formatting** writes the word "vmNVMAKE" over the beginning of copy A of a blank device, then zeroes behind it,
//! then B, then A, a barrier behind each. Where an interrupted one left that word, it is told from damage and started
//! again; where it did not, B is whole.

use std::path::Path;

use crc_fast::{CrcAlgorithm, checksum};

use super::error::{Error, Result};
use super::store::{Store, is_zero};
use super::table::{Entry, MAX_OWNER, MAX_REGIONS, Phase, Purpose, RegionId, Span, Table};

/// What the registry takes of a device, and the size of its file in a directory.
pub(super) const REGISTRY_BYTES: u64 = 1 << 20;
/// The longest name of a medium, in bytes.
pub const MAX_NAME: usize = 48;

pub(super) const COPIES: [u64; 2] = [0, REGISTRY_BYTES / 2];
const MAGIC: [u8; 8] = *b"vmNVRAM\0";
const MAKING: [u8; 8] = *b"vmNVMAKE";
const VERSION: u32 = 1;
const HEADER: usize = 128;
const ENTRY: usize = 128;

/// What a medium is, written when it is formatted and never changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) name: String,
    pub(super) medium: [u8; 16],
    /// Of a device: its bytes, and where regions may lie.
    pub(super) device: Option<(u64, Span)>,
}

impl Identity {
    pub(super) fn span(&self) -> Option<Span> {
        self.device.map(|(_, span)| span)
    }
}

/// One copy's content.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Image {
    identity: Identity,
    generation: u64,
    table: Table,
}

/// Why there is no image in a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Flaw {
    /// Formatting began.
    Making,
    Newer(u32),
    Bad(String),
}

pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    // A 32-bit checksum in a u64.
    u32::try_from(checksum(CrcAlgorithm::Crc32Iscsi, bytes)).unwrap_or(0)
}

pub(super) fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

pub(super) fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// A text of at most `max` bytes whose length stands in the byte at `len_at`.
fn text(bytes: &[u8], len_at: usize, at: usize, max: usize) -> Option<String> {
    let len = usize::from(bytes[len_at]);
    if len > max {
        return None;
    }
    String::from_utf8(bytes[at..at + len].to_vec()).ok()
}

impl Image {
    fn encode(&self) -> Vec<u8> {
        let Self { identity, generation, table } = self;
        let (device_bytes, span) = identity.device.unwrap_or((0, Span { start: 0, end: 0 }));
        let mut bytes = vec![0; HEADER + ENTRY * table.entries.len()];
        let length = bytes.len() as u64;
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, &length.to_le_bytes());
        put(24, &generation.to_le_bytes());
        put(32, &identity.medium);
        put(48, &device_bytes.to_le_bytes());
        put(56, &span.start.to_le_bytes());
        put(64, &table.next_id.to_le_bytes());
        // At most MAX_REGIONS, MAX_NAME and MAX_OWNER.
        put(72, &u32::try_from(table.entries.len()).unwrap_or(0).to_le_bytes());
        put(76, &[if identity.device.is_some() { 2 } else { 1 }]);
        put(77, &[u8::try_from(identity.name.len()).unwrap_or(0)]);
        put(78, identity.name.as_bytes());
        for (i, entry) in table.entries.iter().enumerate() {
            let at = HEADER + ENTRY * i;
            put(at, &entry.id.0.to_le_bytes());
            put(at + 8, &entry.bytes.to_le_bytes());
            put(at + 16, &entry.offset.to_le_bytes());
            put(at + 24, &entry.alignment.to_le_bytes());
            put(
                at + 40,
                &[match entry.purpose {
                    Purpose::Memory => 1,
                    Purpose::State => 2,
                }],
            );
            put(
                at + 41,
                &[match entry.phase {
                    Phase::Making => 1,
                    Phase::Ready => 2,
                    Phase::Dropping => 3,
                }],
            );
            put(at + 42, &[u8::try_from(entry.owner.len()).unwrap_or(0)]);
            put(at + 48, entry.owner.as_bytes());
        }
        let crc = crc32c(&bytes);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(copy: &[u8]) -> std::result::Result<Self, Flaw> {
        let bad = |what: &str| Err(Flaw::Bad(what.to_owned()));
        if copy.starts_with(&MAKING) {
            return Err(Flaw::Making);
        }
        if !copy.starts_with(&MAGIC) {
            return bad("there is no registry");
        }
        let Some(bytes) = usize::try_from(long(copy, 16)).ok().and_then(|length| copy.get(..length)) else {
            return bad("its length is wrong");
        };
        if bytes.len() < HEADER {
            return bad("its length is wrong");
        }
        let mut without_crc = bytes.to_vec();
        without_crc[12..16].fill(0);
        if crc32c(&without_crc) != word(bytes, 12) {
            return bad("its checksum is wrong");
        }
        match word(bytes, 8) {
            VERSION => {}
            newer if newer > VERSION => return Err(Flaw::Newer(newer)),
            _ => return bad("its version is none"),
        }
        let count = word(bytes, 72) as usize;
        if count > MAX_REGIONS || bytes.len() != HEADER + ENTRY * count {
            return bad("its length is wrong");
        }
        let device_bytes = long(bytes, 48);
        let span = Span { start: long(bytes, 56), end: device_bytes };
        let device = match bytes[76] {
            1 => None,
            2 if span.start >= REGISTRY_BYTES && span.start <= span.end => Some((device_bytes, span)),
            _ => return bad("it contradicts itself"),
        };
        let Some(name) = text(bytes, 77, 78, MAX_NAME) else { return bad("its name is no text") };
        let mut medium = [0; 16];
        medium.copy_from_slice(&bytes[32..48]);
        let mut table = Table { next_id: long(bytes, 64), entries: Vec::with_capacity(count) };
        for entry in bytes[HEADER..].chunks_exact(ENTRY) {
            let (Some(purpose), Some(phase), Some(owner)) = (
                [Purpose::Memory, Purpose::State].get(usize::from(entry[40]).wrapping_sub(1)),
                [Phase::Making, Phase::Ready, Phase::Dropping].get(usize::from(entry[41]).wrapping_sub(1)),
                text(entry, 42, 48, MAX_OWNER),
            ) else {
                return bad("a region contradicts itself");
            };
            table.entries.push(Entry {
                id: RegionId(long(entry, 0)),
                owner,
                purpose: *purpose,
                phase: *phase,
                bytes: long(entry, 8),
                alignment: long(entry, 24),
                offset: long(entry, 16),
            });
        }
        table.validate(device.map(|(_, span)| span)).map_err(Flaw::Bad)?;
        Ok(Self { identity: Identity { name, medium, device }, generation: long(bytes, 24), table })
    }
}

/// The registry of an open medium.
#[derive(Debug)]
pub(super) struct Registry {
    identity: Identity,
    generation: u64,
}

/// Whether formatting may write there: nothing but zeroes, or an interrupted formatting.
pub(super) fn is_blank(store: &dyn Store, path: &Path) -> Result<bool> {
    let bytes = read(store, path, 0, REGISTRY_BYTES)?;
    Ok(bytes.starts_with(&MAKING) || is_zero(&bytes))
}

fn read(store: &dyn Store, path: &Path, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    store
        .read_at(offset, &mut bytes)
        .map_err(|source| Error::io(format!("cannot read the registry of {}", path.display()), source))?;
    Ok(bytes)
}

/// What of a copy counts, as far as it says so itself.
fn read_copy(store: &dyn Store, path: &Path, at: u64) -> Result<Vec<u8>> {
    let header = read(store, path, at, HEADER as u64)?;
    let length = long(&header, 16);
    let is_possible = header.starts_with(&MAGIC) && length <= REGISTRY_BYTES / 2;
    if is_possible { read(store, path, at, length) } else { Ok(header) }
}

/// Makes a medium without regions.
pub(super) fn format(store: &dyn Store, path: &Path, identity: &Identity) -> Result<()> {
    let image = Image { identity: identity.clone(), generation: 1, table: Table::default() };
    let bytes = image.encode();
    let write = || {
        // A later commit must find its bytes written, so that it cannot run out of space.
        let zeroes = vec![0; usize::try_from(REGISTRY_BYTES).unwrap_or(0).saturating_sub(MAKING.len())];
        for (at, part) in
            [(0, &MAKING[..]), (MAKING.len() as u64, &zeroes), (COPIES[1], &bytes), (COPIES[0], &bytes)]
        {
            store.write_at(at, part)?;
            store.sync()?;
        }
        Ok(())
    };
    write().map_err(|source: std::io::Error| {
        Error::io(format!("cannot write the registry of {}", path.display()), source)
    })
}

impl Registry {
    /// Reads the registry of the medium at `path`, and brings both copies in line.
    ///
    /// # Errors
    /// `Unformatted`, `NewerVersion`, `Damaged`, `Io`. Nothing is written before all is found good.
    pub(super) fn open(
        store: &dyn Store,
        path: &Path,
        check: impl FnOnce(&Identity) -> Result<()>,
    ) -> Result<(Self, Table)> {
        let [a, b] = COPIES.map(|at| read_copy(store, path, at));
        let copies = [Image::decode(&a?), Image::decode(&b?)];
        for copy in &copies {
            if let Err(Flaw::Newer(found)) = copy {
                return Err(Error::NewerVersion { path: path.to_owned(), found: *found, known: VERSION });
            }
        }
        let (image, other) = match copies {
            [Ok(a), Ok(b)] if a.identity != b.identity || (a.generation == b.generation && a != b) => {
                return Err(Error::damaged(path, "the two copies of the registry contradict each other"));
            }
            [Ok(a), Ok(b)] if a.generation == b.generation => (a, None),
            [Ok(a), Ok(b)] if a.generation > b.generation => (a, Some((1, "it is older".to_owned()))),
            [Ok(_), Ok(b)] => (b, Some((0, "it is older".to_owned()))),
            // Formatting writes the first copy last, so a good second one with this beginning is not yet in use.
            [Err(Flaw::Making), _] => return Err(Error::Unformatted { path: path.to_owned() }),
            [Ok(a), Err(flaw)] => (a, Some((1, flaw.to_string()))),
            [Err(flaw), Ok(b)] => (b, Some((0, flaw.to_string()))),
            [Err(_), Err(_)] if is_blank(store, path)? => {
                return Err(Error::Unformatted { path: path.to_owned() });
            }
            [Err(a), Err(b)] => {
                return Err(Error::damaged(
                    path,
                    format!("first copy of the registry: {a}; second copy: {b}"),
                ));
            }
        };
        check(&image.identity)?;
        let io_error =
            |source| Error::io(format!("cannot repair the registry of {}", path.display()), source);
        // See the module's text: the good copy first.
        store.sync().map_err(io_error)?;
        if let Some((bad, why)) = other {
            tracing::warn!(medium = %path.display(), copy = bad, why, "rewriting one copy of the NV-RAM registry");
            store.write_at(COPIES[bad], &image.encode()).and_then(|()| store.sync()).map_err(io_error)?;
        }
        Ok((Self { identity: image.identity, generation: image.generation }, image.table))
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Returns when the table is durable in both copies. After an error it may be there or not.
    pub(super) fn commit(&mut self, store: &dyn Store, table: &Table) -> std::io::Result<()> {
        let generation = self
            .generation
            .checked_add(1)
            .ok_or_else(|| std::io::Error::other("the registry has been written as often as it can be"))?;
        let image = Image { identity: self.identity.clone(), generation, table: table.clone() };
        let bytes = image.encode();
        for at in COPIES {
            store.write_at(at, &bytes)?;
            store.sync()?;
        }
        self.generation = generation;
        Ok(())
    }
}

impl std::fmt::Display for Flaw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Making => f.write_str("it was being made"),
            Self::Newer(version) => write!(f, "its version is {version}"),
            Self::Bad(what) => f.write_str(what),
        }
    }
}
