// SPDX-License-Identifier: Apache-2.0 OR MIT

//! All VMs of this host: which may be started, what is done with all of them when the power fails and comes back.
//!
//! ```text
//!   control socket ──► Host::start, save, … ──► Vm::call ──► that VM's keeper
//!   power loop ──────► Host::save_all, resume_all ──► every VM's keeper, the most important first
//! ```
//!
//! No lock is held while a VM is waited for.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{error, warn};
use vssd_protocol::control::ErrorCode;

use crate::config::Config;
use crate::definition::Definition;
use crate::fault::Fault;
use crate::lint::{self, Finding, Level};
use crate::nvram::{self, MediumConfig, MediumKind, Nvram, Verdict};
use crate::power::budget::{self, Budget, Plan, Steps};
use crate::record::{Record, Records, Wanted};
use crate::vm::{Medium, Order, Shared, Status, Tell, Vm, VmState};
use crate::vmm;

/// What each step of a save is taken to need before it was ever measured, in microseconds.
const ASSUMED: Steps = Steps { stop_us: 5_000, save_us: 20_000, commit_us: 5_000, flush_us: 20_000 };
/// Between a critical event and the first order to stop.
const REACTION_US: u64 = 2_000;

/// What saving or resuming all came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub ok: u32,
    pub failed: u32,
    pub took: Duration,
}

/// All VMs.
#[derive(Debug)]
pub struct Host {
    shared: Arc<Shared>,
    vms: RwLock<BTreeMap<String, Arc<Vm>>>,
    /// VMs whose records cannot be read.
    unreadable: BTreeMap<String, Fault>,
    budget: Budget,
    /// One VM is defined or admitted at a time: two that fit alone may not fit together.
    admission: Mutex<()>,
}

impl Host {
    /// Opens the media and reads the records. No machine is looked at before [`Host::recover`].
    pub fn open(config: &Config, teller: Arc<dyn Tell>) -> Result<Self, Fault> {
        let shared = Arc::new(Shared {
            records: Records::open(&config.state_dir.join("vms"))?,
            media: config.nvram.iter().map(open_medium).collect(),
            runtime_dir: config.runtime_dir.join("vms"),
            log_dir: config.log_dir.clone(),
            vssd_dir: config.vssd.runtime_dir.join("dev"),
            swap_dir: config.swap_dir(),
            teller,
            held_back: AtomicBool::new(false),
        });
        let (mut vms, mut unreadable) = (BTreeMap::new(), BTreeMap::new());
        for (name, record) in shared.records.all()? {
            match record {
                Ok(record) => {
                    vms.insert(name, Arc::new(keep(record, &shared)?));
                }
                Err(error) => {
                    error!(vm = name, %error, "a VM's record cannot be read; its memory is left alone");
                    unreadable.insert(name, error.into());
                }
            }
        }
        let lanes = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let budget = config.power.budget(REACTION_US, lanes, ASSUMED);
        Ok(Self { shared, vms: RwLock::new(vms), unreadable, budget, admission: Mutex::new(()) })
    }

    /// Adopts what runs, resumes what was saved and is wanted, starts what is to start with the daemon.
    pub fn recover(&self) -> Outcome {
        let begun = Instant::now();
        let mut outcome = self.for_all(Order::Recover, |_| true, |_| true);
        for vm in self.vms() {
            if vm.status().state == VmState::Stopped && vm.definition().autostart {
                match self.start(&vm.status().name) {
                    Ok(_) => outcome.ok += 1,
                    Err(fault) => {
                        error!(vm = vm.status().name, code = fault.code.as_str(), %fault, "cannot start with the daemon");
                        outcome.failed += 1;
                    }
                }
            }
        }
        Outcome { took: begun.elapsed(), ..outcome }
    }

    // ---- for operators ----

    pub fn define(&self, text: &str, replace: bool) -> Result<Status, Fault> {
        let definition = vmm::read_definition(text)?;
        self.check_place(&definition)?;
        let _one = self.one_at_a_time();
        let name = definition.name.clone();
        if let Some(fault) = self.unreadable.get(&name) {
            return Err(fault.clone());
        }
        if let Ok(vm) = self.vm(&name) {
            if !replace {
                return Err(Fault::new(ErrorCode::Exists, format!("{name} is defined already"))
                    .hint("--replace changes a stopped VM"));
            }
            return vm.redefine(definition);
        }
        let record = Record::new(definition);
        self.shared.records.write(&record)?;
        let vm = Arc::new(keep(record, &self.shared)?);
        let status = vm.status();
        self.vms.write().unwrap_or_else(PoisonError::into_inner).insert(name, vm);
        Ok(status)
    }

