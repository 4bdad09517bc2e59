// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block requests over a real vhost-user socket: what was written is read, whatever the memory, the ring and the medium.

use anyhow::{Result, anyhow, ensure};
use serde_json::json;
use vssd_tests::mock::frontend::{Frontend, protocol, request};
use vssd_tests::mock::load::{Load, Profile};
use vssd_tests::mock::machine::{
    F_DISCARD, F_EVENT_IDX, F_FLUSH, F_INDIRECT, F_MQ, F_RO, F_VERSION_1, F_WRITE_ZEROES, Machine, Options,
};
use vssd_tests::mock::queue::{Layout, Queue, S_IOERR, S_OK, SECTOR, T_IN, T_OUT};
use vssd_tests::mock::ring::Segment;
use vssd_tests::mock::seed;
use vssd_tests::mock::site::{BLOCK, MIB, Site};
use vssd_tests::pattern;
use vssd_tests::scenario::Medium;

const SIZE: u64 = 64 * MIB;

fn read(queue: &mut Queue, offset: u64, len: usize) -> Result<Vec<u8>> {
    queue.read(offset, len)?.map_err(|status| anyhow!("read at {offset:#x}: status {status:#x}"))
}

fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    pattern::fill(&mut bytes, seed, 0);
    bytes
}

fn profile(machine: &Machine, depth: usize) -> Result<Profile> {
    let unit = machine.logical_block()?.into();
    Ok(Profile {
        bytes: 0..SIZE,
        unit,
        block: BLOCK,
        depth,
        zeroing: true,
        tables: machine.features() & F_INDIRECT != 0,
    })
}

fn random_io(medium: Medium, requests: usize, options: Options, depth: usize, seed: u64) -> Result<()> {
    let mut site = Site::new(medium, 100)?;
    let mut machine = site.machine("vm1", SIZE, options)?;
    let queues = (0..options.queues).map(|index| machine.take_queue(index)).collect::<Result<_>>()?;
    let mut load = Load::new(queues, profile(&machine, depth)?, seed)?;
    load.run(requests)?;
    load.verify()?;
    println!("{:?}", load.counts);

    // V-32: what a flush covers is there when the next daemon opens the pool, however the last one ended.
    ensure!(load.queues[0].flush()? == S_OK);
    site.kill_and_restart()?;
    machine.reconnect()?;
    load.verify()?;
    load.run(requests / 10)?;
    load.verify()?;
    site.finish()
}

#[test]
fn random_io_at_depth_32_on_two_queues_reads_what_was_written_on_nvram() -> Result<()> {
    random_io(Medium::Nvram, 30_000, Options::default(), 32, seed("wire_io/nvram"))
}

#[test]
fn random_io_at_depth_32_on_two_queues_reads_what_was_written_on_an_ssd() -> Result<()> {
    random_io(Medium::Ssd, 8_000, Options::default(), 32, seed("wire_io/ssd"))
}

#[test]
fn every_kind_of_ring_carries_the_same_io() -> Result<()> {
    let seed = seed("wire_io/rings");
    for (queue_size, without, before_wrap, queues) in
        [(16, F_EVENT_IDX, 0, 1), (16, 0, 9, 3), (1024, F_EVENT_IDX | F_INDIRECT, 1000, 2), (256, 0, 0, 4)]
    {
        let options = Options { queues, queue_size, without, before_wrap, ..Options::default() };
        println!("{options:?}");
        let mut site = Site::new(Medium::Nvram, 100)?;
        let mut machine = site.machine("vm1", SIZE, options)?;
        let queues = (0..queues).map(|index| machine.take_queue(index)).collect::<Result<_>>()?;
        let mut load = Load::new(queues, profile(&machine, 8)?, seed)?;
        load.run(4_000)?;
        load.verify()?;
        site.finish()?;
    }
    Ok(())
}

/// protocol.md §3.
#[test]
fn the_device_offers_what_the_protocol_says() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 40)?;
    let machine = site.machine("vm1", 16 * MIB, Options::default())?;
    let wanted = F_FLUSH | F_MQ | F_DISCARD | F_WRITE_ZEROES | F_INDIRECT | F_EVENT_IDX | F_VERSION_1;
    ensure!(machine.features() & wanted == wanted && machine.features() & F_RO == 0);
    let config = machine.config(0, 60)?;
    let word = |at: usize| u32::from_le_bytes([config[at], config[at + 1], config[at + 2], config[at + 3]]);
    ensure!(machine.capacity()? == 16 * MIB, "V-6");
    ensure!(u16::from_le_bytes([config[34], config[35]]) >= 2, "num_queues");
    ensure!(u64::from(word(44)) * SECTOR == BLOCK, "discard_sector_alignment is a block");
    let have = machine.link()?.get(request::GET_PROTOCOL_FEATURES, &[], &[])?.u64()?;
    let wanted = protocol::MQ
        | protocol::REPLY_ACK
        | protocol::BACKEND_REQ
        | protocol::CONFIG
        | protocol::INFLIGHT_SHMFD
        | protocol::RESET_DEVICE
        | protocol::CONFIGURE_MEM_SLOTS;
    ensure!(have & wanted == wanted, "{have:#x}");
    site.finish()
}

