// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What operators may call. Each call checks everything before it changes anything, and a dry run stops there.

use serde_json::json;
use tracing::{error, info};
use vssd_pool::{MediumKind, VssdAttrs, VssdId, VssdSpec, VssdStats};
use vssd_protocol::control::{
    AgentInfo, Class, CreateParams, DeleteParams, DeviceInfo, DeviceState, DriverInfo, DriverKind, ErrorCode,
    EstimateAnswer, EvictedRanges, FrontendInfo, IoCounters, JobInfo, JobKind, LimitsParams, MAX_EVICTED,
    MediumInfo, OnTimeout, Policy, PoolStatus, ReclaimAnswer, ReclaimParams, ResizeAnswer, ResizeParams,
    is_valid_name,
};
use vssd_protocol::units::ByteCount;

use super::stored::{Deadline, Stored};
use super::{Device, Event, Owner, about, alarm, pick};
use crate::control::fault::{self, Fault};
use crate::control::negotiation::{Actor, Plan, Resize, Tail, Wish};
use crate::control::reclaim::{DEADLINE_MS, Order};
use crate::device::serial;

type Answer<T> = Result<T, Fault>;

impl Owner {
    pub fn list(&self) -> Vec<DeviceInfo> {
        let failed = self.pool.info().failed;
        self.devices.iter().map(|(id, device)| self.describe(*id, device, failed)).collect()
    }

    pub fn show(&self, name: &str) -> Answer<DeviceInfo> {
        let (id, device) = self.find(name)?;
        Ok(self.describe(id, device, self.pool.info().failed))
    }

    /// The unplugged blocks from `start` on, as many ranges as an answer takes.
    pub fn evicted(&self, name: &str, start: u32) -> Answer<EvictedRanges> {
        let (_, device) = self.find(name)?;
        let mut ranges = pick::gaps(&device.vssd, start);
        let next = ranges.get(MAX_EVICTED).map(|range| range.start);
        ranges.truncate(MAX_EVICTED);
        let block_size_bytes = device.vssd.block_size().bytes();
        Ok(EvictedRanges { name: name.to_owned(), block_size_bytes, ranges, next })
    }

    /// What the guest said last that it could give.
    pub fn estimate(&self, name: &str) -> Answer<EstimateAnswer> {
        let (_, device) = self.find(name)?;
        let Some((at, estimate)) = device.estimate else {
            let message = format!("nobody in the guest of vSSD {name} has said what it could give");
            return Err(Fault::new(ErrorCode::NoDriver, message)
                .hint("run vssd-agent in the guest; it tells every few seconds"));
        };
        let bytes = |blocks: u32| device.vssd.block_size().bytes_of(blocks);
        let unwritten = device.negotiation.counts().plugged.saturating_sub(device.vssd.allocated_blocks());
        Ok(EstimateAnswer {
            name: name.to_owned(),
            age_ms: self.clock.now_ms().saturating_sub(at),
            free_bytes: bytes(estimate.free),
            clean_cold_bytes: bytes(estimate.clean_cold),
            clean_hot_bytes: bytes(estimate.clean_hot),
            dirty_bytes: bytes(estimate.dirty),
            unwritten_bytes: bytes(unwritten),
        })
    }

