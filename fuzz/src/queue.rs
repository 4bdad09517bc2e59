// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One queue over memory that the fuzzer has written, served in this thread, and what must hold afterwards.

use std::cell::RefCell;
use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use vssd_backend::device::request::Limits;
use vssd_backend::device::{DeviceEvent, ReplySink};
use vssd_backend::vhost_user::inflight::InflightQueue;
use vssd_backend::vhost_user::memory::GuestMemory;
use vssd_backend::vhost_user::queue::{ActiveQueue, DeviceContext, QueueStart, split_token};
use vssd_backend::vhost_user::ring::{Ring, RingSpec};
use vssd_pool::store::Store;
use vssd_pool::{Lane, Pool};

use crate::{device, event, guest_memory, medium, open, read, vssd};

/// Guest memory; behind it lies a page that is no guest's.
pub const MEMORY: usize = 64 << 10;
const GUARD: usize = 4096;
pub const SIZE: u16 = 16;
pub const DESC: u64 = 0;
pub const AVAIL: u64 = 0x400;
pub const USED: u64 = 0x600;
/// From here on: tables, headers, buffers.
pub const FREE: usize = 0x800;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

struct Backend {
    pool: Arc<Pool>,
    device: Arc<DeviceContext>,
    events: Mutex<std::sync::mpsc::Receiver<DeviceEvent>>,
}

fn backend() -> &'static Backend {
    static BACKEND: OnceLock<Backend> = OnceLock::new();
    BACKEND.get_or_init(|| {
        let pool = open(medium(64) as Arc<dyn Store>, true).unwrap();
        let (device, events) = device(vssd(&pool, "one", 32));
        Backend { pool, device, events: Mutex::new(events) }
    })
}

/// The owner's answers come to the queue at once.
#[derive(Default)]
struct Sink(Mutex<Vec<(u64, Vec<u8>)>>);

impl ReplySink for Sink {
    fn complete(&self, ticket: u64, response: Vec<u8>) {
        self.0.lock().unwrap().push((ticket, response));
    }
}

fn u16_at(memory: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([memory[at], memory[at + 1]])
}

/// Where bytes may be written; in order and apart. Looked at by range, for code that looks at each byte takes longer under a fuzzer's
/// instrumentation than what it checks.
struct Offered(Vec<Range<usize>>);

impl Offered {
    /// What a driver offered in any descriptor, chained or not, and the used ring.
    fn new(memory: &[u8]) -> Self {
        let used = USED as usize;
        let mut may = std::iter::once(used..used + 6 + 8 * usize::from(SIZE)).collect::<Vec<_>>();
        let mut offer = |bytes: &[u8]| -> Option<Range<usize>> {
            let (range, flags) = descriptor(bytes)?;
            if flags & F_WRITE != 0 && !range.is_empty() {
                may.push(range.clone());
            }
            (flags & F_INDIRECT != 0).then_some(range)
        };
        for entry in memory[DESC as usize..].chunks_exact(16).take(usize::from(SIZE)) {
            // A chain takes no more of a table than the queue is long, but it may begin its steps anywhere.
            if let Some(table) = offer(entry) {
                for entry in memory[table].chunks_exact(16) {
                    offer(entry);
                }
            }
        }
        may.sort_unstable_by_key(|range| range.start);
        may.dedup_by(|next, last| {
            let joined = next.start <= last.end;
            if joined {
                last.end = last.end.max(next.end);
            }
            joined
        });
        Self(may)
    }

    fn touches(&self, range: &Range<usize>) -> bool {
        !range.is_empty()
            && self.0.iter().any(|offered| offered.start < range.end && range.start < offered.end)
    }

    /// What nobody offered.
    fn gaps(&self) -> impl Iterator<Item = Range<usize>> {
        let starts = std::iter::once(0).chain(self.0.iter().map(|offered| offered.end));
        let ends = self.0.iter().map(|offered| offered.start).chain(std::iter::once(MEMORY));
        starts.zip(ends).map(|(start, end)| start..end)
    }
}

/// Which part of the guest's memory a descriptor names, and its flags; `None` outside.
fn descriptor(bytes: &[u8]) -> Option<(Range<usize>, u16)> {
    let addr = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().ok()?)).ok()?;
    let len = u32::from_le_bytes(bytes[8..12].try_into().ok()?) as usize;
    let end = addr.checked_add(len)?.min(MEMORY);
    (addr < MEMORY).then_some((addr..end, u16_at(bytes, 12)))
}