    pub fn undefine(&self, name: &str) -> Result<(), Fault> {
        let _one = self.one_at_a_time();
        self.vm(name)?.call(Order::Undefine)?;
        self.vms.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        Ok(())
    }

    pub fn list(&self) -> Vec<Status> {
        self.vms().iter().map(|vm| vm.status()).collect()
    }

    pub fn show(&self, name: &str) -> Result<Status, Fault> {
        Ok(self.vm(name)?.status())
    }

    pub fn start(&self, name: &str) -> Result<Status, Fault> {
        let vm = self.vm(name)?;
        let _one = self.one_at_a_time();
        self.admit(&vm.status())?;
        vm.call(Order::Start)
    }

    pub fn order(&self, name: &str, order: Order) -> Result<Status, Fault> {
        let vm = self.vm(name)?;
        if order != Order::Resume {
            return vm.call(order);
        }
        let _one = self.one_at_a_time();
        self.admit(&vm.status())?;
        vm.call(order)
    }

    pub fn lint(&self, text: &str) -> Result<Vec<Finding>, Fault> {
        Ok(lint::lint(&vmm::read_definition(text)?))
    }

    pub fn media(&self) -> &[Medium] {
        &self.shared.media
    }

    pub fn unreadable(&self) -> &BTreeMap<String, Fault> {
        &self.unreadable
    }

    // ---- for power ----

    /// What saving all that runs comes to at worst.
    pub fn plan(&self) -> Plan {
        self.budget.plan(&self.running())
    }

    /// Saves every persistent guest that runs, the most important first, as many at a time as there are processors; call
    /// [`Host::hold_back`] before.
    ///
    /// All others are told afterwards: one may be about to run, and each VM does what it is told in order.
    pub fn save_all(&self) -> Outcome {
        self.for_all(Order::Hold, |status| status.nvram.is_some(), |status| status.state == VmState::Saved)
    }

    /// Continues every guest that is wanted to run and was saved, or could not be, until the power fails again.
    pub fn resume_all(&self) -> Outcome {
        let waits = |status: &Status| {
            matches!(status.state, VmState::Saved | VmState::Paused)
                && status.wanted == Wanted::Running
                && !self.shared.held_back.load(Ordering::SeqCst)
        };
        self.for_all(Order::Resume, waits, |status| status.state == VmState::Running)
    }

    /// Makes what guests have written so far durable, so that little is left to do when they are saved.
    pub fn flush_all(&self) {
        for nvram in self.shared.media.iter().filter_map(|medium| medium.nvram.as_ref().ok()) {
            for region in nvram.list() {
                if let Err(error) = nvram.flush(region.id) {
                    warn!(medium = nvram.name(), %error, "cannot flush ahead of a save");
                }
            }
        }
    }

    /// Gives an order to all VMs for which it is wanted when it is their turn, and counts those that are as they should be then.
    fn for_all(
        &self,
        order: Order,
        wanted: impl Fn(&Status) -> bool,
        counts: impl Fn(&Status) -> bool,
    ) -> Outcome {
        let begun = Instant::now();
        let mut queue: Vec<(Arc<Vm>, Status)> = self
            .vms()
            .into_iter()
            .map(|vm| {
                let status = vm.status();
                (vm, status)
            })
            .filter(|(_, status)| wanted(status))
            .collect();
        queue.sort_by_key(|(_, status)| (!is_unsaved(status), Reverse(status.priority), status.name.clone()));
        let (sender, answers) = channel();
        let mut outcome = Outcome::default();
        let mut waiting = queue.iter();
        let mut under_way = 0;
        loop {
            while under_way < self.budget.lanes
                && let Some((vm, status)) = waiting.next()
            {
                if !wanted(status) {
                    continue;
                }
                vm.send_order(order, sender.clone());
                under_way += 1;
            }
            if under_way == 0 {
                break;
            }
            match answers.recv() {
                Ok(Ok(status)) => outcome.ok += u32::from(counts(&status)),
                Ok(Err(fault)) => {
                    warn!(?order, code = fault.code.as_str(), %fault, "one VM did not do as all");
                    outcome.failed += 1;
                }
                Err(_) => break,
            }
            under_way -= 1;
        }
        Outcome { took: begun.elapsed(), ..outcome }
    }

    /// Until this is called again, nobody may start what would have to be saved at once, and long work is broken off.
    pub fn hold_back(&self, held: bool) {
        self.shared.held_back.store(held, Ordering::SeqCst);
    }