    /// Asks the agent of a guest whose driver cannot give blocks up, or takes that back.
    pub fn wish_reclaim(&mut self, params: &ReclaimParams, actor: Actor) -> Answer<ReclaimAnswer> {
        let (id, device) = self.find(&params.name)?;
        if device.negotiation.driver_kind() == DriverKind::Vssd && params.soft_bytes.is_some() {
            let message = format!("the guest of vSSD {} has a driver that gives blocks up", params.name);
            return Err(
                Fault::new(ErrorCode::Conflict, message).hint("balloon-ctl shrink keeps what it gives")
            );
        }
        let block_size = device.vssd.block_size();
        let total_bytes = block_size.bytes_of(device.negotiation.total());
        let soft = match params.soft_bytes {
            None => None,
            Some(bytes) => {
                Some(block_size.blocks_for(bytes).filter(|_| bytes <= total_bytes).ok_or_else(|| {
                    let message =
                        format!("a soft size is at most the maximum size of {}", ByteCount(total_bytes));
                    Fault::new(ErrorCode::AboveMax, message).detail(json!({ "max_bytes": total_bytes }))
                })?)
            }
        };
        let promised = ByteCount(block_size.bytes_of(device.negotiation.requested()));
        let plan = match soft {
            Some(soft) => format!(
                "the guest's agent is asked to use no more than {} of the disk; nothing enforces that, and {promised} stay \
                 promised to it",
                ByteCount(block_size.bytes_of(soft))
            ),
            None => "the guest may use all of the disk again".to_owned(),
        };
        let mut answer = ReclaimAnswer {
            job: None,
            allocated_bytes: block_size.bytes_of(device.vssd.allocated_blocks()),
            soft_bytes: soft.map(|soft| block_size.bytes_of(soft)),
            plan,
        };
        if params.dry_run {
            return Ok(answer);
        }
        let policy_ms = Some(device.negotiation.policy().deadline_ms).filter(|ms| *ms > 0);
        let deadline_ms = params.deadline_ms.filter(|ms| *ms > 0).or(policy_ms).unwrap_or(DEADLINE_MS);
        self.store_soft(id, soft)?;
        info!(device = params.name, soft, uid = actor.uid, pid = actor.pid, "reclaim");
        let job = self.jobs.next_id();
        self.reclaim(id, |reclaim, seen| reclaim.set(soft, Order { job, actor, deadline_ms }, seen));
        answer.job = self.jobs.info(job, &self.clock);
        Ok(answer)
    }

    fn store_soft(&self, id: VssdId, soft: Option<u32>) -> Answer<()> {
        let Some(device) = self.devices.get(&id) else { return Ok(()) };
        let stored = Stored { soft, ..stored(device) };
        let attrs = VssdAttrs { policy: encode(&stored)?, ..device.vssd.attrs() };
        self.pool.set_attrs(id, &attrs).map_err(|e| self.pool_fault(&e))
    }

    pub fn create(&mut self, params: &CreateParams, actor: Actor) -> Answer<DeviceInfo> {
        let name = params.name.as_str();
        if !is_valid_name(name) {
            let message = format!("{name:?} is no name for a vSSD");
            return Err(Fault::new(ErrorCode::InvalidParams, message)
                .hint("1 to 31 of a-z A-Z 0-9 . _ -, not beginning with . or -"));
        }
        if self.find(name).is_ok() {
            return Err(Fault::new(ErrorCode::Exists, format!("vSSD {name} exists already")));
        }
        let block_size = self.pool.block_size();
        let blocks = |what: &str, bytes: u64| {
            let limit = block_size.bytes_of(u32::MAX);
            block_size.blocks_for(bytes).filter(|blocks| *blocks > 0).ok_or_else(|| {
                let message = format!("{what} of {bytes} bytes is not between 1 and {limit} bytes");
                Fault::new(ErrorCode::InvalidParams, message)
            })
        };
        let size = blocks("a size", params.size_bytes)?;
        let min = params.min_bytes.map_or(Ok(1), |bytes| blocks("a minimum size", bytes.max(1)))?;
        let max = params.max_bytes.map_or(Ok(size), |bytes| blocks("a maximum size", bytes))?;
        if size < min {
            let message =
                format!("the size is below the minimum size of {}", ByteCount(block_size.bytes_of(min)));
            return Err(Fault::new(ErrorCode::BelowMin, message));
        }
        if size > max {
            let message =
                format!("the size is above the maximum size of {}", ByteCount(block_size.bytes_of(max)));
            return Err(Fault::new(ErrorCode::AboveMax, message));
        }
        self.check_promise(u64::from(size))?;
        let attrs = VssdAttrs {
            requested_blocks: size,
            min_blocks: min,
            class: pool_class(params.class),
            policy: encode(&Stored::policy(params.policy))?,
        };
        if params.dry_run {
            return Ok(self.would_be(params, [size, min, max]));
        }
        let spec = VssdSpec { name: name.to_owned(), max_blocks: max, initial_blocks: size, attrs };
        let vssd = self.pool.create_vssd(&spec).map_err(|e| self.pool_fault(&e))?;
        let id = vssd.id();
        if let Err(cause) = self.serve(vssd) {
            error!(device = name, error = %cause, "cannot open the socket of a new vSSD");
            if let Err(error) = self.pool.delete_vssd(id) {
                error!(device = name, %error, "cannot take the new vSSD back");
            }
            return Err(Fault::new(ErrorCode::Internal, format!("cannot serve the vSSD: {cause}")));
        }
        info!(device = name, uid = actor.uid, pid = actor.pid, "created");
        let info = self.show(name)?;
        let mut data = json!({
            "size_bytes": info.requested_bytes,
            "min_bytes": info.min_bytes,
            "max_bytes": info.max_bytes,
        });
        actor.add_to(&mut data);
        self.emit(id, "device.created", None, data);
        self.look_at_pool();
        Ok(info)
    }