#[test]
fn the_serial_number_names_the_vssd() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 60)?;
    let mut machine = site.machine("vm1", 16 * MIB, Options::default())?;
    ensure!(machine.queue(0)?.id()? == "vssd-vm1", "V-7");
    let name = "a-name-of-31-bytes-is-the-most-x";
    let name = &name[..31];
    let mut machine = site.machine(name, 16 * MIB, Options::default())?;
    let id = machine.queue(1)?.id()?;
    ensure!(id.len() == 20 && id.starts_with("vssd-a-name"), "{id}");
    site.finish()
}

fn zeroing(medium: Medium) -> Result<()> {
    let mut site = Site::new(medium, 40)?;
    let mut machine = site.machine("vm1", 16 * MIB, Options::default())?;
    let unit = u64::from(machine.logical_block()?);
    let queue = machine.queue(0)?;
    let len = usize::try_from(8 * BLOCK)?;
    let old = content(len, 1);
    let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
    // What goes: from, to within the eight blocks, discarded or written, and what reads zero then.
    let cases = [
        (0, 8 * BLOCK, None, 0..8 * BLOCK),
        (unit, 7 * BLOCK + unit, None, BLOCK..7 * BLOCK),
        (2 * BLOCK, 3 * BLOCK, None, 2 * BLOCK..3 * BLOCK),
        (unit, BLOCK - unit, None, 0..0),
        (0, 8 * BLOCK, Some(true), 0..8 * BLOCK),
        (unit, 7 * BLOCK + unit, Some(true), unit..7 * BLOCK + unit),
        (unit, 7 * BLOCK + unit, Some(false), unit..7 * BLOCK + unit),
        (3 * BLOCK - unit, 3 * BLOCK, Some(false), 3 * BLOCK - unit..3 * BLOCK),
    ];
    for (from, to, zeroes, zero) in cases {
        ensure!(queue.write(BLOCK, &old)? == S_OK);
        let status = match zeroes {
            None => queue.discard(BLOCK + from, to - from)?,
            Some(unmap) => queue.write_zeroes(BLOCK + from, to - from, unmap)?,
        };
        ensure!(status == S_OK, "{from:#x}..{to:#x}, write-zeroes {zeroes:?}: status {status}");
        let mut expected = old.clone();
        expected[at(zero.start)..at(zero.end)].fill(0);
        let found = read(queue, BLOCK, len)?;
        ensure!(found == expected, "{from:#x}..{to:#x}, write-zeroes {zeroes:?}");
    }
    ensure!(queue.flush()? == S_OK);
    ensure!(read(queue, 0, at(BLOCK))?.iter().all(|byte| *byte == 0), "the block before was never written");
    site.finish()
}

/// V-33, V-34.
#[test]
fn discarded_blocks_and_zeroed_ranges_read_zero_and_their_neighbours_do_not_on_nvram() -> Result<()> {
    zeroing(Medium::Nvram)
}

/// V-33, V-34.
#[test]
fn discarded_blocks_and_zeroed_ranges_read_zero_and_their_neighbours_do_not_on_an_ssd() -> Result<()> {
    zeroing(Medium::Ssd)
}

fn odd_memory(medium: Medium) -> Result<()> {
    let mut site = Site::new(medium, 40)?;
    let mut machine = site.machine("vm1", 16 * MIB, Options::default())?;
    let ram = machine.ram.clone();
    let seam = ram.seam();
    let queue = machine.queue(0)?;
    let len = 5 * BLOCK + 8192;
    let size = usize::try_from(len)?;
    // Odd addresses, across the seam of two regions at an odd place, and in memory above 4 GiB.
    let places = [seam - 300_001, seam - 1, seam - len + 1, (4 << 30) + 12_345, queue.bounce() + 3];
    for (i, place) in places.into_iter().enumerate() {
        for layout in [Layout::Direct, Layout::Table] {
            queue.layout = layout;
            let bytes = content(size, place);
            ram.write(place, &bytes);
            let sector = (BLOCK - 4096) / SECTOR;
            let whole = [Segment::out(place, u32::try_from(len)?)];
            ensure!(queue.call(T_OUT, sector, &whole)?.status == S_OK, "{place:#x}");
            ram.fill(place, size, 0x5a);
            // Back in pieces, one of a single byte, one of none.
            let cut = [0, 1, 1, 100_001, size - 511, size];
            let pieces: Vec<Segment> = cut
                .windows(2)
                .map(|c| Ok(Segment::into(place + c[0] as u64, u32::try_from(c[1] - c[0])?)))
                .collect::<Result<_>>()?;
            let answer = queue.call(T_IN, sector, &pieces)?;
            ensure!(answer.status == S_OK && usize::try_from(answer.written)? == size + 1, "{answer:?}");
            ensure!(ram.read(place, size) == bytes, "place {i}, {layout:?}");
        }
    }
    site.finish()
}

