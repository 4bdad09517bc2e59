// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Parses block requests (virtio 1.3, §5.2.6): bytes in, an [`Operation`] that needs no further check out.
//!
//! Pure: knows neither where the bytes came from nor what the operation does to a vSSD.

use vssd_protocol::guest::{self, RequestType};
use vssd_protocol::units::{ByteOffset, SECTOR_SIZE, Sector};

/// Bytes of a discard or write-zeroes segment.
pub const SEGMENT_LEN: usize = 16;
/// Bytes of a GET_ID answer.
pub const ID_LEN: usize = 20;
/// Bytes of a segment and segments of a read or write at most: together 8 MiB, about a millisecond in which nobody else is served.
pub const SIZE_MAX: u32 = 64 << 10;
pub const SEG_MAX: u32 = 126;
/// Sectors in one discard: 128 MiB, of which each block is looked up and perhaps given back.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 18;
/// Sectors in one write-zeroes request: 1 MiB. A request of 16 bytes makes as much work as a write of that size, and a queue full of
/// them is what other guests on the medium wait for.
pub const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 11;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const WRITE_ZEROES_F_UNMAP: u32 = 1;

/// What the device offers and the driver accepted, as far as it decides about requests.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// One past the last byte that can be addressed.
    pub total_bytes: u64,
    pub read_only: bool,
    pub discard: bool,
    pub write_zeroes: bool,
}

/// A range of whole sectors within the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub offset: ByteOffset,
    pub len: u64,
}

/// A valid request. Lengths agree with the memory that the driver provided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read(Extent),
    Write(Extent),
    Flush,
    /// The segment follows in the readable part: [`parse_discard`].
    Discard,
    /// The segment follows in the readable part: [`parse_write_zeroes`].
    WriteZeroes,
    GetId,
    Guest(RequestType),
}

/// Why a request is refused, which decides its status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reject {
    #[error("request type {0:#x} is not offered")]
    Unsupported(u32),
    #[error("{0}")]
    Malformed(&'static str),
    #[error("sectors from {sector} for {len} bytes are not within {total} bytes")]
    OutOfRange { sector: u64, len: u64, total: u64 },
    #[error("the device is read-only")]
    ReadOnly,
}

/// Parses the header, given how many bytes follow it and how many the device may write before the status byte.
pub fn parse(
    header: [u8; guest::BLK_HEADER_LEN],
    readable: u32,
    writable: u32,
    limits: &Limits,
) -> Result<Operation, Reject> {
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes([
        header[8], header[9], header[10], header[11], header[12], header[13], header[14], header[15],
    ]);
    let write_allowed = || if limits.read_only { Err(Reject::ReadOnly) } else { Ok(()) };
    match kind {
        T_IN if readable > 0 => Err(Reject::Malformed("read with data to the device")),
        T_IN => data(sector, writable, limits).map(Operation::Read),
        T_OUT if writable > 0 => Err(Reject::Malformed("write with data from the device")),
        T_OUT => {
            write_allowed()?;
            data(sector, readable, limits).map(Operation::Write)
        }
        T_FLUSH => Ok(Operation::Flush),
        T_GET_ID if (writable as usize) < ID_LEN => Err(Reject::Malformed("less than 20 bytes for the id")),
        T_GET_ID => Ok(Operation::GetId),
        T_DISCARD | T_WRITE_ZEROES => {
            let (offered, operation) = if kind == T_DISCARD {
                (limits.discard, Operation::Discard)
            } else {
                (limits.write_zeroes, Operation::WriteZeroes)
            };
            if !offered {
                return Err(Reject::Unsupported(kind));
            }
            write_allowed()?;
            // max_discard_seg and max_write_zeroes_seg are 1.
            if readable as usize != SEGMENT_LEN {
                return Err(Reject::Malformed("not exactly one segment"));
            }
            Ok(operation)
        }
        other => match RequestType::from_wire(other) {
            Some(kind) => guest_request(kind, readable, writable),
            None => Err(Reject::Unsupported(other)),
        },
    }
}

fn guest_request(kind: RequestType, readable: u32, writable: u32) -> Result<Operation, Reject> {
    if readable as usize > guest::MAX_REQUEST_LEN {
        return Err(Reject::Malformed("guest-channel request longer than any can be"));
    }
    if (writable as usize) < guest::min_response_len(kind, 0) {
        return Err(Reject::Malformed("no room for the guest-channel response"));
    }
    Ok(Operation::Guest(kind))
}

fn data(sector: u64, len: u32, limits: &Limits) -> Result<Extent, Reject> {
    if len > SEG_MAX * SIZE_MAX {
        return Err(Reject::Malformed("more data than seg_max segments of size_max bytes"));
    }
    extent(sector, u64::from(len), limits)
}

fn extent(sector: u64, len: u64, limits: &Limits) -> Result<Extent, Reject> {
    if !len.is_multiple_of(SECTOR_SIZE) {
        return Err(Reject::Malformed("data is not whole sectors"));
    }
    let out_of_range = Reject::OutOfRange { sector, len, total: limits.total_bytes };
    let offset = Sector(sector).to_offset().ok_or(out_of_range)?;
    match offset.0.checked_add(len) {
        Some(end) if end <= limits.total_bytes => Ok(Extent { offset, len }),
        _ => Err(out_of_range),
    }
}

/// Parses the segment of a discard.
pub fn parse_discard(segment: [u8; SEGMENT_LEN], limits: &Limits) -> Result<Extent, Reject> {
    let (sector, sectors, flags) = fields(segment);
    // The unmap flag has no meaning for discard and MUST be zero (§5.2.6.2).
    if flags != 0 {
        return Err(Reject::Unsupported(T_DISCARD));
    }
    if sectors > MAX_DISCARD_SECTORS {
        return Err(Reject::Malformed("more sectors to discard than max_discard_sectors"));
    }
    extent(sector, u64::from(sectors) * SECTOR_SIZE, limits)
}