    pub fn delete(&mut self, params: &DeleteParams, actor: Actor) -> Answer<()> {
        let (id, device) = self.find(&params.name)?;
        let vssd = device.vssd.clone();
        if self.frontend(id).connected && !params.force {
            let message = format!("a front-end is connected to vSSD {}", params.name);
            return Err(Fault::new(ErrorCode::InUse, message)
                .hint("stop the VM or detach the disk first, or use force"));
        }
        if params.dry_run {
            return Ok(());
        }
        self.apply(id, Event::Deleted(actor));
        self.reclaim(id, |reclaim, seen| reclaim.cancel("the vSSD was deleted", seen));
        if let Err(error) = self.close_frontend(id) {
            error!(device = params.name, %error, "cannot close the socket of a vSSD");
        }
        let deleted = self.pool.delete_vssd(id);
        self.devices.remove(&id);
        if let Err(cause) = deleted {
            // It is there still, so it goes on being served.
            if let Err(error) = self.serve(vssd) {
                error!(device = params.name, %error, "cannot serve a vSSD that could not be deleted");
            }
            return Err(self.pool_fault(&cause));
        }
        info!(device = params.name, uid = actor.uid, pid = actor.pid, "deleted");
        let mut data = json!({});
        actor.add_to(&mut data);
        let unix_ms = self.clock.unix_ms(self.clock.now_ms());
        self.log.push(unix_ms, "device.deleted", about(&params.name), data);
        self.look_at_pool();
        Ok(())
    }

    pub fn resize(&mut self, params: &ResizeParams, actor: Actor) -> Answer<ResizeAnswer> {
        let (id, device) = self.find(&params.name)?;
        let wish = Wish {
            to_bytes: params.size_bytes,
            expected_bytes: params.expected_bytes,
            deadline_ms: params.deadline_ms,
            on_timeout: params.on_timeout,
            force: params.force,
        };
        let negotiation = &device.negotiation;
        let block_size = device.vssd.block_size();
        let shrinks = params.size_bytes < block_size.bytes_of(negotiation.counts().plugged);
        // Looked up only where it matters: it reads the vSSD's map.
        let tail = if shrinks { pick::tail(&device.vssd) } else { Tail::default() };
        let plan = negotiation.plan(&wish, tail)?;
        self.check_plan(device, &plan)?;
        let mut answer = ResizeAnswer {
            job: None,
            from_bytes: block_size.bytes_of(plan.from),
            to_bytes: block_size.bytes_of(plan.to),
            plan: plan.text.clone(),
        };
        if params.dry_run {
            return Ok(answer);
        }
        let now = self.clock.unix_ms(self.clock.now_ms());
        // Should the daemon end in mid-way, what is forced is a shrink whose deadline has passed.
        let deadline = if plan.force {
            Some(Deadline { unix_ms: now, on_timeout: OnTimeout::Force })
        } else {
            plan.deadline_ms
                .map(|ms| Deadline { unix_ms: now.saturating_add(ms), on_timeout: plan.on_timeout })
        }
        .filter(|_| plan.to < plan.from);
        // Also when only a deadline goes: it may be one that forces.
        if plan.to != negotiation.requested() || deadline != stored(device).deadline {
            self.store_requested(id, plan.to, deadline).map_err(|e| self.pool_fault(&e))?;
        }
        info!(
            device = params.name,
            from = answer.from_bytes,
            to = answer.to_bytes,
            force = params.force,
            uid = actor.uid,
            pid = actor.pid,
            "resize"
        );
        let job = self.jobs.next_id();
        self.apply(id, Event::Resize(Resize { job, plan, actor, note: "" }));
        answer.job = self.jobs.info(job, &self.clock);
        self.look_at_pool();
        Ok(answer)
    }

