// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One front-end connection: the handler of vhost-user messages.
//!
//! `vhost` parses the messages and calls the `Session`; the session keeps what they set up and hands complete queues
//! to the workers. It runs on a thread of its own and may wait there: for a queue to drain, for the owner to answer
//! parked requests, for another front-end to let go of the rings ([`super::seat`]). Any error ends the connection; the guest's requests in flight are answered first.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use control_server::peer_of;
use rustix::event::{PollFd, PollFlags, poll};
use tracing::{info, warn};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
};
use vssd_pool::sigbus::Alarm;
use vssd_protocol::units::ByteOffset;

use super::backend_channel;
use super::dirty_log::{DirtyLog, QueueLog};
use super::inflight::InflightRegion;
use super::memory::{GuestMemory, MAX_REGIONS, RegionSpec};
use super::queue::{DeviceContext, QueueStart};
use super::ring::{MAX_QUEUE_SIZE, Ring, RingSpec};
use super::seat::{Shared, Visitor};
use super::worker::WorkerHandle;
use crate::device::DeviceEvent;
use crate::device::config_space::{self, Geometry};
use crate::device::request::Limits;

const VIRTIO_F_RING_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_F_RING_EVENT_IDX: u64 = 1 << 29;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// The front-end wants to know which of its memory the device writes.
const LOG_ALL: u64 = VhostUserVirtioFeatures::LOG_ALL.bits();

/// Why a session ends that lost a page.
const MEMORY_LOST: &str =
    "memory that the front-end shares is gone: its file was shortened, or there is no room for all of it";

/// What a session is made from; the same for all connections of a vSSD.
#[derive(Clone, Debug)]
pub struct SessionContext {
    pub device: Arc<DeviceContext>,
    pub shared: Arc<Shared>,
    pub workers: Arc<[WorkerHandle]>,
    pub geometry: Geometry,
    /// Source of queue keys, one for the daemon.
    pub next_key: Arc<AtomicU32>,
}

/// Serves one connection to its end.
pub fn serve(context: SessionContext, socket: UnixStream) {
    let pid = peer_of(&socket).ok().map(|peer| peer.pid).filter(|pid| *pid > 0);
    let device = context.device.id;
    let name = context.device.vssd.name().to_owned();
    let owner = context.device.owner.clone();
    let shared = Arc::clone(&context.shared);
    let alarm = match Alarm::new() {
        Ok(alarm) => alarm,
        Err(error) => {
            warn!(device = name, %error, "cannot serve a front-end");
            return;
        }
    };
    info!(device = name, pid, "front-end connected");
    let visitor = shared.enter(pid, || owner.send(DeviceEvent::Connected { device, pid }));
    let session = Arc::new(Mutex::new(Session::new(context, visitor, alarm.clone())));
    let mut handler = BackendReqHandler::from_stream(socket, Arc::clone(&session));
    let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
    let end = run(&mut handler, &shared, visitor, &alarm, || lock().count_queues());
    // The socket closes only after the queues have stopped: a front-end may take its memory back once it is closed.
    lock().stop_all(Parked::Abandon);
    let lost = alarm.is_raised().then_some(MEMORY_LOST);
    match end {
        _ if lost.is_some() => warn!(device = name, pid, "front-end connection ended: {MEMORY_LOST}"),
        VhostError::Disconnected | VhostError::SocketBroken(_) => {
            info!(device = name, pid, "front-end disconnected");
        }
        error => warn!(device = name, pid, %error, "front-end connection ended"),
    }
    drop(handler);
    shared.leave(visitor, || owner.send(DeviceEvent::Disconnected { device, reason: lost }));
}

fn run(
    handler: &mut BackendReqHandler<Mutex<Session>>,
    shared: &Shared,
    visitor: Visitor,
    alarm: &Alarm,
    after_each: impl Fn(),
) -> VhostError {
    let socket = match handler.try_clone_connection() {
        Ok(socket) => socket,
        Err(error) => return VhostError::SocketError(error),
    };
    loop {
        // A queue may be the one to find that memory is lost, while no message comes.
        let mut fds =
            [PollFd::new(&socket, PollFlags::IN), PollFd::from_borrowed_fd(alarm.event(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return VhostError::SocketError(errno.into()),
        }
        if alarm.is_raised() {
            return VhostError::InvalidOperation(MEMORY_LOST);
        }
        match backend_channel::peek(&socket) {
            Ok(Some(channel)) => shared.set_channel(visitor, channel),
            Ok(None) => {}
            Err(error) => return VhostError::SocketBroken(error),
        }
        if let Err(error) = handler.handle_request() {
            return error;
        }
        // Not sooner: a message may stop a queue and start it again.
        after_each();
    }
}

/// What becomes of guest-channel requests that wait with the owner when their queue stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parked {
    /// The owner answers them.
    Answer,
    /// They stay in the inflight region.
    Abandon,
}

/// What messages have set up for one queue.
#[derive(Debug, Default)]
struct Vring {
    size: u16,
    addr: Option<RingAddr>,
    base: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    /// Under which guest address writes to the used ring are noted, if they are.
    log: Option<u64>,
    enabled: bool,
    running: Option<(u32, WorkerHandle)>,
}

impl Vring {
    /// Whether it can start.
    fn is_ready(&self) -> bool {
        self.addr.is_some() && self.kick.is_some() && self.enabled && self.running.is_none()
    }
}

/// Guest addresses of a ring's parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RingAddr {
    desc: u64,
    avail: u64,
    used: u64,
}

