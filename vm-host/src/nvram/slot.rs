// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A slot: a region that holds one saved state of a virtual machine's processors and devices.
//!
//! ```text
//! header │ caller's metadata ·· 32 KiB │ payload …
//! ```
//!
//! Little-endian:
//!
//! ```text
//! 0    [u8;8]   magic "vmSTATE\0"
//! 8    u32      version (1)
//! 12   u32      CRC-32C of `header length` bytes with this field as zero
//! 16   u32      header length: 96 and the metadata. The fields up to here are the same in every version
//! 20   u32      bytes of metadata
//! 24   [u8;16]  incarnation of the guest that was saved
//! 40   u64      generation
//! 48   i64      when it was saved, milliseconds since 1970
//! 56   u64      bytes of payload
//! 64   u64      CRC-64/NVME of the payload
//! 96   …        metadata, JSON of the caller's
//! ```
//!
//! **One barrier.** Header and payload are written and then made durable together, because the time that is left when
//! the power fails is short, and barriers are what takes it. Whatever arrived of them, in whatever order: the header
//! vouches for itself and for the payload, so a state is read whole or reads as torn. What was in the slot before is
//! lost in any case.

use std::io;

use crc_fast::{CrcAlgorithm, checksum};

use super::error::{Error, Result};
use super::registry::{crc32c, long, word};
use super::store::Store;

/// Where the payload begins: what a slot holds is this much less than its region.
pub const SLOT_HEADER_BYTES: u64 = 32 << 10;
/// The most metadata, in bytes.
pub const MAX_METADATA: usize = 16 << 10;

const MAGIC: [u8; 8] = *b"vmSTATE\0";
const VERSION: u32 = 1;
const FIXED: usize = 96;

/// What a saved state says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedHeader {
    /// Of the guest's run that was saved: a state counts for no other.
    pub incarnation: [u8; 16],
    /// The caller's number, to tell states of one incarnation apart.
    pub generation: u64,
    /// When, in milliseconds since 1970.
    pub saved_at_unix_ms: i64,
    /// JSON of the caller's, at most [`MAX_METADATA`] bytes; not looked into here.
    pub metadata: Vec<u8>,
}

/// A whole saved state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState {
    pub header: SavedHeader,
    pub payload: Vec<u8>,
}

/// What is in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotContent {
    /// Nothing was saved since the slot was made or cleared.
    Empty,
    /// Saving (or clearing) was interrupted, or bytes were damaged: there is nothing to resume from.
    Torn { why: String },
    /// A later release saved it.
    NewerVersion { found: u32, known: u32 },
    /// It is whole.
    Saved(SavedState),
}

/// An open slot. It does not keep the region from being freed: that is the caller's to order.
#[derive(Debug)]
pub struct Slot {
    store: Box<dyn Store>,
    bytes: u64,
}

impl Slot {
    pub(super) fn new(store: Box<dyn Store>, bytes: u64) -> Self {
        Self { store, bytes }
    }

    /// The largest payload, in bytes.
    pub fn capacity(&self) -> u64 {
        self.bytes.saturating_sub(SLOT_HEADER_BYTES)
    }

    /// Replaces what is in the slot; durable when it returns. One barrier.
    ///
    /// # Errors
    /// `Invalid` where metadata or payload are too large, and nothing has changed; after `Io` the slot reads as torn,
    /// or holds the old or the new state.
    pub fn commit(&self, header: &SavedHeader, payload: &[u8]) -> Result<()> {
        if header.metadata.len() > MAX_METADATA {
            return Err(Error::invalid(format!(
                "a saved state has {} bytes of metadata, at most {MAX_METADATA} are possible",
                header.metadata.len()
            )));
        }
        if payload.len() as u64 > self.capacity() {
            return Err(Error::invalid(format!(
                "the saved state has {} bytes, its slot holds {}",
                payload.len(),
                self.capacity()
            )));
        }
        let encoded = encode(header, payload);
        self.store
            .write_at(SLOT_HEADER_BYTES, payload)
            .and_then(|()| self.store.write_at(0, &encoded))
            .and_then(|()| self.store.sync())
            .map_err(|source| Error::io("cannot write the saved state", source))
    }