    pub fn limits(&mut self, params: &LimitsParams, actor: Actor) -> Answer<DeviceInfo> {
        let (id, device) = self.find(&params.name)?;
        let negotiation = &device.negotiation;
        let block_size = device.vssd.block_size();
        let old_total = negotiation.total();
        let total = match params.max_bytes.map(|bytes| block_size.blocks_for(bytes)) {
            None => old_total,
            Some(Some(total)) if total >= old_total => total,
            Some(_) => {
                let current = block_size.bytes_of(old_total);
                let message = format!("the maximum size of {} may only be raised", ByteCount(current));
                return Err(
                    Fault::new(ErrorCode::InvalidParams, message).detail(json!({ "max_bytes": current }))
                );
            }
        };
        let min = match params.min_bytes {
            None => negotiation.min(),
            Some(bytes) => {
                let smallest = negotiation.requested().min(negotiation.counts().plugged);
                block_size.blocks_for(bytes.max(1)).filter(|min| *min <= smallest).ok_or_else(|| {
                    let current = block_size.bytes_of(smallest);
                    let message =
                        format!("the minimum size cannot be above the size of {}", ByteCount(current));
                    Fault::new(ErrorCode::InvalidParams, message)
                        .hint("grow the vSSD first")
                        .detail(json!({ "size_bytes": current }))
                })?
            }
        };
        let old = negotiation.policy();
        let policy = Policy {
            on_timeout: params.on_timeout.unwrap_or(old.on_timeout),
            deadline_ms: params.deadline_ms.unwrap_or(old.deadline_ms),
            pull: params.pull.unwrap_or(old.pull),
        };
        let stored = encode(&Stored { policy, ..stored(device) })?;
        let attrs = VssdAttrs { min_blocks: min, policy: stored, ..device.vssd.attrs() };
        if total > old_total {
            self.pool.extend_vssd(id, total).map_err(|e| self.pool_fault(&e))?;
        }
        let stored = self.pool.set_attrs(id, &attrs).map_err(|e| self.pool_fault(&e));
        // What was done before a failure is in force.
        let (min, policy) =
            if stored.is_ok() { (min, policy) } else { (self.find(&params.name)?.1.negotiation.min(), old) };
        self.apply(id, Event::Limits { min, total, policy });
        stored?;
        info!(device = params.name, uid = actor.uid, pid = actor.pid, "limits changed");
        let info = self.show(&params.name)?;
        let mut data = json!({
            "min_bytes": info.min_bytes,
            "max_bytes": info.max_bytes,
            "policy": info.policy,
        });
        actor.add_to(&mut data);
        self.emit(id, "device.limits", None, data);
        Ok(info)
    }

    pub fn cancel(&mut self, job: u64, actor: Actor) -> Answer<JobInfo> {
        let info = self.job(job)?;
        if info.state.is_final() {
            let message = format!("job {job} has ended: {}", info.message);
            return Err(Fault::new(ErrorCode::Conflict, message).detail(json!({ "state": info.state })));
        }
        let (id, _) = self.find(&info.device)?;
        info!(device = info.device, job, uid = actor.uid, pid = actor.pid, "cancel");
        match info.kind {
            JobKind::Resize => self.apply(id, Event::Cancel(actor)),
            JobKind::Reclaim => {
                self.store_soft(id, None)?;
                self.reclaim(id, |reclaim, seen| reclaim.cancel("cancelled", seen));
            }
        }
        self.job(job)
    }

    pub fn job(&self, id: u64) -> Answer<JobInfo> {
        self.jobs.info(id, &self.clock).ok_or_else(|| {
            Fault::new(ErrorCode::NotFound, format!("there is no job {id}"))
                .hint("jobs are forgotten when the daemon restarts, and the oldest ended ones after 256 more")
        })
    }

    pub fn job_list(&self) -> Vec<JobInfo> {
        self.jobs.list(&self.clock)
    }