/// Class 5 of the known faults of back-ends: memory that is not contiguous.
#[test]
fn buffers_at_odd_addresses_and_across_regions_carry_data_on_nvram() -> Result<()> {
    odd_memory(Medium::Nvram)
}

/// Class 5 of the known faults of back-ends: memory that is not contiguous.
#[test]
fn buffers_at_odd_addresses_and_across_regions_carry_data_on_an_ssd() -> Result<()> {
    odd_memory(Medium::Ssd)
}

#[test]
fn tables_at_odd_addresses_and_across_regions_are_read() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 40)?;
    let mut machine = site.machine("vm1", 16 * MIB, Options::default())?;
    let ram = machine.ram.clone();
    let queue = machine.take_queue(0)?;
    let mut ring = queue.ring;
    let memory = ram.alloc(8192, 4096);
    for table in [memory + 2048 + 1, memory + 2048 + 8, ram.seam() - 5, ram.seam() - 16, ram.seam() - 21] {
        let mut header = [0; 16];
        header[0] = 1;
        ram.write(memory, &header);
        ram.write(memory + 512, &content(512, table));
        let chain =
            [Segment::out(memory, 16), Segment::out(memory + 512, 512), Segment::into(memory + 100, 1)];
        let head = ring.indirect(&chain, table)?;
        ring.offer(head);
        ring.publish()?;
        let used = ring.wait_used(vssd_tests::mock::PATIENCE)?;
        ensure!(used.id == u32::from(head) && used.len == 1, "{used:?}");
        ensure!(ram.read(memory + 100, 1) == [S_OK], "table at {table:#x}");
    }
    site.finish()
}

#[test]
fn requests_of_one_sector_and_of_many_blocks_meet_the_ends_exactly() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 40)?;
    let size = 16 * MIB;
    let mut machine = site.machine("vm1", size, Options::default())?;
    ensure!(machine.logical_block()? == 512, "NV-RAM has sectors of 512 bytes");
    let queue = machine.queue(0)?;
    for offset in [0, BLOCK - SECTOR, BLOCK, 7 * BLOCK + SECTOR, size - SECTOR] {
        let bytes = content(512, offset);
        ensure!(queue.write(offset, &bytes)? == S_OK);
        ensure!(read(queue, offset, 512)? == bytes);
    }
    ensure!(read(queue, SECTOR, 512)?.iter().all(|byte| *byte == 0), "the rest of a first-touched block");
    // The whole disk but its two ends in pieces of a MiB that no block boundary meets.
    let mut offset = SECTOR;
    while offset + MIB <= size - SECTOR {
        let bytes = content(usize::try_from(MIB)?, offset);
        ensure!(queue.write(offset, &bytes)? == S_OK);
        ensure!(read(queue, offset, bytes.len())? == bytes);
        offset += MIB;
    }
    // Past the end nothing is done, also where the sum wraps.
    let memory = Segment::into(queue.bounce(), 1024);
    for sector in [size / SECTOR - 1, size / SECTOR, u64::MAX / SECTOR, u64::MAX - 1, u64::MAX] {
        ensure!(queue.call(T_IN, sector, &[memory])?.status == S_IOERR, "sector {sector}");
        let memory = Segment { write: false, ..memory };
        ensure!(queue.call(T_OUT, sector, &[memory])?.status == S_IOERR, "sector {sector}");
    }
    ensure!(read(queue, size - SECTOR, 512)? == content(512, size - SECTOR), "the last sector is unharmed");
    site.finish()
}

/// Class 21: read-only is enforced by the device.
#[test]
fn a_read_only_daemon_reads_and_refuses_everything_else() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 40)?;
    let mut machine = site.machine("vm1", 16 * MIB, Options::default())?;
    let bytes = content(4096, 5);
    ensure!(machine.queue(0)?.write(BLOCK, &bytes)? == S_OK);
    machine.disconnect();
    site.restart_with(&["--read-only"])?;
    let mut machine = Machine::start(&site.socket("vm1"), Options::default())?;
    ensure!(machine.features() & F_RO != 0 && machine.features() & (F_DISCARD | F_WRITE_ZEROES) == 0);
    let queue = machine.queue(0)?;
    ensure!(read(queue, BLOCK, 4096)? == bytes);
    ensure!(queue.write(BLOCK, &content(4096, 6))? == S_IOERR);
    ensure!(queue.discard(BLOCK, BLOCK)? != S_OK);
    ensure!(queue.write_zeroes(BLOCK, BLOCK, true)? != S_OK);
    ensure!(queue.flush()? == S_OK);
    ensure!(read(queue, BLOCK, 4096)? == bytes);
    site.operator.refused(
        vssd_protocol::control::ErrorCode::Permission,
        "device.resize",
        &json!({ "name": "vm1", "size_bytes": 8 * MIB }),
    )?;
    site.finish()
}