/// Serves what the driver made available in `memory`, and looks at every byte afterwards.
pub fn serve(memory: &[u8], inflight: Option<InflightQueue>, event_idx: bool, next_avail: u16) {
    let backend = backend();
    assert_eq!(memory.len(), MEMORY);
    let before = memory;
    // Its mapping is kept: to make one takes longer than to serve a queue.
    thread_local!(static GUEST: (File, Arc<GuestMemory>) = {
        let file = crate::memory_file(&[], MEMORY + GUARD);
        let memory = guest_memory(&file, MEMORY);
        (file, memory)
    });
    let (file, guest) = GUEST.with(|(file, guest)| (file.try_clone().unwrap(), Arc::clone(guest)));
    crate::write(&file, 0, before);
    crate::write(&file, MEMORY as u64, &[0xa5; GUARD]);
    let used_before = u16_at(before, USED as usize + 2);
    let spec = RingSpec { size: SIZE, desc: DESC, avail: AVAIL, used: USED, event_idx, next_avail };
    let replays = inflight.is_some();
    let ring = Ring::new(spec, guest, inflight).unwrap();
    let limits = Limits { total_bytes: 0, read_only: false, discard: true, write_zeroes: true };
    let mut queue = ActiveQueue::new(QueueStart {
        key: 7,
        device: Arc::clone(&backend.device),
        limits,
        ring,
        kick: event(),
        call: Some(event()),
    });
    // Its io_uring belongs to the thread; to make one takes longer than all the rest.
    thread_local!(static LANE: RefCell<Lane> = RefCell::new(self::backend().pool.lane().unwrap()));
    LANE.with_borrow_mut(|lane| run(&mut queue, lane));
    let (done, stopped) = std::sync::mpsc::channel();
    queue.stop(done);
    assert!(queue.finish_stop(), "a request was never answered");
    let end = stopped.recv().unwrap().next_avail;
    drop(queue);

    let after = read(&file, 0, MEMORY + GUARD);
    assert!(after[MEMORY..] == [0xa5; GUARD], "written past guest memory");
    let may = Offered::new(before);
    // A buffer may lie over a table: then what is written there offers more, which is the driver's own doing.
    let self_made = may.touches(&(DESC as usize..AVAIL as usize)) || touches_table(before, &may);
    if !self_made {
        for gap in may.gaps() {
            if before[gap.clone()] != after[gap.clone()] {
                let at = gap.clone().find(|at| before[*at] != after[*at]);
                panic!("byte {at:#x?} was written, which nobody offered");
            }
        }
    }
    let used = u16_at(&after, USED as usize + 2).wrapping_sub(used_before);
    let taken = end.wrapping_sub(next_avail);
    if !replays && !may.touches(&(USED as usize - 1..USED as usize)) && !self_made {
        assert!(used <= taken, "{used} answers to {taken} requests");
    }
}

/// Turns until nothing is left to do.
fn run(queue: &mut ActiveQueue, lane: &mut Lane) {
    let events = backend().events.lock().unwrap();
    let answers = Arc::new(Sink::default());
    let sink: Arc<dyn ReplySink> = Arc::clone(&answers) as Arc<dyn ReplySink>;
    let mut turns = 0;
    loop {
        let more = queue.process(lane, &sink, true);
        turns += 1;
        assert!(turns < 64, "a queue of {SIZE} is never done");
        lane.drain(&mut |token, result| queue.complete(split_token(token).1, result));
        for event in events.try_iter() {
            let DeviceEvent::Guest(call) = event else { continue };
            // As much as the driver has room for, and a byte more now and then: the queue must not write it.
            let room = call.response_room + usize::from(turns % 2 == 0);
            call.reply.send(vec![0x5a; room.min(1 << 16)]);
        }
        for (ticket, response) in std::mem::take(&mut *answers.0.lock().unwrap()) {
            queue.reply(split_token(ticket).1, &response);
        }
        queue.flush_used();
        if !more {
            break;
        }
    }
}

fn touches_table(memory: &[u8], may: &Offered) -> bool {
    memory[DESC as usize..].chunks_exact(16).take(usize::from(SIZE)).any(|entry| {
        descriptor(entry).is_some_and(|(table, flags)| flags & F_INDIRECT != 0 && may.touches(&table))
    })
}
