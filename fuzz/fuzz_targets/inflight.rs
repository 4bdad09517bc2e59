// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The record of requests in flight, as a front-end may have left it, and the replay of what it lists.
//!
//! Oracles: no panic; what is listed is within the ring and listed once; a second recovery lists the same; the queue ends.

#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has failed")]

use libfuzzer_sys::fuzz_target;
use vssd_backend::vhost_user::inflight::InflightRegion;
use vssd_fuzz::queue::{AVAIL, DESC, FREE, MEMORY, SIZE, USED, serve};
use vssd_fuzz::{Input, memory_file, setup};
use vssd_pool::sigbus::Alarm;

fuzz_target!(|data: &[u8]| {
    setup();
    let mut input = Input(data);
    let (used, next_avail, avail) = (input.u16(), input.u16(), input.u16());
    let len = usize::try_from(InflightRegion::len(1, SIZE)).unwrap();
    let mut region = vec![0; len];
    let raw = input.u8() & 3 == 0;
    if raw {
        let bytes = input.bytes(len);
        region[..bytes.len()].copy_from_slice(bytes);
    } else {
        // A sound header, and entries that are nearly so.
        region[8] = 1;
        region[10..12].copy_from_slice(&SIZE.to_le_bytes());
        region[12..14].copy_from_slice(&u16::from(input.u8() % 20).to_le_bytes());
        region[14..16].copy_from_slice(&used.wrapping_sub(u16::from(input.u8() % 20)).to_le_bytes());
        for head in 0..usize::from(SIZE) {
            let at = 16 + 16 * head;
            region[at] = input.u8() & 1;
            region[at + 6] = input.u8() % 20;
            region[at + 8] = input.u8();
        }
    }
    let file = memory_file(&region, len);
    let open = || {
        let alarm = Alarm::new().unwrap();
        InflightRegion::open(file.try_clone().unwrap(), 0, len as u64, (1, SIZE), &alarm).unwrap()
    };
    let heads = open().queue(0, SIZE).unwrap().recover(used);
    assert!(heads.len() <= usize::from(SIZE) && heads.iter().all(|head| *head < SIZE));
    let mut sorted = heads.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), heads.len(), "listed twice");
    assert_eq!(open().queue(0, SIZE).unwrap().recover(used), heads, "a second recovery differs");

    let mut memory = vec![0; MEMORY];
    memory[USED as usize + 2..][..2].copy_from_slice(&used.to_le_bytes());
    memory[AVAIL as usize + 2..][..2].copy_from_slice(&avail.to_le_bytes());
    // Every head leads to a flush; what the rest of the input says lies over that.
    for n in 0..usize::from(SIZE) {
        let (head, status) = (FREE + 64 * n, FREE + 64 * n + 32);
        let at = DESC as usize + 16 * n;
        memory[AVAIL as usize + 4 + 2 * n] = u8::try_from(n).unwrap();
        memory[head] = 4;
        let table = head + 2048;
        memory[at..at + 8].copy_from_slice(&(table as u64).to_le_bytes());
        memory[at + 8] = 32;
        memory[at + 12] = 4;
        memory[table..table + 8].copy_from_slice(&(head as u64).to_le_bytes());
        memory[table + 8] = 16;
        memory[table + 12] = 1;
        memory[table + 14] = 1;
        memory[table + 16..table + 24].copy_from_slice(&(status as u64).to_le_bytes());
        memory[table + 24] = 1;
        memory[table + 28] = 2;
    }
    let bytes = input.0;
    let room = &mut memory[FREE..];
    for (at, byte) in bytes.chunks_exact(3).map(|c| (usize::from(u16::from_le_bytes([c[0], c[1]])), c[2])) {
        let at = at % room.len();
        room[at] = byte;
    }
    serve(&memory, open().queue(0, SIZE), false, next_avail);
});
