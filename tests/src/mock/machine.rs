// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a machine monitor keeps for a guest's disk, and the order in which it tells the daemon: QEMU's.
//!
//! Memory, rings and the inflight region outlive a connection, so that a daemon can go away and come back.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::PATIENCE;
use super::frontend::{BackendChannel, Frontend, protocol, request, words};
use super::queue::Queue;
use super::ram::{GuestRam, Region};
use super::ring::{Ring, Shape};

pub const F_RO: u64 = 1 << 5;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_MQ: u64 = 1 << 12;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;
/// What the device writes to guest memory is noted in a log.
pub const F_LOG_ALL: u64 = 1 << 26;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;

/// How a machine uses its disk.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub queues: u16,
    pub queue_size: u16,
    /// Features that are not used although offered.
    pub without: u64,
    /// Protocol features that are not used although offered.
    pub without_protocol: u64,
    /// The first index of every ring.
    pub before_wrap: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self { queues: 2, queue_size: 128, without: 0, without_protocol: 0, before_wrap: 0 }
    }
}

/// The region in which the daemon notes what it has taken.
#[derive(Debug)]
struct Inflight {
    fd: OwnedFd,
    /// As in the message: size, offset, queues, queue size.
    description: Vec<u8>,
}

/// A machine with a disk.
#[derive(Debug)]
pub struct Machine {
    pub ram: Arc<GuestRam>,
    pub options: Options,
    socket: PathBuf,
    shapes: Vec<Arc<Shape>>,
    /// Where each queue goes on.
    bases: Vec<u16>,
    /// The daemon could not say where queues stopped.
    lost: bool,
    features: u64,
    inflight: Option<Inflight>,
    link: Option<Frontend>,
    channel: Option<BackendChannel>,
    queues: Vec<Option<Queue>>,
}

impl Machine {
    /// A machine with the standard memory, connected to the daemon's `socket`, its queues running.
    pub fn start(socket: &Path, options: Options) -> Result<Self> {
        let mut machine = Self::new(socket, options, GuestRam::standard()?)?;
        machine.connect()?;
        machine.run()?;
        Ok(machine)
    }

    /// A machine that has said nothing to the daemon yet.
    pub fn new(socket: &Path, options: Options, ram: GuestRam) -> Result<Self> {
        let ram = Arc::new(ram);
        let shapes = (0..options.queues).map(|_| Ok(Arc::new(Shape::new(&ram, options.queue_size)?)));
        let shapes = shapes.collect::<Result<Vec<_>>>()?;
        let mut machine = Self {
            ram,
            options,
            socket: socket.to_path_buf(),
            bases: vec![0u16.wrapping_sub(options.before_wrap); shapes.len()],
            shapes,
            lost: false,
            features: 0,
            inflight: None,
            link: None,
            channel: None,
            queues: Vec::new(),
        };
        machine.new_driver()?;
        Ok(machine)
    }

    /// Rings as a driver that has just initialised the device leaves them.
    fn new_driver(&mut self) -> Result<()> {
        self.queues = Vec::new();
        for shape in &self.shapes {
            let mut ring = Ring::new(&self.ram, shape, self.options.without & F_EVENT_IDX == 0);
            if self.options.before_wrap > 0 {
                ring.start_before_wrap(self.options.before_wrap);
            }
            self.queues.push(Some(Queue::new(ring)));
        }
        Ok(())
    }

    /// Hands a queue out, to be used elsewhere. It goes on through reconnects.
    pub fn take_queue(&mut self, index: u16) -> Result<Queue> {
        let queue = self.queues.get_mut(usize::from(index)).and_then(Option::take);
        queue.with_context(|| format!("queue {index} is in use"))
    }

    /// A queue that was not handed out.
    pub fn queue(&mut self, index: u16) -> Result<&mut Queue> {
        let queue = self.queues.get_mut(usize::from(index)).and_then(Option::as_mut);
        queue.with_context(|| format!("queue {index} is in use"))
    }

    pub fn shape(&self, index: u16) -> Arc<Shape> {
        Arc::clone(&self.shapes[usize::from(index)])
    }

    pub fn link(&self) -> Result<&Frontend> {
        self.link.as_ref().context("not connected")
    }

    pub fn channel(&self) -> Result<&BackendChannel> {
        self.channel.as_ref().context("the daemon has no channel")
    }