    fn one_at_a_time(&self) -> MutexGuard<'_, ()> {
        self.admission.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a VM may begin to run.
    fn admit(&self, status: &Status) -> Result<(), Fault> {
        let Some(medium) = &status.nvram else { return Ok(()) };
        self.check_medium(medium)?;
        self.check_lint(&status.name)?;
        let others: Vec<budget::Vm> =
            self.running().into_iter().filter(|vm| vm.name != status.name).collect();
        self.budget.admits(&others, &on_budget(status)).map_err(|refusal| {
            Fault::new(ErrorCode::Budget, refusal.to_string()).hint(
                "`vm-host power status` shows the budget; stop or swap out another VM, or lengthen `window_ms` if the hardware allows",
            )
        })?;
        Ok(())
    }

    /// Whether the hypervisor can use memory as it lies on the medium. One that cannot be looked at is not judged.
    fn check_place(&self, definition: &Definition) -> Result<(), Fault> {
        let medium = definition.nvram.as_deref().map(|name| self.shared.medium(name));
        let Some(Ok(nvram)) = medium else { return Ok(()) };
        let whole = nvram.capabilities().kind == MediumKind::Directory;
        if whole || vmm::of(definition.hypervisor).can_use_part_of_file() {
            return Ok(());
        }
        let message = format!(
            "nvram: {} needs a file for a guest's memory alone, and {} is one device for all",
            definition.hypervisor,
            nvram.name()
        );
        Err(Fault::new(ErrorCode::InvalidParams, message).hint(
            "make a file system with DAX on the device and name a directory of it as NV-RAM, or use QEMU",
        ))
    }

    fn check_medium(&self, name: &str) -> Result<(), Fault> {
        match self.shared.medium(name)?.capabilities().verdict() {
            Verdict::Keeps { .. } => Ok(()),
            Verdict::Loses { why, advice } => Err(loses(name, &why, advice)),
        }
    }

    fn check_lint(&self, name: &str) -> Result<(), Fault> {
        let definition = self.vm(name)?.definition();
        let found = lint::lint(&definition);
        for finding in &found {
            warn!(vm = name, finding = finding.name, allowed = finding.allowed, "{}", finding.message);
        }
        match found.into_iter().find(|finding| finding.level == Level::Error && !finding.allowed) {
            None => Ok(()),
            Some(finding) => Err(Fault::new(
                ErrorCode::Lint,
                format!("{name} would not survive a power cut: {}", finding.message),
            )
            .hint(format!("{}; or allow = [\"{}\"] in its definition", finding.hint, finding.name))),
        }
    }

    fn running(&self) -> Vec<budget::Vm> {
        let runs = |status: &&Status| status.nvram.is_some() && is_unsaved(status);
        self.list().iter().filter(runs).map(on_budget).collect()
    }

    fn vms(&self) -> Vec<Arc<Vm>> {
        self.vms.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn vm(&self, name: &str) -> Result<Arc<Vm>, Fault> {
        let found = self.vms.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        match (found, self.unreadable.get(name)) {
            (Some(vm), _) => Ok(vm),
            (None, Some(fault)) => Err(fault.clone()),
            (None, None) => Err(Fault::new(ErrorCode::NotFound, format!("there is no VM {name:?}"))
                .hint("`vm-host list` shows those that there are")),
        }
    }
}

fn keep(record: Record, shared: &Arc<Shared>) -> Result<Vm, Fault> {
    Vm::new(record, Arc::clone(shared))
        .map_err(|error| Fault::new(ErrorCode::Internal, format!("cannot take care of a VM: {error}")))
}

/// Whether a power cut would take its guest.
fn is_unsaved(status: &Status) -> bool {
    matches!(status.state, VmState::Running | VmState::Paused)
}

fn open_medium(config: &MediumConfig) -> Medium {
    let nvram = open_or_create(config).map(Arc::new).inspect_err(|fault| {
        error!(medium = config.name, code = fault.code.as_str(), %fault, "cannot open NV-RAM; its VMs stay as they are");
    });
    Medium { config: config.clone(), nvram }
}

/// A blank medium is made ready only where guests can be kept: the folder that a file system was to be mounted on is none.
fn open_or_create(config: &MediumConfig) -> Result<Nvram, Fault> {
    match Nvram::open(config) {
        Err(nvram::Error::Unformatted { .. }) => {}
        other => return Ok(other?),
    }
    match nvram::probe(config)?.verdict() {
        Verdict::Keeps { .. } => Ok(Nvram::create(config)?),
        Verdict::Loses { why, advice } => Err(loses(&config.name, &why, advice)),
    }
}

fn loses(medium: &str, why: &str, advice: String) -> Fault {
    Fault::new(ErrorCode::Lint, format!("{medium} would lose what guests store in it: {why}")).hint(advice)
}

fn on_budget(status: &Status) -> budget::Vm {
    budget::Vm { name: status.name.clone(), priority: status.priority, measured: status.worst }
}
