// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the targets share: a pool in memory, guest memory that can be looked at from outside, and a reader of the fuzzer's bytes.
//!
//! A panic of any thread ends the process, so that none is missed.

#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has failed")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Once, mpsc};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use vssd_backend::device::{DeviceEvent, OwnerHandle, serial};
use vssd_backend::vhost_user::memory::{GuestMemory, RegionSpec};
use vssd_backend::vhost_user::queue::{DeviceContext, NoticeCell};
use vssd_pool::sigbus::Alarm;
use vssd_pool::store::{MemStore, Store};
use vssd_pool::{BlockSize, CreateOptions, MediumKind, OpenOptions, Pool, VssdAttrs, VssdSpec};

pub mod queue;
pub mod watched;

pub const BLOCK: u32 = 4096;

/// The fuzzer's bytes, taken from the front; zeroes once there are no more.
#[derive(Clone, Debug)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (head, tail) = self.0.split_at(len.min(self.0.len()));
        self.0 = tail;
        head
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}

/// Ends the process when any thread panics.
pub fn setup() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            before(info);
            std::process::abort();
        }));
    });
}

/// An NV-RAM medium in memory with a pool on it.
pub fn medium(blocks: usize) -> Arc<MemStore> {
    let size = (2 << 20) + blocks * BLOCK as usize;
    let store = Arc::new(MemStore::new(MediumKind::Nvram, size));
    let mut options = CreateOptions::new("fuzz", Vec::new());
    options.block_size = BlockSize::new(BLOCK).unwrap();
    Pool::create_on(&options, &[Arc::clone(&store) as Arc<dyn Store>]).unwrap();
    store
}

pub fn open(store: Arc<dyn Store>, threads: bool) -> vssd_pool::Result<Arc<Pool>> {
    let mut options = OpenOptions::new(Vec::<std::path::PathBuf>::new());
    options.threads = threads;
    options.space_wait = Duration::from_millis(1);
    Pool::open_on(&options, vec![store])
}

/// A vSSD, half of it plugged.
pub fn vssd(pool: &Arc<Pool>, name: &str, blocks: u32) -> Arc<vssd_pool::Vssd> {
    let initial_blocks = blocks / 2;
    let attrs = VssdAttrs { requested_blocks: initial_blocks, min_blocks: 1, ..VssdAttrs::default() };
    let spec = VssdSpec { name: name.into(), max_blocks: blocks, initial_blocks, attrs };
    pool.create_vssd(&spec).unwrap()
}

/// What queues of a vSSD share, and where their news for the owner arrive.
pub fn device(vssd: Arc<vssd_pool::Vssd>) -> (Arc<DeviceContext>, mpsc::Receiver<DeviceEvent>) {
    let (owner, events, _wake) = OwnerHandle::new().unwrap();
    let mut id = [0; 20];
    let text = serial(vssd.name());
    id[..text.len()].copy_from_slice(text.as_bytes());
    let device = DeviceContext {
        id: vssd.id(),
        vssd,
        serial: id,
        logical_block: 512,
        notice: NoticeCell::default(),
        owner,
        errors: Default::default(),
    };
    (Arc::new(device), events)
}

/// Memory that the target shares with the device.
pub fn memory_file(bytes: &[u8], size: usize) -> File {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(size as u64).unwrap();
    write(&file, 0, bytes);
    file
}

pub fn write(file: &File, at: u64, bytes: &[u8]) {
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::io::pwrite(file, &bytes[done..], at + done as u64).unwrap();
    }
}

pub fn read(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        let n = rustix::io::pread(file, &mut bytes[done..], at + done as u64).unwrap();
        assert!(n > 0, "memory is shorter than it was made");
        done += n;
    }
    bytes
}

/// Two adjacent halves of one file, so that buffers can lie across a seam.
pub fn guest_memory(file: &File, size: usize) -> Arc<GuestMemory> {
    let half = size as u64 / 2;
    let region = |guest| RegionSpec { guest, size: half, user: guest, file_offset: guest };
    let memory = GuestMemory::new(Alarm::new().unwrap())
        .with_region(region(0), file.try_clone().unwrap())
        .unwrap()
        .with_region(region(half), file.try_clone().unwrap())
        .unwrap();
    Arc::new(memory)
}

pub fn event() -> OwnedFd {
    use rustix::event::{EventfdFlags, eventfd};
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Descriptors that this process has open.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