#[derive(Debug)]
struct Session {
    context: SessionContext,
    visitor: Visitor,
    mem: Arc<GuestMemory>,
    vrings: Vec<Vring>,
    features: u64,
    inflight: Option<InflightRegion>,
    /// In use while the features have [`LOG_ALL`].
    log: Option<Arc<DirtyLog>>,
    /// Whether the front-end was told once that the capacity may have changed while nobody was connected.
    announced: bool,
}

fn refuse<T>(reason: &'static str) -> VhostResult<T> {
    Err(VhostError::InvalidOperation(reason))
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> VhostError {
    VhostError::ReqHandlerError(std::io::Error::other(error))
}

impl Session {
    fn new(context: SessionContext, visitor: Visitor, alarm: Alarm) -> Self {
        let vrings = (0..context.geometry.queues).map(|_| Vring::default()).collect();
        Self {
            context,
            visitor,
            mem: Arc::new(GuestMemory::new(alarm)),
            vrings,
            features: 0,
            inflight: None,
            log: None,
            announced: false,
        }
    }

    fn offered_features(&self) -> u64 {
        VIRTIO_F_VERSION_1
            | VIRTIO_F_RING_INDIRECT_DESC
            | VIRTIO_F_RING_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | LOG_ALL
            | self.context.geometry.features()
    }

    fn vring(&mut self, index: u32) -> VhostResult<&mut Vring> {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.vrings.get_mut(index))
            .ok_or(VhostError::InvalidParam)
    }

    /// Starts the queue if it has everything it needs and may run.
    fn start_if_ready(&mut self, index: u32) -> VhostResult<()> {
        let mem = Arc::clone(&self.mem);
        let event_idx = self.features & VIRTIO_F_RING_EVENT_IDX != 0;
        let limits = Limits {
            total_bytes: self.context.device.total_bytes(),
            read_only: self.context.geometry.read_only,
            discard: self.features & config_space::F_DISCARD != 0,
            write_zeroes: self.features & config_space::F_WRITE_ZEROES != 0,
        };
        let number = u16::try_from(index).map_err(|_| VhostError::InvalidParam)?;
        let region = self.inflight.clone();
        if !self.vring(index)?.is_ready() {
            return Ok(());
        }
        // Before anything of the ring is read: whoever sat before may still have been writing it.
        self.context.shared.sit(self.visitor, self.context.device.vssd.name()).map_err(failed)?;
        let vring = self.vring(index)?;
        let (Some(addr), Some(kick)) = (vring.addr, &vring.kick) else { return Ok(()) };
        let RingAddr { desc, avail, used } = addr;
        let spec = RingSpec { size: vring.size, desc, avail, used, event_idx, next_avail: vring.base };
        let inflight = region.and_then(|region| region.queue(number, vring.size));
        let mut ring = Ring::new(spec, mem, inflight).map_err(failed)?;
        let kick = kick.try_clone().map_err(VhostError::SocketError)?;
        let call =
            vring.call.as_ref().map(OwnedFd::try_clone).transpose().map_err(VhostError::SocketError)?;
        // A driver that has just initialised the device begins at the start of both rings.
        let fresh = vring.base == 0 && ring.next_used() == 0;
        let log_used = vring.log;
        ring.set_log(self.queue_log(log_used));
        let key = self.context.next_key.fetch_add(1, Ordering::Relaxed);
        let device = Arc::clone(&self.context.device);
        let workers = &self.context.workers;
        let worker = workers[(device.id.0 as usize + usize::from(number)) % workers.len()].clone();
        device.owner.send(DeviceEvent::QueueStarted { device: device.id, queue: number, fresh });
        worker.start(QueueStart { key, device, limits, ring, kick, call });
        self.vring(index)?.running = Some((key, worker));
        if !self.announced {
            self.announced = true;
            self.context.shared.notify_config_change();
        }
        Ok(())
    }

    /// Says how many queues run; with none, another front-end may run its own.
    fn count_queues(&self) {
        let running = self.vrings.iter().filter(|vring| vring.running.is_some()).count();
        self.context.shared.set_queues(self.visitor, u32::try_from(running).unwrap_or(u32::MAX));
    }

    /// Stops queues: none takes another chain, every chain taken is answered (or, where so asked, left to be replayed), and
    /// the next index of each is kept.
    fn stop(&mut self, indices: impl Iterator<Item = usize>, parked: Parked) {
        let stopping: Vec<_> = indices
            .filter_map(|index| {
                let (key, worker) = self.vrings.get_mut(index)?.running.take()?;
                Some((index, key, worker.stop(key), worker))
            })
            .collect();
        if stopping.is_empty() {
            return;
        }
        stopping.iter().for_each(|(_, _, ticket, _)| ticket.wait_quiet());
        if parked == Parked::Answer {
            let (done, _) = mpsc::channel();
            let device = &self.context.device;
            device.owner.send(DeviceEvent::Quiesce { device: device.id, done });
        }
        for (index, key, ticket, worker) in stopping {
            let stopped = loop {
                if parked == Parked::Abandon || self.context.shared.is_closing() {
                    worker.abandon(key);
                }
                match ticket.wait(Duration::from_millis(100)) {
                    Ok(stopped) => break stopped,
                    Err(_still_busy) => {}
                }
            };
            if let Some(stopped) = stopped {
                self.vrings[index].base = stopped.next_avail;
            }
        }
    }

    fn stop_all(&mut self, parked: Parked) {
        self.stop(0..self.vrings.len(), parked);
    }

    /// Where the writes of a queue are noted now.
    fn queue_log(&self, used: Option<u64>) -> Option<QueueLog> {
        let log = self.log.as_ref().filter(|_| self.features & LOG_ALL != 0)?;
        Some(QueueLog::new(Arc::clone(log), used))
    }

    /// The front-end turned logging on or off.
    fn log_changed(&self) -> VhostResult<()> {
        let name = self.context.device.vssd.name();
        if self.features & LOG_ALL == 0 {
            info!(device = name, "writes to guest memory are not logged any more");
        } else if let Some(log) = &self.log {
            log.expect_covers(&self.mem).map_err(failed)?;
            info!(device = name, "writes to guest memory are logged: the guest is being moved");
        }
        self.apply_log();
        Ok(())
    }

    /// Makes running queues note their writes as is asked now. On return none notes them as before: the front-end relies on
    /// it from the acknowledgement on.
    fn apply_log(&self) {
        let waits: Vec<_> = self
            .vrings
            .iter()
            .filter_map(|vring| {
                let (key, worker) = vring.running.as_ref()?;
                Some(worker.set_log(*key, self.queue_log(vring.log)))
            })
            .collect();
        for done in waits {
            // An error means that the queue does not run any more.
            let _ = done.recv();
        }
    }

    fn set_memory(&mut self, mem: GuestMemory) -> VhostResult<()> {
        if let Some(log) = self.log.as_ref().filter(|_| self.features & LOG_ALL != 0) {
            log.expect_covers(&mem).map_err(failed)?;
        }
        self.mem = Arc::new(mem);
        for (key, worker) in self.vrings.iter().filter_map(|vring| vring.running.as_ref()) {
            worker.set_memory(*key, Arc::clone(&self.mem));
        }
        Ok(())
    }

    fn set_fd(&mut self, index: u8, fd: Option<File>) -> VhostResult<Option<OwnedFd>> {
        self.vring(u32::from(index))?;
        fd.map(|fd| {
            // A descriptor that blocks would let a front-end hold up a worker and with it other guests.
            rustix::io::ioctl_fionbio(&fd, true).map_err(|errno| VhostError::SocketError(errno.into()))?;
            Ok(OwnedFd::from(fd))
        })
        .transpose()
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.stop_all(Parked::Answer);
        self.vrings.iter_mut().for_each(|vring| *vring = Vring::default());
        self.features = 0;
        self.log = None;
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.offered_features())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        if features & !self.offered_features() != 0 {
            return refuse("feature that was not offered");
        }
        let logging = (self.features ^ features) & LOG_ALL != 0;
        self.features = features;
        if logging {
            self.log_changed()?;
        }
        // Without protocol features there is no message to enable a queue (vhost-user, "Ring states").
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            self.vrings.iter_mut().for_each(|vring| vring.enabled = true);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<u64>>> {
        let mut mem = self.mem.emptied();
        for (region, file) in regions.iter().zip(files) {
            let spec = RegionSpec {
                guest: region.guest_phys_addr,
                size: region.memory_size,
                user: region.user_addr,
                file_offset: region.mmap_offset,
            };
            mem = mem.with_region(spec, file).map_err(failed)?;
        }
        self.set_memory(mem)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        let vring = self.vring(index)?;
        let size = u16::try_from(num).map_err(|_| VhostError::InvalidParam)?;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(VhostError::InvalidParam);
        }
        if vring.running.is_some() && vring.size != size {
            return refuse("the size of a running queue cannot change");
        }
        vring.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> VhostResult<()> {
        let guest = |user| self.mem.guest_of_user(user).ok_or(VhostError::InvalidParam);
        let addr = RingAddr { desc: guest(descriptor)?, avail: guest(available)?, used: guest(used)? };
        let vring = self.vring(index)?;
        if vring.running.is_some() && vring.addr != Some(addr) {
            return refuse("a running queue cannot move");
        }
        vring.addr = Some(addr);
        let log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        if std::mem::replace(&mut vring.log, log) != log {
            self.apply_log();
        }
        self.start_if_ready(index)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let vring = self.vring(index)?;
        if vring.running.is_some() {
            return refuse("the base of a running queue cannot change");
        }
        vring.base = u16::try_from(base).map_err(|_| VhostError::InvalidParam)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        self.vring(index)?;
        self.stop(std::iter::once(index as usize), Parked::Answer);
        let vring = self.vring(index)?;
        // The queue runs again only with another kick descriptor (vhost-user, "Ring states").
        vring.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let kick = self.set_fd(index, fd)?;
        if kick.is_none() {
            return refuse("a queue without a kick descriptor would have to be polled");
        }
        self.stop(std::iter::once(usize::from(index)), Parked::Answer);
        self.vring(u32::from(index))?.kick = kick;
        self.start_if_ready(u32::from(index))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let call = self.set_fd(index, fd)?;
        let copy = call.as_ref().map(OwnedFd::try_clone).transpose().map_err(VhostError::SocketError)?;
        let vring = self.vring(u32::from(index))?;
        vring.call = call;
        if let Some((key, worker)) = &vring.running {
            worker.set_call(*key, copy);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        // Accepted and not used: every error is answered in the ring.
        self.set_fd(index, fd).map(drop)
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        if features & !self.get_protocol_features()?.bits() != 0 {
            return refuse("protocol feature that was not offered");
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(u64::from(self.context.geometry.queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.vring(index)?.enabled = enable;
        if enable {
            self.start_if_ready(index)
        } else {
            self.stop(std::iter::once(index as usize), Parked::Answer);
            Ok(())
        }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        let capacity = ByteOffset(self.context.shared.capacity.load(Ordering::Acquire));
        Ok(self.context.geometry.read(capacity, offset as usize, size as usize))
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        // No field is writable: CONFIG_WCE is not offered.
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> VhostResult<()> {
        refuse("this is a block device")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        refuse("shared objects were not offered")
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        if queues > self.context.geometry.queues || size > MAX_QUEUE_SIZE {
            return Err(VhostError::InvalidParam);
        }
        let (region, file) = InflightRegion::create(queues, size, self.mem.alarm()).map_err(failed)?;
        self.inflight = Some(region);
        Ok((VhostUserInflight::new(InflightRegion::len(queues, size), 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> VhostResult<()> {
        if self.vrings.iter().any(|vring| vring.running.is_some()) {
            return refuse("the inflight region of a running queue cannot change");
        }
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        if queues > self.context.geometry.queues || size > MAX_QUEUE_SIZE {
            return Err(VhostError::InvalidParam);
        }
        let (offset, len) = (inflight.mmap_offset, inflight.mmap_size);
        let region = InflightRegion::open(file, offset, len, (queues, size), self.mem.alarm());
        self.inflight = Some(region.map_err(failed)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<u64>> {
        let mem = self.mem.with_region(region_spec(region), file).map_err(failed)?;
        self.set_memory(mem)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        let mem = self.mem.without_region(region_spec(region)).map_err(failed)?;
        self.set_memory(mem)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> VhostResult<Option<File>> {
        refuse("device state was not offered")
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        refuse("device state was not offered")
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        refuse("shared memory regions were not offered")
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> VhostResult<()> {
        let log = DirtyLog::map(file, log.mmap_size, log.mmap_offset, self.mem.alarm()).map_err(failed)?;
        log.expect_covers(&self.mem).map_err(failed)?;
        self.log = Some(Arc::new(log));
        self.apply_log();
        Ok(())
    }
}

fn region_spec(region: &VhostUserSingleMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest: region.guest_phys_addr,
        size: region.memory_size,
        user: region.user_addr,
        file_offset: region.mmap_offset,
    }
}