/// A client that nobody here wrote: the `virtio-driver` library.
#[test]
fn an_independent_client_reads_what_it_wrote() -> Result<()> {
    use std::os::fd::AsRawFd;

    use virtio_driver::{
        VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
        VirtioBlkTransport, VirtioFeatureFlags,
    };

    let mut site = Site::new(Medium::Nvram, 40)?;
    site.operator.create("vm1", 16 * MIB, &json!({}))?;
    let socket = site.socket("vm1");
    let features = (VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX).bits()
        | (VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::DISCARD
            | VirtioBlkFeatureFlags::WRITE_ZEROES
            | VirtioBlkFeatureFlags::MQ)
            .bits();
    let path = socket.to_str().ok_or_else(|| anyhow!("the path is no UTF-8"))?;
    let transport = VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, features)?;
    let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
    ensure!(transport.get_config()?.capacity.to_native() * SECTOR == 16 * MIB);
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(transport.as_mut(), 2, 64)?;

    const PIECE: usize = 8192;
    const PIECES: usize = 32;
    let len = PIECE * PIECES;
    let file = rustix::fs::memfd_create("buffers", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, len as u64)?;
    // SAFETY: a new shared mapping at an address that the kernel chooses; it stays for the life of the test.
    let memory = unsafe {
        let prot = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        rustix::mm::mmap(std::ptr::null_mut(), len, prot, rustix::mm::MapFlags::SHARED, &file, 0)?
    };
    let memory = memory.cast::<u8>();
    transport.map_mem_region(memory as usize, len, file.as_raw_fd(), 0)?;

    for round in 0..20usize {
        for write in [true, false] {
            for piece in 0..PIECES {
                // SAFETY: the piece lies in the mapping, and no request uses it now.
                let bytes = unsafe { std::slice::from_raw_parts_mut(memory.add(piece * PIECE), PIECE) };
                if write {
                    pattern::fill(bytes, round as u64, piece as u64);
                } else {
                    bytes.fill(0);
                }
            }
            for piece in 0..PIECES {
                let queue = &mut queues[piece % 2];
                let offset = ((piece * 7 + round) % PIECES * PIECE) as u64;
                // SAFETY: the piece lies in the mapping and is left alone until the request completes.
                unsafe {
                    let at = memory.add(piece * PIECE);
                    if write {
                        queue.write_raw(offset, at, PIECE, piece)?;
                    } else {
                        queue.read_raw(offset, at, PIECE, piece)?;
                    }
                }
                if queue.avail_notif_needed() {
                    transport.get_submission_notifier(piece % 2).notify()?;
                }
            }
            let deadline = vssd_tests::wait::Deadline::after(vssd_tests::mock::PATIENCE);
            let mut done = 0;
            deadline.until("all completions", || {
                for queue in &mut queues {
                    for completion in queue.completions() {
                        ensure!(completion.ret == 0, "piece {} failed", completion.context);
                        done += 1;
                    }
                }
                Ok(done == PIECES)
            })?;
        }
        for piece in 0..PIECES {
            // SAFETY: the piece lies in the mapping, and no request uses it now.
            let bytes = unsafe { std::slice::from_raw_parts(memory.add(piece * PIECE), PIECE) };
            let found = pattern::judge(bytes, round as u64, piece as u64);
            ensure!(found == pattern::Found::Intact, "round {round}, piece {piece}: {found:?}");
        }
    }
    drop(queues);
    drop(transport);
    site.finish()
}

#[test]
fn a_second_front_end_waits_for_the_first_to_leave() -> Result<()> {
    let mut site = Site::new(Medium::Nvram, 40)?;
    let mut machine = site.machine("vm1", 16 * MIB, Options::default())?;
    let bytes = content(4096, 9);
    ensure!(machine.queue(0)?.write(0, &bytes)? == S_OK);
    let second = Frontend::connect(&site.socket("vm1"))?;
    second.send(request::GET_FEATURES, 0, &[], &[])?;
    ensure!(read(machine.queue(0)?, 0, 4096)? == bytes, "the first is served on");
    machine.disconnect();
    ensure!(second.receive()?.u64()? & F_VERSION_1 != 0, "then the second is served");
    drop(second);
    machine.reconnect()?;
    ensure!(read(machine.queue(0)?, 0, 4096)? == bytes);
    site.finish()
}