    pub fn pool_status(&self) -> PoolStatus {
        let info = self.pool.info();
        let bytes = |blocks: u64| blocks.saturating_mul(info.block_size.bytes());
        PoolStatus {
            uuid: info.uuid.to_string(),
            block_size_bytes: info.block_size.bytes(),
            size_bytes: bytes(info.total_blocks.into()),
            allocated_bytes: bytes(info.leased_blocks.into()),
            scrubbing_bytes: bytes(info.scrubbing_blocks.into()),
            // Set aside for first writes is still nobody's.
            free_bytes: bytes(u64::from(info.free_blocks) + u64::from(info.reserved_blocks)),
            promised_bytes: bytes(info.promised_blocks),
            available_bytes: bytes(info.promisable_blocks.saturating_sub(info.promised_blocks)),
            overcommit_percent: info.overcommit_percent,
            health: alarm::health(&info).to_owned(),
            problem: alarm::problem(&info),
            media: info.media.iter().map(medium_info).collect(),
            devices: u32::try_from(self.devices.len()).unwrap_or(u32::MAX),
            refused_calls: crate::sandbox::refusals::count(),
            name: info.name,
        }
    }

    pub(super) fn find(&self, name: &str) -> Answer<(VssdId, &Device)> {
        self.devices
            .iter()
            .find(|(_, device)| device.vssd.name() == name)
            .map(|(id, device)| (*id, device))
            .ok_or_else(|| {
                // Not every text a client sends is fit to be repeated at full length.
                let shown: String = name.chars().take(64).collect();
                Fault::new(ErrorCode::NotFound, format!("there is no vSSD {shown:?}"))
                    .hint("balloon-ctl list shows all")
            })
    }

    fn look_at_pool(&mut self) {
        self.alarm.soon(self.clock.now_ms());
    }

    pub(super) fn pool_fault(&self, error: &vssd_pool::Error) -> Fault {
        if matches!(error, vssd_pool::Error::Io { .. } | vssd_pool::Error::Damaged { .. }) {
            error!(%error, "the pool failed");
        }
        fault::of_pool(error, self.pool.block_size().bytes())
    }

    /// Whether the pool can promise `blocks` more.
    fn check_promise(&self, blocks: u64) -> Answer<()> {
        let info = self.pool.info();
        let available = info.promisable_blocks.saturating_sub(info.promised_blocks);
        if blocks <= available {
            return Ok(());
        }
        let bytes = |blocks: u64| blocks.saturating_mul(info.block_size.bytes());
        Err(fault::pool_full(bytes(blocks), bytes(available)))
    }

    fn check_plan(&self, device: &Device, plan: &Plan) -> Answer<()> {
        let held = device.negotiation.requested().max(device.negotiation.counts().plugged);
        match plan.to.checked_sub(held) {
            None | Some(0) => Ok(()),
            Some(more) => self.check_promise(u64::from(more)),
        }
    }

    fn frontend(&self, id: VssdId) -> crate::device::FrontendStatus {
        self.frontends.status(id)
    }

    fn describe(&self, id: VssdId, device: &Device, pool_failed: bool) -> DeviceInfo {
        let Device { vssd, negotiation, reclaim, .. } = device;
        let bytes = |blocks: u32| vssd.block_size().bytes_of(blocks);
        let frontend = self.frontend(id);
        let (requested, plugged) = (negotiation.requested(), negotiation.counts().plugged);
        let state = if pool_failed {
            DeviceState::Failed
        } else if !frontend.connected {
            DeviceState::Detached
        } else if negotiation.is_uncooperative() {
            DeviceState::Uncooperative
        } else if plugged > requested {
            DeviceState::Shrinking
        } else if plugged < requested {
            DeviceState::Growing
        } else {
            DeviceState::Online
        };
        DeviceInfo {
            name: vssd.name().to_owned(),
            id: id.0,
            state,
            capacity_bytes: bytes(negotiation.capacity()),
            requested_bytes: bytes(requested),
            plugged_bytes: bytes(plugged),
            allocated_bytes: bytes(vssd.allocated_blocks()),
            min_bytes: bytes(negotiation.min()),
            max_bytes: bytes(negotiation.total()),
            block_size_bytes: vssd.block_size().bytes(),
            class: control_class(vssd.attrs().class),
            policy: negotiation.policy(),
            socket_path: frontend.socket_path.to_string_lossy().into_owned(),
            serial: serial(vssd.name()),
            soft_bytes: reclaim.soft().map(bytes),
            agent: reclaim.heard().map(|(at, report)| AgentInfo {
                heard_ms: self.clock.now_ms().saturating_sub(at),
                held_bytes: bytes(report.held),
                shortfall: report.shortfall.word().map(str::to_owned),
            }),
            driver: DriverInfo {
                kind: negotiation.driver_kind(),
                name: negotiation.driver_name().map(str::to_owned),
                could_give_bytes: negotiation.could_give().map(bytes),
            },
            frontend: FrontendInfo {
                connected: frontend.connected,
                pid: frontend.pid,
                queues: frontend.queues,
                connections: frontend.connections,
            },
            job: negotiation.job().or(reclaim.job()),
            io: io_counters(&vssd.stats(), frontend.errors),
        }
    }

