// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Chains and block requests over guest memory, through the queue to a pool.
//!
//! The input names descriptors in a short form (so that most chains are nearly right), then scatters raw bytes. Oracles: no panic; every request
//! taken is answered; no byte is written that no descriptor offered; nothing past guest memory.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vssd_fuzz::queue::{AVAIL, DESC, FREE, MEMORY, SIZE, serve};
use vssd_fuzz::{Input, setup};

const KINDS: [u32; 15] = [
    0,
    1,
    4,
    8,
    11,
    13,
    0x5653_0001,
    0x5653_0002,
    0x5653_0003,
    0x5653_0004,
    0x5653_0005,
    0x5653_0006,
    0x5653_0007,
    2,
    0xffff_ffff,
];

fn put(memory: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(to) = at.checked_add(bytes.len()).and_then(|end| memory.get_mut(at..end)) {
        to.copy_from_slice(bytes);
    }
}

/// A descriptor; addresses are in steps of 16, lengths of any kind.
fn descriptor(input: &mut Input<'_>) -> [u8; 16] {
    let shape = input.u8();
    let addr = match shape >> 6 {
        0 => FREE as u64 + u64::from(input.u8()) * 16,
        1 => u64::from(input.u16()),
        // Across the seam, to the end, beyond.
        2 => MEMORY as u64 / 2 - 8 + u64::from(input.u8()),
        _ => input.u64(),
    };
    let len = match shape >> 4 & 3 {
        0 => 16,
        1 => u32::from(input.u8()),
        2 => u32::from(input.u8()) * 512,
        _ => input.u32(),
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12] = shape & 7;
    bytes[14..].copy_from_slice(&u16::from(input.u8() % 20).to_le_bytes());
    bytes
}

fuzz_target!(|data: &[u8]| {
    setup();
    let mut input = Input(data);
    let mut memory = vec![0x3c; MEMORY];
    memory[..FREE].fill(0);
    let options = input.u8();
    let heads = u16::from(input.u8() % 20);
    let next_avail = if options & 2 == 0 { 0 } else { 0xfffc };
    put(&mut memory, AVAIL as usize + 2, &heads.wrapping_add(next_avail).to_le_bytes());
    for n in 0..usize::from(SIZE) {
        put(&mut memory, AVAIL as usize + 4 + 2 * n, &u16::from(input.u8() % 17).to_le_bytes());
    }
    for n in 0..usize::from(options >> 4) {
        let bytes = descriptor(&mut input);
        put(&mut memory, DESC as usize + 16 * n, &bytes);
    }
    while !input.is_empty() {
        let at = usize::from(input.u16());
        match input.u8() {
            // A request's header.
            choice @ 0..=99 => {
                let mut header = [0; 16];
                header[..4].copy_from_slice(&KINDS[usize::from(choice) % KINDS.len()].to_le_bytes());
                header[8..].copy_from_slice(
                    &if choice < 80 { u64::from(input.u8()) } else { input.u64() }.to_le_bytes(),
                );
                put(&mut memory, FREE + at % 256 * 16, &header);
            }
            // A table's entry.
            100..=199 => {
                let bytes = descriptor(&mut input);
                put(&mut memory, FREE + at % 256 * 16, &bytes);
            }
            choice => {
                let bytes = input.bytes(usize::from(choice - 200)).to_vec();
                put(&mut memory, at, &bytes);
            }
        }
    }
    serve(&memory, None, options & 1 == 1, next_avail);
});