    /// Features that both sides use.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Connects and negotiates, up to where QEMU waits for its guest.
    pub fn connect(&mut self) -> Result<()> {
        let mut link = Frontend::connect(&self.socket)?;
        let offered = link.get(request::GET_FEATURES, &[], &[])?.u64()?;
        ensure!(offered & F_PROTOCOL_FEATURES != 0, "no protocol features are offered");
        let wanted = (protocol::MQ
            | protocol::REPLY_ACK
            | protocol::BACKEND_REQ
            | protocol::CONFIG
            | protocol::INFLIGHT_SHMFD
            | protocol::LOG_SHMFD
            | protocol::RESET_DEVICE)
            & !self.options.without_protocol;
        let have = link.get(request::GET_PROTOCOL_FEATURES, &[], &[])?.u64()?;
        ensure!(have & wanted == wanted, "protocol features {have:#x} do not include {wanted:#x}");
        link.set(request::SET_PROTOCOL_FEATURES, &words(&[wanted]), &[])?;
        link.acknowledged = wanted & protocol::REPLY_ACK != 0;
        let queues = link.get(request::GET_QUEUE_NUM, &[], &[])?.u64()?;
        ensure!(queues >= u64::from(self.options.queues), "the device has {queues} queues");
        self.channel = None;
        if wanted & protocol::BACKEND_REQ != 0 {
            let (channel, theirs) = BackendChannel::new()?;
            link.set(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
            self.channel = Some(channel);
        }
        link.set(request::SET_OWNER, &[], &[])?;
        let unused = self.options.without | if self.options.queues == 1 { F_MQ } else { 0 };
        self.features = offered & !(unused | F_LOG_ALL);
        self.link = Some(link);
        Ok(())
    }

    /// Shares memory and starts every queue where it was.
    pub fn run(&mut self) -> Result<()> {
        let link = self.link.take().context("not connected")?;
        if std::mem::take(&mut self.lost) {
            // What QEMU does without an answer to GET_VRING_BASE: go on behind what was used. The daemon serves one
            // connection after the other, so it has let go of the rings by now.
            for (base, shape) in self.bases.iter_mut().zip(&self.shapes) {
                *base = self.ram.load(shape.used_idx());
            }
        }
        let done = self.run_on(&link);
        self.link = Some(link);
        done
    }

    fn run_on(&mut self, link: &Frontend) -> Result<()> {
        if self.options.without_protocol & protocol::INFLIGHT_SHMFD == 0 {
            let inflight = match self.inflight.take() {
                Some(inflight) => inflight,
                None => self.ask_inflight(link)?,
            };
            link.set(request::SET_INFLIGHT_FD, &inflight.description, &[inflight.fd.as_fd()])?;
            self.inflight = Some(inflight);
        }
        link.set(request::SET_FEATURES, &words(&[self.features]), &[])?;
        self.share_memory_on(link)?;
        for index in 0..self.options.queues {
            self.start_queue_on(link, index)?;
        }
        Ok(())
    }

    fn ask_inflight(&self, link: &Frontend) -> Result<Inflight> {
        let mut description = words(&[0, 0]);
        description.extend(self.options.queues.to_ne_bytes());
        description.extend(self.options.queue_size.to_ne_bytes());
        // Padded as a C compiler pads it, which is what QEMU sends.
        description.extend([0; 4]);
        let mut answer = link.get(request::GET_INFLIGHT_FD, &description, &[])?;
        let fd = answer.fds.pop().context("no descriptor of the inflight region")?;
        Ok(Inflight { fd, description: answer.payload })
    }

    /// Puts another file in the place of the inflight region's, which the next [`Machine::run`] hands over.
    pub fn replace_inflight_file(&mut self, file: OwnedFd) -> Result<()> {
        self.inflight.as_mut().context("no inflight region")?.fd = file;
        Ok(())
    }

    /// The inflight region's file, to be tampered with.
    pub fn inflight_file(&self) -> Result<&OwnedFd> {
        Ok(&self.inflight.as_ref().context("no inflight region")?.fd)
    }

    fn share_memory_on(&self, link: &Frontend) -> Result<()> {
        let regions = self.ram.regions();
        let mut table = u64::try_from(regions.len())?.to_ne_bytes().to_vec();
        table.extend(regions.iter().flat_map(describe));
        let fds: Vec<_> = regions.iter().map(Region::file).collect();
        link.set(request::SET_MEM_TABLE, &table, &fds)
    }

    /// Tells the daemon about all memory again.
    pub fn share_memory(&self) -> Result<()> {
        self.share_memory_on(self.link()?)
    }

    fn start_queue_on(&self, link: &Frontend, index: u16) -> Result<()> {
        let shape = &self.shapes[usize::from(index)];
        let number = u32::from(index);
        let base = self.bases[usize::from(index)];
        link.set(request::SET_VRING_NUM, &state(number, shape.size.into()), &[])?;
        link.set(request::SET_VRING_BASE, &state(number, base.into()), &[])?;
        link.set(request::SET_VRING_ADDR, &addresses(&self.ram, number, shape), &[])?;
        link.set(request::SET_VRING_KICK, &words(&[index.into()]), &[shape.kick.as_fd()])?;
        link.set(request::SET_VRING_CALL, &words(&[index.into()]), &[shape.call.as_fd()])?;
        link.set(request::SET_VRING_ENABLE, &state(number, 1), &[])
    }

    /// Starts one queue where it stopped.
    pub fn start_queue(&self, index: u16) -> Result<()> {
        self.start_queue_on(self.link()?, index)
    }

    /// Stops one queue; the daemon answers all it has taken first. Gives the index where it goes on.
    pub fn stop_queue(&mut self, index: u16) -> Result<u16> {
        let link = self.link()?;
        link.set(request::SET_VRING_ENABLE, &state(index.into(), 0), &[])?;
        let answer = link.get(request::GET_VRING_BASE, &state(index.into(), 0), &[])?;
        let base = answer.payload.get(4..6).context("short answer")?;
        let base = u16::from_ne_bytes([base[0], base[1]]);
        self.bases[usize::from(index)] = base;
        Ok(base)
    }

    /// The guest resets the device and a new driver initialises it. Queues handed out before are dead.
    pub fn reset(&mut self) -> Result<()> {
        for index in 0..self.options.queues {
            self.stop_queue(index)?;
        }
        self.begin_anew()?;
        self.run()
    }

    /// Rings and inflight region of a device that was reset. The daemon must have let go of the old ones: after
    /// [`Machine::stop_queue`] or, if the connection was cut, after [`Machine::connect`].
    pub fn begin_anew(&mut self) -> Result<()> {
        self.inflight = None;
        self.lost = false;
        self.bases.fill(0);
        self.options.before_wrap = 0;
        self.new_driver()
    }

    /// Cuts the connection, as a monitor does that is killed or has lost its daemon.
    pub fn disconnect(&mut self) {
        self.link = None;
        self.channel = None;
        self.lost = true;
    }

    /// Connects again and goes on with rings and inflight region as they are.
    pub fn reconnect(&mut self) -> Result<()> {
        self.disconnect();
        let start = Instant::now();
        while let Err(error) = self.connect() {
            if start.elapsed() > PATIENCE {
                return Err(error.context("reconnect"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.run()
    }

    /// As when the guest moves to another monitor: that one connects, then the old one stops the queues. [`Machine::run`] starts
    /// them there. Gives the old connection, still open.
    pub fn prepare_move(&mut self) -> Result<Frontend> {
        let (old, channel) = (self.link.take().context("not connected")?, self.channel.take());
        self.connect()?;
        let new = self.link.replace(old);
        for index in 0..self.options.queues {
            self.stop_queue(index)?;
        }
        drop(channel);
        self.inflight = None;
        let old = std::mem::replace(&mut self.link, new);
        old.context("not connected")
    }

    /// The configuration space from `offset` on.
    pub fn config(&self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let mut payload = Vec::new();
        for word in [offset, len, 0] {
            payload.extend(word.to_ne_bytes());
        }
        payload.resize(12 + usize::try_from(len)?, 0);
        let answer = self.link()?.get(request::GET_CONFIG, &payload, &[])?;
        ensure!(answer.payload.len() == payload.len(), "{} bytes of configuration", answer.payload.len());
        Ok(answer.payload[12..].to_vec())
    }

    /// The size of the disk in bytes, as a stock driver sees it.
    pub fn capacity(&self) -> Result<u64> {
        let bytes = self.config(0, 8)?;
        Ok(u64::from_le_bytes(bytes[..8].try_into()?) * 512)
    }

    /// Waits until the daemon has said that the configuration changed and the capacity is `bytes`.
    pub fn wait_capacity(&self, bytes: u64) -> Result<()> {
        let start = Instant::now();
        loop {
            let left = PATIENCE.saturating_sub(start.elapsed());
            ensure!(!left.is_zero(), "the capacity is {}, not {bytes}", self.capacity()?);
            if self.channel()?.config_changed(left)? && self.capacity()? == bytes {
                return Ok(());
            }
        }
    }

    /// Bytes of a logical block: the unit of requests.
    pub fn logical_block(&self) -> Result<u32> {
        let bytes = self.config(20, 4)?;
        Ok(u32::from_le_bytes(bytes[..4].try_into()?))
    }
}

/// A region as messages describe it.
pub fn describe(region: &Region) -> Vec<u8> {
    words(&[region.guest, region.len, region.user, region.offset])
}

/// The payload of messages about one queue.
pub fn state(index: u32, value: u32) -> Vec<u8> {
    [index, value].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// The payload of SET_VRING_ADDR.
pub fn addresses(ram: &GuestRam, index: u32, shape: &Shape) -> Vec<u8> {
    let mut payload = state(index, 0);
    payload.extend(words(&[ram.user(shape.desc), ram.user(shape.used), ram.user(shape.avail), 0]));
    payload
}