    /// What a vSSD would look like that a dry run does not create.
    fn would_be(&self, params: &CreateParams, [size, min, max]: [u32; 3]) -> DeviceInfo {
        let block_size = self.pool.block_size();
        let size_bytes = block_size.bytes_of(size);
        DeviceInfo {
            name: params.name.clone(),
            id: 0,
            state: DeviceState::Detached,
            capacity_bytes: size_bytes,
            requested_bytes: size_bytes,
            plugged_bytes: size_bytes,
            allocated_bytes: 0,
            min_bytes: block_size.bytes_of(min),
            max_bytes: block_size.bytes_of(max),
            block_size_bytes: block_size.bytes(),
            class: params.class,
            policy: params.policy,
            socket_path: String::new(),
            serial: serial(&params.name),
            soft_bytes: None,
            agent: None,
            driver: DriverInfo { kind: DriverKind::None, name: None, could_give_bytes: None },
            frontend: FrontendInfo { connected: false, pid: None, queues: 0, connections: 0 },
            job: None,
            io: IoCounters::default(),
        }
    }
}

/// What a restart of the daemon would go by.
fn stored(device: &Device) -> Stored {
    Stored::decode(&device.vssd.attrs().policy).unwrap_or_default()
}

fn encode(stored: &Stored) -> Answer<String> {
    stored.encode().map_err(|error| Fault::new(ErrorCode::Internal, error.to_string()))
}

fn pool_class(class: Class) -> vssd_pool::Class {
    match class {
        Class::Any => vssd_pool::Class::Any,
        Class::Nvram => vssd_pool::Class::Nvram,
        Class::Ssd => vssd_pool::Class::Ssd,
    }
}

fn control_class(class: vssd_pool::Class) -> Class {
    match class {
        vssd_pool::Class::Any => Class::Any,
        vssd_pool::Class::Nvram => Class::Nvram,
        vssd_pool::Class::Ssd => Class::Ssd,
    }
}

fn io_counters(stats: &VssdStats, errors: u64) -> IoCounters {
    IoCounters {
        reads: stats.reads,
        read_bytes: stats.bytes_read.iter().sum(),
        writes: stats.writes,
        written_bytes: stats.bytes_written.iter().sum(),
        flushes: stats.flushes,
        discards: stats.discards,
        errors,
        evicted: stats.evicted,
    }
}

fn medium_info(medium: &vssd_pool::MediumInfo) -> MediumInfo {
    use vssd_pool::{Cache, Persistence};
    let persistence = match (medium.kind, medium.persistence, medium.cache) {
        (MediumKind::Nvram, Some(Persistence::MapSync), _) => "map-sync",
        (MediumKind::Nvram, Some(Persistence::Battery), _) => "battery",
        (MediumKind::Nvram, _, _) => "msync",
        (MediumKind::Ssd, _, Some(Cache::Buffered)) => "buffered",
        (MediumKind::Ssd, _, _) => "direct",
    };
    MediumInfo {
        kind: medium.kind.to_string(),
        path: medium.path.to_string_lossy().into_owned(),
        size_bytes: medium.size_bytes,
        written_bytes: medium.bytes_written,
        persistence: persistence.to_owned(),
    }
}