    /// Takes the state away, durably: it has been used, or must not be. One barrier.
    ///
    /// # Errors
    /// `Io`: what the slot holds is not known.
    pub fn clear(&self) -> Result<()> {
        self.store
            .write_at(0, &[0; FIXED])
            .and_then(|()| self.store.sync())
            .map_err(|source| Error::io("cannot clear the saved state", source))
    }

    /// Reads what is in the slot, and believes nothing that is not vouched for.
    ///
    /// # Errors
    /// `Io` only: damaged bytes are an answer.
    pub fn read(&self) -> Result<SlotContent> {
        self.read_inner().map_err(|source| Error::io("cannot read the saved state", source))
    }

    fn read_inner(&self) -> io::Result<SlotContent> {
        let torn = |why: &str| Ok(SlotContent::Torn { why: why.to_owned() });
        let mut header = vec![0; FIXED];
        self.store.read_at(0, &mut header)?;
        if header.iter().all(|&b| b == 0) {
            return Ok(SlotContent::Empty);
        }
        if !header.starts_with(&MAGIC) {
            return torn("it does not begin like a saved state");
        }
        let length = word(&header, 16) as usize;
        if length < FIXED || length as u64 > SLOT_HEADER_BYTES {
            return torn("its header's length is wrong");
        }
        header.resize(length, 0);
        self.store.read_at(FIXED as u64, &mut header[FIXED..])?;
        let crc = word(&header, 12);
        header[12..16].fill(0);
        if crc32c(&header) != crc {
            return torn("its header's checksum is wrong");
        }
        match word(&header, 8) {
            VERSION => {}
            found if found > VERSION => return Ok(SlotContent::NewerVersion { found, known: VERSION }),
            _ => return torn("its version is none"),
        }
        if length != FIXED + word(&header, 20) as usize {
            return torn("its header's length is wrong");
        }
        let bytes = long(&header, 56);
        let Some(len) = usize::try_from(bytes).ok().filter(|_| bytes <= self.capacity()) else {
            return torn("it is longer than its slot");
        };
        let mut payload = vec![0; len];
        self.store.read_at(SLOT_HEADER_BYTES, &mut payload)?;
        if checksum(CrcAlgorithm::Crc64Nvme, &payload) != long(&header, 64) {
            return torn("its payload's checksum is wrong");
        }
        let mut incarnation = [0; 16];
        incarnation.copy_from_slice(&header[24..40]);
        let metadata = header.split_off(FIXED);
        Ok(SlotContent::Saved(SavedState {
            header: SavedHeader {
                incarnation,
                generation: long(&header, 40),
                saved_at_unix_ms: i64::from_le_bytes(long(&header, 48).to_le_bytes()),
                metadata,
            },
            payload,
        }))
    }
}

fn encode(header: &SavedHeader, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; FIXED];
    bytes.extend_from_slice(&header.metadata);
    // Both are at most MAX_METADATA and FIXED.
    let [length, metadata] =
        [bytes.len(), header.metadata.len()].map(|len| u32::try_from(len).unwrap_or(0).to_le_bytes());
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &MAGIC);
    put(8, &VERSION.to_le_bytes());
    put(16, &length);
    put(20, &metadata);
    put(24, &header.incarnation);
    put(40, &header.generation.to_le_bytes());
    put(48, &header.saved_at_unix_ms.to_le_bytes());
    put(56, &(payload.len() as u64).to_le_bytes());
    put(64, &checksum(CrcAlgorithm::Crc64Nvme, payload).to_le_bytes());
    let crc = crc32c(&bytes);
    bytes[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes
}