/// Parses the segment of a write-zeroes: where, and whether blocks may be given back.
pub fn parse_write_zeroes(segment: [u8; SEGMENT_LEN], limits: &Limits) -> Result<(Extent, bool), Reject> {
    let (sector, sectors, flags) = fields(segment);
    if flags & !WRITE_ZEROES_F_UNMAP != 0 {
        return Err(Reject::Unsupported(T_WRITE_ZEROES));
    }
    if sectors > MAX_WRITE_ZEROES_SECTORS {
        return Err(Reject::Malformed("more sectors to zero than max_write_zeroes_sectors"));
    }
    let extent = extent(sector, u64::from(sectors) * SECTOR_SIZE, limits)?;
    Ok((extent, flags & WRITE_ZEROES_F_UNMAP != 0))
}

fn fields(s: [u8; SEGMENT_LEN]) -> (u64, u32, u32) {
    (
        u64::from_le_bytes([s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]]),
        u32::from_le_bytes([s[8], s[9], s[10], s[11]]),
        u32::from_le_bytes([s[12], s[13], s[14], s[15]]),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits =
        Limits { total_bytes: 1 << 20, read_only: false, discard: true, write_zeroes: true };

    fn header(kind: u32, sector: u64) -> [u8; 16] {
        let mut h = [0; 16];
        h[..4].copy_from_slice(&kind.to_le_bytes());
        h[8..].copy_from_slice(&sector.to_le_bytes());
        h
    }

    fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
        let mut s = [0; 16];
        s[..8].copy_from_slice(&sector.to_le_bytes());
        s[8..12].copy_from_slice(&sectors.to_le_bytes());
        s[12..].copy_from_slice(&flags.to_le_bytes());
        s
    }

    #[test]
    fn read_up_to_the_last_sector_is_accepted_and_past_it_refused() {
        let last = (1 << 20) / 512 - 1;
        let extent = Extent { offset: ByteOffset(last * 512), len: 512 };
        assert_eq!(parse(header(T_IN, last), 0, 512, &LIMITS), Ok(Operation::Read(extent)));
        assert!(matches!(parse(header(T_IN, last), 0, 1024, &LIMITS), Err(Reject::OutOfRange { .. })));
        assert!(matches!(parse(header(T_IN, u64::MAX), 0, 512, &LIMITS), Err(Reject::OutOfRange { .. })));
        assert!(matches!(
            parse(header(T_IN, u64::MAX / 512), 0, 512, &LIMITS),
            Err(Reject::OutOfRange { .. })
        ));
    }

    #[test]
    fn types_that_are_not_offered_are_unsupported() {
        let read_only = Limits { read_only: true, discard: false, write_zeroes: false, ..LIMITS };
        for kind in [2, 3, 5, 10, 12, 14, 0x8000_0000, 0xffff_ffff, 0x5653_0000, 0x5653_0009] {
            assert_eq!(parse(header(kind, 0), 0, 0, &LIMITS), Err(Reject::Unsupported(kind)));
        }
        assert_eq!(parse(header(T_DISCARD, 0), 16, 0, &read_only), Err(Reject::Unsupported(T_DISCARD)));
        assert_eq!(parse(header(T_OUT, 0), 512, 0, &read_only), Err(Reject::ReadOnly));
    }

    #[test]
    fn guest_channel_request_without_room_for_its_answer_is_malformed() {
        let hello = RequestType::Hello as u32;
        assert!(matches!(parse(header(hello, 0), 48, 95, &LIMITS), Err(Reject::Malformed(_))));
        assert_eq!(parse(header(hello, 0), 48, 96, &LIMITS), Ok(Operation::Guest(RequestType::Hello)));
        assert!(matches!(parse(header(hello, 0), u32::MAX, 96, &LIMITS), Err(Reject::Malformed(_))));
    }

    #[test]
    fn unknown_segment_flags_are_unsupported() {
        assert!(matches!(parse_discard(segment(0, 8, 1), &LIMITS), Err(Reject::Unsupported(_))));
        assert!(matches!(parse_write_zeroes(segment(0, 8, 2), &LIMITS), Err(Reject::Unsupported(_))));
        let extent = Extent { offset: ByteOffset(0), len: 4096 };
        assert_eq!(parse_write_zeroes(segment(0, 8, 1), &LIMITS), Ok((extent, true)));
    }

    proptest! {
        /// Whatever the bytes: an accepted extent is whole sectors within the device.
        #[test]
        fn accepted_extents_are_within_the_device(
            header: [u8; 16],
            kind in prop_oneof![Just(0u32), Just(1), Just(11), Just(13), any::<u32>()],
            readable: u32,
            writable: u32,
            segment: [u8; 16],
        ) {
            let mut header = header;
            header[..4].copy_from_slice(&kind.to_le_bytes());
            let ok = |e: Extent| e.len.is_multiple_of(512) && e.offset.0.is_multiple_of(512) && e.offset.0 + e.len <= LIMITS.total_bytes;
            match parse(header, readable, writable, &LIMITS) {
                Ok(Operation::Read(e)) => prop_assert!(ok(e) && e.len == u64::from(writable)),
                Ok(Operation::Write(e)) => prop_assert!(ok(e) && e.len == u64::from(readable)),
                _ => {}
            }
            prop_assert!(parse_discard(segment, &LIMITS).is_ok_and(ok) || parse_discard(segment, &LIMITS).is_err());
            if let Ok((e, _)) = parse_write_zeroes(segment, &LIMITS) {
                prop_assert!(ok(e));
            }
        }
    }
}
