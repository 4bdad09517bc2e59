// SPDX-License-Identifier: Apache-2.0 OR MIT

//! For the fuzz targets: what is read of a saved guest, and of its agent.

use std::io::{self, Cursor};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::save::{Found, Origin, judge};
use super::{clock, swap};
use crate::nvram::{RegionId, SavedState, SlotContent};
use crate::record::Incarnation;

/// What of memory has a checksum of its own.
pub const PIECE: usize = swap::PIECE;

/// An image of `memory` and what was saved with it.
///
/// # Errors
/// None is known.
pub fn write_image(memory: &[u8], saved: &SavedState) -> io::Result<Vec<u8>> {
    let mut out = Cursor::new(Vec::new());
    swap::write_image(&mut out, memory, saved, |_, _| Ok(()))?;
    Ok(out.into_inner())
}

/// Reads an image into `memory`.
///
/// # Errors
/// Where it is not whole.
pub fn read_image(image: &[u8], memory: &mut [u8]) -> io::Result<SavedState> {
    swap::read_image(&mut &*image, image.len() as u64, memory, |_, _| Ok(()))
}

/// The state that the guest of this run, kind of machine and memory would go on from.
pub fn usable(
    content: SlotContent,
    incarnation: [u8; 16],
    [name, machine, version]: [&str; 3],
    memory_bytes: u64,
    region: u64,
) -> Option<SavedState> {
    let expected = Origin {
        name: name.to_owned(),
        machine: machine.to_owned(),
        version: version.to_owned(),
        memory_bytes,
        memory_region: RegionId(region),
    };
    match judge(content, Incarnation(incarnation), &expected) {
        Found::State(saved) => Some(*saved),
        Found::Nothing(_) | Found::Unusable(_) => None,
    }
}

/// Whether a guest's agent, asked under the number `id`, says that it has set the clock.
pub fn sets_clock(agent: UnixStream, limit: Duration, id: i64) -> bool {
    clock::tell(agent, limit, Instant::now() + limit, id).is_ok()
}
