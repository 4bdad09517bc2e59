// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A front-end's messages with descriptors, over a real socket into a session's message loop, with a worker behind it.
//!
//! The input is a list of messages: sound ones with bytes changed, or raw ones. Oracles: no panic, the session ends once the socket does, and
//! no descriptor is left open.

#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has failed")]

use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vssd_backend::device::DeviceEvent;
use vssd_backend::device::config_space::Geometry;
use vssd_backend::sandbox::Sandbox;
use vssd_backend::vhost_user::seat::Shared;
use vssd_backend::vhost_user::session::{self, SessionContext};
use vssd_backend::vhost_user::worker::Workers;
use vssd_fuzz::queue::MEMORY;
use vssd_fuzz::{BLOCK, Input, device, event, medium, memory_file, open, open_descriptors, setup, vssd};
use vssd_pool::store::Store;

const MAX_MESSAGES: usize = 48;
const VERSION: u32 = 1;
const USER: u64 = 0x7f00_0000_0000;

struct Backend {
    context: SessionContext,
    _workers: Workers,
}

fn backend() -> &'static Backend {
    static BACKEND: OnceLock<Backend> = OnceLock::new();
    BACKEND.get_or_init(|| {
        let pool = open(medium(64) as Arc<dyn Store>, true).unwrap();
        let vssd = vssd(&pool, "one", 32);
        let (device, events) = device(Arc::clone(&vssd));
        // An owner that refuses everything, at once.
        std::thread::spawn(move || {
            for event in events {
                if let DeviceEvent::Quiesce { done, .. } = event {
                    let _ = done.send(());
                }
            }
        });
        let workers = Workers::spawn(&pool, 1, Duration::ZERO, &Sandbox::off()).unwrap();
        let block_size = vssd.block_size();
        let geometry = Geometry { block_size, logical_block_size: 512, queues: 2, read_only: false };
        let shared = Shared::default();
        shared.capacity.store(u64::from(BLOCK), Ordering::Relaxed);
        let context = SessionContext {
            device,
            shared: Arc::new(shared),
            workers: workers.handles().into(),
            geometry,
            next_key: Arc::new(AtomicU32::new(0)),
        };
        Backend { context, _workers: workers }
    })
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A sound message: its number, its payload and what descriptors belong to it.
fn message(choice: u8, input: &mut Input<'_>) -> (u32, Vec<u8>, &'static [Fd]) {
    let queue = u64::from(input.u8() & 1);
    let memory = MEMORY as u64;
    match choice {
        0 => (1, Vec::new(), &[]),
        1 => (2, words(&[1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 0x1 << 26 | 0x6e76]), &[]),
        2 => (3, Vec::new(), &[]),
        3 => (5, words(&[1, 0, memory, USER, 0]), &[Fd::Memory]),
        4 => (37, words(&[0, memory * (1 + queue), memory, USER + memory * (1 + queue), 0]), &[Fd::Memory]),
        5 => (38, words(&[0, memory * (1 + queue), memory, USER + memory * (1 + queue), 0]), &[]),
        6 => (8, words(&[queue | 16 << 32]), &[]),
        7 => (9, words(&[queue, USER, USER + 0x600, USER + 0x400, 0]), &[]),
        8 => (10, words(&[queue]), &[]),
        9 => (11, words(&[queue]), &[]),
        10 => (12, words(&[queue]), &[Fd::Event]),
        11 => (13, words(&[queue]), &[Fd::Event]),
        12 => (14, words(&[queue]), &[Fd::Event]),
        13 => (15, Vec::new(), &[]),
        14 => (16, words(&[0xffff]), &[]),
        15 => (17, Vec::new(), &[]),
        16 => (18, words(&[queue | 1 << 32]), &[]),
        17 => (21, Vec::new(), &[Fd::Socket]),
        18 => {
            let mut body = words(&[60]);
            body[4..].copy_from_slice(&60u32.to_le_bytes());
            body.extend([0; 64]);
            (24, body, &[])
        }
        19 => (31, words(&[0, 0, 2 | 16 << 16]), &[]),
        20 => (32, words(&[1024, 0, 2 | 16 << 16]), &[Fd::Memory]),
        21 => (34, Vec::new(), &[]),
        22 => (36, Vec::new(), &[]),
        23 => (39, words(&[u64::from(input.u8())]), &[]),
        24 => (6, words(&[memory, 0]), &[Fd::Memory]),
        25 => (4, Vec::new(), &[]),
        _ => (u32::from(input.u8() % 48), input.bytes(usize::from(choice)).to_vec(), &[]),
    }
}

#[derive(Clone, Copy)]
enum Fd {
    Memory,
    Event,
    Socket,
}

fn descriptor(kind: Fd) -> OwnedFd {
    match kind {
        Fd::Memory => memory_file(&[], MEMORY).into(),
        Fd::Event => event(),
        Fd::Socket => UnixStream::pair().unwrap().0.into(),
    }
}

fn send(socket: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> bool {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [std::mem::MaybeUninit::uninit(); 256];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags).is_ok()
}

fuzz_target!(|data: &[u8]| {
    setup();
    let backend = backend();
    let before = open_descriptors();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut input = Input(data);
    let mut messages = 0;
    while !input.is_empty() && messages < MAX_MESSAGES {
        messages += 1;
        let choice = input.u8();
        let (mut code, mut body, fds) = message(choice & 31, &mut input);
        let mut fds: Vec<OwnedFd> = fds.iter().map(|kind| descriptor(*kind)).collect();
        let mut len = u32::try_from(body.len()).unwrap();
        let mut flags = VERSION | if choice & 32 == 0 { 0 } else { 8 };
        if choice & 64 != 0 {
            // A byte of the payload is another.
            let at = usize::from(input.u8());
            let byte = input.u8();
            if let Some(to) = body.get_mut(at) {
                *to = byte;
            }
        }
        if choice & 128 != 0 {
            match input.u8() % 6 {
                0 => len = input.u32(),
                1 => flags = input.u32(),
                2 => code = input.u32(),
                3 => fds.extend((0..input.u8() % 40).map(|_| descriptor(Fd::Event))),
                4 => fds.clear(),
                _ => fds.push(descriptor(Fd::Memory)),
            }
        }
        let mut bytes: Vec<u8> = [code, flags, len].into_iter().flat_map(u32::to_le_bytes).collect();
        bytes.append(&mut body);
        if !send(&ours, &bytes, &fds) {
            break;
        }
    }
    ours.shutdown(std::net::Shutdown::Write).unwrap();
    // All is in the socket, so the session runs to its end here.
    session::serve(backend.context.clone(), theirs);
    let mut answers = Vec::new();
    ours.set_nonblocking(true).unwrap();
    let _ = (&ours).read_to_end(&mut answers);
    drop(ours);
    // A worker lets go of a queue a moment after it stopped.
    let mut waits = 0;
    while open_descriptors() > before {
        waits += 1;
        assert!(waits < 500, "{} descriptors before, {} after", before, open_descriptors());
        std::thread::sleep(Duration::from_millis(1));
    }
});
